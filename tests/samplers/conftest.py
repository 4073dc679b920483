"""The interpreted Triton tests are collected only where TRITON_INTERPRET=1, as those of the folder above."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_triton_bank.py"]
