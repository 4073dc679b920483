"""A softmax regression in float64, in NumPy and in torch: small, and its losses feed back into what is drawn next."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset


def problem(rows, columns=5, classes=3, seed=0):
    """Inputs [rows, columns] float64, targets [rows]; some of the targets are noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns))
    y = (x @ rng.normal(size=(columns, classes)) + rng.normal(size=(rows, classes))).argmax(1)
    return x, y


class NumpyModel:
    """logits = x W^T, plain SGD on the mean of weights * cross-entropy."""

    def __init__(self, columns, classes, rate):
        self.w, self.rate = np.linspace(-0.3, 0.3, columns * classes).reshape(classes, columns), rate

    def norm(self):
        return np.sqrt((self.w**2).sum())

    def step(self, x, y, weights=None):
        """Losses before the update, then the update."""
        z = x @ self.w.T
        z = z - z.max(1, keepdims=True)
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        losses = -np.log(p[np.arange(len(y)), y])
        g = p.copy()
        g[np.arange(len(y)), y] -= 1
        if weights is not None:
            g *= np.asarray(weights)[:, None]
        self.w = self.w - self.rate * g.T @ x / len(y)
        return losses


class TorchModel(nn.Module):
    def __init__(self, columns, classes, rate):
        super().__init__()
        w = torch.from_numpy(NumpyModel(columns, classes, rate).w)
        self.w, self.rate = nn.Parameter(w.clone()), rate

    def step(self, x, y, weights=None):
        losses = nn.functional.cross_entropy(x @ self.w.T, y, reduction="none")
        mean = losses.mean() if weights is None else (losses * weights).mean()
        (gradient,) = torch.autograd.grad(mean, self.w)
        with torch.no_grad():
            self.w -= self.rate * gradient
        return losses.detach()


class Rows(Dataset):
    """Dict items that say which row they are, and count how often each was read."""

    def __init__(self, x, y):
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
        self.read = torch.zeros(len(x), dtype=torch.int64)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        self.read[row] += 1
        return {"x": self.x[row], "y": self.y[row], "row": row}
