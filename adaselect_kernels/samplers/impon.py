"""IMPON: a linear model of the loss, learned online, chooses the rows before they are loaded (HITY workshop, NeurIPS 2022)."""

import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from adaselect_kernels.functional import bank_select
from adaselect_kernels.options import STD_EPS
from adaselect_kernels.samplers.sampler import Batch, BatchSampler, distinct_rows, require_bool, require_int

Features = Tensor | Callable[[Tensor], Tensor]
BANK = 200  # the paper's n
_NLMS_EPS = 1e-12
_REMEDY = (
    "learning_rate={:g} is too large for these features or weights; standardize the features, lower it, or use"
    " normalized=True"
)


class IMPON(BatchSampler):
    """Per batch: a bank of n random rows, their losses predicted from the inputs alone, training on the b worst.

    The context of row i is c_i = [x_i; norm of the model's weights], its predicted loss theta . c_i. The batch is the b rows
    of the bank with the highest prediction, ties at random: theta is 0 at the start of every epoch, so the first batch of
    an epoch is uniform. `observe` takes one step of stochastic gradient descent on the mean squared error of these b rows,
        theta -= learning_rate (2 / b) sum_i (theta . c_i - l_i) c_i.
    An epoch is ceil(rows / bank) batches, all full, so drop_last changes nothing. Only the chosen rows are loaded.

    features: x, as [rows, D] floats or uint8 (see `standardized_features`), on any device; or a function of row numbers
        [n] int64 that returns their [n, D]. It is asked once for the bank and again for the rows observed, and must
        be a function of the row numbers alone.
    bank: n, default min(200, rows). The norm in a context is that at the time of the draw.
    model: whose weights the norm is of; None: the constant 1 stands in its place.
    learning_rate: default 1e-6, the paper's, or 0.5 with `normalized`. A step that makes the error on its own rows worse
        warns once: the learning rate is too large for these features.
    normalized: normalized least mean squares, theta -= learning_rate (1 / b) sum_i (theta . c_i - l_i) c_i / |c_i|^2, which is
        stable for learning rates below 2 whatever the scale of the features.
    explore: share of the batch drawn uniformly from what is left of the bank, floor(explore b + 0.5) rows, in [0, 1].
    lowest: train on the lowest predictions instead (the paper's IMPONwLowScores).
    impl: of `bank_select`.

    Two rows of one feature, both in the bank: the first step is theta = 0.1 * 2/2 * (1 * [1, 1] + 3 * [2, 1]).

    >>> sampler = IMPON(2, 2, features=torch.tensor([[1.0], [2.0]]), learning_rate=0.1)
    >>> rows = next(iter(sampler))
    >>> sampler.observe(torch.tensor([1.0, 3.0]), rows=[0, 1])
    >>> sampler.theta
    tensor([0.7000, 0.4000], dtype=torch.float64)
    >>> sampler.predict(torch.tensor([0, 1]))
    tensor([1.1000, 1.8000])
    """

    name = "impon"
    learns = True

    def __init__(
        self,
        rows: int | Sized,
        batch_size: int,
        *,
        features: Features,
        bank: int | None = None,
        model: nn.Module | None = None,
        learning_rate: float | None = None,
        normalized: bool = False,
        explore: float = 0.0,
        lowest: bool = False,
        impl: str = "auto",
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(rows, batch_size, seed=seed, drop_last=drop_last)
        self.bank = min(BANK, self.rows) if bank is None else require_int("bank", bank)
        if self.bank > self.rows:
            raise ValueError(f"bank must be at most the number of rows, {self.rows}, got {bank}")
        if self.batch_size > self.bank:
            raise ValueError(f"batch_size must be at most the bank, {self.bank} rows, got {batch_size}")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module or None, got {type(model).__name__}")
        self.normalized = require_bool("normalized", normalized)
        self.lowest = require_bool("lowest", lowest)
        if learning_rate is None:
            learning_rate = 0.5 if normalized else 1e-6
        for name, value in (("learning_rate", learning_rate), ("explore", explore)):
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0.0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {learning_rate!r}")
        if not 0.0 <= explore <= 1.0:
            raise ValueError(f"explore must be in [0, 1], got {explore!r}")
        self.learning_rate, self.explore = float(learning_rate), float(explore)
        self.explored = math.floor(self.explore * self.batch_size + 0.5)
        self.model, self.impl, self.features = model, impl, features
        self._warned = False
        self._theta: Tensor | None = None  # [D + 1] float64, beside the features; None before D is known
        if isinstance(features, Tensor):
            self._theta = self._zeros(_check_features(features, self.rows))
        elif not callable(features):
            raise TypeError(f"features must be a tensor [rows, D] or a function of rows, got {type(features).__name__}")

    @property
    def theta(self) -> Tensor:
        """The linear model, [D + 1] float64; the last entry is that of the norm. RuntimeError before D is known."""
        if self._theta is None:
            raise RuntimeError("theta has no size before `features` was called for the first bank")
        return self._theta

    def predict(self, rows: Tensor, norm: float | None = None) -> Tensor:
        """Predicted losses theta . c of any `rows` [n] int64, float32 (float64 for float64 features); norm: as of now."""
        return self._score(rows, 1, self._norm() if norm is None else norm)[1]

    def _config(self) -> dict[str, Any]:
        return {
            "bank": self.bank,
            "learning_rate": self.learning_rate,
            "normalized": self.normalized,
            "explore": self.explore,
            "lowest": self.lowest,
            "with_norm": self.model is not None,
        }

    def _candidates(self) -> float:
        return self.bank

    def _start_epoch(self) -> int:
        return -(-self.rows // self.bank)

    def _draw(self) -> Batch:
        if self._emitted == 0 and self._theta is not None:  # the weight reset
            self._theta = torch.zeros_like(self._theta)
        bank = distinct_rows(self.bank, self.rows, self._generator)  # in random order, so that ties are too
        norm = self._norm()
        best = self.batch_size - self.explored
        if best == 0:
            return Batch(bank[: self.batch_size], note=norm)
        picked = self._score(bank, best, norm)[0].cpu()
        if self.explored:
            rest = bank[~torch.isin(bank, picked)]
            uniform = rest[distinct_rows(self.explored, rest.shape[0], self._generator)]
            picked = torch.cat([picked, uniform])
        return Batch(picked, note=norm)

    @torch.no_grad()
    def _score(self, rows: Tensor, k: int, norm: float) -> tuple[Tensor, Tensor]:
        """The k best of `rows`, and predictions."""
        if isinstance(self.features, Tensor):
            x, places = self.features, rows.to(self.features.device)
        else:
            x = self._ask(rows)
            places = torch.arange(rows.shape[0], device=x.device)
        theta = self.theta.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        picked, predictions = bank_select(x, places, theta, k, norm=norm, largest=not self.lowest, impl=self.impl)
        return (picked if isinstance(self.features, Tensor) else rows[picked.cpu()]), predictions

    @torch.no_grad()
    def _learn(self, batch: Batch, rows: Tensor, losses: Tensor, confidences: Tensor | None) -> None:
        assert batch.note is not None
        x = self.features[rows.to(self.features.device)] if isinstance(self.features, Tensor) else self._ask(rows)
        norm = torch.full((x.shape[0], 1), batch.note, dtype=torch.float64, device=x.device)
        contexts = torch.cat([x.to(torch.float64), norm], dim=1)
        errors = contexts @ self.theta - losses.to(x.device)
        if self.normalized:
            steps = errors / (contexts.square().sum(1) + _NLMS_EPS)
            self._theta = self.theta - self.learning_rate / x.shape[0] * (contexts.T @ steps)
        else:
            self._theta = self.theta - self.learning_rate * 2 / x.shape[0] * (contexts.T @ errors)
            self._check_step(contexts, errors, losses.to(x.device))
        if not bool(self.theta.isfinite().all()):
            raise RuntimeError(f"the linear loss model of IMPON diverged: {_REMEDY.format(self.learning_rate)}")

    def _check_step(self, contexts: Tensor, errors: Tensor, losses: Tensor) -> None:
        before, after = errors.square().sum(), (contexts @ self.theta - losses).square().sum()
        if not bool(after <= before * (1 + 1e-9)) and not self._warned:
            self._warned = True
            warnings.warn(
                "the linear loss model of IMPON got worse on the very rows it learned from: "
                + _REMEDY.format(self.learning_rate),
                UserWarning,
                stacklevel=4,
            )

    def _norm(self) -> float:
        """Norm of all parameters of the model as of now."""
        if self.model is None:
            return 1.0
        with torch.no_grad():
            norm = float(nn.utils.get_total_norm(list(self.model.parameters())))
        if not math.isfinite(norm):
            raise RuntimeError(f"the weights of the model have the norm {norm}: it has diverged")
        return norm

    def _ask(self, rows: Tensor) -> Tensor:
        assert not isinstance(self.features, Tensor)
        x = self.features(rows.clone())
        size = _check_features(x, rows.shape[0])
        if self._theta is None:
            self._theta = self._zeros(size, x.device)
        elif self._theta.shape[0] != size + 1:
            raise ValueError(f"features gave {size} columns, {self._theta.shape[0] - 1} before")
        elif self._theta.device != x.device:
            self._theta = self._theta.to(x.device)
        return x.detach()

    def _zeros(self, columns: int, device: torch.device | None = None) -> Tensor:
        device = self.features.device if isinstance(self.features, Tensor) else device
        return torch.zeros(columns + 1, dtype=torch.float64, device=device)

    def _state(self) -> dict[str, Tensor]:
        return {"theta": torch.empty(0, dtype=torch.float64) if self._theta is None else self._theta}

    def _load(self, state: Mapping[str, Tensor]) -> None:
        theta = state["theta"]
        if self._theta is not None and theta.shape != self._theta.shape:
            raise ValueError(f"state has a theta of {theta.shape[0]} entries, expected {self._theta.shape[0]}")
        if not bool(theta.isfinite().all()):
            raise ValueError("state has a theta that is not finite")
        self._theta = None if theta.shape[0] == 0 else theta.to("cpu" if self._theta is None else self._theta.device)


def _check_features(features: Tensor, rows: int) -> int:
    """The number of columns. Raises TypeError or ValueError."""
    if not isinstance(features, Tensor):
        raise TypeError(f"features must give a tensor [n, D], got {type(features).__name__}")
    if not (features.dtype.is_floating_point or features.dtype == torch.uint8):
        raise TypeError(f"features must be floats or uint8, got {features.dtype}")
    if features.dim() != 2 or features.shape[0] != rows or features.shape[1] == 0:
        raise ValueError(
            f"features must be [{rows}, D], one row for each row asked for, got {tuple(features.shape)}"
            " (flatten(1) makes them so)"
        )
    return features.shape[1]


def standardized_features(
    source: Any,
    *,
    inputs: Callable[[Any], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x_i of IMPON: every input of the training set flattened, (x - mean) / (std + 1e-6) column by column, [rows, D].

    source: a tensor [rows, ...], or a dataset with a length whose items are an input tensor, or a tuple or list that begins
        with one; it is read once, item by item.
    inputs: of other datasets, a function from an item to its input tensor.
    dtype: of the result, e.g. torch.float16 to halve it; sums are in float64. A column that is constant becomes 0.

    Raises TypeError (no length, no input tensor, no float dtype), ValueError (no rows, inputs of different sizes).

    >>> standardized_features(torch.tensor([[[1.0, 5.0]], [[3.0, 5.0]]]))
    tensor([[-1.0000,  0.0000],
            [ 1.0000,  0.0000]])
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a float dtype, got {dtype!r}")
    if isinstance(source, Tensor):
        if source.dim() == 0 or source.numel() == 0:
            raise ValueError(f"source must hold rows, got shape {tuple(source.shape)}")
        x = source.detach().flatten(1) if source.dim() > 1 else source.detach()[:, None]
    else:
        x = _read_inputs(source, inputs)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for column in range(0, x.shape[1], _COLUMNS):  # a few columns at a time: float64 of all would be twice the data
        part = x[:, column : column + _COLUMNS].to(torch.float64)
        part = part - part.mean(0)
        out[:, column : column + _COLUMNS] = part / (part.square().mean(0).sqrt() + STD_EPS)
    return out


_COLUMNS = 256


def _read_inputs(source: Any, inputs: Callable[[Any], Tensor] | None) -> Tensor:
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise TypeError(f"source must be a tensor or a dataset with a length, got {type(source).__name__}")
    if len(source) == 0:
        raise ValueError("source must hold rows, got none")
    x: Tensor | None = None
    for row in range(len(source)):
        item = source[row]
        if inputs is not None:
            item = inputs(item)
        elif isinstance(item, (tuple, list)) and item:
            item = item[0]
        if not isinstance(item, Tensor):
            raise TypeError(
                f"row {row} gives no input tensor but {type(item).__name__}: give inputs=a function from an item to one"
            )
        flat = item.detach().flatten()
        if x is None:
            x = torch.empty(len(source), flat.shape[0], dtype=flat.dtype, device=flat.device)
        if flat.shape[0] != x.shape[1]:
            raise ValueError(f"row {row} has an input of {flat.shape[0]} values, the rows before {x.shape[1]}")
        x[row] = flat
    assert x is not None
    return x
