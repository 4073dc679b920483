"""Rows that one method alone chooses, of a batch of any size: what method_loss="selected" looks at, and coreset1's choice."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaselect_kernels.kernels.batch_large import Steps, run_steps
from adaselect_kernels.kernels.batch_terms import CORESET1, NO_OPTIONS, Rows, make_plan
from adaselect_kernels.kernels.runtime import Launch, cached, ceil_div, launch_device
from adaselect_kernels.kernels.select import select_topk
from adaselect_kernels.options import METHODS


@triton.jit(do_not_specialize=["k"])
def strike_kernel(keys_ptr, chosen_ptr, k, BLOCK: tl.constexpr):
    """NaN, after every other key, in the rows `chosen` [k]."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(chosen_ptr + position, mask=position < k, other=0)
    tl.store(keys_ptr + rows, tl.full([BLOCK], float("nan"), keys_ptr.dtype.element_ty), mask=position < k)


@triton.jit(do_not_specialize=["k"])
def copy_rows_kernel(from_ptr, to_ptr, chosen_ptr, k, BLOCK: tl.constexpr):
    """to[row] = from[row] for the rows `chosen` [k]."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(chosen_ptr + position, mask=position < k, other=0)
    tl.store(to_ptr + rows, tl.load(from_ptr + rows, mask=position < k, other=0.0), mask=position < k)


MOVE_BLOCK, MOVE_WARPS = 1024, 4


def _key(rows: Rows, method: str, summary: Tensor, seed: int) -> Tensor:
    """Baseline key [N] of one method, -inf on invalid rows."""
    code = METHODS.index(method)
    dtype = torch.float64 if rows.losses.dtype == torch.float64 else torch.float32
    key = torch.empty(rows.losses.shape[0], dtype=dtype, device=rows.losses.device)
    steps = Steps(scores=True, key_method=code)
    run_steps(rows, None, make_plan((code,), False, NO_OPTIONS), steps, 0, seed, summary=summary, scores=key)
    return key


def baseline_choice(rows: Rows, method: int, summary: Tensor, k: int, seed: int) -> Tensor:
    """[k] rows that `method` alone chooses, in no particular order."""
    if method != CORESET1.value:
        return select_topk(_key(rows, METHODS[method], summary, seed), k, True, "index")
    # ceil(k/2) largest losses, then floor(k/2) smallest of the others
    largest = select_topk(_key(rows, "big_loss", summary, seed), k - k // 2, True, "index")
    if k == 1:
        return largest
    key = _key(rows, "small_loss", summary, seed)
    _move_launch(strike_kernel, k - k // 2)(key, largest)
    return torch.cat([largest, select_topk(key, k // 2, True, "index")])


@cached
def _move_launch(kernel, k: int) -> Launch:
    return Launch(kernel, (ceil_div(k, MOVE_BLOCK),), (k,), {"BLOCK": MOVE_BLOCK}, MOVE_WARPS)


def choose_coreset1(rows: Rows, scores: Tensor, k: int, order: str, seed: int) -> Tensor:
    """Both ends of the losses: the k rows coreset1 alone chooses, ordered by row or by `scores`."""
    plan = make_plan((CORESET1.value,), False, NO_OPTIONS)
    with launch_device(rows.losses):
        summary, _ = run_steps(rows, None, plan, Steps(moments=True), k, seed)
        chosen = baseline_choice(rows, CORESET1.value, summary, k, seed)
        # scores of the chosen rows, NaN (after every number) elsewhere
        masked = torch.full_like(scores, math.nan)
        _move_launch(copy_rows_kernel, k)(scores, masked, chosen)
    return select_topk(masked, k, True, order)
