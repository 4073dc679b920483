"""Differentiable cross-entropy over chosen rows: the backward pass that a selection saves."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaselect_kernels import dispatch
from adaselect_kernels.checks import (
    check_labels,
    check_linear,
    check_number,
    check_rows,
    check_softcap,
    check_targets,
    may_synchronise,
)
from adaselect_kernels.linear import autocast_linear
from adaselect_kernels.options import PARTIALS, STATS, compute_dtype, require_choice

REDUCTIONS = ("mean", "sum", "none")
LOSS = [STATS.index("loss")]
_LOSS_AND_LSE = [*LOSS, STATS.index("lse")]


def selected_cross_entropy(
    logits: Tensor,  # [N, C] or [N, T, C]; float16, bfloat16, float32, float64; any strides
    targets: Tensor,  # [N] or [N, T]; int64 or int32
    indices: Tensor,  # [k] int64, rows of the flattened logits; -1 is an empty place
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of the chosen rows alone, differentiable in the logits; the others get a gradient of exactly 0.

    Of a chosen row with target y, z = softcap tanh(logits / softcap) (softcap None: z = logits), lse = log sum_j e^z_j:
    l = (1 - eps)(lse - z_y) + eps (lse - mean_j z_j) + z_loss lse^2, eps = label_smoothing.

    indices: as a Selection gives them; [N, T, C] logits count flattened rows, as unit="token" does. A row named twice counts
        twice. -1 is an empty place (see `mask_to_indices`): it has loss 0 and no gradient.
    reduction: "mean" over the chosen rows that are not ignored (NaN if there are none, with gradients 0, as
        torch.nn.functional.cross_entropy), "sum", or "none": [k], in the order of indices, 0 where ignored.
    z_loss: weight of lse^2 (PaLM, arXiv 2204.02311), at least 0.

    Returns a scalar or [k], float32 (float64 for float64 logits). The logits are not changed, nothing of them but the
    tensor itself is kept, the device is not synchronised: gradients are right however often they are asked for.
    Deterministic for distinct indices. No second derivatives. Memory beyond inputs and gradients: k rows of logits.

    Raises ValueError, TypeError (shapes, devices, dtypes, options), IndexError (on a CPU: an index outside [-1, N), a chosen
    target outside [0, C) that is not ignore_index; on CUDA such a row's loss and gradient are NaN, or with ADASELECT_DEBUG=1
    it raises), RuntimeError (impl cannot serve the call).

    >>> logits = torch.zeros(3, 2, requires_grad=True)
    >>> selected_cross_entropy(logits, torch.tensor([0, 1, 1]), torch.tensor([1])).backward()
    >>> logits.grad
    tensor([[ 0.0000,  0.0000],
            [ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    """
    check_rows("logits", "C", logits, targets)
    z_loss = check_loss(indices, targets, reduction, ignore_index, label_smoothing, softcap, z_loss)
    dispatch.resolve(impl, logits.device)  # refused before any work
    logits = logits.reshape(-1, logits.shape[-1])
    rows, y = rows_and_targets(indices, targets, logits.shape[-1], ignore_index)
    settings = (float(label_smoothing), float(softcap or 0.0), z_loss)
    losses = _CrossEntropy.apply(logits, targets.reshape(-1), rows, y, ignore_index, settings, impl)
    return reduce_losses(losses, y, ignore_index, reduction)


