"""One network in one type and one mode, and its three steps: the scoring forward, the training forward, the update."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaselect_kernels.models import resnet18
from benchmarks import naive, timing
from benchmarks.end_to_end.images import Batch, batches
from benchmarks.end_to_end.settings import STAGES, Settings
from benchmarks.micro.case import DTYPES, compile_peer

LEARNING_RATE, MOMENTUM = 0.01, 0.9


class Marks:
    """Readings of the clock, each at the end of a stage: on CUDA events in the stream, read once all is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._readings: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, stage: str) -> None:
        """What ran since the last mark was `stage`."""
        self._readings.append((stage, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage; waits for the device."""
        timing.synchronize(self._device)
        found = dict.fromkeys(STAGES, 0.0)
        for (_, before), (stage, after) in zip(self._readings, self._readings[1:], strict=False):
            found[stage] += before.elapsed_time(after) * 1e-3 if self._device.type == "cuda" else after - before
        return found


class Rig:
    """The network, its optimizer and the candidate batches; shared by the contenders of a mode, so that it is compiled once.

    mode: "eager", "compiled" (torch.compile of the network, shapes static) or "graph" (steps captured in CUDA graphs over
    static tensors; on a CPU they are called, which tests the loops and measures nothing).
    """

    def __init__(self, settings: Settings, dtype: str, mode: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.settings, self.dtype, self.mode, self.device = settings, dtype, mode, device
        self.model = resnet18(settings.classes, settings.width).to(device).train()
        self.network: nn.Module = torch.compile(self.model, dynamic=False) if mode == "compiled" else self.model  # type: ignore[assignment]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        self.autocast = None if dtype == "float32" else DTYPES[dtype]
        self.batches = batches(settings, device)
        self._position = 0

    def next_batch(self) -> Batch:
        self._position = (self._position + 1) % len(self.batches)
        return self.batches[self._position]

    def casting(self) -> AbstractContextManager[Any]:
        # a graph must not hold weights that were cast before it was captured
        cached = self.mode != "graph"
        dtype, enabled = self.autocast or torch.bfloat16, self.autocast is not None
        return torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=cached)

    def forward(self, inputs: Tensor) -> Tensor:
        """The training forward: a graph is recorded, batch statistics move."""
        with self.casting():
            return self.network(inputs)

    def score(self, inputs: Tensor) -> Tensor:
        """The scoring forward and nothing else, as a careful user writes it; the network is in evaluation mode."""
        with torch.no_grad(), self.casting():
            return self.network(inputs)

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.casting():
            loss = F.cross_entropy(self.network(inputs), targets)
        loss.backward()
        self.optimizer.step()

    def captured(self, step: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        """(replay, its static result); on a CPU the step itself, whose result is made static by copying."""
        if self.device.type == "cuda":
            graph, outputs = timing.capture([step])
            return graph.replay, outputs[0]
        static = step()

        def call() -> None:
            _copy_tree(static, step())

        return call, static

    @cached_property
    def naive_select(self) -> Callable[..., Any]:
        """benchmarks/naive.py, compiled where the mode says so; one for all sampling rates."""
        return compile_peer(naive.naive_select, self.device, False) if self.mode == "compiled" else naive.naive_select

    @cached_property
    def static(self) -> "Static":
        return Static(self)


def _copy_tree(to: Any, source: Any) -> None:
    if isinstance(to, Tensor):
        to.copy_(source)
    elif isinstance(to, Mapping):
        for name in to:
            _copy_tree(to[name], source[name])
    elif isinstance(to, tuple):
        for a, b in zip(to, source, strict=True):
            _copy_tree(a, b)


class Static:
    """The tensors that the graphs of a rig read and write, and the graphs that all its contenders share."""

    def __init__(self, rig: Rig) -> None:
        n = rig.settings.batch
        inputs, targets = rig.batches[0]
        self.inputs, self.targets = inputs.clone(), targets.clone()
        # the first n rows are the batch of the update; a selection adds at most n
        self.rows, self.row_targets = torch.cat([inputs, inputs]), torch.cat([targets, targets])
        self.update, _ = rig.captured(lambda: rig.update(self.rows[:n], self.row_targets[:n]))
        self.forward, _ = rig.captured(lambda: rig.forward(self.inputs).detach())

        def score() -> Tensor:
            rig.model.eval()
            logits = rig.score(self.inputs)
            rig.model.train()
            return logits

        self.score, self.logits = rig.captured(score)

    def load(self, batch: Batch) -> None:
        self.inputs.copy_(batch[0])
        self.targets.copy_(batch[1])
