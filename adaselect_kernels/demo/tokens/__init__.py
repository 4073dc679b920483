"""Token selection on a small GPT, compared with the full loss and with random tokens at equal training time.

Needs the packages of the `demo` extra.
"""

from adaselect_kernels.demo.tokens.config import TokensConfig
from adaselect_kernels.demo.tokens.session import run

__all__ = ["TokensConfig", "run"]
