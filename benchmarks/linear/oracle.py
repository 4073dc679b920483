"""The float64 oracle of a linear problem, and what every contender must get right before it is timed.

Losses and statistics on sampled rows; the loss over all its rows; the gradient of sampled rows and of sampled classes, element
by element, relative to the largest of them.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gate
from benchmarks.linear.contenders import LOSS_ONLY, ROLES
from benchmarks.linear.problem import Inputs, Problem

SAMPLED = 128  # rows, and classes
CHUNK_ELEMENTS = 1 << 24  # of logits in float64 at a time
OURS_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}  # of a gradient, relative to the largest sampled
PEER_ERROR = {"float32": 1e-3, "bfloat16": 5e-2}
SCORE_SUM_ERROR = 1e-3


def _sample(rows: Tensor) -> Tensor:
    """The first and the last of `rows` and some between: at most SAMPLED."""
    return rows[torch.linspace(0, len(rows) - 1, min(SAMPLED, len(rows)), device=rows.device).long().unique()]


class ScoreOracle(gate.RowOracle):
    """Statistics of sampled rows; the error that PyTorch's is held to is that of the unfused computation in the type of the
    inputs, or the rounding of the largest logit to float32 if that is more."""

    def __init__(self, inputs: Inputs) -> None:
        hidden, weight, targets, _ = inputs
        self.n = len(targets)
        self.picked = _sample(torch.arange(self.n, device=targets.device))
        self.targets = targets[self.picked]
        self._hidden, self._weight = hidden[self.picked], weight
        self.logits = self._hidden.double() @ weight.double().T

    @cached_property
    def pytorch_loss_error(self) -> float:
        unfused = F.cross_entropy(F.linear(self._hidden, self._weight).float(), self.targets, reduction="none")
        rounding = gate.FLOAT32_EPS * self.logits.abs().max().item()
        return max(rounding, (unfused.double() - self.table["loss"]).abs().max().item())


def check_score(name: str, found: Sequence[Tensor], oracle: ScoreOracle) -> gate.Report:
    """What a contender of kind "score" returned."""
    if name == "stats":
        return gate.check_stats({"loss": found[0], "grad_norm": found[1]}, oracle)
    report = gate.check_losses(found[0], oracle)
    if name in LOSS_ONLY:
        return report
    _, scores, indices = found
    report |= gate.check_topk(indices, scores, len(indices), exact_ties=name == "ours")
    gate.require("sum of scores", abs(scores.double().sum().item() - 1), SCORE_SUM_ERROR, report)
    return report


class LossOracle:
    """Mean cross-entropy over `rows` [k] and its gradients, float64, without more logits than CHUNK_ELEMENTS at a time."""

    def __init__(self, problem: Problem, inputs: Inputs, rows: Tensor) -> None:
        self.problem, self.inputs, self.rows = problem, inputs, rows
        self.y = inputs.targets[rows]

    def logits(self, rows: Tensor) -> Tensor:
        hidden, weight = self.inputs.hidden[rows].double(), self.inputs.weight
        return hidden if self.problem.kind == "stored" else hidden @ weight.double().T

    @cached_property
    def lse(self) -> Tensor:
        step = max(1, CHUNK_ELEMENTS // self.problem.classes)
        return torch.cat([self.logits(rows).logsumexp(1) for rows in self.rows.split(step)])

    @cached_property
    def loss(self) -> Tensor:
        if self.problem.kind == "stored":
            target_logits = self.inputs.hidden[self.rows, self.y].double()
        else:
            target_logits = torch.linalg.vecdot(
                self.inputs.hidden[self.rows].double(), self.inputs.weight[self.y].double()
            )
        return (self.lse - target_logits).mean()

    @cached_property
    def picked(self) -> Tensor:
        """Places of `rows` whose gradient is compared."""
        return _sample(torch.arange(len(self.rows), device=self.rows.device))

    @cached_property
    def row_gradients(self) -> Tensor:
        """Those of the picked rows, for the hidden states (or the stored logits)."""
        p = (self.logits(self.rows[self.picked]) - self.lse[self.picked, None]).exp()
        p[torch.arange(len(p), device=p.device), self.y[self.picked]] -= 1
        p /= len(self.rows)
        return p if self.problem.kind == "stored" else p @ self.inputs.weight.double()

    @cached_property
    def classes(self) -> Tensor:
        """Some anywhere, and the targets of the picked rows."""
        every = _sample(torch.arange(self.problem.classes, device=self.y.device))
        return torch.cat([every, self.y[self.picked]]).unique()

    @cached_property
    def class_gradients(self) -> Tensor:
        """Those of the weight's sampled classes."""
        hidden, weight = self.inputs.hidden[self.rows].double(), self.inputs.weight[self.classes].double()
        p = (hidden @ weight.T - self.lse[:, None]).exp() - (self.y[:, None] == self.classes).double()
        return p.T @ hidden / len(self.rows)


def check_loss(name: str, found: Sequence[Tensor], oracle: LossOracle) -> gate.Report:
    """What a contender of another kind returned: the loss and its gradients."""
    loss, rows_gradient, *weight_gradient = found
    allowed = (OURS_ERROR if ROLES.get(name) == "ours" else PEER_ERROR)[oracle.problem.dtype]
    report: gate.Report = {}
    gate.require("loss", (abs(loss.double() - oracle.loss) / oracle.loss.abs()).item(), allowed, report)
    _compare("row gradients", rows_gradient[oracle.rows[oracle.picked]], oracle.row_gradients, allowed, report)
    left = torch.ones(len(rows_gradient), dtype=torch.bool, device=loss.device).index_fill_(0, oracle.rows, False)
    others = rows_gradient[left]
    gate.require("gradient of other rows", others.abs().max().item() if len(others) else 0.0, 0.0, report)
    for gradient in weight_gradient:
        _compare("class gradients", gradient[oracle.classes], oracle.class_gradients, allowed, report)
    return report


def _compare(what: str, got: Tensor, expected: Tensor, allowed: float, report: gate.Report) -> None:
    gate.require(what, ((got.double() - expected).abs().max() / expected.abs().max()).item(), allowed, report)
