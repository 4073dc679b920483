"""Per-sample statistics of [N, C] and [N, T, C] logits, each logit read once.

Three shapes of work, one mathematics. A tile holds whole rows in registers: [R, B, W] (or [B, R, W]) is B rows of R
vectors a thread, W neighbouring columns. A stream walks one row a program in blocks with an online maximum. A split
stream shares a row among programs.

The target's column never enters the sums, so with m' = max_{j != y} z_j they are S1 = sum_{j != y} e^(z_j - m') and so on:
the label margin comes for free and a confident row keeps its digits. `finish_row` brings them to m = max(m', z_y).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaselect_kernels.kernels.maths import (
    exponential,
    exponential_precise,
    float64_from_bits,
    float_bits,
    last_to_arrive,
    log1p,
    strided_offset,
)
from adaselect_kernels.kernels.runtime import (
    TRITON_VERSION,
    WARP_SIZE,
    Compilation,
    Launch,
    cached,
    ceil_div,
    counters,
    launch_device,
    next_power_of_2,
    up_to,
)
from adaselect_kernels.options import STATS

_BIT = {name: 1 << code for code, name in enumerate(STATS)}
_SMOOTHING = 1 << len(STATS)
NEEDS_SQUARES = tl.constexpr(_BIT["grad_norm"])
NEEDS_ENTROPY = tl.constexpr(_BIT["entropy"])
NEEDS_SECOND = tl.constexpr(_BIT["top2_margin"])
NEEDS_RANK = tl.constexpr(_BIT["correct"])
NEEDS_NAN = tl.constexpr(_BIT["margin"] | _BIT["top2_margin"] | _BIT["correct"])  # max() skips NaN: look for it
NEEDS_SUM = tl.constexpr(_SMOOTHING)
NO_COLUMN = tl.constexpr(2**31 - 1)
PARTIALS = tl.constexpr(8)
# Triton deals threads to the columns of a tile first, then to its first axis (3.6) or its second (later ones). That one
# must be the rows, so that a row's R vectors stay in the registers of its threads.
ROWS_AXIS = tl.constexpr(0 if TRITON_VERSION < (3, 7) else 1)


@triton.jit
def over_registers(x):
    """[R] as a block that broadcasts along its own axis of a tile."""
    return x[:, None, None] if ROWS_AXIS == 1 else x[None, :, None]


@triton.jit
def over_rows(x):
    """[B] likewise."""
    return x[None, :, None] if ROWS_AXIS == 1 else x[:, None, None]


@triton.jit
def over_columns(x):
    """[W] likewise."""
    return x[None, None, :]


@triton.jit
def beside(x, tile):
    """[B] as a block that broadcasts along the rows of a tile, with registers or [B, W]."""
    if len(tile.shape) == 2:
        return x[:, None]
    else:
        return over_rows(x)


@triton.jit
def tile_sum(x):
    """Sum over the registers, then the columns: [B]; of [B, W] over its columns."""
    if len(x.shape) == 3:
        x = tl.sum(x, axis=1 - ROWS_AXIS)
    return tl.sum(x, axis=1)


@triton.jit
def tile_max(x):
    if len(x.shape) == 3:
        x = tl.max(x, axis=1 - ROWS_AXIS)
    return tl.max(x, axis=1)


@triton.jit
def tile_min(x):
    if len(x.shape) == 3:
        x = tl.min(x, axis=1 - ROWS_AXIS)
    return tl.min(x, axis=1)


@triton.jit
def load_targets(targets_ptr, rows, live, inner, stride_outer, stride_inner, classes, ignore_index):
    """Target, -1 where no logit is to be read; whether the row counts; whether its target is outside [0, C)."""
    y = tl.load(targets_ptr + strided_offset(rows, inner, stride_outer, stride_inner), mask=live, other=0).to(tl.int64)
    kept = live & (y != ignore_index)
    bad = kept & ((y < 0) | (y >= classes))
    return tl.where(kept & (y >= 0) & (y < classes), y, -1).to(tl.int32), kept, bad


@triton.jit
def empty_partials(like):
    """Partial statistics of no column: m', S1, S2, sum e x, second largest, beaten, has NaN, sum (z - z_y)."""
    zero = tl.zeros_like(like)
    lowest = zero - float("inf")
    no = zero.to(tl.int32)
    return lowest, zero, zero, zero, lowest, no, no, zero


@triton.jit
def rescale_to(m, top):
    """log of the factor that brings sums relative to m to sums relative to top; sums of nothing (m = -inf) stay 0."""
    return tl.where(m == float("-inf"), 0.0, m - top)


