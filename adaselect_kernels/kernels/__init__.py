"""Triton implementations of the operators, one file a family; each takes exactly the arguments of its schema in ops.py."""

from adaselect_kernels.kernels.batch_stage import batch_scores, select_from_losses
from adaselect_kernels.kernels.fused import fused_select
from adaselect_kernels.kernels.row_stats import per_sample_stats
from adaselect_kernels.kernels.select import select_topk

__all__ = ["batch_scores", "fused_select", "per_sample_stats", "select_from_losses", "select_topk"]
