"""IMPON's scoring of a bank of n rows out of N and the pick of b, against naive PyTorch: index_select, mv, topk.

Contenders: ours; naive; compiled (torch.compile of it); on CUDA ours and naive in graphs; read and copy of as many bytes as
the bank's rows have. Every buffer draws another bank out of one set of features, so rows come from memory as in training,
where no bank is seen twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels.functional import bank_select
from benchmarks import gate
from benchmarks.micro.case import DTYPES, OURS, Case, Contender, Group, captured, compile_peer, floors
from benchmarks.timing import Prepared

BATCH = 32


def _naive(features: Tensor, rows: Tensor, theta: Tensor, norm: float, k: int) -> tuple[Tensor, Tensor]:
    x = features.index_select(0, rows).to(torch.float32)
    predictions = torch.mv(x, theta[:-1]) + norm * theta[-1]
    return rows[torch.topk(predictions, k, sorted=False).indices], predictions


def _check(function: Callable[[], Any], features: Tensor, rows: Tensor, theta: Tensor, norm: float) -> gate.Report:
    """Predictions within the rounding of a float32 sum of D terms; the rows picked are those of the best of them."""
    picked, predictions = function()
    x, t = features[rows].double(), theta.double()
    size = x.abs() @ t[:-1].abs() + abs(norm) * t[-1].abs()
    error = float(((predictions - (x @ t[:-1] + norm * t[-1])).abs() / size).max())
    report = {"prediction over its terms": error}
    if error > (x.shape[1] + 2) * torch.finfo(torch.float32).eps / 2:
        raise AssertionError(f"predictions are off by {error:g} of the sum of their terms")
    best = rows[torch.topk(predictions, len(picked)).indices]
    if not torch.equal(picked.sort().values, best.sort().values):
        raise AssertionError("other rows were picked than those of the best predictions")
    return report


def bank_case(total: int, columns: int, n: int, dtype: str) -> Case:
    k = min(BATCH, n)

    def build(device: torch.device, buffers: int) -> list[Contender]:
        generator = torch.Generator(device).manual_seed(0)
        features = torch.randn(total, columns, generator=generator, device=device).to(DTYPES[dtype])
        theta = torch.randn(columns + 1, generator=generator, device=device)
        banks = [torch.randperm(total, generator=generator, device=device)[:n] for _ in range(max(buffers, 2))]
        norm = 3.0
        ours = [partial(bank_select, features, rows, theta, k, norm=norm) for rows in banks]
        peer = [partial(_naive, features, rows, theta, norm, k) for rows in banks]

        def compiled() -> list[Callable[[], Any]]:
            function = compile_peer(_naive, device, quick=total < 1000)
            return [partial(function, features, rows, theta, norm, k) for rows in banks]

        def check(function: Callable[[], Any]) -> gate.Report:
            return _check(function, features, banks[0], theta, norm)

        found = [
            Contender(OURS, "ours", lambda: Prepared(ours), lambda: check(ours[0])),
            Contender("naive", "peer", lambda: Prepared(peer), lambda: check(peer[0])),
            Contender("compiled", "peer", lambda: Prepared(compiled()), lambda: check(compiled()[0])),
        ]
        if device.type == "cuda":
            found.append(Contender("ours_graph", "ours", lambda: captured(ours), lambda: check(ours[0])))
            found.append(Contender("naive_graph", "peer", lambda: captured(peer), lambda: check(peer[0])))
        return found + floors([features[rows] for rows in banks])

    size = torch.finfo(DTYPES[dtype]).bits // 8
    return Case(
        name=f"{n} of {total}x{columns} {dtype}",
        params={"n": n, "total": total, "columns": columns, "k": k, "dtype": dtype},
        input_bytes=size * n * columns,
        min_bytes=size * n * columns + 8 * n + 4 * (columns + 1) + 4 * n + 8 * k,
        build=build,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    if quick:
        return [bank_case(300, 33, 200, "float32"), bank_case(300, 16, 50, "bfloat16")]
    return [
        bank_case(50_000, 784, 200, "float32"),  # the paper's bank, of MNIST
        bank_case(50_000, 3072, 200, "float32"),  # of CIFAR-10
        bank_case(50_000, 3072, 200, "float16"),
        bank_case(50_000, 512, 4096, "float32"),
        bank_case(50_000, 512, 20_000, "float32"),
    ]


GROUP = Group(
    "bank_select", "A bank of rows scored by a linear model, the best picked", cases, families=("bank", "select")
)
