"""The batches that training scored, selected from again: method weights, and the cost of selection beside naive PyTorch."""

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels import dispatch
from adaselect_kernels.checks import selected_count
from adaselect_kernels.demo.config import DemoConfig, Variant
from adaselect_kernels.doctor import compare_choices
from adaselect_kernels.functional import Selection
from adaselect_kernels.policies import Policy, get_policy
from adaselect_kernels.reference import philox_uniform

Batches = Sequence[tuple[Tensor, Tensor]]  # logits [N, C], targets [N]

ROUNDS = 15  # over all batches, the contenders taking turns
NEAR_TIE = 1e-4  # of the k-th best score: naive PyTorch carries its method weights in float32 over all steps
NAIVE = Path("benchmarks") / "naive.py"


def new_policy(config: DemoConfig, variant: Variant, seed: int) -> Policy:
    """The policy of `variant`, with a fresh state."""
    assert variant.policy is not None
    extra = {"methods": variant.methods} if variant.methods else {}
    return get_policy(variant.policy, config.gamma, seed=seed, **extra)


def method_weights(policy: Policy, batches: Batches) -> list[list[float]]:
    """The weights after every batch: selection is deterministic, so these are the ones training had."""
    history = []
    for logits, targets in batches:
        policy.select(logits, targets)
        history.append(policy.state.weights.tolist())
    return history


def load_naive() -> ModuleType | None:
    """benchmarks/naive.py of the checkout that this package runs from; None for an installed package."""
    path = Path(__file__).parents[2] / NAIVE
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("adaselect_naive", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def selection_cost(config: DemoConfig, variant: Variant, seed: int, batches: Batches) -> dict[str, Any]:
    """Microseconds a call of the kernels and of naive PyTorch on `batches`, and whether both choose the same rows."""
    naive = load_naive()
    contenders: dict[str, Callable[[], object]] = {
        "kernels": lambda: _select_all(new_policy(config, variant, seed), batches)
    }
    if naive is not None:
        contenders["naive"] = lambda: _naive_all(naive, config, variant, batches, noises=None)
    times = _interleaved_times(contenders, len(batches))
    first_logits = batches[0][0]
    cost = {
        "variant": variant.label,
        "implementation": "reference" if dispatch.EXTENSION is None else "cpu",
        "shape": list(first_logits.shape),
        "batches": len(batches),
        "microseconds": {name: {"median": median(t), "rounds": t} for name, t in times.items()},
        "naive_over_kernels": None,
        "agreement": None,
    }
    if naive is not None:
        cost["naive_over_kernels"] = median([n / k for n, k in zip(times["naive"], times["kernels"], strict=True)])
        cost["agreement"] = _agreement(naive, config, variant, seed, batches)
    return cost


def _select_all(policy: Policy, batches: Batches) -> list[Selection]:
    return [policy.select(logits, targets) for logits, targets in batches]


def _naive_all(
    naive: ModuleType, config: DemoConfig, variant: Variant, batches: Batches, noises: Sequence[Tensor] | None
) -> list[Tensor]:
    """Rows naive PyTorch chooses; noises: those of "uniform" in each batch, None to draw them as a user would."""
    state = naive.fresh_state(len(variant.methods))
    k = selected_count(config.gamma, config.batch_size)
    chosen = []
    for i, (logits, targets) in enumerate(batches):
        noise = None if noises is None else noises[i]
        selection, state = naive.naive_select(logits, targets, k, variant.methods, state, noise=noise)
        chosen.append(selection.indices)
    return chosen


def _agreement(naive: ModuleType, config: DemoConfig, variant: Variant, seed: int, batches: Batches) -> dict[str, int]:
    """Both select from the same batches with the same noise: rows that only one of them chose."""
    steps = torch.arange(1, len(batches) + 1, dtype=torch.float64)
    noises = [
        -philox_uniform(len(targets), step, seed).float().log()
        for step, (_, targets) in zip(steps, batches, strict=True)
    ]
    ours = _select_all(new_policy(config, variant, seed), batches)
    theirs = _naive_all(naive, config, variant, batches, noises)
    found = [compare_choices(a.indices, b, a.scores, NEAR_TIE) for a, b in zip(ours, theirs, strict=True)]
    return {
        "rows": sum(len(a.indices) for a in ours),
        "near_ties": sum(one.near_ties for one in found),
        "wrong": sum(one.wrong for one in found),
    }


def _interleaved_times(contenders: dict[str, Callable[[], object]], calls: int) -> dict[str, list[float]]:
    """Microseconds a call in every round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for counted in (False, *[True] * ROUNDS):
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            if counted:
                times[name].append(1e6 * (time.perf_counter() - start) / calls)
    return times
