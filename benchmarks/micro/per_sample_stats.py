"""Per-sample loss and gradient norm over the number of classes, at a size that comes from memory: a bandwidth claim.

Contenders: ours; all_stats (ours, every statistic); naive; compiled; on CUDA ours in a graph and the cross-entropies of
liger-kernel, quack and flash-attn where they are installed (loss only, so they do less); read and copy of the logits.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels import per_sample_stats
from adaselect_kernels.options import STATS
from benchmarks import gate, naive, timing
from benchmarks.micro.case import (
    DTYPES,
    OURS,
    Case,
    Contender,
    Group,
    Unavailable,
    captured,
    compile_peer,
    floors,
    make_logits,
)
from benchmarks.timing import Prepared

WANTED = ("loss", "grad_norm")
CPU_BYTES, CPU_CLASSES = 96 << 20, (10, 100, 1000, 10_000, 32_000, 128_256)
CUDA_BYTES, CUDA_CLASSES = 1 << 30, (256, 1000, 32_000, 128_256, 262_144)
CUDA_SMALL = ((1_048_576, 10), (1_048_576, 100))


def _compilable(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return naive.loss_and_grad_norm_fusible(logits, targets)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise Unavailable(f"{package} is not installed or does not load: {timing.describe_error(error)}") from None


def _liger() -> Callable[[Tensor, Tensor], Tensor]:
    module = _import("liger_kernel.transformers.cross_entropy")
    return module.LigerCrossEntropyLoss(reduction="none")


def _quack() -> Callable[[Tensor, Tensor], Tensor]:
    module = _import("quack.cross_entropy")
    return partial(module.cross_entropy, reduction="none")


def _flash_attn() -> Callable[[Tensor, Tensor], Tensor]:
    module = _import("flash_attn.ops.triton.cross_entropy")
    return lambda logits, targets: module.cross_entropy_loss(logits, targets)[0]


LOSS_PEERS = {"liger": _liger, "quack": _quack, "flash_attn": _flash_attn}


def _loss_peer(name: str, inputs: list[tuple[Tensor, Tensor]], oracle: gate.RowOracle) -> Contender:
    """A published cross-entropy without gradient, on its own copies: some write into their logits."""

    def prepare() -> Prepared:
        function = torch.no_grad()(LOSS_PEERS[name]())
        return Prepared([partial(function, x.clone(), y) for x, y in inputs])

    def check() -> gate.Report:
        function = torch.no_grad()(LOSS_PEERS[name]())
        return gate.check_losses(function(inputs[0][0].clone(), inputs[0][1]), oracle)

    return Contender(name, "peer", prepare, check)


def stats_case(n: int, classes: int, dtype: str, quick: bool) -> Case:
    def build(device: torch.device, buffers: int) -> list[Contender]:
        inputs = [make_logits(n, classes, dtype, device, seed) for seed in range(buffers)]
        oracle = gate.RowOracle(*inputs[0], sampled=True)

        def ours(stats: Sequence[str]) -> list[Callable[[], Any]]:
            return [partial(per_sample_stats, x, y, stats=stats) for x, y in inputs]

        def gate_ours(stats: Sequence[str]) -> gate.Report:
            found = per_sample_stats(*inputs[0], stats=stats)
            return gate.check_stats({name: getattr(found, name) for name in stats}, oracle)

        def gate_naive() -> gate.Report:
            return gate.check_stats(naive.naive_stats(*inputs[0], WANTED), oracle)

        @cache
        def compiled() -> Callable[..., Any]:
            return compile_peer(_compilable, device, quick)

        def gate_compiled() -> gate.Report:
            losses, grad_norms = compiled()(*inputs[0])
            return gate.check_stats({"loss": losses, "grad_norm": grad_norms}, oracle, cancelling=True)

        found = [
            Contender(OURS, "ours", lambda: Prepared(ours(WANTED)), partial(gate_ours, WANTED)),
            Contender("all_stats", "part", lambda: Prepared(ours(STATS)), partial(gate_ours, STATS)),
            Contender(
                "naive",
                "peer",
                lambda: Prepared([partial(naive.naive_stats, x, y, WANTED) for x, y in inputs]),
                gate_naive,
            ),
            Contender(
                "compiled",
                "peer",
                lambda: Prepared([partial(compiled(), x, y) for x, y in inputs]),
                gate_compiled,
            ),
        ]
        if device.type == "cuda":
            found.append(Contender("ours_graph", "ours", lambda: captured(ours(WANTED)), partial(gate_ours, WANTED)))
            found += [_loss_peer(name, inputs, oracle) for name in LOSS_PEERS]
        return found + floors([x for x, _ in inputs])

    logits_bytes = n * classes * DTYPES[dtype].itemsize
    return Case(
        name=f"{n}x{classes} {dtype}",
        params={"n": n, "classes": classes, "dtype": dtype},
        input_bytes=logits_bytes,
        min_bytes=logits_bytes + 8 * n + 4 * n * len(WANTED),
        build=build,
    )


def rows_for(total_bytes: int, classes: int, dtype: str) -> int:
    """How many rows make `total_bytes`, rounded to a multiple of 8."""
    return max(8, total_bytes // (classes * DTYPES[dtype].itemsize) // 8 * 8)


def cases(device: torch.device, quick: bool) -> list[Case]:
    if quick:
        return [stats_case(24, 9, "float32", True), stats_case(16, 40, "bfloat16", True)]
    total, sweep = (CUDA_BYTES, CUDA_CLASSES) if device.type == "cuda" else (CPU_BYTES, CPU_CLASSES)
    small = CUDA_SMALL if device.type == "cuda" else ()
    return [
        stats_case(n, classes, dtype, False)
        for dtype in ("float32", "bfloat16")
        for n, classes in (*small, *((rows_for(total, c, dtype), c) for c in sweep))
    ]


GROUP = Group(
    "per_sample_stats", "Per-sample loss and gradient norm, over classes", cases, weight=3.0, families=("row_stats",)
)
