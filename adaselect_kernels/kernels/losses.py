"""Gradients of sum_i w_i l_i: of the logits in one pass, and of a linear classifier whose logits are never stored whole.

Both go through the same elements (`gradient`). Short rows are taken several at a time, long ones a block of columns a program.
A classifier is taken in blocks of classes: a product gives the block's logits, one pass makes their gradient of them, and two
products add it to the gradients of the rows and of the classes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaselect_kernels.kernels.maths import exponential, float64_from_bits, float_bits, tanh
from adaselect_kernels.kernels.runtime import (
    Compilation,
    Launch,
    cached,
    ceil_div,
    launch_device,
    next_power_of_2,
)
from adaselect_kernels.options import compute_dtype


@triton.jit
def load_row(
    row_weight_ptr, targets_ptr, lse_ptr, rows, live, stride_weight, stride_target, stride_lse, first_class, columns,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Weight, the target's column here or -1, and lse as the sum of two numbers, of a row or a block of them."""
    weight = tl.load(row_weight_ptr + rows * stride_weight, mask=live, other=0.0).to(COMPUTE)
    y = tl.load(targets_ptr + rows * stride_target, mask=live, other=0).to(tl.int64)
    # compared before the subtraction: any integer may come
    here = (y >= first_class) & (y - first_class < columns)
    lse = tl.load(lse_ptr + rows * stride_lse, mask=live, other=0.0)
    high, rest = lse.to(COMPUTE), tl.zeros_like(weight)
    if lse_ptr.dtype.element_ty != COMPUTE:
        rest = (lse - high).to(COMPUTE)
    return weight, tl.where(here, y - first_class, -1).to(tl.int32), high, rest


@triton.jit
def bend(u, bias, softcap, scale, HAS_SOFTCAP: tl.constexpr):
    """The logits z of the products u, and dz/du."""
    z = scale * (u + bias)
    slope = scale + tl.zeros_like(z)
    if HAS_SOFTCAP:
        bent = tanh(z / softcap)
        z = softcap * bent
        slope = scale * (1.0 - bent * bent)
    return z, slope


@triton.jit
def gradient(p, slope, cols, weight, y, lse, smoothing, share, z_loss):
    """d/du of w l; p is e^(z - lse), y the target's column. Exactly 0 where the weight is."""
    # dl/dz_j = p_j (1 + 2 z_loss lse) - eps / C - (1 - eps) [j = y]
    grad = p * (1.0 + 2.0 * z_loss * lse) - share
    grad = tl.where(cols == y, grad - (1.0 - smoothing), grad)
    return tl.where(weight == 0.0, 0.0, weight * grad * slope)


@triton.jit
def load_options(smoothing_bits, share_bits, softcap_bits, scale_bits, z_loss_bits, COMPUTE: tl.constexpr):
    return (
        float64_from_bits(smoothing_bits).to(COMPUTE),
        float64_from_bits(share_bits).to(COMPUTE),
        float64_from_bits(softcap_bits).to(COMPUTE),
        float64_from_bits(scale_bits).to(COMPUTE),
        float64_from_bits(z_loss_bits).to(COMPUTE),
    )


