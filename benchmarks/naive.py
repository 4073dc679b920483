"""Selection as a careful user writes it in eager PyTorch: the yardstick of every ratio in docs/performance.md.

It computes what `adaselect_kernels.fused_select` computes with the paper's default options (equations 2, 3, 5 and 6) on
[N, C] logits, without what a user would leave out: ignored rows, non-finite rows, deterministic ties, ascending indices. It
is written to be fast: one log-softmax pass, in-place work on its own temporaries, one softmax over the stacked keys, an
unsorted top-k. Every function traces under `torch.compile(fullgraph=True)`.

>>> state = fresh_state(2)
>>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.0, 3.0]])
>>> chosen, state = naive_select(logits, torch.tensor([0, 0, 1, 0]), 2, ("big_loss", "small_loss"), state)
>>> sorted(chosen.indices.tolist())
[0, 3]
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ADABOOST_EPS = 1e-6


class NaiveSelection(NamedTuple):
    indices: Tensor  # [k] int64, in no particular order
    scores: Tensor  # [N] float32
    losses: Tensor  # [N] float32


class NaiveState(NamedTuple):
    """What equation 3 carries; a new one is returned by every call."""

    log_weights: Tensor  # [M] float32, log w, sum w = 1
    previous_losses: Tensor  # [M] float32, NaN before the first call


def fresh_state(methods: int, device: torch.device | str | None = None) -> NaiveState:
    """Equal weights over `methods` methods, no previous losses."""
    equal = torch.zeros(methods, device=device).log_softmax(0)
    return NaiveState(equal, torch.full((methods,), float("nan"), device=device))


def loss_and_grad_norm(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and norm of softmax(z) - onehot(y), [N] float32 each: the fastest form in eager mode.

    One log-softmax (which upcasts half precision) serves both; softmax(z) - onehot(y) is formed in place.
    """
    log_p = logits.log_softmax(1, dtype=torch.float32)
    column = targets[:, None]
    losses = log_p.gather(1, column)[:, 0].neg()
    difference = log_p.exp_().scatter_add_(1, column, torch.full_like(column, -1.0, dtype=torch.float32))
    return losses, torch.linalg.vector_norm(difference, dim=1)


