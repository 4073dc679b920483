"""Triton implementations of the operators, one file a family; each takes exactly the arguments of its schema in ops.py."""

from adaselect_kernels.kernels.bank import bank_select
from adaselect_kernels.kernels.batch_stage import batch_scores, select_from_losses
from adaselect_kernels.kernels.fused import fused_select
from adaselect_kernels.kernels.grad_norms import (
    affine_grad_sq_norms,
    conv_grad_sq_norms,
    embedding_grad_sq_norms,
    linear_grad_sq_norms,
    linear_grads_and_sq_norms,
)
from adaselect_kernels.kernels.linear import (
    combine_partials,
    fused_linear_select,
    linear_partials,
    linear_per_sample_stats,
)
from adaselect_kernels.kernels.losses import cross_entropy_backward, linear_loss_backward
from adaselect_kernels.kernels.row_stats import per_sample_stats
from adaselect_kernels.kernels.select import select_mask, select_topk

__all__ = [
    "affine_grad_sq_norms",
    "bank_select",
    "batch_scores",
    "combine_partials",
    "conv_grad_sq_norms",
    "cross_entropy_backward",
    "embedding_grad_sq_norms",
    "fused_linear_select",
    "fused_select",
    "linear_grad_sq_norms",
    "linear_grads_and_sq_norms",
    "linear_loss_backward",
    "linear_partials",
    "linear_per_sample_stats",
    "per_sample_stats",
    "select_from_losses",
    "select_mask",
    "select_topk",
]
