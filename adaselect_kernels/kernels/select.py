"""Exact top-k of one row of scores: ties to the lower row, NaN last, deterministic; and masks of the best share of many rows.

Up to ONE_PROGRAM_ROWS scores are chosen inside one program. More are chosen by one launch of several steps: a radix search
for the k-th best key, a step a digit, and a stable compaction; the counts are integers, so no order of arrival can change
them. order="score" then sorts the k chosen only.

A mask's k is a share of the finite scores, which are the histogram of the first digit: the same search knows it one step on.
Few long rows take a launch of several steps each, others a program each, which makes the search alone.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaselect_kernels.kernels.maths import (
    TICKETS,
    begin_step,
    end_step,
    float64_from_bits,
    float_bits,
    is_finite,
    ordered_key,
)
from adaselect_kernels.kernels.runtime import (
    TRITON_VERSION,
    Compilation,
    Launch,
    cached,
    ceil_div,
    counters,
    launch_device,
    next_power_of_2,
    up_to,
)

# Bits of a digit. A histogram counts in shared memory, where 4096 bins cost little more than 256, and 12 + 12 + 8 bits leave
# a small table for the last digit; before Triton 3.8 each warp votes on every bit and counts 32 bins at a time.
DIGIT_BITS = 12 if TRITON_VERSION >= (3, 8) else 8
ALL_ROWS_RANKED = tl.constexpr(128)  # up to here every pair of rows is compared: 128 comparisons a thread, no search


@triton.jit
def kth_largest(keys, k):
    """The k-th largest of unsigned `keys`, two bits a round; keys that must not count are 0."""
    BITS: tl.constexpr = keys.dtype.primitive_bitwidth
    one = tl.sum(tl.zeros_like(keys), axis=0) + 1
    threshold = one - 1
    unit = one << (BITS - 2)
    for _ in range(BITS // 2):
        # how many keys reach threshold + unit, + 2 unit, + 3 unit: 16 bits each of one sum
        reach = (
            (keys >= (threshold | unit)).to(tl.int64)
            + ((keys >= (threshold | (unit * 2))).to(tl.int64) << 16)
            + ((keys >= (threshold | (unit * 3))).to(tl.int64) << 32)
        )
        counts = tl.sum(reach, axis=0)
        digit = (
            ((counts & 0xFFFF) >= k).to(tl.int32)
            + (((counts >> 16) & 0xFFFF) >= k).to(tl.int32)
            + ((counts >> 32) >= k).to(tl.int32)
        )
        threshold = threshold | (unit * digit.to(one.dtype))
        unit = unit >> 2
    return threshold


@triton.jit
def select_block(keys, rows, n, k, indices_ptr, BY_SCORE: tl.constexpr):
    """Write the k rows of the best `keys` [BLOCK] out of rows < n: ascending rows, or best first (up to ALL_ROWS_RANKED)."""
    inside = rows < n
    if keys.shape[0] <= ALL_ROWS_RANKED:
        # rank_i = how many rows come before i: a better key, or an equal one of a lower row
        better = keys[None, :] > keys[:, None]
        before = (keys[None, :] == keys[:, None]) & (rows[None, :] < rows[:, None])
        rank = tl.sum(((better | before) & inside[None, :]).to(tl.int32), axis=1)
        chosen = inside & (rank < k)
        if BY_SCORE:
            position = rank
        else:
            position = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    else:
        keys = tl.where(inside, keys, tl.zeros_like(keys))
        threshold = kth_largest(keys, k)
        above = inside & (keys > threshold)
        equal = inside & (keys == threshold)
        needed = k - tl.sum(above.to(tl.int32), axis=0)
        # rows before this one: above in the low half, equal in the high half of one scan
        packed = above.to(tl.int32) + (equal.to(tl.int32) << 16)
        before = tl.cumsum(packed, axis=0) - packed
        equal_before = before >> 16
        chosen = above | (equal & (equal_before < needed))
        position = (before & 0xFFFF) + tl.minimum(equal_before, needed)
    tl.store(indices_ptr + position, rows.to(tl.int64), mask=chosen)


@triton.jit(do_not_specialize=["n", "k"])
def block_kernel(
    scores_ptr, indices_ptr, n, k, stride,
    LARGEST: tl.constexpr, BY_SCORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Selection in one program."""
    rows = tl.arange(0, BLOCK)
    scores = tl.load(scores_ptr + rows.to(tl.int64) * stride, mask=rows < n, other=0.0)
    select_block(ordered_key(scores, LARGEST), rows, n, k, indices_ptr, BY_SCORE)


