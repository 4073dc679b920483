"""Scores of a batch from its losses (AdaSelection, equations 2 to 6), and the baselines' keys; the state is updated here.

Every method's importance is a combination of six components e_c >= 0 over the valid rows, each divided by its sum:
exp(u), exp(-u), exp(g), a, exp(-|u - mean u|) and E (coreset1 is half of the first and half of the second). So a batch
takes three steps: moments of the losses, sums of e_c and e_c l, then the scores. Up to ONE_PROGRAM_ROWS rows one program
does all three; beyond, one launch has a step of many programs for each (see maths.begin_step) and then those of the
selection. Every program combines the float64 partials of the step before in the same order. The first two are one step
where no component needs a moment of the whole batch: sums relative to a program's own extremes are rescaled.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaselect_kernels.kernels.maths import (
    begin_step,
    end_step,
    exponential_noise,
    exponential_precise,
    float64_from_bits,
    float_bits,
    is_finite,
    last_to_arrive,
    ordered_key,
    strided_offset,
)
from adaselect_kernels.kernels.runtime import Compilation, Launch, cached, ceil_div, counters, launch_device, up_to
from adaselect_kernels.kernels.select import (
    ALL_ROWS_RANKED,
    ONE_PROGRAM_ROWS,
    RadixTuning,
    RadixWork,
    block_size,
    block_warps,
    chunks,
    publish_digit,
    radix_work,
    select_block,
    select_step,
    select_topk,
    sort_chosen,
)
from adaselect_kernels.options import ADABOOST_EPS, METHODS, STD_EPS, PackedOptions

BIG, SMALL, GRAD, ADA, MIDDLE, NOISE = (tl.constexpr(code) for code in range(6))  # components
COMPONENTS = tl.constexpr(6)
USES_GRAD, USES_MIDDLE, USES_NOISE = (tl.constexpr(1 << code) for code in (2, 4, 5))
LANES = tl.constexpr(8)  # a vector that holds one number a component, or one a method
_COMPONENTS_OF = {
    "big_loss": (0,),
    "small_loss": (1,),
    "grad_norm": (2,),
    "adaboost": (3,),
    "coreset1": (0, 1),
    "coreset2": (4,),
    "uniform": (5,),
}
_CORESET1, _ADABOOST = METHODS.index("coreset1"), METHODS.index("adaboost")
CORESET1 = tl.constexpr(_CORESET1)
ADA_EPS = tl.constexpr(ADABOOST_EPS)
SPREAD_EPS = tl.constexpr(STD_EPS)

# Numbers a large batch keeps between its steps, float64. First the state before the call and its step:
STATE_SLOTS = tl.constexpr(16)
STEP = tl.constexpr(15)
# then of every program: n, mean, M2, max, min, sum l^2, mean, M2 and max of the gradient norms, and the sums.
MAXIMA, MINIMA, GRAD_MAXIMA, SUMS_AT = (tl.constexpr(i) for i in (3, 4, 8, 9))
MIDDLE_MINIMA = tl.constexpr(9 + 2 * 8)
SLOTS = 9 + 2 * 8 + 1


@triton.jit
def composition(METHOD: tl.constexpr, lane):
    """[LANES] share of every component in the method's importance: coreset1 is half and half, the others are one."""
    if METHOD == CORESET1:
        return tl.where((lane == BIG) | (lane == SMALL), 0.5, 0.0).to(tl.float64)
    elif METHOD < CORESET1:
        return tl.where(lane == METHOD, 1.0, 0.0).to(tl.float64)
    else:
        return tl.where(lane == METHOD - 1, 1.0, 0.0).to(tl.float64)


