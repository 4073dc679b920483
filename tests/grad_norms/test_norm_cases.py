"""Exact or loud: every case of the matrix, fresh random data each run, in every mode and precision."""

import re

import pytest
import torch

from tests.grad_norms import matrix, oracle, runs
from tests.grad_norms.cases import CASES
from tests.grad_norms.problem import EITHER, EXACT, REFUSED, Case, draw

PINNED = matrix.outcomes()
DTYPES = {"float32": torch.float32, "float64": torch.float64}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def seed(generator) -> int:
    return int(torch.randint(1 << 30, (), generator=generator))


# Compiled models, seconds each, run eagerly inside the context or are refused: their type makes no difference.
FLOAT32_ONLY = [case for case in CASES if case.half or case.section == "Compiled"]
RUNS = [(case, dtype) for case in CASES for dtype in DTYPES if dtype == "float32" or case not in FLOAT32_ONLY]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=[f"{case.id}-{dtype}" for case, dtype in RUNS])
def test_exact_or_refused(case: Case, dtype: str, seed: int):
    statuses = {}
    for mode in runs.MODES:
        outcome = runs.attempt(case, seed, DTYPES[dtype], mode)
        assert outcome.status in ("exact", "refused"), f"{mode}: {outcome.status}: {outcome.message}"
        if case.expect != EITHER:
            assert outcome.status == case.expect, f"{mode}: {outcome.message}"
        if outcome.status == REFUSED:
            assert re.search(case.message, outcome.message), f"{mode}: the message does not say it: {outcome.message}"
        statuses[mode] = outcome.status
    assert len(set(statuses.values())) == 1, f"the modes disagree: {statuses}"
    pinned = PINNED.get((case.section, case.name.replace("|", "/")))
    assert statuses["plain"] == pinned, f"the matrix says {pinned}: run python -m tests.grad_norms.matrix"
    if case.expect == EXACT and DTYPES[dtype] == torch.float64:
        the_samples_gradients_sum_to_the_batch_gradient(case, seed)


def the_samples_gradients_sum_to_the_batch_gradient(case: Case, seed: int):
    """Of the oracle: a case in which they did not would be none of ours to answer exactly."""
    sums = oracle.norms_of(case, seed).sums
    problem = draw(case, seed, torch.float64)
    model = problem.oracle_model or problem.model
    with torch.random.fork_rng(devices=[]):
        loss = problem.loss(model, problem.inputs, problem.shared)
    model.zero_grad(set_to_none=True)
    loss.backward()
    for name, p in model.named_parameters():
        if name in sums and p.grad is not None:
            scale = max(1.0, p.grad.abs().max().item())
            assert (p.grad - sums[name]).abs().max() <= 1e-9 * scale, name


def test_the_matrix_has_no_other_cases():
    assert set(PINNED) == {(case.section, case.name.replace("|", "/")) for case in CASES}


@pytest.fixture
def measured(seed):
    """A case that every fault below can be planted in, and its norms."""
    case = next(case for case in CASES if case.id == "Tied: embedding and head, padding_idx")
    norms = runs.measure(draw(case, seed))
    return case, seed, norms.total(), norms.by_layer()


FAULTS = {
    "a sample off by 1e-5": lambda total, layers: (total * torch.tensor([1, 1, 1 + 1e-5, 1, 1]), layers),
    "two samples swapped": lambda total, layers: (total[[1, 0, 2, 3, 4]], layers),
    "a sample missing": lambda total, layers: (total[:4], layers),
    "NaN": lambda total, layers: (total.index_fill(0, torch.tensor([4]), torch.nan), layers),
    "divided by N": lambda total, layers: (total / 5, layers),
    "squared": lambda total, layers: (total.square(), layers),
    "a layer off by 1e-5": lambda total, layers: (total, layers | {"mix": layers["mix"] * (1 + 1e-5)}),
    "a layer missing": lambda total, layers: (total, {k: v for k, v in layers.items() if k != "mix"}),
    "a layer of another name": lambda total, layers: (total, layers | {"other": layers["mix"]}),
    "the tied weight under the head's name": lambda total, layers: (total, layers | {"head": layers["embedding"]}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(measured, fault: str):
    case, seed, total, layers = measured
    oracle.check(total, layers, case, seed, torch.float32)
    with pytest.raises(AssertionError):
        oracle.check(*FAULTS[fault](total, layers), case, seed, torch.float32)


def test_a_changed_gradient_is_caught(seed):
    case = next(case for case in CASES if case.id == "Linear: 3-D, few positions")
    for mode, value in (("plain", 1e-7), ("fused", 1e-3), ("none", 0.0)):
        problem = draw(case, seed)
        runs.measure(problem, mode)
        runs.check_gradients(case, problem, seed, torch.float32, mode)
        weight = problem.model[0].weight
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad * (1 + value)
        with pytest.raises(AssertionError, match=r"\.grad"):
            runs.check_gradients(case, problem, seed, torch.float32, mode)
