"""The refill buffer of Algorithms 1 and 2 (arXiv 2306.10728): full batches of chosen samples out of any loader."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from adaselect_kernels.functional import SampleStats, Selection
from adaselect_kernels.options import require_choice
from adaselect_kernels.policies import Policy, Scored
from adaselect_kernels.record import StepRecord
from adaselect_kernels.training.batches import count_rows, join_rows, move_to, slice_rows, take_rows
from adaselect_kernels.training.scorers import Forward, Scorer, forward_pair
from adaselect_kernels.training.scoring import MODES, check_autocast, random_streams_kept, scoring_pass

_FORMAT = 2
_END = object()
_KEYS = {"format", "settings", "policy", "scorer", "counts", "rows", "weights", "position", "order", "loader"}


class RowBuffer:
    """Rows in order of arrival: append trees of rows, take the first b."""

    def __init__(self) -> None:
        self._pieces: list[tuple[Any, int]] = []

    def __len__(self) -> int:
        return sum(rows for _, rows in self._pieces)

    def append(self, batch: Any, rows: int) -> None:
        self._pieces.append((batch, rows))

    def take(self, count: int) -> Any:
        """The first `count` rows as one tree; the others stay. Needs `count` <= len; errors as `join_rows`."""
        taken: list[Any] = []
        rest = list(self._pieces)
        missing = count
        while missing > 0:
            batch, rows = rest.pop(0)
            if rows > missing:
                rest.insert(0, (slice_rows(batch, missing, rows), rows - missing))
                batch, rows = slice_rows(batch, 0, missing), missing
            taken.append(batch)
            missing -= rows
        joined = taken[0] if len(taken) == 1 else join_rows(taken)
        self._pieces = rest
        return joined

    def peek(self) -> Any:
        """All rows as one tree in memory of its own; None when there are none."""
        return join_rows([batch for batch, _ in self._pieces]) if self._pieces else None


@dataclass
class Counts:
    """What has happened since the start, over all epochs; saved and loaded with the state."""

    candidates: int = 0  # rows scored
    chosen: int = 0  # rows selected
    updates: int = 0  # full batches handed out: what a learning-rate schedule counts
    epochs: int = 0  # passes over the loader that reached its end


@dataclass
class Seconds:
    """Where the host's time went, by perf_counter: a GPU may still be busy with what was launched (see `synchronize`)."""

    load: float = 0.0  # waiting for the loader, moving to the device
    score: float = 0.0  # scoring forward
    select: float = 0.0  # choosing, gathering, joining
    update: float = 0.0  # the caller's loop body


