"""Scores of a batch of any size, and the choice, in one launch.

A step of many programs (see maths.begin_step) takes the moments of the losses, one the sums of e_c and e_c l, one the
scores, and then those of the selection. Every program combines the float64 partials of the step before in the same order.
The first two are one step where no component needs a moment of the whole batch: sums relative to a program's own extremes
are rescaled.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaselect_kernels.kernels.batch_terms import (
    BIG,
    COMPONENTS,
    GRAD,
    LANES,
    MIDDLE,
    SMALL,
    USES_MIDDLE,
    USES_NOISE,
    Plan,
    Rows,
    RowsShape,
    baseline_key,
    component_sums,
    load_block,
    load_rows,
    load_step,
    mixed_score,
    moments,
    reward,
    spread,
    weigh,
)
from adaselect_kernels.kernels.maths import (
    begin_step,
    end_step,
    exponential_noise,
    float64_from_bits,
    last_to_arrive,
    ordered_key,
)
from adaselect_kernels.kernels.runtime import Launch, cached, counters, up_to
from adaselect_kernels.kernels.select import RadixTuning, RadixWork, chunks, publish_digit, radix_work, select_step

# Numbers a large batch keeps between its steps, float64. First the state before the call and its step:
STATE_SLOTS = tl.constexpr(16)
STEP = tl.constexpr(15)
# then of every program: n, mean, M2, max, min, sum l^2, mean, M2 and max of the gradient norms, and the sums.
MAXIMA, MINIMA, GRAD_MAXIMA, SUMS_AT = (tl.constexpr(i) for i in (3, 4, 8, 9))
MIDDLE_MINIMA = tl.constexpr(9 + 2 * 8)
SLOTS = 9 + 2 * 8 + 1


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


# By the most rows. 4 rows a thread: noise and six exponentials a row want many warps, not registers. Every program reads
# the partials of all: a number a thread.
LARGE = {2**31: RadixTuning(block=1024, warps=8, programs=256)}


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


def run_steps(
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


def chosen_loss(rows: Rows, chosen: Tensor, out: Tensor) -> None:
    """Mean loss of the valid rows among `chosen` [k] -> out, one float64."""
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
