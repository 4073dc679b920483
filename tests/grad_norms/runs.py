"""Run a case and say what came of it; shared by the tests and the matrix."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adaselect_kernels import PerSampleGradNorm
from tests.grad_norms import oracle
from tests.grad_norms.problem import Case, Problem, draw

MODES = ("plain", "fused", "none")


class Outcome(NamedTuple):
    """status: "exact", "refused" (ValueError), "wrong" (a number that is not the oracle's), or "crashed"."""

    status: str
    message: str = ""
    error: float = 0.0  # largest relative error of a total


def measure(problem: Problem, mode: str = "plain") -> PerSampleGradNorm:
    """The problem's forward and backward inside the context, in torch's seeded stream."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with PerSampleGradNorm(problem.model, weight_gradients=mode, **problem.options) as norms:
            problem.backward(problem.model)
    return norms


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}


@lru_cache(maxsize=1)
def plain_gradients(case: Case, seed: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """What a plain forward and backward leaves in .grad, on a draw of its own (of the oracle's model if there is one)."""
    problem = draw(case, seed, dtype)
    model = problem.oracle_model or problem.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        problem.backward(model)
    return gradients(model)


def attempt(case: Case, seed: int, dtype: torch.dtype, mode: str = "plain") -> Outcome:
    """Run a fresh draw and hold its norms to the oracle."""
    problem = draw(case, seed, dtype)
    try:
        norms = measure(problem, mode)
        total, by_layer = norms.total(), norms.by_layer()
    except ValueError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("crashed", f"{type(error).__name__}: {error}")
    try:
        check_gradients(case, problem, seed, dtype, mode)
        if case.expect == "refused":
            return Outcome("wrong", "a number where there is none")
        assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), total.dtype
        assert not total.requires_grad, "total requires grad"
        return Outcome("exact", error=oracle.check(total, by_layer, case, seed, dtype))
    except AssertionError as error:
        return Outcome("wrong", str(error))


def dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def check_gradients(case: Case, problem: Problem, seed: int, dtype: torch.dtype, mode: str) -> None:
    """.grad: bit-identical to a plain backward's in "plain", close in "fused", untouched in "none"."""
    found = gradients(problem.model)
    if mode == "none":
        written = [name for name, gradient in found.items() if gradient is not None]
        assert not written, f'"none" wrote .grad of {written}'
        return
    plain = plain_gradients(case, seed, dtype)
    scale = max([0.0, *(dense(g).abs().max().item() for g in plain.values() if g is not None and g.numel())])
    for name, expected in plain.items():
        gradient = found[name]
        assert (gradient is None) == (expected is None), f".grad of {name} is {gradient}, plain {expected}"
        if expected is None:
            continue
        gradient, expected = dense(gradient), dense(expected)
        if mode == "plain" and case.identical and problem.oracle_model is None:
            assert torch.equal(gradient, expected), f".grad of {name} is not bit-identical to a plain backward's"
        else:
            tolerance = 1e-12 if dtype == torch.float64 else 2e-2 if case.half else 1e-5
            assert ((gradient - expected).abs() <= tolerance * scale).all(), f".grad of {name} is not close to plain's"
