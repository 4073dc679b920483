"""Learning-rate schedules that count updates: every curve against a formula in NumPy and against PyTorch's own steps."""

import io
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs

from adaselect_kernels.checks import selected_count
from adaselect_kernels.policies import get_policy
from adaselect_kernels.training import SelectedBatches
from adaselect_kernels.training.schedules import ScheduleWarning, check_schedule, planned_updates, scale_schedule

BASE = np.array([0.4, 0.02])  # of the two parameter groups
ORIGINAL = 60


def sgd(momentum=0.9):
    parameters = [torch.zeros(1, requires_grad=True) for _ in BASE]
    groups = [{"params": [p], "lr": float(lr)} for p, lr in zip(parameters, BASE, strict=True)]
    return torch.optim.SGD(groups, lr=1.0, momentum=momentum)


def adam():
    return torch.optim.Adam([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in BASE.tolist()])


def fall(start, end, x):
    return (start + end) / 2 + (start - end) / 2 * np.cos(np.pi * x)


def warm_restarts(t):
    ends = np.cumsum([0, 8, 16, 32, 64])
    cycle = np.searchsorted(ends, t, side="right") - 1
    return fall(BASE, 0.001, (t - ends[cycle]) / (8 * 2**cycle))


def one_cycle(t, low, middle, last, start=0.25 * 60 - 1):
    t = min(t, 59)
    return fall(low, middle, t / start) if t <= start else fall(middle, last, (t - start) / (59 - start))


def three_phases(t):
    peak, first, second = 0.5, 0.3 * 60 - 1, 0.6 * 60 - 2
    x = np.interp(min(t, 59), [0, first, second, 59], [peak / 10, peak, peak / 10, peak / 10 / 100])
    return np.array([x, x])


def triangle(t, up=6, down=12):
    x = t % (up + down)
    return x / up if x <= up else (up + down - x) / down


def cyclic(t, scale):
    return 0.01 + (0.3 - 0.01) * triangle(t) * scale(math.floor(t / 18), t) * np.ones(2)


def warm_up_decay_and_cosine(t):
    if t < 10:
        return BASE * np.interp(t, [0, 10], [0.1, 1])
    return BASE * 0.9 ** (t - 10) if t < 25 else fall(BASE, 0, (t - 25) / 35)


