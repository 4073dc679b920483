"""What every sampler is: a batch sampler for any DataLoader that is told, batch after batch, the losses it led to."""

import collections
import math
import time
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Sampler

from adaselect_kernels.record import StepRecord
from adaselect_kernels.state import check_seed

_FORMAT = 1
_KEYS = {"format", "sampler", "config", "counts", "loss_chosen", "generator", "in_flight", "state"}
_COUNTS = ("begun", "planned", "emitted", "told", "step", "chosen")
_BATCH_KEYS = {"rows", "weights", "note"}


@dataclass
class Batch:
    """A batch that was drawn. rows [b] int64; weights [b] float32 of the losses, None all one; note: of the sampler's own."""

    rows: Tensor
    weights: Tensor | None = None
    note: float | None = None


class BatchSampler(Sampler[list[int]]):
    """Base of the samplers: `DataLoader(dataset, batch_sampler=sampler)`; one iteration is one epoch.

    After each batch the training loop calls `observe(losses)`. A DataLoader with workers draws batches ahead: the sampler
    keeps what it has emitted and not yet seen observed, in order; `observe`, `current` and `weights` speak of the oldest of
    these, the batch at hand. `state_dict` holds them, and the first iteration after `load_state_dict` emits them again
    before it draws on, so that a resumed run sees the batches of an uninterrupted one, with any number of workers.
    A new iteration without a loaded state starts a new epoch and forgets what was in flight.

    A subclass sets `name` and `learns` (whether it needs losses) and implements
      `_config()` -> the settings that a saved state must agree with, beside rows, batch_size and drop_last;
      `_start_epoch()` -> how many batches the epoch number `self.epoch` has, after preparing it;
      `_draw()` -> the next Batch; `self._emitted` of this epoch were drawn before;
      `_learn(batch, rows, losses, confidences)`: losses [m] float64 on the CPU, all finite, of distinct rows [m] of
          `batch`; confidences as `observe` was given them, float64, or None;
      `_check_observed(losses, confidences)`, where some values must be refused;
      `_state()` -> tensors that continuing needs beside the generator, and `_load(state)`, which gets tensors of the same
          names and dtypes, raises ValueError before it changes anything, and takes over copies.
    All randomness comes from `self._generator`. Where what `_start_epoch` reads changes between epochs, call
    `self._replan()`: `len()` may have prepared the next epoch already. `OrderedSampler` is simpler: rows fixed per epoch.

    Raises TypeError or ValueError, when constructed, for rows, batch_size, seed or drop_last outside what is accepted.
    """

    name: ClassVar[str]
    learns: ClassVar[bool] = False

    def __init__(self, rows: int | Sized, batch_size: int, *, seed: int = 0, drop_last: bool = False) -> None:
        self.rows = row_count(rows)
        self.batch_size = require_int("batch_size", batch_size)
        self.seed = check_seed(seed)
        self.drop_last = require_bool("drop_last", drop_last)
        self._generator = torch.Generator().manual_seed(self.seed)
        self._in_flight: collections.deque[Batch] = collections.deque()
        self._begun = self._planned = self._emitted = self._told = 0
        self._prepared: tuple[int, Tensor] | None = None  # batches of the next epoch, generator before preparing it
        self._resumed = False
        self._run: object = None  # the iteration that may draw
        self._chosen = 0
        self._loss_chosen: float | None = None
        self._looked_at = 0.0
        self._seconds = 0.0
        self.step = 0

    # ---- drawing

    def __iter__(self) -> Iterator[list[int]]:
        run = self._run = object()
        if self._resumed and self._running:
            again = list(self._in_flight)
        else:
            again = []
            self._begin_epoch()
        self._resumed = False
        for batch in again:
            yield batch.rows.tolist()
            self._require_newest(run)
        while self._emitted < self._planned:
            start = time.perf_counter()
            batch = self._draw()
            self._emitted += 1
            self._looked_at += self._candidates()
            self._in_flight.append(batch)
            rows = batch.rows.tolist()
            self._seconds += time.perf_counter() - start
            yield rows
            self._require_newest(run)

    def __len__(self) -> int:
        """Batches of the epoch that runs, or else of the one that comes next."""
        return self._planned if self._running else self._prepare()

    @property
    def epoch(self) -> int:
        """Epochs that are over: every batch observed, or broken off by a later one."""
        return self._begun - self._running

    @property
    def _running(self) -> bool:
        return self._emitted < self._planned or bool(self._in_flight)

    def _begin_epoch(self) -> None:
        self._in_flight.clear()
        if self._emitted < self._planned:  # broken off: nothing can be said of its losses
            self._planned = self._emitted = 0
        planned = self._prepare()
        self._prepared = None
        self._begun += 1
        self._planned, self._emitted, self._told = planned, 0, 0

    def _prepare(self) -> int:
        if self._prepared is None:
            if self.learns and self._planned and self._emitted == self._planned and not self._told:
                raise RuntimeError(
                    f"the sampler {self.name!r} was told no loss in the last epoch: call observe(losses) after each batch"
                )
            before = self._generator.get_state()
            start = time.perf_counter()
            self._prepared = self._start_epoch(), before
            self._seconds += time.perf_counter() - start
        return self._prepared[0]

    def _replan(self) -> None:
        """Forget the next epoch if `len()` has prepared it, the generator as if it had not."""
        if self._prepared is not None:
            self._generator.set_state(self._prepared[1])
            self._prepared = None

    def _require_newest(self, run: object) -> None:
        if run is not self._run:
            raise RuntimeError("a newer iteration of this sampler, or a loaded state, has replaced this one")

    def _candidates(self) -> float:
        """Rows looked at for one batch: of the whole set, the part that falls to it."""
        return self.rows / self._planned

    # ---- learning

    @property
    def current(self) -> Tensor:
        """Rows of the batch at hand, [b] int64. Raises RuntimeError when none is."""
        return self._at_hand().rows

    @property
    def weights(self) -> Tensor | None:
        """Weights of the losses of the batch at hand, [b] float32; None: all one. Raises RuntimeError when none is."""
        return self._at_hand().weights

    def observe(
        self,
        losses: Tensor | None,
        rows: Tensor | Sequence[int] | None = None,
        *,
        confidences: Tensor | None = None,
    ) -> None:
        """Tell what came of the batch at hand: the one call after each batch.

        losses: [b] per-sample losses, any float dtype and device; None is accepted by a sampler that learns nothing.
            Rows of non-finite loss are left out of learning.
        rows: [b] which rows they belong to, where they are not those of `current` in order: some of them, or in another
            order; none at all skips the batch.
        confidences: [b] p_y, the probability of the right class, for "p_sgd" and "c_sgd"; default exp(-loss), which is
            right for plain cross-entropy.

        Raises RuntimeError (no batch at hand), TypeError or ValueError (losses or confidences that are no [b] floats; rows
        that repeat, or that the batch at hand does not hold), nothing changed.
        """
        batch = self._at_hand()
        values = self._check_values("losses", losses)
        certain = None if confidences is None else self._check_values("confidences", confidences)
        which = batch.rows if rows is None else self._check_rows(rows, batch)
        for what, given in (("losses", values), ("confidences", certain)):
            if given is not None and given.shape != which.shape:
                raise ValueError(f"{what} must be [{which.shape[0]}], one a row, got {tuple(given.shape)}")
        if certain is not None and not bool(((certain >= 0) & (certain <= 1)).all()):
            raise ValueError("confidences must be probabilities in [0, 1]")
        self._check_observed(values, certain)
        start = time.perf_counter()
        self._in_flight.popleft()
        self.step += 1
        self._chosen += which.shape[0]
        if values is not None:
            finite = values.isfinite()
            which, values = which[finite], values[finite]
            certain = None if certain is None else certain[finite]
            self._told += values.shape[0]
            if values.shape[0]:
                self._loss_chosen = float(values.mean())
                self._learn(batch, which, values, certain)
        self._seconds += time.perf_counter() - start

    def _at_hand(self) -> Batch:
        if not self._in_flight:
            raise RuntimeError("no batch at hand: the sampler has emitted none that is not observed yet")
        return self._in_flight[0]

    def _check_values(self, what: str, values: Tensor | None) -> Tensor | None:
        if values is None and not self.learns:
            return None
        if not isinstance(values, Tensor) or not values.dtype.is_floating_point:
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"{what} must be a tensor of floats [b], got {got}")
        if values.dim() != 1:
            raise ValueError(f"{what} must be [b], one a row, got shape {tuple(values.shape)}")
        return values.detach().to("cpu", torch.float64)

    def _check_rows(self, rows: Tensor | Sequence[int], batch: Batch) -> Tensor:
        which = rows.detach().cpu() if isinstance(rows, Tensor) else torch.tensor(list(rows), dtype=torch.int64)
        if which.dim() != 1 or which.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"rows must be int64 [b], got {which.dtype} {tuple(which.shape)}")
        numbers, held = which.tolist(), set(batch.rows.tolist())
        foreign = [row for row in numbers if row not in held]
        if foreign:
            raise ValueError(f"row {foreign[0]} was not drawn: the batch at hand does not hold it")
        if len(set(numbers)) != len(numbers):
            raise ValueError("rows must be distinct")
        return which.to(torch.int64)

    # ---- what a subclass implements

    def _config(self) -> dict[str, Any]:
        return {}

    def _start_epoch(self) -> int:
        raise NotImplementedError

    def _draw(self) -> Batch:
        raise NotImplementedError

    def _check_observed(self, losses: Tensor | None, confidences: Tensor | None) -> None:
        """Raise ValueError for losses [m] that the sampler cannot learn from; nothing is changed before."""

    def _learn(self, batch: Batch, rows: Tensor, losses: Tensor, confidences: Tensor | None) -> None:
        """Nothing, unless the sampler learns."""

    def _state(self) -> dict[str, Tensor]:
        return {}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing, unless there is a state."""

    # ---- progress

    def record(self) -> StepRecord:
        """Where the run stands; `seconds` has "select": drawing and learning."""
        return StepRecord(
            step=self.step,
            epoch=self.epoch,
            rate=self._chosen / self._looked_at if self._looked_at else math.nan,
            weights=None,
            loss_chosen=self._loss_chosen,
            loss_all=None,
            seconds={"select": self._seconds},
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that continuing bit for bit needs, as copies; loads with weights_only=True. Any time is right."""
        generator = self._generator.get_state() if self._prepared is None else self._prepared[1].clone()
        return {
            "format": _FORMAT,
            "sampler": self.name,
            "config": self._whole_config(),
            "counts": {**{name: getattr(self, "_" + name) for name in _COUNTS if name != "step"}, "step": self.step},
            "loss_chosen": self._loss_chosen,
            "generator": generator,
            "in_flight": [
                {
                    "rows": batch.rows.clone(),
                    "weights": None if batch.weights is None else batch.weights.clone(),
                    "note": batch.note,
                }
                for batch in self._in_flight
            ],
            "state": {"looked_at": torch.tensor(self._looked_at, dtype=torch.float64)}
            | {name: value.detach().cpu().clone() for name, value in self._state().items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the next iteration goes on with the epoch that was saved.

        Raises ValueError, nothing changed, when it is corrupt, of another sampler, or of other settings than seed.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != _KEYS:
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"not a state of a sampler: got {got}, expected the keys {sorted(_KEYS)}")
        for what, expected in (("format", _FORMAT), ("sampler", self.name), ("config", self._whole_config())):
            if state_dict[what] != expected:
                raise ValueError(f"state has {what} {state_dict[what]!r}, expected {expected!r}")
        counts = _checked_counts(state_dict["counts"])
        loss = state_dict["loss_chosen"]
        if loss is not None and not isinstance(loss, float):
            raise ValueError(f"state has loss_chosen {loss!r}, expected a number or None")
        in_flight = self._checked_batches(state_dict["in_flight"])
        if len(in_flight) > counts["emitted"]:
            raise ValueError(f"state has {len(in_flight)} batches in flight, {counts['emitted']} emitted")
        try:
            generator = torch.Generator()
            generator.set_state(state_dict["generator"])
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"state has no generator state: {error}") from error
        tensors = self._checked_tensors(state_dict["state"])
        looked_at = float(tensors.pop("looked_at"))
        running = counts["emitted"] < counts["planned"] or bool(in_flight)
        self._check_epoch(tensors, counts["planned"] if running else 0)
        self._load(tensors)
        self._prepared, self._run, self._resumed = None, None, True
        self._generator, self._in_flight, self._loss_chosen = generator, in_flight, loss
        self._looked_at = looked_at
        for name, value in counts.items():
            setattr(self, name if name == "step" else "_" + name, value)

    def _whole_config(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            **self._config(),
        }

    def _check_epoch(self, state: Mapping[str, Tensor], planned: int) -> None:
        """Raise ValueError unless `state` can be that of an epoch of `planned` batches (0: between epochs)."""

    def _checked_tensors(self, state: Any) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {"looked_at": torch.zeros((), dtype=torch.float64), **self._state()}
        if not isinstance(state, Mapping) or set(state) != set(own):
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state has the tensors {got}, expected {sorted(own)}")
        for name, value in own.items():
            got = state[name]
            if not isinstance(got, Tensor) or got.dtype != value.dtype or got.dim() != value.dim():
                raise ValueError(f"state has no {name} like {value.dtype} {tuple(value.shape)}")
        return {name: state[name].clone() for name in own}

    def _checked_batches(self, batches: Any) -> "collections.deque[Batch]":
        if not isinstance(batches, Sequence):
            raise ValueError(f"state has in_flight {type(batches).__name__}, expected a list of batches")
        checked: collections.deque[Batch] = collections.deque()
        for batch in batches:
            if not isinstance(batch, Mapping) or set(batch) != _BATCH_KEYS:
                raise ValueError(f"state has a batch in flight that is none: expected the keys {sorted(_BATCH_KEYS)}")
            rows, weights, note = batch["rows"], batch["weights"], batch["note"]
            check_row_numbers(rows, self.rows, "a batch in flight")
            if not 1 <= rows.shape[0] <= self.batch_size:
                raise ValueError(f"state has {rows.shape[0]} rows in a batch, expected 1 to {self.batch_size}")
            if weights is not None and (
                not isinstance(weights, Tensor) or weights.dtype != torch.float32 or weights.shape != rows.shape
            ):
                raise ValueError(f"state has weights of a batch that are not float32 [{rows.shape[0]}]")
            if note is not None and not isinstance(note, float):
                raise ValueError(f"state has the note {note!r} in a batch, expected a number or None")
            checked.append(Batch(rows.clone(), None if weights is None else weights.clone(), note))
        return checked

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._whole_config().items())
        return f"{type(self).__name__}({settings}, seed={self.seed}, step={self.step}, epoch={self.epoch})"


