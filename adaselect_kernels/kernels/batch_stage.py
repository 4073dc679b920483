"""Scores of a batch from its losses (AdaSelection, equations 2 to 6), and the baselines' keys; the state is updated here.

Every method's importance is a combination of six components e_c >= 0 over the valid rows, each divided by its sum:
exp(u), exp(-u), exp(g), a, exp(-|u - mean u|) and E (coreset1 is half of the first and half of the second). So a batch
takes three steps: moments of the losses, sums of e_c and e_c l, then the scores. Up to ONE_PROGRAM_ROWS rows one program
does all three; beyond, each step is a launch whose last program combines the others' float64 partials in a fixed order.
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
    block_size,
    block_warps,
    chunks,
    select_block,
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
_CORESET1 = METHODS.index("coreset1")
CORESET1 = tl.constexpr(_CORESET1)
ADA_EPS = tl.constexpr(ADABOOST_EPS)
SPREAD_EPS = tl.constexpr(STD_EPS)

# Slots of the float64 summary a large batch keeps between its launches.
N_VALID, L_MEAN, L_STD, L_MAX, L_MIN, L_SQUARES, G_STD, G_MAX, STEP, MIDDLE_MIN = (tl.constexpr(i) for i in range(10))
COEFFICIENTS = tl.constexpr(16)  # then one coefficient a component
SUMMARY = tl.constexpr(24)


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
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Losses and gradient norms, 0 on invalid rows; which rows are valid. `.cg`: other programs may have stored them."""
    inside = rows < n
    at = rows.to(tl.int64)
    loss = tl.load(losses_ptr + at * stride_loss, mask=inside, other=0.0, cache_modifier=".cg").to(COMPUTE)
    ok = inside & is_finite(loss)
    if HAS_VALID:
        flag = tl.load(
            valid_ptr + strided_offset(rows, valid_inner, stride_valid_outer, stride_valid_inner), mask=inside
        )
        ok = ok & (flag != invalid_value)
    g = tl.zeros_like(loss)
    if HAS_GRAD:
        g = tl.load(grads_ptr + at * stride_grad, mask=inside, other=0.0, cache_modifier=".cg").to(COMPUTE)
        ok = ok & is_finite(g)
        g = tl.where(ok, g, 0.0)
    return tl.where(ok, loss, 0.0), g, ok


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
    sums, weighted, n_valid, given, state_ptr, step, beta, floor,
    METHOD_CODES: tl.constexpr, M: tl.constexpr, HAS_STATE: tl.constexpr, GIVEN: tl.constexpr,
    LOG_RATIO: tl.constexpr, HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    """Equation 3: method losses, the new state, and the factor of every component in the score.

    sums, weighted [LANES] float64: sum e_c and sum e_c l by component; given [LANES]: the method losses when GIVEN.
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
        log_w = tl.load(state_ptr + lane, mask=used, other=float("-inf"))
        previous = tl.load(state_ptr + M + lane, mask=used, other=float("nan"))
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
        tl.store(state_ptr + lane, log_w, mask=used)
        tl.store(state_ptr + M + lane, tl.where(is_finite(losses), losses, previous), mask=used)
        tl.store(state_ptr + 2 * M, step + 1.0)

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
            sums, weighted, n_valid, sums, state_ptr, step, beta, floor,
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


@triton.jit(do_not_specialize=["n", "iterations", "programs", "invalid_value"])
def moments_kernel(
    losses_ptr, grads_ptr, valid_ptr, state_ptr, partials_ptr, arrivals_ptr, summary_ptr, n_valid_ptr,
    n, iterations, programs, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr, M: tl.constexpr, HAS_STATE: tl.constexpr, ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """First step of a large batch: n, mean, std, max, min, sum of squares, into the summary; t too, advanced when ADVANCE."""
    COMPUTE: tl.constexpr = tl.float64 if losses_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    zero = tl.full([], 0.0, tl.float64)
    count, l_mean, l_apart, l_squares, g_mean, g_apart = zero, zero, zero, zero, zero, zero
    l_max = zero - float("inf")
    l_min = zero + float("inf")
    g_max = l_max

    # 1. this program's rows, block by block
    for i in range(iterations):
        rows = (program.to(tl.int64) * iterations + i) * BLOCK + tl.arange(0, BLOCK)
        loss, g, ok = load_rows(
            losses_ptr, grads_ptr, valid_ptr, rows, n, stride_loss, stride_grad,
            valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, HAS_GRAD, HAS_VALID, COMPUTE,
        )  # fmt: skip
        block_n = tl.sum(ok.to(tl.int32), axis=0)
        block_count = block_n.to(tl.float64)
        both = tl.maximum(count + block_count, 1.0)
        block_mean, block_apart, block_max = moments(loss, ok, block_n)
        # Chan's update: M2 += M2' + (mean' - mean)^2 n n' / (n + n')
        apart = block_mean.to(tl.float64) - l_mean
        l_apart += block_apart.to(tl.float64) + apart * apart * count * block_count / both
        l_mean += apart * block_count / both
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
    tl.store(partials_ptr + program, count)
    tl.store(partials_ptr + 1 * programs + program, l_mean)
    tl.store(partials_ptr + 2 * programs + program, l_apart)
    tl.store(partials_ptr + 3 * programs + program, l_max)
    tl.store(partials_ptr + 4 * programs + program, l_min)
    tl.store(partials_ptr + 5 * programs + program, l_squares)
    if HAS_GRAD:
        tl.store(partials_ptr + 6 * programs + program, g_mean)
        tl.store(partials_ptr + 7 * programs + program, g_apart)
        tl.store(partials_ptr + 8 * programs + program, g_max)

    # 2. all programs' moments, by the one that arrives last
    if last_to_arrive(arrivals_ptr, programs):
        parts = tl.arange(0, MAX_PROGRAMS)
        counts = _slot(partials_ptr, 0, parts, programs, 0.0)
        total = tl.sum(counts, axis=0)
        n_valid = tl.maximum(total, 1.0)
        means = _slot(partials_ptr, 1, parts, programs, 0.0)
        mean = tl.sum(counts * means, axis=0) / n_valid
        # M2 = sum_p M2_p + n_p (mean_p - mean)^2
        apart = tl.sum(_slot(partials_ptr, 2, parts, programs, 0.0) + counts * (means - mean) * (means - mean), axis=0)
        tl.store(summary_ptr + N_VALID, total)
        tl.store(summary_ptr + L_MEAN, mean)
        tl.store(summary_ptr + L_STD, tl.sqrt(apart / n_valid))
        tl.store(summary_ptr + L_MAX, tl.max(_slot(partials_ptr, 3, parts, programs, float("-inf")), axis=0))
        tl.store(summary_ptr + L_MIN, tl.min(_slot(partials_ptr, 4, parts, programs, float("inf")), axis=0))
        tl.store(summary_ptr + L_SQUARES, tl.sum(_slot(partials_ptr, 5, parts, programs, 0.0), axis=0))
        if HAS_GRAD:
            means = _slot(partials_ptr, 6, parts, programs, 0.0)
            mean = tl.sum(counts * means, axis=0) / n_valid
            apart = tl.sum(
                _slot(partials_ptr, 7, parts, programs, 0.0) + counts * (means - mean) * (means - mean), axis=0
            )
            tl.store(summary_ptr + G_STD, tl.sqrt(apart / n_valid))
            tl.store(summary_ptr + G_MAX, tl.max(_slot(partials_ptr, 8, parts, programs, float("-inf")), axis=0))
        step = load_step(state_ptr, HAS_STATE, M)
        tl.store(summary_ptr + STEP, step)
        if ADVANCE:
            tl.debug_barrier()  # every warp has read the old step
            tl.store(state_ptr + 2 * M, step + 1.0)
        tl.store(n_valid_ptr, total.to(tl.int64))


@triton.jit
def _number(summary_ptr, slot, COMPUTE: tl.constexpr):
    return tl.load(summary_ptr + slot).to(COMPUTE)


@triton.jit
def _noise(rows, summary_ptr, seed, USED: tl.constexpr, COMPUTE: tl.constexpr):
    if USES_NOISE & USED:
        return exponential_noise(rows, tl.load(summary_ptr + STEP).to(tl.int64), seed, COMPUTE)
    else:
        return tl.zeros([rows.shape[0]], COMPUTE)


@triton.jit(
    do_not_specialize=[
        "n", "iterations", "programs", "invalid_value", "seed", "beta_bits", "temperature_bits", "floor_bits"
    ]
)  # fmt: skip
def sums_kernel(
    losses_ptr, grads_ptr, valid_ptr, state_ptr, given_ptr, partials_ptr, arrivals_ptr, summary_ptr,
    n, iterations, programs, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
    seed: tl.int64, beta_bits: tl.int64, temperature_bits: tl.int64, floor_bits: tl.int64,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr,
    METHOD_CODES: tl.constexpr, M: tl.constexpr, USED: tl.constexpr, HAS_STATE: tl.constexpr, GIVEN: tl.constexpr,
    STANDARDIZE: tl.constexpr, LOG_RATIO: tl.constexpr, HAS_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Second step: sum e_c and sum e_c l of every component, the new weights, and the components' factors."""
    COMPUTE: tl.constexpr = tl.float64 if losses_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    lane = tl.arange(0, LANES)
    l_mean = _number(summary_ptr, L_MEAN, COMPUTE)
    l_max = _number(summary_ptr, L_MAX, COMPUTE)
    l_min = _number(summary_ptr, L_MIN, COMPUTE)
    temperature = float64_from_bits(temperature_bits).to(COMPUTE)
    l_scale = spread(_number(summary_ptr, L_STD, COMPUTE), temperature, STANDARDIZE)
    g_max, g_scale = l_max, l_scale
    if HAS_GRAD:
        g_max = _number(summary_ptr, G_MAX, COMPUTE)
        g_scale = spread(_number(summary_ptr, G_STD, COMPUTE), temperature, STANDARDIZE)

    # 1. this program's rows; exp(-|l - mean|) is relative to the smallest distance seen so far
    sums = tl.zeros([LANES], tl.float64)
    weighted = tl.zeros([LANES], tl.float64)
    middle_min = tl.full([], float("inf"), COMPUTE)
    for i in range(iterations):
        rows = (program.to(tl.int64) * iterations + i) * BLOCK + tl.arange(0, BLOCK)
        loss, g, ok = load_rows(
            losses_ptr, grads_ptr, valid_ptr, rows, n, stride_loss, stride_grad,
            valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, HAS_GRAD, HAS_VALID, COMPUTE,
        )  # fmt: skip
        noise = _noise(rows, summary_ptr, seed, USED, COMPUTE)
        if USES_MIDDLE & USED:
            closer = tl.minimum(middle_min, tl.min(tl.where(ok, tl.abs(loss - l_mean), float("inf")), axis=0))
            factor = _closer(closer, middle_min, l_scale)
            sums = tl.where(lane == MIDDLE, sums * factor, sums)
            weighted = tl.where(lane == MIDDLE, weighted * factor, weighted)
            middle_min = closer
        for c in tl.static_range(COMPONENTS):
            if (USED >> c) & 1:
                e = component(c, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min)
                sums += tl.where(lane == c, tl.sum(e, axis=0).to(tl.float64), 0.0)
                weighted += tl.where(lane == c, tl.sum(e * loss, axis=0).to(tl.float64), 0.0)
    tl.store(partials_ptr + lane * programs + program, sums)
    tl.store(partials_ptr + (LANES + lane) * programs + program, weighted)
    tl.store(partials_ptr + 2 * LANES * programs + program, middle_min.to(tl.float64))

    # 2. all programs' sums, the state and the factors, by the one that arrives last
    if last_to_arrive(arrivals_ptr, programs):
        parts = tl.arange(0, MAX_PROGRAMS)
        mins = _slot(partials_ptr, 2 * LANES, parts, programs, float("inf"))
        middle = tl.min(mins, axis=0)
        sums = tl.full([LANES], 1.0, tl.float64)
        weighted = tl.zeros([LANES], tl.float64)
        for c in tl.static_range(COMPONENTS):
            if (USED >> c) & 1:
                part = _slot(partials_ptr, c, parts, programs, 0.0)
                part_weighted = _slot(partials_ptr, LANES + c, parts, programs, 0.0)
                if c == MIDDLE:
                    factor = _closer(middle, mins, l_scale.to(tl.float64))
                    part *= factor
                    part_weighted *= factor
                sums = tl.where(lane == c, tl.sum(part, axis=0), sums)
                weighted = tl.where(lane == c, tl.sum(part_weighted, axis=0), weighted)
        given = sums
        if GIVEN:
            given = tl.load(given_ptr + lane, mask=lane < M, other=float("nan"))
        factors = weigh(
            sums, weighted, tl.load(summary_ptr + N_VALID), given, state_ptr, tl.load(summary_ptr + STEP),
            float64_from_bits(beta_bits), float64_from_bits(floor_bits),
            METHOD_CODES, M, HAS_STATE, GIVEN, LOG_RATIO, HAS_FLOOR,
        )  # fmt: skip
        tl.store(summary_ptr + COEFFICIENTS + lane, factors)
        tl.store(summary_ptr + MIDDLE_MIN, middle)


