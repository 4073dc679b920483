"""The whole selection step with state update, four methods, gamma = 0.2, against naive eager and torch.compile of it.

Contenders: ours (impl="auto"); row_pass (per_sample_stats for loss and gradient norm: what of ours is the row pass);
naive (benchmarks/naive.py); on a CPU compiled_as_is (torch.compile of it); compiled (the same, in the form a compiler
fuses best); on CUDA ours, the row pass and naive in CUDA graphs (ours_graph, row_pass_graph, naive_graph) and
compiled_graph (torch.compile with mode="reduce-overhead"); read and copy of the logits.
A case "... scores" starts from losses and gradient norms instead of logits (select_from_losses).
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels import AdaSelectionState, fused_select, per_sample_stats, select_from_losses
from adaselect_kernels.checks import selected_count
from benchmarks import gate, naive
from benchmarks.micro.case import DTYPES, OURS, Case, Contender, Group, captured, compile_peer, floors, make_logits
from benchmarks.timing import Prepared

METHODS = ("big_loss", "small_loss", "grad_norm", "uniform")
GAMMA = 0.2
CONTENDERS = (OURS, "row_pass", "naive", "compiled", "compiled_as_is", "read", "copy")

CPU_SHAPES = ((128, 10), (128, 1000), (1024, 1000), (65_536, 10), (2048, 32_000), (512, 128_256))
# Those with targets first: compiling the peers takes most of the time, and a run may be cut short.
CUDA_CASES = (
    *(("float32", *shape) for shape in ((128, 10), (128, 100), (65_536, 1000))),
    *(("bfloat16", *shape) for shape in ((8192, 32_000), (1_048_576, 1000))),
    *(("float32", *shape) for shape in ((1_048_576, 100), (128, 1000), (1024, 1000), (65_536, 10))),  # caches
    *(("bfloat16", *shape) for shape in ((65_536, 1000), (1_048_576, 100), (2048, 128_256), (128, 10))),
    *(("float32", *shape) for shape in ((8192, 32_000), (2048, 128_256))),
)
QUICK_SHAPES = ((16, 10), (48, 33))


class NaiveRunner:
    """The function-style naive step with its state threaded from call to call.

    threading: "pass" hands the new state on; "clone" hands on copies, as a graph-replaying compiled function overwrites
    its results at its next call; "drop" computes it and starts every call from the same one, for capture in a graph.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, methods: Sequence[str], threading="pass"):
        self.function, self.methods, self.threading = function, methods, threading
        self.state = naive.fresh_state(len(methods), device)

    def step(self, logits: Tensor, targets: Tensor, k: int) -> naive.NaiveSelection:
        if self.threading == "clone":
            torch.compiler.cudagraph_mark_step_begin()
        chosen, state = self.function(logits, targets, k, self.methods, self.state)
        if self.threading == "pass":
            self.state = state
        elif self.threading == "clone":
            self.state = naive.NaiveState(*(t.clone() for t in state))
        return chosen


def naive_select_fusible(logits: Tensor, targets: Tensor, k: int, methods: Sequence[str], state: naive.NaiveState):
    """What the compiled peer compiles."""
    return naive.naive_select(logits, targets, k, methods, state, statistics=naive.loss_and_grad_norm_fusible)


def naive_select_from_losses(losses: Tensor, norms: Tensor, k: int, methods: Sequence[str], state: naive.NaiveState):
    """The naive step with the row statistics given."""
    return naive.naive_select(losses, norms, k, methods, state, statistics=lambda given, other: (given, other))


