"""A browsing view of the same cases: `pytest benchmarks/micro --benchmark-only --benchmark-group-by=group`.

On the GPU when there is one. Figures that are published come from `python -m benchmarks run`, which interleaves the
contenders; here each runs by itself.
"""

import itertools

import pytest
import torch

from benchmarks import timing
from benchmarks.micro import GROUPS
from benchmarks.micro.case import Case, Unavailable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [(group.name, case) for group in GROUPS.values() for case in group.cases(DEVICE, False)]
CONTENDERS = ("ours", "naive", "compiled", "topk", "read")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(
    ("group", "case"), CASES, ids=[f"{group}-{case.name.replace(' ', '-')}" for group, case in CASES]
)
def test_time(benchmark, group: str, case: Case, contender: str) -> None:
    buffers = timing.buffer_count(case.input_bytes, timing.cache_bytes(DEVICE))
    found = {c.name: c for c in case.build(DEVICE, buffers)}
    if contender not in found:
        pytest.skip(f"{group} has no {contender}")
    try:
        found[contender].gate()
        calls = itertools.cycle(found[contender].prepare().calls)
    except Unavailable as error:
        pytest.skip(str(error))

    def once() -> None:
        next(calls)()
        timing.synchronize(DEVICE)

    benchmark.group = f"{group} {case.name}"
    benchmark(once)
