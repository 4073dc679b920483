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

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaselect_kernels.kernels.runtime import (
    Compilation,
    Launch,
    cached,
    ceil_div,
    launch_device,
    multiprocessors,
)
from adaselect_kernels.options import compute_dtype

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


# --- configurations ---------------------------------------------------------------------------------------------------


class TileConfig(NamedTuple):
    BLOCK_P: int
    BLOCK_D: int
    BLOCK_T: int
    STAGES: int


class GramConfig(NamedTuple):
    BLOCK_T: int
    BLOCK_C: int
    STAGES: int


# The rate of each form over that of a plain matrix product, with whole blocks of 128. Not measured: an argument from what
# must come from the L2 cache, which bounds them all. Only ratios matter, and only near a crossover.
RATES = {
    "direct": 0.62,  # 128 x 128 tiles load 1/64 byte an operation; 128 x 256 of a vendor's product 1/85, which it shares
    "fused": 0.58,  # and between two samples the tile is squared, summed and added
    "gram": 0.6,  # the same tiles, but every program starts its pipeline twice
}
# What a side of fewer than 128 costs beside that: each element loaded is used that much less.
_BLOCK_COST = {128: 1.0, 64: 1.4, 32: 2.0, 16: 3.0}
WIDE_SPAN = 2**31
ROOMY_SHARED = 160 * 1024  # sm_80, sm_90 and sm_100 have this much a program; others, and AMD, 64 to 99 KB


