"""State of AdaSelection that survives from step to step: method weights, previous method losses, step, seed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels.options import check_methods

_FORMAT = 1
_KEYS = {"format", "methods", "seed", "log_weights", "previous_losses", "step"}


class AdaSelectionState:
    """What equation 3 carries: log w [M], the previous method losses L [M], the step t, and the seed of the noise.

    All numbers live in one float64 tensor `buffer` [2M + 1] = (log w, L, t) on the state's device, updated in place by
    every call that is given the state, without a host synchronisation. L is NaN until a step has stored one; t is the
    step of the next call, 1 when fresh. `seed` lives on the host, 64 bits.
    """

    __slots__ = ("buffer", "methods", "seed")

    def __init__(self, methods: tuple[str, ...], buffer: Tensor, seed: int) -> None:
        self.methods = methods
        self.buffer = buffer
        self.seed = seed

    @classmethod
    def create(
        cls, methods: Sequence[str], device: torch.device | str | None = None, seed: int = 0
    ) -> "AdaSelectionState":
        """A fresh state: equal weights, no previous losses, step 1.

        Raises TypeError or ValueError for unknown, repeated or no methods, or a seed that is not a 64-bit integer.
        """
        names = check_methods(methods)
        buffer = torch.empty(2 * len(names) + 1, dtype=torch.float64, device=device)
        state = cls(names, buffer, check_seed(seed))
        state.reset()
        return state

    def reset(self) -> None:
        """Back to equal weights, no previous losses, step 1."""
        self.log_weights.fill_(0.0).sub_(torch.tensor(float(len(self.methods)), dtype=torch.float64).log().item())
        self.previous_losses.fill_(float("nan"))
        self.step.fill_(1.0)

    @property
    def log_weights(self) -> Tensor:
        """[M] float64 view, log w; sum w = 1."""
        return self.buffer[: len(self.methods)]

    @property
    def weights(self) -> Tensor:
        """[M] float64, the method weights w."""
        return self.log_weights.exp()

    @property
    def previous_losses(self) -> Tensor:
        """[M] float64 view, the last finite method losses L, NaN before the first."""
        return self.buffer[len(self.methods) : 2 * len(self.methods)]

    @property
    def step(self) -> Tensor:
        """[] float64 view, the step t of the next call."""
        return self.buffer[2 * len(self.methods)]

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    def to(self, device: torch.device | str) -> "AdaSelectionState":
        """A copy on `device` (itself when it is already there)."""
        buffer = self.buffer.to(device)
        return self if buffer is self.buffer else AdaSelectionState(self.methods, buffer, self.seed)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit; tensors are copies on the state's device."""
        return {
            "format": _FORMAT,
            "methods": self.methods,
            "seed": self.seed,
            "log_weights": self.log_weights.clone(),
            "previous_losses": self.previous_losses.clone(),
            "step": self.step.to(torch.int64),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore from `state_dict()`. Raises ValueError, the state untouched, when it is foreign or corrupt."""
        log_weights, previous, step, seed = self._check(state_dict)
        self.buffer.copy_(torch.cat([log_weights, previous, step.reshape(1)]))
        self.seed = seed

    def _check(self, state_dict: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, int]:
        if not isinstance(state_dict, Mapping) or set(state_dict) != _KEYS:
            got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"not a state of AdaSelection: got {got}, expected the keys {sorted(_KEYS)}")
        if state_dict["format"] != _FORMAT:
            raise ValueError(f"state has format {state_dict['format']!r}, this version reads {_FORMAT}")
        methods = state_dict["methods"]
        if not isinstance(methods, (tuple, list)) or tuple(methods) != self.methods:
            raise ValueError(f"state is of methods {methods!r}, expected {self.methods!r}")
        try:
            seed = check_seed(state_dict["seed"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"corrupt state: {error}") from None
        tensors = []
        for name, shape in (("log_weights", (len(methods),)), ("previous_losses", (len(methods),)), ("step", ())):
            value = state_dict[name]
            dtype = torch.int64 if name == "step" else torch.float64
            if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
                got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"corrupt state: {name} must be a {dtype} tensor of shape {shape}, got {got}")
            tensors.append(value.detach().to(device="cpu", dtype=torch.float64))
        log_weights, previous, step = tensors
        total = log_weights.exp().sum().item()
        if not abs(total - 1.0) < 1e-6:
            raise ValueError(f"corrupt state: the weights must sum to 1, got {total!r}")
        if torch.isinf(previous).any():
            raise ValueError(f"corrupt state: previous_losses must be finite or NaN, got {previous.tolist()}")
        if not 1 <= step.item() < 2**53:
            raise ValueError(f"corrupt state: step must be in [1, 2^53), got {step.item():.0f}")
        return log_weights, previous, step, seed

    def __repr__(self) -> str:
        return f"AdaSelectionState(methods={self.methods}, device={str(self.device)!r}, seed={self.seed})"


def check_seed(seed: object) -> int:
    """Return `seed` if it is an integer in [-2^63, 2^64); raise TypeError or ValueError otherwise."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return seed
