"""The experiments: data, model, loss and settings of each (AdaSelection, Table 3), and what their tasks compute."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaselect_kernels.functional import SampleStats
from benchmarks.paper.datasets import Data, Split

RATES = (0.1, 0.2, 0.3, 0.4, 0.5)
ALL = ("control", "paper", "adaselection", "beta", "neighbour", "impon", "dynams")
SHORT = (  # what a smoke run runs: one of each kind
    *("none", "short_uniform", "short_scored", "rs2", "uniform", "big_loss", "grad_norm", "coreset1"),
    *("ada2-relative", "ada3-relative", "ada3-log_ratio-std", "ada4-relative-cur"),
    *("selective_backprop", "rho_loss", "infobatch", "impon-200", "dynams-0.6", "dynams-0.6-psp"),
)


@dataclass(frozen=True)
class Experiment:
    """One experiment; `smoke` are the fields that a smoke run replaces.

    points: records of a run, evenly over its epochs. train, held_out: rows used of each part, None all.
    width: of the model (hidden units, channels, embedding). slim: the smaller width of the parameter-sharing proxy.
    """

    name: str
    title: str
    data: str
    task: str
    batch_size: int
    epochs: int
    seeds: int
    width: int
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    rates: tuple[float, ...] = RATES
    groups: tuple[str, ...] = ALL
    points: int = 20
    train: int | None = None
    held_out: int | None = None
    augment: bool = False
    slim: float = 0.25
    smoke: tuple[tuple[str, Any], ...] = ()

    @property
    def higher_is_better(self) -> bool:
        return self.task == "classification"

    @property
    def metric(self) -> str:
        return {
            "classification": "accuracy in percent",
            "regression": "mean squared error",
            "language": "loss in nats",
        }[self.task]


def _resnet(name: str, title: str, train: int = 2048, **settings: Any) -> Experiment:
    smoke = {"epochs": 3, "width": 8, "train": train, "held_out": 500, "points": 3}
    return Experiment(
        name, title, name, "classification", 128, 30, 3, 64, weight_decay=5e-4, augment=True, smoke=tuple(smoke.items()),
        **settings,
    )  # fmt: skip


_TINY = (("epochs", 2), ("train", 1000), ("held_out", 200), ("points", 2))
EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "regression", "y = 2x + 1, an MLP with one hidden layer", "regression", "regression", 100, 10, 5, 32,
            points=10, smoke=_TINY,
        ),
        Experiment(
            "bike", "Bike Sharing, an MLP with two layers", "bike", "regression", 100, 100, 5, 64,
            smoke=(("epochs", 10), ("points", 2)),
        ),
        Experiment("digits", "Digits, an MLP", "digits", "classification", 64, 20, 3, 64, smoke=_TINY),
        Experiment("mnist", "MNIST, an MLP", "mnist", "classification", 128, 8, 3, 128, points=4, train=20_000, smoke=_TINY),
        _resnet("cifar10", "CIFAR-10, ResNet-18"),
        _resnet("cifar100", "CIFAR-100, ResNet-18"),
        _resnet("svhn", "SVHN, ResNet-18"),
        Experiment(
            "text", "WikiText-2 as bytes, a transformer with one block", "text", "language", 100, 3, 2, 32,
            learning_rate=0.1, rates=(0.1, 0.2, 0.4), points=6, train=8000, held_out=500,
            smoke=(("epochs", 1), ("train", 1000), ("held_out", 100), ("points", 1)),
        ),
        Experiment(
            "wikitext2", "WikiText-2 as words, a transformer with two blocks", "wikitext2", "language", 100, 10, 3, 200,
            points=10, smoke=(("epochs", 1), ("train", 400), ("held_out", 100), ("points", 1), ("width", 16)),
        ),
    )
}  # fmt: skip


# ---- models


class Transformer(nn.Module):
    """A causal language model: pre-norm blocks, learned positions, tokens [N, T] to logits [N, T, vocabulary]."""

    def __init__(self, vocabulary: int, length: int, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.inner(self.norm1(hidden)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + self.outer(mixed)
        return hidden + self.down(F.gelu(self.up(self.norm2(hidden))))


def build_model(experiment: Experiment, data: Data, slim: float | None = None) -> nn.Module:
    """The experiment's model with fresh weights from torch's random stream; `slim`: slimmable to that width."""
    inputs, width = data.train.inputs, experiment.width
    if data.task == "language":
        blocks = 2 if experiment.name == "wikitext2" else 1
        return Transformer(data.classes, inputs.shape[1], width, blocks, heads=2)
    if inputs.dim() == 4:
        from adaselect_kernels.models import resnet18, slimmable_resnet18

        if slim is not None:
            return slimmable_resnet18(data.classes, widths=(1.0, slim), width=width)
        return resnet18(data.classes, width=width)
    flat = [nn.Flatten()] if inputs.dim() > 2 else []
    features = inputs[0].numel()
    model = nn.Sequential(*flat, nn.Linear(features, width), nn.ReLU(), nn.Linear(width, data.classes))
    if slim is None:
        return model
    from adaselect_kernels.models import make_slimmable

    return make_slimmable(model, widths=(1.0, slim))


# ---- what a task computes

Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]


def classification_losses(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), targets, reduction="none")


def regression_losses(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return (model(inputs)[:, 0] - targets).square()


def language_losses(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """[N]: mean over the positions of each sequence."""
    return F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none").mean(1)


LOSSES: dict[str, Losses] = {
    "classification": classification_losses,
    "regression": regression_losses,
    "language": language_losses,
}


def score_logits(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


def score_regression(model: nn.Module, batch: Any) -> Tensor:
    return regression_losses(model, batch[0], batch[1])


def score_regression_norms(model: nn.Module, batch: Any) -> SampleStats:
    """Losses l = (f - y)^2 and the norm of their gradient in the last layer's weight and bias, 2 |f - y| sqrt(|h|^2 + 1)."""
    *body, head = model  # type: ignore[misc]
    hidden = batch[0]
    for layer in body:
        hidden = layer(hidden)
    error = head(hidden)[:, 0] - batch[1]
    return SampleStats(loss=error.square(), grad_norm=2 * error.abs() * (hidden.square().sum(1) + 1).sqrt())


def scoring(task: str, needs_norms: bool) -> Callable[[nn.Module, Any], Any]:
    """What a policy chooses from, of a batch (inputs, targets, ...)."""
    if task != "regression":
        return score_logits
    return score_regression_norms if needs_norms else score_regression


@torch.no_grad()
def evaluate(model: nn.Module, task: str, split: Split, rows: int = 500) -> tuple[float, float]:
    """(metric, loss) on a split, in eval mode; accuracy in percent for classification, else the loss itself."""
    training = model.training
    model.eval()
    correct, total = 0.0, 0.0
    for inputs, targets in zip(split.inputs.split(rows), split.targets.split(rows), strict=True):
        if task == "classification":
            logits = model(inputs)
            correct += float((logits.argmax(1) == targets).sum())
            total += float(F.cross_entropy(logits, targets, reduction="sum"))
        else:
            total += float(LOSSES[task](model, inputs, targets).sum())
    model.train(training)
    loss = total / len(split.targets)
    return (100 * correct / len(split.targets) if task == "classification" else loss), loss
