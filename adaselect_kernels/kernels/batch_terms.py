"""Terms of a batch's scores (AdaSelection, equations 2 to 6), and what a launch takes from methods, options and rows.

Every method's importance is a combination of six components e_c >= 0 over the valid rows, each divided by its sum:
exp(u), exp(-u), exp(g), a, exp(-|u - mean u|) and E (coreset1 is half of the first and half of the second).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from adaselect_kernels.kernels.maths import exponential_precise, float_bits, is_finite, strided_offset
from adaselect_kernels.kernels.runtime import cached
from adaselect_kernels.options import ADABOOST_EPS, METHODS, STD_EPS, PackedOptions

BIG, SMALL, GRAD, ADA, MIDDLE, NOISE = (tl.constexpr(code) for code in range(6))  # components
COMPONENTS = tl.constexpr(6)
USES_GRAD, USES_MIDDLE, USES_NOISE = (tl.constexpr(1 << code) for code in (2, 4, 5))
LANES = tl.constexpr(8)  # a vector that holds one number a component, or one a method
_COMPONENTS_OF = {
    "big_loss": (0,),
    "small_loss": (1,),
    "grad_norm": (2,),
    "adaboost": (3,),
    "coreset1": (0, 1),
    "coreset2": (4,),
    "uniform": (5,),
}
CORESET1 = tl.constexpr(METHODS.index("coreset1"))
ADA_EPS = tl.constexpr(ADABOOST_EPS)
SPREAD_EPS = tl.constexpr(STD_EPS)


@triton.jit
def composition(METHOD: tl.constexpr, lane):
    """[LANES] share of every component in the method's importance: coreset1 is half and half, the others are one."""
    if METHOD == CORESET1:
        return tl.where((lane == BIG) | (lane == SMALL), 0.5, 0.0).to(tl.float64)
    elif METHOD < CORESET1:
        return tl.where(lane == METHOD, 1.0, 0.0).to(tl.float64)
    else:
        return tl.where(lane == METHOD - 1, 1.0, 0.0).to(tl.float64)


