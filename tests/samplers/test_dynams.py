"""DynaMS: keep schedules, a whole trajectory with every selection against NumPy float64, PSP, class balance, refusals."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset

from adaselect_kernels.boundary import boundary_distances, pairwise_weight_norms
from adaselect_kernels.models import joint_backward, make_slimmable
from adaselect_kernels.samplers import dynams, get_sampler
from adaselect_kernels.samplers.dynams import DynaMS, keep_ratios
from adaselect_kernels.training import score
from adaselect_kernels.training.scorers import get_scorer

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- schedules


@pytest.mark.parametrize("budget", [0.999, 0.7, 0.5, 0.3, 0.11])
@pytest.mark.parametrize("rounds", [10, 20, 33])
def test_power_schedule_has_the_budget_as_its_mean(budget, rounds):
    keep = keep_ratios("power", budget, rounds)
    assert keep[0] == 1.0
    assert len(keep) == rounds
    assert sum(keep) / rounds == pytest.approx(budget, abs=1e-11)
    r = -np.log(keep[1:]) / np.log(np.arange(2, rounds + 1))  # one exponent for all
    np.testing.assert_allclose(r, r[0], rtol=1e-9)


def test_power_schedule_by_hand():
    # (1 + 2^-r + 3^-r) / 3 with r = 1: 11 / 18
    np.testing.assert_allclose(keep_ratios("power", 11 / 18, 3), [1, 1 / 2, 1 / 3], rtol=1e-11)
    np.testing.assert_allclose(keep_ratios("power", 0.55, 2), [1, 0.1], rtol=1e-10)
    steep = keep_ratios("power", 0.5 + 1e-9, 2)
    assert steep[1] == pytest.approx(2e-9, rel=1e-3)


def test_linear_and_constant_schedules():
    keep = keep_ratios("linear", 0.6, 9)
    assert keep[0] == 1.0
    np.testing.assert_allclose(np.diff(keep), -0.1, rtol=1e-12)
    assert sum(keep) / 9 == pytest.approx(0.6, abs=1e-12)
    assert keep_ratios("constant", 0.3, 4) == (1.0, 0.3, 0.3, 0.3)
    for schedule in dynams.SCHEDULES:
        assert keep_ratios(schedule, 1.0, 3) == (1.0, 1.0, 1.0)
        assert keep_ratios(schedule, 1.0, 1) == (1.0,)


@pytest.mark.parametrize(
    ("schedule", "budget", "rounds", "message"),
    [
        ("power", 0.1, 10, r"'power' needs a budget above 1 / rounds = 0.1"),
        ("linear", 0.5, 10, r"'linear' needs a budget above 0.5"),
        ("constant", 0.5, 1, "one round trains on everything"),
        ("power", 0.5, 1, "one round trains on everything"),
        ("cubic", 0.5, 4, "schedule must be one of 'power', 'linear', 'constant'; got 'cubic'"),
        ("power", 0.0, 4, "must be in"),
        ("power", 1.1, 4, "must be in"),
        ("power", 0.5, 0, "rounds must be at least 1"),
    ],
)
def test_schedules_that_cannot_be_are_refused(schedule, budget, rounds, message):
    with pytest.raises(ValueError, match=message):
        keep_ratios(schedule, budget, rounds)


# ---- the trajectory


def task(generator, rows=150, inputs=5, classes=4):
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(inputs, classes, generator=generator, dtype=torch.float64)).argmax(1)
    noisy = torch.rand(rows, generator=generator) < 0.1
    return x, torch.where(noisy, torch.randint(classes, (rows,), generator=generator), y)


class NumpyNet:
    """tanh(x V^T + a) W^T + b, trained by SGD on the mean cross-entropy."""

    def __init__(self, model):
        self.p = [tensor.detach().numpy().copy() for tensor in model.parameters()]

    def logits(self, x):
        v, a, w, b = self.p
        hidden = np.tanh(x @ v.T + a)
        return hidden, hidden @ w.T + b

    def step(self, x, y, rate):
        w = self.p[2]
        hidden, z = self.logits(x)
        e = np.exp(z - z.max(1, keepdims=True))
        g = (e / e.sum(1, keepdims=True) - np.eye(len(w))[y]) / len(x)
        back = (g @ w) * (1 - hidden**2)
        for p, gradient in zip(self.p, (back.T @ x, back.sum(0), g.T @ hidden, g.sum(0)), strict=True):
            p -= rate * gradient

    def distances(self, x, y=None):
        w, (_, z) = self.p[2], self.logits(x)
        result = np.full(len(x), np.inf)
        for i, row in enumerate(z):
            c = row.argmax() if y is None else y[i]
            for j in range(len(w)):
                if j != c:
                    result[i] = min(result[i], (row[c] - row[j]) / np.sqrt(((w[c] - w[j]) ** 2).sum()))
        return result


def closest(distances, keep, labels=None):
    """The rows kept, as a set; half up."""
    groups = [np.arange(len(distances))] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    chosen = []
    for rows in groups:
        count = max(1, math.floor(keep * len(rows) + 0.5))
        chosen += rows[np.argsort(distances[rows], kind="stable")[:count]].tolist()
    return sorted(chosen)


def network():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()


@pytest.mark.parametrize(
    ("reference", "schedule", "balanced"),
    [("predicted", "power", False), ("label", "linear", False), ("predicted", "constant", True)],
)
def test_a_trajectory_equals_numpy(reference, schedule, balanced, generator):
    """30 epochs, 6 rounds, 200 to 300 steps: the rows of every round, and the weights at every step."""
    x, y = task(generator)
    model = network()
    twin = NumpyNet(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    budget = 0.6
    config = {"reference": reference, "schedule": schedule, "class_balanced": balanced}
    sampler = get_sampler(
        "dynams", len(x), 10, epochs=30, period=5, budget=budget, seed=7, labels=y if balanced else None, **config
    )
    keep = {
        "power": (1 + np.arange(6.0)) ** -exponent(budget, 6),
        "linear": 1 - np.arange(6) * 2 * (1 - budget) / 5,
        "constant": np.array([1.0] + [budget] * 5),
    }[schedule]
    data = TensorDataset(x, y)
    loader = DataLoader(data, batch_sampler=sampler)
    kept, steps, seen = list(range(len(x))), 0, []
    for epoch in range(30):
        assert sampler.needs_scores == (epoch > 0 and epoch % 5 == 0)
        if sampler.needs_scores:
            expected = twin.distances(x.numpy(), y.numpy() if reference == "label" else None)
            got = sampler.score(model, DataLoader(data, batch_size=64))
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-9)
            kept = closest(expected, keep[epoch // 5], y.numpy() if balanced else None)
            assert sampler.subset.tolist() == kept
            seen.append(tuple(kept))
        assert not sampler.needs_scores
        trained = []
        for inputs, targets in loader:
            rows = sampler.current.numpy()
            trained += rows.tolist()
            assert torch.equal(x[rows], inputs)
            optimizer.zero_grad()
            losses = F.cross_entropy(model(inputs), targets, reduction="none")
            losses.mean().backward()
            optimizer.step()
            sampler.observe(losses.detach())
            twin.step(inputs.numpy(), targets.numpy(), 0.5)
            weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).numpy()
            np.testing.assert_allclose(weights, np.concatenate([p.ravel() for p in twin.p]), rtol=1e-9, atol=1e-11)
            steps += 1
        assert sorted(trained) == kept  # each once
        assert trained != kept  # shuffled
    assert steps >= 200
    assert steps == sampler.total_updates == sampler.step
    assert len(set(seen)) == 5  # the weights moved, the rows too
    record = sampler.record()
    assert (record.step, record.epoch) == (steps, 30)
    with pytest.raises(RuntimeError, match="all 30 epochs that were planned are over"):
        next(iter(sampler))


def exponent(budget, rounds):
    """r of the power schedule by Newton's method."""
    r, base = 0.0, np.log(np.arange(1, rounds + 1))
    for _ in range(200):
        powers = np.exp(-r * base)
        r -= (powers.mean() - budget) / -(powers * base).mean()
    return r


