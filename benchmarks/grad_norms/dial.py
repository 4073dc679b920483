"""The figure and table of docs/grad_norms.md: `python -m benchmarks.grad_norms.dial`.

A small CNN with group normalisation on scikit-learn's digits, after two epochs; the positions of the dial against the exact
norms on four batches it has not been trained on.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaselect_kernels.grad_norms import DialReport, dial_report
from benchmarks.records import ROOT

EPOCHS, BATCH, HELD_OUT = 2, 64, 256


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """1,797 images [1, 8, 8] in [0, 1] and their digits, shuffled."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return images[order], torch.as_tensor(labels, dtype=torch.int64)[order]


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def report(seed: int = 0) -> DialReport:
    torch.manual_seed(seed)
    images, targets = digits(seed)
    model, train = network(), range(HELD_OUT, len(images) - BATCH + 1, BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(EPOCHS):
        for at in train:
            optimizer.zero_grad()
            F.cross_entropy(model(images[at : at + BATCH]), targets[at : at + BATCH]).backward()
            optimizer.step()
    batches = [(images[at : at + BATCH], targets[at : at + BATCH]) for at in range(0, HELD_OUT, BATCH)]
    return dial_report(model, batches, probes=16, seed=seed)


def main(path: Path = ROOT / "docs" / "figures" / "grad_norm_dial.png") -> int:
    found = report()
    print(found.table() + f"\nThe best variance gain there is: {found.best:.2f}")
    found.figure(path, "Gradient norms of each method over the exact ones, digits after two epochs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
