"""Names and settings every layer shares: methods, statistics, and the options of AdaSelection.

Bottom layer: imports nothing of the package, so kernels, operators and policies can all read the same tables.
The order of METHODS and STATS is part of the operator contract: operators receive positions in these tuples.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("big_loss", "small_loss", "grad_norm", "adaboost", "coreset1", "coreset2", "uniform")
STATS = ("loss", "lse", "grad_norm", "margin", "top2_margin", "entropy", "confidence", "correct")
# Rows of `linear_partials`: of a row's logits z_j over a set of classes, the target y left out, with the largest m and
# e_j = exp(z_j - m): m, sum e_j, sum e_j^2, sum e_j (z_j - m), the second largest, the largest of j < y, sum (z_j - m); z_y where
# the set has the target, else 0; the number of classes but y; 1 where a logit is NaN, else 0. Nothing is -inf, sums of it 0.
PARTIALS = ("max", "sum", "sum_sq", "sum_ex", "second", "before", "sum_x", "target", "count", "nan")
UPDATES = ("relative", "log_ratio")
METHOD_LOSSES = ("weighted", "selected")
CURRICULUM_SCALES = ("sum_squares", "rms")
UNITS = ("sample", "token")
ORDERS = ("index", "score")
GRAD_NORM_SOURCES = ("logits", "last_layer", "last_k", "norm_layers", "hutchinson", "exact")

ADABOOST_EPS = 1e-6  # t = max(l, 0) / ((1 + eps) max l)
STD_EPS = 1e-6  # u = (l - mean l) / (std l + eps)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Of sums and statistics over `tensor`: float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class PackedOptions(NamedTuple):
    """What the operators receive as `float[] options`; a NamedTuple of floats, in this order.

    `baseline` = 1 scores by the raw key of the only method (the table of baseline selectors) instead of the
    weighted importances; `curriculum_power` = NaN means no reward.
    """

    beta: float
    temperature: float
    standardize: float
    update: float  # position in UPDATES
    method_loss: float  # position in METHOD_LOSSES
    weight_floor: float
    curriculum_power: float
    curriculum_scale: float  # position in CURRICULUM_SCALES
    baseline: float = 0.0

    @staticmethod
    def unpack(options: Sequence[float]) -> "PackedOptions":
        return PackedOptions(*options)


@dataclass(frozen=True)
class AdaSelectionOptions:
    """Settings of AdaSelection (arXiv 2306.10728, equations 2 to 6). The defaults are the paper's.

    beta: step of the method weights, in [-1, 1].
    temperature: tau > 0 of the softmax importances.
    standardize: importances of u = (l - mean l) / (std l + 1e-6) instead of u = l; the standard deviation divides by the
        number of valid rows. Gradient norms likewise.
    update: "relative", log w += beta (L' - L) / L' (equation 3; L' is the previous method loss), or
        "log_ratio", log w += beta log(L' / L), which telescopes: noise alone cannot make the weights drift.
    method_loss: "weighted", L = sum_i alpha_i l_i, or "selected", the mean loss of the k rows the method alone would choose.
    weight_floor: keeps every weight at or above weight_floor / M, in [0, 1].
    curriculum_power: None for no reward (r = 1), else r_i = exp(-t^power l_i / scale) (equation 4). Negative powers fade over
        time as the paper's text says, positive ones are its printed form. Needs losses >= 0.
    curriculum_scale: "sum_squares", sum_j l_j^2 (the printed form), or "rms", sqrt(mean_j l_j^2), which does not vanish with N.

    Raises ValueError or TypeError for a value outside what is accepted.
    """

    beta: float = 1.0
    temperature: float = 1.0
    standardize: bool = False
    update: str = "relative"
    method_loss: str = "weighted"
    weight_floor: float = 0.0
    curriculum_power: float | None = None
    curriculum_scale: str = "sum_squares"

    def __post_init__(self) -> None:
        _require_number("beta", self.beta, -1.0, 1.0)
        _require_number("temperature", self.temperature, 0.0, math.inf)
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature!r}")
        if not isinstance(self.standardize, bool):
            raise TypeError(f"standardize must be a bool, got {self.standardize!r}")
        require_choice("update", self.update, UPDATES)
        require_choice("method_loss", self.method_loss, METHOD_LOSSES)
        require_choice("curriculum_scale", self.curriculum_scale, CURRICULUM_SCALES)
        _require_number("weight_floor", self.weight_floor, 0.0, 1.0)
        if self.curriculum_power is not None:
            _require_number("curriculum_power", self.curriculum_power, -math.inf, math.inf)
            if not math.isfinite(self.curriculum_power):
                raise ValueError(f"curriculum_power must be finite or None, got {self.curriculum_power!r}")
        packed = PackedOptions(
            beta=float(self.beta),
            temperature=float(self.temperature),
            standardize=float(self.standardize),
            update=float(UPDATES.index(self.update)),
            method_loss=float(METHOD_LOSSES.index(self.method_loss)),
            weight_floor=float(self.weight_floor),
            curriculum_power=math.nan if self.curriculum_power is None else float(self.curriculum_power),
            curriculum_scale=float(CURRICULUM_SCALES.index(self.curriculum_scale)),
        )
        object.__setattr__(self, "_packed", packed)  # once: a call of 20 microseconds reads it

    @property
    def packed(self) -> PackedOptions:
        """The operators' encoding."""
        return self._packed  # pyright: ignore[reportAttributeAccessIssue]


def _require_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= float(value) <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}")


def require_choice(name: str, value: object, accepted: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `accepted`."""
    if value not in accepted or not isinstance(value, str):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}")


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """Return `methods` as a tuple of distinct known names; raise TypeError or ValueError otherwise."""
    if type(methods) is tuple and methods in _CHECKED:
        return methods
    if isinstance(methods, str) or not isinstance(methods, (tuple, list)):
        raise TypeError(f"methods must be a tuple or list of names, got {methods!r}")
    if not methods:
        raise ValueError(f"methods must name at least one of {', '.join(METHODS)}; got none")
    for method in methods:
        require_choice("methods", method, METHODS)
    if len(set(methods)) != len(methods):
        raise ValueError(f"methods must be distinct, got {tuple(methods)!r}")
    _CHECKED.add(tuple(methods))
    return tuple(methods)


_CHECKED: set[tuple[str, ...]] = set()  # tuples that passed: the check is a third of the time of a small call