def selected_linear_cross_entropy(
    hidden: Tensor,  # [N, H] or [N, T, H]; float16, bfloat16, float32, float64; any strides
    weight: Tensor,  # [V, H], of the dtype of hidden
    targets: Tensor,  # [N] or [N, T]; int64 or int32
    indices: Tensor,  # [k] int64, rows of the flattened hidden; -1 is an empty place
    *,
    bias: Tensor | None = None,  # [V], of the dtype of hidden
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """`selected_cross_entropy` of logit_scale (hidden weight^T + bias), whose logits are never stored.

    Differentiable in hidden, weight and bias. Forward and backward compute k / N of the products of all rows: one forward, and
    backward the same again, a block of classes at a time, and the two of the gradients; what does not shrink with k is to write
    the gradient of weight [V, H] (docs/performance.md has the measured share). Sums are accumulated in
    float32 (float64 for float64 hidden), also over blocks, and gradients rounded once, to the dtype of their tensor. Under
    torch.autocast hidden, weight and bias are cast as torch.nn.functional.linear casts them.

    Memory beyond inputs and gradients: k rows of hidden states, and one block of classes of their logits.
    Arguments, errors and the rest as in `selected_cross_entropy` and `linear_per_sample_stats`.

    >>> hidden, weight = torch.zeros(3, 2, requires_grad=True), torch.eye(2)
    >>> selected_linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 1]), torch.tensor([1])).backward()
    >>> hidden.grad
    tensor([[ 0.0000,  0.0000],
            [ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    """
    check_rows("hidden", "H", hidden, targets)
    hidden, weight, bias = autocast_linear(hidden, weight, bias)
    check_linear(hidden, weight, bias, softcap, logit_scale)
    z_loss = check_loss(indices, targets, reduction, ignore_index, label_smoothing, softcap, z_loss)
    dispatch.resolve(impl, hidden.device)  # refused before any work
    settings = (float(label_smoothing), float(softcap or 0.0), float(logit_scale), z_loss)
    return classifier_loss(
        hidden, weight, bias, targets, indices, ignore_index, settings, reduction, Whole(weight.shape[0], impl)
    )


class Whole(NamedTuple):
    """A classifier all of whose classes are here. distributed.py has the other kind, a shard."""

    classes: int
    impl: str
    first: int = 0  # class of the first row of weight

    def partials(self, rows, weight, bias, y, ignore_index, label_smoothing, softcap, logit_scale) -> Tensor:
        """[R, PARTIALS, k]: the partial statistics of R sets of classes that make up all."""
        return dispatch.resolve(self.impl, rows.device).linear_partials(
            rows, weight, y, bias, None, None, 0, 1, LOSS, ignore_index, label_smoothing, softcap, logit_scale
        )[None]

    def whole_gradient(self, rows_grad: Tensor) -> Tensor:
        return rows_grad


def classifier_loss(hidden, weight, bias, targets, indices, ignore_index, settings, reduction, classifier) -> Tensor:
    """The loss of the chosen rows; what is checked already, classifier: a Whole, or a shard."""
    rows, y = rows_and_targets(indices, targets, classifier.classes, ignore_index)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    chosen = hidden.index_select(0, rows_to_read(rows, hidden.shape[0]))
    losses = _LinearCrossEntropy.apply(chosen, weight, bias, y, ignore_index, settings, classifier)
    return reduce_losses(losses, y, ignore_index, reduction)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """once_differentiable, loud also where `grad` is a constant: the gradients depend on the inputs, and no one says how."""
    refusing = once_differentiable(backward)

    def wrapper(ctx: Any, grad: Tensor) -> Any:
        return refusing(ctx, grad.detach().requires_grad_() if torch.is_grad_enabled() else grad)

    return wrapper


class _CrossEntropy(torch.autograd.Function):
    """Losses [k] of chosen rows of logits [N, C]."""

    @staticmethod
    def forward(ctx: Any, logits, targets, rows, y, ignore_index, settings, impl) -> Tensor:
        label_smoothing, softcap, z_loss = settings
        chosen = logits.detach().index_select(0, rows_to_read(rows, logits.shape[0]))
        if softcap > 0:
            chosen = softcap * (chosen.to(compute_dtype(chosen)) / softcap).tanh()
        losses, lse = dispatch.resolve(impl, logits.device).per_sample_stats(
            chosen, y, _LOSS_AND_LSE, "sample", ignore_index, label_smoothing
        )
        if z_loss > 0:
            losses = losses + z_loss * lse.square()
        ctx.save_for_backward(logits, targets, rows, y, losses, lse)
        ctx.ignore_index, ctx.settings, ctx.impl = ignore_index, settings, impl
        return losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, rows, y, losses, lse = ctx.saved_tensors
        n = logits.shape[0]
        row_weight = weights_of_rows(grad, losses, y, ctx.ignore_index)
        weights = row_weight.new_zeros(n).index_add(0, rows_to_read(rows, n), row_weight)
        place = torch.where(rows < 0, n, rows)  # an empty place writes beyond the end
        all_lse = lse.new_zeros(n + 1).index_copy(0, place, lse)[:n]
        backend = dispatch.resolve(ctx.impl, logits.device)
        return backend.cross_entropy_backward(weights, logits, targets, all_lse, *ctx.settings), *[None] * 6


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses [k] of rows [k, H] under a linear classifier."""

    @staticmethod
    def forward(ctx: Any, rows, weight, bias, y, ignore_index, settings, classifier) -> Tensor:
        *form, z_loss = settings
        bias_values = None if bias is None else bias.detach()
        partials = classifier.partials(rows.detach(), weight.detach(), bias_values, y, ignore_index, *form)
        losses = dispatch.resolve(classifier.impl, rows.device).combine_partials(
            partials, y, classifier.classes, LOSS, ignore_index, form[0]
        )[0]
        lse = torch.where(y == ignore_index, 0.0, exact_lse(partials))
        if z_loss > 0:
            losses = losses + z_loss * lse.to(losses.dtype).square()
        ctx.save_for_backward(rows, weight, bias, y, losses, lse)
        ctx.ignore_index, ctx.settings, ctx.classifier = ignore_index, settings, classifier
        return losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight, bias, y, losses, lse = ctx.saved_tensors
        wanted, classifier = [ctx.needs_input_grad[i] for i in range(3)], ctx.classifier
        row_weight = weights_of_rows(grad, losses, y, ctx.ignore_index)
        grads = dispatch.resolve(classifier.impl, rows.device).linear_loss_backward(
            row_weight, rows, weight, y, lse, bias, classifier.first, classifier.classes, *ctx.settings, wanted
        )
        grads = [g if want else None for g, want in zip(grads, wanted, strict=True)]
        if grads[0] is not None:
            grads[0] = classifier.whole_gradient(grads[0]).to(rows.dtype)
        return *grads, None, None, None, None


def exact_lse(partials: Tensor) -> Tensor:
    """[k] float64: log sum_j e^(z_j) = m + log sum_j e^(z_j - m), of which float32 would lose digits that the softmax has."""
    largest, sums, target = (partials[:, PARTIALS.index(name)].double() for name in ("max", "sum", "target"))
    z_y = target.sum(0)
    m = torch.maximum(largest.amax(0), z_y)
    others = torch.where(largest == -math.inf, 0.0, sums * (largest - m).exp())
    return m + (others.sum(0) + (z_y - m).exp()).log()


def weights_of_rows(grad: Tensor, losses: Tensor, y: Tensor, ignore_index: int) -> Tensor:
    """Weight of each row in the gradient: 0 where ignored or empty, NaN where the loss is."""
    return torch.where(y == ignore_index, 0.0, torch.where(losses.isnan(), math.nan, grad)).contiguous()


def rows_and_targets(indices: Tensor, targets: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The indices, and the target of each place: ignore_index where it is empty. On CUDA an index out of range is loud."""
    targets = targets.reshape(-1)
    n = targets.shape[0]
    inside = (indices >= -1) & (indices < n)
    if may_synchronise(indices) and not inside.all():
        place = int((~inside).to(torch.int8).argmax())
        raise IndexError(f"index {int(indices[place])} at place {place} is outside [-1, {n})")
    rows = indices.clamp(-1, n - 1)
    y = torch.where(rows < 0, ignore_index, targets[rows.clamp(min=0)].to(torch.int64))
    y = torch.where(inside, y, classes if ignore_index != classes else -1)  # no class: its loss is NaN
    check_targets(y, classes, ignore_index)
    return rows, y


def rows_to_read(rows: Tensor, n: int) -> Tensor:
    """The rows, and for each empty place some row, whose loss and weight are 0.

    A row of its own, as a GPU would add the zeros of thousands of places to one row's gradient one after another.
    """
    return torch.where(rows < 0, torch.arange(rows.shape[0], device=rows.device) % n, rows)


def reduce_losses(losses: Tensor, y: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (y != ignore_index).sum()


def check_loss(indices, targets, reduction, ignore_index, label_smoothing, softcap, z_loss) -> float:
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        hint = "; mask_to_indices makes them of a mask" if indices.dtype == torch.bool else ""
        raise TypeError(f"indices must be int64, got {indices.dtype}{hint}")
    if indices.dim() != 1 or indices.shape[0] == 0:
        raise ValueError(f"indices must be [k] with k >= 1, got shape {tuple(indices.shape)}")
    if indices.device != targets.device:
        raise ValueError(f"indices must be on the device of targets, {targets.device}, got {indices.device}")
    require_choice("reduction", reduction, REDUCTIONS)
    check_labels("token", ignore_index, label_smoothing)
    check_softcap(softcap)
    check_number("z_loss", z_loss)
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, got {z_loss!r}")
    return float(z_loss)
