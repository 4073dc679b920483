"""DynaMS (ICLR 2023): train on the samples closest to the decision boundary, chosen anew from the whole set every Q epochs."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from adaselect_kernels.boundary import (
    MAX_CLASSES,
    WHAT_TO_PASS,
    boundary_distances,
    last_linear,
    logit_margins,
    pairwise_weight_norms,
)
from adaselect_kernels.checks import selected_count
from adaselect_kernels.functional import select_topk
from adaselect_kernels.models import SlimmableLinear, use_width
from adaselect_kernels.options import require_choice
from adaselect_kernels.samplers.sampler import OrderedSampler, check_row_numbers, require_bool, require_int
from adaselect_kernels.training.batches import move_to
from adaselect_kernels.training.scoring import scoring_pass

SCHEDULES = ("power", "linear", "constant")
REFERENCES = ("predicted", "label")
DISTANCES = ("boundary", "top2_margin", "margin")

Forward = Callable[[nn.Module, Any], Any]


def keep_ratios(schedule: str, budget: float, rounds: int) -> tuple[float, ...]:
    """The keep ratio of each of `rounds` rounds; the first is 1, everything.

    | schedule | keep_k, k = 0, 1, ... |
    |---|---|
    | power | (1 + k)^-r, r >= 0 solved (bisection to 1e-12) so that the mean over the rounds is the budget |
    | linear | 1 - k s, from 1 down, s so that the mean is the budget |
    | constant | 1, then the budget: its mean is above the budget |

    Raises ValueError: a budget outside (0, 1]; "power" with budget <= 1 / rounds, which the first round alone uses up;
    "linear" with budget <= 1/2, where the last ratio would not be above 0; one round and a budget below 1.

    >>> [round(keep, 3) for keep in keep_ratios("linear", 0.6, 3)], keep_ratios("constant", 0.6, 3)
    ([1.0, 0.6, 0.2], (1.0, 0.6, 0.6))
    """
    require_choice("schedule", schedule, SCHEDULES)
    require_int("rounds", rounds)
    selected_count(budget, 1)  # its checks
    if budget == 1.0:
        return (1.0,) * rounds
    if rounds == 1:
        raise ValueError(f"one round trains on everything, so a budget of {budget!r} needs more epochs than one period")
    if schedule == "constant":
        return (1.0, *(float(budget),) * (rounds - 1))
    if schedule == "linear":
        if budget <= 0.5:
            raise ValueError(f"'linear' needs a budget above 0.5: from 1 down to 2 budget - 1 > 0, got {budget!r}")
        return tuple(1.0 - k * 2.0 * (1.0 - budget) / (rounds - 1) for k in range(rounds))
    if budget * rounds <= 1.0:
        raise ValueError(
            f"'power' needs a budget above 1 / rounds = {1 / rounds:g}: the first round keeps 1; got {budget!r}"
        )

    def mean(r: float) -> float:
        return math.fsum((1.0 + k) ** -r for k in range(rounds)) / rounds

    low, high = 0.0, 1.0
    while mean(high) > budget:
        low, high = high, 2.0 * high
    while high - low > 1e-12 and low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if mean(middle) > budget else (low, middle)
    return tuple((1.0 + k) ** -high for k in range(rounds))


class DynaMS(OrderedSampler):
    """Every epoch is the rows kept, once each in random order; every `period` epochs they are chosen anew.

    Round k of K = ceil(epochs / period): keep the k-th of `keep_ratios(schedule, budget, K)` of all rows, those
    closest to the decision boundary by distances that `score` takes over the whole set, ties to the lower row. Round 0
    trains on everything. Before each later round (`needs_scores` says when) call `score(model, loader)`:

        for epoch in range(epochs):
            if sampler.needs_scores:
                sampler.score(model, DataLoader(train_set, batch_size=512))
            for inputs, targets in DataLoader(train_set, batch_sampler=sampler):
                ...
                sampler.observe(losses)

    epochs, period: E and Q of the paper. budget: the mean keep ratio, in (0, 1]; schedule: "power", "linear", "constant".
    reference: "predicted", min_{j != c} (z_c - z_j) / norm(W_c - W_j) with c = argmax z, labels unused; or "label", the same
        with c = y, signed: rows that are wrong are kept first.
    distance: "boundary", the above; or the difference of logits instead, "top2_margin" with reference="predicted",
        "margin" with "label". "boundary" with more than 4096 classes falls back to these and warns.
    class_balanced: keep the ratio within every class, floor(keep n + 0.5) of its n rows and at least one; needs `labels`.
    labels: [rows] ints. Where given, `score` also checks that the targets of its loader are these, in this order.
    rows, batch_size, seed, drop_last: of every sampler. It learns nothing from losses: `observe(None)` will do.

    Starting a round that was not scored, or an epoch after the last one, is a RuntimeError.
    Raises ValueError (a value outside what is accepted, a ratio that keeps no row, labels that are not [rows]), TypeError.

    >>> sampler = DynaMS(rows=8, batch_size=4, epochs=4, period=2, budget=0.75)
    >>> sampler.keep, [len(batch) for batch in sampler], sampler.total_updates
    ((1.0, 0.5), [4, 4], 6)
    """

    name = "dynams"

    def __init__(
        self,
        rows: int | Sized,
        batch_size: int,
        *,
        epochs: int,
        budget: float,
        period: int = 10,
        schedule: str = "power",
        reference: str = "predicted",
        distance: str = "boundary",
        class_balanced: bool = False,
        labels: Tensor | Sequence[int] | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(rows, batch_size, seed=seed, drop_last=drop_last)
        self.epochs, self.period = require_int("epochs", epochs), require_int("period", period)
        self.keep = keep_ratios(schedule, budget, -(-self.epochs // self.period))
        self.budget, self.schedule = float(budget), schedule
        require_choice("reference", reference, REFERENCES)
        require_choice("distance", distance, DISTANCES)
        other = {"predicted": "margin", "label": "top2_margin"}[reference]
        if distance == other:
            raise ValueError(f"distance={distance!r} does not go with reference={reference!r}; see DynaMS")
        self.reference, self.distance = reference, distance
        self.class_balanced = require_bool("class_balanced", class_balanced)
        self.labels = None if labels is None else _checked_labels(labels, self.rows)
        if class_balanced and labels is None:
            raise ValueError("class_balanced=True needs labels, the class of each row [rows], got None")
        self._class_sizes = None if self.labels is None else self.labels.unique(return_counts=True)[1].tolist()
        for k, ratio in enumerate(self.keep):
            if math.floor(ratio * self.rows + 0.5) < 1:
                raise ValueError(
                    f"round {k} keeps {ratio:g} of {self.rows} rows: none; raise the budget or have fewer rounds"
                )
            if self.drop_last and self.kept(k) < self.batch_size:
                raise ValueError(
                    f"round {k} keeps {self.kept(k)} rows, no full batch of {batch_size}: drop_last leaves nothing"
                )
        self._subset = torch.arange(self.rows)
        self._scored = 0  # the round that the subset is for

    # ---- rounds

    @property
    def round(self) -> int:
        """The round of the epoch that comes next, or that a loaded state is in the middle of."""
        return self._next_epoch // self.period

    @property
    def needs_scores(self) -> bool:
        """The next epoch opens a round that keeps less than everything and has not been scored."""
        return self._next_epoch < self.epochs and self._scored < self.round and self.kept(self.round) < self.rows

    @property
    def subset(self) -> Tensor:
        """[M] int64, ascending: the rows kept in the round that was scored last; all rows in round 0."""
        return self._subset.clone()

    @property
    def total_updates(self) -> int:
        """Batches of all epochs together: what a learning-rate schedule counts."""
        return sum(self._batches_of(self.kept(epoch // self.period)) for epoch in range(self.epochs))

    def kept(self, k: int) -> int:
        """Rows that round k trains on."""
        if self.class_balanced:
            assert self._class_sizes is not None
            return sum(selected_count(self.keep[k], n) for n in self._class_sizes)
        return selected_count(self.keep[k], self.rows)

    @property
    def _next_epoch(self) -> int:
        return self._begun - (self._resumed and self._running)

    def __len__(self) -> int:
        if not self._running and self.needs_scores:  # known before it is scored
            return self._batches_of(self.kept(self.round))
        return super().__len__()

    def _epoch_rows(self) -> Tensor:
        epoch, k = self._begun, self._begun // self.period
        if epoch >= self.epochs:
            raise RuntimeError(f"all {self.epochs} epochs that were planned are over")
        if self.kept(k) == self.rows:
            return self.shuffled(torch.arange(self.rows))
        if self._scored != k:
            raise RuntimeError(
                f"round {k} (epochs {k * self.period} to {min(self.epochs, (k + 1) * self.period) - 1}) keeps"
                f" {self.kept(k)} of {self.rows} rows and has no scores:"
                " call sampler.score(model, loader) before the epoch, whenever sampler.needs_scores"
            )
        return self.shuffled(self._subset)

    # ---- scoring

    def score(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        forward: Forward | None = None,
        *,
        weight: Tensor | None = None,
        width: float | None = None,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Distances of the whole set in one pass, and with them the rows of the round that comes next.

        loader: batches of all rows in the order of the training set, without augmentation; their number is checked.
        forward: `forward(model, batch)` -> (logits [b, C], targets [b]), or the logits alone with reference="predicted";
            a Scorer brings its autocast. None: the batch is a pair (inputs, targets).
        weight: [C, d], the last layer's W. None: that of the last nn.Linear, whose output must be the logits themselves, bit
            for bit; of a slimmable one the part that is in use. Distances between its rows are computed once, here.
        width: run a slimmable model at this width (PSP). A "slim" Scorer as `forward` does the same.
        autocast: of the scoring pass. device: where the batches are moved to; None leaves them where the loader put them.

        The pass is in eval mode inside `scoring_pass`: model and random streams are as before, those of the loader's
        generator too. Logits are dropped batch by batch; the first batch has a second forward that looks for W.
        Returns distances [rows] float32 on the logits' device; a row with a NaN distance is kept only if needed.

        Raises, nothing changed: RuntimeError (no round waits for scores), ValueError (rows missing, too many or visibly
        shuffled, no linear last layer and no `weight`, a forward in train mode), TypeError (no logits from `forward`).
        """
        if not self.needs_scores:
            raise RuntimeError(f"no scores are due before epoch {self._next_epoch}: sampler.needs_scores says when")
        _check_order(loader, self.rows)
        if getattr(forward, "mode", "eval") != "eval":
            raise ValueError(f"DynaMS scores in eval mode, the scorer has mode={forward.mode!r}")  # type: ignore[union-attr]
        autocast = getattr(forward, "autocast", None) if autocast is None else autocast
        with (
            scoring_pass(model, autocast=autocast),
            nullcontext() if width is None else use_width(model, width),
            _generator_kept(loader),
        ):
            distances = self._stream(model, loader, forward or _forward_pair, weight, device)
        self._subset = self._closest(distances, self.round)
        self._scored = self.round
        self._replan()
        return distances

    def _stream(
        self, model: nn.Module, loader: Iterable[Any], forward: Forward, weight: Tensor | None, device: Any
    ) -> Tensor:
        distances, norms, own, wrong, seen = torch.empty(0), None, None, torch.zeros(()), 0
        for batch in loader:
            batch = batch if device is None else move_to(batch, torch.device(device))
            if seen == 0 and weight is None and self.distance == "boundary":
                weight = _head_weight(model, forward, batch)
            logits, targets = _logits(forward(model, batch), self.reference)
            if seen == 0:
                distances = torch.empty(self.rows, dtype=torch.float32, device=logits.device)
                norms = self._norms(weight, logits)
                wrong = torch.zeros((), dtype=torch.bool, device=logits.device)
                own = None if self.labels is None else self.labels.to(logits.device)
            stop = seen + logits.shape[0]
            if stop > self.rows:
                raise ValueError(f"the loader gave {stop} rows and has more, the training set has {self.rows}")
            if own is not None and targets is not None:
                wrong = wrong | (targets != own[seen:stop]).any()
            labels = targets if self.reference == "label" else None
            distances[seen:stop] = (
                logit_margins(logits, labels) if norms is None else boundary_distances(logits, norms, labels)
            )
            seen = stop
        if seen != self.rows:
            raise ValueError(
                f"the loader gave {seen} rows, the training set has {self.rows}: it must go through all rows in order"
                " (shuffle=False, drop_last=False)"
            )
        if bool(wrong):
            raise ValueError(
                "the targets of the loader are not `labels` in their order: it must not shuffle or relabel"
            )
        return distances

    def _norms(self, weight: Tensor | None, logits: Tensor) -> Tensor | None:
        """[C, C] norms of W_c - W_j; None where the logits' own margin is to be used."""
        if self.distance != "boundary":
            return None
        classes = logits.shape[1]
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] != classes:
            got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"weight must be [C, d] with C = {classes}, got {got}")
        if classes > MAX_CLASSES:
            instead = "top2_margin" if self.reference == "predicted" else "margin"
            warnings.warn(
                f"{classes} classes are more than {MAX_CLASSES}: the distances are differences of logits ({instead})",
                UserWarning,
                stacklevel=4,
            )
            return None
        return pairwise_weight_norms(weight.to(logits.device))

    def _closest(self, distances: Tensor, k: int) -> Tensor:
        """Rows of the smallest distances, ascending, on the CPU."""
        if not self.class_balanced:
            return select_topk(distances, self.kept(k), largest=False, order="index").cpu()
        assert self.labels is not None
        labels, chosen = self.labels.to(distances.device), []
        for label in self.labels.unique().tolist():
            rows = (labels == label).nonzero()[:, 0]
            count = selected_count(self.keep[k], rows.shape[0])
            chosen.append(rows[select_topk(distances[rows], count, largest=False, order="index")])
        return torch.cat(chosen).sort().values.cpu()

    # ---- state

    def _config(self) -> dict[str, Any]:
        names = ("epochs", "period", "budget", "schedule", "reference", "distance", "class_balanced")
        return {**{name: getattr(self, name) for name in names}, "class_sizes": self._class_sizes}

    def _state(self) -> dict[str, Tensor]:
        return {**super()._state(), "subset": self._subset, "scored": torch.tensor(self._scored)}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        subset, scored = state["subset"], int(state["scored"])
        check_row_numbers(subset, self.rows, "subset")
        if not 0 <= scored < len(self.keep) or subset.shape[0] != self.kept(scored):
            raise ValueError(f"state has a subset of {subset.shape[0]} rows scored for round {scored}")
        if not bool((subset[1:] > subset[:-1]).all()):
            raise ValueError("state has a subset that is not ascending")
        super()._load(state)
        self._subset, self._scored = subset, scored


