"""Per-sample statistics of [N, C] and [N, T, C] logits, each logit read once.

Three shapes of work, one mathematics. A tile holds whole rows in registers: [R, B, W] (or [B, R, W]) is B rows of R
vectors a thread, W neighbouring columns. A stream walks one row a program in blocks with an online maximum. A split
stream shares a row among programs.

The target's column never enters the sums, so with m' = max_{j != y} z_j they are S1 = sum_{j != y} e^(z_j - m') and so on:
the label margin comes for free and a confident row keeps its digits. `finish_row` brings them to m = max(m', z_y).
"""

import triton
import triton.language as tl

from adaselect_kernels.kernels.maths import (
    exponential,
    exponential_precise,
    float64_from_bits,
    last_to_arrive,
    strided_offset,
)
from adaselect_kernels.kernels.runtime import TRITON_VERSION
from adaselect_kernels.options import STATS

_BIT = {name: 1 << code for code, name in enumerate(STATS)}
SMOOTHING_BIT = 1 << len(STATS)
NEEDS_SQUARES = tl.constexpr(_BIT["grad_norm"])
NEEDS_ENTROPY = tl.constexpr(_BIT["entropy"])
NEEDS_SECOND = tl.constexpr(_BIT["top2_margin"])
NEEDS_RANK = tl.constexpr(_BIT["correct"])
NEEDS_NAN = tl.constexpr(_BIT["margin"] | _BIT["top2_margin"] | _BIT["correct"])  # max() skips NaN: look for it
NEEDS_SUM = tl.constexpr(SMOOTHING_BIT)
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
    in_range = y.to(tl.uint64, bitcast=True) < classes.to(tl.uint64)  # a negative one is among the largest
    return tl.where(kept & in_range, y, -1).to(tl.int32), kept, kept & ~in_range


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
    """Add the block z [R, B, W] (-inf outside) to partials [B]; y and z_y broadcast to [1, B, 1].

    cols and y may both be less by the same, unless the second largest is wanted.
    """
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
    x_y = z_y - m
    # of e^(m' - m) and e^(z_y - m) one is 1 (NaN for +inf, as x_y is)
    smaller = exponential_precise(-tl.abs(z_y - m_others))
    scale = tl.where(m_others > z_y, 1.0, smaller)
    e_y = tl.where(z_y > m_others, 1.0 + x_y, smaller)
    sum_others = scale * s1
    d = sum_others + e_y
    inverse = 1.0 / d
    # the smaller one less what it added to the larger is what rounding lost of d: a confident row's loss lies there
    lost = tl.minimum(sum_others, e_y) - (d - tl.maximum(sum_others, e_y))
    log_d = tl.log(d) + lost * inverse
    # loss = log d - (z_y - m)
    nll = log_d - x_y
    loss = nll
    if NEEDS_SUM & WANT:
        # (1 - eps) nll + eps mean_j (lse - z_j) = nll - eps mean_j (z_j - z_y)
        smoothed = nll - smoothing * (zsum / classes)
        loss = tl.where(nll == float("inf"), nll, smoothed)
    lse = m + log_d
    # grad_norm = sqrt(S1^2 + S2) / d; relative to m' the root is at least 1 and cannot underflow
    grad_norm = scale * tl.sqrt(s1 * s1 + s2) * inverse
    # entropy = log d - sum e_j x_j / d
    entropy = log_d - (scale * (ex + s1 * delta) + tl.where(e_y == 0.0, 0.0, e_y * x_y)) * inverse
    confidence = e_y * inverse
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
    target = over_rows(y)
    if not NEEDS_SECOND & WANT:  # counted from a thread's first column on, columns are constants of its registers
        cols = over_registers(tl.arange(0, R)) * W
        target -= over_columns(tl.arange(0, W))
    m, s1, s2, ex, second, beaten, nan, zsum = empty_partials(z_y)
    m, s1, s2, ex, second, beaten, nan, zsum = accumulate(
        m, s1, s2, ex, second, beaten, nan, zsum, z, cols, inside, target, over_rows(z_y), True, WANT
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
    SCALE: tl.constexpr = 2.0**50  # of norms before they are squared: the squares of small ones keep their digits
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
        scaled = value * SCALE
        total += tl.where(squares, scaled * scaled, value)
        count += (live & (y != ignore_index)).to(tl.int32)
    kept = tl.sum(count, axis=0)
    sums = tl.sum(total, axis=0)
    mean = tl.where(squares, tl.sqrt(sums) / SCALE, sums) / tl.maximum(kept, 1).to(sums.dtype)
    tl.store(out_ptr + index.to(tl.int64) * n_samples + sample, tl.where(kept > 0, mean, 0.0))
    if HAS_VALID:
        tl.store(valid_ptr + sample, (kept > 0).to(tl.uint8), mask=index == 0)
