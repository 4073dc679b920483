"""One run: a directory with config.json, epochs.jsonl, checkpoint.pt and, when it is over, done.json.

A killed run goes on from its checkpoint bit for bit; a finished one is skipped. Wall-clock is that of training alone, with
scoring and choosing in it; evaluation, checkpoints and what a method prepares beforehand are outside, the last reported.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaselect_kernels.policies import get_policy
from adaselect_kernels.samplers import get_sampler
from adaselect_kernels.training import SelectedBatches
from adaselect_kernels.training.files import replace_file
from benchmarks.paper.datasets import Data
from benchmarks.paper.settings import RunConfig, dynams_period, policy_updates
from benchmarks.paper.tasks import LOSSES, Experiment, build_model, evaluate, scoring

CONFIG, RECORDS, CHECKPOINT, DONE = "config.json", "epochs.jsonl", "checkpoint.pt", "done.json"
GATHERED = 2**20  # elements: what the loader gathers at once

Batch = tuple[Tensor, ...]


class Stopped(Exception):
    """The run was asked to stop; its checkpoint is written."""


class Candidates:
    """Full batches of the training rows in the order that seed and epoch fix, the same for every method."""

    def __init__(self, tensors: Batch, batch_size: int, seed: int, augmented: bool) -> None:
        self.tensors, self.batch_size, self.seed, self.augmented = tensors, batch_size, seed, augmented
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.tensors[1]) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.tensors[1]), generator=generator)[: len(self) * self.batch_size]
        batches = max(1, GATHERED // (self.batch_size * self.tensors[0][0].numel()))
        for rows in order.to(self.tensors[1].device).split(batches * self.batch_size):
            parts = [tensor[rows] for tensor in self.tensors]
            if self.augmented:
                parts[0] = augment(parts[0])
            yield from zip(*(part.split(self.batch_size) for part in parts), strict=True)


def augment(images: Tensor) -> Tensor:
    """Random crops of the images padded by 4, half of them mirrored; draws from torch's CPU stream."""
    count, channels, height, width = images.shape
    down, right = torch.randint(0, 9, (2, count, 1))
    mirrored = torch.rand(count, 1) < 0.5
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    image = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return F.pad(images, (4, 4, 4, 4))[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


class Trainer:
    """Model, optimizer and schedule; SGD with momentum, the learning rate half a cosine from its start to zero."""

    def __init__(self, config: RunConfig, experiment: Experiment, data: Data) -> None:
        torch.manual_seed(config.seed)
        self.config, self.data = config, data
        self.model = build_model(experiment, data, config.slim).to(data.train.inputs.device)
        self.losses = LOSSES[data.task]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
        )
        self.step = self.rows = 0
        self.loss_sum = torch.zeros((), device=data.train.inputs.device)  # of the updates since the last record
        self.loss_updates = 0

    def update(self, inputs: Tensor, targets: Tensor, weights: Tensor | None, progress: float) -> Tensor | None:
        """One optimizer step at `progress` in [0, 1) of the schedule; losses [b], None where two widths are trained."""
        # lr (1 + cos(pi t / T)) / 2
        group = self.optimizer.param_groups[0]  # not kept: loading a state makes another one
        group["lr"] = self.config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        self.optimizer.zero_grad()
        if self.config.slim is not None:
            losses, loss = None, self._both_widths(inputs, targets)
        else:
            losses = self.losses(self.model, inputs, targets)
            loss = losses.mean() if weights is None else (losses * weights).mean()
            loss.backward()
            losses = losses.detach()
        self.optimizer.step()
        self.step += 1
        self.rows += len(targets)
        self.loss_sum += loss.detach()
        self.loss_updates += 1
        return losses

    def _both_widths(self, inputs: Tensor, targets: Tensor) -> Tensor:
        from adaselect_kernels.models import joint_backward

        return joint_backward(self.model, inputs, targets, F.cross_entropy)[1.0]

    def take_loss(self) -> float | None:
        """Mean training loss since the last call; None when it is not finite."""
        mean = float(self.loss_sum) / max(1, self.loss_updates)
        self.loss_sum.zero_()
        self.loss_updates = 0
        return mean if math.isfinite(mean) else None