@triton.jit
def accumulate_sums(m, s1, s2, ex, second, z, cols, WANT: tl.constexpr):
    """Add the block z ([R, B, W] or [B, W]; -inf where no column counts) to the largest, sums and second largest [B]."""
    block_m = tile_max(z)
    top = tl.maximum(m, block_m)
    if NEEDS_SECOND & WANT:
        # second largest, with multiplicity: strike out the first column that reaches the block's maximum
        first = tile_min(tl.where(z == beside(block_m, z), cols, NO_COLUMN))
        rest = tl.where(cols == beside(first, z), float("-inf"), z)
        block_second = tile_max(rest)
        second = tl.maximum(tl.minimum(m, block_m), tl.maximum(second, block_second))

    # e_j = exp(z_j - m'), 0 in a block of only -inf
    x = z - beside(tl.where(top == float("-inf"), 0.0, top), z)
    e = exponential(x)
    delta = rescale_to(m, top)
    scale = exponential(delta)
    if NEEDS_ENTROPY & WANT:
        # sum e x, relative to the new maximum: e (x + delta); 0 * -inf counts 0
        block_ex = tile_sum(tl.where(e == 0.0, 0.0, e * x))
        ex = scale * (ex + s1 * delta) + block_ex
    s1 = s1 * scale + tile_sum(e)
    if NEEDS_SQUARES & WANT:
        s2 = s2 * (scale * scale) + tile_sum(e * e)
    return top, s1, s2, ex, second


@triton.jit
def accumulate(
    m, s1, s2, ex, second, beaten, nan, zsum, z, cols, inside, y, z_y, EXCLUDE: tl.constexpr, WANT: tl.constexpr
):
    """Add the block z [R, B, W] (-inf outside) to partials [B]; y and z_y broadcast to [1, B, 1]."""
    if NEEDS_RANK & WANT:
        # beaten: a larger logit, or an equal one of a lower class
        ahead = (z > z_y) | ((z == z_y) & (cols < y) & inside)
        beaten = tl.maximum(beaten, tile_max(ahead.to(tl.int32)))
    if NEEDS_NAN & WANT:
        nan = tl.maximum(nan, tile_max((z != z).to(tl.int32)))
    if NEEDS_SUM & WANT:
        zsum += tile_sum(tl.where(inside & (cols != y), z - z_y, 0.0))
    if EXCLUDE:
        z = tl.where(cols == y, float("-inf"), z)

    top, s1, s2, ex, second = accumulate_sums(m, s1, s2, ex, second, z, cols, WANT)
    return top, s1, s2, ex, second, beaten, nan, zsum


@triton.jit
def reduce_partials(m, s1, s2, ex, second, beaten, nan, zsum, WANT: tl.constexpr):
    """Partials of L disjoint sets of columns, [L] or [L, B] -> of their union, a scalar or [B] each, in a fixed order."""
    top = tl.max(m, axis=0)
    delta = rescale_to(m, top)
    scale = exponential_precise(delta)
    if NEEDS_SECOND & WANT:
        lane = tl.arange(0, m.shape[0])
        if len(m.shape) == 2:
            lane = lane[:, None]
        winner = tl.min(tl.where(m == top, lane, NO_COLUMN), axis=0)
        second = tl.max(tl.where(lane == winner, second, m), axis=0)
    else:
        second = top
    ex = tl.sum(scale * (ex + s1 * delta), axis=0)
    s1 = tl.sum(s1 * scale, axis=0)
    s2 = tl.sum(s2 * (scale * scale), axis=0)
    return top, s1, s2, ex, second, tl.max(beaten, axis=0), tl.max(nan, axis=0), tl.sum(zsum, axis=0)


