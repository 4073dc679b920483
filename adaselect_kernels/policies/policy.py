"""What every policy is: a frozen configuration, an explicit state, and the choice as a function over both."""

import numbers
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from adaselect_kernels.dispatch import IMPLS
from adaselect_kernels.functional import Selection, fused_select
from adaselect_kernels.options import require_choice
from adaselect_kernels.state import AdaSelectionState

_FORMAT = 1
_KEYS = {"format", "policy", "config", "state"}
_FREE = ("seed", "impl")  # may differ on loading: the seed travels with the state, impl only names who computes
_Chosen = TypeVar("_Chosen")
_Self = TypeVar("_Self", bound="Chooser")


@dataclass(frozen=True)
class PolicyConfig:
    """Settings that every policy has; `fused_select` says what they mean.

    gamma: sampling rate, 0 < gamma <= 1; a batch of N rows gives k = clamp(floor(gamma N + 0.5), 1, N).
    seed: of the noise of "uniform" in a fresh state; a loaded state brings its own.

    Raises ValueError or TypeError, when constructed, for a value that the functions would refuse.
    """

    gamma: float
    seed: int = 0
    unit: str = "sample"
    order: str = "index"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    impl: str = "auto"

    def __post_init__(self) -> None:
        require_choice("impl", self.impl, IMPLS)
        fused_select(  # the function's own checks, on one row
            torch.zeros(1, 1, device="cpu"),
            torch.zeros(1, dtype=torch.int64, device="cpu"),
            self.gamma,
            seed=self.seed,
            impl="reference",
            **self.call,
        )

    @property
    def call(self) -> dict[str, Any]:
        """Keyword arguments that the functions over logits share."""
        return {
            "unit": self.unit,
            "order": self.order,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
        }


class Scored(NamedTuple):
    """What `Policy.score` gives when the choice needs more than the forward's result."""

    result: Any  # (logits, targets), losses or SampleStats
    more: dict[str, Tensor]  # keyword arguments of `select` and `select_from_losses`


class Chooser:
    """A frozen configuration and an explicit state, which every call advances, saved and restored together.

    config: frozen settings. state: AdaSelectionState, updated in place by every call without a host synchronisation.
    The state follows the device of the first call (or is put on `device` now) and stays there: a later call from
    another device is refused by the functions, `to` moves it on request. Not differentiable; deterministic given both.
    """

    name: ClassVar[str]
    methods: tuple[str, ...]
    state: AdaSelectionState

    def __init__(self, config: Any, methods: tuple[str, ...], device: torch.device | str | None = None) -> None:
        self.config = config
        self.methods = methods
        self.state = AdaSelectionState.create(methods, "cpu" if device is None else device, config.seed)
        self._placed = device is not None

    def method_weights(self) -> dict[str, float] | None:
        """Weight of each method, read from the device; None where a policy has none."""
        return None

    def to(self: _Self, device: torch.device | str) -> _Self:
        """Move the state to `device`, where it stays; returns self."""
        self.state = self.state.to(device)
        self._placed = True
        return self

    def state_dict(self) -> dict[str, Any]:
        """Name, configuration and state: everything that continuing bit for bit needs. Loads with weights_only=True."""
        return {
            "format": _FORMAT,
            "policy": self.name,
            "config": self._compared_config(),
            "state": self.state.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore from `state_dict()`; the state stays on its device, or follows the next call if there was none yet.

        Raises ValueError, nothing changed, when the dictionary is corrupt, of another policy, or of other settings than
        `seed` (the saved one is taken over) and `impl`. To carry method weights into a policy of other settings on
        purpose, load the "state" entry into `policy.state`.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != _KEYS:
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"not a state of a policy: got {got}, expected the keys {sorted(_KEYS)}")
        if state_dict["format"] != _FORMAT:
            raise ValueError(f"state has format {state_dict['format']!r}, this version reads {_FORMAT}")
        if state_dict["policy"] != self.name:
            raise ValueError(f"state is of the policy {state_dict['policy']!r}, expected {self.name!r}")
        config, own = state_dict["config"], self._compared_config()
        if not isinstance(config, Mapping) or dict(config) != own:
            got = dict(config) if isinstance(config, Mapping) else config
            raise ValueError(f"state is of a policy with the settings {got!r}, expected {own!r}")
        self.state.load_state_dict(state_dict["state"])

    def _compared_config(self) -> dict[str, Any]:
        settings: dict[str, Any] = asdict(self.config)
        settings.update(settings.pop("options", {}), methods=list(self.methods))
        return {name: _plain(value) for name, value in settings.items() if name not in _FREE}

    def _choose(self, function: Callable[..., _Chosen], inputs: Tensor, *args: Any, **settings: Any) -> _Chosen:
        """Call `function` with the state, on the device of `inputs` if this is the first call that succeeds."""
        settled = self._placed or not isinstance(inputs, Tensor)
        state = self.state if settled else self.state.to(inputs.device)
        selection = function(inputs, *args, state=state, impl=self.config.impl, **settings)
        self.state, self._placed = state, True
        return selection

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config}, {self.state})"


class Policy(Chooser):
    """Chooses the rows of a batch worth a backward pass, call after call."""

    config_type: ClassVar[type[PolicyConfig]]
    objects: ClassVar[tuple[str, ...]] = ()  # what `get_policy` passes on beside the configuration, as a model
    weighted: ClassVar[bool] = False  # it returns a WeightedSelection

    def select(self, logits: Tensor, targets: Tensor) -> Selection:
        """Choose from logits [N, C] or [N, T, C] and targets [N] or [N, T]; as `fused_select`."""
        raise NotImplementedError

    def select_from_losses(self, losses: Tensor, grad_norms: Tensor | None = None) -> Selection:
        """Choose from per-sample losses [N], and gradient norms [N] where the policy uses them."""
        raise NotImplementedError

    def score(self, model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any]) -> Any:
        """What the scoring pass computes for a candidate batch: `forward(model, batch)`, unless the policy needs more."""
        return forward(model, batch)


def _plain(value: Any) -> Any:
    """Numbers of other libraries as Python's and types by name, so that the dictionary loads with weights_only=True."""
    if isinstance(value, torch.dtype):
        return str(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, int) else value