# ---- where the batches come from: nothing chosen, chosen after a scoring forward, chosen before any


class Source:
    """Trains one epoch after the other. planned: updates in all, None where they follow from the losses."""

    epochs: int
    planned: int | None

    def train(self, epoch: int) -> None:
        raise NotImplementedError

    def log(self) -> dict[str, Any]:
        """weights (of methods), rate (rows trained on over rows looked at), split (seconds by stage)."""
        return {"weights": None, "rate": None, "split": {}}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Everything(Source):
    """No selection, for all epochs or for `config.updates` updates."""

    def __init__(self, trainer: Trainer, loader: Candidates) -> None:
        config = trainer.config
        self.trainer, self.loader = trainer, loader
        self.planned = config.epochs * len(loader) if config.updates is None else config.updates
        self.epochs = math.ceil(self.planned / len(loader))

    def train(self, epoch: int) -> None:
        trainer, planned = self.trainer, self.planned
        assert planned is not None
        self.loader.epoch = epoch
        for inputs, targets in self.loader:
            if trainer.step == planned:
                return
            trainer.update(inputs, targets, None, trainer.step / planned)


class AfterScoring(Source):
    """A policy chooses from candidate batches; a full batch of chosen rows is an update."""

    def __init__(self, trainer: Trainer, loader: Candidates, prepared: Tensor | None) -> None:
        config, task = trainer.config, trainer.data.task
        assert config.gamma is not None
        options = dict(config.options)
        norms = config.key in ("grad_norm", "importance") or "grad_norm" in options.get("methods", ())
        forward = scoring(task, norms)
        if config.key == "uniform":
            forward = _unscored
        if config.key == "rho_loss":
            assert prepared is not None
            loader.tensors = (*loader.tensors, prepared)
            options["reference"] = reference = nn.Identity().eval()
            forward = _with_known_losses(forward, reference)
        policy = get_policy(config.key, config.gamma, seed=config.seed, **options)
        self.trainer, self.loader = trainer, loader
        self.batches = SelectedBatches(loader, trainer.model, policy, config.batch_size, forward=forward)
        self.epochs = config.epochs
        self.planned = policy_updates(config.epochs, len(loader), config.batch_size, config.gamma)

    def train(self, epoch: int) -> None:
        trainer, batches, planned = self.trainer, self.batches, self.planned
        assert planned is not None
        self.loader.epoch = epoch
        for batch in batches:
            trainer.update(batch[0], batch[1], batches.weights, trainer.step / planned)

    def log(self) -> dict[str, Any]:
        counts, seconds = self.batches.counts, self.batches.seconds
        return {
            "weights": self.batches.policy.method_weights(),
            "rate": counts.chosen / counts.candidates if counts.candidates else None,
            "split": dict(vars(seconds)),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches.state_dict(), "seconds": dict(vars(self.batches.seconds))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state["batches"])
        vars(self.batches.seconds).update(state["seconds"])


