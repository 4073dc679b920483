"""Learning-rate schedules under selection: they count optimizer updates, of which there are fewer than candidate batches.

A schedule made for the steps of training on everything would stop part of the way: a cosine never comes down. `scale_schedule`
stretches it to the planned number of updates, `planned_updates` counts those, `check_schedule` warns when neither was done.
"""

import math
import warnings
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.optim import lr_scheduler as torch_schedules
from torch.optim.lr_scheduler import LRScheduler

from adaselect_kernels.checks import selected_count


class ScheduleWarning(UserWarning):
    """A learning-rate schedule that does not end where the planned updates end."""


class Rate(NamedTuple):
    """What a schedule sets in one parameter group: the learning rate, and the momentum (beta1 of Adam) where it cycles one."""

    lr: float
    momentum: float | None = None


Curve = Callable[[float], list[Rate]]  # of the step, which may be a fraction; one Rate a parameter group


def planned_updates(
    rows: int, candidate_batch: int, gamma: float, batch_size: int, epochs: int, *, drop_last: bool = False
) -> int:
    """Optimizer updates that `SelectedBatches` makes: floor(epochs * (rows chosen in an epoch) / batch_size).

    rows: of the training set. candidate_batch, drop_last: batch_size and drop_last of the loader. gamma: of the policy.
    batch_size: of `SelectedBatches`. The buffer carries over from epoch to epoch; what it holds at the end is not trained on.
    Exact for policies that choose k = clamp(floor(gamma N + 0.5), 1, N) of N rows; an expectation for those that draw k.

    Raises TypeError (a count that is no int), ValueError (a count below 1, gamma outside (0, 1], no candidate batch).

    >>> planned_updates(rows=1000, candidate_batch=128, gamma=0.3, batch_size=64, epochs=2)  # 7 * 38 + 31 rows an epoch
    9
    """
    counts = {"rows": rows, "candidate_batch": candidate_batch, "batch_size": batch_size, "epochs": epochs}
    for name, value in counts.items():
        _check_count(name, value)
    full, last = divmod(rows, candidate_batch)
    chosen = full * selected_count(gamma, candidate_batch)
    if last and not drop_last:
        chosen += selected_count(gamma, last)
    if not chosen:
        raise ValueError(f"drop_last leaves no candidate batch: {rows} rows in batches of {candidate_batch}")
    return epochs * chosen // batch_size


def scale_schedule(scheduler: LRScheduler, planned: int, original: int | None = None) -> "ScaledSchedule":
    """`scheduler` stretched from `original` steps to `planned` updates: at update u its value at step u * original / planned.

    scheduler: one of torch's, just made: StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, PolynomialLR,
        CosineAnnealingLR, CosineAnnealingWarmRestarts, OneCycleLR, CyclicLR (both with their momentum), LambdaLR (its
        functions are called with fractions), MultiplicativeLR with constant factors, SequentialLR of these, ChainedScheduler
        of those that multiply. Between whole steps the curve is the formula's: a cosine is smooth, a step stays a step.
    planned: optimizer updates of the run (`planned_updates`).
    original: steps that the scheduler was made for, in whatever it counted: epochs, or updates without selection. None: the
        end that it has of its own (T_max, total_steps, total_iters, ...), refused where it has none.

    Returns a new scheduler, to be stepped once after every update. The one given is spent: stepping it raises RuntimeError.
    OneCycleLR stays at its last value from step total_steps - 1 on (PyTorch's own formula turns up again at total_steps).

    Raises TypeError (no scheduler, a count that is no int), ValueError, nothing changed (a scheduler that cannot be scaled, by
    name, with what to do instead; one that was stepped already; a count below 1; no `original` and none known).

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    >>> schedule = scale_schedule(torch.optim.lr_scheduler.StepLR(optimizer, step_size=50), planned=30, original=100)
    >>> for update in range(30):
    ...     optimizer.step()
    ...     schedule.step()
    ...     if update in (13, 14, 29):
    ...         print(update + 1, f"{schedule.get_last_lr()[0]:.3f}")
    14 0.500
    15 0.050
    30 0.005
    """
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"scheduler must be one of torch.optim.lr_scheduler, got {type(scheduler).__name__}")
    if original is None:
        curve = _curve(scheduler)
        original = _horizon(scheduler)
        if original is None:
            raise ValueError(
                f"a {type(scheduler).__name__} does not say how many steps it was made for: give original=that number"
            )
    _check_count("planned", planned)
    _check_count("original", original)
    _check_fresh(scheduler)
    curve = _curve(scheduler, original)
    curve(original / planned)  # a function of the user's that takes whole steps only is found out here
    scaled = ScaledSchedule(scheduler, curve, planned, original)
    scheduler.step = _spent  # type: ignore[method-assign]
    return scaled


