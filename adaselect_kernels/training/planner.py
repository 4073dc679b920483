"""What a way of selecting will cost, measured on the user's own model before training: time ratio, break-even, PSP.

The cost model: a forward F, a backward 2F, a scoring forward s F; time over training on everything = (s + 3 gamma) / 3.
"""

import copy
import math
import numbers
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaselect_kernels.checks import selected_count
from adaselect_kernels.policies import Policy, get_policy
from adaselect_kernels.training.batches import count_rows, take_rows
from adaselect_kernels.training.files import replace_file
from adaselect_kernels.training.refill import _choose
from adaselect_kernels.training.scorers import (
    Forward,
    FullForward,
    Scorer,
    forward_pair,
    median_seconds,
    training_forward,
)
from adaselect_kernels.training.scoring import random_streams_kept, scoring_pass

Loss = Callable[[nn.Module, Any], Tensor]


class PlanWarning(UserWarning):
    """A setting that cannot save time."""


class PSP(NamedTuple):
    """The parameter-sharing proxy saves arithmetic over full scoring only if left < right."""

    left: float  # Q * keep
    right: float  # (1 - rho) / (3 rho)

    @property
    def saves(self) -> bool:
        return self.left < self.right


@dataclass(frozen=True)
class Plan:
    """Seconds of one batch of `rows` rows, and what follows from them. Made by `plan`.

    forward, backward, update: of a training step on all rows (update: the optimizer, 0 where none was given).
    scoring, selection: of a candidate batch: the scoring pass; choosing and gathering k = floor(gamma rows + 0.5) rows.
    draw: of a sampler, for as many rows as the batch has. epochs_per_score: Q, the epochs that one scoring serves.
    rho: cost of the slim path over the full one, None without PSP; with it every step trains both widths, 1 + rho.
    policy, scorer, sampler: names, None where there is none. device: where the model is. repeats: turns of the medians.
    """

    rows: int
    gamma: float
    forward: float
    backward: float
    update: float
    scoring: float
    selection: float
    draw: float = 0.0
    epochs_per_score: int = 1
    rho: float | None = None
    policy: str | None = None
    scorer: str | None = None
    sampler: str | None = None
    device: str = "cpu"
    repeats: int = 1

    @property
    def share(self) -> float:
        """s: a scoring pass over a forward in training mode."""
        return self.scoring / self.forward

    @property
    def train(self) -> float:
        """Seconds of a training step on all rows: what everything is compared with."""
        return self.forward + self.backward + self.update

    @property
    def fixed(self) -> float:
        """Seconds of scoring and selection for each candidate batch, whatever is chosen."""
        return (self.scoring + self.selection) / self.epochs_per_score

    @property
    def per_trained(self) -> float:
        """Seconds for `rows` rows that are trained on."""
        return (self.forward + self.backward) * (1.0 + (self.rho or 0.0)) + self.update + self.draw

    def formula(self, gamma: float) -> float:
        """(s / Q + 3 gamma (1 + rho)) / 3: the cost model, with the share s measured and nothing else."""
        return (self.share / self.epochs_per_score + 3.0 * gamma * (1.0 + (self.rho or 0.0))) / 3.0

    def measured(self, gamma: float) -> float:
        """((scoring + selection) / Q + gamma ((forward + backward) (1 + rho) + update + draw)) / train."""
        return (self.fixed + gamma * self.per_trained) / self.train

    @property
    def time_ratio(self) -> float:
        """Predicted time over that of training on everything, with the measured terms."""
        return self.measured(self.gamma)

    @property
    def formula_ratio(self) -> float:
        return self.formula(self.gamma)

    @property
    def break_even(self) -> float | None:
        """The gamma at which `measured` is 1: below it time is saved. None when scoring and selection alone cost it all."""
        left = self.train - self.fixed
        return left / self.per_trained if left > 0 else None

    @property
    def psp(self) -> PSP | None:
        if self.rho is None:
            return None
        return PSP(self.epochs_per_score * self.gamma, (1.0 - self.rho) / (3.0 * self.rho))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why this setting cannot save time; empty when it can."""
        found = []
        if self.break_even is None:
            found.append(
                f"scoring and selection alone cost {self.fixed / self.train:.2f} of training on everything: no gamma saves"
                " time; use a cheaper scorer (lower resolution, slim, stale) or a sampler, which needs none"
            )
        elif self.time_ratio >= 1.0:
            found.append(
                f"gamma = {self.gamma:g} saves no time: {self.time_ratio:.2f} of training on everything is predicted,"
                f" and the break-even is gamma = {self.break_even:.2f}"
            )
        if self.psp is not None and not self.psp.saves:
            found.append(
                f"the slim proxy costs more than scoring with the full forward: Q * keep = {self.psp.left:.3g} is not"
                f" below (1 - rho) / (3 rho) = {self.psp.right:.3g}; score more often, keep less, or use the forward"
            )
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """Plain values: the fields and what follows from them, for JSON."""
        psp = self.psp
        return asdict(self) | {
            "share": self.share,
            "formula_ratio": self.formula_ratio,
            "time_ratio": self.time_ratio,
            "break_even": self.break_even,
            "psp": None if psp is None else {"left": psp.left, "right": psp.right, "saves": psp.saves},
            "warnings": list(self.warnings),
        }

    @property
    def title(self) -> str:
        names = [f"{kind} {name!r}" for kind in ("sampler", "policy", "scorer") if (name := getattr(self, kind))]
        every = "" if self.epochs_per_score == 1 else f", scored every {self.epochs_per_score} epochs"
        return f"{', '.join(names)}, gamma {self.gamma:g}{every}, {self.rows} rows on {self.device}"

    def table(self) -> str:
        """The plan as plain text."""
        parts = [
            ("forward, training mode", self.forward, ""),
            ("backward", self.backward, ""),
            ("optimizer", self.update, "" if self.update else "not measured: no optimizer given"),
        ]
        if self.scorer is not None:
            parts.append(("scoring", self.scoring, "the share s"))
        if self.policy is not None:
            parts.append(("selection", self.selection, ""))
        if self.sampler is not None:
            parts.append(("drawing", self.draw, ""))
        lines = [f"Plan: {self.title}", "  milliseconds, median" + " " * 7 + "over the forward"]
        for name, seconds, remark in parts:
            lines.append(f"  {name:<22}{1e3 * seconds:>10.3f}{seconds / self.forward:>12.3f}   {remark}".rstrip())
        lines.append("  time over that of training on everything")
        formula = (
            "(s + 3 gamma) / 3" if self.epochs_per_score == 1 and self.rho is None else "(s/Q + 3 gamma (1+rho)) / 3"
        )
        break_even = "none" if self.break_even is None else f"{self.break_even:.3f}"
        for name, value in (
            (f"cost model, {formula}", f"{self.formula_ratio:.3f}"),
            ("with the measured terms", f"{self.time_ratio:.3f}"),
            ("break-even gamma", break_even),
        ):
            lines.append(f"    {name:<42}{value:>8}")
        if self.psp is not None:
            holds = "holds" if self.psp.saves else "does not hold"
            lines.append(f"    PSP: Q keep = {self.psp.left:.3g} < (1 - rho) / (3 rho) = {self.psp.right:.3g} {holds}")
        lines += [f"  WARNING: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def figure(self, path: str | Path) -> None:
        """Draw the predicted time ratio over gamma to `path` (its suffix says the format); needs matplotlib."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        ends = [0.0, 1.0]
        top = max(1.0, self.measured(1.0), self.formula(1.0)) * 1.08
        axes.axhline(1.0, color="#000000", linewidth=1.2)
        axes.annotate("training on everything", (0.0, 1.0), xytext=(5, 4), textcoords="offset points", fontsize=9)
        axes.plot(ends, [self.measured(g) for g in ends], color="#0072B2", linewidth=2.2, label="measured terms")
        axes.plot(
            ends, [self.formula(g) for g in ends], color="#E69F00", linestyle="--", label="cost model, s measured"
        )
        if self.break_even is not None:
            axes.axvspan(0.0, min(self.break_even, 1.0), color="#009E73", alpha=0.10, linewidth=0)
            axes.axvline(
                self.break_even, color="#009E73", linestyle=":", label=f"break-even, gamma = {self.break_even:.2f}"
            )
        axes.plot(
            [self.gamma],
            [self.time_ratio],
            "o",
            color="#D55E00",
            markersize=9,
            label=f"gamma = {self.gamma:g}: {self.time_ratio:.2f} of the time",
        )
        axes.set(
            xlim=(0, 1), ylim=(0, top), xlabel="gamma, share of the rows trained on", ylabel="predicted time ratio"
        )
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        figure.suptitle(f"Time over that of training on everything\n{self.title}", fontsize=10)
        path = Path(path)
        with matplotlib.rc_context({"svg.hashsalt": "adaselect"}):
            replace_file(path, lambda file: figure.savefig(file, format=path.suffix[1:] or "png", dpi=120))


