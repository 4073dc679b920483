"""Selective-Backprop, RHO-LOSS and importance sampling: trajectories against NumPy, unbiasedness, runs saved in the middle."""

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaselect_kernels.functional import SampleStats, Selection, WeightedSelection
from adaselect_kernels.policies import get_policy
from adaselect_kernels.training import SelectedBatches
from tests import noise
from tests.states import flat

N, FEATURES, CLASSES, RATE = 24, 5, 4, 0.25
K = 6


pytestmark = pytest.mark.usefixtures("one_thread")


class Softmax:
    """Softmax regression and what the policies need of it, in NumPy and float64."""

    def __init__(self, weight):
        self.weight = weight.copy()  # [C, F]

    def logits(self, x):
        return x @ self.weight.T

    def losses(self, x, y):
        z = self.logits(x)
        z = z - z.max(1, keepdims=True)
        return np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y]

    def errors(self, x, y):
        """softmax(z) - onehot(y), the gradient of each loss at the logits."""
        z = self.logits(x)
        e = np.exp(z - z.max(1, keepdims=True))
        p = e / e.sum(1, keepdims=True)
        p[np.arange(len(y)), y] = 0
        p[np.arange(len(y)), y] = -p.sum(1)
        return p

    def step(self, x, y, weights, rate=0.3):
        """Descent on the mean of weight times loss."""
        self.weight -= rate * (self.errors(x, y) * weights[:, None] / len(y)).T @ x


def smallest(keys, k):
    return np.sort(np.argsort(keys, kind="stable")[:k])


def selective_backprop(state, step, seed, losses, errors, reference, beta=1 / RATE - 1, history=60):
    """k smallest E_i / CDF_i^beta, weight zero last; returns rows and weights."""
    losses = losses.astype(np.float32)
    past = np.array(state.setdefault("past", [])[-history:], dtype=np.float32)
    cdf = np.array([(past <= loss).mean() if len(past) else 1.0 for loss in losses])
    state["past"].extend(losses)
    e = -np.log(noise.uniform(len(losses), step, seed))
    with np.errstate(divide="ignore"):
        keys = np.log(e) - beta * np.log(cdf)
    zero = np.isinf(keys)
    keys[zero] = np.log(e[zero]) + 1e6
    return smallest(keys.astype(np.float32), K), np.ones(K)


def rho_loss(state, step, seed, losses, errors, reference):
    excess = losses.astype(np.float32) - reference.astype(np.float32)
    return smallest(-excess, K), np.ones(K)


