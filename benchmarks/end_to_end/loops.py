"""What is timed: a sample of each contender, read off stage by stage.

Scoring is the forward alone. Selecting is all else that is not the update: entering and leaving the scoring pass, choosing,
gathering, joining, the loop itself. Updating is zero_grad, forward, backward and the optimizer's step on a full batch.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaselect_kernels.checks import selected_count
from adaselect_kernels.policies import get_policy
from adaselect_kernels.training import SelectedBatches
from benchmarks import naive, timing
from benchmarks.end_to_end.images import Batch
from benchmarks.end_to_end.rig import Marks, Rig
from benchmarks.end_to_end.settings import METHODS, candidates_per_sample, per_candidate

MIN_STEPS_S, MAX_STEPS = 0.05, 64


class Watch:
    """What a loop did, for the gate: every candidate batch with its logits and choice, and every batch of an update."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.candidates: list[Batch] = []
        self.choices: list[Any] = []  # Selection or NaiveSelection
        self.updates: list[Batch] = []

    def candidate(self, batch: Batch, logits: Tensor) -> None:
        self.candidates.append((batch[0].clone(), batch[1].clone()))
        self.logits.append(logits.detach().clone())

    def choice(self, chosen: Any) -> None:
        self.choices.append(type(chosen)(*(value.clone() for value in chosen)))

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        self.updates.append((inputs.clone(), targets.clone()))


class Taken(NamedTuple):
    """One sample."""

    marks: Marks
    candidates: int
    updates: int

    def split(self, rate: float) -> dict[str, float]:
        """Seconds a candidate batch by stage."""
        return per_candidate(self.marks.seconds(), self.candidates, self.updates, rate)


class Steps:
    """`step` over and over: the update without selection, or one of the forwards. A sample is a mean over `count`."""

    def __init__(self, rig: Rig, step: Callable[[Batch], Any], *, evaluate: bool = False) -> None:
        self.rig, self.step, self.evaluate = rig, step, evaluate
        self.count = 1

    def ready(self) -> int:
        """Warm up; as many steps a sample as last MIN_STEPS_S."""
        self.sample()
        timing.synchronize(self.rig.device)
        start = time.perf_counter()
        self.sample()
        timing.synchronize(self.rig.device)
        self.count = min(max(2, math.ceil(MIN_STEPS_S / (time.perf_counter() - start))), MAX_STEPS)
        return self.count

    def sample(self) -> None:
        self.rig.model.train(not self.evaluate)
        for _ in range(self.count):
            self.step(self.rig.next_batch())
        self.rig.model.train()


def steps(rig: Rig, name: str) -> Steps:
    """ "plain" (the step without selection), "forward" (its forward) or "score" (the scoring forward)."""
    if rig.mode != "graph":
        calls = {
            "plain": lambda batch: rig.update(*batch),
            "forward": lambda batch: rig.forward(batch[0]),
            "score": lambda batch: rig.score(batch[0]),
        }
        return Steps(rig, calls[name], evaluate=name == "score")
    static, n = rig.static, rig.settings.batch

    def plain(batch: Batch) -> None:
        static.rows[:n].copy_(batch[0])
        static.row_targets[:n].copy_(batch[1])
        static.update()

    def one(replay: Callable[[], Any]) -> Callable[[Batch], None]:
        def load_and_replay(batch: Batch) -> None:
            static.load(batch)
            replay()

        return load_and_replay

    return Steps(rig, {"plain": plain, "forward": one(static.forward), "score": one(static.score)}[name])


class Loop:
    """Selection in front of the update. A sample is `candidates` candidate batches; rows that wait stay for the next."""

    def __init__(self, rig: Rig, gamma: float) -> None:
        self.rig, self.gamma = rig, gamma
        self.k = selected_count(gamma, rig.settings.batch)
        self.rate = self.k / rig.settings.batch
        self.candidates = candidates_per_sample(self.k, rig.settings.batch, rig.settings.whole)
        self.watch: Watch | None = None
        self.taken: list[Taken] = []

    def sample(self) -> None:
        marks = Marks(self.rig.device)
        updates = self.run(marks, self.candidates)
        self.taken.append(Taken(marks, self.candidates, updates))

    def run(self, marks: Marks, candidates: int) -> int:
        """That many candidate batches and the updates they fill; returns how many updates."""
        raise NotImplementedError

    def update(self, inputs: Tensor, targets: Tensor, marks: Marks) -> None:
        if self.watch is not None:
            self.watch.update(inputs, targets)
        self.rig.update(inputs, targets)
        marks.mark("update")


class Chooser:
    """Ours on given logits: the policy with its state."""

    def __init__(self, rig: Rig, gamma: float) -> None:
        self.policy = get_policy("adaselection", gamma, methods=METHODS, device=rig.device)

    def __call__(self, logits: Tensor, targets: Tensor) -> Any:
        return self.policy.select(logits, targets)