def cross_entropies(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy [N] of a batch (inputs, targets): the loss where none is given."""
    logits, targets = forward_pair(model, batch)
    return F.cross_entropy(logits, targets, reduction="none")


def plan(
    model: nn.Module,
    batch: Any,
    gamma: float,
    scorer: Scorer | Forward | None = None,
    *,
    policy: Policy | str | None = None,
    sampler: Any = None,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    epochs_per_score: int | None = None,
    rho: float | None = None,
    repeats: int = 7,
) -> Plan:
    """Measure a training step and a selection on `batch`, and predict what training with selection costs.

    batch: a candidate batch as training sees it, on the device of the model. gamma: share of its rows trained on, (0, 1].
    scorer: what judges the rows (`get_scorer`), or a function as `SelectedBatches` takes; None: the full forward.
    policy: what chooses, a policy of rate gamma or a name for `get_policy`; default "adaselection".
    sampler: instead of a policy, one of `samplers` that chooses before loading: its draws and its learning are timed, and no
        scoring unless a scorer is given or the sampler scores the whole set (DynaMS, by the full forward).
    loss: `loss(model, batch)`, per-sample losses [N] or a scalar; None: cross-entropy of a pair (inputs, targets).
    optimizer: timed on a throw-away copy of itself and its parameters; None: the update is not counted.
    epochs_per_score: Q, epochs that one scoring serves; default 1, or the period of a DynaMS sampler.
    rho: of PSP, cost of the slim forward over the full one; default with the scorer "slim": its measured share. Every step
        is then counted (1 + rho) times, as it trains both widths; `loss` must be that of the full width alone.
    repeats: turns; all parts take turns, the medians are kept, two turns go before. More of them help on a busy machine.

    Parameters, gradients, buffers, the optimizer, policy, sampler and random streams are bit for bit as before. A model in
    evaluation mode is measured in training mode. Warns (PlanWarning) when the setting cannot save time: `Plan.warnings`.

    Raises ValueError, TypeError: gamma outside (0, 1], a policy of another gamma, policy beside sampler, repeats or
    epochs_per_score below 1, rho not above 0, no parameter to train, an optimizer whose step needs a closure.

    >>> batch = torch.randn(64, 8), torch.randint(3, (64,))
    >>> made = plan(nn.Linear(8, 3), batch, gamma=0.1, policy="big_loss", repeats=1)
    >>> made.policy, made.rows, made.formula_ratio == (made.share + 3 * 0.1) / 3
    ('big_loss', 64, True)
    """
    rows = count_rows(batch)
    selected_count(gamma, rows)
    if policy is not None and sampler is not None:
        raise ValueError("a policy chooses after a scoring forward, a sampler before loading: give one of them")
    if isinstance(policy, Policy) and policy.config.gamma != gamma:
        raise ValueError(f"the policy has gamma = {policy.config.gamma!r}, the plan is for {gamma!r}")
    every = getattr(sampler, "period", 1) if epochs_per_score is None else epochs_per_score
    for name, value in (("epochs_per_score", every), ("repeats", repeats)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    if rho is not None and (isinstance(rho, bool) or not isinstance(rho, numbers.Real) or not 0.0 < rho < math.inf):
        raise ValueError(f"rho must be a number above 0, got {rho!r}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no parameter that requires a gradient: there is no training to plan")
    if sampler is None:
        policy = (
            get_policy(policy or "adaselection", gamma) if not isinstance(policy, Policy) else copy.deepcopy(policy)
        )
        scorer = FullForward() if scorer is None else scorer
    elif scorer is None and hasattr(sampler, "needs_scores"):
        scorer = FullForward() if loss is None else loss  # only timed
    seconds = _measure(model, batch, scorer, policy, loss or cross_entropies, optimizer, repeats)
    slim = isinstance(scorer, Scorer) and scorer.name == "slim"
    made = Plan(
        rows=rows,
        gamma=float(gamma),
        **seconds,
        draw=0.0 if sampler is None else _seconds_of_draws(sampler, repeats) * rows / sampler.batch_size,
        epochs_per_score=every,
        rho=seconds["scoring"] / seconds["forward"] if slim and rho is None else rho,
        policy=policy.name if isinstance(policy, Policy) else None,
        scorer=None if scorer is None else scorer.name if isinstance(scorer, Scorer) else "forward",
        sampler=None if sampler is None else sampler.name,
        device=str(next(model.parameters()).device),
        repeats=repeats,
    )
    for warning in made.warnings:
        warnings.warn(warning, PlanWarning, stacklevel=2)
    return made


def _measure(
    model: nn.Module,
    batch: Any,
    scorer: Any,
    policy: Any,
    loss: Loss,
    optimizer: torch.optim.Optimizer | None,
    repeats: int,
) -> dict[str, float]:
    """Median seconds by part; what one part makes the next one uses, as in a training loop."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    made: dict[str, Any] = {}

    def forward() -> None:
        made["loss"] = loss(model, batch).mean()

    def backward() -> None:
        torch.autograd.grad(made.pop("loss"), parameters, allow_unused=True)

    def score() -> None:
        mode, autocast = (scorer.mode, scorer.autocast) if isinstance(scorer, Scorer) else ("eval", None)
        with scoring_pass(model, mode=mode, autocast=autocast):
            made["scores"] = scorer(model, batch) if policy is None else policy.score(model, batch, scorer)

    def select() -> None:
        with torch.no_grad():
            take_rows(batch, _choose(policy, made.pop("scores")).indices)

    parts: dict[str, Callable[[], object]] = {"forward": forward, "backward": backward}
    if optimizer is not None:
        parts["update"] = _update_of_a_copy(optimizer)
    if scorer is not None:
        parts["scoring"] = score
    if policy is not None:
        parts["selection"] = select
    with training_forward(model):
        medians = median_seconds(*parts.values(), repeats=repeats)
    return {"update": 0.0, "scoring": 0.0, "selection": 0.0} | dict(zip(parts, medians, strict=True))


def _update_of_a_copy(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    trial = copy.deepcopy(optimizer)
    for group in trial.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def update() -> None:
        try:
            trial.step()
        except TypeError as error:
            raise ValueError(
                f"cannot time the step of {type(optimizer).__name__} ({error}): leave optimizer out"
            ) from error

    return update


def _seconds_of_draws(sampler: Any, repeats: int) -> float:
    """Seconds for a batch drawn and learned from, on a copy, with the epoch's preparation spread over its batches."""
    with random_streams_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the losses that it is told are made up
        _times_of_draws(_copy_before_the_first_epoch(sampler), repeats)  # the first time is not counted
        trial = _copy_before_the_first_epoch(sampler)
        times = _times_of_draws(trial, repeats)
    typical = median(times[1:] or times)
    return typical + max(times[0] - typical, 0.0) / len(trial)


def _copy_before_the_first_epoch(sampler: Any) -> Any:
    """A copy that knows what the sampler knows, with no epoch behind it: the next one might need scores or losses first."""
    own = vars(sampler)
    shared = {id(v): v for name, v in own.items() if isinstance(v, nn.Module) or name in ("features", "labels")}
    trial = copy.deepcopy(sampler, shared)
    trial._begun = trial._planned = trial._emitted = trial._told = 0
    trial._in_flight.clear()
    trial._resumed, trial._prepared = False, None
    return trial


def _times_of_draws(sampler: Any, most: int) -> list[float]:
    """Seconds of each of the first batches of an epoch, 1 + `most` at most."""
    times: list[float] = []
    batches = iter(sampler)
    while len(times) <= most:
        start = time.perf_counter()
        rows = next(batches, None)
        if rows is None:
            break
        drawn = time.perf_counter() - start
        losses = torch.linspace(0.5, 1.5, len(rows))
        start = time.perf_counter()
        sampler.observe(losses)
        times.append(drawn + time.perf_counter() - start)
    return times
