"""Logits to selection. A training batch takes one launch: its programs compute the losses of their rows, and the one that
arrives last scores and selects for all of them. Other shapes run the row, batch and selection launches in turn."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaselect_kernels.kernels.batch_small import finish_batch
from adaselect_kernels.kernels.batch_stage import SHIPPED_PLANS, score_rows
from adaselect_kernels.kernels.batch_terms import Plan, Rows, make_plan
from adaselect_kernels.kernels.maths import float64_from_bits, float_bits, last_to_arrive
from adaselect_kernels.kernels.row_stats import (
    make_layout,
    mean_over_positions,
    row_stats,
    stats_code,
    tile_config,
)
from adaselect_kernels.kernels.row_stats_kernels import tile_rows
from adaselect_kernels.kernels.runtime import Compilation, Launch, cached, ceil_div, counters, launch_device
from adaselect_kernels.kernels.select import ALL_ROWS_RANKED, ONE_PROGRAM_ROWS, block_size, block_warps, sort_chosen
from adaselect_kernels.options import METHODS, STATS

_LOSS, _GRAD_NORM = STATS.index("loss"), STATS.index("grad_norm")
_CORESET1 = METHODS.index("coreset1")


@triton.jit(
    do_not_specialize=[
        "n", "k", "classes", "ignore_index", "smoothing_bits", "seed", "beta_bits", "temperature_bits", "floor_bits",
        "power_bits",
    ]
)  # fmt: skip
def fused_kernel(
    logits_ptr, targets_ptr, state_ptr, losses_ptr, grads_ptr, arrivals_ptr,
    scores_ptr, n_valid_ptr, indices_ptr, out_losses_ptr,
    n, k, inner, classes, stride_outer, stride_inner, stride_class, stride_target_outer, stride_target_inner,
    ignore_index, smoothing_bits: tl.int64, seed: tl.int64, beta_bits: tl.int64, temperature_bits: tl.int64,
    floor_bits: tl.int64, power_bits: tl.int64,
    WANT: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr,
    HAS_GRAD: tl.constexpr, METHOD_CODES: tl.constexpr, M: tl.constexpr, USED: tl.constexpr, HAS_STATE: tl.constexpr,
    BASELINE: tl.constexpr, STANDARDIZE: tl.constexpr, LOG_RATIO: tl.constexpr, HAS_FLOOR: tl.constexpr,
    CURRICULUM: tl.constexpr, SELECT: tl.constexpr, BY_SCORE: tl.constexpr, COPY_LOSSES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    COMPUTE: tl.constexpr = losses_ptr.dtype.element_ty
    # 1. losses (and gradient norms) of this program's rows
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    values = tile_rows(
        logits_ptr, targets_ptr, rows, n, inner, classes,
        stride_outer, stride_inner, stride_class, stride_target_outer, stride_target_inner, ignore_index,
        float64_from_bits(smoothing_bits).to(COMPUTE), VEC, R, W, COMPUTE, WANT,
    )  # fmt: skip
    tl.store(losses_ptr + rows, values[0], mask=rows < n)
    if HAS_GRAD:
        tl.store(grads_ptr + rows, values[2], mask=rows < n)

    # 2. the program that arrives last scores and selects all rows; a row is not valid where its target is ignored
    if last_to_arrive(arrivals_ptr, tl.num_programs(0)):
        finish_batch(
            losses_ptr, grads_ptr, targets_ptr, state_ptr, scores_ptr, n_valid_ptr, indices_ptr, out_losses_ptr,
            tl.arange(0, BLOCK), n, k, 1, 1, inner, stride_target_outer, stride_target_inner, ignore_index,
            seed, beta_bits, temperature_bits, floor_bits, power_bits,
            HAS_GRAD, True, METHOD_CODES, M, USED, HAS_STATE, BASELINE, STANDARDIZE, LOG_RATIO, HAS_FLOOR, CURRICULUM,
            SELECT, BY_SCORE, COPY_LOSSES, COMPUTE,
        )  # fmt: skip


class _Single(NamedTuple):
    """A batch that takes one launch."""

    launch: Launch
    n: int
    smoothing: int  # as a float64 pattern
    to_sort: bool  # the chosen rows come ascending and are wanted best first


@cached
def _single_launch(
    shape: Sequence[int], strides: tuple[int, ...], target_strides: tuple[int, ...], dtype: torch.dtype, aligned: bool,
    plan: Plan, k: int, unit: str, order: str, ignore_index: int, label_smoothing: float,
) -> _Single | None:  # fmt: skip
    """The single launch, or None where the batch takes several."""
    layout = make_layout(shape, strides, target_strides, dtype, aligned)
    n, classes = layout.n_rows, layout.classes
    per_row = len(shape) == 2 or unit == "token"
    both_ends = plan.baseline and plan.methods[0] == _CORESET1
    if not per_row or n > ONE_PROGRAM_ROWS or plan.selected or both_ends or not layout.uses_tile:
        return None
    block = block_size(n)
    num_warps = block_warps(block)
    _, want = stats_code(wanted_stats(plan), label_smoothing)
    config = tile_config(classes, layout.vec, dtype.itemsize, num_warps, want)
    by_score = order == "score" and k > 1
    ranked = by_score and n <= ALL_ROWS_RANKED.value
    constants = {
        "WANT": want, **config._asdict(), "HAS_GRAD": plan.has_grad, **plan.flags, "SELECT": True, "BY_SCORE": ranked,
        "COPY_LOSSES": dtype == torch.float64, "BLOCK": block,
    }  # fmt: skip
    integers = (n, k, *layout.tile_integers(), ignore_index)
    launch = Launch(fused_kernel, (ceil_div(n, config.BLOCK_N),), integers, constants, num_warps)
    return _Single(launch, n, float_bits(label_smoothing), by_score and not ranked)


def fused_select(
    logits: Tensor, targets: Tensor, state: Tensor | None, methods: Sequence[int], k: int, unit: str, order: str,
    ignore_index: int, label_smoothing: float, seed: int, options: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan = make_plan(methods, state is not None, options)
    single = _single_launch(
        logits.shape, logits.stride(), targets.stride(), logits.dtype, logits.data_ptr() % 16 == 0,
        plan, k, unit, order, ignore_index, label_smoothing,
    )  # fmt: skip
    if single is None:
        stats = row_stats(logits, targets, wanted_stats(plan), ignore_index, label_smoothing)
        return select_from_stats(stats, targets, state, plan, k, unit, order, ignore_index, seed, options)
    n, device = single.n, logits.device
    scores = torch.empty(n, dtype=torch.float32, device=device)
    out_losses = torch.empty_like(scores)
    indices = torch.empty(k, dtype=torch.int64, device=device)
    n_valid = torch.empty((), dtype=torch.int64, device=device)
    losses = torch.empty(n, dtype=torch.float64, device=device) if logits.dtype == torch.float64 else out_losses
    grads = torch.empty_like(losses) if plan.has_grad else losses
    with launch_device(logits):
        single.launch(
            logits, targets, losses if state is None else state, losses, grads, counters(device, 1),
            scores, n_valid, indices, out_losses,
            options=(single.smoothing, seed, plan.beta, plan.temperature, plan.floor, plan.power),
        )  # fmt: skip
        if single.to_sort:
            indices = sort_chosen(scores, indices, True)
    return indices, scores, out_losses, n_valid


def wanted_stats(plan: Plan) -> tuple[int, ...]:
    """The statistics a selection reads."""
    return (_LOSS, _GRAD_NORM) if plan.has_grad else (_LOSS,)


def select_from_stats(
    per_position: Tensor, targets: Tensor, state: Tensor | None, plan: Plan, k: int, unit: str, order: str,
    ignore_index: int, seed: int, options: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The batch stage and the choice, from the statistics `wanted_stats` of every position [S, positions]."""
    if targets.dim() == 1 or unit == "token":
        stats, valid, invalid_value = per_position, targets, ignore_index
    else:
        valid, invalid_value = torch.empty(targets.shape[0], dtype=torch.uint8, device=targets.device), 0
        stats = mean_over_positions(per_position, targets, wanted_stats(plan), ignore_index, valid)
    losses = stats[0]
    rows = Rows(losses, stats[1] if plan.has_grad else None, valid, invalid_value)
    double = losses.dtype == torch.float64
    out_losses = torch.empty(losses.shape[0], dtype=torch.float32, device=losses.device) if double else None
    scores, n_valid, indices = score_rows(rows, state, plan.methods, k, order, seed, options, out_losses)
    assert indices is not None
    return indices, scores, losses if out_losses is None else out_losses, n_valid