class OrderedSampler(BatchSampler):
    """Base of the samplers that fix the rows of an epoch, and their order, at its start.

    A subclass implements `_epoch_rows()` -> the rows [M] int64, distinct, M >= 1, in the order in which epoch number
    `self.epoch` trains on them (`shuffled` shuffles), and may override `_weights_of(rows)` -> [b] float32 or None.
    """

    def __init__(self, rows: int | Sized, batch_size: int, *, seed: int = 0, drop_last: bool = False) -> None:
        super().__init__(rows, batch_size, seed=seed, drop_last=drop_last)
        self._order = torch.empty(0, dtype=torch.int64)

    def _epoch_rows(self) -> Tensor:
        raise NotImplementedError

    def _weights_of(self, rows: Tensor) -> Tensor | None:
        return None

    def _start_epoch(self) -> int:
        self._order = self._epoch_rows()
        batches = self._batches_of(self._order.shape[0])
        if batches == 0:
            raise ValueError(
                f"an epoch of {self._order.shape[0]} rows has no full batch of {self.batch_size}: drop_last leaves nothing"
            )
        return batches

    def _batches_of(self, rows: int) -> int:
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def _draw(self) -> Batch:
        rows = self._order[self._emitted * self.batch_size :][: self.batch_size]
        return Batch(rows, self._weights_of(rows))

    def shuffled(self, rows: Tensor) -> Tensor:
        """`rows` [M] in random order."""
        return rows[torch.randperm(rows.shape[0], generator=self._generator)]

    def _state(self) -> dict[str, Tensor]:
        return {"order": self._order if self._running else self._order[:0]}

    def _check_epoch(self, state: Mapping[str, Tensor], planned: int) -> None:
        order = state["order"]
        check_row_numbers(order, self.rows, "order")
        if self._batches_of(order.shape[0]) != planned:
            raise ValueError(f"state has an order of {order.shape[0]} rows for {planned} batches")

    def _load(self, state: Mapping[str, Tensor]) -> None:
        self._order = state["order"]