@triton.jit
def finish_row(m_others, s1, s2, ex, second, beaten, nan, zsum, z_y, kept, bad, classes, smoothing, WANT: tl.constexpr):
    """The eight statistics, in the order of STATS, from the partials of j != y and z_y; 0 where not kept, NaN where bad."""
    m = tl.maximum(m_others, z_y)
    delta = rescale_to(m_others, m)
    scale = exponential_precise(delta)
    x_y = z_y - m
    e_y = exponential_precise(x_y)
    sum_others = scale * s1
    d = sum_others + e_y
    log_d = tl.where(e_y == 1.0, log1p(sum_others), tl.log(d))
    # loss = log d - (z_y - m)
    nll = log_d - x_y
    loss = nll
    if NEEDS_SUM & WANT:
        # (1 - eps) nll + eps mean_j (lse - z_j) = nll - eps mean_j (z_j - z_y)
        smoothed = nll - smoothing * (zsum / classes)
        loss = tl.where(nll == float("inf"), nll, smoothed)
    lse = m + log_d
    # grad_norm = sqrt(S1^2 + S2) / d; relative to m' the root is at least 1 and cannot underflow
    grad_norm = scale * tl.sqrt(s1 * s1 + s2) / d
    # entropy = log d - sum e_j x_j / d
    entropy = log_d - (scale * (ex + s1 * delta) + tl.where(e_y == 0.0, 0.0, e_y * x_y)) / d
    confidence = e_y / d
    # margin = z_y - max_{j != y} z_j
    has_nan = (nan != 0) | (z_y != z_y)
    margin = tl.where(has_nan, float("nan"), z_y - m_others)
    runner_up = tl.where(z_y >= m_others, m_others, tl.maximum(z_y, second))
    top2_margin = tl.where(has_nan, float("nan"), m - runner_up)
    top2_margin = tl.where(classes == 1, float("inf"), top2_margin)
    correct = tl.where((beaten != 0) | has_nan, 0.0, 1.0).to(m.dtype)
    return (
        _settle(loss, kept, bad),
        _settle(lse, kept, bad),
        _settle(grad_norm, kept, bad),
        _settle(margin, kept, bad),
        _settle(top2_margin, kept, bad),
        _settle(entropy, kept, bad),
        _settle(confidence, kept, bad),
        _settle(correct, kept, bad),
    )


@triton.jit
def _settle(value, kept, bad):
    return tl.where(bad, float("nan"), tl.where(kept, value, 0.0)).to(value.dtype)


@triton.jit
def store_stats(out_ptr, rows, n_rows, live, values, ORDER: tl.constexpr, S: tl.constexpr):
    """out [S, N]: row i is statistic number (ORDER >> 4 i) & 15."""
    for i in tl.static_range(S):
        tl.store(out_ptr + i * n_rows.to(tl.int64) + rows, values[(ORDER >> (4 * i)) & 15], mask=live)