def _forward_pair(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"without `forward` a batch must be a pair (inputs, targets), got {type(batch).__name__};"
            " give forward=lambda model, batch: (logits, targets)"
        )
    return model(batch[0]), batch[1]


def _logits(result: Any, reference: str) -> tuple[Tensor, Tensor | None]:
    """Logits [b, C] and targets [b] of what forward gave."""
    logits, targets = result if type(result) in (tuple, list) and len(result) == 2 else (result, None)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.dtype.is_floating_point:
        got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"DynaMS needs logits [b, C] and targets [b] from forward, got {got}")
    if reference == "label" and targets is None:
        raise TypeError("reference='label' needs (logits, targets) from forward, got logits alone")
    return logits, None if targets is None else targets.to(logits.device)


def _head_weight(model: nn.Module, forward: Forward, batch: Any) -> Tensor:
    """The weight of the last linear layer as `forward` uses it, after making sure that it makes the logits."""
    layer = last_linear(model)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
        weight = module.active_weight if isinstance(module, SlimmableLinear) else module.weight
        seen.append((weight.detach().clone(), output))  # pyright: ignore[reportArgumentType,reportCallIssue]

    handle = layer.register_forward_hook(look)
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled model would not call the hook
            logits, _ = _logits(forward(model, batch), "predicted")
    finally:
        handle.remove()
    name = next(name for name, module in model.named_modules() if module is layer)
    if len(seen) != 1 or seen[0][1].shape != logits.shape:
        raise ValueError(f"the logits are not the output of the last linear layer ({name}): {WHAT_TO_PASS}")
    weight, output = seen[0]
    if not torch.allclose(output.double(), logits.double(), rtol=0.0, atol=0.0, equal_nan=True):
        raise ValueError(f"the logits are not the output of the last linear layer ({name}) unchanged: {WHAT_TO_PASS}")
    return weight


