"""State dicts as values that can be compared: a saved state continues bit for bit."""

from typing import Any

import torch


def flat(state: Any) -> Any:
    """The state with its tensors as their bytes."""
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [flat(value) for value in state]
    return state.contiguous().numpy().tobytes() if isinstance(state, torch.Tensor) else state
