"""A compact training loop around selection: plan, updates, weights, schedule, log, checkpoints that continue bit for bit."""

import copy
import json
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from adaselect_kernels.policies import Policy
from adaselect_kernels.record import StepRecord
from adaselect_kernels.training import checkpoint as files
from adaselect_kernels.training.batches import count_rows, move_to
from adaselect_kernels.training.planner import Loss, cross_entropies, plan
from adaselect_kernels.training.refill import SelectedBatches
from adaselect_kernels.training.schedules import ScheduleWarning, check_schedule, planned_updates
from adaselect_kernels.training.scorers import Stale, _row_numbers
from adaselect_kernels.training.scoring import random_streams_kept

_FORMAT = 1
_KEYS = {"format", "source", "model", "optimizer", "scheduler", "selection", "order", "streams", "log"}


class Trainer:
    """Trains `model` on what `data` selects: one optimizer update for each of its batches.

    data: `SelectedBatches` over this model, or a DataLoader whose batch_sampler is one of `samplers`. For training on
        everything take the sampler "uniform".
    loss: `loss(model, batch)` -> per-sample losses [b]; an update follows the mean of weight times loss, where the policy or
        the sampler gives weights. None: cross-entropy of a pair (inputs, targets).
    scheduler: stepped after every update, so it counts updates; one whose end is elsewhere warns (`check_schedule`).
    rescore: `rescore(model)`, called when a DynaMS sampler needs scores: `lambda model: sampler.score(model, loader)`.
    checkpoint: a file, replaced as a whole every `every` updates, at the end, and on Ctrl-C after the update under way
        (a second Ctrl-C ends at once). log: a file of JSON lines, a `StepRecord` every `log_every` updates.
    show_plan: print the plan, measured on the first batch. progress: a bar, where rich is installed.

    A run resumed from a checkpoint ends with the bits of one that was never stopped: model, optimizer, schedule, policy,
    scorer, sampler, buffer, random streams, log (its seconds aside), if `model` and the rest are made anew in the same way.
    With DataLoader workers the random draws inside a worker (augmentation) are not part of that, unless rows fix them.

    Raises TypeError, ValueError for arguments outside what is accepted.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Any,
        *,
        loss: Loss | None = None,
        scheduler: LRScheduler | None = None,
        rescore: Callable[[nn.Module], object] | None = None,
        checkpoint: str | Path | None = None,
        every: int = 500,
        log: str | Path | None = None,
        log_every: int = 50,
        show_plan: bool = True,
        progress: bool = True,
    ) -> None:
        for name, value in (("every", every), ("log_every", log_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        sampler = getattr(data, "batch_sampler", None)
        if isinstance(data, SelectedBatches):
            if data.model is not model:
                raise ValueError("the SelectedBatches score another model than the one to be trained")
        elif not hasattr(sampler, "observe"):
            raise TypeError(
                'data must be SelectedBatches, or a DataLoader with a batch_sampler of get_sampler ("uniform" trains on'
                f" everything), got {type(data).__name__}"
            )
        if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, (LRScheduler, type(None))):
            raise TypeError(f"scheduler must be one that counts updates, got {type(scheduler).__name__}")
        for name, path in (("checkpoint", checkpoint), ("log", log)):
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise ValueError(f"{name}: the folder {Path(path).absolute().parent} does not exist")
        self.model, self.optimizer, self.data, self.scheduler = model, optimizer, data, scheduler
        self.loss: Loss = cross_entropies if loss is None else loss
        self.rescore, self.show_plan, self.progress = rescore, show_plan, progress
        self.every, self.log_every = every, log_every
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.log = None if log is None else Path(log)
        self.source: Any = data if isinstance(data, SelectedBatches) else sampler  # what has weights, record and state
        self._order: list[Tensor | None] | None = (
            None  # streams at the start of the epoch of a sampler that is under way
        )
        self._begun = -1
        self._interrupted = False

    def fit(self, epochs: int, *, updates: int | None = None, resume: bool = False) -> StepRecord:
        """Train until `epochs` epochs are done in all; returns the last record.

        updates: planned optimizer updates, where they cannot be counted from the data.
        resume: continue from the checkpoint if there is one. Without it a checkpoint that exists is an error.

        Raises ValueError: a checkpoint that is damaged or of other settings (nothing is changed), or in the way; losses that
        are not one a row. KeyboardInterrupt after Ctrl-C, with the checkpoint written.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"epochs must be an int of at least 1, got {epochs!r}")
        planned = self._planned(epochs) if updates is None else updates
        if self.scheduler is not None and planned is None:
            text = "the updates cannot be counted from the data, so the schedule is not checked: give fit(updates=...)"
            warnings.warn(text, ScheduleWarning, stacklevel=2)
        elif self.scheduler is not None:
            check_schedule(self.scheduler, planned)  # type: ignore[arg-type]
        self._start(resume)
        shown = not self.show_plan
        with self._end_in_order(), self._bar(planned) as advance:
            while self._epochs_done() < epochs:
                if getattr(self.source, "needs_scores", False):
                    if self.rescore is None:
                        raise ValueError(
                            "the sampler needs scores: give rescore=lambda model: sampler.score(model, loader)"
                        )
                    self.rescore(self.model)
                for batch in self._epoch():
                    if not shown:
                        self._print_plan(batch, epochs, planned)
                        shown = True
                    self._update(batch)
                    advance()
                    self._after_update()
        if self.checkpoint is not None:
            self.save()
        return self.source.record()

    @property
    def updates(self) -> int:
        """Optimizer updates so far."""
        return self.source.counts.updates if self.source is self.data else self.source.step

    def _epochs_done(self) -> int:
        return self.source.counts.epochs if self.source is self.data else self.source.epoch

    def _planned(self, epochs: int) -> int | None:
        if self.source is not self.data:
            if self.source.name == "infobatch":
                return None  # it depends on the losses
            return getattr(self.source, "total_updates", None) or epochs * len(self.source)
        loader, policy = self.data.loader, self.data.policy
        size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
        if size is None or not hasattr(sampler, "__len__") or not isinstance(policy, Policy):
            return None
        gamma = policy.config.gamma
        return planned_updates(len(sampler), size, gamma, self.data.batch_size, epochs, drop_last=loader.drop_last)  # type: ignore[arg-type]

    def _epoch(self) -> Iterator[Any]:
        """The batches of the rest of the epoch."""
        if self.source is self.data:
            yield from self.data
            return
        device = next(self.model.parameters()).device
        for batch in self._open():
            yield batch if device.type == "cpu" else move_to(batch, device)

    def _open(self) -> Iterator[Any]:
        """The loader of a sampler, its random streams as they were where the epoch began, also in a resumed run."""
        generator = getattr(self.data, "generator", None)
        self._begun = self.source.epoch
        if self._order is None:
            self._order = [torch.get_rng_state(), None if generator is None else generator.get_state()]
            return iter(self.data)
        with random_streams_kept():
            torch.set_rng_state(self._order[0])  # type: ignore[arg-type]
            if generator is not None:
                generator.set_state(self._order[1])
            return iter(self.data)

    def _update(self, batch: Any) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.loss(self.model, batch)
        rows = count_rows(batch)
        if losses.shape != (rows,):
            raise ValueError(f"loss must give one value a row, [{rows}], got shape {tuple(losses.shape)}")
        weights = self.source.weights
        (losses if weights is None else losses * weights.to(losses)).mean().backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.source is not self.data:
            self.source.observe(losses.detach())
            if self.source.epoch != self._begun:
                self._order = None  # that was the last batch of the epoch
        elif isinstance(self.data.forward, Stale):
            self.data.forward.update(_row_numbers(self.data.forward.rows, batch), losses)

    def _after_update(self) -> None:
        if self.log is not None and self.updates % self.log_every == 0:
            record = self.source.record().as_dict()
            plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
            with open(self.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(plain) + "\n")
        if self.checkpoint is not None and (self._interrupted or self.updates % self.every == 0):
            self.save()
        if self._interrupted:
            raise KeyboardInterrupt

    def _print_plan(self, batch: Any, epochs: int, planned: int | None) -> None:
        selected = self.source is self.data
        if selected and isinstance(self.data.policy, Policy):
            gamma, choice = self.data.policy.config.gamma, {"scorer": self.data.forward, "policy": self.data.policy}
        elif selected:
            return  # not one of the package: nothing is known of it
        else:
            trained = (planned or epochs * len(self.source)) * self.source.batch_size
            gamma, choice = min(1.0, trained / (epochs * self.source.rows)), {"sampler": self.source}
        print(plan(self.model, batch, gamma, **choice, loss=self.loss, optimizer=self.optimizer, repeats=5).table())

    # ---- saving

    def state_dict(self) -> dict[str, Any]:
        """Everything that continuing needs, after an update or between epochs."""
        return {
            "format": _FORMAT,
            "source": "SelectedBatches" if self.source is self.data else self.source.name,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "selection": self.source.state_dict(),
            "order": self._order,
            "streams": files.random_streams(),
            "log": self.log.stat().st_size if self.log is not None and self.log.exists() else 0,
        }

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self.checkpoint is None:
            raise ValueError("the trainer was given no checkpoint file")
        files.save_checkpoint(self.checkpoint, self.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`. Raises ValueError, nothing changed, for what does not fit this trainer."""
        own = self.state_dict()
        if not isinstance(state, dict) or set(state) != _KEYS:
            raise ValueError(f"not a state of a Trainer: expected the keys {sorted(_KEYS)}")
        for name in ("format", "source"):
            if state[name] != own[name]:
                raise ValueError(f"state has {name} {state[name]!r}, expected {own[name]!r}")
        if (state["scheduler"] is None) != (self.scheduler is None):
            raise ValueError("state is of a run with a scheduler, this one has none, or the reverse")
        before = copy.deepcopy(own)
        try:
            self._load(state)
        except Exception as error:
            self._load(before)
            raise ValueError(f"the state does not fit this trainer: {error}") from error

    def _load(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["selection"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.load_state_dict(state["model"])
        files.set_random_streams(state["streams"])
        self._order = state["order"]

    def _start(self, resume: bool) -> None:
        """Load the checkpoint, if that is asked for, and bring the log to where it was then."""
        position = 0 if self.log is None or not self.updates or not self.log.exists() else self.log.stat().st_size
        if self.checkpoint is not None:
            files.remove_leftovers(self.checkpoint)
            if self.checkpoint.exists() and not resume:
                raise ValueError(f"{self.checkpoint} exists: fit(resume=True) continues it; or move it away")
            if self.checkpoint.exists():
                state = files.load_checkpoint(self.checkpoint)
                position = state.get("log", 0)
                size = self.log.stat().st_size if self.log is not None and self.log.exists() else 0
                if self.log is not None and size < position:
                    raise ValueError(f"{self.log} has {size} bytes, but {position} when the checkpoint was written")
                self.load_state_dict(state)
        if self.log is not None:
            with open(self.log, "ab") as file:
                file.truncate(position)

    @contextmanager
    def _end_in_order(self) -> Iterator[None]:
        """The first Ctrl-C waits for the update under way; outside the main thread it is left as it is."""
        self._interrupted = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def _bar(self, planned: int | None) -> Iterator[Callable[[], object]]:
        if not self.progress or find_spec("rich") is None:
            yield lambda: None
            return
        from rich.progress import Progress

        with Progress(transient=True) as bar:
            task = bar.add_task("training", total=planned, completed=self.updates)
            yield lambda: bar.advance(task)