def _block(size: int, largest: int) -> int:
    """The block that covers `size` at the least cost."""
    return min((b for b in _BLOCK_COST if b <= largest), key=lambda b: -(-size // b) * b * _BLOCK_COST[b])


@lru_cache(maxsize=1024)
def tile_config(p: int, d: int, element_bytes: int, patches: bool, roomy: bool) -> tuple[TileConfig, int]:
    """The tile of G^T A and its warps. With WRITE it takes two accumulators: 128 registers a thread at 128 x 128."""
    if element_bytes == 8:
        block_p, block_d = _block(p, 32), _block(d, 32)
        return TileConfig(block_p, block_d, 16, 2), 4 if block_p * block_d > 256 else 1
    if element_bytes == 4 or patches:
        # full precision runs on the vector units, whose operands come from registers; patches have an address an element
        block_p, block_d = _block(p, 64), _block(d, 64)
        return TileConfig(block_p, block_d, 64 // element_bytes, 3), 8 if block_p * block_d == 4096 else 4
    block_p, block_d = _block(p, 128), _block(d, 128)
    area = block_p * block_d
    num_warps = 8 if area == 16384 else 4 if area >= 2048 else 2
    return TileConfig(block_p, block_d, *((64, 4) if roomy else (32, 3))), num_warps


def _pairs(positions: int, block: int) -> int:
    """Blocks of the upper triangle, diagonal included."""
    blocks = ceil_div(positions, block)
    return blocks * (blocks + 1) // 2


@lru_cache(maxsize=1024)
def gram_config(positions: int, element_bytes: int, patches: bool) -> tuple[GramConfig, int]:
    largest = 32 if element_bytes == 8 else 64 if patches or element_bytes == 4 else 128
    blocks = [b for b in _BLOCK_COST if b <= largest]
    block_t = min(blocks, key=lambda b: _pairs(positions, b) * (b * _BLOCK_COST[b]) ** 2)
    block_c = {8: 16, 4: 32, 2: 64}[element_bytes] // (2 if patches and element_bytes < 8 else 1)
    if patches or element_bytes == 4:  # as in tile_config
        return GramConfig(block_t, block_c, 2), 8 if block_t == 64 else 4
    if block_t == 128:
        return GramConfig(block_t, 32, 3), 8
    return GramConfig(block_t, block_c, 3), 4 if block_t > 16 else 2


@lru_cache
def roomy(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= ROOMY_SHARED


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def form_costs(positions: int, p: int, d: int, element_bytes: int, patches: bool) -> dict[str, float]:
    """Operations a sample and group over the rate, in units of the plain matrix product's; `plain` is 2 T d p."""
    tile, _ = tile_config(p, d, element_bytes, patches, False)
    gram, _ = gram_config(positions, element_bytes, patches)
    # 2 T d p, rounded up to whole tiles
    direct = 2 * _padded(positions, tile.BLOCK_T) * _padded(p, tile.BLOCK_P) * _padded(d, tile.BLOCK_D)
    direct *= _BLOCK_COST[tile.BLOCK_P] * _BLOCK_COST[tile.BLOCK_D]
    # T (T + block) (d + p)
    columns = _padded(d, gram.BLOCK_C) + _padded(p, gram.BLOCK_C)
    symmetric = 2 * _pairs(positions, gram.BLOCK_T) * (gram.BLOCK_T * _BLOCK_COST[gram.BLOCK_T]) ** 2 * columns
    return {
        "plain": 2 * positions * p * d,
        "direct": direct / RATES["direct"],
        "fused": direct / RATES["fused"],
        "gram": symmetric / RATES["gram"],
    }


def cheaper_form(positions: int, p: int, d: int, element_bytes: int, patches: bool) -> str:
    costs = form_costs(positions, p, d, element_bytes, patches)
    return "gram" if costs["gram"] < costs["direct"] else "direct"


# --- launchers --------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer as N * groups pairs of matrices, [T, d] and [T, p], the first seen through `view`."""

    activations: Tensor
    grads: Tensor
    samples: int
    groups: int
    positions: int
    p: int
    d: int
    strides: tuple[int, ...]  # of activations: N, T, d; of grads: N, T, p
    dims: int
    geometry: tuple[int, ...]  # channels, then by threes: strides, sizes, outputs, kernel, stride, padding, dilation
    wide: bool  # a sample's input spans 2^31 elements
    a_t_last: bool
    g_t_last: bool

    @property
    def arguments(self) -> tuple[int, ...]:
        """What every kernel of this file takes, from `positions` on."""
        an, at, ad, gn, gt, gp = self.strides
        return self.positions, self.p, self.d, an, gn, gt, gp, at, ad, *self.geometry

    @property
    def layout(self) -> dict[str, Any]:
        return {"DIMS": self.dims, "WIDE": self.wide, "A_T_LAST": self.a_t_last, "G_T_LAST": self.g_t_last}

    @property
    def depthwise(self) -> bool:
        return self.dims > 0 and self.p == 1


_NO_GEOMETRY = (1,) * 22  # Triton makes constants of ones


def linear_layer(activations: Tensor, grads: Tensor) -> Layer:
    n, positions, p = grads.shape
    strides = (*activations.stride(), *grads.stride())
    return Layer(
        activations, grads, n, 1, positions, p, activations.shape[2], strides, 0, _NO_GEOMETRY,
        False, strides[1] == 1 != strides[2], strides[4] == 1 != strides[5],
    )  # fmt: skip


def conv_layer(input: Tensor, grads: Tensor, kernel_size, stride, padding, dilation, groups: int) -> Layer:
    outputs, dims = grads.shape[2:], len(kernel_size)
    grads = grads.flatten(2).mT  # [N, T, O]; a copy only when the positions have no common stride
    if groups == 1 and all(x == 1 for x in (*kernel_size, *stride)) and not any(padding):
        return linear_layer(input.flatten(2).mT, grads)

    def three(values: Sequence[int], fill: int) -> tuple[int, ...]:
        return (fill,) * (3 - dims) + tuple(values)

    in_group = input.shape[1] // groups
    geometry = (
        in_group, *three(input.stride()[2:], 1), *three(input.shape[2:], 1), *three(outputs, 1), *three(kernel_size, 1),
        *three(stride, 1), *three(padding, 0), *three(dilation, 1),
    )  # fmt: skip
    volume = geometry[10] * geometry[11] * geometry[12]
    strides = (input.stride(0), 1, input.stride(1), *grads.stride())
    # the padding counts: its offsets are computed, though never read
    reach = zip(input.stride()[1:], input.shape[1:], (0, *padding), strict=True)
    wide = sum(stride * (size + 2 * pad) for stride, size, pad in reach) >= WIDE_SPAN
    return Layer(
        input, grads, grads.shape[0], groups, grads.shape[1], grads.shape[2] // groups, in_group * volume, strides, dims,
        geometry, wide, input.stride(-1) == 1 != input.stride(1), strides[4] == 1 != strides[5],
    )  # fmt: skip


def precision(tensor: Tensor) -> str:
    exact = tensor.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


def _partials(like: Tensor, count: int) -> Tensor:
    return torch.empty((like.shape[0], count), dtype=compute_dtype(like), device=like.device)


@cached
def _planned(kernel, grid: tuple[int, ...], integers: tuple[int, ...], constants: tuple, num_warps: int) -> Launch:
    return Launch(kernel, grid, integers, dict(constants), num_warps)


def _launch(
    kernel, grid: tuple[int, ...], tensors: tuple[Tensor, ...], integers, constants: dict, num_warps: int
) -> None:
    with launch_device(tensors[0]):
        _planned(kernel, grid, tuple(integers), tuple(constants.items()), num_warps)(*tensors)


# constants and warps of the kernels that only stream
COMBINE = {"BLOCK": 1024}, 4
OUTER = {"BLOCK": 1024}, 4
ADD_ROWS = {"BLOCK": 1024}, 4
EMBEDDING = {"CHUNK": 64, "BLOCK_D": 512, "STAGES": 4}, 2
CHANNELS = {"BLOCK_T": 32, "BLOCK_C": 64}, 4  # normalisation layers, biases
DEPTHWISE = {"BLOCK_T": 16, "BLOCK_C": 64}, 4  # every element of a patch has its offset in a register


def combine(partials: Tensor) -> Tensor:
    """Sums of the rows of [N, count]."""
    n, count = partials.shape
    if count == 1:
        return partials.view(n)
    out = partials.new_empty(n)
    _launch(combine_kernel, (n,), (partials, out), (count,), *COMBINE)
    return out


def _tiling(layer: Layer) -> tuple[TileConfig, int, int]:
    """The tile, its warps, and how many tiles a group has."""
    patches = layer.dims > 0
    config, num_warps = tile_config(layer.p, layer.d, layer.grads.element_size(), patches, roomy(layer.grads.device))
    return config, num_warps, ceil_div(layer.p, config.BLOCK_P) * ceil_div(layer.d, config.BLOCK_D)


def _direct(layer: Layer, partials: Tensor, weight: Tensor | None, splits: int) -> None:
    """Fills partials[:, :groups * tiles]; weight [splits, p, d] too, if given."""
    config, num_warps, tiles = _tiling(layer)
    write = weight is not None
    constants = (
        layer.layout | {"WRITE": write, "PRECISION": precision(layer.grads)} | config._asdict() | {"FLATTEN": write}
    )
    _launch(
        direct_kernel, (tiles * splits, layer.groups),
        (layer.activations, layer.grads, partials, partials if weight is None else weight),
        (layer.samples, ceil_div(layer.samples, splits), tiles, partials.stride(0), *layer.arguments), constants, num_warps,
    )  # fmt: skip


def _gram(layer: Layer, bias: bool) -> Tensor:
    config, num_warps = gram_config(layer.positions, layer.grads.element_size(), layer.dims > 0)
    pairs = _pairs(layer.positions, config.BLOCK_T)
    partials = _partials(layer.grads, layer.groups * pairs)
    constants = layer.layout | {"BIAS": bias, "PRECISION": precision(layer.grads)} | config._asdict()
    _launch(
        gram_kernel, (layer.samples * pairs, layer.groups), (layer.activations, layer.grads, partials),
        (pairs, partials.stride(0), *layer.arguments), constants, num_warps,
    )  # fmt: skip
    return combine(partials)


def _depthwise(layer: Layer, partials: Tensor, blocks: int) -> None:
    """Fills partials[:, :blocks]."""
    arguments = list(layer.arguments)
    arguments[9] *= layer.groups  # channels: the kernel sees those of all groups at once
    constants = {"DIMS": layer.dims, "WIDE": layer.wide, "T_LAST": layer.g_t_last} | DEPTHWISE[0]
    tensors = (layer.activations, layer.grads, partials)
    _launch(
        depthwise_kernel,
        (layer.samples * blocks,),
        tensors,
        (blocks, partials.stride(0), *arguments),
        constants,
        CHANNELS[1],
    )


def _blocks(channels: int, config: tuple[dict[str, int], int]) -> int:
    return ceil_div(channels, config[0]["BLOCK_C"])


def _channels(
    values: Tensor | None, grads: Tensor, mean: Tensor | None, rstd: Tensor | None, bias: bool,
    partials: Tensor, slot: int, sums: Tensor | None,
) -> None:  # fmt: skip
    """Fills partials[:, slot : slot + blocks] and sums [N, C]; the weight's part when there are values."""
    n, positions, channels = grads.shape
    blocks = _blocks(channels, CHANNELS)
    strides = [(grads if x is None else x).stride() for x in (values, grads, mean, rstd)]
    unused = partials
    tensors = tuple(unused if x is None else x for x in (values, grads, mean, rstd, partials, sums))
    flags = {
        "HAS_MEAN": mean is not None, "HAS_RSTD": rstd is not None, "WEIGHT": values is not None, "BIAS": bias,
        "SUMS": sums is not None, "T_LAST": grads.stride(1) == 1 != grads.stride(2),
    }  # fmt: skip
    integers = blocks, slot, partials.stride(0), positions, channels, *(s for three in strides for s in three)
    _launch(affine_kernel, (n * blocks,), tensors, integers, flags | CHANNELS[0], CHANNELS[1])


def _outer(layer: Layer, bias: bool) -> Tensor:
    out = layer.grads.new_empty(layer.samples, dtype=compute_dtype(layer.grads))
    an, _, ad, gn, _, gp = layer.strides
    integers = layer.p, layer.d, an, ad, gn, gp
    _launch(
        outer_kernel,
        (layer.samples,),
        (layer.activations, layer.grads, out),
        integers,
        {"BIAS": bias} | OUTER[0],
        OUTER[1],
    )
    return out


def _add_rows(rows: Tensor, out: Tensor) -> None:
    count = rows.shape[1]
    _launch(add_rows_kernel, (ceil_div(count, ADD_ROWS[0]["BLOCK"]),), (rows, out), (rows.shape[0], count), *ADD_ROWS)


def _layer_sq_norms(layer: Layer, weight: bool, bias: bool, form: str) -> Tensor:
    n = layer.samples
    weight = weight and layer.p * layer.d > 0
    if form not in ("auto", "direct", "gram"):
        raise ValueError(f"form must be one of 'auto', 'direct', 'gram'; got {form!r}")
    if not (weight or bias) or layer.grads.numel() == 0:
        return layer.grads.new_zeros(n, dtype=compute_dtype(layer.grads))
    if weight and layer.dims == 0 and layer.positions == 1 and form == "auto":
        return _outer(layer, bias)
    if weight and form == "auto" and not layer.depthwise:
        form = cheaper_form(layer.positions, layer.p, layer.d, layer.grads.element_size(), layer.dims > 0)
    if weight and form == "gram":
        return _gram(layer, bias)
    slots = 0
    if weight:
        slots = _blocks(layer.groups, DEPTHWISE) if layer.depthwise else layer.groups * _tiling(layer)[2]
    partials = _partials(layer.grads, slots + (_blocks(layer.grads.shape[2], CHANNELS) if bias else 0))
    if weight and layer.depthwise:
        _depthwise(layer, partials, slots)
    elif weight:
        _direct(layer, partials, None, layer.samples)
    if bias:
        _channels(None, layer.grads, None, None, True, partials, slots, None)
    return combine(partials)


def linear_grad_sq_norms(activations: Tensor, grads: Tensor, weight: bool, bias: bool, form: str) -> Tensor:
    return _layer_sq_norms(linear_layer(activations, grads), weight, bias, form)


def conv_grad_sq_norms(
    input: Tensor, grads: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, weight: bool, bias: bool, form: str,
) -> Tensor:  # fmt: skip
    return _layer_sq_norms(conv_layer(input, grads, kernel_size, stride, padding, dilation, groups), weight, bias, form)


def fused_pays(positions: int, p: int, d: int, element_bytes: int) -> bool:
    """One fused pass costs less than a plain matrix product and the norms apart."""
    costs = form_costs(positions, p, d, element_bytes, False)
    return costs["fused"] <= costs["plain"] + min(costs["direct"], costs["gram"])


@torch.no_grad()
def linear_grads_and_sq_norms(activations: Tensor, grads: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    layer = linear_layer(activations, grads)
    n, positions, p, d = layer.samples, layer.positions, layer.p, layer.d
    weight_grad = grads.new_empty((p, d))
    if grads.numel() == 0 or d == 0 or not fused_pays(positions, p, d, grads.element_size()):
        # a plain matrix product, which may be empty, and the norms apart
        torch.mm(grads.flatten(0, 1).mT, activations.flatten(0, 1), out=weight_grad)
        sq_norms = _layer_sq_norms(layer, True, bias, "auto")
        bias_grad = grads.sum((0, 1), dtype=compute_dtype(grads)).to(grads.dtype) if bias else grads.new_zeros(0)
        return sq_norms, weight_grad, bias_grad
    tiles = _tiling(layer)[2]
    partials = _partials(grads, tiles + (_blocks(p, CHANNELS) if bias else 0))
    # fewer tiles than multiprocessors: split the samples, and add the parts up in order
    splits = max(1, min(n, multiprocessors(grads.device) // tiles))
    splits = ceil_div(n, ceil_div(n, splits))
    parts = weight_grad[None] if splits == 1 else partials.new_empty((splits, p, d))
    _direct(layer, partials, parts, splits)
    if splits > 1:
        _add_rows(parts.flatten(1), weight_grad)
    bias_grad = grads.new_zeros(0)
    if bias:
        bias_grad, sums = grads.new_empty(p), partials.new_empty((n, p))
        _channels(None, grads, None, None, True, partials, tiles, sums)
        _add_rows(sums, bias_grad)
    return combine(partials), weight_grad, bias_grad


def affine_grad_sq_norms(
    values: Tensor, grads: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: bool, bias: bool
) -> Tensor:
    if not (weight or bias) or grads.numel() == 0:
        return grads.new_zeros(grads.shape[0], dtype=compute_dtype(grads))
    partials = _partials(grads, _blocks(grads.shape[2], CHANNELS))
    _channels(values if weight else None, grads, mean, rstd, bias, partials, 0, None)
    return combine(partials)


def embedding_grad_sq_norms(ids: Tensor, grads: Tensor, padding_idx: int) -> Tensor:
    n, positions, d = grads.shape
    if grads.numel() == 0:
        return grads.new_zeros(n, dtype=compute_dtype(grads))
    ordered, order = ids.sort(dim=1, stable=True)
    blocks, chunks = ceil_div(d, EMBEDDING[0]["BLOCK_D"]), ceil_div(positions, EMBEDDING[0]["CHUNK"])
    partials = _partials(grads, chunks * blocks)
    tensors = ordered.contiguous(), order.contiguous(), grads, partials
    integers = blocks, chunks, positions, d, *grads.stride(), padding_idx
    _launch(embedding_kernel, (n * chunks * blocks,), tensors, integers, *EMBEDDING)
    return combine(partials)


# --- what ships -------------------------------------------------------------------------------------------------------

_POINTEE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_GEOMETRY = ("stride", "size", "output", "kernel", "step", "padding", "dilation")
_LINEAR_ONES = ("stride_ad", "stride_gp", "channels", *(f"{name}_{i}" for name in _GEOMETRY for i in range(3)))
_LINEAR = {"DIMS": 0, "WIDE": False, "A_T_LAST": False, "G_T_LAST": False}
_LINEAR_MULTIPLES = ("positions", "p", "d", "stride_an", "stride_at", "stride_gn", "stride_gt")
_OUTER_ONES = ("stride_0", "size_0", "output_0", "kernel_0", "step_0", "dilation_0")  # two spatial dimensions


def _shipped_tiles(dtype: torch.dtype, large: bool) -> Iterator[Compilation]:
    """The tiles of linear layers, from 16 x 16 to the largest, with and without the batch's gradient; precisions of float32."""
    pointee, compute = _POINTEE[dtype], "fp64" if dtype == torch.float64 else "fp32"
    pointers = {"a_ptr": pointee, "g_ptr": pointee, "partials_ptr": compute}
    for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
        for write in (False, True):
            for size in (16, 64, 4096) if dtype != torch.float16 else (4096,):  # float16 compiles as bfloat16 does
                config, num_warps = tile_config(size, size, dtype.itemsize, False, large)
                yield Compilation(
                    f"{'fused' if write else 'direct'}-{pointee}-{precision}-{size}{'-roomy' if large else ''}", direct_kernel,
                    pointers | {"weight_ptr": pointee if write else compute},
                    _LINEAR | {"WRITE": write, "PRECISION": precision, "FLATTEN": write} | config._asdict(),
                    num_warps, ones=_LINEAR_ONES, multiples=_LINEAR_MULTIPLES,
                )  # fmt: skip


def shipped_for_roomy() -> Iterator[Compilation]:
    """What devices with ROOMY_SHARED bytes of shared memory a program run instead of the tiles in shipped()."""
    for dtype in (torch.bfloat16, torch.float16):
        yield from _shipped_tiles(dtype, True)


def shipped() -> Iterator[Compilation]:
    for dtype, pointee in _POINTEE.items():
        compute = "fp64" if dtype == torch.float64 else "fp32"
        pointers = {"a_ptr": pointee, "g_ptr": pointee, "partials_ptr": compute}
        yield from _shipped_tiles(dtype, False)
        # convolutions: channels last, and spatial dimensions last
        tile, tile_warps = tile_config(64, 576, dtype.itemsize, True, False)
        for dims, t_last in ((1, True), (2, False), (2, True), (3, True)) if dtype != torch.float16 else ():
            layout = {"DIMS": dims, "WIDE": False, "A_T_LAST": t_last, "G_T_LAST": t_last, "PRECISION": "ieee"}
            ones = ("stride_2", "stride_gt") if t_last else ("stride_ad", "stride_gp")
            ones += _OUTER_ONES if dims == 2 else ()
            label = f"conv{dims}d-{'t' if t_last else 'c'}-last-{pointee}"
            yield Compilation(
                f"direct-{label}", direct_kernel, pointers | {"weight_ptr": compute},
                layout | {"WRITE": False, "FLATTEN": False} | tile._asdict(), tile_warps, ones=ones,
            )  # fmt: skip
            gram, gram_warps = gram_config(64, dtype.itemsize, True)
            yield Compilation(
                f"gram-{label}", gram_kernel, pointers, layout | {"BIAS": True} | gram._asdict(), gram_warps, ones=ones
            )
            yield Compilation(
                f"depthwise-{label}", depthwise_kernel, pointers, {"DIMS": dims, "WIDE": False, "T_LAST": t_last} | DEPTHWISE[0],
                DEPTHWISE[1], ones=ones,
            )  # fmt: skip
        for positions in (16, 64, 512):
            gram, gram_warps = gram_config(positions, dtype.itemsize, False)
            yield Compilation(
                f"gram-{pointee}-T{positions}", gram_kernel, pointers,
                _LINEAR | {"BIAS": True, "PRECISION": "ieee"} | gram._asdict(),
                gram_warps, ones=_LINEAR_ONES, multiples=_LINEAR_MULTIPLES,
            )  # fmt: skip
        yield Compilation(
            f"outer-{pointee}", outer_kernel, {"a_ptr": pointee, "g_ptr": pointee, "out_ptr": compute},
            {"BIAS": True} | OUTER[0], OUTER[1], ones=("stride_ad", "stride_gp"),
            multiples=("p", "d", "stride_an", "stride_gn"), load_bits=64,
        )  # fmt: skip
        for t_last in (False, True):
            yield Compilation(
                f"affine-{'t' if t_last else 'c'}-last-{pointee}", affine_kernel,
                {"values_ptr": pointee, "grads_ptr": pointee, "mean_ptr": compute, "rstd_ptr": compute,
                 "partials_ptr": compute, "sums_ptr": compute},
                {"HAS_MEAN": True, "HAS_RSTD": True, "WEIGHT": True, "BIAS": True, "SUMS": True, "T_LAST": t_last}
                | CHANNELS[0], CHANNELS[1],
                ones=("stride_vt", "stride_gt") if t_last else ("stride_vc", "stride_gc"),
                multiples=("positions", "channels", "stride_vn", "stride_gn", "stride_vc", "stride_gc")
                if t_last else ("positions", "channels", "stride_vn", "stride_gn", "stride_vt", "stride_gt"),
            )  # fmt: skip
        yield Compilation(
            f"embedding-{pointee}", embedding_kernel,
            {"ids_ptr": "i64", "order_ptr": "i64", "grads_ptr": pointee, "partials_ptr": compute},
            *EMBEDDING,
            ones=("stride_gd",), multiples=("d", "stride_gn", "stride_gt"),
        )  # fmt: skip
        yield Compilation(
            f"add-rows-{pointee}", add_rows_kernel, {"rows_ptr": compute, "out_ptr": pointee},
            *ADD_ROWS, multiples=("count",), load_bits=128,
        )  # fmt: skip
    for compute in ("fp32", "fp64"):
        yield Compilation(
            f"combine-{compute}", combine_kernel, {"partials_ptr": compute, "out_ptr": compute},
            *COMBINE,
        )  # fmt: skip