@triton.jit
def _closer(middle_min, before, scale):
    """What brings sums relative to the distance `before` to `middle_min` <= before; sums of nothing (inf) stay 0."""
    return tl.exp(tl.where(before == float("inf"), 0.0, (middle_min - before) / scale).to(tl.float64))


@triton.jit(do_not_specialize=["n", "invalid_value", "seed", "temperature_bits", "power_bits"])
def scores_kernel(
    losses_ptr, grads_ptr, valid_ptr, summary_ptr, scores_ptr,
    n, stride_loss, stride_grad, valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
    seed: tl.int64, temperature_bits: tl.int64, power_bits: tl.int64,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr, KEY_METHOD: tl.constexpr, USED: tl.constexpr,
    STANDARDIZE: tl.constexpr, CURRICULUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Third step: the score of every row; with KEY_METHOD >= 0 that method's baseline key. -inf on invalid rows."""
    COMPUTE: tl.constexpr = tl.float64 if losses_ptr.dtype.element_ty == tl.float64 else tl.float32
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    loss, g, ok = load_rows(
        losses_ptr, grads_ptr, valid_ptr, rows, n, stride_loss, stride_grad,
        valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, HAS_GRAD, HAS_VALID, COMPUTE,
    )  # fmt: skip
    noise = _noise(rows, summary_ptr, seed, USED, COMPUTE)
    l_mean = _number(summary_ptr, L_MEAN, COMPUTE)
    l_max = _number(summary_ptr, L_MAX, COMPUTE)
    l_min = _number(summary_ptr, L_MIN, COMPUTE)
    if KEY_METHOD >= 0:
        score = baseline_key(KEY_METHOD, loss, g, noise, l_mean, l_max, l_min)
    else:
        temperature = float64_from_bits(temperature_bits).to(COMPUTE)
        l_scale = spread(_number(summary_ptr, L_STD, COMPUTE), temperature, STANDARDIZE)
        g_max, g_scale = l_max, l_scale
        if HAS_GRAD:
            g_max = _number(summary_ptr, G_MAX, COMPUTE)
            g_scale = spread(_number(summary_ptr, G_STD, COMPUTE), temperature, STANDARDIZE)
        factors = tl.load(summary_ptr + COEFFICIENTS + tl.arange(0, LANES))
        middle_min = _number(summary_ptr, MIDDLE_MIN, COMPUTE)
        score = mixed_score(
            factors, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min, USED
        )
        if CURRICULUM:
            score *= reward(
                loss, _number(summary_ptr, L_SQUARES, COMPUTE), tl.load(summary_ptr + N_VALID),
                tl.load(summary_ptr + STEP), float64_from_bits(power_bits), CURRICULUM,
            )  # fmt: skip
    score = tl.where(ok, score, float("-inf")).to(scores_ptr.dtype.element_ty)
    tl.store(scores_ptr + rows, score, mask=rows < n)


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


# By the most rows. 4 rows a thread: noise and six exponentials a row want many warps, not registers. The program that
# arrives last combines the others' partials in one block.
LARGE = {2**31: RadixTuning(block=1024, warps=8, programs=1024)}
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


def many_programs(rows: Rows, state: Tensor | None, plan: Plan, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores and number of valid rows of any batch: moments, sums, scores."""
    losses = rows.losses
    n, device = losses.shape[0], losses.device
    scores = torch.empty(n, dtype=torch.float32, device=device)
    n_valid = torch.empty((), dtype=torch.int64, device=device)
    with launch_device(losses):
        summary, partials, arrivals = _moments(rows, state, plan, n_valid)
        if not plan.baseline:
            given = summary
            if plan.selected:
                given = torch.empty(len(plan.methods), dtype=torch.float64, device=device)
                for i, method in enumerate(plan.methods):
                    chosen = baseline_choice(rows, method, summary, k, seed)
                    _chosen_loss(rows, chosen, partials, arrivals, given[i])
            _sums_launch(rows.shape, plan)(
                *rows.tensors, losses if state is None else state, given, partials, arrivals, summary,
                options=(seed, plan.beta, plan.temperature, plan.floor),
            )  # fmt: skip
        _scores(rows, summary, scores, plan, plan.methods[0] if plan.baseline else -1, seed)
    return scores, n_valid


def _moments(rows: Rows, state: Tensor | None, plan: Plan, n_valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """summary, and the scratch of the launches after it: partials and arrivals."""
    losses = rows.losses
    device = losses.device
    launch = _moments_launch(rows.shape, plan, state is not None)
    summary = torch.empty(SUMMARY.value, dtype=torch.float64, device=device)
    partials = torch.empty((2 * LANES.value + 1) * launch.grid[0], dtype=torch.float64, device=device)
    arrivals = counters(device, 1)
    launch(*rows.tensors, losses if state is None else state, partials, arrivals, summary, n_valid)
    return summary, partials, arrivals


def _large(kernel, shape: RowsShape, constants: dict[str, Any], *before: int) -> Launch:
    """A launch whose programs share all rows: counts, iterations and programs, then the strides."""
    tuning = up_to(LARGE, shape.n)
    programs, iterations = chunks(shape.n, tuning.block, tuning.programs)
    constants = shape.flags() | constants | {"BLOCK": tuning.block, "MAX_PROGRAMS": tuning.programs}
    integers = (shape.n, *before, iterations, programs, *shape.strides)
    return Launch(kernel, (programs,), integers, constants, tuning.warps)


@cached
def _moments_launch(shape: RowsShape, plan: Plan, has_state: bool) -> Launch:
    constants = {"M": plan.flags["M"], "HAS_STATE": plan.flags["HAS_STATE"], "ADVANCE": plan.baseline and has_state}
    return _large(moments_kernel, shape, constants)


_SUMS_FLAGS = ("METHOD_CODES", "M", "USED", "HAS_STATE", "STANDARDIZE", "LOG_RATIO", "HAS_FLOOR")
_SCORES_FLAGS = ("USED", "STANDARDIZE", "CURRICULUM")


@cached
def _sums_launch(shape: RowsShape, plan: Plan) -> Launch:
    return _large(sums_kernel, shape, {"GIVEN": plan.selected, **{name: plan.flags[name] for name in _SUMS_FLAGS}})


def _scores(rows: Rows, summary: Tensor, out: Tensor, plan: Plan, key_method: int, seed: int) -> None:
    launch = _scores_launch(rows.shape, plan, key_method)
    launch(*rows.tensors, summary, out, options=(seed, plan.temperature, plan.power))


@cached
def _scores_launch(shape: RowsShape, plan: Plan, key_method: int) -> Launch:
    tuning = up_to(LARGE, shape.n)
    constants = shape.flags() | {"KEY_METHOD": key_method, "BLOCK": tuning.block}
    constants |= {name: plan.flags[name] for name in _SCORES_FLAGS}
    return Launch(scores_kernel, (ceil_div(shape.n, tuning.block),), (shape.n, *shape.strides), constants, tuning.warps)


_NO_OPTIONS = PackedOptions(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, math.nan, 0.0, 1.0)


def _key(rows: Rows, method: str, summary: Tensor, seed: int) -> Tensor:
    """Baseline key [N] of one method, -inf on invalid rows."""
    code = METHODS.index(method)
    dtype = torch.float64 if rows.losses.dtype == torch.float64 else torch.float32
    key = torch.empty(rows.losses.shape[0], dtype=dtype, device=rows.losses.device)
    _scores(rows, summary, key, make_plan((code,), False, _NO_OPTIONS), code, seed)
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


def _chosen_loss(rows: Rows, chosen: Tensor, partials: Tensor, arrivals: Tensor, out: Tensor) -> None:
    _chosen_loss_launch(rows.shape, chosen.shape[0])(*rows.tensors, chosen, partials, arrivals, out)


@cached
def _chosen_loss_launch(shape: RowsShape, k: int) -> Launch:
    return _large(chosen_loss_kernel, shape._replace(n=k), {}, shape.n)


def choose_coreset1(rows: Rows, scores: Tensor, k: int, order: str, seed: int) -> Tensor:
    """Both ends of the losses: the k rows coreset1 alone chooses, ordered by row or by `scores`."""
    device = rows.losses.device
    plan = make_plan((_CORESET1,), False, _NO_OPTIONS)
    with launch_device(rows.losses):
        summary, *_ = _moments(rows, None, plan, torch.empty((), dtype=torch.int64, device=device))
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
        scores, n_valid = many_programs(rows, state, plan, k, seed)
        indices = None
        if out_losses is not None:
            out_losses.copy_(rows.losses)
    if order is None:
        return scores, n_valid, None
    if both_ends:
        indices = choose_coreset1(rows, scores, k, order, seed)
    elif not small:
        indices = select_topk(scores, k, True, order)
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
            flags = plan.flags
            launch = {"partials_ptr": "fp64", "arrivals_ptr": "i32", "summary_ptr": "fp64"}
            yield Compilation(
                f"moments-{pointee}-{name}", moments_kernel,
                inputs | launch | {"state_ptr": "fp64", "n_valid_ptr": "i64"},
                row_flags | sized | {"M": flags["M"], "HAS_STATE": True, "ADVANCE": plan.baseline},
                large.warps, ones=ones,
            )  # fmt: skip
            if not plan.baseline:
                for given in (False, True):
                    yield Compilation(
                        f"sums-{pointee}-{name}-{given}", sums_kernel,
                        inputs | launch | {"state_ptr": "fp64", "given_ptr": "fp64"},
                        row_flags | sized | {
                            "GIVEN": given, **{key: flags[key] for key in _SUMS_FLAGS},
                        }, large.warps, ones=ones,
                    )  # fmt: skip
            yield Compilation(
                f"scores-{pointee}-{name}", scores_kernel, inputs | {"summary_ptr": "fp64", "scores_ptr": "fp32"},
                row_flags | {
                    "KEY_METHOD": plan.methods[0] if plan.baseline else -1, "BLOCK": large.block,
                    **{key: flags[key] for key in _SCORES_FLAGS},
                }, large.warps, ones=ones,
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
