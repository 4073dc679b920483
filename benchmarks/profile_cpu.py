"""Where the time of a CPU selection goes, stage by stage, beside what bounds it: `python -m benchmarks.profile_cpu`.

Medians of 60 calls in microseconds, inputs in the cache. `exp` is torch.exp of the same logits and `read` their sum:
what one exponential a logit, and one read of them, cost on this machine at this moment.
"""

import time
from collections.abc import Callable

import torch

from adaselect_kernels import AdaSelectionOptions, AdaSelectionState, dispatch
from adaselect_kernels.options import METHODS, STATS

SHAPES = ((1024, 1000), (1024, 1024), (65_536, 10), (2048, 32_000))
CHOSEN = ("big_loss", "small_loss", "grad_norm", "uniform")


def median_us(call: Callable[[], object], repeats: int = 60) -> float:
    for _ in range(5):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2] * 1e6


def profile(n: int, classes: int) -> dict[str, float]:
    kernels = dispatch.resolve("cpu", torch.device("cpu"))
    codes = [METHODS.index(name) for name in CHOSEN]
    options = AdaSelectionOptions().packed
    logits, targets = torch.randn(n, classes), torch.randint(classes, (n,))
    state = AdaSelectionState.create(CHOSEN).buffer
    stats = [STATS.index("loss"), STATS.index("grad_norm")]
    losses, norms = kernels.per_sample_stats(logits, targets, stats, "sample", -100, 0.0)
    k = n // 5
    scores, _ = kernels.batch_scores(losses, norms, None, state, codes, k, 0, options)
    calls = {
        "fused": lambda: kernels.fused_select(
            logits, targets, state, codes, k, "sample", "index", -100, 0.0, 0, options
        ),
        "rows": lambda: kernels.per_sample_stats(logits, targets, stats, "sample", -100, 0.0),
        "batch": lambda: kernels.batch_scores(losses, norms, None, state, codes, k, 0, options),
        "without noise": lambda: kernels.batch_scores(losses, norms, None, None, codes[:3], k, 0, options),
        "top-k": lambda: kernels.select_topk(scores, k, True, "index"),
        "exp": lambda: torch.exp(logits),
        "read": lambda: logits.sum(),
    }
    return {name: median_us(call) for name, call in calls.items()}


def main() -> None:
    for i, shape in enumerate(SHAPES):
        found = profile(*shape)
        if i == 0:
            print("| N x C |", " | ".join(found), "|\n|---|" + "---|" * len(found))
        print(f"| {shape[0]:,} x {shape[1]:,} |", " | ".join(f"{us:,.0f}" for us in found.values()), "|")


if __name__ == "__main__":
    main()