def importance(state, step, seed, losses, errors, reference):
    """Inverse CDF over integers, in Python's own; weights 1 / (N p)."""
    norms = np.sqrt((errors**2).sum(1)).astype(np.float32).astype(np.float64)
    scale = 2 ** (39 - (len(norms) - 1).bit_length())
    shares = [max(1, math.ceil(g / norms.max() * scale)) for g in norms]
    ends = list(itertools.accumulate(shares))
    bits = [int(word) // 512 for word in noise.words(2 * K, step, seed)]
    places = [(bits[j] * 2**23 + bits[K + j]) * ends[-1] // 2**46 for j in range(K)]
    rows = np.array(sorted(next(i for i, end in enumerate(ends) if place < end) for place in places))
    return rows, np.array([ends[-1] / (len(norms) * shares[row]) for row in rows])


RULES = {"selective_backprop": selective_backprop, "rho_loss": rho_loss, "importance": importance}
SETTINGS = {"selective_backprop": {"history": 60}, "rho_loss": {}, "importance": {}}


@pytest.mark.parametrize("source", ["logits", "losses"])
@pytest.mark.parametrize("name", RULES)
def test_two_hundred_steps_equal_numpy(name, source, generator):
    """A model that learns from the rows chosen, so that one wrong choice changes all that follow."""
    seed = int(torch.randint(2**62, (), generator=generator))
    data = torch.randn(200, N, FEATURES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (200, N), generator=generator)
    start = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    model, mine = nn.Linear(FEATURES, CLASSES, bias=False, dtype=torch.float64), Softmax(start.numpy())
    reference = Softmax(torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64).numpy() / 2)
    with torch.no_grad():
        model.weight.copy_(start)
    policy, state = get_policy(name, RATE, seed=seed, **SETTINGS[name]), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step, (inputs, targets) in enumerate(zip(data, labels, strict=True), start=1):
        x, y = inputs.numpy(), targets.numpy()
        expected, weights = RULES[name](state, step, seed, mine.losses(x, y), mine.errors(x, y), reference.losses(x, y))
        more = {"reference_losses": torch.tensor(reference.losses(x, y))} if name == "rho_loss" else {}
        with torch.no_grad():
            logits = model(inputs)
            if source == "logits":
                chosen = policy.select(logits, targets, **more)
            else:
                losses = F.cross_entropy(logits, targets, reduction="none")
                norms = torch.linalg.vector_norm(logits.softmax(1) - F.one_hot(targets, CLASSES), dim=1)
                chosen = policy.select_from_losses(losses, norms, **more)
        assert chosen.indices.tolist() == expected.tolist(), step
        mine.step(x[expected], y[expected], weights)
        optimizer.zero_grad()
        losses = F.cross_entropy(model(inputs[chosen.indices]), targets[chosen.indices], reduction="none")
        if name == "importance":
            np.testing.assert_allclose(chosen.weights, weights, rtol=1e-6)
            losses = losses * torch.from_numpy(weights)  # the float32 of `weights` would separate the two models
        losses.mean().backward()
        optimizer.step()
        np.testing.assert_allclose(model.weight.detach(), mine.weight, rtol=1e-9, atol=1e-9)
    assert not np.allclose(mine.weight, start)


def losses_with_cdf(policy, shares):
    """Fill the history with 1, 2, ..., R; the losses whose share at or below is `shares`."""
    size = policy.config.history
    policy.select_from_losses(torch.arange(1, size + 1, dtype=torch.float32))
    return torch.tensor(shares) * size


class TestSelectiveBackprop:
    def test_the_first_batch_is_drawn_uniformly(self):
        """No history: CDF = 1, and the draw is that of the policy "uniform" (k largest E are not k smallest: reversed)."""
        losses, seed = torch.arange(40.0), 3
        chosen = get_policy("selective_backprop", 0.2, seed=seed).select_from_losses(losses)
        assert chosen.indices.tolist() == smallest(-np.log(noise.uniform(40, 1, seed)), 8).tolist()

    def test_the_history_excludes_the_batch_itself_and_keeps_the_last(self):
        policy = get_policy("selective_backprop", 0.5, history=4, beta=1.0, count="random")
        policy.select_from_losses(torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0]))  # 9 is pushed out
        scores = policy.select_from_losses(torch.tensor([0.5, 1.0, 2.5, 4.0, 8.0])).scores
        assert scores.tolist() == [0.0, 0.25, 0.5, 1.0, 1.0]

    @pytest.mark.parametrize("gamma", [0.1, 0.4, 1.0])
    def test_the_default_power_keeps_gamma_of_a_uniform_cdf(self, gamma):
        policy = get_policy("selective_backprop", gamma, history=1000, count="random")
        assert policy.config.power == pytest.approx(1 / gamma - 1)
        losses = torch.arange(1, 1001, dtype=torch.float32)
        policy.select_from_losses(losses)
        kept = [len(policy.select_from_losses(losses).indices) for _ in range(30)]
        error = 6 * math.sqrt(gamma * (1 - gamma) / 30_000) + 1e-3  # the CDF takes 1000 values
        assert abs(np.mean(kept) / 1000 - gamma) < error
        assert gamma == 1.0 or len(set(kept)) > 3

    def test_coins_are_independent_and_ordered_on_request(self):
        for order in ("index", "score"):
            policy = get_policy("selective_backprop", 0.25, count="random", history=50, beta=2, seed=9, order=order)
            losses = losses_with_cdf(policy, [0.1, 0.9, 0.5, 0.7, 0.3, 1.0, 0.02])
            chosen = policy.select_from_losses(losses)
            expected = np.flatnonzero(noise.uniform(7, 2, 9) < (losses.numpy() / 50) ** 2)
            if order == "score":
                expected = sorted(expected, key=lambda row: -losses[row].item())
            assert chosen.indices.tolist() == list(expected)
            np.testing.assert_allclose(chosen.scores, (losses / 50) ** 2, rtol=1e-6)

    def test_fixed_draws_are_the_best_of_their_scores(self, generator):
        policies = [get_policy("selective_backprop", 0.3, order=order) for order in ("index", "score")]
        for _ in range(3):
            losses = torch.rand(30, generator=generator)
            one, two = (policy.select_from_losses(losses) for policy in policies)
            assert one.indices.tolist() == sorted(two.indices.tolist())
            assert torch.equal(two.indices, two.scores.sort(descending=True, stable=True).indices[:9])

    @pytest.mark.parametrize("count", ["fixed", "random"])
    def test_invalid_rows_are_never_kept_nor_remembered(self, count):
        policy = get_policy("selective_backprop", 0.5, ignore_index=-1, count=count, beta=0)
        logits, targets = torch.randn(8, 3), torch.tensor([0, -1, 1, -1, 2, 0, 1, 2])
        logits[4, 0] = math.nan
        for calls in (1, 2, 3):
            chosen = policy.select(logits, targets)
            assert not {1, 3, 4} & set(chosen.indices.tolist())
            assert chosen.n_valid == 5
            assert policy.seen == 5 * calls
            assert chosen.scores[[1, 3, 4]].tolist() == [-math.inf] * 3

    def test_a_run_in_which_no_row_is_kept(self):
        """Each batch is below every loss before it: CDF = 0."""
        policy = get_policy("selective_backprop", 0.5, count="random", beta=1.0)
        policy.select_from_losses(torch.ones(4))
        loader = [torch.full((6,), -float(i)) for i in range(3)]
        batches = SelectedBatches(loader, nn.Identity(), policy, 2, forward=lambda model, batch: batch)
        assert list(batches) == []
        assert (batches.counts.candidates, batches.counts.chosen, batches.buffered) == (18, 0, 0)
        assert batches.record().loss_chosen is None
        other = SelectedBatches(loader, nn.Identity(), copy.deepcopy(policy), 2, forward=lambda model, batch: batch)
        other.load_state_dict(batches.state_dict())
        assert other.buffered == 0

    def test_tokens(self, generator):
        logits, targets = torch.randn(4, 3, 5, generator=generator), torch.randint(5, (4, 3), generator=generator)
        chosen = get_policy("selective_backprop", 0.5, unit="token").select(logits, targets)
        assert len(chosen.indices) == 6
        assert chosen.scores.shape == (12,)

    @pytest.mark.parametrize(
        ("setting", "error", "match"),
        [
            ({"beta": -1.0}, ValueError, "beta must be finite and at least 0"),
            ({"beta": math.inf}, ValueError, "beta must be"),
            ({"beta": "1"}, TypeError, "beta must be a number or None"),
            ({"history": 0}, ValueError, "history must be at least 1, got 0"),
            ({"history": 10.0}, TypeError, "history must be an int"),
            ({"count": "any"}, ValueError, "count must be one of 'fixed', 'random'"),
            ({"gamma_": 1}, TypeError, "it accepts seed, .*beta, history, count"),
        ],
    )
    def test_settings_are_checked_when_made(self, setting, error, match):
        with pytest.raises(error, match=match):
            get_policy("selective_backprop", 0.5, **setting)

    def test_the_ring_follows_the_state_to_its_device(self):
        policy = get_policy("selective_backprop", 0.5)
        policy.select_from_losses(torch.empty(4, device="meta"))
        assert policy.history.device.type == policy.seen.device.type == "meta"


