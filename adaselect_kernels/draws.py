"""Seeded draws of rows, on the device of the weights and without waiting for it.

The noise is Philox 4x32-10 keyed by (seed, step), row by row (`reference.philox_uniform`), so a draw is a function of its
arguments: the same call draws the same rows, and another step draws afresh.
"""

import math

import torch
from torch import Tensor

from adaselect_kernels.checks import check_float_vector
from adaselect_kernels.functional import select_topk
from adaselect_kernels.reference import philox_uniform
from adaselect_kernels.state import check_seed

_TOTAL_BITS = 39  # of the sum of integer weights: times 23 bits of noise it stays below 2^63
_BELOW_ALL = 100.0  # log E is in [-16.7, 2.9]: this far below, no noise lifts a row of weight 0 above one of weight > 0


def draw_without_replacement(
    weights: Tensor,  # [N]; any float dtype
    k: int,
    step: Tensor | int,
    seed: int,
    *,
    power: float = 1.0,
    order: str = "index",
    impl: str = "auto",
) -> Tensor:
    """k distinct rows, drawn one after the other with probability proportional to weights^power among those left.

    Efraimidis & Spirakis 2006: the rows of the k smallest E_i / w_i, E_i i.i.d. Exp(1). Rows of weight 0 come after all
    others, at random; invalid ones (NaN, infinite, negative) last. Memory O(N).

    step: number of the draw, a scalar tensor on the device of `weights` or an int. power >= 0; at 0 the draw is uniform.
    order, impl: as in `select_topk`. Returns rows [k] int64.
    Raises ValueError (k outside [1, N], power, seed, no weights), TypeError (dtypes).

    >>> draw_without_replacement(torch.tensor([0.0, 1.0, 2.0, 0.0]), 2, step=1, seed=0)
    tensor([1, 2])
    """
    return select_topk(draw_keys(weights, step, seed, power=power), k, order=order, impl=impl)


def draw_keys(weights: Tensor, step: Tensor | int, seed: int, *, power: float = 1.0) -> Tensor:
    """power log w_i - log E_i, [N] float32: the k largest are what `draw_without_replacement` draws; -inf when invalid.

    Computed in float64 and on logarithms, so that a high power underflows nothing.
    """
    ok = _usable(weights)
    if isinstance(power, bool) or not isinstance(power, (int, float)):
        raise TypeError(f"power must be a number, got {power!r}")
    if not 0.0 <= power < math.inf:
        raise ValueError(f"power must be finite and at least 0, got {power!r}")
    noise = uniform_noise(weights.shape[0], step, seed, weights.device)
    wide = weights.detach().to(torch.float64)
    some = ok & (wide > 0) if power > 0 else ok  # w^0 = 1, also for w = 0
    logs = power * torch.where(some & (wide > 0), wide, 1.0).log()
    least = torch.where(some, logs, math.inf).min()
    least = torch.where(least == math.inf, 0.0, least)
    keys = torch.where(some, logs, least - _BELOW_ALL) - (-noise.log()).log()
    return torch.where(ok, keys, -math.inf).to(torch.float32)


def draw_with_replacement(
    weights: Tensor,  # [N]; any float dtype
    k: int,
    step: Tensor | int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """k independent draws: rows [k] int64, ascending and with repetitions, and the probability p of each, [k] float64.

    By inverse CDF over integers: q_i = ceil(2^B w_i / max w) with B = 39 - ceil(log2 N), so that the draw is the same on
    every device, and p_i = q_i / sum q is the exact probability of what is drawn (46 bits of noise resolve it to a
    relative 2^-46 / p_i). Rows of weight 0 and invalid ones (NaN, infinite, negative) are never drawn; when all valid
    weights are 0 the draw is uniform over the valid rows, and over all rows when none is valid. Memory O(N + k).

    step: number of the draw, a scalar tensor on the device of `weights` or an int.
    Raises ValueError (k < 1, seed, no weights), TypeError (dtypes, k).

    >>> rows, probabilities = draw_with_replacement(torch.tensor([0.0, 1.0, 0.0, 3.0]), 4, step=1, seed=0)
    >>> rows, probabilities
    (tensor([1, 3, 3, 3]), tensor([0.2500, 0.7500, 0.7500, 0.7500], dtype=torch.float64))
    """
    ok = _usable(weights)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    words = (uniform_noise(2 * k, step, seed, weights.device) * 2.0**23).to(torch.int64)  # 23 bits each, exact
    shares = _integer_weights(weights.detach(), ok)
    ends = shares.cumsum(0)
    total = ends[-1]
    # floor(r total / 2^46) of r = high 2^23 + low, every product below 2^63
    position = (words[:k] * total + ((words[k:] * total) >> 23)) >> 23
    rows = torch.searchsorted(ends, position, right=True).sort().values
    return rows, shares[rows].to(torch.float64) / total


def _integer_weights(weights: Tensor, ok: Tensor) -> Tensor:
    """q [N] int64 with sum at most 2^39: at least 1 where the weight is positive."""
    wide = torch.where(ok, weights.to(torch.float64), 0.0)
    top = wide.max()
    scale = 2.0 ** (_TOTAL_BITS - (int(weights.shape[0]) - 1).bit_length())
    shares = (wide / torch.where(top > 0, top, 1.0) * scale).ceil().to(torch.int64).clamp(min=1)
    shares = torch.where(wide > 0, shares, 0)
    uniform = torch.where(ok.any(), ok, True).to(torch.int64)
    return torch.where(top > 0, shares, uniform)


def empirical_cdf(history: Tensor, losses: Tensor) -> Tensor:
    """Share of `history` [R] that is <= l_i, [N] float64; NaN entries are empty places. 1 while there is no entry.

    NaN where the loss is NaN.

    >>> empirical_cdf(torch.tensor([1.0, 2.0, 3.0, float("nan")]), torch.tensor([0.5, 2.0, 9.0]))
    tensor([0.0000, 0.6667, 1.0000], dtype=torch.float64)
    """
    filled = ~history.isnan()
    count = filled.sum()
    ranked = torch.where(filled, history, math.inf).sort().values
    below = torch.minimum(torch.searchsorted(ranked, losses.to(history.dtype), right=True), count)
    share = torch.where(count > 0, below.to(torch.float64) / count, 1.0)
    return torch.where(losses.isnan(), math.nan, share)


def push_losses(history: Tensor, count: Tensor, losses: Tensor, valid: Tensor) -> None:
    """Write the valid `losses` [N] over the oldest of the ring `history` [R], in place, and add their number to `count`.

    count: [] int64, losses pushed so far; of more than R in one call the last R remain.
    """
    size = history.shape[0]
    rank = valid.to(torch.int64).cumsum(0)  # 1, 2, ... over the valid rows
    total = rank[-1]
    kept = valid & (rank > total - size)
    place = torch.where(kept, (count + rank - 1) % size, size)  # the place `size` takes what is not kept
    longer = torch.cat([history, history.new_zeros(1)])
    history.copy_(longer.scatter(0, place, losses.to(history.dtype))[:size])
    count += total


def uniform_noise(rows: int, step: Tensor | int, seed: int, device: torch.device) -> Tensor:
    """u [rows] float64 in (0, 1) of (seed, step), 23 bits each."""
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=device)
    if step.dim() != 0 or step.device != device:
        raise ValueError(f"step must be a scalar on {device}, got shape {tuple(step.shape)} on {step.device}")
    return philox_uniform(rows, step, check_seed(seed))


def _usable(weights: Tensor) -> Tensor:
    check_float_vector("weights", weights)
    return weights.isfinite() & (weights >= 0)
