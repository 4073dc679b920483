"""The planner: its arithmetic on given seconds and on a clock that is made up, and that it leaves no trace."""

import copy
import io
import json
import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaselect_kernels.models import make_slimmable
from adaselect_kernels.policies import get_policy
from adaselect_kernels.samplers import get_sampler
from adaselect_kernels.training import get_scorer, planner, scorers
from adaselect_kernels.training.planner import Plan, PlanWarning, plan

pytestmark = pytest.mark.usefixtures("one_thread")


def given(**changes):
    """Seconds that a machine might give."""
    seconds = {"forward": 2.0, "backward": 3.0, "update": 1.0, "scoring": 1.5, "selection": 0.25}
    return Plan(rows=128, gamma=0.3, policy="big_loss", scorer="forward", **(seconds | changes))


def test_the_arithmetic_of_given_seconds():
    made = given()
    assert made.share == 0.75
    assert made.formula_ratio == pytest.approx((0.75 + 3 * 0.3) / 3)
    assert made.time_ratio == pytest.approx((1.5 + 0.25 + 0.3 * 6) / 6)
    assert made.break_even == pytest.approx((6 - 1.75) / 6)
    assert made.psp is None
    assert made.warnings == ()


@pytest.mark.parametrize("seed", range(3))
def test_the_arithmetic_of_any_seconds(seed):
    f, b, u, score, select, draw, rho = np.random.default_rng().uniform(0.1, 3, 7)
    every = seed + 1
    made = given(
        forward=f, backward=b, update=u, scoring=score, selection=select, draw=draw, epochs_per_score=every, rho=rho
    )
    formula = [(score / f / every + 3 * g * (1 + rho)) / 3 for g in (0.1, 0.3, 1)]
    measured = [((score + select) / every + g * ((f + b) * (1 + rho) + u + draw)) / (f + b + u) for g in (0.1, 0.3, 1)]
    np.testing.assert_allclose([made.formula(g) for g in (0.1, 0.3, 1)], formula, rtol=1e-12)
    np.testing.assert_allclose([made.measured(g) for g in (0.1, 0.3, 1)], measured, rtol=1e-12)
    assert (made.psp.left, made.psp.right) == pytest.approx((every * 0.3, (1 - rho) / (3 * rho)))
    if made.break_even is None:
        assert (score + select) / every >= f + b + u
    else:
        assert made.measured(made.break_even) == pytest.approx(1)
        assert made.measured(made.break_even * 0.99) < 1


def test_break_even_where_scoring_alone_costs_everything():
    made = given(scoring=6.0, selection=0.0)
    assert made.break_even is None
    assert "no gamma saves time" in made.warnings[0]
    assert "alone cost 1.00 of training on everything" in made.warnings[0]
    assert given(scoring=5.9, selection=0.0).break_even == pytest.approx(0.1 / 6)


def test_a_gamma_above_the_break_even_is_named():
    made = given(forward=1.0, backward=0.5, update=0.5, scoring=1.5)
    assert made.break_even == pytest.approx(0.125)
    assert made.warnings == (
        "gamma = 0.3 saves no time: 1.18 of training on everything is predicted, and the break-even is gamma = 0.12",
    )


def test_psp_is_an_inequality():
    saves = given(epochs_per_score=2, rho=0.25)  # 0.6 < 1
    fails = given(epochs_per_score=5, rho=0.25)  # 1.5 < 1
    assert saves.psp == (0.6, 1.0)
    assert saves.psp.saves
    assert not saves.warnings
    assert not fails.psp.saves
    assert "Q * keep = 1.5 is not below (1 - rho) / (3 rho) = 1" in fails.warnings[0]
    assert not given(epochs_per_score=10, rho=0.25, scoring=0.0).psp._replace(left=1.0).saves  # equality saves nothing


def test_the_table_has_the_numbers():
    text = given(epochs_per_score=5, rho=0.25, sampler="dynams", draw=0.5).table()
    for part in (
        "Plan: sampler 'dynams', policy 'big_loss', scorer 'forward', gamma 0.3, scored every 5 epochs, 128 rows on cpu",
        "forward, training mode  2000.000       1.000",
        "backward                3000.000       1.500",
        "scoring                 1500.000       0.750   the share s",
        "drawing                  500.000       0.250",
        "cost model, (s/Q + 3 gamma (1+rho)) / 3      0.425",
        "with the measured terms                      0.446",
        "PSP: Q keep = 1.5 < (1 - rho) / (3 rho) = 1 does not hold",
        "WARNING: the slim proxy costs more",
    ):
        assert part in text
    assert "break-even gamma                              none" in given(scoring=9.0).table()
    assert "not measured: no optimizer given" in given(update=0.0).table()
    assert "PSP" not in given().table()