class BeforeForward(Source):
    """A sampler chooses the rows of each update, and is told their losses."""

    planned = None

    def __init__(self, trainer: Trainer) -> None:
        config, train = trainer.config, trainer.data.train
        options: dict[str, Any] = dict(config.options, seed=config.seed)
        if config.key == "rs2":
            options["gamma"] = config.gamma
        elif config.key == "impon":
            options |= {"features": train.inputs.flatten(1), "model": trainer.model}
        elif config.key == "infobatch":
            options["epochs"] = config.epochs
        elif config.key == "dynams":
            options |= {"epochs": config.epochs, "period": dynams_period(config.epochs)}
        self.sampler: Any = get_sampler(config.key, len(train.targets), config.batch_size, **options)
        self.trainer, self.epochs = trainer, config.epochs

    def train(self, epoch: int) -> None:
        trainer, sampler = self.trainer, self.sampler
        inputs, targets = trainer.data.train
        augmented = trainer.config.augment
        if getattr(sampler, "needs_scores", False):
            rows = zip(inputs.split(500), targets.split(500), strict=True)
            sampler.score(trainer.model, rows, width=trainer.config.slim)
        batches = len(sampler)
        for i, _ in enumerate(sampler):
            rows, weights = sampler.current.to(targets.device), sampler.weights
            x = augment(inputs[rows]) if augmented else inputs[rows]
            weights = None if weights is None else weights.to(targets.device)
            # The epoch's length may follow from the losses: the schedule goes by the part of the epochs that is over.
            losses = trainer.update(x, targets[rows], weights, (epoch + i / batches) / self.epochs)
            sampler.observe(losses)

    def log(self) -> dict[str, Any]:
        record = self.sampler.record()
        rate = record.rate if math.isfinite(record.rate) else None
        return {"weights": record.weights, "rate": rate, "split": record.seconds}

    def state_dict(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])


def _unscored(model: nn.Module, batch: Batch) -> Tensor:
    return torch.zeros(len(batch[1]), device=batch[1].device)  # losses that the policy does not look at


def _with_known_losses(forward: Callable[..., Any], reference: nn.Module) -> Callable[[nn.Module, Batch], Any]:
    """The reference model's losses are the third entry of the batch."""
    return lambda model, batch: batch[2] if model is reference else forward(model, batch)


def make_source(trainer: Trainer, prepared: Tensor | None = None) -> Source:
    config = trainer.config
    if config.kind == "sampler":
        return BeforeForward(trainer)
    loader = Candidates(tuple(trainer.data.train), config.batch_size, config.seed, config.augment)
    if not len(loader):
        raise ValueError(f"{len(trainer.data.train.targets)} training rows are no batch of {config.batch_size}")
    return AfterScoring(trainer, loader, prepared) if config.kind == "policy" else Everything(trainer, loader)


def reference_losses(config: RunConfig, experiment: Experiment, data: Data, folder: Path) -> dict[str, Any]:
    """losses [rows]: of models that did not see the row (RHO-LOSS without held-out data), and the seconds they took.

    Two models of the same kind and schedule, each trained on half of the training rows, give the losses of the other half.
    Kept in `folder` for the runs of the same seed.
    """
    names = ("epochs", "batch_size", "learning_rate", "momentum", "weight_decay", "width", "augment", "train", "device")
    settings = json.dumps([getattr(config, name) for name in names])
    path = folder / f"reference-seed{config.seed}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.pt"
    if path.exists():
        return torch.load(path, weights_only=True, map_location=data.train.inputs.device)
    start = time.perf_counter()
    train, state = data.train, torch.get_rng_state()
    order = torch.randperm(len(train.targets), generator=torch.Generator().manual_seed(config.seed))
    losses = torch.empty(len(order), device=train.inputs.device)
    halves = order.to(train.inputs.device).tensor_split(2)
    for own, other in (halves, halves[::-1]):
        trainer = Trainer(config, experiment, data)
        loader = Candidates((train.inputs[own], train.targets[own]), config.batch_size, config.seed, config.augment)
        planned = config.epochs * len(loader)
        for epoch in range(config.epochs):
            loader.epoch = epoch
            for inputs, targets in loader:
                trainer.update(inputs, targets, None, trainer.step / planned)
        trainer.model.eval()
        with torch.no_grad():
            for rows in other.split(500):
                losses[rows] = trainer.losses(trainer.model, train.inputs[rows], train.targets[rows])
    torch.set_rng_state(state)
    found = {"losses": losses, "seconds": time.perf_counter() - start}
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: torch.save(found, file))
    return found


# ---- the run