@triton.jit
def load_rows(
    losses_ptr, grads_ptr, valid_ptr, rows, n, stride_loss, stride_grad,
    valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Losses and gradient norms, 0 on invalid rows; which rows are valid. `.cg`: other programs may have stored them.

    WHOLE: all rows exist; without a mask a thread loads 16 bytes at a time.
    """
    inside = None if WHOLE else rows < n
    zero = None if WHOLE else 0.0
    at = rows.to(tl.int64)
    loss = tl.load(losses_ptr + at * stride_loss, mask=inside, other=zero, cache_modifier=".cg").to(COMPUTE)
    ok = is_finite(loss)
    if not WHOLE:
        ok = ok & inside
    if HAS_VALID:
        flag = tl.load(
            valid_ptr + strided_offset(rows, valid_inner, stride_valid_outer, stride_valid_inner), mask=inside
        )
        ok = ok & (flag != invalid_value)
    g = tl.zeros_like(loss)
    if HAS_GRAD:
        g = tl.load(grads_ptr + at * stride_grad, mask=inside, other=zero, cache_modifier=".cg").to(COMPUTE)
        ok = ok & is_finite(g)
        g = tl.where(ok, g, 0.0)
    return tl.where(ok, loss, 0.0), g, ok


@triton.jit
def load_block(
    losses_ptr, grads_ptr, valid_ptr, start, n, stride_loss, stride_grad,
    valid_inner, stride_valid_outer, stride_valid_inner, invalid_value,
    HAS_GRAD: tl.constexpr, HAS_VALID: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """load_rows of rows start .. start + BLOCK, and those rows."""
    rows = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        loss, g, ok = load_rows(
            losses_ptr, grads_ptr, valid_ptr, rows, n, stride_loss, stride_grad,
            valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, HAS_GRAD, HAS_VALID, COMPUTE, True,
        )  # fmt: skip
    else:
        loss, g, ok = load_rows(
            losses_ptr, grads_ptr, valid_ptr, rows, n, stride_loss, stride_grad,
            valid_inner, stride_valid_outer, stride_valid_inner, invalid_value, HAS_GRAD, HAS_VALID, COMPUTE,
        )  # fmt: skip
    return rows, loss, g, ok


@triton.jit
def moments(values, ok, n):
    """Mean, sum (v - mean)^2 and maximum over valid rows; values are 0 on the others."""
    mean = tl.sum(values, axis=0) / tl.maximum(n, 1).to(values.dtype)
    apart = tl.where(ok, values - mean, 0.0)
    return mean, tl.sum(apart * apart, axis=0), tl.max(tl.where(ok, values, float("-inf")), axis=0)


@triton.jit
def adaboost_key(loss, l_max):
    """a = 0.5 log((1 + t) / (1 - t)), t = max(l, 0) / ((1 + eps) max l), without cancelling at l = max l; 0 if max l <= 0."""
    positive = tl.maximum(loss, 0.0)
    ratio = ((1.0 + ADA_EPS) * l_max + positive) / ((l_max - positive) + ADA_EPS * l_max)
    return tl.where(l_max > 0, 0.5 * tl.log(ratio), 0.0)


@triton.jit
def component(CODE: tl.constexpr, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min):
    """e_c of every row, 0 on invalid ones; exponents are shifted by their largest."""
    if CODE == BIG:
        # u / tau with u = l or (l - mean l) / (std l + 1e-6): differences to the maximum do not need the mean
        e = exponential_precise((loss - l_max) / l_scale)
    elif CODE == SMALL:
        e = exponential_precise((l_min - loss) / l_scale)
    elif CODE == GRAD:
        e = exponential_precise((g - g_max) / g_scale)
    elif CODE == ADA:
        # the importance is 1/n where sum a = 0, which is where max l <= 0
        e = tl.where(l_max > 0, adaboost_key(loss, l_max), 1.0)
    elif CODE == MIDDLE:
        e = exponential_precise((middle_min - tl.abs(loss - l_mean)) / l_scale)
    else:
        e = noise
    return tl.where(ok, e, 0.0)


@triton.jit
def baseline_key(METHOD: tl.constexpr, loss, g, noise, l_mean, l_max, l_min):
    """The method's k largest keys are its choice; coreset1's is for reporting only."""
    if METHOD == 0:
        key = loss
    elif METHOD == 1:
        key = -loss
    elif METHOD == 2:
        key = g
    elif METHOD == 3:
        key = adaboost_key(loss, l_max)
    elif METHOD == 4:
        key = tl.maximum(loss - l_min, l_max - loss)
    elif METHOD == 5:
        key = -tl.abs(loss - l_mean)
    else:
        key = noise
    return key


@triton.jit
def load_step(state_ptr, HAS_STATE: tl.constexpr, M: tl.constexpr):
    """t, 1 for a fresh state."""
    if HAS_STATE:
        return tl.load(state_ptr + 2 * M)
    else:
        return tl.full([], 1.0, tl.float64)


@triton.jit
def weigh(
    sums, weighted, n_valid, given, old_ptr, state_ptr, program, step, beta, floor,
    METHOD_CODES: tl.constexpr, M: tl.constexpr, HAS_STATE: tl.constexpr, GIVEN: tl.constexpr,
    LOG_RATIO: tl.constexpr, HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    """Equation 3: method losses, the new state, and the factor of every component in the score.

    sums, weighted [LANES] float64: sum e_c and sum e_c l by component; given [LANES]: the method losses when GIVEN. The
    state is read from `old` and written to `state` by program 0.
    """
    lane = tl.arange(0, LANES)
    used = lane < M

    # 1. method losses L_m = sum e_c l / sum e_c, or the given ones
    share = weighted / sums
    losses = given
    if not GIVEN:
        losses = tl.full([LANES], float("nan"), tl.float64)
        for i in tl.static_range(M):
            part = composition((METHOD_CODES >> (4 * i)) & 15, lane)
            losses = tl.where(lane == i, tl.sum(tl.where(part > 0, part * share, 0.0), axis=0), losses)
    losses = tl.where(n_valid > 0, losses, float("nan"))

    # 2. log w += beta (L' - L) / L', or beta log(L' / L); unchanged where that is not finite
    if HAS_STATE:
        log_w = tl.load(old_ptr + lane, mask=used, other=float("-inf"), cache_modifier=".cg")
        previous = tl.load(old_ptr + M + lane, mask=used, other=float("nan"), cache_modifier=".cg")
        if LOG_RATIO:
            positive = (previous > 0) & (losses > 0)
            increment = tl.log(tl.where(positive, previous / losses, 1.0))
            increment = tl.where(positive, increment, float("nan"))
        else:
            increment = (previous - losses) / previous
        log_w = tl.where(is_finite(increment), log_w + beta * increment, log_w)
        # sum_m w = 1
        top = tl.max(log_w, axis=0)
        log_w -= top + tl.log(tl.sum(tl.exp(log_w - top), axis=0))
    else:
        log_w = tl.where(used, -tl.log(tl.full([LANES], M, tl.float64)), float("-inf"))
    w = tl.exp(log_w)
    if HAS_FLOOR:
        # clip at floor / M and rescale the rest, again while that pushes another one below
        least = floor / M
        clipped = lane >= LANES
        scaled = w
        for _ in tl.static_range(M):
            clipped = clipped | (used & (scaled <= least))
            rest = tl.where(clipped, 0.0, w)
            left = 1.0 - least * tl.sum((clipped & used).to(tl.float64), axis=0)
            scaled = tl.where(clipped, least, rest * (left / tl.sum(rest, axis=0)))
        scaled = tl.where(used, scaled, 0.0)
        w = scaled / tl.sum(scaled, axis=0)
        log_w = tl.log(w)
    if HAS_STATE:
        tl.debug_barrier()  # every warp has read the old state
        writes = used & (lane + program * LANES < LANES)
        tl.store(state_ptr + lane, log_w, mask=writes)
        tl.store(state_ptr + M + lane, tl.where(is_finite(losses), losses, previous), mask=writes)
        tl.store(state_ptr + 2 * M, step + 1.0, mask=program == 0)

    # 3. factor of component c: (sum of the weights of its methods) / sum e_c
    factors = tl.zeros([LANES], tl.float64)
    for i in tl.static_range(M):
        weight = tl.sum(tl.where(lane == i, w, 0.0), axis=0)
        factors += composition((METHOD_CODES >> (4 * i)) & 15, lane) * weight
    return factors / sums


@triton.jit
def reward(loss, l_squares, n_valid, step, power, CURRICULUM: tl.constexpr):
    """r = exp(-t^power l / scale), scale = sum l^2 (CURRICULUM = 1) or sqrt(mean l^2) (2); 1 when every loss is 0."""
    strength = tl.exp(power * tl.log(step)).to(loss.dtype)
    scale = l_squares
    if CURRICULUM == 2:
        scale = tl.sqrt(l_squares / tl.maximum(n_valid, 1).to(loss.dtype))
    return tl.where(l_squares > 0, tl.exp(-strength * loss / scale), 1.0)


@triton.jit
def spread(std, temperature, STANDARDIZE: tl.constexpr):
    """What differences of losses are divided by: tau, or (std + 1e-6) tau."""
    if STANDARDIZE:
        return (std + SPREAD_EPS) * temperature
    else:
        return temperature


@triton.jit
def mixed_score(
    factors, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min, USED: tl.constexpr
):
    """sum_c factor_c e_c; factors [LANES]."""
    lane = tl.arange(0, LANES)
    score = tl.zeros_like(loss)
    for c in tl.static_range(COMPONENTS):
        if (USED >> c) & 1:
            factor = tl.sum(tl.where(lane == c, factors, 0.0), axis=0).to(loss.dtype)
            score += factor * component(
                c, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min
            )
    return score


@triton.jit
def component_sums(loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min, USED: tl.constexpr):
    """sum e_c and sum e_c l of the used components, 0 of the others: [LANES] float64 both."""
    lane = tl.arange(0, LANES)
    sums = tl.zeros([LANES], tl.float64)
    weighted = tl.zeros([LANES], tl.float64)
    for c in tl.static_range(COMPONENTS):
        if (USED >> c) & 1:
            e = component(c, loss, g, noise, ok, l_mean, l_max, l_min, l_scale, g_max, g_scale, middle_min)
            sums = tl.where(lane == c, tl.sum(e, axis=0).to(tl.float64), sums)
            weighted = tl.where(lane == c, tl.sum(e * loss, axis=0).to(tl.float64), weighted)
    return sums, weighted


@dataclass(frozen=True, eq=False)  # equal by identity: a key of launches that costs nothing to compare
class Plan:
    """What a launch takes from methods and options: flags that choose code, and numbers as float64 patterns."""

    methods: tuple[int, ...]
    flags: dict[str, int | bool]
    beta: int
    temperature: int
    floor: int
    power: int
    has_grad: bool
    baseline: bool
    selected: bool  # method losses of the rows each method alone would choose: they need launches of their own


def make_plan(methods: Sequence[int], has_state: bool, options: Sequence[float]) -> Plan:
    options = tuple(options)
    power = options[_POWER]
    if power != power:
        # NaN is not equal to itself and would never be found again
        options = (*options[:_POWER], None, *options[_POWER + 1 :])
    return _make_plan(tuple(methods), has_state, options)


_POWER = PackedOptions._fields.index("curriculum_power")


@cached
def _make_plan(methods: tuple[int, ...], has_state: bool, options: tuple) -> Plan:
    opts = PackedOptions.unpack(options)
    codes = sum(method << (4 * i) for i, method in enumerate(methods))
    used = 0
    for method in methods:
        for component in _COMPONENTS_OF[METHODS[method]]:
            used |= 1 << component
    baseline = bool(opts.baseline)
    flags = {
        "METHOD_CODES": codes,
        "M": len(methods),
        "USED": used,
        "HAS_STATE": has_state,
        "BASELINE": baseline,
        "STANDARDIZE": bool(opts.standardize) and not baseline,
        "LOG_RATIO": opts.update == 1 and has_state and not baseline,
        "HAS_FLOOR": opts.weight_floor > 0 and not baseline,
        "CURRICULUM": 0 if opts.curriculum_power is None or baseline else 1 + int(opts.curriculum_scale),
    }
    power = 0.0 if opts.curriculum_power is None else opts.curriculum_power
    return Plan(
        methods, flags, float_bits(opts.beta), float_bits(opts.temperature), float_bits(opts.weight_floor),
        float_bits(power), METHODS.index("grad_norm") in methods, baseline,
        # a fresh state's weights do not depend on the method losses
        opts.method_loss == 1 and has_state and not baseline,
    )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Where a batch's numbers are: losses and gradient norms [N], and what marks a row as not valid.

    A row is not valid where `valid` (an [outer, inner] array of targets or flags) equals `invalid_value`.
    """

    losses: Tensor
    grads: Tensor | None
    valid: Tensor | None
    invalid_value: int

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        losses = self.losses
        return losses, losses if self.grads is None else self.grads, losses if self.valid is None else self.valid

    @cached_property
    def shape(self) -> "RowsShape":
        stride_grad = 0 if self.grads is None else self.grads.stride(0)
        if self.valid is None:
            valid = (1, 0, 0)
        elif self.valid.dim() == 2:
            valid = (self.valid.shape[1], *self.valid.stride())
        else:
            valid = (1, self.valid.stride(0), 0)
        strides = self.losses.stride(0), stride_grad, *valid, self.invalid_value
        return RowsShape(self.losses.shape[0], strides, self.grads is not None, self.valid is not None)


class RowsShape(NamedTuple):
    """What a launch takes from Rows besides the tensors."""

    n: int
    strides: tuple[int, ...]  # of losses and grads, valid's inner size and strides, and the invalid value
    has_grad: bool
    has_valid: bool

    def flags(self) -> dict[str, Any]:
        return {"HAS_GRAD": self.has_grad, "HAS_VALID": self.has_valid}


# Of a baseline.
NO_OPTIONS = PackedOptions(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, math.nan, 0.0, 1.0)
