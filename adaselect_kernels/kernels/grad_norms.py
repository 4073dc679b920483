"""Launches of grad_norms_kernels.py: the form and the configuration by arithmetic, the operators, and what ships."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaselect_kernels.kernels.grad_norms_kernels import (
    add_rows_kernel,
    affine_kernel,
    combine_kernel,
    depthwise_kernel,
    direct_kernel,
    embedding_kernel,
    gram_kernel,
    outer_kernel,
)
from adaselect_kernels.kernels.runtime import Compilation, Launch, cached, ceil_div, launch_device, multiprocessors
from adaselect_kernels.options import compute_dtype

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
