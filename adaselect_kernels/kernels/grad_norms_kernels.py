"""Squared norms of per-sample gradients of a layer, from its input A_i [T, d] and the gradient at its output G_i [T, p].

Four ways to the same number, chosen by arithmetic (`cheaper_form`, `fused_pays`):
outer    T = 1: |g|^2 |a|^2, one read.
direct   tiles of G_i^T A_i in registers, squared and summed: 2 T d p operations.
fused    direct, and each tile added to the batch's: weight gradient and norms from the operations of the first alone.
Gram     sum_{t,s} (A A^T + 1)(G G^T), tiles of the upper triangle, T x T never stored: T (T + block) (d + p) operations.

A convolution is a linear layer on patches: one tile code, whose loads of A compute where a patch lies (DIMS spatial
dimensions; 0 is a linear layer). Partial sums of a sample lie in a row and are added in a fixed order by `combine_kernel`,
so results are the same bits in every run. float32 products are full-precision ("ieee") unless the user has set
torch.backends.cuda.matmul to "tf32", which then governs convolutions too.
"""

import triton
import triton.language as tl

# NumPy has no bfloat16: interpreted products are taken in float32, in which those of 16-bit numbers are exact.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
GROUP = tl.constexpr(8)  # rows of tiles that run together, so that neighbours share what they load in the L2 cache


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y in the dtype of acc."""
    if INTERPRETED:
        x, y = x.to(acc.dtype), y.to(acc.dtype)
    return tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def load_block(ptr, t, c, positions, columns, stride_t, stride_c, T_LAST: tl.constexpr):
    """[t, c] of a matrix, 0 outside. T_LAST: threads run along t, which is contiguous in memory."""
    t_offset, c_offset = t.to(tl.int64) * stride_t, c.to(tl.int64) * stride_c
    t_inside, c_inside = t < positions, c < columns
    if T_LAST:
        x = tl.load(ptr + c_offset[:, None] + t_offset[None, :], mask=c_inside[:, None] & t_inside[None, :], other=0.0)
        return tl.trans(x)
    else:
        return tl.load(
            ptr + t_offset[:, None] + c_offset[None, :], mask=t_inside[:, None] & c_inside[None, :], other=0.0
        )


@triton.jit
def load_patches(ptr, t, c, positions, columns, view, DIMS: tl.constexpr, WIDE: tl.constexpr, T_LAST: tl.constexpr):
    """Element c of the patch under output position t, 0 in the padding; c = kernel offset * channels + channel.

    WIDE: offsets in 64 bits. An element has an offset of its own, and most samples span less than 2^31.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    _, stride_channel, channels, strides, sizes, outputs, kernel, step, padding, dilation = view
    t_inside, c_inside = t < positions, c < columns
    offset = c // channels
    t_offset = tl.zeros_like(t).to(OFFSET)
    c_offset = (c % channels).to(OFFSET) * stride_channel
    if T_LAST:
        inside = c_inside[:, None] & t_inside[None, :]
    else:
        inside = t_inside[:, None] & c_inside[None, :]
    for dim in tl.static_range(2, 2 - DIMS, -1):  # the innermost dimension first
        # where the patch begins and which of its elements this is, along this dimension
        begin = (t % outputs[dim]) * step[dim] - padding[dim]
        shift = (offset % kernel[dim]) * dilation[dim]
        t, offset = t // outputs[dim], offset // kernel[dim]
        t_offset += begin.to(OFFSET) * strides[dim]
        c_offset += shift.to(OFFSET) * strides[dim]
        if T_LAST:
            at = shift[:, None] + begin[None, :]
        else:
            at = begin[:, None] + shift[None, :]
        inside = inside & (at >= 0) & (at < sizes[dim])
    if T_LAST:
        return tl.trans(tl.load(ptr + c_offset[:, None] + t_offset[None, :], mask=inside, other=0.0))
    else:
        return tl.load(ptr + t_offset[:, None] + c_offset[None, :], mask=inside, other=0.0)