@triton.jit
def load_rows(
    losses_ptr, grads_ptr, valid_ptr, rows, n, stride_loss, stride_grad,
    valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Losses and gradient norms, 0 on invalid rows; which rows are valid. `.cg`: other programs may have stored them.

    WHOLE: all rows exist; without a mask a thread loads 16 bytes at a time.
    """
    inside = None if WHOLE else rows < n
    zero = None if WHOLE else 0.0
    at = rows.to(tl.int64)
    loss = tl.load(losses_ptr + at * stride_loss, mask=inside, other=zero, cache_modifier=".cg").to(COMPUTE)
    ok = is_finite(loss)
    if not WHOLE:
        ok = ok & inside
    if HAS_VALID:
        flag = tl.load(
            valid_ptr + strided_offset(rows, valid_inner, stride_valid_outer, stride_valid_inner), mask=inside
        )
        ok = ok & (flag != invalid_value)
    g = tl.zeros_like(loss)
    if HAS_GRAD:
        g = tl.load(grads_ptr + at * stride_grad, mask=inside, other=zero, cache_modifier=".cg").to(COMPUTE)
        ok = ok & is_finite(g)
        g = tl.where(ok, g, 0.0)
    return tl.where(ok, loss, 0.0), g, ok


@triton.jit
def load_block(
    losses_ptr, grads_ptr, valid_ptr, start, n, stride_loss, stride_grad,
    valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """load_rows of rows start .. start + BLOCK, and those rows."""
    rows = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        loss, g, ok = load_rows(
            losses_ptr, grads_ptr, valid_ptr, rows, n, stride_loss, stride_grad,
            valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, HAS_GRAD, HAS_VALID, COMPUTE, True,
        )  # fmt: skip
    else:
        loss, g, ok = load_rows(
            losses_ptr, grads_ptr, valid_ptr, rows, n, stride_loss, stride_grad,
            valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, HAS_GRAD, HAS_VALID, COMPUTE,
        )  # fmt: skip
    return rows, loss, g, ok


@triton.jit
def moments(values, ok, n):
    """Mean, sum (v - mean)^2 and maximum over valid rows; values are 0 on the others."""
    mean = tl.sum(values, axis=0) / tl.maximum(n, 1).to(values.dtype)
    apart = tl.where(ok, values - mean, 0.0)
    return mean, tl.sum(apart * apart, axis=0), tl.max(tl.where(ok, values, float("-inf")), axis=0)


@triton.jit
def adaboost_key(loss, l_max):
    """a = 0.5 log((1 + t) / (1 - t)), t = max(l, 0) / ((1 + eps) max l), without cancelling at l = max l; 0 if max l <= 0."""
    positive = tl.maximum(loss, 0.0)
    ratio = ((1.0 + ADA_EPS) * l_max + positive) / ((l_max - positive) + ADA_EPS * l_max)
    return tl.where(l_max > 0, 0.5 * tl.log(ratio), 0.0)


@triton.jit
def component(CODE: tl.constexpr, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min):
    """e_c of every row, 0 on invalid ones; exponents are shifted by their largest."""
    if CODE == BIG:
        # u / tau with u = l or (l - mean l) / (std l + 1e-6): differences to the maximum do not need the mean
        e = exponential_precise((loss - l_max) / l_scale)
    elif CODE == SMALL:
        e = exponential_precise((l_min - loss) / l_scale)
    elif CODE == GRAD:
        e = exponential_precise((g - g_max) / g_scale)
    elif CODE == ADA:
        # the importance is 1/n where sum a = 0, which is where max l <= 0
        e = tl.where(l_max > 0, adaboost_key(loss, l_max), 1.0)
    elif CODE == MIDDLE:
        e = exponential_precise((middle_min - tl.abs(loss - l_mean)) / l_scale)
    else:
        e = noise
    return tl.where(ok, e, 0.0)


@triton.jit
def baseline_key(METHOD: tl.constexpr, loss, g, noise, l_mean, l_max, l_min):
    """The method's k largest keys are its choice; coreset1's is for reporting only."""
    if METHOD == 0:
        key = loss
    elif METHOD == 1:
        key = -loss
    elif METHOD == 2:
        key = g
    elif METHOD == 3:
        key = adaboost_key(loss, l_max)
    elif METHOD == 4:
        key = tl.maximum(loss - l_min, l_max - loss)
    elif METHOD == 5:
        key = -tl.abs(loss - l_mean)
    else:
        key = noise
    return key


@triton.jit
def load_step(state_ptr, HAS_STATE: tl.constexpr, M: tl.constexpr):
    """t, 1 for a fresh state."""
    if HAS_STATE:
        return tl.load(state_ptr + 2 * M)
    else:
        return tl.full([], 1.0, tl.float64)


@triton.jit
def weigh(
    sums, weighted, n_valid, given, old_ptr, state_ptr, program, step, beta, floor,
    METHOD_CODES: tl.constexpr, M: tl.constexpr, HAS_STATE: tl.constexpr, GIVEN: tl.constexpr,
    LOG_RATIO: tl.constexpr, HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    """Equation 3: method losses, the new state, and the factor of every component in the score.

    sums, weighted [LANES] float64: sum e_c and sum e_c l by component; given [LANES]: the method losses when GIVEN. The
    state is read from `old` and written to `state` by program 0.
    """
    lane = tl.arange(0, LANES)
    used = lane < M

    # 1. method losses L_m = sum e_c l / sum e_c, or the given ones
    share = weighted / sums
    losses = given
    if not GIVEN:
        losses = tl.full([LANES], float("nan"), tl.float64)
        for i in tl.static_range(M):
            part = composition((METHOD_CODES >> (4 * i)) & 15, lane)
            losses = tl.where(lane == i, tl.sum(tl.where(part > 0, part * share, 0.0), axis=0), losses)
    losses = tl.where(n_valid > 0, losses, float("nan"))

    # 2. log w += beta (L' - L) / L', or beta log(L' / L); unchanged where that is not finite
    if HAS_STATE:
        log_w = tl.load(old_ptr + lane, mask=used, other=float("-inf"), cache_modifier=".cg")
        previous = tl.load(old_ptr + M + lane, mask=used, other=float("nan"), cache_modifier=".cg")
        if LOG_RATIO:
            positive = (previous > 0) & (losses > 0)
            increment = tl.log(tl.where(positive, previous / losses, 1.0))
            increment = tl.where(positive, increment, float("nan"))
        else:
            increment = (previous - losses) / previous
        log_w = tl.where(is_finite(increment), log_w + beta * increment, log_w)
        # sum_m w = 1
        top = tl.max(log_w, axis=0)
        log_w -= top + tl.log(tl.sum(tl.exp(log_w - top), axis=0))
    else:
        log_w = tl.where(used, -tl.log(tl.full([LANES], M, tl.float64)), float("-inf"))
    w = tl.exp(log_w)
    if HAS_FLOOR:
        # clip at floor / M and rescale the rest, again while that pushes another one below
        least = floor / M
        clipped = lane >= LANES
        scaled = w
        for _ in tl.static_range(M):
            clipped = clipped | (used & (scaled <= least))
            rest = tl.where(clipped, 0.0, w)
            left = 1.0 - least * tl.sum((clipped & used).to(tl.float64), axis=0)
            scaled = tl.where(clipped, least, rest * (left / tl.sum(rest, axis=0)))
        scaled = tl.where(used, scaled, 0.0)
        w = scaled / tl.sum(scaled, axis=0)
        log_w = tl.log(w)
    if HAS_STATE:
        tl.debug_barrier()  # every warp has read the old state
        writes = used & (lane + program * LANES < LANES)
        tl.store(state_ptr + lane, log_w, mask=writes)
        tl.store(state_ptr + M + lane, tl.where(is_finite(losses), losses, previous), mask=writes)
        tl.store(state_ptr + 2 * M, step + 1.0, mask=program == 0)

    # 3. factor of component c: (sum of the weights of its methods) / sum e_c
    factors = tl.zeros([LANES], tl.float64)
    for i in tl.static_range(M):
        weight = tl.sum(tl.where(lane == i, w, 0.0), axis=0)
        factors += composition((METHOD_CODES >> (4 * i)) & 15, lane) * weight
    return factors / sums


@triton.jit
def reward(loss, l_squares, n_valid, step, power, CURRICULUM: tl.constexpr):
    """r = exp(-t^power l / scale), scale = sum l^2 (CURRICULUM = 1) or sqrt(mean l^2) (2); 1 when every loss is 0."""
    strength = tl.exp(power * tl.log(step)).to(loss.dtype)
    scale = l_squares
    if CURRICULUM == 2:
        scale = tl.sqrt(l_squares / tl.maximum(n_valid, 1).to(loss.dtype))
    return tl.where(l_squares > 0, tl.exp(-strength * loss / scale), 1.0)


@triton.jit
def spread(std, temperature, STANDARDIZE: tl.constexpr):
    """What differences of losses are divided by: tau, or (std + 1e-6) tau."""
    if STANDARDIZE:
        return (std + SPREAD_EPS) * temperature
    else:
        return temperature


@triton.jit
def mixed_score(
    factors, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min, USED: tl.constexpr
):
    """sum_c factor_c e_c; factors [LANES]."""
    lane = tl.arange(0, LANES)
    score = tl.zeros_like(loss)
    for c in tl.static_range(COMPONENTS):
        if (USED >> c) & 1:
            factor = tl.sum(tl.where(lane == c, factors, 0.0), axis=0).to(loss.dtype)
            score += factor * component(
                c, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min
            )
    return score


@triton.jit
def score_batch(
    loss, g, ok, rows, state_ptr, seed, beta, temperature, floor, power,
    METHOD_CODES: tl.constexpr, M: tl.constexpr, USED: tl.constexpr, HAS_STATE: tl.constexpr, BASELINE: tl.constexpr,
    STANDARDIZE: tl.constexpr, LOG_RATIO: tl.constexpr, HAS_FLOOR: tl.constexpr, CURRICULUM: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK] float32 of a whole batch in one program, the number of valid rows; updates the state."""
    lane = tl.arange(0, LANES)
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
        sums = tl.full([LANES], 1.0, tl.float64)
        weighted = tl.zeros([LANES], tl.float64)
        for c in tl.static_range(COMPONENTS):
            if (USED >> c) & 1:
                e = component(c, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min)
                sums = tl.where(lane == c, tl.sum(e, axis=0).to(tl.float64), sums)
                weighted = tl.where(lane == c, tl.sum(e * loss, axis=0).to(tl.float64), weighted)

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


@triton.jit
def _slot(partials_ptr, slot, parts, programs, other):
    """One number of every program."""
    return tl.load(partials_ptr + slot * programs + parts, mask=parts < programs, other=other, cache_modifier=".cg")


@triton.jit
def _rescaled(nearer, before, scale):
    """What brings sums relative to `before` to the extreme `nearer`; sums of nothing (infinite) stay 0."""
    apart = tl.where(tl.abs(before) == float("inf"), 0.0, tl.abs(nearer - before) / scale)
    return tl.exp(-apart.to(tl.float64))


@triton.jit
def moments_step(
    losses_ptr, grads_ptr, valid_ptr, partials_ptr, program, programs, iterations,
    n, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, seed, step_number, scale,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr, USED: tl.constexpr, ONLINE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's n, mean, sum (l - mean)^2, max, min and sum of squares; when ONLINE the sums of components too.

    Those are relative to the extremes this program has seen so far: `scale` must not depend on the batch.
    """
    zero = tl.full([], 0.0, tl.float64)
    count, l_mean, l_apart, l_squares, g_mean, g_apart = zero, zero, zero, zero, zero, zero
    l_max = zero - float("inf")
    l_min = zero + float("inf")
    g_max = l_max
    lane = tl.arange(0, LANES)
    sums = tl.zeros([LANES], tl.float64)
    weighted = tl.zeros([LANES], tl.float64)
    for i in range(iterations):
        rows, loss, g, ok = load_block(
            losses_ptr, grads_ptr, valid_ptr, (program.to(tl.int64) * iterations + i) * BLOCK, n, stride_loss, stride_grad,
            valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, HAS_GRAD, HAS_VALID, COMPUTE, BLOCK,
        )  # fmt: skip
        block_n = tl.sum(ok.to(tl.int32), axis=0)
        block_count = block_n.to(tl.float64)
        both = tl.maximum(count + block_count, 1.0)
        block_mean, block_apart, block_max = moments(loss, ok, block_n)
        # Chan's update: M2 += M2' + (mean' - mean)^2 n n' / (n + n')
        apart = block_mean.to(tl.float64) - l_mean
        l_apart += block_apart.to(tl.float64) + apart * apart * count * block_count / both
        l_mean += apart * block_count / both
        before_max, before_min, before_g = l_max, l_min, g_max
        l_max = tl.maximum(l_max, block_max.to(tl.float64))
        l_min = tl.minimum(l_min, tl.min(tl.where(ok, loss, float("inf")), axis=0).to(tl.float64))
        l_squares += tl.sum(loss * loss, axis=0).to(tl.float64)
        if HAS_GRAD:
            block_mean, block_apart, block_max = moments(g, ok, block_n)
            apart = block_mean.to(tl.float64) - g_mean
            g_apart += block_apart.to(tl.float64) + apart * apart * count * block_count / both
            g_mean += apart * block_count / both
            g_max = tl.maximum(g_max, block_max.to(tl.float64))
        count += block_count
        if ONLINE:
            factors = tl.where(lane == BIG, _rescaled(l_max, before_max, scale), 1.0)
            factors = tl.where(lane == SMALL, _rescaled(l_min, before_min, scale), factors)
            factors = tl.where(lane == GRAD, _rescaled(g_max, before_g, scale), factors)
            noise = loss
            if USES_NOISE & USED:
                noise = exponential_noise(rows, step_number.to(tl.int64), seed, COMPUTE)
            block_sums, block_weighted = component_sums(
                loss, g, noise, ok, 0.0, l_max.to(COMPUTE), l_min.to(COMPUTE), scale.to(COMPUTE), g_max.to(COMPUTE),
                scale.to(COMPUTE), 0.0, USED,
            )  # fmt: skip
            sums = sums * factors + block_sums
            weighted = weighted * factors + block_weighted
    at = partials_ptr + program
    tl.store(at, count)
    tl.store(at + 1 * programs, l_mean)
    tl.store(at + 2 * programs, l_apart)
    tl.store(at + MAXIMA * programs, l_max)
    tl.store(at + MINIMA * programs, l_min)
    tl.store(at + 5 * programs, l_squares)
    if HAS_GRAD:
        tl.store(at + 6 * programs, g_mean)
        tl.store(at + 7 * programs, g_apart)
        tl.store(at + GRAD_MAXIMA * programs, g_max)
    if ONLINE:
        tl.store(at + (SUMS_AT + lane) * programs, sums)
        tl.store(at + (SUMS_AT + LANES + lane) * programs, weighted)


@triton.jit
def component_sums(loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min, USED: tl.constexpr):
    """sum e_c and sum e_c l of the used components, 0 of the others: [LANES] float64 both."""
    lane = tl.arange(0, LANES)
    sums = tl.zeros([LANES], tl.float64)
    weighted = tl.zeros([LANES], tl.float64)
    for c in tl.static_range(COMPONENTS):
        if (USED >> c) & 1:
            e = component(c, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min)
            sums = tl.where(lane == c, tl.sum(e, axis=0).to(tl.float64), sums)
            weighted = tl.where(lane == c, tl.sum(e * loss, axis=0).to(tl.float64), weighted)
    return sums, weighted


@triton.jit
def combine_moments(partials_ptr, programs, HAS_GRAD: tl.constexpr, MAX_PROGRAMS: tl.constexpr):
    """n, then mean, std, max, min and sum l^2 of the losses, std and max of the gradient norms, of all programs' rows."""
    parts = tl.arange(0, MAX_PROGRAMS)
    counts = _slot(partials_ptr, 0, parts, programs, 0.0)
    total = tl.sum(counts, axis=0)
    n_valid = tl.maximum(total, 1.0)
    means = _slot(partials_ptr, 1, parts, programs, 0.0)
    mean = tl.sum(counts * means, axis=0) / n_valid
    # M2 = sum_p M2_p + n_p (mean_p - mean)^2
    apart = tl.sum(_slot(partials_ptr, 2, parts, programs, 0.0) + counts * (means - mean) * (means - mean), axis=0)
    std = tl.sqrt(apart / n_valid)
    l_max = tl.max(_slot(partials_ptr, MAXIMA, parts, programs, float("-inf")), axis=0)
    l_min = tl.min(_slot(partials_ptr, MINIMA, parts, programs, float("inf")), axis=0)
    squares = tl.sum(_slot(partials_ptr, 5, parts, programs, 0.0), axis=0)
    g_std, g_max = std, l_max
    if HAS_GRAD:
        means = _slot(partials_ptr, 6, parts, programs, 0.0)
        g_mean = tl.sum(counts * means, axis=0) / n_valid
        apart = tl.sum(
            _slot(partials_ptr, 7, parts, programs, 0.0) + counts * (means - g_mean) * (means - g_mean), axis=0
        )
        g_std = tl.sqrt(apart / n_valid)
        g_max = tl.max(_slot(partials_ptr, GRAD_MAXIMA, parts, programs, float("-inf")), axis=0)
    return total, mean, std, l_max, l_min, squares, g_std, g_max


@triton.jit
def sums_step(
    losses_ptr, grads_ptr, valid_ptr, partials_ptr, program, programs, iterations,
    n, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, seed, step_number,
    l_mean, l_max, l_min, l_scale, g_max, g_scale,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr, USED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's sum e_c and sum e_c l; exp(-|l - mean|) is relative to the smallest distance it has seen so far."""
    lane = tl.arange(0, LANES)
    sums = tl.zeros([LANES], tl.float64)
    weighted = tl.zeros([LANES], tl.float64)
    middle_min = tl.full([], float("inf"), COMPUTE)
    for i in range(iterations):
        rows, loss, g, ok = load_block(
            losses_ptr, grads_ptr, valid_ptr, (program.to(tl.int64) * iterations + i) * BLOCK, n, stride_loss, stride_grad,
            valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, HAS_GRAD, HAS_VALID, COMPUTE, BLOCK,
        )  # fmt: skip
        noise = loss
        if USES_NOISE & USED:
            noise = exponential_noise(rows, step_number.to(tl.int64), seed, COMPUTE)
        if USES_MIDDLE & USED:
            closer = tl.minimum(middle_min, tl.min(tl.where(ok, tl.abs(loss - l_mean), float("inf")), axis=0))
            factor = _rescaled(closer, middle_min, l_scale)
            sums = tl.where(lane == MIDDLE, sums * factor, sums)
            weighted = tl.where(lane == MIDDLE, weighted * factor, weighted)
            middle_min = closer
        block_sums, block_weighted = component_sums(
            loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min, USED
        )
        sums += block_sums
        weighted += block_weighted
    at = partials_ptr + program
    tl.store(at + (SUMS_AT + lane) * programs, sums)
    tl.store(at + (SUMS_AT + LANES + lane) * programs, weighted)
    tl.store(at + MIDDLE_MINIMA * programs, middle_min.to(tl.float64))


@triton.jit
def combine_sums(
    partials_ptr, programs, l_max, l_min, g_max, scale,
    USED: tl.constexpr, ONLINE: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """sum e_c and sum e_c l of all rows, [LANES] each (1 and 0 where not used); the smallest distance to the mean."""
    lane = tl.arange(0, LANES)
    parts = tl.arange(0, MAX_PROGRAMS)
    sums = tl.full([LANES], 1.0, tl.float64)
    weighted = tl.zeros([LANES], tl.float64)
    middle = tl.full([], float("inf"), tl.float64)
    for c in tl.static_range(COMPONENTS):
        if (USED >> c) & 1:
            part = _slot(partials_ptr, SUMS_AT + c, parts, programs, 0.0)
            part_weighted = _slot(partials_ptr, SUMS_AT + LANES + c, parts, programs, 0.0)
            factor = tl.full([MAX_PROGRAMS], 1.0, tl.float64)
            if c == MIDDLE:
                minima = _slot(partials_ptr, MIDDLE_MINIMA, parts, programs, float("inf"))
                middle = tl.min(minima, axis=0)
                factor = _rescaled(middle, minima, scale)
            elif ONLINE and c == BIG:
                factor = _rescaled(l_max, _slot(partials_ptr, MAXIMA, parts, programs, float("-inf")), scale)
            elif ONLINE and c == SMALL:
                factor = _rescaled(l_min, _slot(partials_ptr, MINIMA, parts, programs, float("inf")), scale)
            elif ONLINE and c == GRAD:
                factor = _rescaled(g_max, _slot(partials_ptr, GRAD_MAXIMA, parts, programs, float("-inf")), scale)
            sums = tl.where(lane == c, tl.sum(part * factor, axis=0), sums)
            weighted = tl.where(lane == c, tl.sum(part_weighted * factor, axis=0), weighted)
    return sums, weighted, middle


@triton.jit(
    do_not_specialize=[
        "n", "k", "iterations", "programs", "invalid_value", "seed", "beta_bits", "temperature_bits", "floor_bits",
        "power_bits",
    ]
)  # fmt: skip
def large_kernel(
    losses_ptr, grads_ptr, valid_ptr, state_ptr, given_ptr, summary_ptr, counters_ptr, scores_ptr, n_valid_ptr,
    search_ptr, table_ptr, indices_ptr,
    n, k, iterations, programs, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner,
    invalid_value,
    seed: tl.int64, beta_bits: tl.int64, temperature_bits: tl.int64, floor_bits: tl.int64, power_bits: tl.int64,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr,
    METHOD_CODES: tl.constexpr, M: tl.constexpr, USED: tl.constexpr, HAS_STATE: tl.constexpr, GIVEN: tl.constexpr,
    STANDARDIZE: tl.constexpr, LOG_RATIO: tl.constexpr, HAS_FLOOR: tl.constexpr, CURRICULUM: tl.constexpr,
    MOMENTS: tl.constexpr, ONLINE: tl.constexpr, SUMS: tl.constexpr, SCORES: tl.constexpr, KEY_METHOD: tl.constexpr,
    FINAL: tl.constexpr, DIGITS: tl.constexpr, BITS: tl.constexpr, COUNTERS: tl.constexpr, BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The steps of a large batch, those of MOMENTS, SUMS, SCORES (0 or 1 each) and, with DIGITS > 0, of the selection.

    summary: the state before the call [STATE_SLOTS], then SLOTS partials a program, from which every program of a later
    step combines what it needs, all in the same order. ONLINE: the first step makes the sums too. KEY_METHOD >= 0: scores
    are that method's baseline key. FINAL: the state and n_valid are written.
    """
    COMPUTE: tl.constexpr = tl.float64 if losses_ptr.dtype.element_ty == tl.float64 else tl.float32
    SCORE_STEP: tl.constexpr = MOMENTS + SUMS
    STEPS: tl.constexpr = MOMENTS + SUMS + SCORES + DIGITS
    temperature = float64_from_bits(temperature_bits)
    seed = seed.to(tl.int64)
    partials_ptr = summary_ptr + STATE_SLOTS
    if STEPS > 1:
        step, program = begin_step(counters_ptr, programs)
    else:
        program = tl.program_id(0)
        step = program * 0

    # 1. moments
    if MOMENTS:  # noqa: SIM102 - known when compiled
        if step == 0:
            step_number = load_step(state_ptr, HAS_STATE, M)
            if program == 0:
                # a later step writes the state while others of its programs still need the old one
                slots = tl.arange(0, STATE_SLOTS)
                if HAS_STATE:
                    old = tl.load(state_ptr + slots, mask=slots < 2 * M, other=0.0)
                    tl.store(summary_ptr + slots, old, mask=slots < 2 * M)
                tl.store(summary_ptr + STEP, step_number)
            moments_step(
                losses_ptr, grads_ptr, valid_ptr, partials_ptr, program, programs, iterations,
                n, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
                seed, step_number, temperature, HAS_GRAD, HAS_VALID, USED, ONLINE, COMPUTE, BLOCK,
            )  # fmt: skip

    if SUMS + SCORES > 0:  # noqa: SIM102 - known when compiled
        if (step >= MOMENTS) & (step <= SCORE_STEP):
            step_number = tl.load(summary_ptr + STEP, cache_modifier=".cg")
            count, mean, std, l_max, l_min, squares, g_std, g_max = combine_moments(
                partials_ptr, programs, HAS_GRAD, MAX_PROGRAMS
            )
            l_scale = spread(std.to(COMPUTE), temperature.to(COMPUTE), STANDARDIZE)
            g_scale = spread(g_std.to(COMPUTE), temperature.to(COMPUTE), STANDARDIZE)

            # 2. sums of the components
            if SUMS:  # noqa: SIM102 - known when compiled
                if step == MOMENTS:
                    sums_step(
                        losses_ptr, grads_ptr, valid_ptr, partials_ptr, program, programs, iterations,
                        n, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
                        seed, step_number, mean.to(COMPUTE), l_max.to(COMPUTE), l_min.to(COMPUTE), l_scale,
                        g_max.to(COMPUTE), g_scale, HAS_GRAD, HAS_VALID, USED, COMPUTE, BLOCK,
                    )  # fmt: skip

            # 3. weights, then the scores and the histogram of their first digit
            if SCORES:  # noqa: SIM102 - known when compiled
                if step == SCORE_STEP:
                    factors = tl.zeros([LANES], tl.float64)
                    middle = count
                    if KEY_METHOD < 0:
                        sums, weighted, middle = combine_sums(
                            partials_ptr,
                            programs,
                            l_max,
                            l_min,
                            g_max,
                            l_scale.to(tl.float64),
                            USED,
                            ONLINE,
                            MAX_PROGRAMS,
                        )
                        given = sums
                        if GIVEN:
                            given = tl.load(
                                given_ptr + tl.arange(0, LANES), mask=tl.arange(0, LANES) < M, other=float("nan")
                            )
                        factors = weigh(
                            sums, weighted, count, given, summary_ptr, state_ptr, program, step_number,
                            float64_from_bits(beta_bits), float64_from_bits(floor_bits),
                            METHOD_CODES, M, HAS_STATE, GIVEN, LOG_RATIO, HAS_FLOOR,
                        )  # fmt: skip
                    elif FINAL and HAS_STATE:
                        tl.store(state_ptr + 2 * M, step_number + 1.0, mask=program == 0)
                    if FINAL:
                        tl.store(n_valid_ptr, count.to(tl.int64), mask=program == 0)
                    scores_step(
                        losses_ptr, grads_ptr, valid_ptr, counters_ptr, scores_ptr, table_ptr, program, programs, iterations,
                        n, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
                        seed, step_number, float64_from_bits(power_bits), count, squares.to(COMPUTE), factors,
                        mean.to(COMPUTE), l_max.to(COMPUTE), l_min.to(COMPUTE), l_scale, g_max.to(COMPUTE), g_scale,
                        middle.to(COMPUTE), HAS_GRAD, HAS_VALID, USED, CURRICULUM, KEY_METHOD, DIGITS, BITS, COMPUTE, BLOCK,
                    )  # fmt: skip

    # 4. the other digits, and the chosen rows
    if DIGITS > 0:  # noqa: SIM102 - known when compiled
        if step > SCORE_STEP:
            select_step(
                step - SCORE_STEP, scores_ptr, counters_ptr, search_ptr, table_ptr, indices_ptr, program, programs,
                n, k, 1, iterations, BITS, DIGITS, True, BLOCK, MAX_PROGRAMS,
            )  # fmt: skip
    if STEPS > 1:
        end_step(counters_ptr, step, programs, STEPS, COUNTERS)


@triton.jit
def scores_step(
    losses_ptr, grads_ptr, valid_ptr, counters_ptr, scores_ptr, table_ptr, program, programs, iterations,
    n, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
    seed, step_number, power, count, squares, factors, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr, USED: tl.constexpr, CURRICULUM: tl.constexpr,
    KEY_METHOD: tl.constexpr, DIGITS: tl.constexpr, BITS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The score of this program's rows, -inf on invalid ones; with DIGITS > 0 also the histogram of their first digit."""
    if DIGITS > 0:
        counts = tl.zeros([1 << BITS], tl.int32)
    for i in range(iterations):
        rows, loss, g, ok = load_block(
            losses_ptr, grads_ptr, valid_ptr, (program.to(tl.int64) * iterations + i) * BLOCK, n, stride_loss, stride_grad,
            valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, HAS_GRAD, HAS_VALID, COMPUTE, BLOCK,
        )  # fmt: skip
        noise = loss
        if USES_NOISE & USED:
            noise = exponential_noise(rows, step_number.to(tl.int64), seed, COMPUTE)
        if KEY_METHOD >= 0:
            score = baseline_key(KEY_METHOD, loss, g, noise, l_mean, l_max, l_min)
        else:
            score = mixed_score(
                factors, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min, USED
            )
            if CURRICULUM:
                score *= reward(loss, squares, count, step_number, power, CURRICULUM)
        score = tl.where(ok, score, float("-inf")).to(scores_ptr.dtype.element_ty)
        tl.store(scores_ptr + rows, score, mask=rows < n)
        if DIGITS > 0:
            first_digit = ordered_key(score, True) >> (32 - BITS)
            counts += tl.histogram(first_digit.to(tl.int32), 1 << BITS, mask=rows < n)
    if DIGITS > 0:
        publish_digit(counts, 0, 0, counters_ptr, table_ptr, program, programs, 32, BITS, DIGITS)


@triton.jit(do_not_specialize=["k", "iterations", "programs", "invalid_value"])
def chosen_loss_kernel(
    losses_ptr, grads_ptr, valid_ptr, chosen_ptr, partials_ptr, arrivals_ptr, mean_ptr,
    k, n, iterations, programs, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner,
    invalid_value,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Mean loss of the valid rows among `chosen` [k], NaN when there is none."""
    COMPUTE: tl.constexpr = tl.float64 if losses_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    total = tl.full([], 0.0, tl.float64)
    count = tl.full([], 0.0, tl.float64)
    for i in range(iterations):
        position = (program.to(tl.int64) * iterations + i) * BLOCK + tl.arange(0, BLOCK)
        rows = tl.load(chosen_ptr + position, mask=position < k, other=n)
        loss, _, ok = load_rows(
            losses_ptr, grads_ptr, valid_ptr, rows, n, stride_loss, stride_grad,
            valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, HAS_GRAD, HAS_VALID, COMPUTE,
        )  # fmt: skip
        total += tl.sum(loss, axis=0).to(tl.float64)
        count += tl.sum(ok.to(tl.int32), axis=0).to(tl.float64)
    tl.store(partials_ptr + program, total)
    tl.store(partials_ptr + programs + program, count)
    if last_to_arrive(arrivals_ptr, programs):
        parts = tl.arange(0, MAX_PROGRAMS)
        total = tl.sum(_slot(partials_ptr, 0, parts, programs, 0.0), axis=0)
        count = tl.sum(_slot(partials_ptr, 1, parts, programs, 0.0), axis=0)
        tl.store(mean_ptr, tl.where(count > 0, total / tl.maximum(count, 1.0), float("nan")))


@triton.jit(do_not_specialize=["k"])
def strike_kernel(keys_ptr, chosen_ptr, k, BLOCK: tl.constexpr):
    """NaN, after every other key, in the rows `chosen` [k]."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(chosen_ptr + position, mask=position < k, other=0)
    tl.store(keys_ptr + rows, tl.full([BLOCK], float("nan"), keys_ptr.dtype.element_ty), mask=position < k)


@triton.jit(do_not_specialize=["k"])
def copy_rows_kernel(from_ptr, to_ptr, chosen_ptr, k, BLOCK: tl.constexpr):
    """to[row] = from[row] for the rows `chosen` [k]."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(chosen_ptr + position, mask=position < k, other=0)
    tl.store(to_ptr + rows, tl.load(from_ptr + rows, mask=position < k, other=0.0), mask=position < k)


# By the most rows. 4 rows a thread: noise and six exponentials a row want many warps, not registers. Every program reads
# the partials of all: a number a thread.
LARGE = {2**31: RadixTuning(block=1024, warps=8, programs=256)}
MOVE_BLOCK, MOVE_WARPS = 1024, 4


@dataclass(frozen=True, eq=False)  # equal by identity: a key of launches that costs nothing to compare
class Plan:
    """What a launch takes from methods and options: flags that choose code, and numbers as float64 patterns."""

    methods: tuple[int, ...]
    flags: dict[str, int | bool]
    beta: int
    temperature: int
    floor: int
    power: int
    has_grad: bool
    baseline: bool
    selected: bool  # method losses of the rows each method alone would choose: they need launches of their own


def make_plan(methods: Sequence[int], has_state: bool, options: Sequence[float]) -> Plan:
    options = tuple(options)
    power = options[_POWER]
    if power != power:
        # NaN is not equal to itself and would never be found again
        options = (*options[:_POWER], None, *options[_POWER + 1 :])
    return _make_plan(tuple(methods), has_state, options)


_POWER = PackedOptions._fields.index("curriculum_power")


@cached
def _make_plan(methods: tuple[int, ...], has_state: bool, options: tuple) -> Plan:
    opts = PackedOptions.unpack(options)
    codes = sum(method << (4 * i) for i, method in enumerate(methods))
    used = 0
    for method in methods:
        for component in _COMPONENTS_OF[METHODS[method]]:
            used |= 1 << component
    baseline = bool(opts.baseline)
    flags = {
        "METHOD_CODES": codes,
        "M": len(methods),
        "USED": used,
        "HAS_STATE": has_state,
        "BASELINE": baseline,
        "STANDARDIZE": bool(opts.standardize) and not baseline,
        "LOG_RATIO": opts.update == 1 and has_state and not baseline,
        "HAS_FLOOR": opts.weight_floor > 0 and not baseline,
        "CURRICULUM": 0 if opts.curriculum_power is None or baseline else 1 + int(opts.curriculum_scale),
    }
    power = 0.0 if opts.curriculum_power is None else opts.curriculum_power
    return Plan(
        methods, flags, float_bits(opts.beta), float_bits(opts.temperature), float_bits(opts.weight_floor),
        float_bits(power), METHODS.index("grad_norm") in methods, baseline,
        # a fresh state's weights do not depend on the method losses
        opts.method_loss == 1 and has_state and not baseline,
    )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Where a batch's numbers are: losses and gradient norms [N], and what marks a row as not valid.

    A row is not valid where `valid` (an [outer, inner] array of targets or flags) equals `invalid_value`.
    """

    losses: Tensor
    grads: Tensor | None
    valid: Tensor | None
    invalid_value: int

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        losses = self.losses
        return losses, losses if self.grads is None else self.grads, losses if self.valid is None else self.valid

    @cached_property
    def shape(self) -> "RowsShape":
        stride_grad = 0 if self.grads is None else self.grads.stride(0)
        if self.valid is None:
            valid = (1, 0, 0)
        elif self.valid.dim() == 2:
            valid = (self.valid.shape[1], *self.valid.stride())
        else:
            valid = (1, self.valid.stride(0), 0)
        strides = self.losses.stride(0), stride_grad, *valid, self.invalid_value
        return RowsShape(self.losses.shape[0], strides, self.grads is not None, self.valid is not None)


class RowsShape(NamedTuple):
    """What a launch takes from Rows besides the tensors."""

    n: int
    strides: tuple[int, ...]  # of losses and grads, valid's inner size and strides, and the invalid value
    has_grad: bool
    has_valid: bool

    def flags(self) -> dict[str, Any]:
        return {"HAS_GRAD": self.has_grad, "HAS_VALID": self.has_valid}


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


class _Large(NamedTuple):
    """A launch of steps of a large batch, and the work memory it needs."""

    launch: Launch
    programs: int
    work: RadixWork


@dataclass(frozen=True)
class Steps:
    """Which steps a launch has; see large_kernel."""

    moments: bool = False
    sums: bool = False
    scores: bool = False
    key_method: int = -1
    final: bool = False
    select: bool = False
    given: bool = False


_LARGE_FLAGS = ("METHOD_CODES", "M", "USED", "HAS_STATE", "STANDARDIZE", "LOG_RATIO", "HAS_FLOOR", "CURRICULUM")
_NEEDS_BATCH = sum(1 << code for code in (3, 4))  # components with a moment of the batch beside its extremes


def step_flags(plan: Plan, steps: Steps) -> dict[str, int | bool]:
    """What large_kernel is compiled for."""
    online = steps.moments and steps.sums and not plan.flags["STANDARDIZE"] and not plan.flags["USED"] & _NEEDS_BATCH
    work = radix_work(False)
    return {name: plan.flags[name] for name in _LARGE_FLAGS} | {
        "GIVEN": steps.given, "MOMENTS": int(steps.moments), "ONLINE": online,
        "SUMS": int(steps.sums and not online), "SCORES": int(steps.scores), "KEY_METHOD": steps.key_method,
        "FINAL": steps.final, **work.constants(), "DIGITS": work.digits if steps.select else 0,
    }  # fmt: skip


@cached
def _large_launch(shape: RowsShape, plan: Plan, steps: Steps, k: int) -> _Large:
    tuning = up_to(LARGE, shape.n)
    programs, iterations = chunks(shape.n, tuning.block, tuning.programs)
    flags = step_flags(plan, steps)
    count = sum(int(flags[name]) for name in ("MOMENTS", "SUMS", "SCORES", "DIGITS"))
    constants = shape.flags() | flags | {"BLOCK": tuning.block, "MAX_PROGRAMS": tuning.programs}
    integers = (shape.n, k, iterations, programs, *shape.strides)
    return _Large(
        Launch(large_kernel, (count * programs,), integers, constants, tuning.warps), programs, radix_work(False)
    )


def _run_steps(
    rows: Rows, state: Tensor | None, plan: Plan, steps: Steps, k: int, seed: int, *,
    summary: Tensor | None = None, scores: Tensor | None = None, n_valid: Tensor | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The summary, made unless it is given, and the chosen rows (ascending) of a launch that selects."""
    large = _large_launch(rows.shape, plan, steps, k)
    losses, device = rows.losses, rows.losses.device
    if summary is None:
        summary = torch.empty(STATE_SLOTS.value + SLOTS * large.programs, dtype=torch.float64, device=device)
    zeros = counters(device, large.work.counters)
    search = table = indices = zeros  # not touched by a launch that does not select
    if steps.select:
        search = torch.empty(large.work.search, dtype=torch.int64, device=device)
        table = torch.empty(large.work.table * large.programs, dtype=torch.int32, device=device)
        indices = torch.empty(k, dtype=torch.int64, device=device)
    large.launch(
        *rows.tensors, losses if state is None else state, summary if given is None else given, summary, zeros,
        losses if scores is None else scores, zeros if n_valid is None else n_valid, search, table, indices,
        options=(seed, plan.beta, plan.temperature, plan.floor, plan.power),
    )  # fmt: skip
    return summary, indices if steps.select else None


def many_programs(
    rows: Rows, state: Tensor | None, plan: Plan, k: int, select: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores, number of valid rows and, when `select`, the chosen rows in ascending order, of any batch."""
    losses = rows.losses
    n, device = losses.shape[0], losses.device
    scores = torch.empty(n, dtype=torch.float32, device=device)
    n_valid = torch.empty((), dtype=torch.int64, device=device)
    out = {"scores": scores, "n_valid": n_valid}
    key_method = plan.methods[0] if plan.baseline else -1
    last = Steps(True, not plan.baseline, True, key_method, final=True, select=select)
    with launch_device(losses):
        if plan.selected:
            summary, _ = _run_steps(rows, state, plan, Steps(moments=True), k, seed)
            given = torch.empty(len(plan.methods), dtype=torch.float64, device=device)
            for i, method in enumerate(plan.methods):
                _chosen_loss(rows, baseline_choice(rows, method, summary, k, seed), given[i])
            last = replace(last, moments=False, given=True)
            _, indices = _run_steps(rows, state, plan, last, k, seed, summary=summary, given=given, **out)
        else:
            _, indices = _run_steps(rows, state, plan, last, k, seed, **out)
    return scores, n_valid, indices


_NO_OPTIONS = PackedOptions(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, math.nan, 0.0, 1.0)


def _key(rows: Rows, method: str, summary: Tensor, seed: int) -> Tensor:
    """Baseline key [N] of one method, -inf on invalid rows."""
    code = METHODS.index(method)
    dtype = torch.float64 if rows.losses.dtype == torch.float64 else torch.float32
    key = torch.empty(rows.losses.shape[0], dtype=dtype, device=rows.losses.device)
    steps = Steps(scores=True, key_method=code)
    _run_steps(rows, None, make_plan((code,), False, _NO_OPTIONS), steps, 0, seed, summary=summary, scores=key)
    return key


def baseline_choice(rows: Rows, method: int, summary: Tensor, k: int, seed: int) -> Tensor:
    """[k] rows that `method` alone chooses, in no particular order."""
    if method != _CORESET1:
        return select_topk(_key(rows, METHODS[method], summary, seed), k, True, "index")
    # ceil(k/2) largest losses, then floor(k/2) smallest of the others
    largest = select_topk(_key(rows, "big_loss", summary, seed), k - k // 2, True, "index")
    if k == 1:
        return largest
    key = _key(rows, "small_loss", summary, seed)
    _move_launch(strike_kernel, k - k // 2)(key, largest)
    return torch.cat([largest, select_topk(key, k // 2, True, "index")])


@cached
def _move_launch(kernel, k: int) -> Launch:
    return Launch(kernel, (ceil_div(k, MOVE_BLOCK),), (k,), {"BLOCK": MOVE_BLOCK}, MOVE_WARPS)


def _chosen_loss(rows: Rows, chosen: Tensor, out: Tensor) -> None:
    launch = _chosen_loss_launch(rows.shape, chosen.shape[0])
    partials = torch.empty(2 * launch.grid[0], dtype=torch.float64, device=chosen.device)
    launch(*rows.tensors, chosen, partials, counters(chosen.device, 1), out)


@cached
def _chosen_loss_launch(shape: RowsShape, k: int) -> Launch:
    tuning = up_to(LARGE, k)
    programs, iterations = chunks(k, tuning.block, tuning.programs)
    constants = shape.flags() | {"BLOCK": tuning.block, "MAX_PROGRAMS": tuning.programs}
    integers = (k, shape.n, iterations, programs, *shape.strides)
    return Launch(chosen_loss_kernel, (programs,), integers, constants, tuning.warps)


def choose_coreset1(rows: Rows, scores: Tensor, k: int, order: str, seed: int) -> Tensor:
    """Both ends of the losses: the k rows coreset1 alone chooses, ordered by row or by `scores`."""
    plan = make_plan((_CORESET1,), False, _NO_OPTIONS)
    with launch_device(rows.losses):
        summary, _ = _run_steps(rows, None, plan, Steps(moments=True), k, seed)
        chosen = baseline_choice(rows, _CORESET1, summary, k, seed)
        # scores of the chosen rows, NaN (after every number) elsewhere
        masked = torch.full_like(scores, math.nan)
        _move_launch(copy_rows_kernel, k)(scores, masked, chosen)
    return select_topk(masked, k, True, order)


def score_rows(
    rows: Rows, state: Tensor | None, methods: Sequence[int], k: int, order: str | None, seed: int,
    options: Sequence[float], out_losses: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Scores, number of valid rows and (unless `order` is None) indices, by the path the batch calls for.

    `out_losses` [N] float32 receives the losses when it is given.
    """
    plan = make_plan(methods, state is not None, options)
    if rows.grads is not None and not plan.has_grad:
        rows = replace(rows, grads=None)
    both_ends = plan.baseline and methods[0] == _CORESET1
    small = rows.losses.shape[0] <= ONE_PROGRAM_ROWS and not plan.selected
    if small:
        inner_order = None if both_ends else order
        scores, n_valid, indices = one_program(rows, state, plan, k, inner_order, seed, out_losses)
    else:
        select = order is not None and not both_ends
        scores, n_valid, indices = many_programs(rows, state, plan, k, select, seed)
        if out_losses is not None:
            out_losses.copy_(rows.losses)
    if order is None:
        return scores, n_valid, None
    if both_ends:
        indices = choose_coreset1(rows, scores, k, order, seed)
    elif not small and order == "score" and k > 1:
        assert indices is not None
        with launch_device(scores):
            indices = sort_chosen(scores, indices, True)
    return scores, n_valid, indices


def batch_scores(
    losses: Tensor, grad_norms: Tensor | None, valid: Tensor | None, state: Tensor | None, methods: Sequence[int],
    k: int, seed: int, options: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = Rows(losses, grad_norms, None if valid is None else valid.view(torch.uint8), 0)
    scores, n_valid, _ = score_rows(rows, state, methods, k, None, seed, options)
    return scores, n_valid


def select_from_losses(
    losses: Tensor, grad_norms: Tensor | None, state: Tensor | None, methods: Sequence[int], k: int, order: str,
    seed: int, options: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scores, n_valid, indices = score_rows(Rows(losses, grad_norms, None, 0), state, methods, k, order, seed, options)
    assert indices is not None
    return indices, scores, n_valid


_EVERY_METHOD = tuple(range(len(METHODS)))
_DEFAULT_METHODS = (0, 1, 6)
_HARDEST = PackedOptions(1.0, 1.0, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0)  # standardize, log_ratio, floor, rms curriculum
_DEFAULTS = PackedOptions(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, math.nan, 0.0)
SHIPPED_PLANS = {  # the lightest code and the heaviest, which everything else lies between, and a baseline
    "default": make_plan(_DEFAULT_METHODS, True, _DEFAULTS),
    "every": make_plan(_EVERY_METHOD, True, _HARDEST),
    "baseline": make_plan((_CORESET1,), True, _NO_OPTIONS),
}


def shipped() -> Iterator[Compilation]:
    """Every block size of the one-program batch and every step of the large one, for float32 and float64 losses."""
    large = LARGE[2**31]
    for pointee in ("fp32", "fp64"):
        inputs = {"losses_ptr": pointee, "grads_ptr": pointee, "valid_ptr": "i64"}
        ones = ("stride_loss", "stride_grad", "valid_inner", "stride_valid_outer")
        for name, plan in SHIPPED_PLANS.items():
            row_flags = {"HAS_GRAD": plan.has_grad, "HAS_VALID": True}
            for block in (ALL_ROWS_RANKED.value, 1024, ONE_PROGRAM_ROWS):
                yield Compilation(
                    f"batch-{pointee}-{name}-{block}", batch_kernel,
                    inputs | {
                        "state_ptr": "fp64", "scores_ptr": "fp32", "n_valid_ptr": "i64", "indices_ptr": "i64",
                        "out_losses_ptr": "fp32",
                    },
                    row_flags | plan.flags | {
                        "SELECT": True, "BY_SCORE": block <= ALL_ROWS_RANKED.value, "COPY_LOSSES": pointee == "fp64",
                        "BLOCK": block,
                    }, block_warps(block), ones=ones,
                )  # fmt: skip
            sized = {"BLOCK": large.block, "MAX_PROGRAMS": large.programs}
            key_method = plan.methods[0] if plan.baseline else -1
            whole = Steps(True, not plan.baseline, True, key_method, final=True, select=True)
            parts = {"large": whole}
            if name == "every":
                # the losses of the rows each method alone chooses come between the moments and the sums
                parts["moments"] = Steps(moments=True)
                parts["key"] = Steps(scores=True, key_method=_ADABOOST)
                parts["given"] = replace(whole, moments=False, given=True)
            for part, steps in parts.items():
                yield Compilation(
                    f"{part}-{pointee}-{name}", large_kernel,
                    inputs | {
                        "state_ptr": "fp64", "given_ptr": "fp64", "summary_ptr": "fp64", "counters_ptr": "i32",
                        "scores_ptr": "fp32", "n_valid_ptr": "i64", "search_ptr": "i64", "table_ptr": "i32",
                        "indices_ptr": "i64",
                    },
                    row_flags | sized | step_flags(plan, steps), large.warps, ones=ones,
                )  # fmt: skip
        yield Compilation(
            f"chosen-{pointee}", chosen_loss_kernel,
            inputs | {"chosen_ptr": "i64", "partials_ptr": "fp64", "arrivals_ptr": "i32", "mean_ptr": "fp64"},
            {"HAS_GRAD": True, "HAS_VALID": True, **sized}, large.warps, ones=ones,
        )  # fmt: skip
        yield Compilation(
            f"strike-{pointee}",
            strike_kernel,
            {"keys_ptr": pointee, "chosen_ptr": "i64"},
            {"BLOCK": MOVE_BLOCK},
            MOVE_WARPS,
        )
    yield Compilation(
        "copy-rows", copy_rows_kernel, {"from_ptr": "fp32", "to_ptr": "fp32", "chosen_ptr": "i64"},
        {"BLOCK": MOVE_BLOCK}, MOVE_WARPS,
    )  # fmt: skip
