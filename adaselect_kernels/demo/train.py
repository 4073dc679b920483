"""One run: a model trained on every candidate, or on the rows that a policy chooses, with its time split."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaselect_kernels.demo.config import DemoConfig, Variant
from adaselect_kernels.demo.replay import Batches, new_policy
from adaselect_kernels.demo.task import CandidateBatches, Digits, accuracy, small_cnn
from adaselect_kernels.training import SelectedBatches

Batch = tuple[Tensor, Tensor]


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small gain little from a second thread, and on a shared machine the threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _AllBatches:
    """Every candidate batch, as SelectedBatches would count and time it."""

    def __init__(self, loader: Iterable[Batch]) -> None:
        self._loader = loader
        self.candidates = self.updates = 0
        self.update_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            self.candidates += len(batch[1])
            self.updates += 1
            start = time.perf_counter()
            yield batch
            self.update_seconds += time.perf_counter() - start


def train(
    config: DemoConfig, variant: Variant, seed: int, task: Digits, after_epoch: Callable[[], object]
) -> tuple[dict[str, Any], Batches]:
    """Train one model; returns what results.json holds of the run, and the logits and targets its policy chose from.

    Candidates come in the same order, and the model starts from the same weights, for every variant of a seed. The
    test set is evaluated after every epoch, outside the clock.
    """
    torch.manual_seed(seed)
    model = small_cnn(config.width)
    update = _updater(config, model, config.updates(variant))
    loader = CandidateBatches(task.train_images, task.train_labels, config.batch_size, seed)
    source, recorded = _source(config, variant, seed, loader, model)
    curve = [{"candidates": 0, "updates": 0, "seconds": 0.0, "accuracy": accuracy(model, *task[2:])}]
    total = 0.0
    for _ in range(config.epochs):
        start = time.perf_counter()
        for images, labels in source:
            update(images, labels)
        total += time.perf_counter() - start
        candidates, updates = _counts(source)
        point = {"candidates": candidates, "updates": updates, "seconds": total, "accuracy": accuracy(model, *task[2:])}
        curve.append(point)
        after_epoch()
    entry = {
        "variant": variant.label,
        "seed": seed,
        "methods": list(variant.methods),
        "accuracy": curve[-1]["accuracy"],
        "candidates": curve[-1]["candidates"],
        "updates": curve[-1]["updates"],
        "backward_samples": curve[-1]["updates"] * config.batch_size,
        "seconds": _time_split(source, total),
        "curve": curve,
    }
    return entry, recorded


def warm_up(config: DemoConfig, task: Digits) -> None:
    """A few updates of a model that is thrown away: the first calls of a process are slower than the others."""
    model = small_cnn(config.width)
    update = _updater(config, model, updates=4)
    for _ in range(4):
        update(task.train_images[: config.batch_size], task.train_labels[: config.batch_size])


def _updater(config: DemoConfig, model: nn.Module, updates: int) -> Callable[[Tensor, Tensor], None]:
    """SGD with momentum under a one-cycle schedule of `updates` steps."""
    optimizer = torch.optim.SGD(
        model.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=max(updates, 1) + 1, cycle_momentum=False
    )

    def update(images: Tensor, labels: Tensor) -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return update


def _source(
    config: DemoConfig, variant: Variant, seed: int, loader: CandidateBatches, model: nn.Module
) -> tuple[SelectedBatches | _AllBatches, Batches]:
    """Where the batches of the updates come from, and the list that fills with the logits and targets of the scoring."""
    recorded: list[Batch] = []

    def scored(model: nn.Module, batch: Batch) -> Batch:
        recorded.append((model(batch[0]), batch[1]))
        return recorded[-1]

    def unscored(model: nn.Module, batch: Batch) -> Tensor:
        return torch.zeros(len(batch[1]))  # losses that the policy does not look at

    if variant.policy is None:
        return _AllBatches(loader), recorded
    policy = new_policy(config, variant, seed)
    forward = scored if variant.scored else unscored
    return SelectedBatches(loader, model, policy, config.batch_size, forward=forward), recorded


def _counts(source: SelectedBatches | _AllBatches) -> tuple[int, int]:
    counts = source if isinstance(source, _AllBatches) else source.counts
    return counts.candidates, counts.updates


def _time_split(source: SelectedBatches | _AllBatches, total: float) -> dict[str, float]:
    if isinstance(source, _AllBatches):
        parts = {"scoring": 0.0, "selection": 0.0, "update": source.update_seconds}
    else:
        seconds = source.seconds
        parts = {"scoring": seconds.score, "selection": seconds.select, "update": seconds.update}
    return parts | {"other": total - sum(parts.values()), "total": total}
