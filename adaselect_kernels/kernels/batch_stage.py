"""Scores of a batch from its losses (AdaSelection, equations 2 to 6), and the baselines' keys; the state is updated here.

A batch takes three steps: moments of the losses, sums of the components, then the scores. Up to ONE_PROGRAM_ROWS rows one
program does all three (batch_small.py); beyond, one launch has a step of many programs for each
(batch_large.py), and batch_choices.py has what a method alone would choose.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adaselect_kernels.kernels.batch_choices import (
    MOVE_BLOCK,
    MOVE_WARPS,
    baseline_choice,
    choose_coreset1,
    copy_rows_kernel,
    strike_kernel,
)
from adaselect_kernels.kernels.batch_large import (
    LARGE,
    Steps,
    chosen_loss,
    chosen_loss_kernel,
    large_kernel,
    run_steps,
    step_flags,
)
from adaselect_kernels.kernels.batch_small import batch_kernel, one_program
from adaselect_kernels.kernels.batch_terms import CORESET1, NO_OPTIONS, Plan, Rows, make_plan
from adaselect_kernels.kernels.runtime import Compilation, launch_device
from adaselect_kernels.kernels.select import ALL_ROWS_RANKED, ONE_PROGRAM_ROWS, block_warps, sort_chosen
from adaselect_kernels.options import METHODS, PackedOptions


def many_programs(
    rows: Rows, state: Tensor | None, plan: Plan, k: int, select: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores, number of valid rows and, when `select`, the chosen rows in ascending order, of any batch."""
    losses = rows.losses
    n, device = losses.shape[0], losses.device
    scores = torch.empty(n, dtype=torch.float32, device=device)
    n_valid = torch.empty((), dtype=torch.int64, device=device)
    out = {"scores": scores, "n_valid": n_valid}
    key_method = plan.methods[0] if plan.baseline else -1
    last = Steps(True, not plan.baseline, True, key_method, final=True, select=select)
    with launch_device(losses):
        if plan.selected:
            summary, _ = run_steps(rows, state, plan, Steps(moments=True), k, seed)
            given = torch.empty(len(plan.methods), dtype=torch.float64, device=device)
            for i, method in enumerate(plan.methods):
                chosen_loss(rows, baseline_choice(rows, method, summary, k, seed), given[i])
            last = replace(last, moments=False, given=True)
            _, indices = run_steps(rows, state, plan, last, k, seed, summary=summary, given=given, **out)
        else:
            _, indices = run_steps(rows, state, plan, last, k, seed, **out)
    return scores, n_valid, indices