def _check_order(loader: Any, rows: int) -> None:
    """Raise ValueError for a loader that can be seen to leave out, repeat or shuffle rows."""
    try:
        length = len(loader.dataset)
    except (AttributeError, TypeError):
        length = rows  # not known: counted on the way
    if length != rows:
        raise ValueError(f"the loader's data set has {length} rows, the training set has {rows}")
    batches = getattr(loader, "batch_sampler", None)
    order = loader.sampler if batches is None and hasattr(loader, "sampler") else getattr(batches, "sampler", batches)
    if type(order).__module__.split(".")[0] in ("torch", "adaselect_kernels"):
        name = type(order).__name__
        if not isinstance(order, SequentialSampler) and name != "_InfiniteConstantSampler":  # of an IterableDataset
            raise ValueError(f"the loader draws by {name}: it must go through all rows in order (shuffle=False)")


@contextmanager
def _generator_kept(loader: Any) -> Iterator[None]:
    """A DataLoader draws a seed for its workers from its generator."""
    generator = getattr(loader, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        yield
    finally:
        if isinstance(generator, torch.Generator) and state is not None:
            generator.set_state(state)


def _checked_labels(labels: Tensor | Sequence[int], rows: int) -> Tensor:
    made = labels.detach().cpu() if isinstance(labels, Tensor) else torch.tensor(list(labels))
    if made.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"labels must be ints, got {made.dtype}")
    if made.shape != (rows,):
        raise ValueError(f"labels must be [rows] = [{rows}], got {tuple(made.shape)}")
    return made.to(torch.int64)
