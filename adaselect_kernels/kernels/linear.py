"""Per-sample statistics and selection from hidden states and the classifier; the logits live in registers only.

A program multiplies a block of rows by one block of classes after another. After each product it turns the accumulators
into logits (bias, scale, softcap) and adds them to the row's sums, which stay in registers over the program's share of the
classes. It leaves the rows of PARTIALS that somebody asked for. A small kernel combines the shares in a fixed order, by the
mathematics of row_stats_kernels.py. Shares depend on shapes alone, so results do not depend on the number of multiprocessors.

On Hopper and later, blocks are fetched by the tensor-memory accelerator and a program runs through several shares, in an
order in which neighbours read the same blocks. Elsewhere, and for strides that it cannot serve, they come through pointers.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from adaselect_kernels.kernels.batch_terms import make_plan
from adaselect_kernels.kernels.fused import select_from_stats, wanted_stats
from adaselect_kernels.kernels.grad_norms import precision, roomy
from adaselect_kernels.kernels.grad_norms_kernels import dot
from adaselect_kernels.kernels.maths import float64_from_bits, float_bits, strided_offset, tanh
from adaselect_kernels.kernels.row_stats import of_unit, stats_code
from adaselect_kernels.kernels.row_stats_kernels import (
    NEEDS_ENTROPY,
    NEEDS_NAN,
    NEEDS_RANK,
    NEEDS_SECOND,
    NEEDS_SQUARES,
    NEEDS_SUM,
    accumulate_sums,
    finish_row,
    load_targets,
    reduce_partials,
    rescale_to,
    store_stats,
)
from adaselect_kernels.kernels.runtime import (
    Compilation,
    Launch,
    cached,
    ceil_div,
    launch_device,
    multiprocessors,
    next_power_of_2,
)
from adaselect_kernels.options import PARTIALS, STATS, compute_dtype

UNUSED = tl.constexpr(15)  # the place of a row of PARTIALS nobody reads


@triton.jit
def store_partials(ptr, stride, mask, values, SLOTS: tl.constexpr):
    """values: in the order of PARTIALS; each has its place in a hexadecimal digit of SLOTS."""
    for i in tl.static_range(10):
        if ((SLOTS >> (4 * i)) & 15) != UNUSED:
            value = values[i].to(ptr.dtype.element_ty)
            tl.store(ptr + ((SLOTS >> (4 * i)) & 15) * stride, value, mask=mask)


@triton.jit
def load_partial(ptr, stride, mask, empty, SLOTS: tl.constexpr, ROW: tl.constexpr):
    """Row number ROW of PARTIALS: `empty` where the mask is off, and everywhere if nobody asked for the row."""
    if ((SLOTS >> (4 * ROW)) & 15) == UNUSED:
        return tl.zeros(mask.shape, ptr.dtype.element_ty) + empty
    else:
        return tl.load(ptr + ((SLOTS >> (4 * ROW)) & 15) * stride, mask=mask, other=empty)


@triton.jit(
    do_not_specialize=[
        "n_rows",
        "classes",
        "ignore_index",
        "first_class",
        "share",
        "splits",
        "scale_bits",
        "softcap_bits",
    ]
)
def product_kernel(
    hidden, weight, targets_ptr, bias_ptr, hidden_scale_ptr, weight_scale_ptr, partials_ptr,
    n_rows, classes, features, stride_row, stride_feature, stride_class, stride_weight_feature, stride_bias,
    inner, stride_target_outer, stride_target_inner, ignore_index, first_class, class_stride, share, splits,
    scale_bits: tl.int64, softcap_bits: tl.int64,
    WANT: tl.constexpr, SLOTS: tl.constexpr, USED: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partials [splits, USED, N] of `share` blocks of classes each. hidden, weight: pointers, or descriptors with TMA."""
    COMPUTE: tl.constexpr = partials_ptr.dtype.element_ty
    row_blocks, class_blocks = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(classes, BLOCK_N)
    scale, softcap = float64_from_bits(scale_bits).to(COMPUTE), float64_from_bits(softcap_bits).to(COMPUTE)

    for task in tl.range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        # 1. which rows and classes: BAND blocks of rows, then the next share of the classes
        band, within = task // (BAND * splits), task % (BAND * splits)
        in_band = tl.minimum(row_blocks - band * BAND, BAND)
        first_row = (band * BAND + within % in_band) * BLOCK_M
        split = within // in_band
        rows = first_row + tl.arange(0, BLOCK_M)
        live = rows < n_rows

        # 2. targets, as columns of this weight: y, or -1 where it has none; `below` columns are of lower classes
        y = tl.load(
            targets_ptr + strided_offset(rows, inner, stride_target_outer, stride_target_inner), mask=live, other=0
        ).to(tl.int64)
        kept = live & (y != ignore_index)
        distance = y - first_class
        column = tl.where(distance >= 0, distance, 0) // class_stride
        exact = (distance >= 0) & (column * class_stride == distance)
        below = tl.where(distance < 0, 0, tl.where(exact, column, column + 1))
        below = tl.minimum(below, classes).to(tl.int32)
        y = tl.where(kept & exact & (column < classes), column, -1).to(tl.int32)
        if SCALED:
            row_scale = tl.load(hidden_scale_ptr + rows, mask=live, other=0.0)

        # 3. products and sums; rows that are all ignored take none
        m = tl.full([BLOCK_M], float("-inf"), COMPUTE)
        second, before = m, m
        s1 = tl.zeros([BLOCK_M], COMPUTE)
        s2, ex, sum_x, target, nan = s1, s1, s1, s1, s1
        first_block = split * share
        end_block = tl.minimum(first_block + share, class_blocks)
        end_block = tl.where(tl.max(kept.to(tl.int32), axis=0) > 0, end_block, first_block)
        for block in tl.range(first_block, end_block):
            first_column = block * BLOCK_N
            cols = first_column + tl.arange(0, BLOCK_N)
            if SCALED:
                class_scale = tl.load(weight_scale_ptr + cols, mask=cols < classes, other=0.0)
            if HAS_BIAS:
                bias = tl.load(bias_ptr + cols.to(tl.int64) * stride_bias, mask=cols < classes, other=0.0)
            z = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
            for start in tl.range(0, features, BLOCK_K, num_stages=STAGES):
                if TMA:
                    a = hidden.load([first_row, start])
                    b = weight.load([first_column, start])
                else:
                    k = start + tl.arange(0, BLOCK_K)
                    k_offset = k.to(tl.int64)[None, :]
                    a_inside, b_inside = live[:, None], (cols < classes)[:, None]
                    if not EVEN:
                        a_inside, b_inside = a_inside & (k < features)[None, :], b_inside & (k < features)[None, :]
                    a_at = hidden + rows.to(tl.int64)[:, None] * stride_row + k_offset * stride_feature
                    b_at = weight + cols.to(tl.int64)[:, None] * stride_class + k_offset * stride_weight_feature
                    a = tl.load(a_at, mask=a_inside, other=0.0)
                    b = tl.load(b_at, mask=b_inside, other=0.0)
                z = dot(a, tl.trans(b), z, PRECISION)

            # z = softcap tanh(u / softcap), u = logit_scale (hidden weight^T + bias)
            if SCALED:
                z = z * row_scale[:, None] * class_scale[None, :]
            if HAS_BIAS:
                z += bias.to(COMPUTE)[None, :]
            if LOGIT_SCALE:
                z *= scale
            if SOFTCAP:
                z = softcap * tanh(z * (1.0 / softcap))

            # the target's logit goes apart, columns that do not exist away: in few blocks is there either
            in_block = (y >= first_column) & (y < first_column + BLOCK_N)
            if (tl.max(in_block.to(tl.int32), axis=0) > 0) | (first_column + BLOCK_N > classes):
                is_target = cols[None, :] == y[:, None]
                target += tl.sum(tl.where(is_target, z, 0.0), axis=1)
                z = tl.where(is_target | (cols >= classes)[None, :], float("-inf"), z)

            if NEEDS_NAN & WANT:
                nan = tl.maximum(nan, tl.max((z != z).to(COMPUTE), axis=1))
            if NEEDS_RANK & WANT:
                before = tl.maximum(before, tl.max(tl.where(cols[None, :] < below[:, None], z, float("-inf")), axis=1))
            top, s1, s2, ex, second = accumulate_sums(m, s1, s2, ex, second, z, cols[None, :], WANT)
            if NEEDS_SUM & WANT:
                # sum (z - m), relative to the new maximum: those before move by m - top each
                others = (first_column - first_block * BLOCK_N) - (
                    (y >= first_block * BLOCK_N) & (y < first_column)
                ).to(tl.int32)
                x = z - tl.where(top == float("-inf"), 0.0, top)[:, None]
                counts = (cols < classes)[None, :] & (cols[None, :] != y[:, None])
                sum_x += others * rescale_to(m, top) + tl.sum(tl.where(counts, x, 0.0), axis=1)
            m = top

        # 4. the partials of this share
        end_column = tl.minimum(end_block * BLOCK_N, classes)
        mine = (y >= first_block * BLOCK_N) & (y < end_column)
        at = partials_ptr + split.to(tl.int64) * USED * n_rows + rows
        count = end_column - first_block * BLOCK_N - mine.to(tl.int32)
        values = (m, s1, s2, ex, second, before, sum_x, target, count, nan)
        store_partials(at, n_rows.to(tl.int64), live, values, SLOTS)