def row_count(rows: int | Sized) -> int:
    """How many rows: `rows` itself, or the length of a dataset. Raises TypeError or ValueError."""
    if not isinstance(rows, int):
        try:
            rows = len(rows)
        except TypeError as error:
            raise TypeError(
                f"rows must be the number of training rows, or a dataset with a length; {type(rows).__name__} has none:"
                " pass the number of its rows as an int"
            ) from error
    return require_int("rows", rows)


def require_int(name: str, value: object, low: int = 1) -> int:
    """`value`, an int of at least `low`. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def require_bool(name: str, value: object) -> bool:
    """`value`, a bool. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def check_row_numbers(rows: Any, total: int, what: str) -> None:
    """Raise ValueError unless `rows` are distinct row numbers, int64 [M], below `total`."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(f"state has {what} that is no int64 [M]")
    if not bool(((rows >= 0) & (rows < total)).all()):
        raise ValueError(f"state has {what} with rows outside [0, {total})")
    if rows.unique().shape[0] != rows.shape[0]:
        raise ValueError(f"state has {what} with a row twice")


def _checked_counts(counts: Any) -> dict[str, int]:
    if not isinstance(counts, Mapping) or set(counts) != set(_COUNTS):
        raise ValueError(f"state has counts {counts!r}, expected {sorted(_COUNTS)}")
    if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in counts.values()):
        raise ValueError(f"state has counts that are none: {dict(counts)!r}")
    if counts["emitted"] > counts["planned"]:
        raise ValueError(f"state has {counts['emitted']} of {counts['planned']} batches")
    return dict(counts)


def distinct_rows(count: int, total: int, generator: torch.Generator) -> Tensor:
    """`count` distinct numbers below `total`, uniform and in random order, [count] int64; O(count) for count << total."""
    if 4 * count >= total:
        return torch.randperm(total, generator=generator)[:count]
    # the first `count` swaps of Fisher and Yates, with only the places that moved kept
    draws = torch.randint(2**62, (count,), generator=generator).tolist()
    moved: dict[int, int] = {}
    drawn = []
    for i, draw in enumerate(draws):
        j = i + draw % (total - i)
        drawn.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return torch.tensor(drawn, dtype=torch.int64)
