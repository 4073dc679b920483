"""Scorers: what a candidate batch is judged by, from the full forward down to what costs nothing, for any policy.

`SelectedBatches(..., forward=scorer)` calls the scorer inside its scoring pass, with the scorer's mode and autocast.
"""

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaselect_kernels.functional import SampleStats
from adaselect_kernels.options import require_choice
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

    compile: run `torch.compile(model)` instead, compiled once for each model the scorer meets in a row.
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
        self._compiled: tuple[nn.Module, Any] | None = None

    def __call__(self, model: nn.Module, batch: Any) -> Result:
        return self.forward(self._runner(model), batch)

    def _runner(self, model: nn.Module) -> Any:
        if not self.compile:
            return model
        if self._compiled is None or self._compiled[0] is not model:
            self._compiled = model, torch.compile(model)
        return self._compiled[1]


SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in (FullForward,)}


def get_scorer(name: str, **config: Any) -> Scorer:
    """The scorer `name`: for `SelectedBatches(..., forward=scorer)` and for `plan`.

    Raises ValueError (unknown name, a value outside what is accepted) or TypeError (unknown or missing setting, wrong type).

    >>> scorer = get_scorer("forward", autocast=torch.bfloat16)
    >>> logits, targets = scorer.score(nn.Linear(2, 3), (torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)))
    >>> logits.dtype, logits.requires_grad
    (torch.bfloat16, False)
    """
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