class TestRhoLoss:
    def test_the_largest_differences(self):
        losses, reference = torch.tensor([3.0, 2.0, 1.0, 4.0]), torch.tensor([2.9, 0.5, 0.2, 3.9])
        chosen = get_policy("rho_loss", 0.5, order="score").select_from_losses(losses, reference_losses=reference)
        assert chosen.indices.tolist() == [1, 2]
        assert torch.equal(chosen.losses, losses)
        torch.testing.assert_close(chosen.scores, losses - reference)

    def test_a_row_without_a_reference_loss_is_invalid(self):
        reference = torch.tensor([0.0, math.nan, math.inf, -math.inf])
        policy = get_policy("rho_loss", 0.25)
        chosen = policy.select_from_losses(torch.tensor([1.0, 9.0, 9.0, 9.0]), reference_losses=reference)
        assert chosen.indices.tolist() == [0]
        assert chosen.scores.tolist() == [1.0] + [-math.inf] * 3
        assert chosen.n_valid == 1

    @pytest.mark.parametrize("form", ["pair", "losses", "stats"])
    def test_the_model_and_its_reference_are_both_run(self, form):
        torch.manual_seed(0)
        model, reference = nn.Sequential(nn.Linear(3, 4), nn.Dropout()), nn.Sequential(nn.Linear(3, 4), nn.Dropout())
        inputs, targets = torch.randn(12, 3), torch.randint(4, (12,))
        targets[3] = -100

        def forward(model, batch):
            logits = model(batch[0])
            losses = F.cross_entropy(logits, batch[1], reduction="none")
            return {"pair": (logits, batch[1]), "losses": losses, "stats": SampleStats(loss=losses)}[form]

        with pytest.raises(ValueError, match=r"reference\.eval\(\)"):
            list(SelectedBatches([(inputs, targets)], model, get_policy("rho_loss", 0.5, reference=reference), 6))
        policy = get_policy("rho_loss", 0.5, reference=reference.eval())
        batches = SelectedBatches([(inputs, targets)], model, policy, 6, forward=forward)
        ((chosen, _),) = batches
        losses = [F.cross_entropy(m[0](inputs), targets, reduction="none").detach() for m in (model, reference)]
        excess = (losses[0] - losses[1]).numpy()
        if form == "pair":  # only there is it known which rows are ignored
            excess[3] = -math.inf
        assert batches.last.indices.tolist() == smallest(-excess, 6).tolist()
        assert torch.equal(chosen, inputs[batches.last.indices])

    @pytest.mark.parametrize(
        ("reference", "error", "match"),
        [
            (None, ValueError, r"needs reference_losses \[N\], got None"),
            ([1.0], TypeError, "reference_losses must be a tensor of floats"),
            (torch.ones(4, dtype=torch.int64), TypeError, "floats, got torch.int64"),
            (torch.ones(5), ValueError, r"must be \[4\] on cpu, got \(5,\)"),
            (torch.ones(4, device="meta"), ValueError, "on meta"),
        ],
    )
    def test_what_is_no_reference_is_refused_and_changes_nothing(self, reference, error, match):
        policy = get_policy("rho_loss", 0.5)
        with pytest.raises(error, match=match):
            policy.select(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), reference)
        with pytest.raises(error, match=match):
            policy.select_from_losses(torch.rand(4), reference_losses=reference)
        assert policy.state.step == 1

    def test_without_a_model_the_buffer_says_so(self):
        batches = SelectedBatches(
            [torch.rand(4)], nn.Identity(), get_policy("rho_loss", 0.5), 2, forward=lambda m, b: b
        )
        with pytest.raises(ValueError, match="reference=model"):
            list(batches)
        with pytest.raises(TypeError, match="reference must be a model"):
            get_policy("rho_loss", 0.5, reference=torch.rand(4))
        with pytest.raises(TypeError, match="no setting 'reference'"):
            get_policy("big_loss", 0.5, reference=nn.Identity())