def loss_and_grad_norm_fusible(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same in the form a compiler makes the fastest code of: row sums of exp(z - max z), nothing of size [N, C] stored.

    Compiled on a CPU it takes a third to a half of the time of the form through log-softmax. The squared norm
    sum_j p_j^2 - 2 p_y + 1 cancels as p_y -> 1 (absolute error of the norm up to about 5e-4).
    """
    logits = logits.to(torch.float32)
    top = logits.amax(1, keepdim=True)
    e = (logits - top).exp()
    d = e.sum(1)
    shifted_y = logits.gather(1, targets[:, None])[:, 0] - top[:, 0]
    losses = d.log() - shifted_y
    squared = e.square().sum(1) / d.square() - 2 * shifted_y.exp() / d + 1
    return losses, squared.clamp(min=0).sqrt()


def importances(losses: Tensor, grad_norms: Tensor | None, methods: Sequence[str], noise: Tensor | None) -> Tensor:
    """alpha [M, N], one row a method, each summing to 1: a softmax over the stacked keys, the others beside it.

    noise: [N], the i.i.d. Exp(1) variables of "uniform"; None draws them from torch's generator.
    """
    keys = {}
    if "big_loss" in methods or "coreset1" in methods:
        keys["big_loss"] = losses
    if "small_loss" in methods or "coreset1" in methods:
        keys["small_loss"] = -losses
    if "grad_norm" in methods:
        keys["grad_norm"] = grad_norms
    if "coreset2" in methods:
        keys["coreset2"] = -(losses - losses.mean()).abs()
    rows = {}
    if keys:
        softmaxes = torch.stack(list(keys.values())).softmax(1)
        if tuple(keys) == tuple(methods):
            return softmaxes
        rows = dict(zip(keys, softmaxes.unbind(0), strict=True))
    if "coreset1" in methods:
        rows["coreset1"] = 0.5 * (rows["big_loss"] + rows["small_loss"])
    if "adaboost" in methods:
        positive = losses.clamp(min=0)
        top = positive.max()
        a = 0.5 * (((1 + ADABOOST_EPS) * top + positive) / ((top - positive) + ADABOOST_EPS * top)).log()
        total = a.sum()
        rows["adaboost"] = torch.where(total > 0, a / total, 1 / len(losses))
    if "uniform" in methods:
        exponential = torch.empty_like(losses).exponential_() if noise is None else noise
        rows["uniform"] = exponential / exponential.sum()
    return torch.stack([rows[method] for method in methods])


def naive_select(
    logits: Tensor,  # [N, C]; float16, bfloat16, float32
    targets: Tensor,  # [N] int64
    k: int,
    methods: Sequence[str],  # names of adaselect_kernels.options.METHODS
    state: NaiveState,
    *,
    beta: float = 1.0,
    noise: Tensor | None = None,  # [N], see importances()
    statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = loss_and_grad_norm,
) -> tuple[NaiveSelection, NaiveState]:
    """The k rows of largest score s_i = sum_m w_m alpha_i^m, the weights w updated first (equations 2, 3, 5 and 6)."""
    if "grad_norm" in methods:
        losses, grad_norms = statistics(logits, targets)
    else:
        losses, grad_norms = F.cross_entropy(logits.to(torch.float32), targets, reduction="none"), None
    alphas = importances(losses, grad_norms, methods, noise)
    method_losses = alphas @ losses
    # equation 3; the first call has no previous losses (NaN) and leaves the weights as they are
    relative = (state.previous_losses - method_losses) / state.previous_losses
    log_weights = (state.log_weights + beta * relative.nan_to_num(0.0, 0.0, 0.0)).log_softmax(0)
    scores = log_weights.exp() @ alphas
    indices = torch.topk(scores, k, sorted=False).indices
    return NaiveSelection(indices, scores, losses), NaiveState(log_weights, method_losses)


def naive_stats(logits: Tensor, targets: Tensor, stats: Sequence[str]) -> dict[str, Tensor]:
    """Per-sample statistics by name, [N] float32 each, sharing one log-softmax as far as eager PyTorch allows."""
    if set(stats) == {"loss", "grad_norm"}:
        losses, grad_norms = loss_and_grad_norm(logits, targets)
        return {"loss": losses, "grad_norm": grad_norms}
    logits = logits.to(torch.float32)
    log_p = logits.log_softmax(1)
    column = targets[:, None]
    log_p_y = log_p.gather(1, column)[:, 0]
    found = {}
    if "loss" in stats:
        found["loss"] = -log_p_y
    if "lse" in stats:
        found["lse"] = logits.logsumexp(1)
    if "margin" in stats:
        others = logits.scatter(1, column, float("-inf")).amax(1)
        found["margin"] = logits.gather(1, column)[:, 0] - others
    if "top2_margin" in stats:
        best = logits.topk(2, dim=1).values
        found["top2_margin"] = best[:, 0] - best[:, 1]
    if "confidence" in stats:
        found["confidence"] = log_p_y.exp()
    if "correct" in stats:
        found["correct"] = (logits.argmax(1) == targets).to(torch.float32)
    if "entropy" in stats or "grad_norm" in stats:
        p = log_p.exp()
        if "entropy" in stats:
            found["entropy"] = -torch.linalg.vecdot(p, log_p)
        if "grad_norm" in stats:
            p.scatter_add_(1, column, torch.full_like(column, -1.0, dtype=torch.float32))
            found["grad_norm"] = torch.linalg.vector_norm(p, dim=1)
    return {stat: found[stat] for stat in stats}
