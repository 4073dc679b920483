"""Benchmarks of adaselect_kernels: `python -m benchmarks run|report|gpu|list`. Nothing of the package imports this."""

import os

# read when torch is imported: the profiler, which counts allocations, prints its starts and stops below this level
os.environ.setdefault("KINETO_LOG_LEVEL", "9")