class TestImportance:
    def test_the_weighted_mean_is_unbiased_by_enumeration(self, generator):
        """sum_i p_i w_i l_i = mean l, with p_i as counted over many draws of the same batch and w_i as returned."""
        logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        targets = torch.randint(4, (6,), generator=generator)
        policy, counted, weight = get_policy("importance", 1.0), torch.zeros(6), torch.full((6,), math.nan)
        for _ in range(500):
            chosen = policy.select(logits, targets)
            counted += chosen.indices.bincount(minlength=6)
            weight[chosen.indices] = chosen.weights
        stats_losses = F.cross_entropy(logits, targets, reduction="none")
        norms = torch.linalg.vector_norm(logits.softmax(1) - F.one_hot(targets, 4), dim=1)
        exact = norms / norms.sum()
        torch.testing.assert_close(weight.double(), 1 / (6 * exact), rtol=1e-5, atol=0)
        torch.testing.assert_close((exact * weight * stats_losses).sum(), stats_losses.mean(), rtol=1e-6, atol=0)
        spread = (exact * (1 - exact) / counted.sum()).sqrt()
        assert ((counted / counted.sum() - exact).abs() < 6 * spread).all()

    def test_the_mean_over_many_draws_is_that_of_the_batch_in_loss_and_gradient(self, generator):
        x = torch.randn(300, 5, generator=generator)
        y = torch.randint(3, (300,), generator=generator)
        weight = torch.randn(3, 5, generator=generator, requires_grad=True)
        losses = F.cross_entropy(x @ weight.T, y, reduction="none")
        gradients = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten() for loss in losses])
        quantities = torch.cat([losses.detach()[:, None], gradients], 1).double()  # [N, 1 + 15]
        policy = get_policy("importance", 0.1, seed=int(torch.randint(2**62, (), generator=generator)))
        means = []
        for _ in range(300):
            chosen = policy.select((x @ weight.T).detach(), y)
            means.append((chosen.weights[:, None] * quantities[chosen.indices]).mean(0))
        means = torch.stack(means)
        error = (means.mean(0) - quantities.mean(0)).abs()
        assert (error < 6 * means.std(0) / math.sqrt(300)).all()
        plain = torch.stack([quantities[policy.select((x @ weight.T).detach(), y).indices].mean(0) for _ in range(50)])
        assert abs(plain[:, 0].mean() - losses.mean()) > 6 * plain[:, 0].std() / math.sqrt(
            50
        )  # without weights: biased

    def test_all_norms_zero_is_uniform(self):
        policy = get_policy("importance", 1.0)
        chosen = [policy.select_from_losses(torch.ones(5), torch.zeros(5)) for _ in range(40)]
        assert {row for selection in chosen for row in selection.indices.tolist()} == set(range(5))
        assert all(torch.equal(selection.weights, torch.ones(5)) for selection in chosen)

    def test_invalid_rows(self):
        policy = get_policy("importance", 1.0)
        losses, norms = torch.tensor([1.0, math.nan, 2.0, 3.0]), torch.tensor([1.0, 5.0, math.inf, 3.0])
        chosen = policy.select_from_losses(losses, norms)
        assert set(chosen.indices.tolist()) <= {0, 3}
        assert chosen.n_valid == 2  # the mean is over these: weights 1 / (2 p)
        expected = torch.tensor([2.0, math.nan, math.nan, 2 / 3])[chosen.indices]
        torch.testing.assert_close(chosen.weights, expected)
        none = policy.select_from_losses(torch.full((3,), math.nan), torch.ones(3))
        assert none.weights.tolist() == [0, 0, 0]

    def test_the_best_first_on_request(self, generator):
        losses, norms = torch.rand(2, 50, generator=generator)
        one, two = (
            get_policy("importance", 0.5, order=o).select_from_losses(losses, norms) for o in ("index", "score")
        )
        assert one.indices.tolist() == sorted(two.indices.tolist())
        falling = norms[two.indices]
        assert (falling[:-1] >= falling[1:]).all()
        torch.testing.assert_close(two.weights, norms.sum() / (50 * falling))

    def test_norms_of_the_model_on_request(self, generator):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        batch = (torch.randn(20, 4, generator=generator), torch.randint(3, (20,), generator=generator))
        policy = get_policy("importance", 0.5, source="exact")
        with pytest.raises(ValueError, match="needs the model"):
            policy.select(model(batch[0]), batch[1])
        batches = SelectedBatches([batch], model, policy, 10)
        list(batches)
        norms = []
        for x, y in zip(*batch, strict=True):
            grads = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), model.parameters())
            norms.append(torch.cat([g.flatten() for g in grads]).norm())
        torch.testing.assert_close(batches.last.scores, torch.stack(norms), rtol=1e-4, atol=1e-6)

    def test_gradient_norms_are_needed(self):
        with pytest.raises(ValueError, match="grad_norms"):
            get_policy("importance", 0.5).select_from_losses(torch.rand(4))

    def test_a_weighted_selection_is_a_selection_that_keeps_its_weights(self):
        chosen = get_policy("importance", 0.5).select_from_losses(torch.rand(4), torch.rand(4))
        assert isinstance(chosen, WeightedSelection)
        assert isinstance(chosen, Selection)
        indices, _, _, _ = chosen
        assert len(chosen) == 4
        for other in (copy.deepcopy(chosen), pickle.loads(pickle.dumps(chosen))):
            assert torch.equal(other.weights, chosen.weights)
            assert torch.equal(other.indices, indices)
        other = chosen._replace(indices=indices + 1)
        assert torch.equal(other.weights, chosen.weights)
        assert torch.equal(other.indices, indices + 1)
        assert torch.equal(chosen._replace(weights=indices).weights, indices)


