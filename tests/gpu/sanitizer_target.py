"""Runs every kernel once, on small inputs, for compute-sanitizer: `compute-sanitizer --tool memcheck python <this file>`.

It checks nothing itself: the tests beside it do. Sizes are odd, so that masks cut blocks everywhere.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from adaselect_kernels import (
    AdaSelectionOptions,
    AdaSelectionState,
    dispatch,
    fused_linear_select,
    fused_select,
    get_policy,
    linear_per_sample_stats,
    per_sample_stats,
    select_from_losses,
    select_topk,
)
from adaselect_kernels.functional import bank_select, select_mask
from adaselect_kernels.options import METHODS, STATS

OURS = AdaSelectionOptions(update="log_ratio", standardize=True, weight_floor=0.1, curriculum_power=-0.5)
SELECTED = AdaSelectionOptions(method_loss="selected")


def paths(device: torch.device) -> dict[str, Callable[[], Any]]:
    """A call for each path of the Triton kernels, by what it is there for."""

    def batch(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.randn(shape, device=device).to(dtype)
        return logits, torch.randint(shape[-1], shape[:-1], device=device)

    def select(*shape: int, dtype: torch.dtype = torch.float32, **keywords: Any) -> Callable[[], Any]:
        state = AdaSelectionState.create(METHODS, device)
        return lambda: fused_select(
            *batch(*shape, dtype=dtype), 0.3, methods=METHODS, state=state, impl="triton", **keywords
        )

    def stats(*shape: int, dtype: torch.dtype = torch.float32, transposed: bool = False, **keywords: Any):
        def call() -> Any:
            logits, targets = batch(*shape, dtype=dtype)
            if transposed:
                logits = logits.t().contiguous().t()
            return per_sample_stats(logits, targets, stats=STATS, impl="triton", **keywords)

        return call

    def topk(n: int, k: int, **keywords: Any) -> Callable[[], Any]:
        return lambda: select_topk(torch.randn(n, device=device).round(decimals=1), k, impl="triton", **keywords)

    def bank(n: int, dtype: torch.dtype) -> Callable[[], Any]:
        features, rows = torch.randn(301, 37, device=device).to(dtype), torch.randint(301, (n,), device=device)
        return lambda: bank_select(features, rows, torch.randn(38, device=device), n // 7, impl="triton")

    def baseline(method: str, n: int) -> Callable[[], Any]:
        policy = get_policy(method, 0.3)
        return lambda: policy.select(*batch(n, 10))

    def losses(n: int, options: AdaSelectionOptions) -> Callable[[], Any]:
        state = AdaSelectionState.create(METHODS, device)
        values = torch.randn(2, n, device=device).square()
        return lambda: select_from_losses(
            values[0], 0.3, grad_norms=values[1], methods=METHODS, state=state, options=options, impl="triton"
        )

    found = {
        "one launch": select(128, 10),
        "one launch, bfloat16, by score": select(1021, 33, dtype=torch.bfloat16, order="score"),
        "one launch, float64": select(100, 17, dtype=torch.float64, options=OURS),
        "launches in turn": select(4999, 10),
        "one program after the rows": select(61, 5003, label_smoothing=0.1),
        "samples of several positions": select(37, 5, 11),
        "both ends": baseline("coreset1", 4999),
        "both ends, one program": baseline("coreset1", 61),
        "a baseline": baseline("grad_norm", 4999),
        "rows in a tile": stats(301, 1000),
        "rows off the boundary": stats(301, 37, dtype=torch.bfloat16),
        "transposed": stats(301, 37, transposed=True),
        "streamed rows": stats(301, 9001, label_smoothing=0.1),
        "split rows": stats(3, 40_001, dtype=torch.bfloat16),
        "top-k, compared": topk(100, 20, order="score"),
        "top-k, one program": topk(3001, 700, order="index"),
        "top-k, radix": topk(20_011, 4000, order="index"),
        "top-k, radix, ranked": topk(20_011, 4000, largest=False, order="score"),
        "top-k, radix, sorted": topk(20_011, 9001, order="score"),
        "a bank": bank(201, torch.bfloat16),
        "losses, one program": losses(1000, OURS),
        "losses, in turn": losses(5003, OURS),
        "losses, method losses of the selected": losses(5003, SELECTED),
    }
    return found | _linear(device) | _losses(device) | _gradient_norms(device)


def _linear(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Scoring from hidden states: through descriptors where rows are at multiples of 16 bytes, else through pointers."""

    def operands(n: int, classes: int, features: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        targets = torch.randint(classes, (n,), device=device)
        targets[::3] = -100
        hidden, weight = (torch.randn(rows, features, device=device).to(dtype) for rows in (n, classes))
        return hidden, weight, targets, torch.randn(classes, device=device).to(dtype)

    def stats(n: int, classes: int, features: int, dtype: torch.dtype, names: tuple[str, ...]) -> Callable[[], Any]:
        hidden, weight, targets, bias = operands(n, classes, features, dtype)
        return lambda: linear_per_sample_stats(
            hidden, weight, targets, bias=bias, softcap=5.0, stats=names, label_smoothing=0.1, impl="triton"
        )

    def select(n: int, classes: int, features: int, dtype: torch.dtype, **keywords: Any) -> Callable[[], Any]:
        hidden, weight, targets, bias = operands(n, classes, features, dtype)
        return lambda: fused_linear_select(
            hidden, weight, targets, 0.3, bias=bias, methods=METHODS, impl="triton", **keywords
        )

    return {
        "hidden states, selection": select(301, 1003, 72, torch.bfloat16),
        "hidden states, selection, a stride": select(301, 1003, 72, torch.bfloat16, vocab_stride=3),
        "hidden states, off the boundary": select(61, 5003, 37, torch.bfloat16),
        "hidden states, every statistic": stats(301, 1003, 72, torch.bfloat16, STATS),
        "hidden states, float32": stats(131, 301, 37, torch.float32, STATS),
        "hidden states, float64": stats(67, 101, 37, torch.float64, STATS),
    }


def _losses(device: torch.device) -> dict[str, Callable[[], Any]]:
    operators = dispatch.resolve("triton", device)

    def rows(n: int, classes: int) -> tuple[torch.Tensor, ...]:
        """Weights, half of them 0, targets and lse."""
        weight = torch.rand(n, device=device)
        return weight * (weight > 0.5), torch.randint(classes, (n,), device=device), torch.rand(n, device=device)

    def stored(n: int, classes: int, dtype: torch.dtype = torch.float32) -> Callable[[], Any]:
        weight, targets, lse = rows(n, classes)
        logits = torch.randn(n, classes, device=device).to(dtype)
        return lambda: operators.cross_entropy_backward(weight, logits, targets, lse, 0.1, 5.0, 0.01)

    def linear(n: int, classes: int, dtype: torch.dtype) -> Callable[[], Any]:
        weight, targets, lse = rows(n, classes)
        hidden, classifier = (torch.randn(size, 24, device=device).to(dtype) for size in (n, classes))
        bias = torch.randn(classes, device=device).to(dtype)
        return lambda: operators.linear_loss_backward(
            weight, hidden, classifier, targets, lse, bias, 0, classes, 0.1, 5.0, 0.5, 0.01, [True] * 3
        )

    def mask(rows: int, n: int) -> Callable[[], Any]:
        return lambda: select_mask(torch.randn(rows, n, device=device).log(), 0.3, per_sequence=True, impl="triton")

    return {
        "gradient, short rows": stored(301, 37),
        "gradient, long rows off the boundary": stored(37, 5003),
        "gradient, long rows, bfloat16": stored(37, 5000, torch.bfloat16),
        "gradient, a classifier": linear(61, 5003, torch.bfloat16),
        "gradient, a classifier, float32": linear(61, 301, torch.float32),
        "mask, a row a program": mask(37, 3001),
        "mask, steps": mask(1, 20_011),
    }


def _gradient_norms(device: torch.device) -> dict[str, Callable[[], Any]]:
    operators = dispatch.resolve("triton", device)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    def linear(form: str) -> Callable[[], Any]:
        return lambda: operators.linear_grad_sq_norms(random(3, 37, 19), random(3, 37, 21), True, True, form)

    def conv(channels: int, out: int, groups: int, form: str = "auto") -> Callable[[], Any]:
        return lambda: operators.conv_grad_sq_norms(
            random(2, channels, 9, 7), random(2, out, 9, 7), [3, 3], [1, 1], [1, 1], [1, 1], groups, True, True, form
        )

    ids = torch.randint(13, (3, 71), device=device)
    return {
        "gradient norms, direct": linear("direct"),
        "gradient norms, gram": linear("gram"),
        "gradient norms, one position": lambda: operators.linear_grad_sq_norms(
            random(5, 1, 19), random(5, 1, 21), True, True, "auto"
        ),
        "gradient norms, fused": lambda: operators.linear_grads_and_sq_norms(
            random(4, 2048, 64), random(4, 2048, 64), True
        ),
        "gradient norms, convolution": conv(5, 6, 1, "direct"),
        "gradient norms, convolution, gram": conv(5, 6, 1, "gram"),
        "gradient norms, grouped": conv(6, 4, 2),
        "gradient norms, depthwise": conv(6, 6, 6),
        "gradient norms, affine": lambda: operators.affine_grad_sq_norms(
            random(3, 71, 19), random(3, 71, 19), random(3, 71, 1), random(3, 71, 1), True, True
        ),
        "gradient norms, embedding": lambda: operators.embedding_grad_sq_norms(ids, random(3, 71, 19), 2),
    }


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    torch.manual_seed(0)
    for name, call in paths(device).items():
        call()
        torch.cuda.synchronize()
        print(name, flush=True)
    if dispatch.CUDA_EXTENSION is not None:
        ids, grads = torch.randint(13, (3, 71), device=device), torch.randn(3, 71, 19, device=device)
        torch.ops.adaselect_cuda.embedding_grad_sq_norms(ids, grads, 2)
        torch.cuda.synchronize()
        print("embedding in CUDA C++", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
