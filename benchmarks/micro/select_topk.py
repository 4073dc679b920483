"""select_topk(order="index") of one row of N scores against torch.topk(sorted=False), which leaves its rows unordered.

Contenders: ours; topk (torch.topk); topk_sorted_rows (torch.topk and a sort of the rows: the same result up to ties);
on CUDA ours and torch.topk in graphs; read and copy of the scores. A case "ties" has 256 distinct scores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels import select_topk
from benchmarks import gate
from benchmarks.micro.case import OURS, Case, Contender, Group, captured, floors
from benchmarks.timing import Prepared

MILLION = 1 << 20


def _scores(n: int, ties: bool, device: torch.device, seed: int) -> Tensor:
    """Log-normal, as softmax importances are; or 256 distinct values."""
    generator = torch.Generator(device).manual_seed(seed)
    if ties:
        return torch.randint(256, (n,), generator=generator, device=device).to(torch.float32)
    return torch.randn(n, generator=generator, device=device).exp_().div_(n)


def topk_case(n: int, share: float, *, ties: bool = False) -> Case:
    k = int(n * share)

    def build(device: torch.device, buffers: int) -> list[Contender]:
        inputs = [_scores(n, ties, device, seed) for seed in range(buffers)]
        ours = [partial(select_topk, scores, k, order="index") for scores in inputs]
        peer = [partial(torch.topk, scores, k, sorted=False) for scores in inputs]

        def sorted_rows(scores: Tensor) -> Tensor:
            return torch.topk(scores, k, sorted=False).indices.sort().values

        def check(function: Callable[[], Any], exact: bool) -> gate.Report:
            found = function()
            return gate.check_topk(
                found if isinstance(found, Tensor) else found.indices, inputs[0], k, exact_ties=exact
            )

        found = [
            Contender(OURS, "ours", lambda: Prepared(ours), lambda: check(ours[0], True)),
            Contender("topk", "peer", lambda: Prepared(peer), lambda: check(peer[0], False)),
            Contender(
                "topk_sorted_rows",
                "peer",
                lambda: Prepared([partial(sorted_rows, scores) for scores in inputs]),
                lambda: check(partial(sorted_rows, inputs[0]), False),
            ),
        ]
        if device.type == "cuda":
            found.append(Contender("ours_graph", "ours", lambda: captured(ours), lambda: check(ours[0], True)))
            found.append(Contender("topk_graph", "peer", lambda: captured(peer), lambda: check(peer[0], False)))
        return found + floors(inputs)

    return Case(
        name=f"{n} k={share:g}N{' ties' if ties else ''}",
        params={"n": n, "k": k, "share": share, "ties": ties},
        input_bytes=4 * n,
        min_bytes=4 * n + 8 * k,
        build=build,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    if quick:
        return [topk_case(300, 0.2), topk_case(700, 0.5), topk_case(400, 0.2, ties=True)]
    sizes, shares = (MILLION, 4 * MILLION, 16 * MILLION), (0.1, 0.2, 0.5)
    if device.type == "cuda":
        sweep = [topk_case(n, share) for n in sizes for share in shares]
    else:
        sweep = [topk_case(MILLION, share) for share in shares] + [topk_case(n, 0.2) for n in sizes[1:]]
    return [*sweep, *(topk_case(n, 0.2) for n in (1 << 12, 1 << 16, 1 << 18)), topk_case(MILLION, 0.2, ties=True)]


GROUP = Group("select_topk", "Top-k of one row of scores, ascending rows", cases, weight=1.5, families=("select",))
