"""Every sampler against an independent float64 NumPy implementation over 200 steps of training, batch by batch."""

import numpy as np
import pytest
import torch

from adaselect_kernels.samplers import get_sampler
from tests.samplers.regression import NumpyModel, TorchModel, problem

STEPS, CLASSES, COLUMNS = 200, 3, 5


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(sampler, x, y, model, after=None):
    """(rows, weights, losses) of each of STEPS steps; after(): called when each has been observed."""
    inputs, targets, steps = torch.from_numpy(x), torch.from_numpy(y), []
    while True:
        for rows in sampler:
            assert sampler.current.tolist() == rows
            weights = sampler.weights
            losses = model.step(inputs[rows], targets[rows], None if weights is None else weights.double())
            sampler.observe(losses)
            steps.append((rows, None if weights is None else weights.tolist(), losses.numpy()))
            if after is not None:
                after()
            if len(steps) == STEPS:
                return steps


def compare(steps, expected):
    assert len(steps) == len(expected) == STEPS
    for i, ((rows, weights, losses), (rows_, weights_, losses_)) in enumerate(zip(steps, expected, strict=True)):
        assert rows == rows_, i
        assert weights == pytest.approx(weights_) if weights_ is not None else weights is None, i
        np.testing.assert_allclose(losses, losses_, rtol=1e-9, atol=1e-12, err_msg=str(i))


def stream(seed):
    return torch.Generator().manual_seed(seed)


def permutation(n, generator):
    return torch.randperm(n, generator=generator).numpy()


def some_of(count, n, generator):
    """Fisher and Yates with the whole array, or the start of a permutation when that is much of it."""
    if 4 * count >= n:
        return permutation(n, generator)[:count]
    numbers = np.arange(n)
    for i, draw in enumerate(torch.randint(2**62, (count,), generator=generator).tolist()):
        j = i + draw % (n - i)
        numbers[[i, j]] = numbers[[j, i]]
    return numbers[:count]


IMPON_SETTINGS = {
    "plain": {"learning_rate": 0.01},
    "no model": {"learning_rate": 0.01, "with_model": False},
    "normalized": {"learning_rate": 0.5, "normalized": True},
    "lowest": {"learning_rate": 0.01, "lowest": True},
    "explore": {"learning_rate": 0.01, "explore": 0.3},
    "all explored": {"learning_rate": 0.01, "explore": 1.0},
    "function": {"learning_rate": 0.01, "function": True},
    "small set": {"learning_rate": 0.01, "rows": 37, "bank": None},
}


