"""IMPON's scoring of a bank of rows by a linear model, and the pick of the best, in one launch.

Each program predicts a few rows; up to ONE_PROGRAM_ROWS rows the program that arrives last chooses among all of them.
A larger bank is chosen from by the selection's own launches.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaselect_kernels.kernels.maths import float64_from_bits, float_bits, last_to_arrive, ordered_key
from adaselect_kernels.kernels.runtime import Compilation, Launch, cached, ceil_div, counters, launch_device
from adaselect_kernels.kernels.select import ONE_PROGRAM_ROWS, block_size, block_warps, select_block, select_topk

ROWS = 4  # of a program: 50 programs for a bank of 200


def columns(double: bool, warps: int) -> int:
    """At a time: each thread loads 16 bytes of theta and as many of each row."""
    return (64 if double else 128) * warps


@triton.jit(do_not_specialize=["n", "k", "total", "programs", "norm_bits"])
def bank_kernel(
    features_ptr, rows_ptr, theta_ptr, predictions_ptr, picked_ptr, arrivals_ptr,
    n, k, total, dim, stride_row, stride_column, programs, norm_bits: tl.int64,
    PICK: tl.constexpr, LARGEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """predictions [n] = theta . [x; norm] of the rows, and with PICK picked [k] = the best of rows [n], in their order."""
    T: tl.constexpr = theta_ptr.dtype.element_ty
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.load(rows_ptr + places, mask=places < n, other=0)
    inside = (rows >= 0) & (rows < total)
    at = features_ptr + tl.where(inside, rows, 0) * stride_row

    # 1. theta . x of ROWS rows
    sums = tl.zeros([ROWS, COLUMNS], T)
    for start in range(0, dim, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        weights = tl.load(theta_ptr + columns, mask=columns < dim, other=0.0)
        mask = (places < n)[:, None] & (columns < dim)[None, :]
        x = tl.load(at[:, None] + (columns.to(tl.int64) * stride_column)[None, :], mask=mask, other=0)
        sums += x.to(T) * weights[None, :]
    predicted = tl.sum(sums, axis=1) + float64_from_bits(norm_bits).to(T) * tl.load(theta_ptr + dim)
    predicted = tl.where(inside, predicted, float("nan"))
    tl.store(predictions_ptr + places, predicted, mask=places < n)

    # 2. the program that arrives last picks
    if PICK:  # noqa: SIM102 (a constant: no code at all without it)
        if last_to_arrive(arrivals_ptr, programs):
            bank = tl.arange(0, BLOCK)
            scores = tl.load(predictions_ptr + bank, mask=bank < n, other=0.0, cache_modifier=".cg")
            select_block(ordered_key(scores, LARGEST), bank, n, k, picked_ptr, False)
            tl.debug_barrier()  # every warp has written its places
            chosen = tl.load(picked_ptr + bank, mask=bank < k, other=0)
            tl.store(picked_ptr + bank, tl.load(rows_ptr + chosen, mask=bank < k, other=0), mask=bank < k)


def bank_select(
    features: Tensor, rows: Tensor, theta: Tensor, norm: float, k: int, largest: bool
) -> tuple[Tensor, Tensor]:
    n = rows.shape[0]
    rows, theta = rows.contiguous(), theta.contiguous()
    predictions = torch.empty(n, dtype=theta.dtype, device=features.device)
    picked = torch.empty(k, dtype=torch.int64, device=features.device)
    with launch_device(features):
        launch = _launch(n, k, *features.shape, *features.stride(), theta.dtype == torch.float64, largest)
        arrivals = counters(features.device, 1)
        launch(features, rows, theta, predictions, picked, arrivals, options=(float_bits(norm),))
        if n > ONE_PROGRAM_ROWS:
            return rows[select_topk(predictions, k, largest, "index")], predictions
    return picked, predictions


@cached
def _launch(
    n: int, k: int, total: int, dim: int, stride_row: int, stride_column: int, double: bool, largest: bool
) -> Launch:
    programs, pick = ceil_div(n, ROWS), n <= ONE_PROGRAM_ROWS
    block = block_size(n) if pick else 16
    warps = block_warps(block)
    sized = {"ROWS": ROWS, "COLUMNS": columns(double, warps), "BLOCK": block}
    integers = (n, k, total, dim, stride_row, stride_column, programs)
    return Launch(bank_kernel, (programs,), integers, {"PICK": pick, "LARGEST": largest, **sized}, warps)


def shipped() -> Iterator[Compilation]:
    """Every type of features at the paper's bank of 200, the largest bank of one launch, and a larger one."""
    indices = {"rows_ptr": "i64", "picked_ptr": "i64", "arrivals_ptr": "i32"}
    for pointee, bits in (("fp32", 128), ("bf16", 64), ("fp16", 64), ("u8", 32), ("fp64", 128)):
        compute = "fp64" if pointee == "fp64" else "fp32"
        pointers = {"features_ptr": pointee, "theta_ptr": compute, "predictions_ptr": compute, **indices}
        for pick, block in ((True, 256), (True, ONE_PROGRAM_ROWS), (False, 16)):
            warps = block_warps(block)
            sized = {"ROWS": ROWS, "COLUMNS": columns(pointee == "fp64", warps), "BLOCK": block}
            yield Compilation(
                f"bank-{pointee}-{block if pick else 'more'}", bank_kernel, pointers,
                {"PICK": pick, "LARGEST": True, **sized}, warps,
                ones=("stride_column",), multiples=("dim", "stride_row"), load_bits=bits,
            )  # fmt: skip