def score_rows(
    rows: Rows, state: Tensor | None, methods: Sequence[int], k: int, order: str | None, seed: int,
    options: Sequence[float], out_losses: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Scores, number of valid rows and (unless `order` is None) indices, by the path the batch calls for.

    `out_losses` [N] float32 receives the losses when it is given.
    """
    plan = make_plan(methods, state is not None, options)
    if rows.grads is not None and not plan.has_grad:
        rows = replace(rows, grads=None)
    both_ends = plan.baseline and methods[0] == CORESET1.value
    small = rows.losses.shape[0] <= ONE_PROGRAM_ROWS and not plan.selected
    if small:
        inner_order = None if both_ends else order
        scores, n_valid, indices = one_program(rows, state, plan, k, inner_order, seed, out_losses)
    else:
        select = order is not None and not both_ends
        scores, n_valid, indices = many_programs(rows, state, plan, k, select, seed)
        if out_losses is not None:
            out_losses.copy_(rows.losses)
    if order is None:
        return scores, n_valid, None
    if both_ends:
        indices = choose_coreset1(rows, scores, k, order, seed)
    elif not small and order == "score" and k > 1:
        assert indices is not None
        with launch_device(scores):
            indices = sort_chosen(scores, indices, True)
    return scores, n_valid, indices


def batch_scores(
    losses: Tensor, grad_norms: Tensor | None, valid: Tensor | None, state: Tensor | None, methods: Sequence[int],
    k: int, seed: int, options: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = Rows(losses, grad_norms, None if valid is None else valid.view(torch.uint8), 0)
    scores, n_valid, _ = score_rows(rows, state, methods, k, None, seed, options)
    return scores, n_valid


def select_from_losses(
    losses: Tensor, grad_norms: Tensor | None, state: Tensor | None, methods: Sequence[int], k: int, order: str,
    seed: int, options: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scores, n_valid, indices = score_rows(Rows(losses, grad_norms, None, 0), state, methods, k, order, seed, options)
    assert indices is not None
    return indices, scores, n_valid


_EVERY_METHOD = tuple(range(len(METHODS)))
_DEFAULT_METHODS = (0, 1, 6)
_HARDEST = PackedOptions(1.0, 1.0, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0)  # standardize, log_ratio, floor, rms curriculum
_DEFAULTS = PackedOptions(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, math.nan, 0.0)
SHIPPED_PLANS = {  # the lightest code and the heaviest, which everything else lies between, and a baseline
    "default": make_plan(_DEFAULT_METHODS, True, _DEFAULTS),
    "every": make_plan(_EVERY_METHOD, True, _HARDEST),
    "baseline": make_plan((CORESET1.value,), True, NO_OPTIONS),
}


def shipped() -> Iterator[Compilation]:
    """Every block size of the one-program batch and every step of the large one, for float32 and float64 losses."""
    large = LARGE[2**31]
    for pointee in ("fp32", "fp64"):
        inputs = {"losses_ptr": pointee, "grads_ptr": pointee, "valid_ptr": "i64"}
        ones = ("stride_loss", "stride_grad", "valid_inner", "stride_valid_outer")
        for name, plan in SHIPPED_PLANS.items():
            row_flags = {"HAS_GRAD": plan.has_grad, "HAS_VALID": True}
            for block in (ALL_ROWS_RANKED.value, 1024, ONE_PROGRAM_ROWS):
                yield Compilation(
                    f"batch-{pointee}-{name}-{block}", batch_kernel,
                    inputs | {
                        "state_ptr": "fp64", "scores_ptr": "fp32", "n_valid_ptr": "i64", "indices_ptr": "i64",
                        "out_losses_ptr": "fp32",
                    },
                    row_flags | plan.flags | {
                        "SELECT": True, "BY_SCORE": block <= ALL_ROWS_RANKED.value, "COPY_LOSSES": pointee == "fp64",
                        "BLOCK": block,
                    }, block_warps(block), ones=ones,
                )  # fmt: skip
            sized = {"BLOCK": large.block, "MAX_PROGRAMS": large.programs}
            key_method = plan.methods[0] if plan.baseline else -1
            whole = Steps(True, not plan.baseline, True, key_method, final=True, select=True)
            parts = {"large": whole}
            if name == "every":
                # the losses of the rows each method alone chooses come between the moments and the sums
                parts["moments"] = Steps(moments=True)
                parts["key"] = Steps(scores=True, key_method=METHODS.index("adaboost"))
                parts["given"] = replace(whole, moments=False, given=True)
            for part, steps in parts.items():
                yield Compilation(
                    f"{part}-{pointee}-{name}", large_kernel,
                    inputs | {
                        "state_ptr": "fp64", "given_ptr": "fp64", "summary_ptr": "fp64", "counters_ptr": "i32",
                        "scores_ptr": "fp32", "n_valid_ptr": "i64", "search_ptr": "i64", "table_ptr": "i32",
                        "indices_ptr": "i64",
                    },
                    row_flags | sized | step_flags(plan, steps), large.warps, ones=ones,
                )  # fmt: skip
        yield Compilation(
            f"chosen-{pointee}", chosen_loss_kernel,
            inputs | {"chosen_ptr": "i64", "partials_ptr": "fp64", "arrivals_ptr": "i32", "mean_ptr": "fp64"},
            {"HAS_GRAD": True, "HAS_VALID": True, **sized}, large.warps, ones=ones,
        )  # fmt: skip
        yield Compilation(
            f"strike-{pointee}",
            strike_kernel,
            {"keys_ptr": pointee, "chosen_ptr": "i64"},
            {"BLOCK": MOVE_BLOCK},
            MOVE_WARPS,
        )
    yield Compilation(
        "copy-rows", copy_rows_kernel, {"from_ptr": "fp32", "to_ptr": "fp32", "chosen_ptr": "i64"},
        {"BLOCK": MOVE_BLOCK}, MOVE_WARPS,
    )  # fmt: skip
