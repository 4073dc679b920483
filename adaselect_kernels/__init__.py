"""Choose, inside each training step, the samples or tokens worth a backward pass."""

from adaselect_kernels._version import __version__
from adaselect_kernels.functional import (
    SampleStats,
    Selection,
    WeightedSelection,
    bank_select,
    fused_select,
    mask_to_indices,
    per_sample_stats,
    select_from_losses,
    select_mask,
    select_topk,
)
from adaselect_kernels.grad_norms import PerSampleGradNorm
from adaselect_kernels.linear import fused_linear_select, linear_per_sample_stats
from adaselect_kernels.losses import selected_cross_entropy, selected_linear_cross_entropy
from adaselect_kernels.options import AdaSelectionOptions
from adaselect_kernels.policies import TokenSelection, TokenSelector, get_policy
from adaselect_kernels.samplers import get_sampler
from adaselect_kernels.state import AdaSelectionState

__all__ = [
    "AdaSelectionOptions",
    "AdaSelectionState",
    "PerSampleGradNorm",
    "SampleStats",
    "Selection",
    "TokenSelection",
    "TokenSelector",
    "WeightedSelection",
    "__version__",
    "bank_select",
    "fused_linear_select",
    "fused_select",
    "get_policy",
    "get_sampler",
    "linear_per_sample_stats",
    "mask_to_indices",
    "per_sample_stats",
    "select_from_losses",
    "select_mask",
    "select_topk",
    "selected_cross_entropy",
    "selected_linear_cross_entropy",
]