@pytest.mark.parametrize("name", ["rs2", "impon", "p_sgd", "c_sgd", "infobatch", "dynams"])
def test_a_sampler_is_not_a_policy(name):
    with pytest.raises(ValueError, match=rf"samplers\.get_sampler\('{name}'"):
        get_policy(name, 0.3)


class TestBuffer:
    def test_weights_stay_with_their_rows(self):
        """Candidate batches of rows numbered through; a twin policy says which weight each must have."""
        rows = torch.arange(60.0).split(10)
        norms = [torch.rand(10) + 0.1 for _ in rows]
        by_batch = iter(norms)

        def forward(model, batch):
            return SampleStats(loss=torch.ones(10), grad_norm=next(by_batch))

        batches = SelectedBatches(rows, nn.Identity(), get_policy("importance", 0.7, seed=1), 5, forward=forward)
        assert batches.weights is None
        got = [(batch.tolist(), batches.weights.tolist()) for batch in batches]
        twin, expected = get_policy("importance", 0.7, seed=1), []
        for start, values in zip(range(0, 60, 10), norms, strict=True):
            chosen = twin.select_from_losses(torch.ones(10), values)
            expected += zip((chosen.indices + start).tolist(), chosen.weights.tolist(), strict=True)
        pairs = [pair for batch in got for pair in zip(*batch, strict=True)]
        assert pairs == expected[: len(pairs)]
        assert len(got) == 8
        assert batches._waiting.peek().tolist() == [weight for _, weight in expected[40:]]

    def test_a_policy_without_weights_has_none(self):
        batches = SelectedBatches(
            [torch.rand(4)], nn.Identity(), get_policy("big_loss", 0.5), 2, forward=lambda m, b: b
        )
        assert [batches.weights for _ in batches] == [None]

    def test_rows_with_and_without_weights_do_not_mix(self):
        class Sometimes:
            def __init__(self):
                self.calls = 0

            def select_from_losses(self, losses):
                self.calls += 1
                chosen = get_policy("big_loss", 0.5).select_from_losses(losses)
                return WeightedSelection(*chosen, torch.ones(2)) if self.calls == 2 else chosen

        batches = SelectedBatches([torch.rand(4)] * 2, nn.Identity(), Sometimes(), 3, forward=lambda m, b: b)
        with pytest.raises(ValueError, match="weights for some batches and none for others"):
            list(batches)
        assert batches.buffered == 2