@triton.jit(
    do_not_specialize=[
        "n_rows", "columns", "first_class", "smoothing_bits", "share_bits", "softcap_bits", "scale_bits", "z_loss_bits",
    ]
)  # fmt: skip
def short_gradient_kernel(
    logits_ptr, row_weight_ptr, targets_ptr, lse_ptr, bias_ptr, out_ptr, n_rows, columns, stride_row, stride_class,
    stride_out, stride_weight, stride_target, stride_lse, first_class,
    smoothing_bits: tl.int64, share_bits: tl.int64, softcap_bits: tl.int64, scale_bits: tl.int64, z_loss_bits: tl.int64,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NORMALIZE: tl.constexpr, VEC: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows by BLOCK_C columns. stride_out, and where stride_class is 1 stride_row, count vectors of VEC columns.

    NORMALIZE: BLOCK_C columns are whole rows, whose lse has lost digits: see exact_lse_kernel.
    """
    COMPUTE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    parts = tl.cdiv(columns, BLOCK_C)
    program = tl.program_id(0)
    rows = (program // parts).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n_rows
    weight, y, lse, lse_rest = load_row(
        row_weight_ptr, targets_ptr, lse_ptr, rows, live, stride_weight, stride_target, stride_lse, first_class, columns,
        COMPUTE,
    )  # fmt: skip
    # a mask of vectors, which cannot end inside one
    vectors = (program % parts) * (BLOCK_C // VEC) + tl.arange(0, BLOCK_C) // VEC
    cols = (program % parts) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = vectors < columns // VEC
    inside = live[:, None] & exists[None, :]
    if stride_class == 1:
        offsets = (rows * stride_row * VEC)[:, None] + cols[None, :]
    else:
        offsets = (rows * stride_row)[:, None] + (cols.to(tl.int64) * stride_class)[None, :]
    # a row of weight 0 is not read: its logits may be anything
    u = tl.load(logits_ptr + offsets, mask=inside & (weight != 0.0)[:, None], other=0.0).to(COMPUTE)
    bias = tl.zeros([1, 1], COMPUTE)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=exists, other=0.0).to(COMPUTE)[None, :]
    smoothing, share, softcap, scale, z_loss = load_options(
        smoothing_bits, share_bits, softcap_bits, scale_bits, z_loss_bits, COMPUTE
    )
    z, slope = bend(u, bias, softcap, scale, HAS_SOFTCAP)
    p = exponential((z - lse[:, None]) - lse_rest[:, None])
    if NORMALIZE:
        p = p / tl.sum(tl.where(inside, p, 0.0), axis=1)[:, None]
    grad = gradient(p, slope, cols[None, :], weight[:, None], y[:, None], lse[:, None], smoothing, share, z_loss)
    tl.store(out_ptr + (rows * stride_out * VEC)[:, None] + cols[None, :], grad, mask=inside)


@triton.jit(
    do_not_specialize=[
        "columns", "parts", "first_class", "smoothing_bits", "share_bits", "softcap_bits", "scale_bits", "z_loss_bits",
    ]
)  # fmt: skip
def long_gradient_kernel(
    logits_ptr, row_weight_ptr, targets_ptr, lse_ptr, bias_ptr, out_ptr, columns, parts, stride_row, stride_out,
    stride_weight, stride_target, stride_lse, first_class,
    smoothing_bits: tl.int64, share_bits: tl.int64, softcap_bits: tl.int64, scale_bits: tl.int64, z_loss_bits: tl.int64,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, VEC: tl.constexpr, HEAD: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """VECTORS vectors of VEC contiguous columns of a row, whose first `head` and last columns are part 0's.

    HEAD: a row may begin between two boundaries, in logits and out alike; else strides count vectors.
    """
    COMPUTE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    part = program % parts
    weight, y, lse, lse_rest = load_row(
        row_weight_ptr, targets_ptr, lse_ptr, row, True, stride_weight, stride_target, stride_lse, first_class, columns,
        COMPUTE,
    )  # fmt: skip
    smoothing, share, softcap, scale, z_loss = load_options(
        smoothing_bits, share_bits, softcap_bits, scale_bits, z_loss_bits, COMPUTE
    )

    # 1. columns before the first boundary, then whole vectors, then the rest
    head = 0
    if HEAD:
        start, out_start = row * stride_row, row * stride_out
        head = tl.minimum((VEC - start % VEC) % VEC, columns).to(tl.int32)
        body, out_body = tl.multiple_of(start + head, VEC), tl.multiple_of(out_start + head, VEC)
    else:
        start, out_start = row * stride_row * VEC, row * stride_out * VEC
        body, out_body = start, out_start
    vectors = (columns - head) // VEC

    # 2. whole vectors; a row of weight 0 is not read: its logits may be anything
    vector = part * VECTORS + tl.arange(0, VECTORS)[:, None]
    local = vector * VEC + tl.arange(0, VEC)[None, :]
    inside = tl.broadcast_to(vector < vectors, local.shape)
    read = tl.broadcast_to(vector < tl.where(weight == 0.0, 0, vectors), local.shape)
    u = tl.load(logits_ptr + body + local, mask=read, other=0.0).to(COMPUTE)
    bias = tl.zeros([1, 1], COMPUTE)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + head + local, mask=inside, other=0.0).to(COMPUTE)
    z, slope = bend(u, bias, softcap, scale, HAS_SOFTCAP)
    p = exponential((z - lse) - lse_rest)
    grad = gradient(p, slope, head + local, weight, y, lse, smoothing, share, z_loss)
    tl.store(out_ptr + out_body + local, grad, mask=inside)

    # 3. the edges, one column a lane; without a branch, as they are few
    lane = tl.arange(0, 2 * VEC)
    edge = tl.where(lane < VEC, lane, head + vectors * VEC + lane - VEC)
    end = tl.where(lane < VEC, head, columns)
    end = tl.where(part == 0, end, 0)
    edge_u = tl.load(logits_ptr + start + edge, mask=edge < tl.where(weight == 0.0, 0, end), other=0.0).to(COMPUTE)
    edge_bias = tl.zeros([1], COMPUTE)
    if HAS_BIAS:
        edge_bias = tl.load(bias_ptr + edge, mask=edge < end, other=0.0).to(COMPUTE)
    edge_z, edge_slope = bend(edge_u, edge_bias, softcap, scale, HAS_SOFTCAP)
    edge_p = exponential((edge_z - lse) - lse_rest)
    edge_grad = gradient(edge_p, edge_slope, edge, weight, y, lse, smoothing, share, z_loss)
    tl.store(out_ptr + out_start + edge, edge_grad, mask=edge < end)


@triton.jit(do_not_specialize=["columns", "softcap_bits"])
def exact_lse_kernel(
    logits_ptr, row_weight_ptr, lse_ptr, exact_ptr, columns, stride_row, stride_class, stride_weight, stride_lse,
    softcap_bits: tl.int64,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log sum_j e^z_j of a row in float64: lse + log sum_j e^(z_j - lse). In float32 an offset of the logits costs it digits."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(row_weight_ptr + row * stride_weight)
    lse = tl.load(lse_ptr + row * stride_lse)
    softcap = float64_from_bits(softcap_bits).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tl.where(weight == 0.0, 0, columns), BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < columns
        u = tl.load(logits_ptr + row * stride_row + cols.to(tl.int64) * stride_class, mask=inside, other=0.0)
        z, _ = bend(u, 0.0, softcap, 1.0, HAS_SOFTCAP)
        total += tl.where(inside, exponential(z - lse), 0.0)
    total = tl.where(weight == 0.0, 1.0, tl.sum(total, axis=0))
    tl.store(exact_ptr + row * stride_lse, lse.to(tl.float64) + tl.log(total.to(tl.float64)))


class ElementTuning(NamedTuple):
    elements: int  # a program
    warps: int


# 32 elements a thread: four loads of 16 bytes in flight of a half type, eight of float32, which cover the latency of memory.
LONG = ElementTuning(elements=4096, warps=4)
SHORT = ElementTuning(elements=2048, warps=4)
SHORT_MAX_COLUMNS = 1024  # up to here a program has two rows or more: a row's own loads are shared by enough columns
UNALIGNED_SHORT_MAX_COLUMNS = 256  # rows without a vector width: beyond, a long row's aligned body reads wider
SCATTERED_COLUMNS = 32  # of a tile whose columns do not lie side by side: as many rows, for what does
EXACT_BLOCK, EXACT_WARPS = 2048, 8  # a row a program, eight loads of a thread in flight


class Settings(NamedTuple):
    """What a loss is made of beside its logits."""

    label_smoothing: float
    softcap: float
    logit_scale: float
    z_loss: float
    classes: int

    def options(self) -> tuple[int, ...]:
        share = self.label_smoothing / self.classes
        return tuple(map(float_bits, (self.label_smoothing, share, self.softcap, self.logit_scale, self.z_loss)))


class _Plan(NamedTuple):
    launch: Launch
    exact_lse: bool  # takes that of exact_lse_kernel


@cached
def _gradient_plan(
    shape: Sequence[int], strides: tuple[int, int], stride_out: int, row_strides: tuple[int, int, int], dtype: torch.dtype,
    out_dtype: torch.dtype, aligned: bool, first_class: int, has_bias: bool, has_softcap: bool, exact: bool,
) -> _Plan:  # fmt: skip
    """`aligned`: logits and out begin at multiples of 16 bytes. `exact`: the digits that lse has lost are wanted."""
    n_rows, columns = shape
    stride_row, stride_class = strides if columns > 1 else (strides[0], 1)
    full = 16 // min(dtype.itemsize, out_dtype.itemsize)
    constants = {"HAS_BIAS": has_bias, "HAS_SOFTCAP": has_softcap}
    # the widest vector that no row of logits or out cuts
    vec = full if aligned else 1
    while columns % vec or stride_out % vec or (stride_class == 1 and stride_row % vec):
        vec //= 2
    in_step = aligned and stride_class == 1 and stride_row % full == stride_out % full
    shortest = SHORT_MAX_COLUMNS if vec > 1 else UNALIGNED_SHORT_MAX_COLUMNS
    if columns > shortest and in_step:
        head = stride_row % full != 0
        scale = 1 if head else full
        parts = ceil_div(columns, LONG.elements)
        integers = (columns, parts, stride_row // scale, stride_out // scale, *row_strides, first_class)
        constants |= {"VEC": full, "HEAD": head, "VECTORS": LONG.elements // full}
        return _Plan(Launch(long_gradient_kernel, _grid(n_rows * parts), integers, constants, LONG.warps), exact)
    block_n, block_c = short_blocks(columns, stride_class == 1)
    grid = _grid(ceil_div(n_rows, block_n) * ceil_div(columns, block_c))
    in_vectors = stride_row // vec if stride_class == 1 else stride_row
    integers = (n_rows, columns, in_vectors, stride_class, stride_out // vec, *row_strides, first_class)
    whole = columns <= block_c
    constants |= {"NORMALIZE": exact and whole, "VEC": vec, "BLOCK_N": block_n, "BLOCK_C": block_c}
    return _Plan(Launch(short_gradient_kernel, grid, integers, constants, SHORT.warps), exact and not whole)


def _grid(programs: int) -> tuple[int]:
    if programs >= 2**31:
        raise ValueError(f"at most 2^31 - 1 programs of {SHORT.elements} logits, got {programs}")
    return (programs,)


def short_blocks(columns: int, side_by_side: bool) -> tuple[int, int]:
    """Rows and columns of a program."""
    block_c = max(16, next_power_of_2(min(columns, SHORT_MAX_COLUMNS if side_by_side else SCATTERED_COLUMNS)))
    return SHORT.elements // block_c, block_c


def write_gradient(
    out: Tensor, row_weight: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, bias: Tensor | None, first_class: int,
    settings: Settings, exact: bool = False,
) -> None:  # fmt: skip
    """Gradient of the products `logits` [N, C] of classes from first_class on into out [N, C], rows contiguous; may be logits.

    exact: the rows are whole, so that the digits which their float32 lse has lost can be had.
    """
    plan = _gradient_plan(
        logits.shape, logits.stride(), out.stride(0), (row_weight.stride(0), targets.stride(0), lse.stride(0)),
        logits.dtype, out.dtype, (logits.data_ptr() | out.data_ptr()) % 16 == 0, first_class, bias is not None,
        settings.softcap > 0, exact,
    )  # fmt: skip
    with launch_device(logits):
        if plan.exact_lse:
            lse = _exact_lse(row_weight, logits, lse, settings.softcap)
        plan.launch(
            logits, row_weight, targets, lse, row_weight if bias is None else bias, out, options=settings.options()
        )


def _exact_lse(row_weight: Tensor, logits: Tensor, lse: Tensor, softcap: float) -> Tensor:
    """Of the stride of lse."""
    exact = torch.empty_strided(lse.shape, lse.stride(), dtype=torch.float64, device=lse.device)
    launch = _exact_lse_launch(logits.shape, logits.stride(), row_weight.stride(0), lse.stride(0), softcap > 0)
    launch(logits, row_weight, lse, exact, options=(float_bits(softcap),))
    return exact


@cached
def _exact_lse_launch(shape: Sequence[int], strides: tuple[int, int], stride_weight, stride_lse, has_softcap) -> Launch:
    constants = {"HAS_SOFTCAP": has_softcap, "BLOCK": min(EXACT_BLOCK, max(16, next_power_of_2(shape[1])))}
    integers = (shape[1], *strides, stride_weight, stride_lse)
    return Launch(exact_lse_kernel, (shape[0],), integers, constants, EXACT_WARPS)


def cross_entropy_backward(
    row_weight: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, label_smoothing: float, softcap: float, z_loss: float
) -> Tensor:  # fmt: skip
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    settings = Settings(label_smoothing, softcap, 1.0, z_loss, logits.shape[1])
    # a half type's rounding of the gradient hides what a float32 lse is off by
    exact = logits.dtype == lse.dtype == torch.float32
    write_gradient(out, row_weight, logits, targets, lse, None, 0, settings, exact)
    return out


# A block of products takes at most this much: what is beyond is gone from the cache before it is read again anyway, and the
# products of a few thousand rows and classes run at the full rate. Of rows there are as many as let it have LEAST_CLASSES:
# the gradient of the rows is read and written once a block, which beside a product over fewer classes would show.
BLOCK_BYTES = 256 << 20
LEAST_CLASSES = 4096
CLASS_MULTIPLE = 256  # tiles of a matrix product, and rows of a block that begin at a multiple of 16 bytes


def block_shape(n_rows: int, classes: int, itemsize: int) -> tuple[int, int]:
    """Rows and classes of a block of products: blocks of equal size but the last."""
    elements = BLOCK_BYTES // itemsize
    padded = ceil_div(classes, CLASS_MULTIPLE) * CLASS_MULTIPLE
    rows = min(n_rows, max(1, elements // min(LEAST_CLASSES, padded)))
    most = max(LEAST_CLASSES, elements // rows // CLASS_MULTIPLE * CLASS_MULTIPLE)
    blocks = ceil_div(classes, most)
    return rows, ceil_div(ceil_div(classes, blocks), CLASS_MULTIPLE) * CLASS_MULTIPLE


def _mixes_types(device: torch.device) -> bool:
    """Whether torch multiplies half types into float32: its CUDA products do, those of ROCm and of a CPU refuse."""
    return device.type == "cuda" and not torch.version.hip


def _multiply(out: Tensor, a: Tensor, b: Tensor, beta: int = 0) -> None:
    """out = beta out + a b, beta 0 or 1, accumulated in the dtype of the statistics and rounded once, to that of out."""
    if out.dtype == a.dtype and (_mixes_types(a.device) or a.dtype == compute_dtype(a)):
        torch.addmm(out, a, b, beta=beta, out=out) if beta else torch.mm(a, b, out=out)
    elif _mixes_types(a.device):
        if beta:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        product = torch.mm(a.to(compute_dtype(a)), b.to(compute_dtype(b)))
        out.copy_(out + product if beta else product)


@torch.no_grad()
def linear_loss_backward(
    row_weight: Tensor, rows: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, bias: Tensor | None, first_class: int,
    classes: int, label_smoothing: float, softcap: float, logit_scale: float, z_loss: float, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A block of products takes BLOCK_BYTES whatever the sizes are; its gradient, of half types, half as much more."""
    compute, device = compute_dtype(rows), rows.device
    n_rows, n_classes = rows.shape[0], weight.shape[0]
    settings = Settings(label_smoothing, softcap, logit_scale, z_loss, classes)
    rows_grad = torch.empty(rows.shape if wanted[0] else (0,), dtype=compute, device=device)
    weight_grad = torch.empty(weight.shape if wanted[1] else (0,), dtype=weight.dtype, device=device)
    bias_grad = torch.empty(n_classes if wanted[2] else 0, dtype=weight.dtype, device=device)

    block_rows, block_classes = block_shape(n_rows, n_classes, compute.itemsize)
    if wanted[1]:
        rows = torch.where((row_weight == 0)[:, None], 0.0, rows)  # 0 * NaN would be NaN in the gradient of weight
    products = torch.empty((block_rows, block_classes), dtype=compute, device=device)
    # in the type of the weight, for the products of the tensor cores; in place where that is the products' own
    grads = products if weight.dtype == compute else torch.empty_like(products, dtype=weight.dtype)
    with torch.autocast(device.type, enabled=False):  # it would round the operands of the products
        for first in range(0, n_classes, block_classes):
            here = slice(first, min(first + block_classes, n_classes))
            w, b = weight[here], None if bias is None else bias[here]
            # sums over several blocks of rows are rounded once, at the end
            sums = block_rows < n_rows and weight.dtype != compute
            w_grad = weight_grad[here] if wanted[1] else weight_grad
            w_sum = torch.empty_like(w_grad, dtype=compute) if sums else w_grad
            b_sum = torch.zeros(len(w) if wanted[2] else 0, dtype=compute, device=device)
            for start in range(0, n_rows, block_rows):
                some = slice(start, min(start + block_rows, n_rows))
                z, grad = (block[: some.stop - start, : len(w)] for block in (products, grads))
                _multiply(z, rows[some], w.T)
                write_gradient(grad, row_weight[some], z, targets[some], lse[some], b, first_class + first, settings)
                if wanted[0]:
                    _multiply(rows_grad[some], grad, w, beta=int(first > 0))
                if wanted[1]:
                    _multiply(w_sum, grad.T, rows[some], beta=int(start > 0))
                if wanted[2]:
                    b_sum += grad.sum(0, dtype=compute)
            if wanted[1] and sums:
                w_grad.copy_(w_sum)
            if wanted[2]:
                bias_grad[here] = b_sum
    return rows_grad, weight_grad, bias_grad


_POINTEE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def shipped() -> Iterator[Compilation]:
    """Short rows, long ones off the boundary, and blocks of products with all that may be asked of them; of float16 and
    float64 long rows alone."""
    for dtype, pointee in _POINTEE.items():
        full = 16 // dtype.itemsize
        plain = {"HAS_BIAS": False, "HAS_SOFTCAP": False}
        exact = dtype == torch.float32
        shorts = {torch.float32: ((16, 1), (SHORT_MAX_COLUMNS, full)), torch.bfloat16: ((SHORT_MAX_COLUMNS, full),)}
        for columns, vec in shorts.get(dtype, ()):
            block_n, block_c = short_blocks(columns, True)
            yield Compilation(
                f"short-{pointee}-C{columns}-vec{vec}", short_gradient_kernel, _pointers(pointee, pointee),
                plain | {"NORMALIZE": exact, "VEC": vec, "BLOCK_N": block_n, "BLOCK_C": block_c}, SHORT.warps,
                ones=("stride_class", *_ONES), load_bits=8 * vec * dtype.itemsize,
            )  # fmt: skip
        if exact:
            yield Compilation(
                "exact-fp32-lse", exact_lse_kernel,
                {"logits_ptr": "fp32", "row_weight_ptr": "fp32", "lse_ptr": "fp32", "exact_ptr": "fp64"},
                {"HAS_SOFTCAP": False, "BLOCK": EXACT_BLOCK}, EXACT_WARPS, ones=("stride_class", "stride_weight", "stride_lse"),
            )  # fmt: skip
        yield _long(f"long-{pointee}-odd", pointee, pointee, plain | {"HEAD": True}, full)
        if dtype != torch.float64:  # whose products are like the float32 ones
            products = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "HEAD": False}
            yield _long(f"long-{pointee}-products", "fp32", pointee, products, full, lse="fp64")


_ONES = ("stride_weight", "stride_target", "stride_lse")


def _pointers(logits: str, out: str, lse: str | None = None) -> dict[str, str]:
    compute = "fp64" if logits == "fp64" else "fp32"
    return {
        "logits_ptr": logits, "row_weight_ptr": compute, "targets_ptr": "i64", "lse_ptr": lse or compute, "bias_ptr": out,
        "out_ptr": out,
    }  # fmt: skip


def _long(name: str, logits: str, out: str, flags: dict[str, bool], vec: int, lse: str | None = None) -> Compilation:
    constants = flags | {"VEC": vec, "VECTORS": LONG.elements // vec}
    return Compilation(
        name, long_gradient_kernel, _pointers(logits, out, lse), constants, LONG.warps, ones=_ONES, load_bits=128
    )