class SelectedBatches:
    """Iterates over full batches of chosen samples; one iteration is one epoch of `loader` (Algorithms 1 and 2).

    For every candidate batch of N rows: a scoring forward, k = clamp(floor(gamma N + 0.5), 1, N) rows chosen by `policy` and
    appended to a buffer. While the buffer holds `batch_size` rows or more, the first `batch_size` are yielded and
    the loop body does the update with its own forward and backward. What is left at the end of the epoch stays for
    the next; k > batch_size gives as many updates as full batches. The model is scored with the weights of the
    moment: nothing is read ahead of an update except by the loader itself.

    loader: an iterable of batches; a batch is any tree of rows (`training.batches`).
    model, policy: what scores and what chooses; `policy` from `get_policy`, with unit="sample".
    forward: `forward(model, batch)` inside the scoring pass, which returns (logits, targets), or per-sample losses [N],
        or SampleStats with loss and grad_norm. None: the batch is a pair (inputs, targets), scored by model(inputs).
        A scorer (`get_scorer`) brings its own mode and autocast, and its memory is saved with the state.
    mode, autocast: of the scoring pass (`scoring_pass`); None: "eval" and no autocast, or the scorer's.
    device: where every tensor of a batch is moved to; None leaves it where the loader put it.
    synchronize: wait for the device before each reading of the clock, so that `seconds` splits its time too. Slower.

    Attributes: `counts` (Counts), `seconds` (Seconds), `last` (the last Selection, None before), `buffered` (rows waiting),
    `weights` ([batch_size] float32 of the batch just yielded when the policy gives a WeightedSelection, else None: train
    on the mean of weight times loss). `record()` gives a StepRecord.
    The gather needs no host synchronisation when all leaves are tensors on the device of the selection; what it
    yields is detached.

    Raises TypeError (batch_size, forward's result, a batch that is no pair without `forward`), ValueError (batch_size < 1,
    rows that disagree, scores that are not one a row, a mode or autocast beside a scorer), and what the scoring pass and
    the policy raise.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        model: nn.Module,
        policy: Policy,
        batch_size: int,
        *,
        forward: Forward | None = None,
        mode: str | None = None,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
        synchronize: bool = False,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise TypeError(f"batch_size must be an int, got {batch_size!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(forward, Scorer):
            if mode is not None or autocast is not None:
                raise ValueError(
                    f"mode={mode!r}, autocast={autocast!r} beside a scorer: get_scorer({forward.name!r}, mode=...,"
                    " autocast=...) has them"
                )
            mode, autocast = forward.mode, forward.autocast
        mode = "eval" if mode is None else mode
        require_choice("mode", mode, MODES)
        check_autocast(autocast)
        self.loader = loader
        self.model = model
        self.policy = policy
        self.batch_size = batch_size
        self.forward: Forward = forward_pair if forward is None else forward
        self.mode = mode
        self.autocast = autocast
        self.device = None if device is None else torch.device(device)
        self.synchronize = synchronize
        self.counts = Counts()
        self.seconds = Seconds()
        self.last: Selection | None = None
        self.weights: Tensor | None = None
        self._buffer = RowBuffer()
        self._waiting = RowBuffer()  # the weights of the rows in the buffer, or empty
        self._position = 0  # candidate batches of the running epoch that were consumed
        self._order: list[Tensor] | None = None  # streams that the loader's order comes from, at the epoch's start
        self._resume: str | None = None  # how the next iteration finds its place: "skip", "loader"
        self._running: object = None  # the iteration that may continue

    @property
    def buffered(self) -> int:
        """Rows that wait for a full batch."""
        return len(self._buffer)

    def __iter__(self) -> Iterator[Any]:
        self._running = running = object()
        if self._resume is None:  # a new epoch, also after one that was left by `break`
            self._position, self._order = 0, None
        candidates: Iterator[Any] | None = None
        clock = self._clock()
        while True:
            while len(self._buffer) >= self.batch_size:
                batch = self._buffer.take(self.batch_size)
                self.weights = self._waiting.take(self.batch_size) if len(self._waiting) else None
                self.counts.updates += 1
                self.seconds.select += clock()
                try:
                    yield batch
                finally:
                    self.seconds.update += clock()
                del batch
                if self._running is not running:
                    raise RuntimeError("this iteration ended: another one was started, or a state was loaded")
            if candidates is None:
                candidates = self._open()
            try:
                batch = next(candidates)
            except StopIteration:
                break
            if self.device is not None:
                batch = move_to(batch, self.device)
            self.seconds.load += clock()
            self._consume(batch, clock)
            self._position += 1
            del batch
        self._position, self._order = 0, None
        self.counts.epochs += 1

    def _consume(self, batch: Any, clock: Callable[[], float]) -> None:
        """Score a candidate batch, append its chosen rows."""
        rows = count_rows(batch)
        with scoring_pass(self.model, mode=self.mode, autocast=self.autocast):
            known = isinstance(self.policy, Policy)  # anything else that selects is given what forward gives
            result = self.policy.score(self.model, batch, self.forward) if known else self.forward(self.model, batch)
        self.seconds.score += clock()
        selection = _choose(self.policy, result)
        if selection.scores.shape[0] != rows:
            raise ValueError(
                f"forward gave {selection.scores.shape[0]} scores for {rows} rows; it must give one a row"
                ' (a policy with unit="token" chooses inside a row and cannot refill a buffer)'
            )
        chosen, weights = selection.indices.shape[0], getattr(selection, "weights", None)
        if len(self._buffer) and bool(len(self._waiting)) != (weights is not None):
            raise ValueError("the policy gave weights for some batches and none for others; their rows cannot be mixed")
        with torch.no_grad():
            taken = take_rows(batch, selection.indices)
        self._buffer.append(taken, chosen)
        if weights is not None:
            self._waiting.append(weights, chosen)
        self.last = selection
        self.counts.candidates += rows
        self.counts.chosen += chosen
        self.seconds.select += clock()

    def record(self) -> StepRecord:
        """Where the run stands, for a log; the losses are of the last candidate batch. Reads the device."""
        counts, losses = self.counts, (None, None)
        if self.last is not None:
            valid, rows = self.last.scores > -math.inf, self.last.indices
            losses = _mean(self.last.losses[rows], valid[rows]), _mean(self.last.losses, valid)
        return StepRecord(
            step=counts.updates,
            epoch=counts.epochs,
            rate=counts.updates * self.batch_size / counts.candidates if counts.candidates else math.nan,
            weights=self.policy.method_weights() if isinstance(self.policy, Policy) else None,
            loss_chosen=losses[0],
            loss_all=losses[1],
            seconds=dict(vars(self.seconds)),
        )

    def _clock(self) -> Callable[[], float]:
        """A function that gives the seconds since its last call."""
        last = time.perf_counter()

        def lap() -> float:
            nonlocal last
            if self.synchronize and torch.accelerator.is_available():
                torch.accelerator.synchronize()
            before, last = last, time.perf_counter()
            return last - before

        return lap

    def _open(self) -> Iterator[Any]:
        """An iterator over the loader at the place where this epoch goes on."""
        resume, self._resume = self._resume, None
        if resume == "loader":
            return iter(self.loader)
        if resume == "skip":
            return self._skip()
        self._order = [torch.get_rng_state(), *(generator.get_state() for generator in _generators(self.loader))]
        return iter(self.loader)

    def _skip(self) -> Iterator[Any]:
        """The loader's order as it was at the start of the epoch, without the batches consumed then."""
        assert self._order is not None
        with random_streams_kept():
            torch.set_rng_state(self._order[0])
            for generator, state in zip(_generators(self.loader), self._order[1:], strict=True):
                generator.set_state(state)
            candidates = iter(self.loader)
            for consumed in range(self._position):
                if next(candidates, _END) is _END:
                    raise RuntimeError(
                        f"the loaded state had consumed {self._position} batches, the loader has {consumed}"
                    )
        return candidates

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit; call it in the loop after the update, or between epochs.

        Policy state, a scorer's memory, waiting rows (a tree of the batch's own classes) with their weights, counts, and
        the place in the epoch: the loader's
        own state_dict where it has one, else the number of candidate batches consumed, and torch's CPU stream and the
        loader's generators as they were at the start of the epoch. Loads with weights_only=True when the batch is made
        of tensors, dicts, lists, tuples and plain values. The caller saves model, optimizer and the random streams.
        """
        loader_state = getattr(self.loader, "state_dict", None)
        return {
            "format": _FORMAT,
            "settings": self._settings(),
            "policy": self.policy.state_dict(),
            "scorer": self.forward.state_dict() if isinstance(self.forward, Scorer) else None,
            "counts": dict(vars(self.counts)),
            "rows": self._buffer.peek(),
            "weights": self._waiting.peek(),
            "position": self._position,
            "order": None if self._order is None else list(self._order),
            "loader": None if loader_state is None else loader_state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore from `state_dict()`; the next iteration goes on in the middle of the epoch where the state was saved.

        A loader with load_state_dict finds its place itself. Any other is started as it was at the beginning of
        that epoch and its first batches are read and dropped: its order must come from torch's CPU stream at the start
        of the epoch, from `loader.generator` or `loader.sampler.generator`, or be fixed. An iteration under way ends.

        Raises ValueError, nothing changed, when the dictionary is corrupt, of another policy or scorer, or of another
        batch_size, mode or autocast.
        """
        counts, rows, weights, position, order = self._check(state_dict)
        parts: list[tuple[str, Any]] = [("policy", self.policy)]
        parts += [("scorer", self.forward)] if isinstance(self.forward, Scorer) else []
        parts += [("loader", self.loader)] if state_dict["loader"] is not None else []
        before: list[tuple[Any, Any]] = []
        for name, part in parts:
            saved = part.state_dict() if name != "loader" else None  # the last one needs no way back
            try:
                part.load_state_dict(state_dict[name])
            except Exception as error:
                for other, state in before:
                    other.load_state_dict(state)
                if name == "loader":
                    raise ValueError(f"the loader refused its state: {error}") from error
                raise
            before.append((part, saved))
        self.counts, self._buffer, self._position, self._order = counts, rows, position, order
        self._waiting, self.weights = weights, None
        self._resume = "loader" if state_dict["loader"] is not None else "skip" if position else None
        self._running = None
        self.last = None

    def _check(self, state_dict: Mapping[str, Any]) -> tuple[Counts, RowBuffer, RowBuffer, int, list[Tensor] | None]:
        if not isinstance(state_dict, Mapping) or set(state_dict) != _KEYS:
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"not a state of SelectedBatches: got {got}, expected the keys {sorted(_KEYS)}")
        if state_dict["format"] != _FORMAT:
            raise ValueError(f"state has format {state_dict['format']!r}, this version reads {_FORMAT}")
        if state_dict["settings"] != self._settings():
            raise ValueError(f"state has the settings {state_dict['settings']!r}, expected {self._settings()!r}")
        counts, position, order = state_dict["counts"], state_dict["position"], state_dict["order"]
        names = {field.name for field in fields(Counts)}
        if not isinstance(counts, Mapping) or set(counts) != names or not all(map(_is_count, counts.values())):
            raise ValueError(f"corrupt state: counts must be {sorted(names)}, none negative, got {counts!r}")
        if not _is_count(position):
            raise ValueError(f"corrupt state: position must be an int >= 0, got {position!r}")
        if order is not None:
            order = _check_streams(order, _generators(self.loader))
        elif position and state_dict["loader"] is None:
            raise ValueError("corrupt state: a position in an epoch without the order of that epoch")
        if state_dict["loader"] is not None and not hasattr(self.loader, "load_state_dict"):
            raise ValueError(f"state has one of its loader, which {type(self.loader).__name__} cannot load")
        if (state_dict["scorer"] is not None) != isinstance(self.forward, Scorer):
            raise ValueError(f"state has the scorer {state_dict['scorer']!r}, forward is {self.forward!r}")
        buffer, waiting, weights = RowBuffer(), RowBuffer(), state_dict["weights"]
        if state_dict["rows"] is not None:
            rows = state_dict["rows"] if self.device is None else move_to(state_dict["rows"], self.device)
            try:
                buffer.append(join_rows([rows]), count_rows(rows))  # joined: in memory of its own
            except ValueError as error:
                raise ValueError(f"corrupt state: {error}") from None
        counts = Counts(**counts)
        if counts.chosen != counts.updates * self.batch_size + len(buffer):
            raise ValueError(f"corrupt state: {counts} does not agree with {len(buffer)} waiting rows")
        weighted = self.policy.weighted if isinstance(self.policy, Policy) else weights is not None
        if len(buffer) and weighted != (weights is not None):
            raise ValueError(f"corrupt state: the policy gives {'' if weighted else 'no '}weights for its rows")
        if weights is not None:
            if not isinstance(weights, Tensor) or weights.shape != (len(buffer),) or weights.dtype != torch.float32:
                raise ValueError(f"corrupt state: weights must be float32 [{len(buffer)}], one for each waiting row")
            waiting.append(weights.detach().to(self.device or weights.device, copy=True), len(buffer))
        return counts, buffer, waiting, position, order

    def _settings(self) -> dict[str, Any]:
        autocast = None if self.autocast is None else str(self.autocast)
        return {"batch_size": self.batch_size, "mode": self.mode, "autocast": autocast}


