"""Exact top-k of one row of scores: ties to the lower row, NaN last, deterministic.

Up to ONE_PROGRAM_ROWS scores are chosen inside one program. More are chosen by a radix search for the k-th best key, one
launch a digit of 8 bits, and a stable compaction; the counts are integers, so no order of arrival can change them.
order="score" then sorts the k chosen only.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaselect_kernels.kernels.maths import last_to_arrive, ordered_key
from adaselect_kernels.kernels.runtime import (
    Compilation,
    Launch,
    cached,
    ceil_div,
    counters,
    launch_device,
    next_power_of_2,
    up_to,
)

BINS = tl.constexpr(256)  # 8-bit digits: a histogram of 256 bins fits 8 registers a thread
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


@triton.jit(do_not_specialize=["n", "k", "iterations", "programs"])
def digit_kernel(
    scores_ptr, histogram_ptr, arrivals_ptr, search_ptr, counts_ptr, n, k, stride, iterations, programs,
    SHIFT: tl.constexpr, LARGEST: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """One digit of the k-th best key. search = (its digits so far, how many keys equal to them are still needed).

    counts [programs, 2 + BINS]: in the last round, the keys of each program above the digits so far, then those that
    match them by digit, cumulated from the largest; the program that arrives last turns them into (rows above, rows
    equal) before each program.
    """
    KEY: tl.constexpr = tl.uint64 if scores_ptr.dtype.element_ty == tl.float64 else tl.uint32
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    if FIRST:
        needed = k.to(tl.int64)
        prefix = (needed * 0).to(KEY)
    else:
        prefix = tl.load(search_ptr).to(KEY)
        needed = tl.load(search_ptr + 1)

    # 1. histogram of this digit over the rows of this program that match the digits before it
    counts = tl.zeros([BINS], tl.int32)
    above = 0
    for i in range(iterations):
        rows = (program.to(tl.int64) * iterations + i) * BLOCK + tl.arange(0, BLOCK)
        inside = rows < n
        keys = ordered_key(tl.load(scores_ptr + rows * stride, mask=inside, other=0.0), LARGEST)
        if not FIRST:
            higher = keys >> (SHIFT + 8)
            if LAST:
                above += tl.sum((inside & (higher > prefix)).to(tl.int32), axis=0)
            inside = inside & (higher == prefix)
        digit = ((keys >> SHIFT) & 255).to(tl.int32)
        counts += tl.histogram(digit, BINS, mask=inside)
    tl.atomic_add(histogram_ptr + bins, counts, mask=counts > 0, sem="relaxed")
    if LAST:
        at = counts_ptr + program.to(tl.int64) * (BINS + 1)
        # keys of this program with a digit above d: total - (cumulated up to d)
        beyond = above + tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
        tl.store(at + 1 + bins, beyond)
        tl.store(at, above + tl.sum(counts, axis=0))

    # 2. the program that arrives last finds the digit: rows above d < needed <= rows above d + rows of d
    if last_to_arrive(arrivals_ptr, programs):
        total = tl.load(histogram_ptr + bins, cache_modifier=".cg")
        tl.debug_barrier()  # every warp has read the histogram
        tl.store(histogram_ptr + bins, tl.zeros([BINS], tl.int32))
        higher_rows = (tl.sum(total, axis=0) - tl.cumsum(total, axis=0)).to(tl.int64)
        found = (higher_rows < needed) & (needed <= higher_rows + total)
        digit = tl.sum(tl.where(found, bins, 0), axis=0)
        needed -= tl.sum(tl.where(found, higher_rows, 0), axis=0)
        prefix = (prefix << 8) | digit.to(KEY)
        tl.store(search_ptr, prefix.to(tl.int64))
        tl.store(search_ptr + 1, needed)
        if LAST:
            # 3. exclusive sums over the programs, in place of their first two counts
            parts = tl.arange(0, MAX_PROGRAMS)
            live = parts < programs
            parts_ptr = counts_ptr + parts.to(tl.int64) * (BINS + 1)
            part_above = tl.load(parts_ptr + 1 + digit, mask=live, other=0, cache_modifier=".cg")
            # one digit lower everything equal is above too
            lower = tl.load(
                parts_ptr + digit, mask=parts < tl.where(digit > 0, programs, 0), other=0, cache_modifier=".cg"
            )
            all_keys = tl.load(parts_ptr, mask=live, other=0, cache_modifier=".cg")
            part_equal = tl.where(digit > 0, lower, all_keys) - part_above
            tl.debug_barrier()  # every warp has read the counts these replace
            tl.store(parts_ptr, tl.cumsum(part_above, axis=0) - part_above, mask=live)
            tl.store(parts_ptr + 1, tl.cumsum(part_equal, axis=0) - part_equal, mask=live)


@triton.jit(do_not_specialize=["n", "iterations"])
def compact_kernel(
    scores_ptr, search_ptr, counts_ptr, indices_ptr, n, stride, iterations,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the rows above the k-th best key, and as many equal to it as are needed, in ascending order."""
    KEY: tl.constexpr = tl.uint64 if scores_ptr.dtype.element_ty == tl.float64 else tl.uint32
    program = tl.program_id(0)
    threshold = tl.load(search_ptr).to(KEY)
    needed = tl.load(search_ptr + 1).to(tl.int32)
    at = counts_ptr + program.to(tl.int64) * (BINS + 1)
    above_before = tl.load(at)
    equal_before = tl.load(at + 1)
    for i in range(iterations):
        rows = (program.to(tl.int64) * iterations + i) * BLOCK + tl.arange(0, BLOCK)
        inside = rows < n
        keys = ordered_key(tl.load(scores_ptr + rows * stride, mask=inside, other=0.0), LARGEST)
        above = inside & (keys > threshold)
        equal = inside & (keys == threshold)
        # rows of this block before this one: above in the low half, equal in the high half of one scan
        packed = above.to(tl.int32) + (equal.to(tl.int32) << 16)
        before = tl.cumsum(packed, axis=0) - packed
        ties = equal_before + (before >> 16)
        position = above_before + (before & 0xFFFF) + tl.minimum(ties, needed)
        tl.store(indices_ptr + position, rows, mask=above | (equal & (ties < needed)))
        total = tl.sum(packed, axis=0)
        above_before += total & 0xFFFF
        equal_before += total >> 16


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