@triton.jit(
    do_not_specialize=["n_rows", "classes", "ignore_index", "sets", "stride_set", "stride_partial", "smoothing_bits"]
)
def merge_kernel(
    partials_ptr, targets_ptr, out_ptr, n_rows, classes, sets, stride_set, stride_partial, stride_row,
    inner, stride_target_outer, stride_target_inner, ignore_index, smoothing_bits: tl.int64,
    ORDER: tl.constexpr, S: tl.constexpr, WANT: tl.constexpr, SLOTS: tl.constexpr, OUT_SLOTS: tl.constexpr,
    UNION: tl.constexpr, SETS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Statistics [S, N] from the partials of `sets` disjoint sets of classes; UNION: the partials of their union."""
    COMPUTE: tl.constexpr = out_ptr.dtype.element_ty
    # 1. rows, and the partials of all sets at once
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n_rows
    y, kept, bad = load_targets(
        targets_ptr, rows, live, inner, stride_target_outer, stride_target_inner, classes, ignore_index
    )
    which = tl.arange(0, SETS)[:, None]
    mask = (which < sets) & kept[None, :]
    at = partials_ptr + which.to(tl.int64) * stride_set + rows.to(tl.int64)[None, :] * stride_row
    m = load_partial(at, stride_partial, mask, float("-inf"), SLOTS, 0)
    s1 = load_partial(at, stride_partial, mask, 0.0, SLOTS, 1)
    s2 = load_partial(at, stride_partial, mask, 0.0, SLOTS, 2)
    ex = load_partial(at, stride_partial, mask, 0.0, SLOTS, 3)
    second = load_partial(at, stride_partial, mask, float("-inf"), SLOTS, 4)
    before = load_partial(at, stride_partial, mask, float("-inf"), SLOTS, 5)
    sum_x = load_partial(at, stride_partial, mask, 0.0, SLOTS, 6)
    target = load_partial(at, stride_partial, mask, 0.0, SLOTS, 7)
    count = load_partial(at, stride_partial, mask, 0.0, SLOTS, 8)
    nan = load_partial(at, stride_partial, mask, 0.0, SLOTS, 9)
    s1 = tl.where(nan > 0, float("nan"), s1)

    # 2. of their union, sums relative to its maximum; sum (z - origin) = sum (z - m) + count (m - origin)
    z_y = tl.sum(target, axis=0)
    if UNION:
        origin = tl.max(m, axis=0)
    else:
        origin = z_y
    zsum = tl.where(count == 0, 0.0, sum_x + count * (m - origin[None, :]))
    beaten = ((m > z_y[None, :]) | ((before >= z_y[None, :]) & (y > 0)[None, :])).to(tl.int32)
    top, s1, s2, ex, second, lost, has_nan, zsum = reduce_partials(
        m, s1, s2, ex, second, beaten, nan.to(tl.int32), zsum, WANT
    )

    # 3. statistics, or the union's partials
    if not UNION:
        smoothing = float64_from_bits(smoothing_bits).to(COMPUTE)
        values = finish_row(top, s1, s2, ex, second, lost, has_nan, zsum, z_y, kept, bad, classes, smoothing, WANT)
        store_stats(out_ptr, rows, n_rows, live, values, ORDER, S)
    else:
        sum_x = tl.where(top == float("-inf"), 0.0, zsum)
        lost = (has_nan != 0) | (z_y != z_y)
        union = (top, s1, s2, ex, second, tl.max(before, axis=0), sum_x, z_y, tl.sum(count, axis=0), lost)
        store_partials(out_ptr + rows, n_rows.to(tl.int64), live, union, OUT_SLOTS)


# --- configurations ---------------------------------------------------------------------------------------------------


class TileConfig(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    STAGES: int


# By name, with the warps of a program. Bytes from the L2 cache an operation are (1 / BLOCK_M + 1 / BLOCK_N) for 16 bits.
TILES = {
    "wide": (TileConfig(128, 256, 64, 4), 8),  # two warp groups of 64 x 256: 128 registers a thread of accumulators
    "square": (TileConfig(128, 128, 64, 4), 8),  # statistics that need more of the registers; pointers
    "small": (TileConfig(128, 128, 32, 3), 8),  # in 64 KB of shared memory
    "tf32": (TileConfig(128, 128, 32, 3), 8),
    "exact": (TileConfig(64, 64, 16, 3), 8),  # full-precision float32: vector units, whose operands are registers
    "double": (TileConfig(32, 32, 16, 2), 4),
}
# the statistics whose epilogue fits beside the accumulators of the wide tile
LIGHT = sum(1 << STATS.index(name) for name in ("loss", "lse", "grad_norm", "margin", "confidence"))
WIDE_SHARED = 227 * 1024  # bytes a program: Hopper, and Blackwell of the data centre
TASKS = 8192  # programs' worth of work wanted of a launch: more than sixty rounds of 132, so that the last costs little
BAND = 16  # blocks of rows that share the classes they read: 16 MB of hidden states stay in the L2 cache
LEAST_SPLITS = 8  # BAND blocks of rows times as many keep 128 programs at work on what the L2 cache holds
MOST_SPLITS = 128  # combined at once
COMBINED = 1024  # partials of a kind that a program combines
COMBINE_WARPS = 4


def tile(
    dtype: torch.dtype, want: int, precision: str, tensor_memory: bool, large: bool
) -> tuple[str, TileConfig, int]:
    """The name of the tile, itself and its warps; `large`: for ROOMY_SHARED bytes of shared memory a program."""
    if dtype == torch.float64:
        name = "double"
    elif dtype == torch.float32:
        name = "tf32" if large and precision == "tf32" else "exact"
    elif tensor_memory:
        name = "wide" if want & ~LIGHT == 0 else "square"
    else:
        name = "square" if large else "small"
    config, num_warps = TILES[name]
    if dtype.itemsize == 1:
        config = config._replace(BLOCK_K=2 * config.BLOCK_K)
    return name, config, num_warps


def shares(n_rows: int, classes: int, config: TileConfig) -> tuple[int, int]:
    """Blocks of classes a program takes at a time, and how many such shares there are."""
    row_blocks, class_blocks = ceil_div(n_rows, config.BLOCK_M), ceil_div(classes, config.BLOCK_N)
    wanted = min(max(TASKS // row_blocks, LEAST_SPLITS), MOST_SPLITS, class_blocks)
    share = ceil_div(class_blocks, wanted)
    return share, ceil_div(class_blocks, share)


def used_rows(want: int) -> tuple[str, ...]:
    """The rows of PARTIALS that the statistics and smoothing in WANT are made of."""
    needs = {
        "sum_sq": NEEDS_SQUARES, "sum_ex": NEEDS_ENTROPY, "second": NEEDS_SECOND, "before": NEEDS_RANK, "sum_x": NEEDS_SUM,
        "count": NEEDS_SUM, "nan": NEEDS_NAN,
    }  # fmt: skip
    return tuple(row for row in PARTIALS if row not in needs or needs[row].value & want)


def slots(rows: Sequence[str], stored: Sequence[str]) -> int:
    """SLOTS: for each row of PARTIALS its place among `stored`, or UNUSED where it is not one of `rows`."""
    return sum((stored.index(row) if row in rows else UNUSED.value) << (4 * i) for i, row in enumerate(PARTIALS))


@lru_cache
def has_tensor_memory(device: torch.device) -> bool:
    """Whether blocks are fetched by the tensor-memory accelerator, into shared memory that holds four of the wide tile."""
    if device.type != "cuda" or torch.version.hip:
        return False
    found = torch.cuda.get_device_properties(device)
    return found.major >= 9 and found.shared_memory_per_block_optin >= WIDE_SHARED


def _descriptor_serves(matrix: Tensor) -> bool:
    stride, step = matrix.stride()
    bytes_apart = stride * matrix.element_size()
    return step == 1 and stride >= matrix.shape[1] and bytes_apart % 16 == 0 and matrix.data_ptr() % 16 == 0


def _require_float8(device: torch.device) -> None:
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability < (8, 9):
        raise RuntimeError(
            "products of float8_e4m3fn need an NVIDIA GPU of compute capability 8.9 or later;"
            f" {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        )


# --- launchers --------------------------------------------------------------------------------------------------------


class Targets(NamedTuple):
    """Where targets [N] or [N, T] are."""

    n_rows: int
    inner: int
    stride_outer: int
    stride_inner: int
    ignore_index: int


def _targets(targets: Tensor, ignore_index: int) -> Targets:
    if targets.dim() == 1:
        return Targets(targets.shape[0], 1, targets.stride(0), 0, ignore_index)
    return Targets(targets.numel(), targets.shape[1], *targets.stride(), ignore_index)


class Classifier(NamedTuple):
    """What a launch takes of the operands besides the tensors."""

    features: int
    classes: int
    strides: tuple[int, int, int, int]  # of hidden, then of weight
    stride_bias: int | None
    scaled: bool
    dtype: torch.dtype
    precision: str


class Product(NamedTuple):
    launch: Launch
    splits: int
    config: TileConfig


@cached
def _product(
    classifier: Classifier, targets: Targets, first_class: int, class_stride: int, want: int, scales: bool, capped: bool,
    tensor_memory: bool, large: bool, multiprocessors: int,
) -> Product:  # fmt: skip
    features, classes, strides, stride_bias, scaled, dtype, precision = classifier
    _, config, num_warps = tile(dtype, want, precision, tensor_memory, large)
    share, splits = shares(targets.n_rows, classes, config)
    used = used_rows(want)
    constants = {
        "WANT": want, "SLOTS": slots(used, used), "USED": len(used), "TMA": tensor_memory,
        "EVEN": features % config.BLOCK_K == 0, "HAS_BIAS": stride_bias is not None, "SCALED": scaled,
        "LOGIT_SCALE": scales, "SOFTCAP": capped, "PRECISION": precision, "BAND": BAND, **config._asdict(),
    }  # fmt: skip
    integers = (
        targets.n_rows, classes, features, *strides, 1 if stride_bias is None else stride_bias, *targets[1:], first_class,
        class_stride, share, splits,
    )  # fmt: skip
    tasks = ceil_div(targets.n_rows, config.BLOCK_M) * splits
    programs = min(tasks, multiprocessors) if tensor_memory else tasks
    launch = Launch(product_kernel, (programs,), integers, constants, num_warps, direct=not tensor_memory)
    return Product(launch, splits, config)


def partials_of_shares(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, hidden_scale: Tensor | None,
    weight_scale: Tensor | None, first_class: int, class_stride: int, want: int, ignore_index: int, softcap: float,
    logit_scale: float,
) -> Tensor:  # fmt: skip
    """[splits, used_rows(want), N]: the partials of each share of the classes."""
    device, dtype = hidden.device, hidden.dtype
    hidden = hidden.reshape(-1, hidden.shape[-1])  # a copy only of rows that have no common stride
    if dtype.itemsize == 1:
        _require_float8(device)
    where = _targets(targets, ignore_index)
    classifier = Classifier(
        hidden.shape[1], weight.shape[0], (*hidden.stride(), *weight.stride()), None if bias is None else bias.stride(0),
        hidden_scale is not None, dtype, precision(hidden),
    )  # fmt: skip
    tensor_memory = (
        dtype.itemsize <= 2 and has_tensor_memory(device) and _descriptor_serves(hidden) and _descriptor_serves(weight)
    )
    product = _product(
        classifier, where, first_class, class_stride, want, logit_scale != 1.0, softcap > 0, tensor_memory, roomy(device),
        multiprocessors(device),
    )  # fmt: skip
    shape = product.splits, len(used_rows(want)), where.n_rows
    partials = torch.empty(shape, dtype=compute_dtype(hidden), device=device)
    operands: tuple[Any, Any] = hidden, weight
    if tensor_memory:
        config = product.config
        blocks = (config.BLOCK_M, config.BLOCK_K), (config.BLOCK_N, config.BLOCK_K)
        operands = tuple(TensorDescriptor.from_tensor(x, list(b)) for x, b in zip(operands, blocks, strict=True))
    others = (partials if x is None else x for x in (bias, hidden_scale, weight_scale))
    with launch_device(hidden):
        product.launch(*operands, targets, *others, partials, options=(float_bits(logit_scale), float_bits(softcap)))
    return partials


@cached
def _merge(
    sets: int, strides: tuple[int, ...], targets: Targets, classes: int, stats: tuple[int, ...], label_smoothing: float,
    union: bool, every_row: bool,
) -> Launch:  # fmt: skip
    """every_row: the partials come with all rows of PARTIALS, not only those used."""
    order, want = stats_code(stats, label_smoothing)
    used = used_rows(want)
    most = next_power_of_2(sets)
    constants = {
        "ORDER": order, "S": len(stats), "WANT": want, "SLOTS": slots(used, PARTIALS if every_row else used),
        "OUT_SLOTS": slots(used, PARTIALS), "UNION": union, "SETS": most, "BLOCK_N": max(8, COMBINED // most),
    }  # fmt: skip
    grid = (ceil_div(targets.n_rows, constants["BLOCK_N"]),)
    return Launch(merge_kernel, grid, (targets.n_rows, classes, sets, *strides, *targets[1:]), constants, COMBINE_WARPS)


def _merged(
    partials: Tensor, targets: Tensor, classes: int, stats: Sequence[int], ignore_index: int, label_smoothing: float,
    union: bool = False, every_row: bool = False,
) -> Tensor:  # fmt: skip
    where = _targets(targets, ignore_index)
    launch = _merge(
        partials.shape[0], partials.stride(), where, classes, tuple(stats), label_smoothing, union, every_row
    )
    out = torch.empty(
        (len(PARTIALS) if union else len(stats), where.n_rows), dtype=partials.dtype, device=partials.device
    )
    with launch_device(partials):
        launch(partials, targets, out, options=(float_bits(label_smoothing),))
    return out


def linear_rows(
    hidden, weight, targets, bias, stats: Sequence[int], ignore_index: int, label_smoothing: float, softcap: float,
    logit_scale: float,
) -> Tensor:  # fmt: skip
    """[S, positions]: the statistics of every position."""
    _, want = stats_code(stats, label_smoothing)
    partials = partials_of_shares(
        hidden, weight, targets, bias, None, None, 0, 1, want, ignore_index, softcap, logit_scale
    )
    return _merged(partials, targets, weight.shape[0], stats, ignore_index, label_smoothing)


def linear_per_sample_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, stats: Sequence[int], unit: str,
    ignore_index: int, label_smoothing: float, softcap: float, logit_scale: float,
) -> Tensor:  # fmt: skip
    rows = linear_rows(hidden, weight, targets, bias, stats, ignore_index, label_smoothing, softcap, logit_scale)
    return of_unit(rows, targets, stats, unit, ignore_index)


def fused_linear_select(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, state: Tensor | None, methods: Sequence[int],
    k: int, unit: str, order: str, ignore_index: int, label_smoothing: float, softcap: float, logit_scale: float,
    seed: int, options: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan = make_plan(methods, state is not None, options)
    rows = linear_rows(
        hidden, weight, targets, bias, wanted_stats(plan), ignore_index, label_smoothing, softcap, logit_scale
    )
    return select_from_stats(rows, targets, state, plan, k, unit, order, ignore_index, seed, options)


def linear_partials(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, hidden_scale: Tensor | None,
    weight_scale: Tensor | None, first_class: int, class_stride: int, stats: Sequence[int], ignore_index: int,
    label_smoothing: float, softcap: float, logit_scale: float,
) -> Tensor:  # fmt: skip
    _, want = stats_code(stats, label_smoothing)
    partials = partials_of_shares(
        hidden, weight, targets, bias, hidden_scale, weight_scale, first_class, class_stride, want, ignore_index, softcap,
        logit_scale,
    )  # fmt: skip
    # how many classes there are in all is not known here, and not asked of the union of partials
    return _merged(partials, targets, weight.shape[0], stats, ignore_index, label_smoothing, union=True)


def combine_partials(
    partials: Tensor, targets: Tensor, classes: int, stats: Sequence[int], ignore_index: int, label_smoothing: float
) -> Tensor:
    return _merged(partials, targets, classes, stats, ignore_index, label_smoothing, every_row=True)


# --- what ships -------------------------------------------------------------------------------------------------------

_POINTEE = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
_ALL = tuple(range(len(STATS)))
_SELECTION = (STATS.index("loss"), STATS.index("grad_norm"))


def _shipped_product(
    dtype: torch.dtype, every: bool, suffix: str = "", precision: str = "ieee", tensor_memory: bool = False, large: bool = False
) -> Compilation:  # fmt: skip
    """`every`: all statistics of smoothed losses, with a bias, a scale and a softcap; else what a selection takes."""
    _, want = stats_code(_ALL, 0.1) if every else stats_code(_SELECTION, 0.0)
    name, config, num_warps = tile(dtype, want, precision, tensor_memory, large)
    pointee, compute = _POINTEE[dtype], "fp64" if dtype == torch.float64 else "fp32"
    scaled = dtype.itemsize == 1
    used = used_rows(want)
    operands = {"hidden": (config.BLOCK_M, config.BLOCK_K), "weight": (config.BLOCK_N, config.BLOCK_K)}
    descriptors = {x: f"{pointee}[{rows}, {columns}]" for x, (rows, columns) in operands.items()}
    pointers = {
        "targets_ptr": "i64", "bias_ptr": "fp32" if scaled else pointee, "hidden_scale_ptr": "fp32",
        "weight_scale_ptr": "fp32", "partials_ptr": compute,
    }  # fmt: skip
    return Compilation(
        f"{name}-{pointee}-{'all' if every else 'loss+norm'}{suffix}", product_kernel,
        pointers if tensor_memory else {"hidden": pointee, "weight": pointee} | pointers,
        {
            "WANT": want, "SLOTS": slots(used, used), "USED": len(used), "TMA": tensor_memory, "EVEN": not every,
            "HAS_BIAS": every, "SCALED": scaled, "LOGIT_SCALE": every, "SOFTCAP": every, "PRECISION": precision,
            "BAND": BAND, **config._asdict(),
        },
        num_warps,
        ones=("stride_feature", "stride_weight_feature", "stride_bias", "inner", "stride_target_outer", "class_stride"),
        multiples=("features", "stride_row", "stride_class"), descriptors=descriptors if tensor_memory else {},
    )  # fmt: skip


def shipped() -> Iterator[Compilation]:
    """The tiles in 64 KB of shared memory (float16 compiles as bfloat16 does), and what combines the most shares there are."""
    for every in (False, True):
        yield _shipped_product(torch.bfloat16, every)
    yield _shipped_product(torch.float32, True)
    yield _shipped_product(torch.float64, True)
    for compute, stats, union in (
        ("fp32", _SELECTION, False), ("fp32", _ALL, False), ("fp32", _ALL, True), ("fp64", _ALL, False),
    ):  # fmt: skip
        order, want = stats_code(stats, 0.0 if stats is _SELECTION else 0.1)
        used = used_rows(want)
        yield Compilation(
            f"merge-{compute}-{'all' if stats is _ALL else 'loss+norm'}{'-union' if union else ''}", merge_kernel,
            {"partials_ptr": compute, "targets_ptr": "i64", "out_ptr": compute},
            {
                "ORDER": order, "S": len(stats), "WANT": want, "SLOTS": slots(used, used), "OUT_SLOTS": slots(used, PARTIALS),
                "UNION": union, "SETS": MOST_SPLITS, "BLOCK_N": max(8, COMBINED // MOST_SPLITS),
            },
            COMBINE_WARPS, ones=("stride_row", "inner", "stride_target_outer"),
        )  # fmt: skip


def shipped_for_roomy() -> Iterator[Compilation]:
    """What devices with ROOMY_SHARED bytes of shared memory a program run through pointers."""
    for every in (False, True):
        yield _shipped_product(torch.bfloat16, every, "-roomy", large=True)
    yield _shipped_product(torch.float32, False, "-roomy", "tf32", large=True)


def shipped_with_tensor_memory() -> Iterator[Compilation]:
    """What has_tensor_memory() devices run."""
    for every in (False, True):
        yield _shipped_product(torch.bfloat16, every, "-tensor", tensor_memory=True)
    yield _shipped_product(torch.float8_e4m3fn, False, "-tensor", tensor_memory=True)
