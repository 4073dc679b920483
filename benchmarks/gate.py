"""The correctness gate: what a contender must get right before any time of it is reported.

The oracle is reference.py in float64 on the very inputs that are timed. Contenders of this library are held to the
library's contract: losses within twice the error of the same PyTorch computation plus one rounding, the index set equal
to the oracle's except among rows whose scores differ by less than the error, and equal to the top-k of their own scores,
lower row first among ties. Peers are held to the same losses with the rounding of their output type; what depends on
their own random draw is checked by what must hold for any draw.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from adaselect_kernels import reference
from adaselect_kernels.checks import selected_count
from adaselect_kernels.options import METHODS, STATS, AdaSelectionOptions

CHUNK_ELEMENTS = 1 << 22  # of logits taken to float64 at a time
SAMPLED_ELEMENTS = 1 << 22  # of logits in the rows that a sampled oracle checks
SUM_LANES = 16  # of float32 in the widest vector
FLOAT32_EPS = torch.finfo(torch.float32).eps
CANCELLING_GRAD_NORM = 1e-3  # absolute error of sqrt(sum p^2 - 2 p_y + 1) in float32

Report = dict[str, float]  # what was checked -> the error found


class GateError(AssertionError):
    """A contender's result is wrong: it has no time."""


class RowOracle:
    """float64 statistics of [N, C] logits, computed once, in chunks of rows.

    sampled: of the first and the last rows and of random ones between, SAMPLED_ELEMENTS logits in all, where nothing
    needs every row; `table` then has only those, and `picked` says which. All values are still checked for NaN.
    """

    def __init__(self, logits: Tensor, targets: Tensor, *, sampled: bool = False) -> None:
        self.logits, self.targets, self.picked = logits, targets, None
        n, keep = len(targets), max(64, SAMPLED_ELEMENTS // logits.shape[1])
        if sampled and keep < n:
            ends = torch.arange(keep // 4)
            middle = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: keep // 2]
            self.picked = torch.cat([ends, n - 1 - ends, middle]).unique().to(targets.device)
            self.logits, self.targets = logits[self.picked], targets[self.picked]
        self.n = n

    def of(self, values: Tensor) -> Tensor:
        """The checked ones of [N] values."""
        return values if self.picked is None else values[self.picked]

    @cached_property
    def table(self) -> dict[str, Tensor]:
        """Every statistic of STATS, [N] float64."""
        rows = max(1, CHUNK_ELEMENTS // self.logits.shape[1])
        parts = [
            reference.per_sample_stats(z.double(), y, range(len(STATS)), "sample", -100, 0.0)
            for z, y in zip(self.logits.split(rows), self.targets.split(rows), strict=True)
        ]
        return dict(zip(STATS, torch.cat(parts, dim=1).unbind(0), strict=True))

    @cached_property
    def pytorch_loss_error(self) -> float:
        """Largest error of PyTorch's own cross-entropy in float32 on these rows."""
        rows = max(1, CHUNK_ELEMENTS // self.logits.shape[1])
        parts = [
            F.cross_entropy(z.float(), y, reduction="none")
            for z, y in zip(self.logits.split(rows), self.targets.split(rows), strict=True)
        ]
        return (torch.cat(parts).double() - self.table["loss"]).abs().max().item()


class SelectionOracle:
    """float64 result of the first selection step on `rows`, with a fresh state and the given seed."""

    def __init__(self, rows: RowOracle, methods: Sequence[str], gamma: float, seed: int = 0) -> None:
        self.rows, self.methods, self.gamma, self.seed = rows, tuple(methods), gamma, seed

    @cached_property
    def noise(self) -> Tensor:
        """[N] float32, the Exp(1) variables of the first step."""
        device = self.rows.logits.device
        one = torch.ones((), dtype=torch.float64, device=device)
        return -reference.philox_uniform(len(self.rows.targets), one, self.seed).to(torch.float32).log()

    @cached_property
    def result(self) -> tuple[Tensor, Tensor]:
        """scores [N] float64, method losses [M] float64."""
        losses, grad_norms = self.rows.table["loss"], self.rows.table["grad_norm"]
        m = len(self.methods)
        start = [-math.log(m)] * m + [math.nan] * m + [1.0]
        state = torch.tensor(start, dtype=torch.float64, device=losses.device)
        codes = [METHODS.index(name) for name in self.methods]
        k = selected_count(self.gamma, len(losses))
        options = AdaSelectionOptions().packed
        scores, _ = reference.batch_scores(losses, grad_norms, None, state, codes, k, self.seed, options)
        return scores.double(), state[m : 2 * m]


def require(name: str, error: float, budget: float, report: Report) -> None:
    """Note the error in the report; GateError where it is above the budget."""
    report[name] = error
    if not error <= budget:  # NaN fails
        raise GateError(f"{name}: error {error:.3g}, allowed {budget:.3g}")


def _largest_excess(got: Tensor, expected: Tensor, relative: float) -> float:
    """max of |got - expected| beyond one rounding; NaN where either is, unless both infinities agree."""
    error = torch.where(got == expected, 0.0, (got.double() - expected).abs() - relative * expected.abs())
    return error.max().clamp(min=0).item()


def check_losses(losses: Tensor, oracle: RowOracle) -> Report:
    """[N] losses of any float type against the oracle."""
    if losses.shape != (oracle.n,):
        raise GateError(f"losses have shape {tuple(losses.shape)}, expected {(oracle.n,)}")
    report: Report = {}
    require("losses that are NaN", losses.isnan().sum().item(), 0, report)
    error = _largest_excess(oracle.of(losses), oracle.table["loss"], torch.finfo(losses.dtype).eps)
    require("losses", error, 2 * oracle.pytorch_loss_error + FLOAT32_EPS, report)
    return report


def check_stats(stats: Mapping[str, Tensor], oracle: RowOracle, *, cancelling: bool = False) -> Report:
    """Statistics by name. cancelling: allow grad_norm the error of the form that loses digits (compiled peers)."""
    report: Report = {}
    budget = 2 * oracle.pytorch_loss_error + 8 * FLOAT32_EPS
    for name, every in stats.items():
        if name == "loss":
            report |= check_losses(every, oracle)
            continue
        if every.shape != (oracle.n,):
            raise GateError(f"{name} has shape {tuple(every.shape)}, expected {(oracle.n,)}")
        require(f"{name} that are NaN", every.isnan().sum().item(), 0, report)
        values = oracle.of(every)
        if name == "correct":
            require(name, (values.double() != oracle.table[name]).sum().item(), 0, report)
        else:
            allowed = CANCELLING_GRAD_NORM if cancelling and name == "grad_norm" else budget
            scale = max(1.0, oracle.table[name].nan_to_num(0.0, 0.0, 0.0).abs().max().item())
            error = _largest_excess(values, oracle.table[name], FLOAT32_EPS)
            require(name, error, allowed * scale, report)
    return report


def check_indices(indices: Tensor, k: int, n: int) -> None:
    """Exactly k distinct rows in range."""
    if indices.shape != (k,):
        raise GateError(f"indices have shape {tuple(indices.shape)}, expected {(k,)}")
    ordered = indices.sort().values
    if ordered[0] < 0 or ordered[-1] >= n or (ordered[1:] == ordered[:-1]).any():
        raise GateError("indices are not distinct rows in range")


def check_selection(
    indices: Tensor,
    scores: Tensor,
    losses: Tensor,
    oracle: SelectionOracle,
    *,
    method_losses: Tensor | None = None,
    same_noise: bool = True,
    peer: bool = False,
    cancelling: bool = False,
) -> Report:
    """The first selection step of a fresh state, against an oracle of every row.

    same_noise: the contender drew the oracle's noise, so scores and index set can be compared; else, for any draw,
        the scores must sum to 1 and the method losses of the methods without noise must be the oracle's.
    peer: its k-th best score must separate chosen from left, and its sums may carry the rounding of plain float32 ones
        (n / SUM_LANES additions one after another); else the indices must be those of the contender's own scores,
        ascending, ties to the lower row.
    cancelling: allow gradient norms the error of the form that loses digits (compiled peers).
    """
    n, k = len(oracle.rows.targets), selected_count(oracle.gamma, len(oracle.rows.targets))
    report = check_losses(losses, oracle.rows)
    check_indices(indices, k, n)
    if not peer:
        if not torch.equal(indices, reference.select_topk(scores, k, True, "index")):
            raise GateError("indices are not the top-k of the scores")
    else:
        taken = torch.zeros(n, dtype=torch.bool, device=scores.device).index_fill_(0, indices, True)
        if k < n and scores[~taken].max() > scores[taken].min():
            raise GateError("a row that was left has a better score than one chosen")
    true_scores, true_method_losses = oracle.result
    # an error d of a loss or gradient norm moves its softmax importance by the factor 1 + 2 d
    row_error = CANCELLING_GRAD_NORM if cancelling else 2 * oracle.rows.pytorch_loss_error
    relative = 2 * row_error + (16 + (n / SUM_LANES if peer else math.log2(n))) * FLOAT32_EPS
    if method_losses is not None:
        for name, got, expected in zip(oracle.methods, method_losses.double(), true_method_losses, strict=True):
            if name != "uniform" or same_noise:
                require(
                    f"method loss {name}",
                    abs(got - expected).item(),
                    4 * relative * expected.abs().item() + 1e-6,
                    report,
                )
    if not same_noise:
        require("sum of scores", abs(scores.double().sum().item() - 1), max(1e-3, relative), report)
        return report
    tolerance = relative * true_scores.abs() + 1e-12
    require("scores", ((scores.double() - true_scores).abs() / tolerance).max().item(), 1.0, report)
    best = reference.select_topk(true_scores, k, True, "score")
    differ = torch.ones(n, dtype=torch.bool, device=scores.device)
    differ[best[torch.isin(best, indices)]] = False  # chosen by both
    both_left = torch.ones_like(differ).index_fill_(0, best, False).index_fill_(0, indices, False)
    differ &= ~both_left
    threshold = true_scores[best[-1]]
    far = differ & ((true_scores - threshold).abs() > 2 * (tolerance + relative * threshold.abs()))
    require("rows chosen wrongly", far.sum().item(), 0, report)
    report["near ties"] = differ.sum().item()
    return report


def check_topk(indices: Tensor, scores: Tensor, k: int, *, exact_ties: bool) -> Report:
    """Top-k of [N] scores: the very rows of the contract, ascending, or any rows with the k largest values."""
    check_indices(indices, k, len(scores))
    expected = reference.select_topk(scores, k, True, "index")
    if exact_ties:
        wrong = (indices != expected).sum().item()
    else:
        wrong = (scores[indices].sort().values != scores[expected].sort().values).sum().item()
    report: Report = {}
    require("rows chosen wrongly", wrong, 0, report)
    return report
