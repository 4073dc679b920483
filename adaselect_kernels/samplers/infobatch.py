"""Unbiased pruning of what is already well learned (Qin et al. 2024, InfoBatch)."""

import math
import numbers
from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels.samplers.sampler import Batch, OrderedSampler, require_int


class InfoBatch(OrderedSampler):
    """Drops some of the rows whose last loss is small, and lets the others of these count for them.

    At the start of an epoch every row whose last loss is strictly below the mean of the known ones is dropped with
    probability r, or kept with the weight 1 / (1 - r): the expected gradient is that of all rows.
    Multiply the losses of a batch by `weights` (None: all one) before the mean. Rows without a loss are kept, at weight 1.

    epochs: how many will be run; the last ceil(full_share epochs) of them, and any beyond, use all rows.
    ratio: r, 0 <= r < 1. full_share: in [0, 1].

    >>> sampler = InfoBatch(rows=4, batch_size=4, epochs=8)
    >>> rows = next(iter(sampler))
    >>> sampler.weights, sampler.observe(torch.tensor([0.1, 0.2, 3.0, 0.7])[rows])
    (None, None)
    >>> kept = next(iter(sampler))  # the mean is 1: row 2 stays, and some of the others with twice their weight
    >>> 2 in kept, sampler.weights[kept.index(2)].item(), sampler.weights.max().item() if len(kept) > 1 else 2.0
    (True, 1.0, 2.0)
    """

    name = "infobatch"
    learns = True

    def __init__(
        self,
        rows: int | Sized,
        batch_size: int,
        *,
        epochs: int,
        ratio: float = 0.5,
        full_share: float = 0.125,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(rows, batch_size, seed=seed, drop_last=drop_last)
        self.epochs = require_int("epochs", epochs)
        for name, value in (("ratio", ratio), ("full_share", full_share)):
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"ratio must be in [0, 1), got {ratio!r}")
        if not 0.0 <= full_share <= 1.0:
            raise ValueError(f"full_share must be in [0, 1], got {full_share!r}")
        self.ratio, self.full_share = float(ratio), float(full_share)
        self._losses = torch.full((self.rows,), math.nan, dtype=torch.float64)  # the last of each row
        self._below = torch.zeros(self.rows, dtype=torch.bool)  # at the start of the epoch

    def _config(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "ratio": self.ratio, "full_share": self.full_share}

    def _epoch_rows(self) -> Tensor:
        full = self.epoch >= self.epochs - math.ceil(self.full_share * self.epochs - 1e-9)
        self._below = torch.zeros_like(self._below) if full else self._losses < self._losses.nanmean()
        dropped = self._below & (torch.rand(self.rows, dtype=torch.float64, generator=self._generator) < self.ratio)
        return self.shuffled((~dropped).nonzero().flatten())

    def _weights_of(self, rows: Tensor) -> Tensor | None:
        if not bool(self._below.any()):
            return None
        # 1 / (1 - r) for the kept rows below the mean
        return torch.ones(rows.shape[0], dtype=torch.float32).masked_fill_(self._below[rows], 1 / (1 - self.ratio))

    def _learn(self, batch: Batch, rows: Tensor, losses: Tensor, confidences: Tensor | None) -> None:
        self._losses[rows] = losses

    def _state(self) -> dict[str, Tensor]:
        return super()._state() | {"losses": self._losses, "below": self._below}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        losses, below = state["losses"], state["below"]
        if losses.shape != (self.rows,) or below.shape != (self.rows,):
            raise ValueError(f"state has losses of {tuple(losses.shape)} rows, expected {self.rows}")
        super()._load(state)
        self._losses, self._below = losses, below