# name: how it is made, its rate at a real step t; where the momentum is cycled too, that as a third
CASES = {
    "StepLR": (lambda o: lrs.StepLR(o, 13, gamma=0.3), lambda t: BASE * 0.3 ** math.floor(t / 13)),
    "MultiStepLR": (
        lambda o: lrs.MultiStepLR(o, [20, 45, 45], gamma=0.5),
        lambda t: BASE * 0.5 ** sum(t >= m for m in (20, 45, 45)),
    ),
    "ConstantLR": (lambda o: lrs.ConstantLR(o, 0.25, total_iters=17), lambda t: BASE * (0.25 if t < 17 else 1)),
    "LinearLR": (
        lambda o: lrs.LinearLR(o, 0.1, 0.7, total_iters=40),
        lambda t: BASE * np.interp(t, [0, 40], [0.1, 0.7]),
    ),
    "ExponentialLR": (lambda o: lrs.ExponentialLR(o, 0.93), lambda t: BASE * np.exp(t * np.log(0.93))),
    "PolynomialLR": (lambda o: lrs.PolynomialLR(o, 50, power=1.7), lambda t: BASE * max(1 - t / 50, 0) ** 1.7),
    "CosineAnnealingLR": (lambda o: lrs.CosineAnnealingLR(o, 60, eta_min=0.003), lambda t: fall(BASE, 0.003, t / 60)),
    "CosineAnnealingWarmRestarts": (
        lambda o: lrs.CosineAnnealingWarmRestarts(o, 8, T_mult=2, eta_min=0.001),
        warm_restarts,
    ),
    "warm restarts of one length": (
        lambda o: lrs.CosineAnnealingWarmRestarts(o, 7),
        lambda t: fall(BASE, 0, math.fmod(t, 7) / 7),
    ),
    "OneCycleLR": (
        lambda o: lrs.OneCycleLR(o, [0.8, 0.08], total_steps=60, pct_start=0.25, div_factor=20),
        lambda t: one_cycle(t, np.array([0.04, 0.004]), np.array([0.8, 0.08]), np.array([0.04, 0.004]) / 1e4),
        lambda t: one_cycle(t, 0.95, 0.85, 0.95),
    ),
    "OneCycleLR in three phases": (
        lambda o: lrs.OneCycleLR(
            o,
            0.5,
            total_steps=60,
            three_phase=True,
            anneal_strategy="linear",
            cycle_momentum=False,
            div_factor=10,
            final_div_factor=100,
        ),
        three_phases,
    ),
    "CyclicLR": (
        lambda o: lrs.CyclicLR(o, 0.01, 0.3, step_size_up=6, step_size_down=12, mode="triangular2"),
        lambda t: cyclic(t, lambda cycle, t: 0.5**cycle),
        lambda t: 0.9 - 0.1 * triangle(t) * 0.5 ** math.floor(t / 18),
    ),
    "CyclicLR over iterations": (
        lambda o: lrs.CyclicLR(o, 0.01, 0.3, 6, 12, mode="exp_range", gamma=0.97, cycle_momentum=False),
        lambda t: cyclic(t, lambda cycle, t: 0.97**t),
    ),
    "LambdaLR": (
        lambda o: lrs.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.9**t]),
        lambda t: BASE * np.array([1 / (1 + t), 0.9**t]),
    ),
    "MultiplicativeLR": (
        lambda o: lrs.MultiplicativeLR(o, [lambda t: 0.95, lambda t: 0.9]),
        lambda t: BASE * np.array([0.95, 0.9]) ** t,
    ),
    "SequentialLR": (
        lambda o: lrs.SequentialLR(
            o, [lrs.LinearLR(o, 0.1, 1.0, 10), lrs.ExponentialLR(o, 0.9), lrs.CosineAnnealingLR(o, 35)], [10, 25]
        ),
        warm_up_decay_and_cosine,
    ),
    "ChainedScheduler": (
        lambda o: lrs.ChainedScheduler(
            [lrs.ConstantLR(o, 0.1, total_iters=9), lrs.StepLR(o, 20, 0.5), lrs.CosineAnnealingLR(o, 60)]
        ),
        lambda t: BASE * (0.1 if t < 9 else 1) * 0.5 ** math.floor(t / 20) * fall(1, 0, t / 60),
    ),
}


def rates(optimizer):
    return np.array([float(group["lr"]) for group in optimizer.param_groups])


def momenta(optimizer):
    return np.array([group["betas"][0] if "betas" in group else group["momentum"] for group in optimizer.param_groups])


@pytest.mark.parametrize("name", CASES)
def test_the_formulas_are_pytorchs_own(name):
    make, rate, *momentum = CASES[name]
    optimizer = sgd()
    schedule = make(optimizer)
    for t in range(ORIGINAL):
        np.testing.assert_allclose(rates(optimizer), rate(t), rtol=1e-9, atol=1e-15, err_msg=f"step {t}")
        for m in momentum:
            np.testing.assert_allclose(momenta(optimizer), m(t), rtol=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("planned", [24, 60, 17, 133])
@pytest.mark.parametrize("name", CASES)
def test_at_update_u_it_is_the_original_at_u_times_original_over_planned(name, planned):
    make, rate, *momentum = CASES[name]
    optimizer = sgd()
    schedule = scale_schedule(make(optimizer), planned, ORIGINAL)
    for u in range(planned + 1):  # the last of them is the final value
        t = u * ORIGINAL / planned
        np.testing.assert_allclose(rates(optimizer), rate(t), rtol=1e-9, atol=1e-15, err_msg=f"update {u}")
        assert schedule.get_last_lr() == rates(optimizer).tolist()
        for m in momentum:
            np.testing.assert_allclose(momenta(optimizer), m(t), rtol=1e-12)
        if u < planned:
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("name", CASES)
def test_it_continues_from_a_state_and_gives_the_same_bits(name):
    def made():
        optimizer = sgd()
        return optimizer, scale_schedule(CASES[name][0](optimizer), 23, ORIGINAL)

    (optimizer, schedule), (other, resumed) = made(), made()
    for _ in range(9):
        optimizer.step()
        schedule.step()
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), schedule.state_dict()), file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert resumed.get_last_lr() == schedule.get_last_lr()
    for one, its in ((optimizer, schedule), (other, resumed)):
        for _ in range(5):
            one.step()
            its.step()
    assert (rates(optimizer) == rates(other)).all()
    assert (momenta(optimizer) == momenta(other)).all()