class ScaledSchedule(LRScheduler):
    """A schedule at u * original / planned; made by `scale_schedule`. Warns once when stepped past `planned`.

    planned, original: as given. kind: name of the class that was scaled. `last_epoch` counts updates.
    """

    def __init__(self, scheduler: LRScheduler, curve: Curve, planned: int, original: int) -> None:
        self.kind = type(scheduler).__name__
        self.planned, self.original = planned, original
        self._curve = curve
        self._warned = False
        super().__init__(scheduler.optimizer)

    def get_lr(self) -> list[Any]:
        if self.last_epoch > self.planned and not self._warned:
            self._warned = True
            warnings.warn(
                f"update {self.last_epoch} of a schedule scaled to {self.planned} updates: it has ended",
                ScheduleWarning,
                stacklevel=3,
            )
        rates = self._curve(self.last_epoch * self.original / self.planned)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if rate.momentum is not None and "betas" in group:
                group["betas"] = (rate.momentum, *group["betas"][1:])
            elif rate.momentum is not None:
                group["momentum"] = rate.momentum
        return [rate.lr for rate in rates]

    def state_dict(self) -> dict[str, Any]:
        """Kind, original, planned and the updates made. The optimizer's own state carries the rates."""
        return {"kind": self.kind, "original": self.original, "planned": self.planned, "updates": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from `state_dict()`. Raises ValueError, nothing changed, for a corrupt one or one of another schedule."""
        own = self.state_dict()
        if not isinstance(state_dict, dict) or set(state_dict) != set(own):
            raise ValueError(f"not a state of a ScaledSchedule: expected the keys {sorted(own)}, got {state_dict!r}")
        for name in ("kind", "original", "planned"):
            if state_dict[name] != own[name]:
                raise ValueError(f"state is of a schedule with {name} {state_dict[name]!r}, expected {own[name]!r}")
        updates = state_dict["updates"]
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 0:
            raise ValueError(f"corrupt state: updates must be an int >= 0, got {updates!r}")
        self.last_epoch = updates
        self._step_count = updates + 1
        self._last_lr = [rate.lr for rate in self._curve(updates * self.original / self.planned)]


def check_schedule(scheduler: LRScheduler, planned: int) -> bool:
    """Whether `scheduler` ends with the planned updates; warns (ScheduleWarning) when it does not, or when that is unknown.

    Fits: one that `scale_schedule` made for `planned`, or one whose own end is there: T_max of CosineAnnealingLR, total_iters
    of LinearLR, ConstantLR and PolynomialLR, total_steps of OneCycleLR (or one step later, as its count has it), the end of a
    cycle of CosineAnnealingWarmRestarts, the end of the last part of a SequentialLR. StepLR, LambdaLR and others have
    no end of their own: `scale_schedule(scheduler, planned, original)` says what they were made for.
    """
    _check_count("planned", planned)
    name = type(scheduler).__name__
    if isinstance(scheduler, ScaledSchedule):
        end: int | None = scheduler.planned
        name = f"scaled {scheduler.kind}"
    else:
        end = _horizon(scheduler, near=planned) if isinstance(scheduler, LRScheduler) else None
    one_cycle = isinstance(scheduler, torch_schedules.OneCycleLR)
    if end == planned or (one_cycle and end == planned + 1):
        return True
    advice = f"scale it with scale_schedule(scheduler, planned={planned}, original=the steps it was made for)"
    if isinstance(scheduler, torch_schedules.ReduceLROnPlateau):
        says, advice = "counts calls with a metric", "step it where the metric is measured"
    elif end is None:
        says = "does not say how many steps it was made for"
    else:
        says = f"ends at step {end}"
    warnings.warn(
        f"{planned} optimizer updates are planned, but the {name} {says}: {advice}", ScheduleWarning, stacklevel=2
    )
    return False


def _spent(*_: Any) -> None:
    raise RuntimeError("this scheduler was scaled: step the one that scale_schedule returned")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _members(scheduler: LRScheduler) -> list[LRScheduler]:
    return list(scheduler._schedulers)  # type: ignore[attr-defined]


def _check_fresh(scheduler: LRScheduler) -> None:
    chained = isinstance(scheduler, torch_schedules.ChainedScheduler)
    for part in _members(scheduler) if chained else [scheduler]:
        if part.last_epoch != 0:
            raise ValueError(
                f"scale a {type(scheduler).__name__} before its first step, got one that was stepped {part.last_epoch} times"
            )


def _horizon(scheduler: LRScheduler, near: int = 0) -> int | None:
    """The step at which a scheduler of torch ends, None where it has no end of its own. `near`: of the ends of a scheduler
    that has many, the first from there on."""
    if type(scheduler) is torch_schedules.CosineAnnealingLR:
        return scheduler.T_max
    if type(scheduler) in (torch_schedules.LinearLR, torch_schedules.ConstantLR, torch_schedules.PolynomialLR):
        return scheduler.total_iters  # type: ignore[attr-defined]
    if type(scheduler) is torch_schedules.OneCycleLR:
        return scheduler.total_steps
    if type(scheduler) is torch_schedules.CosineAnnealingWarmRestarts:
        end = length = scheduler.T_0
        while end < near:
            length *= scheduler.T_mult
            end += length
        return end
    if type(scheduler) is torch_schedules.SequentialLR:
        start = scheduler._milestones[-1] if scheduler._milestones else 0
        last = _horizon(_members(scheduler)[-1], near=near - start)
        return None if last is None else start + last
    if type(scheduler) is torch_schedules.ChainedScheduler:
        ends = [_horizon(member, near=near) for member in _members(scheduler)]
        known = [end for end in ends if end is not None]
        return max(known) if len(known) == len(ends) else None
    return None


def _curve(scheduler: LRScheduler, original: int = 1) -> Curve:
    """The schedule as a function of a real step. Subclasses are refused: they may mean anything."""
    kind = type(scheduler)
    if kind is torch_schedules.SequentialLR:
        return _sequential(scheduler, original)
    if kind is torch_schedules.ChainedScheduler:
        return _chained(scheduler, original)
    bases = [float(base) for base in getattr(scheduler, "base_lrs", [])]
    if kind in _FACTORS:
        factors = _FACTORS[kind](scheduler, original)  # type: ignore[index]
        return lambda t: [Rate(base * factor(t)) for base, factor in zip(bases, factors, strict=True)]
    if kind in _CURVES:
        return _CURVES[kind](scheduler, bases)  # type: ignore[index]
    if kind is torch_schedules.ReduceLROnPlateau:
        raise ValueError(
            "a ReduceLROnPlateau follows a metric, not the number of updates: step it where the metric is measured, unscaled"
        )
    accepted = [one.__name__ for one in (*_FACTORS, *_CURVES)] + ["SequentialLR", "ChainedScheduler"]
    raise ValueError(
        f"cannot scale a {kind.__name__}: its formula is not known here; write it as a LambdaLR over a real step,"
        f" or make it for the planned updates. Known: {', '.join(accepted)}"
    )


def _sequential(scheduler: Any, original: int) -> Curve:
    milestones = list(scheduler._milestones)
    _refuse_nested(scheduler)
    for member in _members(scheduler)[1:]:
        if type(member) is torch_schedules.MultiplicativeLR:
            raise ValueError(
                "cannot scale a SequentialLR that goes on with a MultiplicativeLR, which starts from wherever the one before"
                " it ended: write it as an ExponentialLR or a LambdaLR"
            )
    curves = [_curve(member, original) for member in _members(scheduler)]

    def at(t: float) -> list[Rate]:
        part = bisect_right(milestones, t)
        return curves[part](t - (milestones[part - 1] if part else 0))

    return at


def _chained(scheduler: Any, original: int) -> Curve:
    """The product of the members' factors: what stepping one after the other comes to, if none of them sets the rate."""
    _refuse_nested(scheduler)
    members = _members(scheduler)
    chain = [_FACTORS.get(type(member), _falling)(member, original) for member in members]
    bases = [float(base) for base in members[0].base_lrs]
    return lambda t: [
        Rate(base * math.prod(factor(t) for factor in factors)) for base, *factors in zip(bases, *chain, strict=True)
    ]


def _falling(member: Any, original: int) -> list[Callable[[float], float]]:
    """A cosine that falls to zero is a factor, until it rises again."""
    if type(member) is torch_schedules.CosineAnnealingLR and member.eta_min == 0 and original <= member.T_max:
        return _alike(member, lambda t: _fall(1.0, 0.0, t / member.T_max))
    raise ValueError(
        f"cannot scale a ChainedScheduler with a {type(member).__name__}: only factors of the rate can be chained"
        f" ({', '.join(one.__name__ for one in _FACTORS)}; CosineAnnealingLR with eta_min=0 up to T_max);"
        " write the product as one LambdaLR"
    )


def _refuse_nested(scheduler: Any) -> None:
    for member in _members(scheduler):
        if hasattr(member, "_schedulers"):
            raise ValueError(
                f"cannot scale a {type(scheduler).__name__} that holds a {type(member).__name__}: flatten it"
            )


# Factors of the base rate, one function of the step for each parameter group.


def _alike(scheduler: Any, factor: Callable[[float], float]) -> list[Callable[[float], float]]:
    return [factor] * len(scheduler.base_lrs)


def _step(s: Any, _: int) -> list[Callable[[float], float]]:
    return _alike(s, lambda t: s.gamma ** (t // s.step_size))


def _multi_step(s: Any, _: int) -> list[Callable[[float], float]]:
    milestones = sorted(s.milestones.elements())
    return _alike(s, lambda t: s.gamma ** bisect_right(milestones, t))


def _constant(s: Any, _: int) -> list[Callable[[float], float]]:
    return _alike(s, lambda t: s.factor if t < s.total_iters else 1.0)


def _linear(s: Any, _: int) -> list[Callable[[float], float]]:
    def factor(t: float) -> float:
        done = min(t, s.total_iters) / s.total_iters
        return s.start_factor + (s.end_factor - s.start_factor) * done

    return _alike(s, factor)


def _exponential(s: Any, _: int) -> list[Callable[[float], float]]:
    return _alike(s, lambda t: s.gamma**t)


def _polynomial(s: Any, _: int) -> list[Callable[[float], float]]:
    return _alike(s, lambda t: (1.0 - min(t, s.total_iters) / s.total_iters) ** s.power)


def _multiplicative(s: Any, original: int) -> list[Callable[[float], float]]:
    constants = []
    for function in s.lr_lambdas:
        factors = {float(function(step)) for step in range(1, original + 1)}
        if len(factors) > 1 or min(factors) <= 0:
            raise ValueError(
                "cannot scale a MultiplicativeLR unless its factor is one positive constant, whose power between steps is"
                f" defined; got {len(factors)} values, the least {min(factors)}: write the product as a LambdaLR"
            )
        constants.append(factors.pop())
    return [lambda t, c=constant: c**t for constant in constants]


def _lambda(s: Any, _: int) -> list[Callable[[float], float]]:
    def called(function: Callable[[Any], float], t: float) -> float:
        try:
            return function(int(t) if t == int(t) else t)
        except (TypeError, IndexError, KeyError) as error:
            raise ValueError(
                f"cannot scale a LambdaLR whose function fails at step {t:g} ({type(error).__name__}: {error}):"
                " it must take fractions of a step"
            ) from error

    return [lambda t, f=function: called(f, t) for function in s.lr_lambdas]


# Curves that set the rate whatever it was.


def _cosine(s: Any, bases: list[float]) -> Curve:
    # eta_min + (base - eta_min) (1 + cos(pi t / T_max)) / 2
    return lambda t: [Rate(_fall(base, s.eta_min, t / s.T_max)) for base in bases]


def _warm_restarts(s: Any, bases: list[float]) -> Curve:
    def at(t: float) -> list[Rate]:
        length = s.T_0
        if s.T_mult == 1:
            t = t % length
        while t >= length:
            t -= length
            length *= s.T_mult
        return [Rate(_fall(base, s.eta_min, t / length)) for base in bases]

    return at


def _one_cycle(s: Any, _: list[float]) -> Curve:
    groups = [dict(group) for group in s.optimizer.param_groups]  # as they are now: initial_lr, max_lr, min_lr, momenta
    cosine = s._anneal_func_type == "cos"

    def between(start: float, end: float, done: float) -> float:
        return _fall(start, end, done) if cosine else start + (end - start) * done

    def at(t: float) -> list[Rate]:
        ends = [phase["end_step"] for phase in s._schedule_phases]
        t = min(t, ends[-1])
        part = next(i for i, end in enumerate(ends) if t <= end)
        phase, start, end = s._schedule_phases[part], ends[part - 1] if part else 0.0, ends[part]
        done = (t - start) / (end - start)
        return [
            Rate(
                between(group[phase["start_lr"]], group[phase["end_lr"]], done),
                between(group[phase["start_momentum"]], group[phase["end_momentum"]], done)
                if s.cycle_momentum
                else None,
            )
            for group in groups
        ]

    return at


def _cyclic(s: Any, _: list[float]) -> Curve:
    def at(t: float) -> list[Rate]:
        cycle = math.floor(1 + t / s.total_size)
        x = 1.0 + t / s.total_size - cycle
        height = x / s.step_ratio if x <= s.step_ratio else (x - 1) / (s.step_ratio - 1)
        height *= s.scale_fn(cycle if s.scale_mode == "cycle" else t)
        rates = [low + (high - low) * height for low, high in zip(s.base_lrs, s.max_lrs, strict=True)]
        if not s.cycle_momentum:
            return [Rate(rate) for rate in rates]
        momenta = [high - (high - low) * height for low, high in zip(s.base_momentums, s.max_momentums, strict=True)]
        return [Rate(rate, momentum) for rate, momentum in zip(rates, momenta, strict=True)]

    return at


def _fall(start: float, end: float, done: float) -> float:
    """Half a cosine from start at 0 to end at 1."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


_FACTORS: dict[type, Callable[[Any, int], list[Callable[[float], float]]]] = {
    torch_schedules.StepLR: _step,
    torch_schedules.MultiStepLR: _multi_step,
    torch_schedules.ConstantLR: _constant,
    torch_schedules.LinearLR: _linear,
    torch_schedules.ExponentialLR: _exponential,
    torch_schedules.PolynomialLR: _polynomial,
    torch_schedules.MultiplicativeLR: _multiplicative,
}
_CURVES: dict[type, Callable[[Any, list[float]], Curve]] = {
    torch_schedules.LambdaLR: lambda s, bases: _curve_of_factors(bases, _lambda(s, 0)),
    torch_schedules.CosineAnnealingLR: _cosine,
    torch_schedules.CosineAnnealingWarmRestarts: _warm_restarts,
    torch_schedules.OneCycleLR: _one_cycle,
    torch_schedules.CyclicLR: _cyclic,
}


def _curve_of_factors(bases: list[float], factors: list[Callable[[float], float]]) -> Curve:
    return lambda t: [Rate(base * factor(t)) for base, factor in zip(bases, factors, strict=True)]