def settings_of(name, reference):
    return {"reference": reference} if name == "rho_loss" else {}


def train(name, more, stop=None, resume=None):
    """Three epochs of 5 updates or so; with `stop` the file saved after that many updates, else everything at the end."""
    torch.manual_seed(0)
    model, reference = (nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 3)) for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    data = torch.utils.data.TensorDataset(torch.randn(60, 4), torch.randint(3, (60,)))
    loader = torch.utils.data.DataLoader(data, batch_size=9, shuffle=True)
    policy = get_policy(name, 0.4, seed=5, **more, **settings_of(name, reference.eval()))
    batches = SelectedBatches(loader, model, policy, 5)
    if resume is not None:
        resume.seek(0)
        saved = torch.load(resume, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        batches.load_state_dict(saved["batches"])
        torch.set_rng_state(saved["stream"])
    while batches.counts.epochs < 3:
        for inputs, targets in batches:
            losses = F.cross_entropy(model(inputs), targets, reduction="none")
            optimizer.zero_grad()
            (losses if batches.weights is None else losses * batches.weights).mean().backward()
            optimizer.step()
            if batches.counts.updates == stop:
                file, parts = io.BytesIO(), {"model": model, "optimizer": optimizer, "batches": batches}
                state = {key: part.state_dict() for key, part in parts.items()} | {"stream": torch.get_rng_state()}
                torch.save(state, file)
                return file
    return model.state_dict(), batches.state_dict(), torch.get_rng_state()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("selective_backprop", {"history": 25}),
        ("selective_backprop", {"history": 25, "count": "random"}),
        ("rho_loss", {}),
        ("importance", {}),
    ],
    ids=["selective_backprop", "random", "rho_loss", "importance"],
)
def test_a_run_saved_in_the_middle_continues_bit_for_bit(name, more):
    expected = flat(train(name, more))
    for stop in (1, 4, 9):
        assert flat(train(name, more, resume=train(name, more, stop=stop))) == expected, stop