@pytest.mark.parametrize("settings", IMPON_SETTINGS.values(), ids=IMPON_SETTINGS.keys())
def test_impon(settings):
    settings = dict(settings)
    n = settings.pop("rows", 300)
    bank = settings.pop("bank", 60)
    with_model, function = settings.pop("with_model", True), settings.pop("function", False)
    x, y = problem(n)
    b, seed, rate = 8, 11, 0.3
    model = TorchModel(COLUMNS, CLASSES, rate)
    inputs = torch.from_numpy(x)
    sampler = get_sampler(
        "impon", n, b, features=(lambda rows: inputs[rows]) if function else inputs, bank=bank, seed=seed,
        model=model if with_model else None, **settings,
    )  # fmt: skip
    thetas = []
    steps = trained(sampler, x, y, model, lambda: thetas.append(sampler.theta.numpy().copy()))

    size = n if bank is None else bank
    generator, numpy_model = stream(seed), NumpyModel(COLUMNS, CLASSES, rate)
    m = int(np.floor(settings.get("explore", 0) * b + 0.5))
    expected, expected_thetas = [], []
    while len(expected) < STEPS:
        theta = np.zeros(COLUMNS + 1)
        for _ in range(-(-n // size)):
            drawn = some_of(size, n, generator)
            norm = numpy_model.norm() if with_model else 1.0
            context = np.concatenate([x[drawn], np.full((size, 1), norm)], 1)
            predicted = context @ theta if np.any(theta) else np.zeros(size)
            order = np.argsort(predicted if settings.get("lowest") else -predicted, kind="stable")
            places = np.sort(order[: b - m])
            if m == b:
                places = np.arange(b)
            elif m:
                rest = np.setdiff1d(np.arange(size), places)
                places = np.concatenate([places, rest[some_of(m, len(rest), generator)]])
            rows, c = drawn[places], context[places]
            losses = numpy_model.step(x[rows], y[rows])
            error = c @ theta - losses
            if settings.get("normalized"):
                error = error / (c**2).sum(1)
                theta = theta - settings["learning_rate"] * (error[:, None] * c).mean(0)
            else:
                theta = theta - settings["learning_rate"] * 2 * (error[:, None] * c).mean(0)
            expected.append((rows.tolist(), None, losses))
            expected_thetas.append(theta)
    compare(steps, expected[:STEPS])
    np.testing.assert_allclose(thetas, expected_thetas[:STEPS], rtol=1e-9, atol=1e-12)
    if m < b:
        assert np.abs(thetas[-1]).max() > 1e-3, "nothing was learned"


@pytest.mark.parametrize("name", ["p_sgd", "c_sgd"])
@pytest.mark.parametrize("given", [False, True], ids=["from losses", "confidences"])
def test_histories(name, given):
    n, b, seed, smoothing = 50, 7, 5, 0.02
    x, y = problem(n, seed=1)
    model, numpy_model = TorchModel(COLUMNS, CLASSES, 0.5), NumpyModel(COLUMNS, CLASSES, 0.5)
    sampler = get_sampler(name, n, b, smoothing=smoothing, seed=seed)
    if given:  # the same p_y, said outright beside losses that say nothing
        observe = sampler.observe
        sampler.observe = lambda losses: observe(torch.zeros_like(losses), confidences=torch.exp(-losses))
    steps = trained(sampler, x, y, model)

    generator, history, expected = stream(seed), [[] for _ in range(n)], []
    while len(expected) < STEPS:
        noise = torch.empty(n, dtype=torch.float64).exponential_(generator=generator).numpy()
        means = np.array([np.mean(h) if h else np.nan for h in history])
        weights = 1 - means if name == "p_sgd" else means * (1 - means)
        weights = np.where(np.isnan(means), 1.0 if name == "p_sgd" else 0.25, weights) + smoothing
        rows = np.sort(np.argsort(noise / weights)[:b])
        losses = numpy_model.step(x[rows], y[rows])
        for row, loss in zip(rows, losses, strict=True):
            history[row].append(np.exp(-loss))
        expected.append((rows.tolist(), None, losses))
    compare(steps, expected)
    assert sampler.epoch == STEPS // -(-n // b)


def test_infobatch():
    n, b, seed, epochs, ratio = 60, 8, 3, 33, 0.4
    x, y = problem(n, seed=2)
    model, numpy_model = TorchModel(COLUMNS, CLASSES, 0.5), NumpyModel(COLUMNS, CLASSES, 0.5)
    sampler = get_sampler("infobatch", n, b, epochs=epochs, ratio=ratio, full_share=0.2, seed=seed)
    steps = trained(sampler, x, y, model)

    generator, last, expected, pruned = stream(seed), np.full(n, np.nan), [], 0
    for epoch in range(100):
        full = epoch >= epochs - 7  # ceil(0.2 * 33) = 7
        below = np.zeros(n, bool) if full or np.isnan(last).all() else last < np.nanmean(last)
        coin = torch.rand(n, dtype=torch.float64, generator=generator).numpy()
        kept = np.flatnonzero(~(below & (coin < ratio)))
        pruned += n - len(kept)
        order = kept[permutation(len(kept), generator)]
        for rows in (order[i : i + b] for i in range(0, len(order), b)):
            weights = np.where(below[rows], 1 / (1 - ratio), 1.0)
            losses = numpy_model.step(x[rows], y[rows], weights.astype(np.float32).astype(np.float64))
            last[rows] = losses
            expected.append((rows.tolist(), weights.tolist() if below.any() else None, losses))
        if len(expected) >= STEPS:
            break
    compare(steps, expected[:STEPS])
    assert pruned > 100
    assert epoch > epochs - 6, "the full epochs were not reached"


@pytest.mark.parametrize(("name", "settings"), [("uniform", {}), ("rs2", {"gamma": 0.45})])
@pytest.mark.parametrize("drop_last", [False, True])
def test_uniform(name, settings, drop_last):
    n, b, seed = 50, 7, 9
    x, y = problem(n)
    model, numpy_model = TorchModel(COLUMNS, CLASSES, 0.1), NumpyModel(COLUMNS, CLASSES, 0.1)
    steps = trained(get_sampler(name, n, b, seed=seed, drop_last=drop_last, **settings), x, y, model)
    generator, expected = stream(seed), []
    k = 23 if settings else n  # floor(0.45 * 50 + 0.5)
    while len(expected) < STEPS:
        order = permutation(n, generator)[:k]
        for i in range(0, k // b * b if drop_last else k, b):
            rows = order[i : i + b]
            expected.append((rows.tolist(), None, numpy_model.step(x[rows], y[rows])))
    compare(steps, expected[:STEPS])