# By the most rows. 8 rows a thread: a histogram's cost is shared by enough keys. The program that arrives last scans the
# counts of all programs in one block of 1024; 16M rows are 8 blocks each.
RADIX = {2**31: RadixTuning(block=2048, warps=8, programs=1024)}


class RankTuning(NamedTuple):
    block: int
    others: int  # at a time: 128 comparisons a thread for each pair of loads
    warps: int


RANKS = {2**31: RankTuning(block=16, others=1024, warps=4)}  # by the most rows chosen
RANK_MAX = 8192  # k^2 comparisons over k / block programs: 64M at most, below the cost of a radix sort's launches
GATHER_BLOCK, GATHER_WARPS = 1024, 4


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


def _radix_select(scores: Tensor, k: int, largest: bool, indices: Tensor) -> None:
    digits, compact = _radix_launches(scores.shape[0], k, scores.stride(0), scores.dtype == torch.float64, largest)
    programs = compact.grid[0]
    search = torch.empty(2, dtype=torch.int64, device=scores.device)
    counts = torch.empty(programs * (BINS.value + 1), dtype=torch.int32, device=scores.device)
    zeros = counters(scores.device, BINS.value + 4)  # 16 bytes for the arrivals, then the histogram
    histogram = zeros[4:]
    for digit in digits:
        digit(scores, histogram, zeros, search, counts)
    compact(scores, search, counts, indices)


@cached
def _radix_launches(n: int, k: int, stride: int, double: bool, largest: bool) -> tuple[tuple[Launch, ...], Launch]:
    """A launch a digit, from the most significant, and the compaction."""
    tuning = up_to(RADIX, n)
    programs, iterations = chunks(n, tuning.block, tuning.programs)
    sized = {"LARGEST": largest, "BLOCK": tuning.block}
    first = 56 if double else 24
    digits = tuple(
        Launch(
            digit_kernel, (programs,), (n, k, stride, iterations, programs),
            {"SHIFT": shift, "FIRST": shift == first, "LAST": shift == 0, "MAX_PROGRAMS": tuning.programs, **sized},
            tuning.warps,
        )
        for shift in range(first, -1, -8)
    )  # fmt: skip
    return digits, Launch(compact_kernel, (programs,), (n, stride, iterations), sized, tuning.warps)


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
    """Every block size, digit and order of the selection, for float32 and float64 scores."""
    radix, rank = RADIX[2**31], RANKS[2**31]
    for pointee, shifts in (("fp32", (24, 16, 8, 0)), ("fp64", (56, 48, 40, 32, 24, 16, 8, 0))):
        scores = {"scores_ptr": pointee}
        for block in (16, ALL_ROWS_RANKED.value, 512, 1024, ONE_PROGRAM_ROWS):
            for by_score in (False, True) if block <= ALL_ROWS_RANKED.value else (False,):
                yield Compilation(
                    f"block-{pointee}-{block}-{by_score}", block_kernel, scores | {"indices_ptr": "i64"},
                    {"LARGEST": True, "BY_SCORE": by_score, "BLOCK": block}, block_warps(block), ones=("stride",),
                )  # fmt: skip
        search = {"search_ptr": "i64", "counts_ptr": "i32"}
        for shift in shifts:
            yield Compilation(
                f"digit-{pointee}-{shift}", digit_kernel,
                scores | search | {"histogram_ptr": "i32", "arrivals_ptr": "i32"},
                {
                    "SHIFT": shift, "LARGEST": True, "FIRST": shift == shifts[0], "LAST": shift == 0,
                    "BLOCK": radix.block, "MAX_PROGRAMS": radix.programs,
                }, radix.warps, ones=("stride",),
            )  # fmt: skip
        yield Compilation(
            f"compact-{pointee}", compact_kernel, scores | search | {"indices_ptr": "i64"},
            {"LARGEST": True, "BLOCK": radix.block}, radix.warps, ones=("stride",),
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