def select_contenders(
    n: int, classes: int, dtype: str, gamma: float, methods: Sequence[str], names: Sequence[str], quick: bool
) -> Callable[[torch.device, int], list[Contender]]:
    """The contenders `names` on [n, classes] logits; shared with the growth sweeps."""

    def build(device: torch.device, buffers: int) -> list[Contender]:
        inputs = [make_logits(n, classes, dtype, device, seed) for seed in range(buffers)]
        k = selected_count(gamma, n)
        rows = gate.RowOracle(*inputs[0])
        oracle = gate.SelectionOracle(rows, methods, gamma)

        def ours_steps() -> list[Callable[[], Any]]:
            state = AdaSelectionState.create(methods, device)
            return [partial(fused_select, x, y, gamma, methods=methods, state=state) for x, y in inputs]

        def naive_steps(function: Callable[..., Any], threading: str = "pass") -> list[Callable[[], Any]]:
            runner = NaiveRunner(function, device, methods, threading)
            return [partial(runner.step, x, y, k) for x, y in inputs]

        @cache
        def compiled(graphs: bool, form: Callable[..., Any] = naive_select_fusible) -> Callable[..., Any]:
            return compile_peer(form, device, quick, graphs=graphs)

        def gate_ours() -> gate.Report:
            state = AdaSelectionState.create(methods, device)
            chosen = fused_select(*inputs[0], gamma, methods=methods, state=state)
            return gate.check_selection(
                chosen.indices, chosen.scores, chosen.losses, oracle, method_losses=state.previous_losses
            )

        def gate_row_pass() -> gate.Report:
            found = per_sample_stats(*inputs[0])
            return gate.check_stats({name: getattr(found, name) for name in ("loss", "grad_norm")}, rows)

        def gate_naive() -> gate.Report:
            start = naive.fresh_state(len(methods), device)
            chosen, state = naive.naive_select(*inputs[0], k, methods, start, noise=oracle.noise)
            return gate.check_selection(*chosen, oracle, method_losses=state.previous_losses, peer=True)

        def gate_compiled(graphs: bool, *form: Callable[..., Any]) -> gate.Report:
            chosen, state = compiled(graphs, *form)(*inputs[0], k, methods, naive.fresh_state(len(methods), device))
            return gate.check_selection(
                chosen.indices,
                chosen.scores,
                chosen.losses,
                oracle,
                method_losses=state.previous_losses,
                same_noise=False,
                peer=True,
                cancelling=True,
            )

        every = [
            Contender(OURS, "ours", lambda: Prepared(ours_steps()), gate_ours),
            Contender(
                "row_pass",
                "part",
                lambda: Prepared([partial(per_sample_stats, x, y) for x, y in inputs]),
                gate_row_pass,
            ),
            Contender("naive", "peer", lambda: Prepared(naive_steps(naive.naive_select)), gate_naive),
            Contender(
                "compiled", "peer", lambda: Prepared(naive_steps(compiled(False))), partial(gate_compiled, False)
            ),
            Contender(
                "compiled_as_is",
                "peer",
                lambda: Prepared(naive_steps(compiled(False, naive.naive_select))),
                partial(gate_compiled, False, naive.naive_select),
            ),
        ]
        if device.type == "cuda":
            every += [
                Contender("ours_graph", "ours", lambda: captured(ours_steps()), gate_ours),
                Contender(
                    "row_pass_graph",
                    "part",
                    lambda: captured([partial(per_sample_stats, x, y) for x, y in inputs]),
                    gate_row_pass,
                ),
                Contender("naive_graph", "peer", lambda: captured(naive_steps(naive.naive_select, "drop")), gate_naive),
                Contender(
                    "compiled_graph",
                    "peer",
                    lambda: Prepared(naive_steps(compiled(True), "clone")),
                    partial(gate_compiled, True),
                ),
            ]
        every += floors([x for x, _ in inputs])
        return [contender for contender in every if contender.name.removesuffix("_graph") in names]

    return build


def select_case(
    n: int,
    classes: int,
    dtype: str,
    quick: bool,
    *,
    gamma: float = GAMMA,
    methods: Sequence[str] = METHODS,
    names: Sequence[str] = CONTENDERS,
    **params: Any,
) -> Case:
    logits_bytes = n * classes * DTYPES[dtype].itemsize
    return Case(
        name=f"{n}x{classes} {dtype}",
        params={"n": n, "classes": classes, "dtype": dtype, "gamma": gamma, "methods": len(methods)} | params,
        input_bytes=logits_bytes,
        min_bytes=logits_bytes + 8 * n + 8 * n + 8 * selected_count(gamma, n),  # targets; losses and scores; indices
        build=select_contenders(n, classes, dtype, gamma, methods, names, quick),
    )


def scores_case(n: int) -> Case:
    """Selection from given losses: what large N costs without the row pass."""

    def build(device: torch.device, buffers: int) -> list[Contender]:
        generator = torch.Generator(device).manual_seed(0)
        # one [2, N] tensor a buffer: losses and gradient norms
        inputs = [torch.empty(2, n, device=device).exponential_(generator=generator) for _ in range(buffers)]
        k = selected_count(GAMMA, n)

        def ours_steps() -> list[Callable[[], Any]]:
            state = AdaSelectionState.create(METHODS, device)
            return [
                partial(select_from_losses, losses, GAMMA, grad_norms=norms, methods=METHODS, state=state)
                for losses, norms in inputs
            ]

        def gate_ours() -> gate.Report:
            state = AdaSelectionState.create(METHODS, device)
            chosen = select_from_losses(inputs[0][0], GAMMA, grad_norms=inputs[0][1], methods=METHODS, state=state)
            return gate.check_topk(chosen.indices, chosen.scores, k, exact_ties=True)

        runner = NaiveRunner(naive_select_from_losses, device, METHODS)
        naive_steps = [partial(runner.step, losses, norms, k) for losses, norms in inputs]
        found = [
            Contender(OURS, "ours", lambda: Prepared(ours_steps()), gate_ours),
            Contender("naive", "peer", lambda: Prepared(naive_steps)),
        ]
        if device.type == "cuda":
            found.append(Contender("ours_graph", "ours", lambda: captured(ours_steps()), gate_ours))
        return found + floors(inputs)

    return Case(
        name=f"{n} scores",
        params={"n": n, "classes": 0, "dtype": "float32", "gamma": GAMMA, "methods": len(METHODS)},
        input_bytes=8 * n,
        min_bytes=8 * n + 4 * n + 8 * selected_count(GAMMA, n),
        build=build,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    if quick:
        return [select_case(n, c, "float32", True) for n, c in QUICK_SHAPES] + [scores_case(500)]
    if device.type == "cuda":
        names = tuple(name for name in CONTENDERS if name != "compiled_as_is")
        found = [select_case(n, c, dtype, False, names=names) for dtype, n, c in CUDA_CASES]
        return [*found[:5], scores_case(4 << 20), *found[5:]]
    found = [select_case(n, c, dtype, False) for dtype in ("float32", "bfloat16") for n, c in CPU_SHAPES]
    return [*found, scores_case(1 << 20)]


GROUP = Group("fused_select", "Selection step, four methods, with state update", cases, weight=4.0)