def test_psp_scores_with_the_slim_width(generator):
    """Joint training, scoring at a quarter of the width: distances of the sliced weights, in NumPy."""
    x, y = task(generator)
    model = make_slimmable(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double(), (1.0, 0.25))
    sampler = DynaMS(len(x), 30, epochs=4, period=2, budget=0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    data = TensorDataset(x, y)
    for _ in range(2):
        for inputs, targets in DataLoader(data, batch_sampler=sampler):
            optimizer.zero_grad()
            joint_backward(model, inputs, targets, F.cross_entropy)
            optimizer.step()
            sampler.observe(None)
    twin = NumpyNet(model)
    v, a, w, b = twin.p
    twin.p = [v[:2], a[:2], w[:, :2], b]
    state = copy.deepcopy(sampler.state_dict())
    got = sampler.score(model, DataLoader(data, batch_size=64), width=0.25)
    expected = twin.distances(x.numpy())
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-9)
    assert sampler.subset.tolist() == closest(expected, 0.4)
    assert model[0].width == 1.0

    forward = get_scorer("slim", width=0.25)
    for settings in ({"forward": forward}, {"width": 0.25, "weight": model[2].weight[:, :2]}):
        again = DynaMS(len(x), 30, epochs=4, period=2, budget=0.7)
        again.load_state_dict(state)
        assert torch.equal(again.score(model, DataLoader(data, batch_size=64), **settings), got)
    full = DynaMS(len(x), 30, epochs=4, period=2, budget=0.7)
    full.load_state_dict(state)
    assert not torch.equal(full.score(model, DataLoader(data, batch_size=64)), got)


