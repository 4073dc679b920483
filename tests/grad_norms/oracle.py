"""What a per-sample gradient norm is, computed the slow way: one backward a sample, in float64, without the library."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.grad_norms.problem import ROUNDING_TOLERANCE, Case, Problem, draw

EPS32 = torch.finfo(torch.float32).eps
SMALL = 1e-3  # of a sample's total: a layer's norm below it is held to an absolute error


class Norms(NamedTuple):
    total: Tensor  # [N]
    by_layer: dict[str, Tensor]  # module name -> [N], of modules that own a counted parameter
    sums: dict[str, Tensor]  # parameter name -> sum over the samples of their gradients


def one_backward_a_sample(problem: Problem) -> Norms:
    """Norms and their layers in the problem's precision; its model's .grad is overwritten.

    A parameter belongs to the first module that holds it, in the order of named_modules().
    """
    model = problem.oracle_model or problem.model
    parameters = {
        name: p for name, p in model.named_parameters() if p.requires_grad and problem.counted(name) and p.numel()
    }
    squares = {name: torch.zeros(problem.n, dtype=torch.float64) for name in parameters}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    losses = None if problem.losses is None else problem.losses(model, problem.inputs, problem.shared)
    for i in range(problem.n):
        loss = problem.loss(model, problem.sample(problem.inputs, i), problem.shared) if losses is None else losses[i]
        if not loss.requires_grad:
            continue
        model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=losses is not None)
        for name, p in parameters.items():
            if p.grad is not None:
                gradient = p.grad.to_dense() if p.grad.is_sparse else p.grad
                squares[name][i] = gradient.double().square().sum()
                sums[name] += gradient
    layers: dict[str, Tensor] = {}
    for name, square in squares.items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0) + square
    total = sum(squares.values(), torch.zeros(problem.n, dtype=torch.float64))
    return Norms(total.sqrt(), {name: square.sqrt() for name, square in layers.items()}, sums)


@lru_cache(maxsize=1)
def norms_of(case: Case, seed: int) -> Norms:
    """Of a draw in float64: what all modes of a run are held to."""
    return one_backward_a_sample(draw(case, seed, torch.float64))


def relative_errors(found: Tensor, expected: Tensor, scale: Tensor) -> Tensor:
    """|found - expected| / scale; absolute where a sample's gradient is zero."""
    return (found.double() - expected).abs() / torch.where(scale > 0, scale, 1.0)


def worst_errors(total: Tensor, by_layer: dict[str, Tensor], expected: Norms) -> dict[str, float]:
    """Largest relative error over the samples: of the total under "total", else under the module's name.

    A module whose norm is a thousandth of the sample's total or less is measured against that.
    """
    found = {"total": relative_errors(total, expected.total, expected.total)}
    for name, norms in expected.by_layer.items():
        got = by_layer.get(name, torch.zeros_like(norms))
        found[f"layer {name!r}"] = relative_errors(got, norms, norms.clamp_min(SMALL * expected.total))
    return {name: errors.max().item() if errors.numel() else 0.0 for name, errors in found.items()}


def rounded(problem: Problem) -> Problem:
    """The float64 problem with its weights and inputs moved by random roundings of float32."""

    def move(leaf):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf.data.mul_(1 + EPS32 * (torch.rand_like(leaf) - 0.5))

    tree_map(move, (problem.inputs, problem.shared, list((problem.oracle_model or problem.model).parameters())))
    return problem


@lru_cache(maxsize=2)
def allowed_errors(case: Case, seed: int, dtype: torch.dtype, perturbations: int = 2) -> dict[str, float]:
    """The tolerance, and in float32 twice the rounding of the model's own arithmetic.

    That is the error of one backward a sample in float32, or, where that happens to come out well although the draw is
    an ill-conditioned one, what roundings of weights and inputs change. A half-precision total has its tolerance alone.
    """
    expected, tolerance = norms_of(case, seed), case.tolerance or ROUNDING_TOLERANCE[dtype]
    own = dict.fromkeys(("total", *(f"layer {name!r}" for name in expected.by_layer)), 0.0)
    if dtype == torch.float32:
        peers = [draw(case, seed, dtype), *(rounded(draw(case, seed, torch.float64)) for _ in range(perturbations))]
        for peer in map(one_backward_a_sample, peers):
            errors = worst_errors(peer.total, peer.by_layer, expected)
            own = {name: max(error, errors[name]) for name, error in own.items()}
        own["total"] *= not case.half
    return {name: tolerance + 2 * error for name, error in own.items()}


def check(total: Tensor, by_layer: dict[str, Tensor], case: Case, seed: int, dtype: torch.dtype) -> float:
    """Hold the norms of a draw to the oracle, element by element; returns the largest relative error of a total."""
    expected, allowed = norms_of(case, seed), allowed_errors(case, seed, dtype)
    shape = expected.total.shape
    assert total.shape == shape, f"total has shape {tuple(total.shape)}, expected {tuple(shape)}"
    strange = {name for name, norms in by_layer.items() if name not in expected.by_layer}
    assert not strange, f"by_layer names {strange}; the modules with counted parameters are {list(expected.by_layer)}"
    missing = {name for name, norms in expected.by_layer.items() if norms.any() and name not in by_layer}
    assert not missing, f"by_layer has no {missing}"
    for name, norms in by_layer.items():
        assert norms.shape == shape, f"layer {name!r} has shape {tuple(norms.shape)}"
        assert norms.isfinite().all(), f"layer {name!r} is not finite: {norms}"
    assert total.isfinite().all(), f"total is not finite: {total}"
    errors = worst_errors(total, by_layer, expected)
    if any(error > allowed[name] for name, error in errors.items()):
        allowed = allowed_errors(case, seed, dtype, perturbations=16)  # the conditioning of a rare draw, more closely
    for name, error in errors.items():
        assert error <= allowed[name], (
            f"{name}: relative error {error:.3g}, allowed {allowed[name]:.3g}; found {total if name == 'total' else ''},"
            f" expected {expected.total if name == 'total' else ''}"
        )
    return errors["total"]