class NaiveChooser:
    """benchmarks/naive.py with its state; `noise` [N], where given, is used by the next call alone.

    In a graph the state keeps its tensors.
    """

    def __init__(self, rig: Rig, gamma: float) -> None:
        self.k = selected_count(gamma, rig.settings.batch)
        self.state = naive.fresh_state(len(METHODS), rig.device)
        self.static = rig.mode == "graph"
        self.select = rig.naive_select
        self.noise: Tensor | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> Any:
        given = {} if self.noise is None else {"noise": self.noise}
        self.noise = None
        chosen, state = self.select(logits, targets, self.k, METHODS, self.state, **given)
        if self.static:
            for old, new in zip(self.state, state, strict=True):
                old.copy_(new)
        else:
            self.state = state
        return chosen


class Ours(Loop):
    """SelectedBatches, as a user has it."""

    def __init__(self, rig: Rig, gamma: float) -> None:
        super().__init__(rig, gamma)
        self.marks: Marks | None = None
        self.policy = Chooser(rig, gamma).policy
        self._select, self.policy.select = self.policy.select, self._watched_select
        self.batches = SelectedBatches(
            self, rig.network, self.policy, rig.settings.batch, forward=self._forward, autocast=rig.autocast
        )

    def __iter__(self) -> Iterator[Batch]:  # the loader
        return (self.rig.next_batch() for _ in range(self._asked))

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self.marks is not None
        self.marks.mark("select")  # until the scoring forward begins
        logits = model(batch[0])
        self.marks.mark("score")
        if self.watch is not None:
            self.watch.candidate(batch, logits)
        return logits, batch[1]

    def _watched_select(self, logits: Tensor, targets: Tensor) -> Any:
        chosen = self._select(logits, targets)
        if self.watch is not None:
            self.watch.choice(chosen)
        return chosen

    def run(self, marks: Marks, candidates: int) -> int:
        self.marks, self._asked, updates = marks, candidates, 0
        for inputs, targets in self.batches:
            marks.mark("select")
            self.update(inputs, targets, marks)
            updates += 1
        marks.mark("select")
        return updates


class Naive(Loop):
    """The loop as a careful user writes it in plain PyTorch."""

    def __init__(self, rig: Rig, gamma: float) -> None:
        super().__init__(rig, gamma)
        self.choose = NaiveChooser(rig, gamma)
        self.inputs: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.held = 0

    def run(self, marks: Marks, candidates: int) -> int:
        rig, updates = self.rig, 0
        n = rig.settings.batch
        for _ in range(candidates):
            inputs, targets = rig.next_batch()
            rig.network.eval()
            marks.mark("select")
            logits = rig.score(inputs)
            marks.mark("score")
            rig.network.train()
            chosen = self.choose(logits, targets)
            if self.watch is not None:
                self.watch.candidate((inputs, targets), logits)
                self.watch.choice(chosen)
            self.inputs.append(inputs[chosen.indices])
            self.targets.append(targets[chosen.indices])
            self.held += self.k
            while self.held >= n:
                rows, row_targets = torch.cat(self.inputs), torch.cat(self.targets)
                self.inputs, self.targets = [rows[n:]], [row_targets[n:]]
                self.held -= n
                marks.mark("select")
                self.update(rows[:n], row_targets[:n], marks)
                updates += 1
        marks.mark("select")
        return updates


class Graphs(Loop):
    """Ours or the naive choice with every step in a CUDA graph; the host only counts the rows that wait."""

    def __init__(self, rig: Rig, gamma: float, chooser: type[Chooser] | type[NaiveChooser]) -> None:
        super().__init__(rig, gamma)
        # the buffer is the rig's: whole cycles leave it empty for the next contender
        self.candidates = candidates_per_sample(self.k, rig.settings.batch, True)
        self.choose, self.held, static = chooser(rig, gamma), 0, rig.static

        def select() -> tuple[Any, Tensor, Tensor]:
            chosen = self.choose(static.logits, static.targets)
            return chosen, static.inputs[chosen.indices], static.targets[chosen.indices]

        before = [tensor.clone() for tensor in self._state()]
        self.select, self.selected = rig.captured(select)
        for tensor, value in zip(self._state(), before, strict=True):  # as if it had not been warmed up
            tensor.copy_(value)

    def _state(self) -> list[Tensor]:
        return [self.choose.policy.state.buffer] if isinstance(self.choose, Chooser) else list(self.choose.state)

    def run(self, marks: Marks, candidates: int) -> int:
        rig, static, n, updates = self.rig, self.rig.static, self.rig.settings.batch, 0
        for _ in range(candidates):
            static.load(rig.next_batch())
            marks.mark("select")
            static.score()
            marks.mark("score")
            self.select()
            chosen, rows, row_targets = self.selected
            if self.watch is not None:
                self.watch.candidate((static.inputs, static.targets), static.logits)
                self.watch.choice(chosen)
            held, held_targets = static.rows, static.row_targets
            held[self.held : self.held + self.k].copy_(rows)
            held_targets[self.held : self.held + self.k].copy_(row_targets)
            self.held += self.k
            marks.mark("select")
            while self.held >= n:
                if self.watch is not None:
                    self.watch.update(held[:n], held_targets[:n])
                static.update()
                marks.mark("update")
                updates += 1
                self.held -= n
                if self.held:  # at most k <= n rows: source and destination do not overlap
                    held[: self.held].copy_(held[n : n + self.held])
                    held_targets[: self.held].copy_(held_targets[n : n + self.held])
                marks.mark("select")
        return updates