def run(
    config: RunConfig,
    experiment: Experiment,
    data: Data,
    folder: Path,
    facts: Mapping[str, Any],
    *,
    checkpoint_seconds: float = 5.0,
    after_epoch: Callable[[int, int], bool] = lambda epoch, epochs: False,
) -> dict[str, Any]:
    """Run `config` in folder / config.slug, from the checkpoint where there is one; returns what done.json holds.

    facts: environment and commit, written to config.json. after_epoch(done, all) is called between epochs; when it is
    true, the run writes a checkpoint and raises Stopped.
    """
    home = folder / config.slug
    if (home / DONE).exists():
        return json.loads((home / DONE).read_text())
    home.mkdir(parents=True, exist_ok=True)
    device = data.train.inputs.device
    prepared = reference_losses(config, experiment, data, folder.parent) if config.key == "rho_loss" else None
    trainer = Trainer(config, experiment, data)
    source = make_source(trainer, None if prepared is None else prepared["losses"])
    every = max(1, source.epochs // config.points)
    progress = _restore(home, trainer, source)
    written = _begin(home, config, facts, progress["records"])
    saved = time.perf_counter()
    diverged = False
    for epoch in range(progress["epoch"], source.epochs):
        _wait(device)
        start = time.perf_counter()
        try:
            source.train(epoch)
        except RuntimeError as error:
            if "diverged" not in str(error):
                raise
            diverged = True
        _wait(device)
        progress["seconds"] += time.perf_counter() - start
        progress["epoch"] = epoch + 1
        if diverged or (epoch + 1) % every == 0 or epoch + 1 == source.epochs:
            entry = _record(trainer, source, progress)
            diverged = diverged or entry["train_loss"] is None or entry["validation_loss"] is None
            written.append(entry)
            with open(home / RECORDS, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            progress["records"] = len(written)
            if diverged:
                break
            stop = after_epoch(epoch + 1, source.epochs)
            if epoch + 1 < source.epochs and (stop or time.perf_counter() - saved >= checkpoint_seconds):
                _save(home, trainer, source, progress)
                saved = time.perf_counter()
            if stop and epoch + 1 < source.epochs:
                raise Stopped(config.slug)
    return _finish(home, trainer, source, progress, written[-1], diverged, prepared)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _record(trainer: Trainer, source: Source, progress: Mapping[str, Any]) -> dict[str, Any]:
    """A line of epochs.jsonl. Everything but "seconds" is the same in a run that was killed and resumed."""
    task, log = trainer.data.task, source.log()
    validation, test = (evaluate(trainer.model, task, part) for part in (trainer.data.validation, trainer.data.test))
    values = {
        "validation": validation[0],
        "test": test[0],
        "validation_loss": validation[1],
        "test_loss": test[1],
    }
    return {
        "epoch": progress["epoch"],
        "updates": trainer.step,
        "rows": trainer.rows,
        "seconds": progress["seconds"],
        "train_loss": trainer.take_loss(),
        **{name: value if math.isfinite(value) else None for name, value in values.items()},
        "rate": log["rate"],
        "weights": log["weights"],
    }


def _begin(home: Path, config: RunConfig, facts: Mapping[str, Any], records: int) -> list[dict[str, Any]]:
    """Write config.json, and cut epochs.jsonl to the records that the checkpoint knows."""
    path = home / CONFIG
    if records and path.exists():
        document = json.loads(path.read_text())
        document["resumed_at"].append(facts["commit"])
    else:
        document = {"slug": config.slug, "config": config.as_dict(), "resumed_at": [], **facts}
    _write(path, document)
    kept = []
    if records:
        with open(home / RECORDS, encoding="utf-8") as file:
            kept = [json.loads(line) for _, line in zip(range(records), file, strict=False)]
    text = "".join(json.dumps(entry) + "\n" for entry in kept)
    replace_file(home / RECORDS, lambda file: file.write(text.encode()))
    return kept


def _save(home: Path, trainer: Trainer, source: Source, progress: Mapping[str, Any]) -> None:
    device = trainer.loss_sum.device
    state = {
        "progress": dict(progress),
        "step": trainer.step,
        "rows": trainer.rows,
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "source": source.state_dict(),
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }
    replace_file(home / CHECKPOINT, lambda file: torch.save(state, file))


def _restore(home: Path, trainer: Trainer, source: Source) -> dict[str, Any]:
    path, device = home / CHECKPOINT, trainer.loss_sum.device
    if not path.exists():
        return {"epoch": 0, "records": 0, "seconds": 0.0}
    state = torch.load(path, weights_only=True, map_location="cpu")
    trainer.step, trainer.rows = state["step"], state["rows"]
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    source.load_state_dict(_to(state["source"], device) if device.type == "cuda" else state["source"])
    torch.set_rng_state(state["random"])
    if state["cuda_random"] is not None:
        torch.cuda.set_rng_state(state["cuda_random"], device)
    return state["progress"]


def _to(state: Any, device: torch.device) -> Any:
    """The waiting rows of a source on the device; everything else stays on the CPU, where it is saved from."""
    batches = state.get("batches")
    if batches is None or batches["rows"] is None:
        return state
    moved = type(batches["rows"])(row.to(device) for row in batches["rows"])
    weights = None if batches["weights"] is None else batches["weights"].to(device)
    return {**state, "batches": {**batches, "rows": moved, "weights": weights}}


def _finish(
    home: Path,
    trainer: Trainer,
    source: Source,
    progress: Mapping[str, Any],
    last: Mapping[str, Any],
    diverged: bool,
    prepared: Mapping[str, Any] | None,
) -> dict[str, Any]:
    done = {
        "diverged": diverged,
        "planned": source.planned,
        "preparation_seconds": None if prepared is None else prepared["seconds"],
        "split": {name: round(value, 6) for name, value in source.log()["split"].items()},
        **{name: last[name] for name in ("epoch", "updates", "rows", "seconds", "rate", "validation", "test")},
    }
    if diverged:
        done |= {"validation": None, "test": None}
    _write(home / DONE, done)
    (home / CHECKPOINT).unlink(missing_ok=True)
    return done


def _write(path: Path, document: Mapping[str, Any]) -> None:
    replace_file(path, lambda file: file.write((json.dumps(document, indent=1) + "\n").encode()))


# ---- costs


def measure_costs(config: RunConfig, experiment: Experiment, data: Data, batches: int = 40) -> dict[str, float]:
    """Median seconds of an update, and of scoring and choosing for a candidate batch; of the run's own loop.

    config: of a policy at a rate; its first `batches` candidate batches are run after ten that are not counted.
    """
    trainer = Trainer(config, experiment, data)
    source = make_source(trainer)
    assert isinstance(source, AfterScoring)
    device, seconds = data.train.inputs.device, source.batches.seconds
    source.batches.synchronize = device.type == "cuda"
    times: dict[str, list[float]] = {"update": [], "score_and_select": []}
    before = dict(vars(seconds)), 0, 0
    epoch = 0
    while source.batches.counts.candidates < (batches + 10) * config.batch_size:
        source.loader.epoch = epoch
        for batch in source.batches:
            trainer.update(batch[0], batch[1], source.batches.weights, 0.0)
            _wait(device)
            now, counts = dict(vars(seconds)), source.batches.counts
            # `update` of the seconds lags by this one: the loop body is not over
            candidates = counts.candidates // config.batch_size
            if before[1] >= 10 and counts.updates - 1 > before[2]:
                scored = candidates - before[1]
                spent = sum(now[name] - before[0][name] for name in ("load", "score", "select"))
                if scored:
                    times["score_and_select"].append(spent / scored)
                times["update"].append((now["update"] - before[0]["update"]) / (counts.updates - 1 - before[2]))
            before = now, candidates, counts.updates - 1
        epoch += 1
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}
