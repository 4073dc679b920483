"""What the public functions accept: shapes, dtypes, devices and ranges, refused by name before any work."""

import math
import numbers
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from adaselect_kernels.options import STATS, UNITS, AdaSelectionOptions, require_choice
from adaselect_kernels.state import AdaSelectionState, check_seed

DEBUG_VARIABLE = "ADASELECT_DEBUG"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def selected_count(gamma: float, n: int) -> int:
    """k = clamp(floor(gamma n + 0.5), 1, n). Raises TypeError or ValueError for a gamma outside (0, 1]."""
    if type(gamma) is not float and (isinstance(gamma, bool) or not isinstance(gamma, numbers.Real)):
        raise TypeError(f"gamma must be a number in (0, 1], got {gamma!r}")
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma must be in (0, 1], got {gamma!r}")
    return min(max(math.floor(gamma * n + 0.5), 1), n)


def check_stats(stats: Sequence[str]) -> list[int]:
    """Positions in STATS of distinct names, at least one."""
    if isinstance(stats, str) or not isinstance(stats, (tuple, list)):
        raise TypeError(f"stats must be a tuple or list of names, got {stats!r}")
    for stat in stats:
        require_choice("stats", stat, STATS)
    if not stats or len(set(stats)) != len(stats):
        raise ValueError(f"stats must be distinct and at least one, got {tuple(stats)!r}")
    return [STATS.index(stat) for stat in stats]


def check_options(options: AdaSelectionOptions) -> AdaSelectionOptions:
    if not isinstance(options, AdaSelectionOptions):
        raise TypeError(f"options must be AdaSelectionOptions, got {type(options).__name__}")
    return options


def check_logits(logits: Tensor, targets: Tensor, unit: str, ignore_index: int, label_smoothing: float) -> None:
    check_rows("logits", "C", logits, targets)
    check_labels(unit, ignore_index, label_smoothing)
    if logits.device.type == "cuda":
        check_targets(targets, logits.shape[-1], ignore_index)


def check_rows(name: str, width: str, rows: Tensor, targets: Tensor) -> None:
    """rows [N, width] or [N, T, width] and their targets: types, shapes, devices."""
    if not isinstance(rows, Tensor) or not isinstance(targets, Tensor):
        raise TypeError(f"{name} and targets must be tensors, got {type(rows).__name__}, {type(targets).__name__}")
    if rows.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {rows.dtype}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, got {targets.dtype}")
    shape = rows.shape
    if len(shape) not in (2, 3):
        raise ValueError(f"{name} must be [N, {width}] or [N, T, {width}], got shape {tuple(shape)}")
    if targets.shape != shape[:-1]:
        raise ValueError(
            f"targets must have the shape {tuple(shape[:-1])} of {name} {tuple(shape)} without {_LAST[width]},"
            f" got {tuple(targets.shape)}"
        )
    if 0 in shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(shape)}")
    if targets.device != rows.device:
        raise ValueError(f"targets must be on the device of {name}, {rows.device}, got {targets.device}")


_LAST = {"C": "classes", "H": "features"}


def check_labels(unit: str, ignore_index: int, label_smoothing: float) -> None:
    require_choice("unit", unit, UNITS)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if type(label_smoothing) is not float and (
        isinstance(label_smoothing, bool) or not isinstance(label_smoothing, numbers.Real)
    ):
        raise TypeError(f"label_smoothing must be a number in [0, 1], got {label_smoothing!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")


def check_targets(targets: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for a target outside [0, classes) that is not ignore_index, where the host may look."""
    if not may_synchronise(targets):
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= classes))
    if bad.any():
        row = int(bad.flatten().to(torch.int8).argmax())
        raise IndexError(
            f"target {int(targets.flatten()[row])} of row {row} is outside [0, {classes}) and not"
            f" ignore_index={ignore_index}"
        )


def check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> None:
    """A linear classifier over `hidden`, whose own checks are `check_rows`, and what is done to its logits."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, H] with H = {hidden.shape[-1]} of hidden, got shape {tuple(weight.shape)}"
        )
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias must be a tensor or None, got {type(bias).__name__}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}")
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")
    check_softcap(softcap)
    check_number("logit_scale", logit_scale)
    if not -math.inf < logit_scale < math.inf or logit_scale == 0:  # math.isfinite cannot be traced
        raise ValueError(f"logit_scale must be finite and not 0, got {logit_scale!r}")


def check_softcap(softcap: float | None) -> None:
    if softcap is not None:
        check_number("softcap", softcap)
        if not 0.0 < softcap < math.inf:
            raise ValueError(f"softcap must be positive and finite, or None, got {softcap!r}")


def check_number(name: str, value: float) -> None:
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def may_synchronise(tensor: Tensor) -> bool:
    """Host checks of values: always on a CPU, on request elsewhere, never while tracing."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def check_float_vector(name: str, values: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if values.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {values.dtype}")
    if values.dim() != 1 or values.shape[0] == 0:
        raise ValueError(f"{name} must be [N] with N >= 1, got shape {tuple(values.shape)}")


def check_state(
    state: AdaSelectionState | None, names: tuple[str, ...], device: torch.device, seed: int
) -> tuple[Tensor | None, int]:
    """The operators' state buffer and the seed as a signed 64-bit pattern."""
    if state is not None:
        if not isinstance(state, AdaSelectionState):
            raise TypeError(f"state must be an AdaSelectionState, got {type(state).__name__}")
        if state.methods != names:
            raise ValueError(f"state is of methods {state.methods!r}, the call names {names!r}")
        if state.device != device:
            raise ValueError(f"state must be on the device of the input, {device}, got {state.device}")
        seed = state.seed
    seed = check_seed(seed)
    return (None if state is None else state.buffer), (seed - 2**64 if seed >= 2**63 else seed)


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