def change(key, value):
    return lambda state: state.update({key: value(state[key]) if callable(value) else value})


CORRUPT = {
    "no history": lambda state: state.pop("history"),
    "a shorter history": change("history", lambda h: h[:5]),
    "another dtype": change("history", lambda h: h.double()),
    "a hole in the history": change("history", lambda h: h.index_fill(0, torch.tensor([1]), math.nan)),
    "more losses than were seen": change("seen", lambda seen: seen - 1),
    "fewer losses than were seen": change("seen", lambda seen: seen + 1),
    "a negative number": change("seen", lambda seen: seen - 100),
    "an infinite loss": change("history", lambda h: h.index_fill(0, torch.tensor([1]), math.inf)),
    "no number": change("seen", None),
    "another policy": change("policy", "big_loss"),
    "a step of 0": lambda state: state["state"]["step"].zero_(),
    "an entry too many": lambda state: state.update(more=1),
}


@pytest.mark.parametrize("spoil", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_corrupt_history_is_refused_whole(spoil):
    saved = get_policy("selective_backprop", 0.5, history=16)
    saved.select_from_losses(torch.rand(7))
    state = saved.state_dict()
    policy = get_policy("selective_backprop", 0.5, history=16)
    policy.select_from_losses(torch.rand(5))
    copy.deepcopy(policy).load_state_dict(copy.deepcopy(state))  # sound as it is
    before = flat(policy.state_dict())
    spoil(state)
    with pytest.raises(ValueError):
        policy.load_state_dict(state)
    assert flat(policy.state_dict()) == before


def test_what_is_no_state_is_refused():
    with pytest.raises(ValueError, match="not a state"):
        get_policy("selective_backprop", 0.5).load_state_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", [{"beta": 1.0}, {"history": 8}, {"count": "random"}], ids=str)
def test_settings_that_change_the_result_must_agree(setting):
    saved = get_policy("selective_backprop", 0.5, **setting).state_dict()
    with pytest.raises(ValueError):
        get_policy("selective_backprop", 0.5).load_state_dict(saved)


@pytest.mark.parametrize("lost", [lambda w: None, lambda w: w[:-1], lambda w: w.double(), lambda w: 3.0])
def test_weights_that_do_not_fit_the_waiting_rows_are_refused(lost):
    def make():
        stats = SampleStats(loss=torch.ones(6), grad_norm=torch.ones(6))
        return SelectedBatches(
            [torch.rand(6)] * 2, nn.Identity(), get_policy("importance", 0.5), 4, forward=lambda *_: stats
        )

    batches = make()
    list(batches)
    state = batches.state_dict()
    make().load_state_dict(state)
    with pytest.raises(ValueError, match="weights"):
        make().load_state_dict({**state, "weights": lost(state["weights"])})


def test_the_state_loads_where_the_rows_go():
    """Saved on one device, continued on another (the meta device stands for it)."""
    stats = SampleStats(loss=torch.ones(6), grad_norm=torch.ones(6))
    batches = SelectedBatches(
        [torch.rand(6)], nn.Identity(), get_policy("importance", 0.5), 4, forward=lambda *_: stats
    )
    list(batches)
    other = SelectedBatches([], nn.Identity(), get_policy("importance", 0.5), 4, device="meta")
    other.load_state_dict(batches.state_dict())
    assert other._waiting.peek().device.type == other._buffer.peek().device.type == "meta"


@pytest.mark.parametrize("name", ["selective_backprop", "importance"])
def test_it_traces_as_one_graph(name, generator):
    plain, traced = get_policy(name, 0.3), get_policy(name, 0.3)
    compiled = torch.compile(lambda z, y: traced.select(z, y).indices, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        logits, targets = torch.randn(24, 5, generator=generator), torch.randint(5, (24,), generator=generator)
        assert torch.equal(compiled(logits, targets), plain.select(logits, targets).indices)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RULES)
def test_on_a_gpu_the_host_waits_for_nothing(name):
    policy = get_policy(name, 0.3)
    logits, targets = torch.randn(64, 10, device="cuda"), torch.zeros(64, dtype=torch.int64, device="cuda")
    more = (torch.rand(64, device="cuda"),) if name == "rho_loss" else ()
    policy.select(logits, targets, *more)  # compilation may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy.select(logits, targets, *more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
