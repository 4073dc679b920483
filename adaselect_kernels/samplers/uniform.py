"""Uniform sampling: of the whole set, and of a fresh subset every epoch."""

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels.checks import selected_count
from adaselect_kernels.samplers.sampler import OrderedSampler


class UniformSampler(OrderedSampler):
    """Every row once an epoch, in random order: plain SGD, what every other sampler is measured against.

    >>> sampler = UniformSampler(rows=5, batch_size=2)
    >>> sorted(row for batch in sampler for row in batch), len(sampler)
    ([0, 1, 2, 3, 4], 3)
    """

    name = "uniform"

    def _epoch_rows(self) -> Tensor:
        return torch.randperm(self.rows, generator=self._generator)


class RS2(OrderedSampler):
    """A fresh uniform subset every epoch (Okanovic et al. 2024): the control that costs nothing.

    gamma: its share of the rows, 0 < gamma <= 1; k = clamp(floor(gamma rows + 0.5), 1, rows) of them.

    >>> sampler = RS2(rows=10, batch_size=4, gamma=0.5)
    >>> [len(batch) for batch in sampler]
    [4, 1]
    """

    name = "rs2"

    def __init__(
        self, rows: int | Sized, batch_size: int, *, gamma: float, seed: int = 0, drop_last: bool = False
    ) -> None:
        super().__init__(rows, batch_size, seed=seed, drop_last=drop_last)
        selected_count(gamma, self.rows)  # its checks
        self.gamma = float(gamma)

    def _config(self) -> dict[str, Any]:
        return {"gamma": self.gamma}

    def _epoch_rows(self) -> Tensor:
        return torch.randperm(self.rows, generator=self._generator)[: selected_count(self.gamma, self.rows)]
