"""Exact or loud: every case of the matrix, fresh random data each run, in every mode and precision."""

import re

import pytest
import torch

from tests.grad_norms import oracle, runs
from tests.grad_norms.cases import CASES
from tests.grad_norms.problem import EITHER, EXACT, REFUSED, Case, draw

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are tiny: threads that wait for each other would be most of the time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seed(generator) -> int:
    return int(torch.randint(1 << 30, (), generator=generator))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_exact_or_refused(case: Case, dtype: str, seed: int):
    if case.half and dtype == "float64":
        pytest.skip("a case about a lower precision")
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


@pytest.mark.parametrize("case", [c for c in CASES if c.expect == EXACT and not c.half], ids=lambda case: case.id)
def test_the_samples_gradients_sum_to_the_batch_gradient(case: Case, seed: int):
    """Of the oracle: a case in which they did not would be none of ours to answer exactly."""
    expected = oracle.one_backward_a_sample(draw(case, seed, torch.float64))
    problem = draw(case, seed, torch.float64)
    model = problem.oracle_model or problem.model
    with torch.random.fork_rng(devices=[]):
        loss = problem.loss(model, problem.inputs, problem.shared)
    model.zero_grad(set_to_none=True)
    loss.backward()
    for name, p in model.named_parameters():
        if name in expected.sums and p.grad is not None:
            scale = max(1.0, p.grad.abs().max().item())
            assert (p.grad - expected.sums[name]).abs().max() <= 1e-9 * scale, name
