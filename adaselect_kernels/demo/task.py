"""The task: scikit-learn's handwritten digits, 1797 images of 8x8, and a small CNN."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from adaselect_kernels.demo.config import TEST_SAMPLES

CLASSES = 10


class Digits(NamedTuple):
    train_images: Tensor  # [1437, 1, 8, 8] float32 in [-1, 1]
    train_labels: Tensor  # [1437] int64
    test_images: Tensor  # [360, 1, 8, 8]
    test_labels: Tensor  # [360]


def load_task() -> Digits:
    """The images that scikit-learn ships, with a stratified test split that no seed of the demo changes."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=TEST_SAMPLES, stratify=labels, random_state=0)
    train_images, test_images = (
        torch.tensor(part, dtype=torch.float32).div(8).sub(1).reshape(-1, 1, 8, 8) for part in parts[:2]
    )
    return Digits(train_images, torch.tensor(parts[2]), test_images, torch.tensor(parts[3]))


class CandidateBatches:
    """A loader over tensors in memory: each pass is a new permutation from its own seed, full batches only."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int) -> None:
        self._images, self._labels, self._batch_size = images, labels, batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._labels) // self._batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._labels), generator=self._generator)
        for rows in order[: len(self) * self._batch_size].split(self._batch_size):
            yield self._images[rows], self._labels[rows]


def small_cnn(width: int) -> nn.Sequential:
    """Three 3x3 convolutions with batch normalisation, a max-pool, a mean over positions, a linear layer."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, width),
        *block(width, width),
        nn.MaxPool2d(2),
        *block(width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, CLASSES),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of `images` classified right, in eval mode; the model's mode is as before afterwards."""
    training = model.training
    model.eval()
    correct = (model(images).argmax(1) == labels).float().mean().item()
    model.train(training)
    return correct