def test_as_dict_is_json():
    made = given(epochs_per_score=5, rho=0.25)
    read = json.loads(json.dumps(made.as_dict(), allow_nan=False))
    assert read["time_ratio"] == made.time_ratio
    assert read["break_even"] == made.break_even
    assert read["psp"] == {"left": 1.5, "right": 1.0, "saves": False}
    assert read["warnings"] == list(made.warnings)
    assert read["scoring"] == 1.5


@pytest.mark.parametrize("made", [given(), given(scoring=9.0), given(rho=1.0)])
@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_the_figure(tmp_path, made, name):
    made.figure(tmp_path / name)
    assert (tmp_path / name).read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    if name == "plan.svg":
        assert "gamma = 0.3" in (tmp_path / name).read_text()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def network():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4))


def pair(rows=32):
    return torch.randn(rows, 6), torch.randint(4, (rows,))


class Clock:
    """perf_counter that is moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(scorers.time, "perf_counter", lambda: self.now)


def test_what_is_timed_is_what_it_is_called(monkeypatch):
    """Every part moves a clock by an amount of its own; the medians must find them, outliers or not."""
    clock = Clock(monkeypatch)
    turns = {"forward": 0, "score": 0}

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[override]
            clock.now += 3.0
            return gradient

    def loss(model, batch):
        turns["forward"] += 1
        clock.now += 100.0 if turns["forward"] % 4 == 0 else 2.0
        return Slow.apply(F.cross_entropy(model(batch[0]), batch[1], reduction="none"))

    def score(model, batch):
        turns["score"] += 1
        assert not torch.is_grad_enabled()
        assert not model.training
        clock.now += 0.75
        return model(batch[0]), batch[1]

    class SlowSGD(torch.optim.SGD):
        def step(self, closure=None):
            clock.now += 0.5
            return super().step(closure)

    model = network()
    take = planner.take_rows

    def slow_take(batch, indices):
        clock.now += 0.125
        assert len(indices) == 8
        return take(batch, indices)

    monkeypatch.setattr(planner, "take_rows", slow_take)
    optimizer = SlowSGD(model.parameters(), lr=0.1)
    made = plan(model, pair(), 0.25, score, policy="big_loss", loss=loss, optimizer=optimizer, repeats=5)
    assert (made.forward, made.backward, made.update) == pytest.approx((2.0, 3.0, 0.5))
    assert (made.scoring, made.selection, made.draw) == pytest.approx((0.75, 0.125, 0.0))
    assert turns == {"forward": 7, "score": 7}  # two turns before
    assert (made.rows, made.gamma, made.policy, made.scorer, made.sampler) == (32, 0.25, "big_loss", "forward", None)
    assert made.repeats == 5
    assert made.time_ratio == pytest.approx((0.875 + 0.25 * 5.5) / 5.5)


def test_a_sampler_is_timed_by_its_draws_and_nothing_is_scored(monkeypatch):
    clock = Clock(monkeypatch)
    sampler = get_sampler("impon", 200, 8, bank=20, features=torch.rand(200, 3), normalized=True)
    kind = type(sampler)
    draw, learn = kind._draw, kind._learn

    def slow_draw(self):
        clock.now += 1.0
        return draw(self)

    def slow_learn(self, *arguments):
        clock.now += 0.5
        return learn(self, *arguments)

    monkeypatch.setattr(kind, "_draw", slow_draw)
    monkeypatch.setattr(kind, "_learn", slow_learn)

    def loss(model, batch):
        clock.now += 10.0
        return F.cross_entropy(model(batch[0]), batch[1])

    made = plan(network(), pair(32), 0.4, sampler=sampler, loss=loss, repeats=3)
    assert made.draw == pytest.approx(1.5 * 32 / 8)
    assert (made.scoring, made.selection, made.share) == (0, 0, 0)
    assert (made.policy, made.scorer, made.sampler) == (None, None, "impon")
    assert made.formula_ratio == pytest.approx(0.4)
    assert made.time_ratio == pytest.approx(0.4 * 16 / 10)


@pytest.mark.parametrize("name", ["uniform", "rs2", "p_sgd", "c_sgd", "infobatch", "dynams"])
def test_every_sampler_can_be_planned(name):
    settings = {"rs2": {"gamma": 0.5}, "infobatch": {"epochs": 3}, "dynams": {"epochs": 4, "period": 2, "budget": 0.75}}
    sampler = get_sampler(name, 40, 16, **settings.get(name, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)
        made = plan(network(), pair(), 0.5, sampler=sampler, repeats=1)
    assert made.draw > 0
    assert (made.scorer, made.epochs_per_score) == (("forward", 2) if name == "dynams" else (None, 1))


def test_the_slim_scorer_brings_rho():
    slim = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    model = make_slimmable(slim, (1.0, 0.5))
    batch = torch.randn(8, 3, 6, 6), torch.randint(4, (8,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)
        made = plan(model, batch, 0.5, get_scorer("slim"), repeats=1)
        other = plan(model, batch, 0.5, get_scorer("slim"), rho=0.2, epochs_per_score=3, repeats=1)
    assert made.scorer == "slim"
    assert made.rho == made.share
    assert other.psp == (1.5, (1 - 0.2) / (3 * 0.2))


def everything(model, optimizer, policy, sampler):
    """All bits that a plan must leave as they are."""
    file = io.BytesIO()
    streams = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    torch.save(
        (
            model.state_dict(),
            [None if p.grad is None else p.grad for p in model.parameters()],
            [module.training for module in model.modules()],
            optimizer.state_dict(),
            policy.state_dict(),
            sampler.state_dict(),
            streams,
        ),
        file,
    )
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::adaselect_kernels.training.planner.PlanWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_plan_leaves_no_trace(kind, training):
    model = network()
    model[1].eval()  # frozen
    optimizer = kind(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    policy = get_policy("adaselection", 0.5)
    sampler = get_sampler("impon", 100, 8, bank=20, features=lambda rows: torch.rand(len(rows), 3), normalized=True)
    for _ in range(2):
        inputs, targets = pair()
        policy.select(model(inputs), targets)
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()
    batches = iter(sampler)
    next(batches)
    sampler.observe(torch.rand(8))
    if not training:
        model.eval()
    versions = [p._version for p in model.parameters()]
    before = everything(model, optimizer, policy, sampler)
    batch = pair()
    copies = copy.deepcopy(batch)
    torch.set_rng_state(torch.load(io.BytesIO(before), weights_only=False)[-1][0])
    plan(model, batch, 0.5, policy=policy, optimizer=optimizer, repeats=2)
    plan(model, batch, 0.5, sampler=sampler, optimizer=optimizer, repeats=2)
    assert everything(model, optimizer, policy, sampler) == before
    assert [p._version for p in model.parameters()] == versions
    assert all(torch.equal(a, b) for a, b in zip(batch, copies, strict=True))
    next(batches)  # the iteration under way goes on


def test_it_warns_at_the_caller(monkeypatch):
    clock = Clock(monkeypatch)

    def score(model, batch):
        clock.now += 1.0
        return torch.rand(len(batch[0]))

    def loss(model, batch):
        clock.now += 0.5
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.warns(PlanWarning, match="no gamma saves time") as caught:
        plan(network(), pair(), 0.5, score, loss=loss, repeats=1)
    assert caught[0].filename == __file__


def test_batches_and_losses_of_other_kinds():
    model = nn.Linear(3, 1)

    def losses(model, batch):
        return (model(batch["x"]).squeeze(1) - batch["y"]).square()

    batch = {"x": torch.randn(10, 3), "y": torch.randn(10), "names": list("abcdefghij")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)
        made = plan(model, batch, 0.5, losses, policy="big_loss", loss=losses, repeats=1)
    assert made.rows == 10
    assert math.isfinite(made.time_ratio)


def lbfgs(model):
    return torch.optim.LBFGS(model.parameters())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"gamma": 0.0}, ValueError, r"gamma must be in \(0, 1\]"),
        ({"gamma": 1.5}, ValueError, r"gamma must be in \(0, 1\]"),
        ({"policy": get_policy("big_loss", 0.4)}, ValueError, r"the policy has gamma = 0\.4, the plan is for 0\.5"),
        ({"policy": "best_loss"}, ValueError, "name must be one of"),
        ({"policy": "big_loss", "sampler": get_sampler("uniform", 9, 3)}, ValueError, "give one of them"),
        ({"repeats": 0}, ValueError, "repeats must be an int of at least 1, got 0"),
        ({"repeats": True}, ValueError, "repeats must be an int of at least 1, got True"),
        ({"epochs_per_score": 0}, ValueError, "epochs_per_score must be an int of at least 1, got 0"),
        ({"epochs_per_score": 1.5}, ValueError, "epochs_per_score must be an int"),
        ({"rho": 0.0}, ValueError, r"rho must be a number above 0, got 0\.0"),
        ({"rho": math.inf}, ValueError, "rho must be a number above 0, got inf"),
        ({"batch": torch.randn(4, 6)}, TypeError, "batch must be a pair"),
        ({"batch": (torch.randn(4, 6), torch.zeros(3).long())}, ValueError, "has 4 rows"),
        ({"optimizer": lbfgs}, ValueError, "cannot time the step of LBFGS"),
    ],
)  # fmt: skip
def test_wrong_arguments(settings, error, message):
    model = network()
    arguments = {"batch": pair(), "gamma": 0.5, "repeats": 1} | settings
    if "optimizer" in arguments:
        arguments["optimizer"] = arguments["optimizer"](model)
    with pytest.raises(error, match=message):
        plan(model, arguments.pop("batch"), arguments.pop("gamma"), **arguments)


def test_a_model_without_parameters_has_no_training():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        plan(nn.Flatten(), pair(), 0.5)