def shipped() -> Iterator[Compilation]:
    """The single launch: every tile size with a batch of 128 rows, and the largest batch with the default methods."""
    for pointee, element_bytes in (("fp32", 4), ("bf16", 2), ("fp16", 2), ("fp64", 8)):
        compute = "fp64" if pointee == "fp64" else "fp32"
        pointers = {
            "logits_ptr": pointee, "targets_ptr": "i64", "state_ptr": "fp64", "losses_ptr": compute, "grads_ptr": compute,
            "arrivals_ptr": "i32", "scores_ptr": "fp32", "n_valid_ptr": "i64", "indices_ptr": "i64",
            "out_losses_ptr": "fp32",
        }  # fmt: skip
        vec = 16 // element_bytes
        for name, classes, n in (
            ("default", 16, 128), ("default", 128, 128), ("default", 1024, 128), ("default", 16, ONE_PROGRAM_ROWS),
            ("default", 2048, ONE_PROGRAM_ROWS), ("every", 128, 128), ("every", 2048, ONE_PROGRAM_ROWS),
        ):  # fmt: skip
            if pointee in ("fp16", "fp64") and classes != 128:
                continue  # the same code as bfloat16's, and a rare type: the middle ones stand for the others
            plan = SHIPPED_PLANS[name]
            num_warps = block_warps(n)
            _, want = stats_code(wanted_stats(plan), 0.0)
            yield Compilation(
                f"fused-{pointee}-{name}-C{classes}-N{n}", fused_kernel, pointers,
                {
                    "WANT": want, **tile_config(classes, vec, element_bytes, num_warps, want)._asdict(),
                    "HAS_GRAD": plan.has_grad, **plan.flags, "SELECT": True, "BY_SCORE": False,
                    "COPY_LOSSES": pointee == "fp64", "BLOCK": n,
                }, num_warps, ones=("inner", "stride_class", "stride_target_outer"), load_bits=128,
            )  # fmt: skip