# A selection from many programs is one launch of several steps: a digit each, then the compaction. Its work memory, int32:
# tickets, arrivals of each step (TICKETS numbers in all), then a histogram a digit. It is zero between launches.


@triton.jit
def load_keys(scores_ptr, start, n, stride, LARGEST: tl.constexpr, BLOCK: tl.constexpr, FINITE: tl.constexpr = False):
    """Ordered keys of rows start .. start + BLOCK and which of them exist, or (FINITE) exist and have a finite score.

    `.cg`: other programs may have stored the scores.
    """
    rows = start + tl.arange(0, BLOCK)
    inside = rows < n
    if start + BLOCK <= n:
        scores = tl.load(scores_ptr + rows * stride, cache_modifier=".cg")  # no mask: 16 bytes a thread
    else:
        scores = tl.load(scores_ptr + rows * stride, mask=inside, other=0.0, cache_modifier=".cg")
    if scores_ptr.dtype.element_ty != tl.float64:
        scores = scores.to(tl.float32)  # exact, and it keeps the order
    if FINITE:
        inside = inside & is_finite(scores)
    return ordered_key(scores, LARGEST), rows, inside


@triton.jit
def digit_place(d, KEY_BITS: tl.constexpr, BITS: tl.constexpr):
    """(width, shift) of digit number d, the most significant first; the last one has what is left."""
    left = KEY_BITS - BITS * d
    width = tl.minimum(left, BITS)
    return width, left - width