# ---- scoring


class Net(nn.Module):
    """What a scoring pass could spoil: statistics, dropout; and logits that are those of the last layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x))


def ready(rows=40, **config):
    """A sampler before its second round."""
    sampler = DynaMS(rows, 10, **({"epochs": 4, "period": 1, "budget": 0.5} | config))
    for _ in sampler:
        sampler.observe(None)
    return sampler


def data_of(generator, rows=40):
    return TensorDataset(
        torch.randn(rows, 5, generator=generator), torch.randint(4, (rows,), generator=generator, dtype=torch.int64)
    )


def test_scoring_leaves_no_trace(generator):
    data, model = data_of(generator), Net().train()
    before = copy.deepcopy(model.state_dict())
    own = torch.Generator().manual_seed(3)
    stream, own_stream = torch.get_rng_state(), own.get_state()
    sampler = ready()
    distances = sampler.score(model, DataLoader(data, batch_size=16, generator=own))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not model.head._forward_hooks
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(own.get_state(), own_stream)
    assert distances.dtype == torch.float32
    assert not distances.requires_grad
    expected = boundary_distances(score(model, data.tensors[0]), pairwise_weight_norms(model.head.weight))
    torch.testing.assert_close(distances, expected, rtol=1e-5, atol=1e-6)


def test_no_batch_of_logits_outlives_its_turn(generator):
    """One pass: what is alive besides the batch at hand is [N]."""
    import weakref

    data, model, alive, peak = data_of(generator), Net(), weakref.WeakSet(), 0

    def forward(model, batch):
        nonlocal peak
        logits = model(batch[0])
        alive.add(logits)
        peak = max(peak, len(alive))
        return logits, batch[1]

    ready().score(model, DataLoader(data, batch_size=4), forward)
    assert peak <= 2
    assert len(alive) == 0


def test_a_scorers_settings_are_taken_over(generator):
    class Scorer:
        mode, autocast = "eval", torch.bfloat16

        def __call__(self, model, batch):
            logits = model(batch["x"])
            assert logits.dtype == torch.bfloat16
            return logits

    class Dicts(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, i):
            return {"x": torch.full((5,), float(i))}

    scorer = Scorer()
    assert ready().score(Net(), DataLoader(Dicts(), batch_size=16), scorer).shape == (40,)
    scorer.mode = "train"
    with pytest.raises(ValueError, match="DynaMS scores in eval mode, the scorer has mode='train'"):
        ready().score(Net(), DataLoader(Dicts(), batch_size=16), scorer)


@pytest.mark.parametrize(("reference", "distance"), [("predicted", "top2_margin"), ("label", "margin")])
def test_distances_without_the_last_layer(reference, distance, generator):
    x, y = data_of(generator).tensors
    model = nn.Sequential(nn.Linear(5, 4), nn.Sigmoid())
    got = ready(reference=reference, distance=distance).score(model, DataLoader(TensorDataset(x, y), batch_size=16))
    z = score(model, x).numpy()
    own = z.max(1) if reference == "predicted" else z[np.arange(40), y.numpy()]
    z = z.copy()
    z[np.arange(40), z.argmax(1) if reference == "predicted" else y.numpy()] = -np.inf
    np.testing.assert_allclose(got.numpy(), own - z.max(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("reference", "instead"), [("predicted", "top2_margin"), ("label", "margin")])
def test_many_classes_fall_back_and_say_so(reference, instead, generator, monkeypatch):
    data, model = data_of(generator), Net()
    expected = ready(reference=reference, distance=instead).score(model, DataLoader(data, batch_size=16))
    monkeypatch.setattr(dynams, "MAX_CLASSES", 3)
    with pytest.warns(UserWarning, match=rf"4 classes are more than 3.*\({instead}\)") as caught:
        got = ready(reference=reference).score(model, DataLoader(data, batch_size=16))
    assert torch.equal(got, expected)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)),
            r"must end in an nn.Linear, got BatchNorm1d \(1\); pass weight=",
        ),
        (
            nn.Sequential(nn.Linear(5, 4), nn.Softmax(1)),
            r"output of the last linear layer \(0\) unchanged: pass weight=",
        ),
        (nn.Sequential(nn.Linear(5, 8), nn.Unflatten(1, (4, 2)), nn.MaxPool1d(2), nn.Flatten()), r"not the output of"),
        (nn.Flatten(), "no parameters"),
    ],
)
def test_a_model_without_a_linear_last_layer(model, message, generator):
    data, sampler = data_of(generator), ready()
    with pytest.raises(ValueError, match=message):
        sampler.score(model, DataLoader(data, batch_size=16))
    assert sampler.needs_scores
    sampler.score(model, DataLoader(data, batch_size=16), weight=torch.eye(5)[: 5 if type(model) is nn.Flatten else 4])
    assert not sampler.needs_scores


def test_a_compiled_model_is_looked_into(generator):
    data, model = data_of(generator), Net()
    compiled = torch.compile(model, backend="eager")
    got = ready().score(compiled, DataLoader(data, batch_size=20))
    torch.testing.assert_close(got, ready().score(model, DataLoader(data, batch_size=20)))


class Stream(IterableDataset):
    def __init__(self, data, rows):
        self.data, self.rows = data, rows

    def __iter__(self):
        return (self.data[i % len(self.data)] for i in range(self.rows))


def test_loaders_that_do_not_go_through_all_rows_in_order(generator):
    data, model = data_of(generator), Net()
    x, y = data.tensors
    cases = [
        (DataLoader(data, batch_size=16, shuffle=True), "RandomSampler: it must go through all rows in order"),
        (DataLoader(data, batch_size=None, sampler=RandomSampler(data)), "RandomSampler"),
        (DataLoader(data, batch_sampler=ready()), "DynaMS: it must"),
        (DataLoader(Subset(data, range(39)), batch_size=16), "data set has 39 rows, the training set has 40"),
        (DataLoader(data, batch_size=16, drop_last=True), "gave 32 rows, the training set has 40.*drop_last=False"),
        (DataLoader(Stream(data, 41), batch_size=16), "gave 41 rows and has more|gave 48"),
        (DataLoader(Stream(data, 24), batch_size=16), "gave 24 rows"),
        ([], "gave 0 rows"),
    ]
    for loader, message in cases:
        sampler = ready()
        before = sampler.state_dict()
        with pytest.raises(ValueError, match=message):
            sampler.score(model, loader)
        assert sampler.needs_scores
        assert str(sampler.state_dict()) == str(before)
    for loader in (DataLoader(Stream(data, 40), batch_size=16), [(x[:7], y[:7]), (x[7:], y[7:])]):
        ready().score(model, loader)
    sampler = ready(labels=y)
    with pytest.raises(ValueError, match="targets of the loader are not `labels` in their order"):
        sampler.score(model, [(x, y.roll(1))])
    sampler.score(model, [(x, y)])


@pytest.mark.parametrize(
    ("batch", "settings", "error", "message"),
    [
        ({"x": torch.zeros(40, 5)}, {}, TypeError, "must be a pair"),
        (
            (torch.zeros(40, 5), torch.zeros(40)),
            {"forward": lambda model, batch: model(batch[0]).sum(1)},
            TypeError,
            r"needs logits \[b, C\].*got torch.float32 \(40,\)",
        ),
        (
            (torch.zeros(40, 5), torch.zeros(40)),
            {"weight": torch.zeros(3, 8)},
            ValueError,
            r"weight must be \[C, d\] with C = 4, got \(3, 8\)",
        ),
        ((torch.zeros(40, 5), torch.zeros(40)), {"width": 0.25}, ValueError, "no slimmable layer"),
    ],
)
def test_scoring_with_wrong_inputs_changes_nothing(batch, settings, error, message):
    sampler = ready()
    with pytest.raises(error, match=message):
        sampler.score(Net(), [batch], **settings)
    assert sampler.needs_scores
    labelled = ready(reference="label")
    with pytest.raises(TypeError, match="reference='label' needs"):
        labelled.score(Net(), [torch.zeros(40, 5)], lambda model, batch: model(batch))


def test_rows_with_nan_distances_are_kept_last(generator):
    x, y = data_of(generator).tensors
    x[5] = math.nan
    sampler = ready()
    distances = sampler.score(Net(), [(x, y)])
    assert distances[5].isnan()
    assert 5 not in sampler.subset.tolist()


# ---- rounds, balance, refusals


def test_a_round_without_scores_says_what_to_call(generator):
    sampler = DynaMS(40, 10, epochs=6, period=2, budget=0.5)
    with pytest.raises(RuntimeError, match="no scores are due before epoch 0"):
        sampler.score(Net(), [])
    for _ in range(2):
        for _ in sampler:
            assert len(sampler) == 4
            sampler.observe(None)
    assert sampler.needs_scores
    assert len(sampler) == -(-sampler.kept(1) // 10)  # known before it is scored
    with pytest.raises(
        RuntimeError, match=r"round 1 \(epochs 2 to 3\) keeps .* has no scores: call sampler.score\(model"
    ):
        next(iter(sampler))
    data = data_of(generator)
    sampler.score(Net(), DataLoader(data, batch_size=40))
    with pytest.raises(RuntimeError, match="no scores are due before epoch 2"):
        sampler.score(Net(), DataLoader(data, batch_size=40))
    assert len(list(sampler)) == len(sampler)
    everything = DynaMS(40, 10, epochs=3, period=1, budget=1.0)
    for _ in range(3):
        assert not everything.needs_scores
        assert len(list(everything)) == 4
    assert not everything.needs_scores


def test_class_balance_keeps_the_ratio_in_every_class(generator):
    labels = torch.tensor([0] * 20 + [2] * 15 + [5] * 4 + [7])
    x = torch.randn(40, 5, generator=generator)
    model = nn.Sequential(nn.Linear(5, 8))
    sampler = ready(class_balanced=True, labels=labels, schedule="constant", budget=0.3)
    assert sampler.kept(1) == 6 + 5 + 1 + 1  # floor(0.3 n + 0.5), and at least one
    distances = sampler.score(model, [(x, labels)])
    subset = sampler.subset
    assert labels[subset].bincount().tolist() == [6, 0, 5, 0, 0, 1, 0, 1]
    assert subset.tolist() == closest(distances.numpy(), 0.3, labels.numpy())
    assert len(sampler) == 2
    assert sorted(row for batch in sampler for row in batch) == subset.tolist()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"period": 1.5}, TypeError, "period must be an int"),
        ({"budget": 0.0}, ValueError, "in"),
        ({"reference": "true"}, ValueError, "reference must be one of"),
        ({"distance": "cosine"}, ValueError, "distance must be one of"),
        ({"distance": "margin"}, ValueError, "distance='margin' does not go with reference='predicted'"),
        ({"reference": "label", "distance": "top2_margin"}, ValueError, "does not go with reference='label'"),
        ({"class_balanced": True}, ValueError, "class_balanced=True needs labels"),
        ({"class_balanced": 1}, TypeError, "class_balanced must be a bool"),
        ({"labels": [0, 1]}, ValueError, r"labels must be \[rows\] = \[40\], got \(2,\)"),
        ({"labels": [0.5] * 40}, TypeError, "labels must be ints, got torch.float32"),
        ({"schedule": "constant", "budget": 0.01}, ValueError, "round 1 keeps 0.01 of 40 rows: none"),
        ({"schedule": "constant", "budget": 0.1, "drop_last": True}, ValueError, "round 1 keeps 4 rows, no full batch"),
        ({"unknown": 1}, TypeError, "unknown"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        get_sampler("dynams", 40, 10, **({"epochs": 4, "period": 1, "budget": 0.5} | changes))


# ---- resuming


def run(model, optimizer, sampler, data, until, workers=0):
    """Batches of (epoch, rows) up to `until` steps in all."""
    batches = []
    while sampler.step < until:
        if sampler.needs_scores:
            sampler.score(model, DataLoader(data, batch_size=16))
        own = (
            torch.Generator()
        )  # an iteration draws a seed for workers, also where it resumes: not from dropout's stream
        for inputs, targets in DataLoader(data, batch_sampler=sampler, num_workers=workers, generator=own):
            batches.append(sampler.current.tolist())
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            sampler.observe(None)
            if sampler.step == until:
                break
    return batches


def fresh(seed=0):
    torch.manual_seed(5)
    model = Net()
    return (
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        DynaMS(40, 8, epochs=6, period=2, budget=0.6, seed=seed),
    )


@pytest.mark.parametrize("stop", [3, 10, 12, 15])  # in round 0, at its end, in round 1
def test_a_resumed_run_is_the_same_bit_for_bit(stop, generator):
    data = data_of(generator)
    model, optimizer, sampler = fresh(1)
    total = sampler.total_updates
    torch.manual_seed(9)
    expected = run(model, optimizer, sampler, data, total)
    final = copy.deepcopy(model.state_dict())

    model, optimizer, sampler = fresh(1)
    torch.manual_seed(9)
    batches = run(model, optimizer, sampler, data, stop)
    file = io.BytesIO()
    parts = {"model": model, "optimizer": optimizer, "sampler": sampler}
    saved = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**saved, "stream": torch.get_rng_state()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer, sampler = fresh(2)
    for name, part in (("model", model), ("optimizer", optimizer), ("sampler", sampler)):
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["stream"])
    batches += run(model, optimizer, sampler, data, total)
    assert batches == expected
    assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items())


def test_states_that_are_foreign_or_corrupt_are_refused(generator):
    sampler = ready()
    sampler.score(Net(), DataLoader(data_of(generator), batch_size=40))
    good = sampler.state_dict()

    def corrupt(**changes):
        return {**good, "state": {**good["state"], **changes}}

    subset = good["state"]["subset"]
    cases = [
        (corrupt(subset=subset[:-1]), "subset of"),
        (corrupt(subset=subset.flip(0)), "not ascending"),
        (corrupt(subset=subset + 30), "outside"),
        (corrupt(subset=subset.float()), "subset"),
        (corrupt(scored=torch.tensor(4)), "scored for round 4"),
        (corrupt(scored=torch.tensor(0)), "scored for round 0"),
        ({**good, "config": {**good["config"], "budget": 0.6}}, "config"),
        ({**good, "config": {**good["config"], "class_sizes": [20, 20]}}, "config"),
        ({**good, "state": {}}, "tensors"),
    ]
    other = DynaMS(40, 10, epochs=4, period=1, budget=0.5, seed=3)
    for state, message in cases:
        before = str(other.state_dict())
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert str(other.state_dict()) == before
    other.load_state_dict(good)
    assert list(other) == list(sampler)


def test_workers_draw_ahead_and_nothing_is_lost(generator):
    data = data_of(generator)
    sampler = DynaMS(40, 8, epochs=4, period=1, budget=0.6)
    model, rows = Net(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a machine with few cores
        for _ in range(2):
            if sampler.needs_scores:
                sampler.score(model, DataLoader(data, batch_size=16))
            rows.append([])
            for inputs, _ in DataLoader(data, batch_sampler=sampler, num_workers=2):
                assert torch.equal(inputs, data.tensors[0][sampler.current])
                rows[-1] += sampler.current.tolist()
                sampler.observe(None)
    assert sorted(rows[0]) == list(range(40))
    assert sorted(rows[1]) == sampler.subset.tolist()