@triton.jit
def tile_rows(
    logits_ptr, targets_ptr, rows, n_rows, inner, classes,
    stride_outer, stride_inner, stride_class, stride_target_outer, stride_target_inner, ignore_index, smoothing,
    VEC: tl.constexpr, R: tl.constexpr, W: tl.constexpr, COMPUTE: tl.constexpr, WANT: tl.constexpr,
):  # fmt: skip
    """Statistics of whole rows [B] held in registers. Row strides count vectors of VEC columns."""
    # 1. targets
    live = rows < n_rows
    y, kept, bad = load_targets(
        targets_ptr, rows, live, inner, stride_target_outer, stride_target_inner, classes, ignore_index
    )

    # 2. logits: thread neighbours read neighbouring vectors; column = VEC * vector + lane
    row_offset = strided_offset(rows, inner, stride_outer, stride_inner) * VEC
    vector = over_registers(tl.arange(0, R)) * (W // VEC) + over_columns(tl.arange(0, W) // VEC)
    cols = over_registers(tl.arange(0, R)) * W + over_columns(tl.arange(0, W))
    inside = (vector < classes // VEC) & over_rows(y >= 0)
    if VEC == 1:
        offsets = over_rows(row_offset) + cols.to(tl.int64) * stride_class
        if W == 1:
            # seen as contiguous, a row's registers would have the threads dealt over them, and sums take shuffles
            offsets = tl.max_contiguous(offsets, [1, 1, 1])
    else:
        offsets = over_rows(row_offset) + cols
    z = tl.load(logits_ptr + offsets, mask=inside, other=float("-inf")).to(COMPUTE)
    z_y = tl.load(logits_ptr + row_offset + y.to(tl.int64) * stride_class, mask=y >= 0, other=0.0).to(COMPUTE)

    # 3. sums over j != y, then the statistics
    m, s1, s2, ex, second, beaten, nan, zsum = empty_partials(z_y)
    m, s1, s2, ex, second, beaten, nan, zsum = accumulate(
        m, s1, s2, ex, second, beaten, nan, zsum, z, cols, inside, over_rows(y), over_rows(z_y), True, WANT
    )
    return finish_row(m, s1, s2, ex, second, beaten, nan, zsum, z_y, kept, bad, classes, smoothing, WANT)


@triton.jit(do_not_specialize=["n_rows", "classes", "ignore_index", "smoothing_bits"])
def tile_kernel(
    logits_ptr, targets_ptr, out_ptr, n_rows, inner, classes,
    stride_outer, stride_inner, stride_class, stride_target_outer, stride_target_inner, ignore_index, smoothing_bits: tl.int64,
    ORDER: tl.constexpr, S: tl.constexpr, WANT: tl.constexpr,
    VEC: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    COMPUTE: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    values = tile_rows(
        logits_ptr, targets_ptr, rows, n_rows, inner, classes,
        stride_outer, stride_inner, stride_class, stride_target_outer, stride_target_inner, ignore_index,
        float64_from_bits(smoothing_bits).to(COMPUTE), VEC, R, W, COMPUTE, WANT,
    )  # fmt: skip
    store_stats(out_ptr, rows, n_rows, rows < n_rows, values, ORDER, S)


@triton.jit(do_not_specialize=["n_rows", "classes", "ignore_index", "smoothing_bits", "splits"])
def stream_kernel(
    logits_ptr, targets_ptr, out_ptr, partials_ptr, arrivals_ptr, n_rows, inner, classes,
    stride_outer, stride_inner, stride_class, stride_target_outer, stride_target_inner, ignore_index, splits,
    smoothing_bits: tl.int64,
    ORDER: tl.constexpr, S: tl.constexpr, WANT: tl.constexpr,
    VEC: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """One row a program, or (MAX_SPLITS > 1) `splits` programs a row: vectors of VEC columns from the first aligned one."""
    COMPUTE: tl.constexpr = out_ptr.dtype.element_ty
    BLOCK: tl.constexpr = R * LANES
    row = tl.program_id(0).to(tl.int64)
    part = 0
    if MAX_SPLITS > 1:
        part = (row % splits).to(tl.int32)
        row = row // splits

    # 1. target
    y, kept, bad = load_targets(
        targets_ptr, row, row < n_rows, inner, stride_target_outer, stride_target_inner, classes, ignore_index
    )
    row_ptr = logits_ptr + strided_offset(row, inner, stride_outer, stride_inner)
    z_y = tl.load(row_ptr + y.to(tl.int64) * stride_class, mask=y >= 0, other=0.0).to(COMPUTE)

    # 2. head: columns before the first 16-byte boundary; body: whole vectors; tail: the rest. Nothing of an ignored row
    columns = tl.where(y >= 0, classes, 0)
    head = 0
    if stride_class == 1:
        ELEMENT_BYTES: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth // 8
        misaligned = (row_ptr.to(tl.int64) // ELEMENT_BYTES) % VEC
        head = tl.minimum((VEC - misaligned) % VEC, columns).to(tl.int32)
    vectors = (columns - head) // VEC
    body_ptr = row_ptr + head * stride_class
    if stride_class == 1:
        body_ptr = tl.multiple_of(body_ptr, 16)
    first, end = 0, vectors
    if MAX_SPLITS > 1:
        share = tl.cdiv(vectors, splits)
        first = part * share
        end = tl.minimum(first + share, vectors)

    # 3. edges, one column a lane, by the first program of the row
    lane = tl.arange(0, LANES)
    m, s1, s2, ex, second, beaten, nan, zsum = empty_partials(tl.zeros([LANES], COMPUTE))
    edge = tl.where(lane < VEC, lane, head + vectors * VEC + lane - VEC)
    in_edge = (lane < 2 * VEC) & (edge < tl.where(lane < VEC, head, columns))
    if MAX_SPLITS > 1:
        in_edge = in_edge & (lane >= part * LANES)
    edge_z = tl.load(row_ptr + edge.to(tl.int64) * stride_class, mask=in_edge, other=float("-inf")).to(COMPUTE)
    m, s1, s2, ex, second, beaten, nan, zsum = accumulate(
        m, s1, s2, ex, second, beaten, nan, zsum,
        over_rows(edge_z), over_rows(edge), over_rows(in_edge), y, z_y, True, WANT,
    )  # fmt: skip

    # 4. body: every block but the target's needs no comparison with y
    blocks = tl.maximum(tl.cdiv(end - first, BLOCK), 1)
    y_vector = (y - head) // VEC
    y_block = tl.where((y >= head) & (y_vector >= first) & (y_vector < end), (y_vector - first) // BLOCK, blocks - 1)
    for i in range(blocks - 1):
        block = i + (i >= y_block).to(tl.int32)
        z, cols, inside = _load_block(body_ptr, first + block * BLOCK, end, head, stride_class, VEC, R, LANES)
        m, s1, s2, ex, second, beaten, nan, zsum = accumulate(
            m, s1, s2, ex, second, beaten, nan, zsum, z.to(COMPUTE), cols, inside, y, z_y, False, WANT
        )
    z, cols, inside = _load_block(body_ptr, first + y_block * BLOCK, end, head, stride_class, VEC, R, LANES)
    m, s1, s2, ex, second, beaten, nan, zsum = accumulate(
        m, s1, s2, ex, second, beaten, nan, zsum, z.to(COMPUTE), cols, inside, y, z_y, True, WANT
    )
    m, s1, s2, ex, second, beaten, nan, zsum = reduce_partials(m, s1, s2, ex, second, beaten, nan, zsum, WANT)

    # 5. the row's statistics, by the program of the row that arrives last
    if MAX_SPLITS > 1:
        at = partials_ptr + (row * splits + part) * PARTIALS
        tl.store(at, m)
        tl.store(at + 1, s1)
        tl.store(at + 2, s2)
        tl.store(at + 3, ex)
        tl.store(at + 4, second)
        tl.store(at + 5, beaten.to(COMPUTE))
        tl.store(at + 6, nan.to(COMPUTE))
        tl.store(at + 7, zsum)
        if last_to_arrive(arrivals_ptr + row, splits):
            parts = tl.arange(0, MAX_SPLITS)
            live = parts < splits
            parts_ptr = partials_ptr + (row * splits + parts) * PARTIALS
            m, s1, s2, ex, second, beaten, nan, zsum = reduce_partials(
                tl.load(parts_ptr, mask=live, other=float("-inf"), cache_modifier=".cg"),
                tl.load(parts_ptr + 1, mask=live, other=0.0, cache_modifier=".cg"),
                tl.load(parts_ptr + 2, mask=live, other=0.0, cache_modifier=".cg"),
                tl.load(parts_ptr + 3, mask=live, other=0.0, cache_modifier=".cg"),
                tl.load(parts_ptr + 4, mask=live, other=float("-inf"), cache_modifier=".cg"),
                tl.load(parts_ptr + 5, mask=live, other=0.0, cache_modifier=".cg").to(tl.int32),
                tl.load(parts_ptr + 6, mask=live, other=0.0, cache_modifier=".cg").to(tl.int32),
                tl.load(parts_ptr + 7, mask=live, other=0.0, cache_modifier=".cg"),
                WANT,
            )
            smoothing = float64_from_bits(smoothing_bits).to(COMPUTE)
            values = finish_row(m, s1, s2, ex, second, beaten, nan, zsum, z_y, kept, bad, classes, smoothing, WANT)
            store_stats(out_ptr, row, n_rows, row < n_rows, values, ORDER, S)
    else:
        smoothing = float64_from_bits(smoothing_bits).to(COMPUTE)
        values = finish_row(m, s1, s2, ex, second, beaten, nan, zsum, z_y, kept, bad, classes, smoothing, WANT)
        store_stats(out_ptr, row, n_rows, row < n_rows, values, ORDER, S)


@triton.jit
def _load_block(body_ptr, first, end, head, stride_class, VEC: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr):
    """Vectors first .. first + R * LANES of the body as [R, LANES, VEC], -inf from `end` on; their columns; which exist."""
    vector = first + over_registers(tl.arange(0, R)) * LANES + over_rows(tl.arange(0, LANES))
    local = vector * VEC + over_columns(tl.arange(0, VEC))
    inside = tl.broadcast_to(vector < end, local.shape)
    if stride_class == 1:
        pointers = body_ptr + local
    else:
        pointers = body_ptr + local.to(tl.int64) * stride_class
    return tl.load(pointers, mask=inside, other=float("-inf")), head + local, inside


@triton.jit(do_not_specialize=["n_samples", "positions", "ignore_index"])
def mean_kernel(
    stats_ptr, targets_ptr, out_ptr, valid_ptr, n_samples, positions, stride_target_outer, stride_target_inner,
    ignore_index,
    ORDER: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One statistic of one sample: the mean over its positions that are not ignored; grad_norm: sqrt(sum g^2) / count."""
    GRAD_NORM_CODE: tl.constexpr = 2
    sample = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1)
    squares = ((ORDER >> (4 * index)) & 15) == GRAD_NORM_CODE
    at = stats_ptr + (index.to(tl.int64) * n_samples + sample) * positions
    total = tl.zeros([BLOCK_T], out_ptr.dtype.element_ty)
    count = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, positions, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        live = t < positions
        y = tl.load(
            targets_ptr + sample * stride_target_outer + t.to(tl.int64) * stride_target_inner, mask=live, other=0
        )
        value = tl.load(at + t, mask=live, other=0.0)
        total += tl.where(squares, value * value, value)
        count += (live & (y != ignore_index)).to(tl.int32)
    kept = tl.sum(count, axis=0)
    sums = tl.sum(total, axis=0)
    mean = tl.where(squares, tl.sqrt(sums), sums) / tl.maximum(kept, 1).to(sums.dtype)
    tl.store(out_ptr + index.to(tl.int64) * n_samples + sample, tl.where(kept > 0, mean, 0.0))
    if HAS_VALID:
        tl.store(valid_ptr + sample, (kept > 0).to(tl.uint8), mask=index == 0)


class TileConfig(NamedTuple):
    """Whole rows in registers: each row on W / VEC threads with R vectors of VEC columns each."""

    VEC: int
    R: int
    BLOCK_N: int
    W: int


class StreamConfig(NamedTuple):
    VEC: int
    R: int
    LANES: int


class TileTuning(NamedTuple):
    threads: int  # a row; more where a load would not fill a 32-byte sector
    warps: int  # a program


# By the power of two that holds C. Few threads a row keep the arithmetic after the sums (done by each of them) small;
# enough of them keep a row in at most 32 registers a thread. Four warps a program: small programs even out the end.
TILES = {
    16: TileTuning(threads=1, warps=4),  # one thread, one row: neighbouring rows share cache lines, nothing is shuffled
    32: TileTuning(threads=2, warps=4),
    64: TileTuning(threads=4, warps=4),
    128: TileTuning(threads=4, warps=4),
    256: TileTuning(threads=8, warps=4),
    512: TileTuning(threads=16, warps=4),
    1024: TileTuning(threads=32, warps=4),  # one warp, one row
    2048: TileTuning(threads=32, warps=4),  # 64 registers: four warps a scheduler, no reduction across warps
}
TILE_MAX_CLASSES = 2048  # beyond, a row would need reductions across warps: the stream does one, at its end
UNALIGNED_TILE_MAX_CLASSES = 256  # rows without a vector width: beyond, the stream's aligned body reads wider


class StreamTuning(NamedTuple):
    vectors: int  # of 16 bytes that a thread has in flight: four cover the latency of memory
    warps: int  # a program, which has one row or a part of it


# By the largest C.
STREAMS = {
    2048: StreamTuning(vectors=4, warps=1),  # unaligned rows of 257 to 2048 classes: a warp a row
    16384: StreamTuning(vectors=4, warps=4),  # 8 to 64 KB a row: several rows a multiprocessor
    2**31: StreamTuning(vectors=4, warps=8),
}


class SplitTuning(NamedTuple):
    programs: int  # wanted of a launch
    least_columns: int  # of a program
    most: int  # programs a row: a power of two, which the last of them combines at once


# By the largest C. Four programs on each of about 128 multiprocessors, a fixed number, so that sums do not depend on the
# machine; fewer rows than half of them are split, into parts that are worth a launch's last-arrival pass.
SPLITS = {
    16383: SplitTuning(programs=512, least_columns=4096, most=1),  # a part would have less than a few blocks
    2**31: SplitTuning(programs=512, least_columns=4096, most=64),
}

MEAN_BLOCK, MEAN_WARPS = 256, 4  # T is mostly 64 to 8192: a few rounds of coalesced loads


@cached
def tile_config(classes: int, vec: int, element_bytes: int, num_warps: int) -> TileConfig:
    block_c = max(16, next_power_of_2(classes))
    threads = TILES[block_c].threads
    if block_c > 16:
        threads = max(threads, 32 // (vec * element_bytes))  # each load of a row fills a 32-byte sector
    threads = min(threads, block_c // vec, WARP_SIZE)
    width = threads * vec
    return TileConfig(vec, max(1, block_c // width), num_warps * WARP_SIZE // threads, width)


def tile_warps(classes: int) -> int:
    return TILES[max(16, next_power_of_2(classes))].warps


@cached
def stream_config(classes: int, element_bytes: int) -> tuple[StreamConfig, int]:
    """The configuration and its warps."""
    tuning = up_to(STREAMS, classes)
    return StreamConfig(16 // element_bytes, tuning.vectors, tuning.warps * WARP_SIZE), tuning.warps


def split_count(n_rows: int, classes: int) -> int:
    """Programs a row."""
    tuning = up_to(SPLITS, classes)
    if n_rows * 2 > tuning.programs:
        return 1
    return max(1, min(tuning.most, tuning.programs // n_rows, classes // tuning.least_columns))


class Layout(NamedTuple):
    """Where rows are. A matrix has inner = 1; `strides` are (outer, inner, class), `target_strides` (outer, inner)."""

    classes: int
    n_rows: int
    inner: int
    strides: tuple[int, int, int]
    target_strides: tuple[int, int]
    element_bytes: int
    vec: (
        int  # columns one load may take in every row: a power of two of at most 16 bytes that divides C and row strides
    )

    @property
    def uses_tile(self) -> bool:
        wide = self.vec * self.element_bytes >= 8
        return self.classes <= (TILE_MAX_CLASSES if wide else UNALIGNED_TILE_MAX_CLASSES)

    def tile_integers(self) -> tuple[int, ...]:
        """What the tile takes of it; row strides in vectors."""
        outer, inner, column = self.strides
        return self.inner, self.classes, outer // self.vec, inner // self.vec, column, *self.target_strides

    def stream_integers(self) -> tuple[int, ...]:
        return self.inner, self.classes, *self.strides, *self.target_strides


def make_layout(
    shape: Sequence[int], strides: tuple[int, ...], target_strides: tuple[int, ...], dtype: torch.dtype, aligned: bool
) -> Layout:
    """`aligned`: the first logit is at a multiple of 16 bytes."""
    if len(shape) == 2:
        inner, strides, target_strides = 1, (strides[0], 0, strides[1]), (target_strides[0], 0)
    else:
        inner = shape[1]
    n_rows = math.prod(shape[:-1])
    if n_rows >= 2**31:
        raise ValueError(f"at most 2^31 - 1 rows, got {n_rows}")
    vec = 16 // dtype.itemsize if aligned and strides[2] == 1 else 1
    while shape[-1] % vec or strides[0] % vec or strides[1] % vec:
        vec //= 2
    return Layout(shape[-1], n_rows, inner, strides, target_strides, dtype.itemsize, vec)


def stats_code(stats: Sequence[int], label_smoothing: float) -> tuple[int, int]:
    """ORDER, the statistics as hexadecimal digits, and WANT, the same as a set of bits, with the smoothing's."""
    order, want = 0, _SMOOTHING if label_smoothing > 0 else 0
    for i, stat in enumerate(stats):
        order |= stat << (4 * i)
        want |= 1 << stat
    return order, want


class RowPlan(NamedTuple):
    launch: Launch
    n_rows: int
    splits: int  # programs a row


@cached
def _row_plan(
    shape: Sequence[int], strides: tuple[int, ...], target_strides: tuple[int, ...], dtype: torch.dtype, aligned: bool,
    stats: tuple[int, ...], ignore_index: int, label_smoothing: float,
) -> RowPlan:  # fmt: skip
    layout = make_layout(shape, strides, target_strides, dtype, aligned)
    order, want = stats_code(stats, label_smoothing)
    codes = {"ORDER": order, "S": len(stats), "WANT": want}
    n_rows, classes = layout.n_rows, layout.classes
    if layout.uses_tile:
        num_warps = tile_warps(classes)
        config = tile_config(classes, layout.vec, dtype.itemsize, num_warps)
        integers = (n_rows, *layout.tile_integers(), ignore_index)
        grid = (ceil_div(n_rows, config.BLOCK_N),)
        return RowPlan(Launch(tile_kernel, grid, integers, codes | config._asdict(), num_warps), n_rows, 1)
    config, num_warps = stream_config(classes, dtype.itemsize)
    splits = split_count(n_rows, classes)
    integers = (n_rows, *layout.stream_integers(), ignore_index, splits)
    constants = codes | config._asdict() | {"MAX_SPLITS": up_to(SPLITS, classes).most if splits > 1 else 1}
    return RowPlan(Launch(stream_kernel, (n_rows * splits,), integers, constants, num_warps), n_rows, splits)


def row_stats(
    logits: Tensor, targets: Tensor, stats: Sequence[int], ignore_index: int, label_smoothing: float
) -> Tensor:
    """[S, rows] of every position of [N, C] or [N, T, C] logits."""
    device = logits.device
    plan = _row_plan(
        logits.shape, logits.stride(), targets.stride(), logits.dtype, logits.data_ptr() % 16 == 0,
        tuple(stats), ignore_index, label_smoothing,
    )  # fmt: skip
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    out = torch.empty((len(stats), plan.n_rows), dtype=compute, device=device)
    with launch_device(logits):
        scratch = ()
        if plan.launch.kernel is stream_kernel:
            scratch = (out, out)
            if plan.splits > 1:
                partials = torch.empty(plan.n_rows * plan.splits * PARTIALS.value, dtype=compute, device=device)
                scratch = (partials, counters(device, plan.n_rows))
        plan.launch(logits, targets, out, *scratch, options=(float_bits(label_smoothing),))
    return out


def per_sample_stats(
    logits: Tensor, targets: Tensor, stats: Sequence[int], unit: str, ignore_index: int, label_smoothing: float
) -> Tensor:
    per_position = row_stats(logits, targets, stats, ignore_index, label_smoothing)
    return of_unit(per_position, targets, stats, unit, ignore_index)


def of_unit(per_position: Tensor, targets: Tensor, stats: Sequence[int], unit: str, ignore_index: int) -> Tensor:
    """What a unit's samples get from the statistics of every position: themselves, or means."""
    if targets.dim() == 1 or unit == "token":
        return per_position
    return mean_over_positions(per_position, targets, stats, ignore_index, None)


def mean_over_positions(
    per_position: Tensor, targets: Tensor, stats: Sequence[int], ignore_index: int, valid: Tensor | None
) -> Tensor:
    """[S, N] from [S, N * T]; `valid` [N] uint8 receives whether a sample has a position that is not ignored."""
    n, positions = targets.shape
    out = torch.empty((len(stats), n), dtype=per_position.dtype, device=targets.device)
    launch = _mean_launch(n, positions, targets.stride(), ignore_index, tuple(stats), valid is not None)
    with launch_device(targets):
        launch(per_position, targets, out, out if valid is None else valid)
    return out


@cached
def _mean_launch(n, positions, target_strides, ignore_index, stats, has_valid) -> Launch:
    constants = {"ORDER": stats_code(stats, 0.0)[0], "HAS_VALID": has_valid, "BLOCK_T": MEAN_BLOCK}
    return Launch(mean_kernel, (n, len(stats)), (n, positions, *target_strides, ignore_index), constants, MEAN_WARPS)


_POINTEE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_ALL = tuple(range(len(STATS)))
_LOSS_AND_NORM = (0, 2)


def shipped() -> Iterator[Compilation]:
    """Every tile and stream configuration for float32 and bfloat16, with the statistics of a selection and with all of
    them; float16 has bfloat16's, float64's are few: of both the middle ones."""
    for dtype, pointee in _POINTEE.items():
        compute = "fp64" if dtype == torch.float64 else "fp32"
        pointers = {"logits_ptr": pointee, "targets_ptr": "i64", "out_ptr": compute}
        full = 16 // dtype.itemsize
        for stats in (_LOSS_AND_NORM, _ALL):
            order, want = stats_code(stats, 0.1 if stats is _ALL else 0.0)
            codes = {"ORDER": order, "S": len(stats), "WANT": want}
            label = f"{pointee}-{'all' if stats is _ALL else 'loss+norm'}"
            fully = dtype in (torch.float32, torch.bfloat16)
            for classes in TILES if fully else (16, 128, 1024):
                for vec in {full, 1} if classes <= UNALIGNED_TILE_MAX_CLASSES else {full}:
                    num_warps = tile_warps(classes)
                    config = tile_config(classes, vec, dtype.itemsize, num_warps)
                    yield Compilation(
                        f"tile-{label}-C{classes}-vec{vec}", tile_kernel, pointers, codes | config._asdict(), num_warps,
                        ones=("inner", "stride_class", "stride_target_outer"),
                        load_bits=8 * vec * dtype.itemsize,
                    )  # fmt: skip
            streams = ((2048, 1), (16384, 1), (131072, 1), (131072, up_to(SPLITS, 131072).most))
            for classes, splits in streams if fully else streams[1:2]:
                config, num_warps = stream_config(classes, dtype.itemsize)
                yield Compilation(
                    f"stream-{label}-C{classes}-split{splits}", stream_kernel,
                    pointers | {"partials_ptr": compute, "arrivals_ptr": "i32"},
                    codes | config._asdict() | {"MAX_SPLITS": splits}, num_warps,
                    ones=("inner", "stride_class", "stride_target_outer"), load_bits=128,
                )  # fmt: skip
        yield Compilation(
            f"mean-{pointee}", mean_kernel,
            {"stats_ptr": compute, "targets_ptr": "i64", "out_ptr": compute, "valid_ptr": "u8"},
            {"ORDER": stats_code(_LOSS_AND_NORM, 0.0)[0], "HAS_VALID": True, "BLOCK_T": MEAN_BLOCK},
            MEAN_WARPS, ones=("stride_target_inner",),
        )  # fmt: skip