def test_a_state_of_another_schedule_is_refused_whole():
    def made(planned=20, original=60):
        return scale_schedule(lrs.StepLR(sgd(), 5), planned, original)

    good = made().state_dict()
    schedule = made()
    for bad, message in (
        (made(21).state_dict(), "planned 21, expected 20"),
        (made(20, 61).state_dict(), "original 61, expected 60"),
        (good | {"kind": "CosineAnnealingLR"}, "kind 'CosineAnnealingLR', expected 'StepLR'"),
        (good | {"updates": -1}, "updates must be an int >= 0, got -1"),
        (good | {"updates": True}, "got True"),
        ({}, "not a state of a ScaledSchedule"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule.load_state_dict(bad)
        assert schedule.state_dict() == good


def test_momentum_of_adam_is_its_beta1():
    optimizer = adam()
    schedule = scale_schedule(lrs.OneCycleLR(optimizer, 0.1, total_steps=60, pct_start=0.25), 30, 60)
    for u in range(1, 31):
        optimizer.step()
        schedule.step()
        np.testing.assert_allclose(momenta(optimizer), one_cycle(2 * u, 0.95, 0.85, 0.95), rtol=1e-12)
        assert all(group["betas"][1] == 0.999 for group in optimizer.param_groups)


def test_a_learning_rate_in_a_tensor_stays_one():
    parameter = torch.zeros(1, requires_grad=True)
    lr = torch.tensor(0.5)
    optimizer = torch.optim.SGD([parameter], lr=lr)
    schedule = scale_schedule(lrs.CosineAnnealingLR(optimizer, 10), planned=4, original=10)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(fall(0.5, 0, 0.25), rel=1e-6)


def test_the_end_that_a_schedule_has_serves_as_original():
    for make, end in (
        (lambda o: lrs.CosineAnnealingLR(o, 90), 90),
        (lambda o: lrs.OneCycleLR(o, 0.1, total_steps=80), 80),
        (lambda o: lrs.PolynomialLR(o, 70), 70),
        (lambda o: lrs.LinearLR(o, total_iters=50), 50),
        (lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o), lrs.CosineAnnealingLR(o, 95)], [5]), 100),
        (lambda o: lrs.ChainedScheduler([lrs.LinearLR(o, total_iters=5), lrs.PolynomialLR(o, 40)]), 40),
    ):
        assert scale_schedule(make(sgd()), 30).original == end


