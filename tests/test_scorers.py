"""Scorers: what each gives, what it costs, what it remembers, and any policy choosing by any of them."""

import io
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaselect_kernels.functional import SampleStats
from adaselect_kernels.models import SlimmableConv2d, SlimmableLinear, use_width
from adaselect_kernels.policies import get_policy
from adaselect_kernels.training import SelectedBatches, get_scorer
from adaselect_kernels.training.scorers import SCORERS, Scorer, median_seconds

pytestmark = pytest.mark.usefixtures("one_thread")


class Linear:
    """Predicts twice the row number."""

    def predict(self, rows):
        return 2.0 * rows


def image_model():
    torch.manual_seed(1)
    return nn.Sequential(
        SlimmableConv2d(1, 4, 3, padding=1, slim_in=False),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        SlimmableLinear(4, 3, slim_out=False),
    )


def numbered_pair(model, batch):
    return model(batch[0]), batch[1]


SETTINGS = {
    "forward": lambda: {"forward": numbered_pair},
    "low_resolution": lambda: {"scale": 0.5, "forward": numbered_pair},
    "stale": lambda: {"rows": 2, "size": 40, "forward": numbered_pair},
    "linear": lambda: {"sampler": Linear(), "rows": 2, "forward": numbered_pair},
    "slim": lambda: {"forward": numbered_pair},
    "reference": lambda: {"reference": image_model(), "forward": numbered_pair},
}


def images(rows=16, side=8):
    return torch.randn(rows, 1, side, side), torch.randint(3, (rows,)), torch.arange(rows)


def test_every_scorer_is_here():
    assert set(SETTINGS) == set(SCORERS)


@pytest.mark.parametrize("policy", ["adaselection", "big_loss", "selective_backprop"])
@pytest.mark.parametrize("name", SETTINGS)
def test_any_policy_chooses_by_any_scorer(name, policy):
    model, scorer = image_model(), get_scorer(name, **SETTINGS[name]())
    batches = SelectedBatches([images()] * 2, model, get_policy(policy, 0.5), 8, forward=scorer)
    rows = [batch[2].tolist() for batch in batches]
    assert len(rows) == 2
    assert all(len(set(batch)) == 8 for batch in rows)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_cost_is_a_share_and_leaves_no_trace(name):
    model, batch, scorer = image_model(), images(), get_scorer(name, **SETTINGS[name]())
    if name != "slim":
        model.insert(1, nn.BatchNorm2d(4))
    for training in (True, False):
        model.train(training)
        before, stream = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        share = scorer.cost(model, batch, repeats=1)
        assert 0 < share < math.inf  # of one repeat, on a machine that may be busy
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), stream)
        assert all(module.training == training for module in model.modules())
        assert all(p.grad is None for p in model.parameters())