@triton.jit
def publish_digit(
    counts, above, d, counters_ptr, table_ptr, program, programs,
    KEY_BITS: tl.constexpr, BITS: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    """Add this program's counts [BINS] of digit d to the histogram; of the last digit also fill the program's column.

    table [1 + digits, programs]: row 1 + b counts the program's keys above the digits so far with b after them, row 0 all
    keys that are at least the digits so far.
    """
    BINS: tl.constexpr = 1 << BITS
    LAST_BINS: tl.constexpr = 1 << (KEY_BITS - BITS * (DIGITS - 1))
    bins = tl.arange(0, BINS)
    tl.atomic_add(counters_ptr + TICKETS + d * BINS + bins, counts, mask=counts > 0, sem="relaxed")
    if d == DIGITS - 1:
        total = above + tl.sum(counts, axis=0)
        column = table_ptr + program.to(tl.int64)
        tl.store(column + (1 + bins.to(tl.int64)) * programs, total - tl.cumsum(counts, axis=0), mask=bins < LAST_BINS)
        tl.store(column, total)


@triton.jit
def share_of(n, gamma):
    """clamp(floor(gamma n + 0.5), 1, n), 0 of none; gamma float64, in which a fused multiply-add has the same floor."""
    k = tl.floor(gamma * n.to(tl.float64) + 0.5).to(tl.int64)
    return tl.minimum(tl.maximum(k, 1), n.to(tl.int64))


@triton.jit
def append_digit(prefix, needed, total, width):
    """The digits of the sought key with one more, how many keys equal to them are needed, and the digit.

    total: how many keys that begin with the prefix have each value next.
    """
    # rows above d < needed <= rows above d + rows of d
    bins = tl.arange(0, total.shape[0])
    higher_rows = (tl.sum(total, axis=0) - tl.cumsum(total, axis=0)).to(tl.int64)
    found = (higher_rows < needed) & (needed <= higher_rows + total)
    digit = tl.sum(tl.where(found, bins, 0), axis=0)
    needed -= tl.sum(tl.where(found, higher_rows, 0), axis=0)
    return (prefix << width.to(prefix.dtype)) | digit.to(prefix.dtype), needed, digit


@triton.jit
def find_digit(
    d, k, counters_ptr, search_ptr, program, KEY: tl.constexpr, KEY_BITS: tl.constexpr, BITS: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """The first d digits of the k-th best key, how many keys equal to them are needed, and the last of the digits.

    Every program of step d does this alone, from the histogram of digit d - 1 and what program 0 of step d - 1 left.
    MASK: k is the share gamma of all keys counted.
    """
    BINS: tl.constexpr = 1 << BITS
    bins = tl.arange(0, BINS)
    width, _ = digit_place(d - 1, KEY_BITS, BITS)
    total = tl.load(
        counters_ptr + TICKETS + (d - 1) * BINS + bins, mask=bins < tl.where(d > 0, 1 << width, 0), other=0,
        cache_modifier=".cg",
    )  # fmt: skip
    prefix = tl.load(search_ptr + 2 * (d - 1), mask=d > 1, other=0, cache_modifier=".cg").to(KEY)
    needed = tl.load(search_ptr + 2 * (d - 1) + 1, mask=d > 1, other=0, cache_modifier=".cg")
    if MASK:
        k = share_of(tl.sum(total, axis=0), k)  # all of them where d is 1
    needed = tl.where(d > 1, needed, k.to(tl.int64))
    prefix, needed, digit = append_digit(prefix, needed, total, width)
    tl.store(search_ptr + 2 * d, prefix.to(tl.int64), mask=program == 0)
    tl.store(search_ptr + 2 * d + 1, needed, mask=program == 0)
    return prefix, needed.to(tl.int32), digit


@triton.jit
def digit_counts(keys, inside, prefix, width, shift, BITS: tl.constexpr):
    """How many keys that begin with `prefix` have each value of the digit at `shift`, and which keys are above them."""
    here = keys >> shift.to(keys.dtype)
    higher = here >> width.to(keys.dtype)
    digit = (here & ((1 << width) - 1).to(keys.dtype)).to(tl.int32)
    return tl.histogram(digit, 1 << BITS, mask=inside & (higher == prefix)), inside & (higher > prefix)


@triton.jit
def count_digit(
    d, prefix, scores_ptr, counters_ptr, table_ptr, program, programs, n, stride, iterations,
    KEY_BITS: tl.constexpr, BITS: tl.constexpr, DIGITS: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Histogram of digit d over this program's keys that begin with `prefix`."""
    width, shift = digit_place(d, KEY_BITS, BITS)
    counts = tl.zeros([1 << BITS], tl.int32)
    above = 0
    first = program.to(tl.int64) * iterations
    for i in range(iterations):
        keys, _, inside = load_keys(scores_ptr, (first + i) * BLOCK, n, stride, LARGEST, BLOCK, MASK)
        block_counts, higher = digit_counts(keys, inside, prefix, width, shift, BITS)
        counts += block_counts
        above += tl.sum(higher.to(tl.int32), axis=0)
    publish_digit(counts, above, d, counters_ptr, table_ptr, program, programs, KEY_BITS, BITS, DIGITS)


@triton.jit
def compact(
    threshold, needed, digit, scores_ptr, table_ptr, out_ptr, program, programs, n, stride, iterations,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr, MAX_PROGRAMS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Write the rows above the threshold, and as many equal to it as are needed, in ascending order; or their mask."""
    # rows above and rows equal in the programs before this one; the threshold's last digit is `digit`
    parts = tl.arange(0, MAX_PROGRAMS)
    row = table_ptr + digit.to(tl.int64) * programs + parts
    at_least = tl.load(row, mask=parts < program, other=0, cache_modifier=".cg")
    higher = tl.load(row + programs, mask=parts < program, other=0, cache_modifier=".cg")
    above_before = tl.sum(higher, axis=0)
    equal_before = tl.sum(at_least - higher, axis=0)
    first = program.to(tl.int64) * iterations
    for i in range(iterations):
        keys, rows, inside = load_keys(scores_ptr, (first + i) * BLOCK, n, stride, LARGEST, BLOCK, MASK)
        above = inside & (keys > threshold)
        equal = inside & (keys == threshold)
        # rows of this block before this one: above in the low half, equal in the high half of one scan
        packed = above.to(tl.int32) + (equal.to(tl.int32) << 16)
        before = tl.cumsum(packed, axis=0) - packed
        ties = equal_before + (before >> 16)
        chosen = above | (equal & (ties < needed))
        if MASK:
            tl.store(out_ptr + rows, chosen.to(tl.uint8), mask=rows < n)
        else:
            position = above_before + (before & 0xFFFF) + tl.minimum(ties, needed)
            tl.store(out_ptr + position, rows, mask=chosen)
        total = tl.sum(packed, axis=0)
        above_before += total & 0xFFFF
        equal_before += total >> 16


@triton.jit
def select_step(
    d, scores_ptr, counters_ptr, search_ptr, table_ptr, out_ptr, program, programs, n, k, stride, iterations,
    BITS: tl.constexpr, DIGITS: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
    MASK: tl.constexpr = False,
):  # fmt: skip
    """Step d of a selection: count digit number d, or (d = DIGITS) write the chosen rows in ascending order.

    MASK: k is gamma, a share of the finite scores, and a byte is written for every row.
    """
    KEY: tl.constexpr = tl.uint64 if scores_ptr.dtype.element_ty == tl.float64 else tl.uint32
    KEY_BITS: tl.constexpr = KEY.primitive_bitwidth
    prefix, needed, digit = find_digit(d, k, counters_ptr, search_ptr, program, KEY, KEY_BITS, BITS, MASK)
    if d < DIGITS:
        count_digit(
            d, prefix, scores_ptr, counters_ptr, table_ptr, program, programs, n, stride, iterations,
            KEY_BITS, BITS, DIGITS, LARGEST, BLOCK, MASK,
        )  # fmt: skip
    else:
        compact(
            prefix, needed, digit, scores_ptr, table_ptr, out_ptr, program, programs, n, stride, iterations,
            LARGEST, BLOCK, MAX_PROGRAMS, MASK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "k", "iterations", "programs"])
def radix_kernel(
    scores_ptr, counters_ptr, search_ptr, table_ptr, indices_ptr, n, k, stride, iterations, programs,
    BITS: tl.constexpr, DIGITS: tl.constexpr, COUNTERS: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The k best of any number of rows. search [DIGITS + 1, 2]: see find_digit; table: see publish_digit."""
    step, program = begin_step(counters_ptr, programs)
    select_step(
        step, scores_ptr, counters_ptr, search_ptr, table_ptr, indices_ptr, program, programs, n, k, stride, iterations,
        BITS, DIGITS, LARGEST, BLOCK, MAX_PROGRAMS,
    )  # fmt: skip
    end_step(counters_ptr, step, programs, DIGITS + 1, COUNTERS)


@triton.jit(do_not_specialize=["n", "iterations", "programs", "gamma_bits"])
def mask_steps_kernel(
    scores_ptr, counters_ptr, search_ptr, table_ptr, mask_ptr, n, stride, iterations, programs, gamma_bits: tl.int64,
    BITS: tl.constexpr, DIGITS: tl.constexpr, COUNTERS: tl.constexpr, BLOCK: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The mask of one long row, uint8, in the steps of radix_kernel."""
    step, program = begin_step(counters_ptr, programs)
    select_step(
        step, scores_ptr, counters_ptr, search_ptr, table_ptr, mask_ptr, program, programs, n,
        float64_from_bits(gamma_bits), stride, iterations, BITS, DIGITS, True, BLOCK, MAX_PROGRAMS, True,
    )  # fmt: skip
    end_step(counters_ptr, step, programs, DIGITS + 1, COUNTERS)


@triton.jit(do_not_specialize=["n", "gamma_bits"])
def mask_rows_kernel(
    scores_ptr, mask_ptr, n, stride_row, stride, gamma_bits: tl.int64,
    BITS: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mask of one row a program, uint8; all of the search reads the row from the cache again."""
    KEY: tl.constexpr = tl.uint64 if scores_ptr.dtype.element_ty == tl.float64 else tl.uint32
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * stride_row
    gamma = float64_from_bits(gamma_bits)
    prefix = tl.full([], 0, KEY)
    needed = tl.full([], 0, tl.int64)
    for d in range(DIGITS):
        width, shift = digit_place(d, KEY.primitive_bitwidth, BITS)
        counts = tl.zeros([1 << BITS], tl.int32)
        for start in range(0, n, BLOCK):
            keys, _, inside = load_keys(scores_ptr, tl.cast(start, tl.int64), n, stride, True, BLOCK, True)
            block_counts, _ = digit_counts(keys, inside, prefix, width, shift, BITS)
            counts += block_counts
        needed = tl.where(d == 0, share_of(tl.sum(counts, axis=0), gamma), needed)
        prefix, needed, _ = append_digit(prefix, needed, counts, width)
    equal_before = 0
    for start in range(0, n, BLOCK):
        keys, places, inside = load_keys(scores_ptr, tl.cast(start, tl.int64), n, stride, True, BLOCK, True)
        equal = inside & (keys == prefix)
        ties = equal_before + tl.cumsum(equal.to(tl.int32), axis=0) - 1
        chosen = (inside & (keys > prefix)) | (equal & (ties < needed))
        tl.store(mask_ptr + row * n + places, chosen.to(tl.uint8), mask=places < n)
        equal_before += tl.sum(equal.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["k"])
def rank_kernel(
    scores_ptr, chosen_ptr, indices_ptr, k, stride,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """Chosen rows, ascending, into the order of their scores: each goes where as many rows precede it as it has betters."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(chosen_ptr + position, mask=position < k, other=0)
    keys = ordered_key(tl.load(scores_ptr + rows * stride, mask=position < k, other=0.0), LARGEST)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, k, OTHERS):
        other = start + tl.arange(0, OTHERS)
        other_rows = tl.load(chosen_ptr + other, mask=other < k, other=0)
        other_keys = ordered_key(tl.load(scores_ptr + other_rows * stride, mask=other < k, other=0.0), LARGEST)
        # rank_i = how many come before i: a better key, or an equal one of a lower row
        better = other_keys[None, :] > keys[:, None]
        tied = (other_keys[None, :] == keys[:, None]) & (other[None, :] < position[:, None])
        rank += tl.sum(((better | tied) & (other < k)[None, :]).to(tl.int32), axis=1)
    tl.store(indices_ptr + rank, rows, mask=position < k)


@triton.jit(do_not_specialize=["k"])
def gather_keys_kernel(scores_ptr, chosen_ptr, keys_ptr, k, stride, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Ordered keys of the chosen rows as signed integers, which sort as the unsigned ones do."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < k
    rows = tl.load(chosen_ptr + position, mask=inside, other=0)
    keys = ordered_key(tl.load(scores_ptr + rows * stride, mask=inside, other=0.0), LARGEST)
    if scores_ptr.dtype.element_ty == tl.float64:
        signed = (keys ^ 0x8000000000000000).to(tl.int64, bitcast=True)
    else:
        signed = (keys ^ 0x80000000).to(tl.int32, bitcast=True)
    tl.store(keys_ptr + position, signed, mask=inside)


class BlockTuning(NamedTuple):
    warps: int


# One program, by the most rows: at most 16 rows a thread, so that float32 does not spill.
BLOCKS = {1024: BlockTuning(warps=4), 4096: BlockTuning(warps=8)}
ONE_PROGRAM_ROWS = 4096  # keys, scores and flags stay in registers


class RadixTuning(NamedTuple):
    block: int  # rows that a program takes at a time
    warps: int
    programs: int  # at most


# By the most rows. 8 rows a thread: a histogram's cost is shared by enough keys. Every program scans the last digit's
# counts of those before it in one block of 512, and a step of 512 programs is resident at once on 132 multiprocessors.
RADIX = {2**31: RadixTuning(block=2048, warps=8, programs=512)}


class RankTuning(NamedTuple):
    block: int
    others: int  # at a time: 128 comparisons a thread for each pair of loads
    warps: int


RANKS = {2**31: RankTuning(block=16, others=1024, warps=4)}  # by the most rows chosen
RANK_MAX = 8192  # k^2 comparisons over k / block programs: 64M at most, below the cost of a radix sort's launches
GATHER_BLOCK, GATHER_WARPS = 1024, 4
MASK_BLOCK, MASK_WARPS = 2048, 8  # as RADIX
# A program makes four or five passes over its row. One multiprocessor streams a row of LONG_ROW from the cache in about the
# time of a launch of several steps, which rows beyond it take one after another; a lone row has all others to gain.
LONE_ROW, LONG_ROW = 4096, 65_536


def block_warps(block: int) -> int:
    return up_to(BLOCKS, block).warps


class Chunks(NamedTuple):
    programs: int
    iterations: int


def chunks(n: int, block: int, programs: int) -> Chunks:
    """How n rows are dealt out: consecutive blocks, the same number to each of at most `programs` programs."""
    if n >= 2**31:
        raise ValueError(f"at most 2^31 - 1 rows, got {n}")
    iterations = ceil_div(n, block * programs)
    return Chunks(ceil_div(n, block * iterations), iterations)


def select_topk(scores: Tensor, k: int, largest: bool, order: str) -> Tensor:
    n, stride = scores.shape[0], scores.stride(0)
    indices = torch.empty(k, dtype=torch.int64, device=scores.device)
    by_score = order == "score" and k > 1
    ranked = by_score and n <= ALL_ROWS_RANKED.value
    with launch_device(scores):
        if n <= ONE_PROGRAM_ROWS:
            _block_launch(n, k, stride, largest, ranked)(scores, indices)
        else:
            _radix_select(scores, k, largest, indices)
        if by_score and not ranked:
            return sort_chosen(scores, indices, largest)
    return indices


def block_size(n: int) -> int:
    return max(16, next_power_of_2(n))


@cached
def _block_launch(n: int, k: int, stride: int, largest: bool, ranked: bool) -> Launch:
    block = block_size(n)
    constants = {"LARGEST": largest, "BY_SCORE": ranked, "BLOCK": block}
    return Launch(block_kernel, (1,), (n, k, stride), constants, block_warps(block))


class RadixWork(NamedTuple):
    """Digits of a key, and the work memory of a selection in steps (maths.begin_step)."""

    bits: int
    digits: int
    counters: int  # int32 that are zero
    search: int  # int64
    table: int  # int32 a program

    def constants(self) -> dict[str, int]:
        return {"BITS": self.bits, "DIGITS": self.digits, "COUNTERS": self.counters}


def radix_work(double: bool) -> RadixWork:
    key_bits = 64 if double else 32
    digits = ceil_div(key_bits, DIGIT_BITS)
    last = key_bits - DIGIT_BITS * (digits - 1)
    numbers = TICKETS.value + (digits - 1) * (1 << DIGIT_BITS) + (1 << last)
    return RadixWork(DIGIT_BITS, digits, numbers, 2 * (digits + 1), 1 + (1 << last))


def _radix_select(scores: Tensor, k: int, largest: bool, indices: Tensor) -> None:
    double, device = scores.dtype == torch.float64, scores.device
    launch, programs, work = _radix_launch(scores.shape[0], k, scores.stride(0), double, largest)
    search = torch.empty(work.search, dtype=torch.int64, device=device)
    table = torch.empty(work.table * programs, dtype=torch.int32, device=device)
    launch(scores, counters(device, work.counters), search, table, indices)


@cached
def _radix_launch(n: int, k: int, stride: int, double: bool, largest: bool) -> tuple[Launch, int, RadixWork]:
    tuning, work = up_to(RADIX, n), radix_work(double)
    programs, iterations = chunks(n, tuning.block, tuning.programs)
    constants = work.constants() | {"LARGEST": largest, "BLOCK": tuning.block, "MAX_PROGRAMS": tuning.programs}
    grid = ((work.digits + 1) * programs,)
    return Launch(radix_kernel, grid, (n, k, stride, iterations, programs), constants, tuning.warps), programs, work


def select_mask(scores: Tensor, gamma: float) -> Tensor:
    rows, n = scores.shape
    mask = torch.empty((rows, n), dtype=torch.bool, device=scores.device)
    seen = mask.view(torch.uint8)
    options = (float_bits(gamma),)
    with launch_device(scores):
        if n > (LONE_ROW if rows == 1 else LONG_ROW):
            launch, programs, work = _mask_steps_launch(n, scores.stride(1), scores.dtype == torch.float64)
            search = torch.empty(work.search, dtype=torch.int64, device=scores.device)
            table = torch.empty(work.table * programs, dtype=torch.int32, device=scores.device)
            for i in range(rows):  # one after another on the stream: they share the work memory
                launch(scores[i], counters(scores.device, work.counters), search, table, seen[i], options=options)
        else:
            _mask_rows_launch(rows, n, scores.stride(), scores.dtype == torch.float64)(scores, seen, options=options)
    return mask


@cached
def _mask_steps_launch(n: int, stride: int, double: bool) -> tuple[Launch, int, RadixWork]:
    tuning, work = up_to(RADIX, n), radix_work(double)
    programs, iterations = chunks(n, tuning.block, tuning.programs)
    constants = work.constants() | {"BLOCK": tuning.block, "MAX_PROGRAMS": tuning.programs}
    grid = ((work.digits + 1) * programs,)
    return Launch(mask_steps_kernel, grid, (n, stride, iterations, programs), constants, tuning.warps), programs, work


@cached
def _mask_rows_launch(rows: int, n: int, strides: tuple[int, int], double: bool) -> Launch:
    block = min(MASK_BLOCK, block_size(n))
    work = radix_work(double)
    constants = {"BITS": work.bits, "DIGITS": work.digits, "BLOCK": block}
    return Launch(mask_rows_kernel, (rows,), (n, *strides), constants, MASK_WARPS)


def sort_chosen(scores: Tensor, chosen: Tensor, largest: bool) -> Tensor:
    """`chosen` [k], ascending rows, in the order of their scores, best first, ties to the lower row."""
    k, stride = chosen.shape[0], scores.stride(0)
    if k <= RANK_MAX:
        indices = torch.empty_like(chosen)
        _rank_launch(k, stride, largest)(scores, chosen, indices)
        return indices
    keys = torch.empty(k, dtype=torch.int64 if scores.dtype == torch.float64 else torch.int32, device=scores.device)
    _gather_launch(k, stride, largest)(scores, chosen, keys)
    # a stable sort of k integers neither synchronises nor depends on anything but its input
    return chosen[torch.sort(keys, descending=True, stable=True).indices]


@cached
def _rank_launch(k: int, stride: int, largest: bool) -> Launch:
    tuning = up_to(RANKS, k)
    constants = {"LARGEST": largest, "BLOCK": tuning.block, "OTHERS": tuning.others}
    return Launch(rank_kernel, (ceil_div(k, tuning.block),), (k, stride), constants, tuning.warps)


@cached
def _gather_launch(k: int, stride: int, largest: bool) -> Launch:
    constants = {"LARGEST": largest, "BLOCK": GATHER_BLOCK}
    return Launch(gather_keys_kernel, (ceil_div(k, GATHER_BLOCK),), (k, stride), constants, GATHER_WARPS)


def shipped() -> Iterator[Compilation]:
    """Every block size and order of the selection, for float32 and float64 scores."""
    radix, rank = RADIX[2**31], RANKS[2**31]
    for pointee in ("fp32", "fp64"):
        scores = {"scores_ptr": pointee}
        for block in (16, ALL_ROWS_RANKED.value, 512, 1024, ONE_PROGRAM_ROWS):
            for by_score in (False, True) if block <= ALL_ROWS_RANKED.value else (False,):
                yield Compilation(
                    f"block-{pointee}-{block}-{by_score}", block_kernel, scores | {"indices_ptr": "i64"},
                    {"LARGEST": True, "BY_SCORE": by_score, "BLOCK": block}, block_warps(block), ones=("stride",),
                )  # fmt: skip
        yield Compilation(
            f"radix-{pointee}", radix_kernel,
            scores | {"counters_ptr": "i32", "search_ptr": "i64", "table_ptr": "i32", "indices_ptr": "i64"},
            radix_work(pointee == "fp64").constants() | {
                "LARGEST": True, "BLOCK": radix.block, "MAX_PROGRAMS": radix.programs,
            }, radix.warps, ones=("stride",),
        )  # fmt: skip
        mask = {"mask_ptr": "u8"}
        yield Compilation(
            f"mask-steps-{pointee}", mask_steps_kernel,
            scores | mask | {"counters_ptr": "i32", "search_ptr": "i64", "table_ptr": "i32"},
            radix_work(pointee == "fp64").constants() | {"BLOCK": radix.block, "MAX_PROGRAMS": radix.programs},
            radix.warps, ones=("stride",),
        )  # fmt: skip
        work = radix_work(pointee == "fp64")
        yield Compilation(
            f"mask-rows-{pointee}", mask_rows_kernel, scores | mask,
            {"BITS": work.bits, "DIGITS": work.digits, "BLOCK": MASK_BLOCK}, MASK_WARPS, ones=("stride",),
        )  # fmt: skip
        yield Compilation(
            f"rank-{pointee}", rank_kernel, scores | {"chosen_ptr": "i64", "indices_ptr": "i64"},
            {"LARGEST": True, "BLOCK": rank.block, "OTHERS": rank.others}, rank.warps, ones=("stride",),
        )  # fmt: skip
        yield Compilation(
            f"gather-{pointee}", gather_keys_kernel,
            scores | {"chosen_ptr": "i64", "keys_ptr": "i64" if pointee == "fp64" else "i32"},
            {"LARGEST": True, "BLOCK": GATHER_BLOCK}, GATHER_WARPS, ones=("stride",),
        )  # fmt: skip
