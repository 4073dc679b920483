"""Per-sample gradient norms of any model: exact, or refused by name."""

from adaselect_kernels.grad_norms.context import PerSampleGradNorm
from adaselect_kernels.grad_norms.recorder import UnaccountedParameter

__all__ = ["PerSampleGradNorm", "UnaccountedParameter"]
