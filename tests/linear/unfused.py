"""The peer of scoring from hidden states: the unfused computation, not at its luckiest."""

import torch
from torch import Tensor

from adaselect_kernels.options import compute_dtype


def widened(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(compute_dtype(tensor))


def eager(call, hidden: Tensor, weight: Tensor, exact: Tensor) -> Tensor:
    """call(hidden, weight) unfused in the dtype of the statistics, element by element the worst of four orders of summation.

    One order may be lucky: a few rows of a few features have hardly any rounding.
    """
    hidden, weight = widened(hidden), widened(weight)
    worst = call(hidden, weight)
    for shift in (1, 5, 11):
        order = torch.arange(hidden.shape[-1]).roll(shift)
        other = call(hidden[..., order], weight[..., order])
        worst = torch.where((other - exact).abs() > (worst - exact).abs(), other, worst)
    return worst
