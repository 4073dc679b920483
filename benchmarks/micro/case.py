"""What a benchmark group is made of: cases, their inputs, and the contenders that are timed on them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import records, timing
from benchmarks.gate import Report
from benchmarks.timing import Prepared

OURS = "ours"  # the contender every ratio is taken over
MIN_CAPTURED_CALLS = 16  # so that a graph's launch does not show in the time of a call


class Unavailable(Exception):
    """A contender that this machine cannot run; the message says why. It is noted, not an error."""


@dataclass(frozen=True)
class Contender:
    """prepare() compiles or captures what is to be timed; gate() raises unless its result on the first buffer is right.

    role: "ours", "part" (a stage of ours), "peer", or "floor" (read, copy, product).
    extra_bytes: how its memory is measured, None where it is not; by default by PyTorch's allocator.
    """

    name: str
    role: str
    prepare: Callable[[], Prepared]
    gate: Callable[[], Report] = dict
    extra_bytes: Callable[[], int | None] | None = None


@dataclass(frozen=True)
class Case:
    """One row of a table.

    params: what the report sorts and plots by (n, classes, dtype, ...).
    input_bytes, min_bytes: of one set of inputs; the fewest bytes the function must move.
    build: (device, buffers) -> contenders, with the inputs made; called once, just before the case is timed.
    finish: of a case whose callables are long samples that split themselves: {contender: record} to complete. Each is then
        called once to warm up and once a round, and what was compiled is kept for the next case.
    floor: the contender whose time is the floor of the case, where it is not that of its bytes.
    rounds: at least, where the time it is given holds fewer.
    """

    name: str
    params: dict[str, Any]
    input_bytes: int
    min_bytes: int
    build: Callable[[torch.device, int], Sequence[Contender]]
    finish: Callable[[dict[str, dict[str, Any]]], None] | None = None
    floor: str = ""
    rounds: int = timing.MIN_ROUNDS


@dataclass(frozen=True)
class Group:
    """cases(device, quick) -> the cases; fits(records) -> growth exponents.

    weight: share of a run's time; memory: also record the extra memory of a call; families: of records.FAMILIES, those it
    times, so that a change of another leaves its results current; resume: a run that the time limit cut short is continued
    by the next one of the same sources and environment; arguments: of the command, beyond the group's name.
    """

    name: str
    title: str
    cases: Callable[[torch.device, bool], Sequence[Case]]
    weight: float = 1.0
    memory: bool = False
    resume: bool = False
    arguments: str = ""
    families: tuple[str, ...] = records.SELECTION
    fits: Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]] = field(default=lambda records: [])


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_logits(n: int, classes: int, dtype: str, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Logits as an early network gives them: noise of scale 2, the target's logit raised on most rows."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, device=device).mul_(2.0)
    targets = torch.randint(classes, (n,), generator=generator, device=device)
    lift = torch.rand(n, generator=generator, device=device).mul_(6.0)
    logits.scatter_add_(1, targets[:, None], lift[:, None])
    return logits.to(DTYPES[dtype]), targets


def compile_peer(function: Callable[..., Any], device: torch.device, quick: bool, *, graphs: bool = False):
    """torch.compile of a naive function, shapes static. A quick run traces without generating code."""
    options: dict[str, Any] = {"backend": "aot_eager"} if quick else {}
    if graphs:
        if device.type != "cuda":
            raise Unavailable("CUDA graphs need a GPU")
        options = {"mode": "reduce-overhead"}
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


def captured(steps: Sequence[Callable[[], Any]]) -> Prepared:
    """A CUDA graph of at least MIN_CAPTURED_CALLS calls in turn over the steps, timed as one callable."""
    count = -(-MIN_CAPTURED_CALLS // len(steps)) * len(steps)
    graph, _ = timing.capture(list(itertools.islice(itertools.cycle(steps), count)))

    def replay(kept: Sequence[Callable[[], Any]] = steps) -> None:  # the steps own the tensors the graph uses
        graph.replay()

    return Prepared([replay], repeats=count)


def floors(tensors: Sequence[Tensor]) -> list[Contender]:
    """Read and copy of the main input, the bandwidth every other time is held against."""
    return [
        Contender("read", "floor", lambda: Prepared([timing.read_bytes(t) for t in tensors])),
        Contender("copy", "floor", lambda: Prepared([timing.copy_bytes(t) for t in tensors])),
    ]
