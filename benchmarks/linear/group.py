"""Scoring and losses whose logits are never stored, against those that store them and against the plain matrix product.

Contenders of "score" (all rows, four methods, with state update): ours (fused_linear_select); stats (linear_per_sample_stats,
loss and gradient norm); product (hidden @ weight.T and nothing else: the limit); naive (benchmarks/naive.py of stored logits);
compiled (torch.compile of it, in the form it fuses best); of the losses alone liger, cce, torch and torch_chunked.
Of "loss" (forward and backward of the chosen rows): ours (selected_linear_cross_entropy); full (the same of all rows); naive
(index, linear, cross_entropy); compiled; the libraries on the gathered rows; product (the three that loss and gradients need).
Of "backward": ours, full, naive, naive_full (all rows) and product (two). Of "stored" logits: ours (selected_cross_entropy),
full, naive. liger is liger-kernel, cce Apple's cut-cross-entropy, torch torch.nn.functional.linear_cross_entropy.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch

from benchmarks import gate
from benchmarks.linear.contenders import LOSS_ONLY, ROLES, make_call
from benchmarks.linear.memory import measure
from benchmarks.linear.oracle import LossOracle, ScoreOracle, check_loss, check_score
from benchmarks.linear.problem import Inputs, Problem
from benchmarks.micro.case import Case, Contender, Group, floors
from benchmarks.micro.fused_select import GAMMA
from benchmarks.timing import MIN_ROUNDS, Prepared

SCORE = ("ours", "stats", "product", "naive", "compiled", *LOSS_ONLY)
LOSS = ("ours", "full", "product", "naive", "compiled", *LOSS_ONLY)
BACKWARD = ("ours", "full", "product", "naive", "naive_full")
STORED = ("ours", "full", "naive")
SWEEP = ("ours", "stats", "product", "naive", "torch")  # over V: what compiles would take most of the time
BETWEEN = ("ours", "full", "product", "naive", "torch")  # rates between the ends, likewise
QUICK = ("ours", "full", "stats", "product", "naive", "naive_full", "compiled")  # what every version of torch has
GAMMAS = (0.1, 0.3, 0.5, 1.0)
MUST_HOLD = (2048, 512, 32_000)  # N, H, V of the targets on a CPU
CUDA_SHAPE = (8192, 4096, 131_072)
CUDA_CLASSES, CUDA_ROWS = (32_000, 262_144), (2048, 32_768)


def linear_case(
    problem: Problem,
    names: Sequence[str],
    quick: bool = False,
    *,
    rounds: int = MIN_ROUNDS,
    remember: Sequence[str] = (),
) -> Case:
    """remember: contenders whose memory is measured on a CPU, each in a process of its own. rounds: at least."""

    def build(device: torch.device, buffers: int) -> list[Contender]:
        inputs = [problem.make(device, seed) for seed in range(buffers)]
        check = _checker(problem, inputs[0])

        def contender(name: str) -> Contender:
            calls = cache(lambda: [make_call(name, problem, of, quick) for of in inputs])

            def extra_bytes() -> int | None:
                return measure(problem, name) if name in remember else None

            return Contender(
                name,
                ROLES.get(name, "peer"),
                lambda: Prepared(calls()),
                dict if name == "product" else lambda: check(name, calls()[0]()),
                extra_bytes if device.type == "cpu" else None,
            )

        found = [contender(name) for name in names]
        return found + (floors([of.hidden for of in inputs]) if problem.kind == "stored" else [])

    return Case(
        name=problem.name,
        params=problem.params,
        input_bytes=problem.input_bytes,
        min_bytes=problem.min_bytes,
        build=build,
        floor="" if problem.kind == "stored" else "product",
        rounds=rounds,
    )


def _checker(problem: Problem, inputs: Inputs) -> Callable[[str, tuple[torch.Tensor, ...]], gate.Report]:
    """The oracles are made when the first contender asks."""
    score = cache(partial(ScoreOracle, inputs))

    @cache
    def loss(every: bool) -> LossOracle:
        rows = torch.arange(problem.n, device=inputs.targets.device) if every else inputs.indices
        return LossOracle(problem, inputs, rows)

    def check(name: str, found: tuple[torch.Tensor, ...]) -> gate.Report:
        if problem.kind == "score":
            return check_score(name, found, score())
        return check_loss(name, found, loss(name.endswith("full")))

    return check


def cases(device: torch.device, quick: bool) -> list[Case]:
    if quick:
        tiny = (24, 16, 50, "float32")
        named = [("score", SCORE, GAMMA), ("loss", LOSS, 0.3), ("backward", BACKWARD, 0.1), ("stored", STORED, 0.3)]
        found = []
        for kind, names, gamma in named:
            remember = ("ours",) if kind == "score" else ()
            names = [name for name in names if name in QUICK]
            found.append(linear_case(Problem(kind, *tiny, gamma), names, True, remember=remember))
        found.append(linear_case(Problem("loss", *tiny, 1.0), ("ours", "full", "naive", "product"), True))
        return [*found, linear_case(Problem("score", 24, 16, 80, "float32", GAMMA), ("ours", "product"), True)]
    return _cuda_cases() if device.type == "cuda" else _cpu_cases()


def _cpu_cases() -> list[Case]:
    """Those with targets first: a run may be cut short."""
    n, hidden, classes = MUST_HOLD
    remembered = ("ours", "naive", "compiled", "cce", "torch", "torch_chunked")
    found = [
        linear_case(Problem("score", *MUST_HOLD, "float32", GAMMA), SCORE, rounds=8, remember=remembered),
        linear_case(Problem("backward", *MUST_HOLD, "float32", 0.1), BACKWARD, rounds=7),
    ]
    for gamma in GAMMAS:
        remember = tuple(name for name in remembered if name not in ("compiled", "cce")) if gamma in (0.1, 1.0) else ()
        names = LOSS if gamma in (0.1, 1.0) else BETWEEN
        found.append(linear_case(Problem("loss", n // 2, hidden, classes, "float32", gamma), names, remember=remember))
    found += [
        linear_case(Problem("score", 512, 256, v, "float32", GAMMA), SWEEP) for v in (2000, 8000, classes, 128_256)
    ]
    found.append(linear_case(Problem("score", n, 128, 8000, "float32", GAMMA), SWEEP))
    found.append(linear_case(Problem("score", 256, 256, classes, "bfloat16", GAMMA), (*SWEEP, "torch_chunked")))
    return [*found, linear_case(Problem("stored", n, 0, classes, "float32", 0.2), STORED)]


def _cuda_cases() -> list[Case]:
    n, hidden, classes = CUDA_SHAPE

    def score(n: int, classes: int) -> Case:
        return linear_case(Problem("score", n, hidden, classes, "bfloat16", GAMMA), SCORE)

    found = [score(n, classes)]
    found += [linear_case(Problem("loss", *CUDA_SHAPE, "bfloat16", gamma), LOSS) for gamma in GAMMAS]
    found.append(linear_case(Problem("backward", *CUDA_SHAPE, "bfloat16", 0.1), BACKWARD))
    found += [score(n, v) for v in CUDA_CLASSES]
    found += [score(rows, classes) for rows in CUDA_ROWS]
    return [*found, linear_case(Problem("stored", n, 0, classes, "bfloat16", 0.2), STORED)]


GROUP = Group(
    "linear",
    "Scores and losses at the scale of a vocabulary, logits not stored",
    cases,
    weight=5.0,
    memory=True,
    families=("linear", "row_stats", "select", "batch_stage"),
)
