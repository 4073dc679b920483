"""Scorers: what a candidate batch is judged by, from the full forward down to what costs nothing, for any policy.

`SelectedBatches(..., forward=scorer)` calls the scorer inside its scoring pass, with the scorer's mode and autocast.
"""

import inspect
import math
import numbers
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaselect_kernels.functional import SampleStats
from adaselect_kernels.options import require_choice
from adaselect_kernels.policies.neighbours import losses_of
from adaselect_kernels.policies.policy import PolicyConfig
from adaselect_kernels.training.scoring import MODES, _flags_kept, _set_flag, check_autocast, scoring_pass

Result = tuple[Tensor, Tensor] | Tensor | SampleStats
Forward = Callable[[nn.Module, Any], Result]
RowsOf = str | int | Callable[[Any], Any]

_FORMAT = 1
_KEYS = {"format", "scorer", "settings", "state"}


def forward_pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """(model(inputs), targets) of a batch (inputs, targets); TypeError for any other batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"without `forward` a batch must be a pair (inputs, targets), got {type(batch).__name__};"
            " give forward=lambda model, batch: (logits, targets)"
        )
    inputs, targets = batch
    return model(inputs), targets


class Scorer:
    """`scorer(model, batch)` gives (logits, targets), per-sample losses [N], or SampleStats, for a policy to choose from.

    forward: `forward(model, batch)`, one of those three by the full model; None: the batch is a pair (inputs, targets).
    mode, autocast: of the scoring pass around the call (`scoring_pass`).

    A subclass says what it computes in `__call__`, and has `_state` and `_load` when it remembers anything.
    """

    name: ClassVar[str]

    def __init__(
        self, *, forward: Forward | None = None, mode: str = "eval", autocast: torch.dtype | None = None
    ) -> None:
        require_choice("mode", mode, MODES)
        check_autocast(autocast)
        self.forward: Forward = forward_pair if forward is None else forward
        self.mode = mode
        self.autocast = autocast

    def __call__(self, model: nn.Module, batch: Any) -> Result:
        """What a policy chooses from. Runs where it is called: the caller opens the scoring pass, or calls `score`."""
        raise NotImplementedError

    def score(self, model: nn.Module, batch: Any) -> Result:
        """The call inside a scoring pass of its own: no gradients, no trace left."""
        with scoring_pass(model, mode=self.mode, autocast=self.autocast):
            return self(model, batch)

    def cost(self, model: nn.Module, batch: Any, *, repeats: int = 5) -> float:
        """The share s: median time of `score` over that of a forward in training mode with gradients. Leaves no trace.

        Measured in turns on the clock of the host, waiting for the device; two untimed calls of each go before.
        The s of the cost model time / baseline = (s + 3 gamma) / 3.
        """
        with training_forward(model):
            own, full = median_seconds(
                lambda: self.score(model, batch), lambda: self.forward(model, batch), repeats=repeats
            )
        return own / full

    def settings(self) -> dict[str, Any]:
        """Plain values that must agree between a saved and a loading scorer."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Name, settings and what is remembered. Loads with weights_only=True."""
        return {"format": _FORMAT, "scorer": self.name, "settings": self.settings(), "state": self._state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore from `state_dict()`. Raises ValueError, nothing changed, for what is corrupt or of another scorer."""
        if not isinstance(state_dict, Mapping) or set(state_dict) != _KEYS:
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"not a state of a scorer: got {got}, expected the keys {sorted(_KEYS)}")
        if state_dict["format"] != _FORMAT:
            raise ValueError(f"state has format {state_dict['format']!r}, this version reads {_FORMAT}")
        got, own = (state_dict["scorer"], state_dict["settings"]), (self.name, self.settings())
        if got != own:
            raise ValueError(f"state is of the scorer {got[0]!r} with {got[1]!r}, expected {own[0]!r} with {own[1]!r}")
        self._load(state_dict["state"])

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: Any) -> None:
        if state != {}:
            raise ValueError(f"corrupt state: the scorer {self.name!r} remembers nothing, got {state!r}")


class FullForward(Scorer):
    """The forward itself: the losses of the moment, at the cost of one forward without gradients.

    compile: run `torch.compile(model)` instead, compiled once for each model the scorer meets.
    """

    name: ClassVar[str] = "forward"

    def __init__(
        self,
        *,
        forward: Forward | None = None,
        mode: str = "eval",
        autocast: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(forward=forward, mode=mode, autocast=autocast)
        if not isinstance(compile, bool):
            raise TypeError(f"compile must be a bool, got {compile!r}")
        self.compile = compile
        self._compiled: dict[nn.Module, Any] = {}

    def __call__(self, model: nn.Module, batch: Any) -> Result:
        return self.forward(self._runner(model), batch)

    def _runner(self, model: nn.Module) -> Any:
        if not self.compile:
            return model
        if model not in self._compiled:
            self._compiled[model] = torch.compile(model)
        return self._compiled[model]


class LowResolution(FullForward):
    """The forward on smaller images: the model's first argument, [N, C, H, W], resized to (scale H, scale W) before it.

    scale: in (0, 1]; sizes are floor(scale H + 0.5), at least 1. interpolation: "area" or "bilinear" (antialiased).
    For models that take any size; the losses are those of the small images.
    """

    name: ClassVar[str] = "low_resolution"

    def __init__(
        self,
        *,
        scale: float,
        interpolation: str = "area",
        forward: Forward | None = None,
        mode: str = "eval",
        autocast: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(forward=forward, mode=mode, autocast=autocast, compile=compile)
        if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
            raise TypeError(f"scale must be a number in (0, 1], got {scale!r}")
        if not 0.0 < scale <= 1.0:
            raise ValueError(f"scale must be in (0, 1], got {scale!r}")
        require_choice("interpolation", interpolation, ("area", "bilinear"))
        self.scale = float(scale)
        self.interpolation = interpolation

    def __call__(self, model: nn.Module, batch: Any) -> Result:
        return self.forward(_Resized(self._runner(model), self.scale, self.interpolation), batch)

    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale, "interpolation": self.interpolation}


class _Resized(nn.Module):
    """A model that shrinks its first argument."""

    def __init__(self, model: Any, scale: float, interpolation: str) -> None:
        super().__init__()
        self.model, self.scale, self.interpolation = model, scale, interpolation

    def forward(self, images: Any, *args: Any, **more: Any) -> Any:
        if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
            got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"low_resolution needs images [N, C, H, W] of floats as the model's input, got {got}")
        size = [max(1, math.floor(self.scale * side + 0.5)) for side in images.shape[2:]]
        small = F.interpolate(images, size, mode=self.interpolation, antialias=self.interpolation == "bilinear")
        return self.model(small, *args, **more)


class Slim(Scorer):
    """The forward of a slimmable model at a smaller width, PSP of DynaMS: the model's own weights, a part of its channels.

    width: one of the model's widths; None is the smallest.
    """

    name: ClassVar[str] = "slim"

    def __init__(
        self,
        *,
        width: float | None = None,
        forward: Forward | None = None,
        mode: str = "eval",
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(forward=forward, mode=mode, autocast=autocast)
        if width is not None and (isinstance(width, bool) or not isinstance(width, numbers.Real)):
            raise TypeError(f"width must be a number or None, got {width!r}")
        self.width = None if width is None else float(width)

    def __call__(self, model: nn.Module, batch: Any) -> Result:
        from adaselect_kernels.models.slimmable import use_width, widths_of

        with use_width(model, widths_of(model)[-1] if self.width is None else self.width):
            return self.forward(model, batch)

    def settings(self) -> dict[str, Any]:
        return {"width": self.width}


class ReferenceExcess(Scorer):
    """l_i - l_i(reference): what RHO-LOSS ranks by, as losses [N] for any policy; two forwards.

    reference: a model that `forward` serves as well; scored in evaluation mode, whatever mode it is in.
    unit, ignore_index, label_smoothing: of the losses, where `forward` gives logits (`per_sample_stats`). Ignored rows are
    NaN, which a policy counts as invalid. Policies that need losses >= 0 (a curriculum) cannot use a difference.
    """

    name: ClassVar[str] = "reference"

    def __init__(
        self,
        *,
        reference: nn.Module,
        forward: Forward | None = None,
        mode: str = "eval",
        autocast: torch.dtype | None = None,
        unit: str = "sample",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(forward=forward, mode=mode, autocast=autocast)
        if not isinstance(reference, nn.Module):
            raise TypeError(f"reference must be a model (nn.Module), got {type(reference).__name__}")
        self.reference = reference
        self._losses = PolicyConfig(1.0, unit=unit, ignore_index=ignore_index, label_smoothing=label_smoothing)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        losses = losses_of(self.forward(model, batch), self._losses)
        with scoring_pass(self.reference, autocast=self.autocast):
            expected = losses_of(self.forward(self.reference, batch), self._losses)
        return losses - expected

    def settings(self) -> dict[str, Any]:
        names = ("unit", "ignore_index", "label_smoothing")
        return {name: getattr(self._losses, name) for name in names}


class Stale(Scorer):
    """The loss that each row had when it was last seen: no forward at all.

    `update(rows, losses)` after every training step tells it the losses of the rows just trained on. A row not seen yet
    counts as the largest finite loss told so far, so that it is looked at soon; before any loss all rows are equal (0).
    A row whose last loss was not finite keeps it, and a policy counts it as invalid.

    rows: how to find the row numbers in a batch, integers [N]: a key or position (batch[rows]) or a function of the batch.
    size: rows of the training set, or the sized data set.
    forward: of the model, for `cost` alone.
    """

    name: ClassVar[str] = "stale"

    def __init__(self, *, rows: RowsOf, size: int | Sized, forward: Forward | None = None) -> None:
        super().__init__(forward=forward)
        _check_rows_of(rows)
        if not isinstance(size, int) and not isinstance(size, Sized):
            raise TypeError(f"size must be a number of rows or a sized data set, got {type(size).__name__}")
        self.size = int(size) if isinstance(size, int) else len(size)
        if isinstance(size, bool) or self.size < 1:
            raise ValueError(f"size must be at least 1, got {size!r}")
        self.rows = rows
        self._table = torch.zeros(self.size + 1)  # the last place takes what has no row
        self._seen = torch.zeros(self.size + 1, dtype=torch.bool)
        self._largest = torch.tensor(-math.inf)
        self._placed = False  # on the device of the first losses, or of the first model

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        tensor = next(chain(model.parameters(), model.buffers()), None)
        self._place(torch.device("cpu") if tensor is None else tensor.device)
        rows, inside = self._check_rows(_row_numbers(self.rows, batch))
        unseen = torch.where(self._largest == -math.inf, 0.0, self._largest)
        losses = torch.where(self._seen[rows], self._table[rows], unseen)
        return torch.where(inside, losses, math.nan)

    def update(self, rows: Any, losses: Tensor) -> None:
        """Remember `losses` [n] of the rows numbered `rows` [n]; of a row that comes twice the last one.

        Raises ValueError (shapes), TypeError (dtypes), IndexError (a row outside the set; among numbers on a GPU such
        rows are left out instead, as looking would wait for it). Nothing is changed then.
        """
        rows = _as_row_numbers(rows)
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            raise TypeError(f"losses must be a tensor of floats, got {getattr(losses, 'dtype', type(losses).__name__)}")
        if losses.shape != rows.shape:
            raise ValueError(f"losses must be one a row, [{len(rows)}], got shape {tuple(losses.shape)}")
        device = self._table.device if self._placed else losses.device
        places, inside = self._check_rows(rows, device)
        if len(rows) == 0:
            return
        self._place(losses.device)
        places = torch.where(inside, places, self.size)
        order = places.argsort(stable=True)
        places, values = places[order], losses.detach().to(device, torch.float32)[order]
        last = torch.cat([places[1:] != places[:-1], places.new_ones(1, dtype=torch.bool)])
        places = torch.where(last, places, self.size)
        self._table.scatter_(0, places, values)
        self._seen.scatter_(0, places, True)
        known = values.isfinite() & inside[order]
        self._largest = torch.maximum(self._largest, torch.where(known, values, -math.inf).max())

    def settings(self) -> dict[str, Any]:
        return {"size": self.size}

    def _place(self, device: torch.device) -> None:
        if not self._placed:
            self._table, self._seen = self._table.to(device), self._seen.to(device)
            self._largest, self._placed = self._largest.to(device), True

    def _check_rows(self, rows: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """`rows` on the device of the table, those outside it replaced by 0, and which are inside."""
        inside = (rows >= 0) & (rows < self.size)
        if rows.device.type == "cpu" and not inside.all():
            raise IndexError(f"row {int(rows[~inside][0])} is outside [0, {self.size})")
        device = self._table.device if device is None else device
        return torch.where(inside, rows, 0).to(device), inside.to(device)

    def _state(self) -> dict[str, Any]:
        seen = self._seen[:-1].clone()
        losses = torch.where(seen, self._table[:-1], 0.0)
        return {"losses": losses, "seen": seen, "largest": self._largest.clone()}

    def _load(self, state: Any) -> None:
        own = self._state()
        if not isinstance(state, Mapping) or set(state) != set(own):
            raise ValueError(f"corrupt state: expected {sorted(own)}")
        for name, value in own.items():
            got = state[name]
            if not isinstance(got, Tensor) or got.shape != value.shape or got.dtype != value.dtype:
                raise ValueError(f"corrupt state: {name} must be {value.dtype} of shape {tuple(value.shape)}")
        if state["largest"].isnan() or state["largest"] == math.inf:
            raise ValueError(f"corrupt state: largest must be finite or -inf, got {state['largest'].item()}")
        self._table[:-1] = state["losses"].to(self._table.device)
        self._seen[:-1] = state["seen"].to(self._table.device)
        self._largest = state["largest"].detach().clone().to(self._table.device)


class LinearModel(Scorer):
    """The losses that a linear model predicts from a row's features, without the row: IMPON's, told by its sampler.

    sampler: anything with `predict(rows [N] int64) -> losses [N]`, such as `get_sampler("impon", ...)`. It learns where it
    always does, in its `observe`; its memory is in its own state_dict.
    rows, forward: as `Stale` has them.
    """

    name: ClassVar[str] = "linear"

    def __init__(self, *, sampler: Any, rows: RowsOf, forward: Forward | None = None) -> None:
        super().__init__(forward=forward)
        _check_rows_of(rows)
        if not callable(getattr(sampler, "predict", None)):
            raise TypeError(f"sampler needs predict(rows) -> losses, got {type(sampler).__name__}")
        self.sampler = sampler
        self.rows = rows

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.sampler.predict(_row_numbers(self.rows, batch))


def _check_rows_of(rows: Any) -> None:
    if isinstance(rows, bool) or not (isinstance(rows, (str, int)) or callable(rows)):
        raise TypeError(f"rows must be a key, a position or a function of the batch, got {rows!r}")


def _row_numbers(rows: RowsOf, batch: Any) -> Tensor:
    return _as_row_numbers(rows(batch) if callable(rows) else batch[rows])


def _as_row_numbers(rows: Any) -> Tensor:
    found = rows if isinstance(rows, Tensor) else torch.as_tensor(rows)
    if found.dim() != 1:
        raise ValueError(f"row numbers must be [N], got shape {tuple(found.shape)}")
    if len(found) and (found.dtype == torch.bool or found.is_floating_point() or found.is_complex()):
        raise TypeError(f"row numbers must be integers, got {found.dtype}")
    return found.to(torch.int64)


_SCORERS = (FullForward, LowResolution, Stale, LinearModel, Slim, ReferenceExcess)
SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in _SCORERS}


def get_scorer(name: str, **config: Any) -> Scorer:
    """The scorer `name`: for `SelectedBatches(..., forward=scorer)` and for `plan`.

    | name | judges by | settings |
    |---|---|---|
    | forward | the forward of the moment | forward, mode, autocast, compile |
    | low_resolution | the same on smaller images | scale, interpolation, and those of "forward" |
    | slim | a slimmable model at a smaller width | width, forward, mode, autocast |
    | reference | the loss minus that of a reference model | reference, unit, ignore_index, label_smoothing, forward, mode, autocast |
    | stale | the loss when the row was last trained on | rows, size, forward |
    | linear | the loss that IMPON's linear model predicts | sampler, rows, forward |

    Raises ValueError (unknown name, a value outside what is accepted) or TypeError (unknown or missing setting, wrong type).

    >>> scorer = get_scorer("forward", autocast=torch.bfloat16)
    >>> logits, targets = scorer.score(nn.Linear(2, 3), (torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)))
    >>> logits.dtype, logits.requires_grad
    (torch.bfloat16, False)
    """  # noqa: E501
    require_choice("name", name, tuple(SCORERS))
    accepted = inspect.signature(SCORERS[name]).parameters
    unknown = [setting for setting in config if setting not in accepted]
    missing = [s for s, p in accepted.items() if p.default is inspect.Parameter.empty and s not in config]
    if unknown or missing:
        wrong = f"has no setting {', '.join(map(repr, unknown))}" if unknown else f"needs {', '.join(missing)}"
        raise TypeError(f"the scorer {name!r} {wrong}; it accepts {', '.join(accepted)}")
    return SCORERS[name](**config)


def median_seconds(*functions: Callable[[], Any], repeats: int = 5) -> tuple[float, ...]:
    """Median time of each function, called in turns so that a drift of the machine meets all alike; two calls go before."""
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats must be an int of at least 1, got {repeats!r}")
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(-2, repeats):
        for function, taken in zip(functions, times, strict=True):
            wait()
            start = time.perf_counter()
            function()
            wait()
            if turn >= 0:
                taken.append(time.perf_counter() - start)
    return tuple(map(statistics.median, times))


@contextmanager
def training_forward(model: nn.Module) -> Iterator[None]:
    """Inside, forwards run as a training step's, with gradients; afterwards buffers, flags and random streams are as before.

    A model that is wholly in evaluation mode is put into training mode meanwhile.
    """
    modules = list(model.modules())
    with _flags_kept(modules, evaluate=False):
        if not any(module.training for module in modules):
            for module in modules:
                _set_flag(module, True)
        with scoring_pass(model, mode="train"), torch.enable_grad():
            yield
