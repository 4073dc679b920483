"""Per-sample gradient norms of any model: exact, or refused by name; and what cheaper norms give instead."""

from adaselect_kernels.grad_norms.arrivals import UnaccountedParameter
from adaselect_kernels.grad_norms.context import PerSampleGradNorm
from adaselect_kernels.grad_norms.dial import DialReport, dial_report, sample_grad_norms

__all__ = ["DialReport", "PerSampleGradNorm", "UnaccountedParameter", "dial_report", "sample_grad_norms"]
