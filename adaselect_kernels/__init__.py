"""Choose, inside each training step, the samples or tokens worth a backward pass."""

from adaselect_kernels.functional import (
    SampleStats,
    Selection,
    fused_select,
    per_sample_stats,
    select_from_losses,
    select_topk,
)
from adaselect_kernels.options import AdaSelectionOptions
from adaselect_kernels.state import AdaSelectionState

__version__ = "0.1.0"
