"""IMPON beside its trajectory: features, the weight norm, learning rates that do not fit, standardized inputs."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from adaselect_kernels.samplers import get_sampler
from adaselect_kernels.samplers.impon import standardized_features

pytestmark = pytest.mark.usefixtures("one_thread")


def steps(sampler, losses, count):
    """`count` batches, observed with the losses [rows] of their rows; the rows."""
    seen = []
    while len(seen) < count:
        for rows in sampler:
            seen.append(rows)
            sampler.observe(losses[rows])
            if len(seen) == count:
                break
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.float64])
def test_dtypes_of_features(dtype, generator):
    x = torch.randint(0, 50, (90, 6), generator=generator)  # exact in all of them
    losses = torch.rand(90, generator=generator, dtype=torch.float64)
    settings = {"bank": 40, "learning_rate": 1e-5}
    sampler = get_sampler("impon", 90, 5, features=x.to(dtype), **settings)
    exact = get_sampler("impon", 90, 5, features=x.double(), **settings)
    for _ in range(3):
        for rows, rows_ in zip(sampler, exact, strict=True):
            assert rows == rows_
            sampler.observe(losses[rows])
            exact.observe(losses[rows])
    torch.testing.assert_close(sampler.theta, exact.theta, rtol=1e-12, atol=0)
    predicted = sampler.predict(torch.arange(90))
    assert predicted.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        predicted.double(), x.double() @ exact.theta[:-1] + exact.theta[-1], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("reference", [False, True])
def test_implementations_agree(reference, generator):
    x, losses = torch.randn(90, 6, generator=generator), torch.rand(90, generator=generator)
    impl = "reference" if reference else "auto"
    found = steps(get_sampler("impon", 90, 5, features=x, bank=40, learning_rate=0.01, impl=impl), losses, 9)
    assert found == steps(get_sampler("impon", 90, 5, features=x, bank=40, learning_rate=0.01), losses, 9)


def test_it_finds_the_rows_of_large_loss(generator):
    x = torch.randn(500, 4, generator=generator)
    losses = 2 + x @ torch.tensor([1.0, -0.5, 0.0, 0.25])
    settings = {"features": x, "bank": 100, "normalized": True}
    means = {}
    for lowest in (False, True):
        sampler = get_sampler("impon", 500, 10, lowest=lowest, **settings)
        rows = steps(sampler, losses, 100)
        later = [row for i, batch in enumerate(rows) if i % 5 for row in batch]  # not the first of an epoch
        means[lowest] = float(losses[later].mean())
    assert means[False] > 2.5  # of all rows it is 2
    assert means[True] < 1.5


def test_explored_rows_are_of_the_rest_of_the_bank(generator):
    x = torch.arange(40.0)[:, None]
    sampler = get_sampler("impon", 40, 10, features=x, bank=40, explore=0.5, learning_rate=1e-4)
    shown = set()
    for _ in range(60):
        for rows in sampler:
            assert len(set(rows)) == 10
            sampler._theta = torch.tensor([1.0, 0.0], dtype=torch.float64)
            best, sampler._emitted = rows, 1  # the next draw sees this theta
            sampler.observe(torch.zeros(0), rows=[])
            sampler._theta = torch.tensor([1.0, 0.0], dtype=torch.float64)
            best = sampler._draw().rows.tolist()
            assert set(best[:5]) == {35, 36, 37, 38, 39}
            assert max(best[5:]) < 35
            shown |= set(best[5:])
            sampler._told = 1
    assert shown == set(range(35))


def test_the_norm_is_that_of_all_weights_at_the_draw():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x = torch.randn(30, 2, dtype=torch.float64)
    sampler = get_sampler("impon", 30, 3, features=x, bank=10, model=model, learning_rate=0.01)
    rows = next(iter(sampler))
    norm = math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    sampler.observe(torch.ones(3))
    contexts = torch.cat([x[rows], torch.full((3, 1), norm, dtype=torch.float64)], 1)
    torch.testing.assert_close(sampler.theta, 0.01 * 2 / 3 * contexts.sum(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        sampler.predict(torch.tensor([4])), torch.cat([x[4], torch.tensor([3 * norm])])[None] @ sampler.theta
    )
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(RuntimeError, match="has diverged"):
        sampler.predict(torch.tensor([4]))


def test_a_function_of_rows():
    x, asked = torch.randn(60, 3), []

    def features(rows):
        asked.append(rows.tolist())
        return x[rows]

    sampler = get_sampler("impon", 60, 4, features=features, bank=20)
    with pytest.raises(RuntimeError, match="no size before"):
        _ = sampler.theta
    rows = next(iter(sampler))
    assert len(asked[0]) == 20
    assert set(rows) < set(asked[0])
    sampler.observe(torch.rand(4))
    assert asked[1] == rows
    assert sampler.theta.shape == (4,)
    fresh = get_sampler("impon", 60, 4, features=features, bank=20)
    fresh.load_state_dict(sampler.state_dict())
    assert torch.equal(fresh.theta, sampler.theta)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda rows: torch.zeros(len(rows) - 1, 2), ValueError, r"features must be \[20, D\]"),
        (lambda rows: torch.zeros(len(rows)), ValueError, r"flatten\(1\)"),
        (lambda rows: torch.zeros(len(rows), 2).long(), TypeError, "floats or uint8"),
        (lambda rows: [0.0] * len(rows), TypeError, "got list"),
    ],
)
def test_what_a_function_gives_is_checked(given, error, message):
    with pytest.raises(error, match=message):
        next(iter(get_sampler("impon", 60, 4, features=given, bank=20)))


def test_columns_may_not_change():
    sizes = iter((2, 3))
    sampler = get_sampler("impon", 60, 4, features=lambda rows: torch.zeros(len(rows), next(sizes)), bank=20)
    next(iter(sampler))
    with pytest.raises(ValueError, match="features gave 3 columns, 2 before"):
        sampler.observe(torch.rand(4))


def test_a_learning_rate_that_is_too_large_warns_once_and_then_stops(generator):
    x = 1e3 * torch.randn(60, 3, generator=generator)
    losses = torch.rand(60, generator=generator)
    sampler = get_sampler("impon", 60, 4, features=x, bank=2 * 4, learning_rate=0.1)
    with pytest.warns(UserWarning, match="got worse on the very rows") as found:
        steps(sampler, losses, 4)
    assert len(found) == 1
    sampler._theta *= 1e300
    sampler._warned = True
    with pytest.raises(RuntimeError, match=r"diverged: learning_rate=0\.1 is too large"):
        steps_from_here(sampler, losses)


def steps_from_here(sampler, losses):
    sampler._emitted = sampler._planned - 1
    sampler._resumed = True
    for rows in sampler:
        sampler._theta = torch.full_like(sampler._theta, 1e308)
        sampler.observe(losses[rows])


def test_normalized_steps_stay_stable(generator):
    x, losses = 1e3 * torch.randn(60, 3, generator=generator), torch.rand(60, generator=generator)
    x[::3] = 0
    sampler = get_sampler("impon", 60, 4, features=x, bank=8, normalized=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(sampler, losses, 60)
    assert bool((sampler.predict(torch.arange(60)).abs() < 100).all())


# ---- standardized features


@pytest.mark.parametrize("shape", [(50,), (50, 7), (50, 3, 10, 10)], ids=str)
def test_standardized(shape, generator):
    x = 5 + 3 * torch.randn(*shape, generator=generator)
    x.reshape(50, -1)[:, 0] = 7.0  # a constant column
    flat = x.numpy().astype(np.float64).reshape(50, -1)
    expected = (flat - flat.mean(0)) / (flat.std(0) + 1e-6)
    found = standardized_features(x)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(standardized_features(TensorDataset(x, torch.zeros(50))), found)
    half = standardized_features(x, dtype=torch.float16)
    assert torch.equal(half, found.half()) or (half.float() - found).abs().max() < 2e-3
    items = [{"pixels": row} for row in x]
    assert torch.equal(standardized_features(items, inputs=lambda item: item["pixels"]), found)


def test_standardized_bytes_and_more_columns_than_a_piece(generator):
    x = torch.randint(0, 256, (20, 3, 16, 16), generator=generator, dtype=torch.uint8)
    flat = x.flatten(1).double()
    expected = (flat - flat.mean(0)) / (flat.std(0, correction=0) + 1e-6)
    torch.testing.assert_close(standardized_features(x).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "settings", "error", "message"),
    [
        (torch.zeros(0, 3), {}, ValueError, r"must hold rows, got shape \(0, 3\)"),
        ([], {}, ValueError, "must hold rows, got none"),
        (iter(()), {}, TypeError, "a dataset with a length"),
        ([{"x": torch.zeros(3)}], {}, TypeError, "row 0 gives no input tensor but dict"),
        ([torch.zeros(3), torch.zeros(4)], {}, ValueError, "row 1 has an input of 4 values, the rows before 3"),
        (torch.zeros(2, 3), {"dtype": torch.int64}, TypeError, "float dtype"),
    ],
)
def test_what_cannot_be_standardized(source, settings, error, message):
    with pytest.raises(error, match=message):
        standardized_features(source, **settings)
