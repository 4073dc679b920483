"""What is computed: N hidden states under a classifier of V classes, and the rows chosen of them."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaselect_kernels.checks import selected_count
from benchmarks.micro.case import DTYPES

LOGIT_SCALE = 2.0  # of the noise in the logits, as make_logits has it
LIFT = 6.0  # at most, of the target's logit

# products of N x H x V multiplications and additions that a kind cannot do without: forward, and one a gradient
PRODUCTS = {"score": 1, "loss": 3, "backward": 2, "stored": 0}


class Inputs(NamedTuple):
    hidden: Tensor  # [N, H]; of kind "stored" logits [N, V]
    weight: Tensor  # [V, H]; of kind "stored" empty
    targets: Tensor  # [N] int64
    indices: Tensor  # [k] int64, ascending


@dataclass(frozen=True)
class Problem:
    """kind: "score" (statistics and selection of all rows), "loss" (forward and backward of the chosen rows), "backward"
    (of that the backward alone), or "stored" (forward and backward of the chosen rows of logits that are there)."""

    kind: str
    n: int
    hidden: int
    classes: int
    dtype: str
    gamma: float

    @property
    def name(self) -> str:
        width = "" if self.kind == "stored" else f" H={self.hidden}"
        rate = "" if self.kind == "score" else f" gamma={self.gamma:g}"
        return f"{self.kind} N={self.n}{width} V={self.classes} {self.dtype}{rate}"

    @property
    def k(self) -> int:
        return selected_count(self.gamma, self.n)

    @property
    def rows(self) -> int:
        """Those the products go over."""
        return self.n if self.kind == "score" else self.k

    @property
    def flops(self) -> int:
        """The fewest that the function needs: a product computed twice counts once."""
        return 2 * PRODUCTS[self.kind] * self.rows * self.hidden * self.classes

    @property
    def params(self) -> dict[str, Any]:
        return asdict(self) | {"k": self.k, "flops": self.flops}

    @property
    def input_bytes(self) -> int:
        elements = self.n * self.classes if self.kind == "stored" else (self.n + self.classes) * self.hidden
        return elements * DTYPES[self.dtype].itemsize + 8 * self.n

    @property
    def min_bytes(self) -> int:
        """Each input read once, each result written once: losses, scores and rows, or gradients as large as the inputs."""
        if self.kind == "score":
            return self.input_bytes + 8 * self.n + 8 * self.k
        if self.kind == "stored":
            size = DTYPES[self.dtype].itemsize * self.classes
            return (self.k + self.n) * size + 16 * self.k
        size = DTYPES[self.dtype].itemsize * self.hidden
        return (self.k + self.n + 2 * self.classes) * size + 16 * self.k

    def make(self, device: torch.device, seed: int) -> Inputs:
        """Random: logits of scale LOGIT_SCALE, the target's raised by up to LIFT, rows chosen at random."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype = DTYPES[self.dtype]
        targets = torch.randint(self.classes, (self.n,), generator=generator, device=device)
        lift = torch.rand(self.n, 1, generator=generator, device=device).mul_(LIFT)
        indices = torch.randperm(self.n, generator=generator, device=device)[: self.k].sort().values
        if self.kind == "stored":
            logits = torch.randn(self.n, self.classes, generator=generator, device=device).mul_(LOGIT_SCALE)
            logits.scatter_add_(1, targets[:, None], lift)
            return Inputs(logits.to(dtype), logits.new_empty(0, dtype=dtype), targets, indices)
        weight = torch.randn(self.classes, self.hidden, generator=generator, device=device)
        weight.mul_(LOGIT_SCALE / math.sqrt(self.hidden))
        hidden = torch.randn(self.n, self.hidden, generator=generator, device=device)
        hidden.add_(weight[targets].mul_(lift / LOGIT_SCALE**2))  # |weight|^2 = LOGIT_SCALE^2, about
        return Inputs(hidden.to(dtype), weight.to(dtype), targets, indices)
