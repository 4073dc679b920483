"""Sampling by how uncertain the predictions of a row were over its history (Chang et al. 2017, Active Bias)."""

import math
import numbers
from collections.abc import Mapping, Sized
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaselect_kernels.functional import select_topk
from adaselect_kernels.samplers.sampler import Batch, BatchSampler

_LEAST = 1e-300  # weight of a row that should not be drawn: it comes after all others, and then at random


class _HistorySampler(BatchSampler):
    """Rows drawn with probability proportional to a function of p, the running mean of p_y over the row's history.

    Each batch has b distinct rows, the b smallest E_i / w_i with E_i i.i.d. Exp(1) (Efraimidis & Spirakis 2006): drawn one
    after another without replacement, each with probability w_i over what is left. O(rows) a batch. An epoch is
    ceil(rows / batch_size) batches, all full, so drop_last changes nothing.

    smoothing: added to every weight, so that no row is forgotten, >= 0. With 0 a row of weight 0 is drawn only when fewer
        than b others are left. The paper leaves it open.

    `observe` takes p_y as `confidences`; without, p_y = exp(-loss) and the losses must be >= 0.
    """

    learns = True
    unseen: ClassVar[float]  # weight of a row without a history: the largest there is

    def __init__(
        self,
        rows: int | Sized,
        batch_size: int,
        *,
        smoothing: float = 0.01,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(rows, batch_size, seed=seed, drop_last=drop_last)
        if self.batch_size > self.rows:
            raise ValueError(f"batch_size must be at most the number of rows, {self.rows}, got {batch_size}")
        if isinstance(smoothing, bool) or not isinstance(smoothing, numbers.Real):
            raise TypeError(f"smoothing must be a number, got {smoothing!r}")
        if not 0.0 <= smoothing < math.inf:
            raise ValueError(f"smoothing must be finite and not negative, got {smoothing!r}")
        self.smoothing = float(smoothing)
        self._sums = torch.zeros(self.rows, dtype=torch.float64)  # of p_y
        self._seen = torch.zeros(self.rows, dtype=torch.int64)

    def _weight(self, p: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def row_weights(self) -> Tensor:
        """What the next batch is drawn by, [rows] float64, not normalised."""
        weights = self._weight(self._sums / self._seen)  # 0 / 0 is NaN where nothing is known
        return torch.where(self._seen > 0, weights, self.unseen) + self.smoothing

    def _config(self) -> dict[str, Any]:
        return {"smoothing": self.smoothing}

    def _start_epoch(self) -> int:
        return -(-self.rows // self.batch_size)

    def _draw(self) -> Batch:
        noise = torch.empty(self.rows, dtype=torch.float64).exponential_(generator=self._generator)
        keys = noise / self.row_weights.clamp(min=_LEAST)
        return Batch(select_topk(keys, self.batch_size, largest=False, order="index"))

    def _check_observed(self, losses: Tensor | None, confidences: Tensor | None) -> None:
        if losses is not None and confidences is None and bool((losses < 0).any()):
            raise ValueError(f"p_y = exp(-loss) needs losses >= 0, got {float(losses.min())}: give confidences")

    def _learn(self, batch: Batch, rows: Tensor, losses: Tensor, confidences: Tensor | None) -> None:
        self._sums[rows] += torch.exp(-losses) if confidences is None else confidences
        self._seen[rows] += 1

    def _state(self) -> dict[str, Tensor]:
        return {"sums": self._sums, "seen": self._seen}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        sums, seen = state["sums"], state["seen"]
        if sums.shape != self._sums.shape or seen.shape != self._seen.shape:
            raise ValueError(f"state has histories of {tuple(sums.shape)} rows, expected {self.rows}")
        if not bool(((sums >= 0) & (sums <= seen * (1 + 1e-9))).all()):
            raise ValueError("state has means of p_y outside [0, 1]")
        self._sums, self._seen = sums, seen


class PSGD(_HistorySampler):
    """Weights 1 - p: rows predicted badly so far; 1 for a row not seen yet. See the module's base for the settings.

    Chang et al. 2017, SGD-SPD.

    >>> sampler = PSGD(rows=4, batch_size=2, smoothing=0.0)
    >>> rows = next(iter(sampler))
    >>> sampler.observe(torch.tensor([0.0, 1.0]), confidences=torch.tensor([0.9, 0.4]))
    >>> sampler.row_weights[rows]
    tensor([0.1000, 0.6000], dtype=torch.float64)
    """

    name = "p_sgd"
    unseen = 1.0

    def _weight(self, p: Tensor) -> Tensor:
        return 1 - p


class CSGD(_HistorySampler):
    """Weights p (1 - p): rows close to the decision threshold so far; 0.25 for a row not seen yet.

    Chang et al. 2017, SGD-STC in its simplest form, as it is compared with in the IMPON paper.

    >>> sampler = CSGD(rows=4, batch_size=2, smoothing=0.0)
    >>> rows = next(iter(sampler))
    >>> sampler.observe(torch.tensor([0.0, 1.0]), confidences=torch.tensor([0.9, 0.5]))
    >>> sampler.row_weights[rows]
    tensor([0.0900, 0.2500], dtype=torch.float64)
    """

    name = "c_sgd"
    unseen = 0.25

    def _weight(self, p: Tensor) -> Tensor:
        return p * (1 - p)
