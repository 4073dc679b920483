"""Scores of a batch of up to ONE_PROGRAM_ROWS rows, and the choice, in one program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaselect_kernels.kernels.batch_terms import (
    USES_GRAD,
    USES_MIDDLE,
    USES_NOISE,
    Plan,
    Rows,
    RowsShape,
    baseline_key,
    component_sums,
    load_rows,
    load_step,
    mixed_score,
    moments,
    reward,
    spread,
    weigh,
)
from adaselect_kernels.kernels.maths import exponential_noise, float64_from_bits, ordered_key
from adaselect_kernels.kernels.runtime import Launch, cached, launch_device
from adaselect_kernels.kernels.select import ALL_ROWS_RANKED, block_size, block_warps, select_block, sort_chosen


@triton.jit
def score_batch(
    loss, g, ok, rows, state_ptr, seed, beta, temperature, floor, power,
    METHOD_CODES: tl.constexpr, M: tl.constexpr, USED: tl.constexpr, HAS_STATE: tl.constexpr, BASELINE: tl.constexpr,
    STANDARDIZE: tl.constexpr, LOG_RATIO: tl.constexpr, HAS_FLOOR: tl.constexpr, CURRICULUM: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK] float32 of a whole batch in one program, the number of valid rows; updates the state."""
    step = load_step(state_ptr, HAS_STATE, M)
    noise = loss
    if USES_NOISE & USED:
        noise = exponential_noise(rows, step.to(tl.int64), seed, loss.dtype)

    # 1. moments over valid rows
    n_valid = tl.sum(ok.to(tl.int32), axis=0)
    count = tl.maximum(n_valid, 1).to(loss.dtype)
    l_mean, l_apart, l_max = moments(loss, ok, n_valid)
    l_min = tl.min(tl.where(ok, loss, float("inf")), axis=0)
    if BASELINE:
        score = baseline_key(METHOD_CODES & 15, loss, g, noise, l_mean, l_max, l_min)
        if HAS_STATE:
            tl.debug_barrier()  # every warp has read the old step
            tl.store(state_ptr + 2 * M, step + 1.0)
    else:
        l_scale = spread(tl.sqrt(l_apart / count), temperature.to(loss.dtype), STANDARDIZE)
        g_max = l_max
        g_scale = l_scale
        if USES_GRAD & USED:
            _, g_apart, g_max = moments(g, ok, n_valid)
            g_scale = spread(tl.sqrt(g_apart / count), temperature.to(loss.dtype), STANDARDIZE)
        middle_min = l_min
        if USES_MIDDLE & USED:
            middle_min = tl.min(tl.where(ok, tl.abs(loss - l_mean), float("inf")), axis=0)

        # 2. sums of every component, alone and weighted by the losses
        sums, weighted = component_sums(
            loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min, USED
        )

        # 3. weights, then s = r sum_m w alpha
        factors = weigh(
            sums, weighted, n_valid, sums, state_ptr, state_ptr, n_valid * 0, step, beta, floor,
            METHOD_CODES, M, HAS_STATE, False, LOG_RATIO, HAS_FLOOR,
        )  # fmt: skip
        score = mixed_score(
            factors, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min, USED
        )
        if CURRICULUM:
            score *= reward(loss, tl.sum(loss * loss, axis=0), n_valid, step, power, CURRICULUM)
    return tl.where(ok, score, float("-inf")).to(tl.float32), n_valid