UNKNOWN = [
    (lambda o: lrs.ReduceLROnPlateau(o), "a ReduceLROnPlateau follows a metric.*step it where the metric is measured"),
    (lambda o: type("Mine", (lrs.StepLR,), {})(o, 5), "cannot scale a Mine: its formula is not known.*LambdaLR"),
    (lambda o: lrs.MultiplicativeLR(o, lambda t: 1 / t), "cannot scale a MultiplicativeLR.*60 values.*LambdaLR"),
    (lambda o: lrs.MultiplicativeLR(o, lambda t: -1.0), "cannot scale a MultiplicativeLR.*the least -1.0"),
    (lambda o: lrs.LambdaLR(o, lambda t: ([1.0] * 61)[t]),
     r"cannot scale a LambdaLR whose function fails at step 3.52941 \(TypeError.*fractions of a step"),
    (lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 5), lrs.CosineAnnealingLR(o, 60, eta_min=0.1)]),
     "cannot scale a ChainedScheduler with a CosineAnnealingLR.*LambdaLR"),
    (lambda o: lrs.ChainedScheduler([lrs.CosineAnnealingLR(o, 50)]), "up to T_max"),
    (lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 5), lrs.LambdaLR(o, lambda t: 1.0)]), "with a LambdaLR"),
    (lambda o: lrs.SequentialLR(o, [lrs.StepLR(o, 5), lrs.MultiplicativeLR(o, lambda t: 0.5)], [5]),
     "goes on with a MultiplicativeLR"),
    (lambda o: lrs.SequentialLR(o, [lrs.SequentialLR(o, [lrs.StepLR(o, 5), lrs.StepLR(o, 6)], [5]), lrs.StepLR(o, 5)], [30]),
     "a SequentialLR that holds a SequentialLR: flatten it"),
    (lambda o: lrs.SequentialLR(o, [lrs.StepLR(o, 5), type("Mine", (lrs.StepLR,), {})(o, 5)], [5]), "cannot scale a Mine"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), UNKNOWN)
def test_what_cannot_be_scaled_is_refused_by_name_and_untouched(make, message):
    optimizer = sgd()
    schedule = make(optimizer)
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        scale_schedule(schedule, 17, 60)
    assert [dict(group) for group in optimizer.param_groups] == before
    assert "step" not in vars(schedule)


def test_wrong_arguments():
    def step():
        return lrs.StepLR(sgd(), 5)

    with pytest.raises(TypeError, match=r"scheduler must be one of torch\.optim\.lr_scheduler, got SGD"):
        scale_schedule(sgd(), 5, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"planned must be an int, got 5\.0"):
        scale_schedule(step(), 5.0, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="planned must be at least 1, got 0"):
        scale_schedule(step(), 0, 5)
    with pytest.raises(ValueError, match="original must be at least 1, got -3"):
        scale_schedule(step(), 5, -3)
    with pytest.raises(ValueError, match="StepLR does not say how many steps it was made for: give original="):
        scale_schedule(step(), 5)
    with pytest.raises(ValueError, match="cannot scale a ScaledSchedule"):
        scale_schedule(scale_schedule(step(), 5, 5), 5, 5)


@pytest.mark.parametrize("name", ["StepLR", "SequentialLR", "ChainedScheduler"])
def test_only_before_the_first_step(name):
    optimizer = sgd()
    schedule = CASES[name][0](optimizer)
    optimizer.step()
    schedule.step()
    with pytest.raises(ValueError, match=f"scale a {name} before its first step, got one that was stepped 1 times"):
        scale_schedule(schedule, 20, 60)


def test_the_scheduler_given_is_spent():
    optimizer = sgd()
    schedule = lrs.StepLR(optimizer, 5)
    scale_schedule(schedule, 20, 60)
    with pytest.raises(RuntimeError, match="step the one that scale_schedule returned"):
        schedule.step()


def test_a_step_past_the_end_warns_once():
    optimizer = sgd()
    schedule = scale_schedule(lrs.CosineAnnealingLR(optimizer, 10), 3)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            schedule.step()
    with pytest.warns(ScheduleWarning, match="update 4 of a schedule scaled to 3 updates") as caught:
        [schedule.step() for _ in range(2)]
    assert len(caught) == 1