def _choose(policy: Policy, result: Any) -> Selection:
    more: dict[str, Tensor] = {}
    if isinstance(result, Scored):
        result, more = result
    if isinstance(result, Tensor):
        return policy.select_from_losses(result, **more)
    if isinstance(result, SampleStats) and result.loss is not None:
        return policy.select_from_losses(result.loss, result.grad_norm, **more)
    if isinstance(result, (tuple, list)) and len(result) == 2:
        return policy.select(*result, **more)  # pyright: ignore[reportArgumentType]
    raise TypeError(
        "forward must return (logits, targets), per-sample losses [N] or SampleStats with a loss,"
        f" got {type(result).__name__}"
    )


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a DataLoader and its sampler shuffle with; often the same one twice."""
    found = [getattr(owner, "generator", None) for owner in (loader, getattr(loader, "sampler", None))]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _check_streams(order: Any, generators: list[torch.Generator]) -> list[Tensor]:
    """Copies of the states in `order`, one of the CPU's stream and one for each generator, after trying them."""
    devices = ["cpu", *(generator.device for generator in generators)]
    if not isinstance(order, (list, tuple)) or len(order) != len(devices):
        raise ValueError(f"state is of another loader: this one draws from {len(devices)} random streams")
    try:
        copies = [state.detach().cpu().clone() for state in order]
        for device, state in zip(devices, copies, strict=True):
            torch.Generator(device).set_state(state)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"corrupt state: not the state of a random stream: {error}") from None
    return copies


def _mean(losses: Tensor, valid: Tensor) -> float | None:
    """Mean of the valid losses; None when there is none."""
    kept = losses[valid].to(torch.float64)
    return kept.mean().item() if kept.numel() else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