@triton.jit(
    do_not_specialize=["n", "k", "invalid_value", "seed", "beta_bits", "temperature_bits", "floor_bits", "power_bits"]
)
def batch_kernel(
    losses_ptr, grads_ptr, valid_ptr, state_ptr, scores_ptr, n_valid_ptr, indices_ptr, out_losses_ptr,
    n, k, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
    seed: tl.int64, beta_bits: tl.int64, temperature_bits: tl.int64, floor_bits: tl.int64, power_bits: tl.int64,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr,
    METHOD_CODES: tl.constexpr, M: tl.constexpr, USED: tl.constexpr, HAS_STATE: tl.constexpr, BASELINE: tl.constexpr,
    STANDARDIZE: tl.constexpr, LOG_RATIO: tl.constexpr, HAS_FLOOR: tl.constexpr, CURRICULUM: tl.constexpr,
    SELECT: tl.constexpr, BY_SCORE: tl.constexpr, COPY_LOSSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores of up to BLOCK rows and, when SELECT, the k best of them, in one program."""
    COMPUTE: tl.constexpr = tl.float64 if losses_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.arange(0, BLOCK)
    finish_batch(
        losses_ptr, grads_ptr, valid_ptr, state_ptr, scores_ptr, n_valid_ptr, indices_ptr, out_losses_ptr, rows,
        n, k, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
        seed, beta_bits, temperature_bits, floor_bits, power_bits,
        HAS_GRAD, HAS_VALID, METHOD_CODES, M, USED, HAS_STATE, BASELINE, STANDARDIZE, LOG_RATIO, HAS_FLOOR, CURRICULUM,
        SELECT, BY_SCORE, COPY_LOSSES, COMPUTE,
    )  # fmt: skip


@triton.jit
def finish_batch(
    losses_ptr, grads_ptr, valid_ptr, state_ptr, scores_ptr, n_valid_ptr, indices_ptr, out_losses_ptr, rows,
    n, k, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
    seed, beta_bits, temperature_bits, floor_bits, power_bits,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr,
    METHOD_CODES: tl.constexpr, M: tl.constexpr, USED: tl.constexpr, HAS_STATE: tl.constexpr, BASELINE: tl.constexpr,
    STANDARDIZE: tl.constexpr, LOG_RATIO: tl.constexpr, HAS_FLOOR: tl.constexpr, CURRICULUM: tl.constexpr,
    SELECT: tl.constexpr, BY_SCORE: tl.constexpr, COPY_LOSSES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Everything after the losses, for all rows of a batch: what a one-program launch and the fused launch end with."""
    loss, g, ok = load_rows(
        losses_ptr, grads_ptr, valid_ptr, rows, n, stride_loss, stride_grad,
        valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, HAS_GRAD, HAS_VALID, COMPUTE,
    )  # fmt: skip
    scores, n_valid = score_batch(
        loss, g, ok, rows, state_ptr, seed.to(tl.int64), float64_from_bits(beta_bits), float64_from_bits(temperature_bits),
        float64_from_bits(floor_bits), float64_from_bits(power_bits),
        METHOD_CODES, M, USED, HAS_STATE, BASELINE, STANDARDIZE, LOG_RATIO, HAS_FLOOR, CURRICULUM,
    )  # fmt: skip
    tl.store(scores_ptr + rows, scores, mask=rows < n)
    tl.store(n_valid_ptr, n_valid.to(tl.int64))
    if COPY_LOSSES:
        stored = tl.load(losses_ptr + rows.to(tl.int64) * stride_loss, mask=rows < n, other=0.0, cache_modifier=".cg")
        tl.store(out_losses_ptr + rows, stored.to(tl.float32), mask=rows < n)
    if SELECT:
        select_block(ordered_key(scores, True), rows, n, k, indices_ptr, BY_SCORE)


def one_program(
    rows: Rows, state: Tensor | None, plan: Plan, k: int, order: str | None, seed: int, out_losses: Tensor | None
):
    """Scores, number of valid rows and (unless `order` is None) indices of a batch that fits one program."""
    losses = rows.losses
    n, device = losses.shape[0], losses.device
    scores = torch.empty(n, dtype=torch.float32, device=device)
    n_valid = torch.empty((), dtype=torch.int64, device=device)
    indices = n_valid if order is None else torch.empty(k, dtype=torch.int64, device=device)
    by_score = order == "score" and k > 1
    ranked = by_score and n <= ALL_ROWS_RANKED.value
    launch = _batch_launch(rows.shape, plan, k, order is not None, ranked, out_losses is not None)
    with launch_device(losses):
        launch(
            *rows.tensors, losses if state is None else state, scores, n_valid, indices,
            scores if out_losses is None else out_losses,
            options=(seed, plan.beta, plan.temperature, plan.floor, plan.power),
        )  # fmt: skip
        if by_score and not ranked:
            indices = sort_chosen(scores, indices, True)
    return scores, n_valid, indices


@cached
def _batch_launch(shape: RowsShape, plan: Plan, k: int, select: bool, ranked: bool, copy_losses: bool) -> Launch:
    block = block_size(shape.n)
    constants = shape.flags() | plan.flags
    constants |= {"SELECT": select, "BY_SCORE": ranked, "COPY_LOSSES": copy_losses, "BLOCK": block}
    return Launch(batch_kernel, (1,), (shape.n, k, *shape.strides), constants, block_warps(block))