class Clock:
    """Stands for the clock of the machine, so that a busy one cannot fail a test."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


class Takes(nn.Module):
    """A forward that takes a known time, by the width of the images, and notes how it was run."""

    def __init__(self, clock):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.clock, self.runs = clock, []

    def forward(self, inputs):
        self.runs.append((self.training, torch.is_grad_enabled()))
        self.clock.now += inputs.shape[-1]
        return inputs.flatten(1) * self.weight


def test_the_cost_is_measured_over_a_training_forward_with_gradients(monkeypatch):
    clock = Clock(monkeypatch)
    model, batch = Takes(clock), (torch.randn(4, 1, 2, 8), torch.zeros(4, dtype=torch.int64))
    assert get_scorer("low_resolution", scale=0.5).cost(model, batch) == 0.5
    assert model.runs == [(False, False), (True, True)] * 7
    assert get_scorer("reference", reference=Takes(clock)).cost(model, batch, repeats=3) == 2.0


def test_times_are_medians_taken_in_turns(monkeypatch):
    clock, calls, taken = Clock(monkeypatch), [], iter([50.0, 60.0, 1.0, 90.0, 3.0])

    def first():
        calls.append("a")
        clock.now += next(taken)

    assert median_seconds(first, lambda: calls.append("b"), repeats=3) == (3.0, 0.0)
    assert calls == ["a", "b"] * 5
    for repeats in (0, 1.5, True):
        with pytest.raises(ValueError, match="repeats must be"):
            median_seconds(first, repeats=repeats)


class TestForward:
    def test_mode_and_autocast_are_the_scorers(self):
        model, batch = image_model(), images()
        eager = get_scorer("forward", forward=numbered_pair, mode="eval").score(model, batch)
        with torch.no_grad():
            assert torch.equal(eager[0], model.eval()(batch[0]))
        model.train()
        torch.manual_seed(3)
        dropped = get_scorer("forward", forward=numbered_pair, mode="train").score(model, batch)[0]
        torch.manual_seed(3)
        assert torch.equal(dropped, model(batch[0]).detach())
        assert not torch.equal(dropped, eager[0])
        assert get_scorer("forward", forward=numbered_pair, autocast=torch.bfloat16).score(model, batch)[0].dtype == (
            torch.bfloat16
        )

    def test_selected_batches_take_them_over(self):
        seen = []

        def forward(model, batch):
            seen.append((model.training, torch.is_autocast_enabled("cpu")))
            return torch.rand(6)

        for settings in ({}, {"mode": "train"}, {"autocast": torch.bfloat16}):
            scorer = get_scorer("forward", forward=forward, **settings)
            batches = SelectedBatches([torch.rand(6)], nn.Dropout(), get_policy("big_loss", 0.5), 3, forward=scorer)
            list(batches)
            assert (batches.mode, batches.autocast) == (scorer.mode, scorer.autocast)
        assert seen == [(False, False), (True, False), (False, True)]
        for more in ({"mode": "eval"}, {"autocast": torch.bfloat16}):
            with pytest.raises(ValueError, match="beside a scorer"):
                SelectedBatches([], nn.Dropout(), get_policy("big_loss", 0.5), 3, forward=scorer, **more)

    def test_it_compiles_once_for_each_model(self, monkeypatch):
        compiled = []

        def fake(model):
            compiled.append(model)
            return lambda inputs: model(inputs) + 1

        monkeypatch.setattr(torch, "compile", fake)
        scorer = get_scorer("forward", compile=True, forward=numbered_pair)
        models, batch = [image_model(), image_model()], images()
        for model in (*models, *models):
            plain = get_scorer("forward", forward=numbered_pair).score(model, batch)[0]
            assert torch.equal(scorer.score(model, batch)[0], plain + 1)
        assert compiled == models

    def test_a_compiled_forward_gives_the_same(self, monkeypatch):
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="aot_eager"))
        model, batch = (
            nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout()),
            (torch.randn(8, 4), torch.arange(8)),
        )
        plain, fast = (get_scorer("forward", compile=c).score(model, batch)[0] for c in (False, True))
        torch.testing.assert_close(fast, plain)
        assert model.training
        assert model[1].num_batches_tracked == 0


class TestLowResolution:
    @pytest.mark.parametrize(("scale", "size"), [(0.5, (4, 3)), (0.3, (2, 2)), (0.01, (1, 1)), (1.0, (8, 6))])
    @pytest.mark.parametrize("interpolation", ["area", "bilinear"])
    def test_the_model_sees_small_images(self, scale, size, interpolation):
        seen = []

        def forward(model, batch):
            return model(batch["image"], 7), batch["label"]

        class Model(nn.Module):
            def forward(self, images, number):
                seen.append(images)
                assert number == 7
                return images.flatten(1)

        batch = {"image": torch.rand(5, 2, 8, 6), "label": torch.zeros(5, dtype=torch.int64)}
        before = batch["image"].clone()
        get_scorer("low_resolution", scale=scale, interpolation=interpolation, forward=forward).score(Model(), batch)
        (small,) = seen
        assert small.shape == (5, 2, *size)
        assert torch.equal(batch["image"], before)
        if interpolation == "area" and scale == 0.5:
            torch.testing.assert_close(small, F.avg_pool2d(before, 2))
        assert not torch.equal(small, before) or scale == 1.0
        torch.testing.assert_close(small.mean(), before.mean(), rtol=0.2, atol=0)

    def test_what_is_no_image_is_refused(self):
        for inputs, match in (
            (torch.rand(4, 3), r"got torch.float32 \(4, 3\)"),
            (torch.ones(2, 1, 4, 4).int(), "int32"),
        ):
            with pytest.raises(ValueError, match=match):
                get_scorer("low_resolution", scale=0.5).score(nn.Flatten(), (inputs, inputs))


class TestSlim:
    def test_it_is_the_model_at_that_width(self):
        model, batch = image_model(), images()
        model.eval()
        with torch.no_grad(), use_width(model, 0.25):
            expected = model(batch[0])
        for width in (None, 0.25):
            got = get_scorer("slim", width=width, forward=numbered_pair).score(model, batch)[0]
            assert torch.equal(got, expected)
        assert not torch.equal(get_scorer("slim", width=1, forward=numbered_pair).score(model, batch)[0], expected)
        assert model[0].width == 1.0

    def test_a_model_or_width_that_is_not_slim_is_named(self):
        with pytest.raises(ValueError, match="Linear has no slimmable layer"):
            get_scorer("slim").score(nn.Linear(2, 2), (torch.rand(3, 2), torch.arange(3)))
        with pytest.raises(ValueError, match="width must be one of"):
            get_scorer("slim", width=0.5, forward=numbered_pair).score(image_model(), images())


class TestReference:
    @pytest.mark.parametrize("form", ["pair", "losses", "stats"])
    def test_it_is_the_difference_of_the_losses(self, form):
        model, reference = image_model(), image_model()
        with torch.no_grad():
            reference[0].weight.mul_(3.0)
        inputs, targets, _ = images()
        targets[2] = 1

        def forward(model, batch):
            logits = model(batch[0])
            losses = F.cross_entropy(logits, batch[1], reduction="none", ignore_index=1, label_smoothing=0.1)
            return {"pair": (logits, batch[1]), "losses": losses, "stats": SampleStats(loss=losses)}[form]

        scorer = get_scorer("reference", reference=reference, forward=forward, ignore_index=1, label_smoothing=0.1)
        got = scorer.score(model, (inputs, targets))
        model.eval(), reference.eval()
        with torch.no_grad():
            losses = [
                F.cross_entropy(m(inputs), targets, reduction="none", ignore_index=1, label_smoothing=0.1)
                for m in (model, reference)
            ]
        expected = losses[0] - losses[1]
        if form == "pair":
            expected[targets == 1] = math.nan
        torch.testing.assert_close(got, expected, equal_nan=True)

    def test_it_ranks_as_the_policy_does(self):
        model, reference, batch = image_model(), image_model().eval(), images()
        with torch.no_grad():
            reference[0].weight.mul_(-2.0)
        scorer = get_scorer("reference", reference=reference, forward=numbered_pair)
        one = SelectedBatches([batch], model, get_policy("big_loss", 0.5), 8, forward=scorer)
        two = SelectedBatches(
            [batch], model, get_policy("rho_loss", 0.5, reference=reference), 8, forward=numbered_pair
        )
        assert [b[2].tolist() for b in one] == [b[2].tolist() for b in two]

    def test_the_mode_of_the_reference_is_as_before(self):
        reference = image_model()
        scorer = get_scorer("reference", reference=reference, forward=numbered_pair)
        batch = images()
        assert torch.equal(scorer.score(image_model(), batch), scorer.score(image_model(), batch))  # no dropout in it
        assert reference.training


def last_seen(updates, rows):
    """The rule in plain Python."""
    table, largest = {}, None
    for numbers, losses in updates:
        for row, loss in zip(numbers, losses, strict=True):
            table[row] = loss
            if math.isfinite(loss):
                largest = loss if largest is None else max(largest, loss)
    return [table.get(row, 0.0 if largest is None else largest) for row in rows]


class TestStale:
    def make(self, size=30, rows=lambda batch: batch):
        return get_scorer("stale", rows=rows, size=size)

    def test_it_is_the_last_loss_and_the_largest_for_rows_not_seen(self, generator):
        scorer, updates, model = self.make(), [], nn.Identity()
        for _ in range(20):
            asked = torch.randint(30, (12,), generator=generator)
            np.testing.assert_array_equal(scorer.score(model, asked), np.float32(last_seen(updates, asked.tolist())))
            rows = torch.randint(30, (5,), generator=generator)  # some twice
            losses = torch.rand(5, generator=generator) - 2  # the largest is negative
            scorer.update(rows, losses)
            updates.append((rows.tolist(), losses.tolist()))

    def test_a_loss_that_is_no_number_is_kept_but_is_not_the_largest(self):
        scorer = self.make(size=4)
        scorer.update([0, 1, 2], torch.tensor([math.inf, -5.0, math.nan]))
        got = scorer.score(nn.Identity(), torch.arange(4))
        assert got[:2].tolist() == [math.inf, -5.0]
        assert got[2].isnan()
        assert got[3] == -5.0

    def test_a_refused_update_changes_nothing(self):
        scorer = self.make(size=4)
        scorer.update(torch.tensor([1]), torch.tensor([2.0]))
        for rows, losses, error, match in (
            ([0, 4], torch.ones(2), IndexError, r"row 4 is outside \[0, 4\)"),
            ([0, -1], torch.ones(2), IndexError, "row -1 is outside"),
            ([0, 1], torch.ones(3), ValueError, r"losses must be one a row, \[2\], got shape \(3,\)"),
            ([0], torch.ones(1, dtype=torch.int64), TypeError, "losses must be a tensor of floats"),
            ([0], [1.0], TypeError, "got list"),
            ([0.5], torch.ones(1), TypeError, "row numbers must be integers"),
            ([[0]], torch.ones(1, 1), ValueError, r"row numbers must be \[N\]"),
        ):
            with pytest.raises(error, match=match):
                scorer.update(rows, losses)
        assert scorer.score(nn.Identity(), torch.arange(4)).tolist() == [2.0] * 4
        with pytest.raises(IndexError, match="row 9"):
            scorer.score(nn.Identity(), torch.tensor([9]))

    @pytest.mark.parametrize("rows", ["id", 1, lambda batch: batch["id"].numpy()], ids=["key", "position", "function"])
    def test_the_row_numbers_are_found(self, rows):
        numbers = torch.tensor([3, 1], dtype=torch.int32)
        batch = (torch.rand(2), numbers) if rows == 1 else {"id": numbers}
        scorer = self.make(rows=rows)
        scorer.update(np.array([1, 3]), torch.tensor([1.0, 3.0], dtype=torch.float64))
        assert scorer.score(nn.Identity(), batch).tolist() == [3.0, 1.0]

    def test_the_size_of_a_data_set(self):
        assert self.make(size=range(7)).size == 7

    def test_nothing_told_of_no_rows(self):
        scorer = self.make()
        scorer.update([], torch.ones(0))
        assert scorer.score(nn.Identity(), torch.arange(3)).tolist() == [0, 0, 0]

    def test_it_lives_where_the_model_does(self):
        scorer = self.make()
        assert scorer.score(nn.Linear(1, 1, device="meta"), torch.arange(3)).device.type == "meta"
        scorer = self.make()
        scorer.update(torch.arange(3), torch.ones(3, device="meta"))
        assert scorer.score(nn.Linear(1, 1), torch.arange(3)).device.type == "meta"

    def test_it_is_saved_with_the_batches_and_continues_bit_for_bit(self):
        def run(stop=None, resume=None):
            torch.manual_seed(0)
            data = [(torch.randn(8, 4), torch.randint(3, (8,)), torch.arange(8) + 8 * i) for i in range(5)]
            model = nn.Linear(4, 3)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            scorer = get_scorer("stale", rows=2, size=40)
            batches = SelectedBatches(data, model, get_policy("adaselection", 0.5), 6, forward=scorer)
            if resume is not None:
                saved = torch.load(resume, weights_only=True)
                model.load_state_dict(saved["model"])
                batches.load_state_dict(saved["batches"])
            while batches.counts.epochs < 4:
                for inputs, targets, rows in batches:
                    losses = F.cross_entropy(model(inputs), targets, reduction="none")
                    optimizer.zero_grad()
                    losses.mean().backward()
                    optimizer.step()
                    scorer.update(rows, losses)
                    if batches.counts.updates == stop:
                        file = io.BytesIO()
                        torch.save({"model": model.state_dict(), "batches": batches.state_dict()}, file)
                        file.seek(0)
                        return file
            return model.weight.detach(), scorer.score(model, data[0]), scorer.score(model, data[4])

        expected = run()
        for stop in (2, 6):
            assert all(torch.equal(a, b) for a, b in zip(run(resume=run(stop=stop)), expected, strict=True))


CORRUPT = {
    "no mapping": lambda state: None,
    "another format": lambda state: {**state, "format": 0},
    "another scorer": lambda state: {**state, "scorer": "forward"},
    "another size": lambda state: {**state, "settings": {"size": 5}},
    "an entry too few": lambda state: {k: v for k, v in state.items() if k != "state"},
    "no memory": lambda state: {**state, "state": {}},
    "fewer rows": lambda state: {**state, "state": {**state["state"], "losses": torch.ones(2)}},
    "another dtype": lambda state: {**state, "state": {**state["state"], "seen": torch.ones(4)}},
    "a largest loss that is none": lambda state: {
        **state,
        "state": {**state["state"], "largest": torch.tensor(math.nan)},
    },
}


@pytest.mark.parametrize("spoil", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_foreign_or_corrupt_state_is_refused_whole(spoil):
    def make(value):
        scorer = get_scorer("stale", rows=lambda batch: batch, size=4)
        scorer.update([value], torch.tensor([float(value)]))
        return scorer

    scorer, state = make(1), make(2).state_dict()
    before = scorer.score(nn.Identity(), torch.arange(4))
    with pytest.raises(ValueError):
        scorer.load_state_dict(spoil(state))
    assert torch.equal(scorer.score(nn.Identity(), torch.arange(4)), before)
    scorer.load_state_dict(state)
    assert scorer.score(nn.Identity(), torch.arange(4)).tolist() == [2.0] * 4


def test_batches_and_their_scorer_load_together_or_not_at_all():
    def make(scorer):
        return SelectedBatches([torch.rand(4)], nn.Identity(), get_policy("uniform", 0.5), 4, forward=scorer)

    stale = get_scorer("stale", rows=lambda batch: torch.arange(4), size=4)
    batches = make(stale)
    list(batches)
    state = batches.state_dict()
    for other in (lambda model, batch: batch, get_scorer("forward", forward=lambda model, batch: batch)):
        target = make(other)
        with pytest.raises(ValueError, match="scorer"):
            target.load_state_dict(state)
        assert target.policy.state.step == 1
        assert target.buffered == 0
        with pytest.raises(ValueError, match="scorer"):
            batches.load_state_dict(target.state_dict())
    assert batches.policy.state.step == 2
    assert batches.buffered == 2
    batches.load_state_dict(state)


def test_a_scorer_without_a_memory_refuses_one():
    scorer = get_scorer("low_resolution", scale=0.5)
    scorer.load_state_dict(scorer.state_dict())
    with pytest.raises(ValueError, match="remembers nothing"):
        scorer.load_state_dict({**scorer.state_dict(), "state": {"losses": 1}})
    with pytest.raises(ValueError, match=r"0\.25"):
        get_scorer("low_resolution", scale=0.25).load_state_dict(scorer.state_dict())


def test_the_linear_model_is_asked_for_the_rows_of_the_batch():
    scorer = get_scorer("linear", sampler=Linear(), rows="id")
    assert scorer.score(nn.Identity(), {"id": [4, 7]}).tolist() == [8, 14]


def test_impon_is_such_a_linear_model():
    from adaselect_kernels.samplers import get_sampler

    features = torch.randn(60, 3)
    sampler = get_sampler("impon", 60, 8, features=features, bank=20)
    scorer = get_scorer("linear", sampler=sampler, rows=lambda batch: batch)
    for _ in zip(range(2), sampler, strict=False):
        sampler.observe(torch.rand(8) + 1)
    rows = torch.tensor([5, 9, 2])
    assert torch.equal(scorer.score(nn.Identity(), rows), sampler.predict(rows))


def test_one_of_ones_own():
    class Half(Scorer):
        name = "half"

        def __call__(self, model, batch):
            return batch / 2

    batches = SelectedBatches([torch.arange(6.0)], nn.Identity(), get_policy("big_loss", 0.5), 3, forward=Half())
    assert [batch.tolist() for batch in batches] == [[3, 4, 5]]
    assert batches.last.losses.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]


@pytest.mark.parametrize(
    ("name", "config", "error", "match"),
    [
        ("fast", {}, ValueError, "name must be one of 'forward', .*; got 'fast'"),
        ("forward", {"scale": 0.5}, TypeError, "'forward' has no setting 'scale'; it accepts forward, mode"),
        ("forward", {"mode": "test"}, ValueError, "mode must be one of"),
        ("forward", {"autocast": "bf16"}, TypeError, "autocast must be"),
        ("forward", {"compile": 1}, TypeError, "compile must be a bool"),
        ("low_resolution", {}, TypeError, "'low_resolution' needs scale"),
        ("low_resolution", {"scale": 0.0}, ValueError, r"scale must be in \(0, 1\]"),
        ("low_resolution", {"scale": 2}, ValueError, "scale must be in"),
        ("low_resolution", {"scale": "0.5"}, TypeError, "scale must be a number"),
        ("low_resolution", {"scale": 0.5, "interpolation": "cubic"}, ValueError, "interpolation must be one of"),
        ("stale", {}, TypeError, "needs rows, size"),
        ("stale", {"rows": 0.5, "size": 3}, TypeError, "rows must be a key"),
        ("stale", {"rows": "id", "size": 0}, ValueError, "size must be at least 1, got 0"),
        ("stale", {"rows": "id", "size": None}, TypeError, "sized data set, got NoneType"),
        ("linear", {"rows": "id", "sampler": 3}, TypeError, r"needs predict\(rows\)"),
        ("slim", {"width": "0.25"}, TypeError, "width must be a number"),
        ("reference", {"reference": None}, TypeError, "reference must be a model"),
        ("reference", {"reference": nn.Identity(), "label_smoothing": 2.0}, ValueError, "label_smoothing must be in"),
    ],
)
def test_settings_are_checked_when_made(name, config, error, match):
    with pytest.raises(error, match=match):
        get_scorer(name, **config)