@triton.jit
def load_activations(ptr, t, c, positions, columns, view, DIMS: tl.constexpr, WIDE: tl.constexpr, T_LAST: tl.constexpr):
    if DIMS == 0:
        return load_block(ptr, t, c, positions, columns, view[0], view[1], T_LAST)
    else:
        return load_patches(ptr, t, c, positions, columns, view, DIMS, WIDE, T_LAST)


# --- direct and fused -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["samples", "share", "tiles", "stride_partials"])
def direct_kernel(
    a_ptr, g_ptr, partials_ptr, weight_ptr, samples, share, tiles, stride_partials,
    positions, p, d, stride_an, stride_gn, stride_gt, stride_gp, stride_at, stride_ad, channels,
    stride_0, stride_1, stride_2, size_0, size_1, size_2, output_0, output_1, output_2, kernel_0, kernel_1, kernel_2,
    step_0, step_1, step_2, padding_0, padding_1, padding_2, dilation_0, dilation_1, dilation_2,
    DIMS: tl.constexpr, WIDE: tl.constexpr, A_T_LAST: tl.constexpr, G_T_LAST: tl.constexpr,
    WRITE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """One tile of G_i^T A_i of one group, for `share` samples: partials [N, groups * tiles] is its part of the norm.

    WRITE: weight [splits, p, d], the sum over those samples. p, d and channels are those of a group.
    """
    COMPUTE: tl.constexpr = partials_ptr.dtype.element_ty
    # 1. which tile: GROUP rows of tiles, then the next column of tiles
    tile, split, group = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1).to(tl.int64)
    rows_of_tiles, columns_of_tiles = tl.cdiv(p, BLOCK_P), tl.cdiv(d, BLOCK_D)
    band = tile // (GROUP * columns_of_tiles)
    rows_in_band = tl.minimum(rows_of_tiles - band * GROUP, GROUP)
    within = tile % (GROUP * columns_of_tiles)
    row = (band * GROUP + within % rows_in_band) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = (within // rows_in_band) * BLOCK_D + tl.arange(0, BLOCK_D)

    # 2. a sample at a time; FLATTEN makes one pipelined loop of both, which keeps loading across samples
    view = (
        stride_at, stride_ad, channels, (stride_0, stride_1, stride_2), (size_0, size_1, size_2),
        (output_0, output_1, output_2), (kernel_0, kernel_1, kernel_2), (step_0, step_1, step_2),
        (padding_0, padding_1, padding_2), (dilation_0, dilation_1, dilation_2),
    )  # fmt: skip
    if DIMS > 0:  # a linear layer has one group, and so the alignment of its first element
        a_ptr += group * channels * stride_ad
        g_ptr += group * p * stride_gp
    partials_ptr += group * tiles + tile
    first = (split * share).to(tl.int64)
    total = tl.zeros([BLOCK_P, BLOCK_D], COMPUTE)
    for sample in tl.range(first, tl.minimum(first + share, samples), flatten=FLATTEN):
        product = tl.zeros([BLOCK_P, BLOCK_D], COMPUTE)
        for start in tl.range(0, positions, BLOCK_T, num_stages=STAGES):
            t = start + tl.arange(0, BLOCK_T)
            g_sample = g_ptr + sample * stride_gn
            a_sample = a_ptr + sample * stride_an
            g = load_block(g_sample, t, row, positions, p, stride_gt, stride_gp, G_T_LAST)
            a = load_activations(a_sample, t, column, positions, d, view, DIMS, WIDE, A_T_LAST)
            product = dot(tl.trans(g), a, product, PRECISION)
        tl.store(partials_ptr + sample * stride_partials, tl.sum(product * product))
        if WRITE:
            total += product

    # 3. the batch's gradient, once
    if WRITE:
        at = weight_ptr + (split.to(tl.int64) * p + row)[:, None] * d + column[None, :]
        tl.store(at, total.to(weight_ptr.dtype.element_ty), mask=(row < p)[:, None] & (column < d)[None, :])


# --- Gram -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pairs", "stride_partials"])
def gram_kernel(
    a_ptr, g_ptr, partials_ptr, pairs, stride_partials,
    positions, p, d, stride_an, stride_gn, stride_gt, stride_gp, stride_at, stride_ad, channels,
    stride_0, stride_1, stride_2, size_0, size_1, size_2, output_0, output_1, output_2, kernel_0, kernel_1, kernel_2,
    step_0, step_1, step_2, padding_0, padding_1, padding_2, dilation_0, dilation_1, dilation_2,
    DIMS: tl.constexpr, WIDE: tl.constexpr, A_T_LAST: tl.constexpr, G_T_LAST: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A pair of blocks' part of sum_{t,s} (A A^T + BIAS)(G G^T) of one sample and group: partials [N, groups * pairs]."""
    COMPUTE: tl.constexpr = partials_ptr.dtype.element_ty
    # 1. which blocks of positions, s <= t: pair = t (t + 1) / 2 + s; the root may be off by one
    pair, group = tl.program_id(0) % pairs, tl.program_id(1).to(tl.int64)
    sample = (tl.program_id(0) // pairs).to(tl.int64)
    row = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > pair, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= pair, row + 1, row)
    column = pair - row * (row + 1) // 2
    t, s = row * BLOCK_T + tl.arange(0, BLOCK_T), column * BLOCK_T + tl.arange(0, BLOCK_T)

    # 2. A A^T, then G G^T
    view = (
        stride_at, stride_ad, channels, (stride_0, stride_1, stride_2), (size_0, size_1, size_2),
        (output_0, output_1, output_2), (kernel_0, kernel_1, kernel_2), (step_0, step_1, step_2),
        (padding_0, padding_1, padding_2), (dilation_0, dilation_1, dilation_2),
    )  # fmt: skip
    a_ptr += sample * stride_an
    g_ptr += sample * stride_gn
    if DIMS > 0:  # a linear layer has one group, and so the alignment of its first element
        a_ptr += group * channels * stride_ad
        g_ptr += group * p * stride_gp
    of_activations = tl.zeros([BLOCK_T, BLOCK_T], COMPUTE)
    for start in tl.range(0, d, BLOCK_C, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK_C)
        x = load_activations(a_ptr, t, c, positions, d, view, DIMS, WIDE, A_T_LAST)
        y = load_activations(a_ptr, s, c, positions, d, view, DIMS, WIDE, A_T_LAST)
        of_activations = dot(x, tl.trans(y), of_activations, PRECISION)
    of_grads = tl.zeros([BLOCK_T, BLOCK_T], COMPUTE)
    for start in tl.range(0, p, BLOCK_C, num_stages=STAGES):
        c = start + tl.arange(0, BLOCK_C)
        x = load_block(g_ptr, t, c, positions, p, stride_gt, stride_gp, G_T_LAST)
        y = load_block(g_ptr, s, c, positions, p, stride_gt, stride_gp, G_T_LAST)
        of_grads = dot(x, tl.trans(y), of_grads, PRECISION)

    # 3. their product, twice off the diagonal
    if BIAS:
        of_activations += 1.0
    total = tl.sum(of_activations * of_grads)
    total = tl.where(row == column, total, 2.0 * total).to(COMPUTE)
    tl.store(partials_ptr + sample * stride_partials + group * pairs + pair, total)


# --- small and elementwise layers -------------------------------------------------------------------------------------


@triton.jit
def sum_of_squares(ptr, count, stride, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(ptr + i.to(tl.int64) * stride, mask=i < count, other=0.0).to(COMPUTE)
        total += x * x
    return tl.sum(total)


@triton.jit
def outer_kernel(
    a_ptr, g_ptr, out_ptr, p, d, stride_an, stride_ad, stride_gn, stride_gp,
    BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """T = 1: out = |g|^2 (|a|^2 + BIAS), a program a sample."""
    COMPUTE: tl.constexpr = out_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    of_activations = sum_of_squares(a_ptr + sample * stride_an, d, stride_ad, COMPUTE, BLOCK)
    of_grads = sum_of_squares(g_ptr + sample * stride_gn, p, stride_gp, COMPUTE, BLOCK)
    if BIAS:
        of_activations += 1.0
    tl.store(out_ptr + sample, of_grads * of_activations)


@triton.jit(do_not_specialize=["blocks", "slot", "stride_partials"])
def affine_kernel(
    values_ptr, grads_ptr, mean_ptr, rstd_ptr, partials_ptr, sums_ptr, blocks, slot, stride_partials, positions, channels,
    stride_vn, stride_vt, stride_vc, stride_gn, stride_gt, stride_gc, stride_mn, stride_mt, stride_mc,
    stride_rn, stride_rt, stride_rc,
    HAS_MEAN: tl.constexpr, HAS_RSTD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SUMS: tl.constexpr,
    T_LAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of channels of one sample: |sum_t g xhat|^2 + |sum_t g|^2 into partials [N, slot + block].

    SUMS: sum_t g itself too, into sums [N, C].
    """
    COMPUTE: tl.constexpr = partials_ptr.dtype.element_ty
    block, sample = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    values_ptr += sample * stride_vn
    grads_ptr += sample * stride_gn
    # threads keep sums of their own over t; they meet once, at the end
    of_weight, of_bias = tl.zeros([BLOCK_T, BLOCK_C], COMPUTE), tl.zeros([BLOCK_T, BLOCK_C], COMPUTE)
    for start in range(0, positions, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        g = load_block(grads_ptr, t, c, positions, channels, stride_gt, stride_gc, T_LAST).to(COMPUTE)
        if WEIGHT:
            x = load_block(values_ptr, t, c, positions, channels, stride_vt, stride_vc, T_LAST).to(COMPUTE)
            if HAS_MEAN:
                x -= load_block(mean_ptr + sample * stride_mn, t, c, positions, channels, stride_mt, stride_mc, T_LAST)
            if HAS_RSTD:
                x *= load_block(rstd_ptr + sample * stride_rn, t, c, positions, channels, stride_rt, stride_rc, T_LAST)
            of_weight += g * x
        if BIAS:
            of_bias += g
    total = tl.zeros([BLOCK_C], COMPUTE)
    if WEIGHT:
        sums = tl.sum(of_weight, axis=0)
        total += sums * sums
    if BIAS:
        sums = tl.sum(of_bias, axis=0)
        total += sums * sums
        if SUMS:
            tl.store(sums_ptr + sample * channels + c, sums, mask=c < channels)
    tl.store(partials_ptr + sample * stride_partials + slot + block, tl.sum(total))


@triton.jit(do_not_specialize=["blocks", "stride_partials"])
def depthwise_kernel(
    a_ptr, g_ptr, partials_ptr, blocks, stride_partials,
    positions, p, d, stride_an, stride_gn, stride_gt, stride_gp, stride_at, stride_ad, channels,
    stride_0, stride_1, stride_2, size_0, size_1, size_2, output_0, output_1, output_2, kernel_0, kernel_1, kernel_2,
    step_0, step_1, step_2, padding_0, padding_1, padding_2, dilation_0, dilation_1, dilation_2,
    DIMS: tl.constexpr, WIDE: tl.constexpr, T_LAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One output channel a group: a block of them, an element of their kernels at a time; partials [N, blocks]."""
    COMPUTE: tl.constexpr = partials_ptr.dtype.element_ty
    block, sample = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    groups = channels // (d // (kernel_0 * kernel_1 * kernel_2))
    view = (
        stride_at, stride_ad, channels, (stride_0, stride_1, stride_2), (size_0, size_1, size_2),
        (output_0, output_1, output_2), (kernel_0, kernel_1, kernel_2), (step_0, step_1, step_2),
        (padding_0, padding_1, padding_2), (dilation_0, dilation_1, dilation_2),
    )  # fmt: skip
    a_ptr += sample * stride_an
    g_ptr += sample * stride_gn
    o = block * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = (
        channels * kernel_0 * kernel_1 * kernel_2
    )  # of patches of all channels: here `channels` counts all of them
    total = tl.zeros([BLOCK_C], COMPUTE)
    for i in range(0, d):
        in_group = channels // groups
        column = tl.where(o < groups, i // in_group * channels + o * in_group + i % in_group, columns)
        product = tl.zeros([BLOCK_T, BLOCK_C], COMPUTE)
        for start in range(0, positions, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            g = load_block(g_ptr, t, o, positions, groups, stride_gt, stride_gp, T_LAST).to(COMPUTE)
            product += g * load_patches(a_ptr, t, column, positions, columns, view, DIMS, WIDE, T_LAST).to(COMPUTE)
        sums = tl.sum(product, axis=0)
        total += sums * sums
    tl.store(partials_ptr + sample * stride_partials + block, tl.sum(total))


@triton.jit
def segment_start(ids_ptr, start, positions, BLOCK: tl.constexpr):
    """The first position from `start` on where another id begins in sorted ids, or `positions`."""
    found = tl.where(start == 0, 0, positions)
    at = tl.where(start == 0, positions, start)
    while at < positions:
        t = at + tl.arange(0, BLOCK)
        inside = t < positions
        here, before = tl.load(ids_ptr + t, mask=inside, other=0), tl.load(ids_ptr + t - 1, mask=inside, other=0)
        found = tl.min(tl.where(inside & (here != before), t, positions), axis=0)
        at = tl.where(found < positions, positions, at + BLOCK)
    return found


@triton.jit(do_not_specialize=["blocks", "chunks", "padding_idx"])
def embedding_kernel(
    ids_ptr, order_ptr, grads_ptr, partials_ptr, blocks, chunks, positions, d,
    stride_gn, stride_gt, stride_gd, padding_idx,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """sum_v |sum of g over the segment of id v|^2 of the segments that begin in a chunk of the sorted ids [N, T].

    order [N, T]: where each sorted id came from; partials [N, chunks * blocks].
    """
    COMPUTE: tl.constexpr = partials_ptr.dtype.element_ty
    program = tl.program_id(0)
    block, chunk = program % blocks, (program // blocks) % chunks
    sample = (program // (blocks * chunks)).to(tl.int64)
    ids_ptr += sample * positions
    order_ptr += sample * positions
    c = block * BLOCK_D + tl.arange(0, BLOCK_D)
    grads_ptr += sample * stride_gn + c.to(tl.int64) * stride_gd
    first = segment_start(ids_ptr, chunk * CHUNK, positions, CHUNK)
    end = segment_start(ids_ptr, tl.minimum((chunk + 1) * CHUNK, positions), positions, CHUNK)
    segment, total = tl.zeros([BLOCK_D], COMPUTE), tl.zeros([BLOCK_D], COMPUTE)
    for t in tl.range(first, end, num_stages=STAGES):
        id = tl.load(ids_ptr + t)
        next_id = tl.load(ids_ptr + t + 1, mask=t + 1 < positions, other=0)
        row = tl.load(order_ptr + t).to(tl.int64)
        segment += tl.load(grads_ptr + row * stride_gt, mask=c < d, other=0.0).to(COMPUTE)
        last = (t + 1 == positions) | (next_id != id)
        total += tl.where(last & (id != padding_idx), segment * segment, 0.0)
        segment = tl.where(last, 0.0, segment)
    tl.store(partials_ptr + program, tl.sum(total))


@triton.jit(do_not_specialize=["count"])
def combine_kernel(partials_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out [N] = sum of partials [N, count] along a row, always in the same order."""
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + sample * count + i, mask=i < count, other=0.0)
    tl.store(out_ptr + sample, tl.sum(total))


@triton.jit(do_not_specialize=["rows"])
def add_rows_kernel(rows_ptr, out_ptr, rows, count, BLOCK: tl.constexpr):
    """out [count] = sum of rows [R, count], in order, rounded once to the dtype of out."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], rows_ptr.dtype.element_ty)
    for _ in range(0, rows):
        total += tl.load(rows_ptr + i, mask=i < count, other=0.0)
        rows_ptr += count
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < count)