FITTING = [
    lambda o: lrs.CosineAnnealingLR(o, 40),
    lambda o: lrs.LinearLR(o, total_iters=40),
    lambda o: lrs.PolynomialLR(o, 40),
    lambda o: lrs.OneCycleLR(o, 0.1, total_steps=40),
    lambda o: lrs.OneCycleLR(o, 0.1, total_steps=41),
    lambda o: lrs.CosineAnnealingWarmRestarts(o, 10),
    lambda o: lrs.CosineAnnealingWarmRestarts(o, 40),
    lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o), lrs.CosineAnnealingWarmRestarts(o, 5, T_mult=2)], [5]),
    lambda o: lrs.ChainedScheduler([lrs.LinearLR(o), lrs.PolynomialLR(o, 40)]),
    lambda o: scale_schedule(lrs.StepLR(o, 10), 40, 100),
]


@pytest.mark.parametrize("make", FITTING)
def test_a_schedule_that_ends_with_the_updates_does_not_warn(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_schedule(make(sgd()), 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda o: lrs.CosineAnnealingLR(o, 100), "40 optimizer updates are planned, but the CosineAnnealingLR ends at step 100"),
        (lambda o: lrs.OneCycleLR(o, 0.1, total_steps=42), "the OneCycleLR ends at step 42"),
        (lambda o: lrs.CosineAnnealingLR(o, 41), "ends at step 41"),
        (lambda o: lrs.LinearLR(o), "the LinearLR ends at step 5: scale it with scale_schedule"),
        (lambda o: lrs.CosineAnnealingWarmRestarts(o, 15), "ends at step 45"),
        (lambda o: lrs.StepLR(o, 10), r"the StepLR does not say how many steps it was made for: .*planned=40, original="),
        (lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 4), lrs.PolynomialLR(o, 40)]), "ChainedScheduler does not say"),
        (lambda o: lrs.ReduceLROnPlateau(o), "the ReduceLROnPlateau counts calls with a metric: step it where"),
        (lambda o: scale_schedule(lrs.StepLR(o, 10), 30, 100), "the scaled StepLR ends at step 30"),
    ],
)  # fmt: skip
def test_forgetting_to_scale_warns(make, message):
    with pytest.warns(ScheduleWarning, match=message):
        assert not check_schedule(make(sgd()), 40)


@pytest.mark.parametrize("drop_last", [False, True])
def test_planned_updates_are_those_that_are_made(drop_last):
    generator = np.random.default_rng()
    for _ in range(12):
        rows, candidate, size = (int(n) for n in generator.integers(1, [90, 20, 25], endpoint=True))
        gamma, epochs = float(generator.uniform(0.01, 1)), int(generator.integers(1, 5))
        candidate = min(candidate, rows)
        loader = torch.utils.data.DataLoader(torch.rand(rows), batch_size=candidate, drop_last=drop_last)  # type: ignore[arg-type]
        policy = get_policy("big_loss", gamma, impl="reference")
        batches = SelectedBatches(loader, nn.Identity(), policy, size, forward=lambda model, batch: batch)
        made = sum(1 for _ in range(epochs) for _ in batches)
        assert planned_updates(rows, candidate, gamma, size, epochs, drop_last=drop_last) == made


def test_planned_updates_in_figures():
    assert selected_count(0.3, 128) == 38
    assert planned_updates(50_000, 128, 0.3, 128, 10) == 10 * (390 * 38 + 24) // 128
    assert planned_updates(50_000, 128, 0.3, 128, 10, drop_last=True) == 10 * 390 * 38 // 128
    with pytest.raises(ValueError, match="drop_last leaves no candidate batch: 5 rows in batches of 8"):
        planned_updates(5, 8, 0.5, 1, 1, drop_last=True)
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\]"):
        planned_updates(5, 2, 1.5, 1, 1)
    for place, name in enumerate(("rows", "candidate_batch", None, "batch_size", "epochs")):
        if name is not None:
            numbers = [10, 2, 0.5, 2, 1]
            numbers[place] = 0
            with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
                planned_updates(*numbers)  # type: ignore[arg-type]
            numbers[place] = 2.5
            with pytest.raises(TypeError, match=f"{name} must be an int, got 2.5"):
                planned_updates(*numbers)  # type: ignore[arg-type]
