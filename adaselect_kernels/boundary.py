"""Distance of samples to the decision boundary of the last linear layer (DynaMS, ICLR 2023)."""

import warnings

import torch
from torch import Tensor, nn

from adaselect_kernels.functional import per_sample_stats

MAX_CLASSES = 4096  # above, a C x C matrix and C^2 d differences are no longer small beside the scoring of a data set
_CHUNK = 2**22  # elements of a chunk of rows


@torch.no_grad()
def boundary_distances(
    logits: Tensor,  # [N, C]; float16, bfloat16, float32, float64
    pairwise: Tensor | None,  # [C, C], of `pairwise_weight_norms`
    targets: Tensor | None = None,  # [N]; int64 or int32
    *,
    chunk: int | None = None,
) -> Tensor:
    """[N] distances min_{j != c} (z_c - z_j) / norm(W_c - W_j) in the space of the last layer's input.

    c is the predicted class argmax z, labels unused, and the distance is >= 0; or, with `targets`, the label, and the
    distance is negative where the prediction is wrong. Classes j with W_j = W_c have no boundary with c and are skipped;
    a sample without any other class is at +inf. A NaN among a sample's logits gives NaN.

    pairwise: None is the fallback without W: the difference of the two largest logits, or with `targets` the signed margin
        z_y - max_{j != y} z_j, and a UserWarning says so.
    chunk: rows at a time; memory beyond input and output is O(chunk C). Default: 2^22 elements.

    Returns float32, float64 for float64 logits; computes in that type. Not differentiable.
    Raises TypeError (dtypes), ValueError (shapes, devices, an empty input), IndexError (a target outside [0, C); on other
    devices than the CPU its distance is NaN, without waiting for the device).

    >>> weight = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    >>> boundary_distances(torch.tensor([[6.0, 1.0, 0.0]]), pairwise_weight_norms(weight))  # min(5 / 5, 6 / 3)
    tensor([1.])
    """
    _check_matrix("logits", logits)
    rows, classes = logits.shape
    if targets is not None:
        _check_targets(targets, logits)
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be an int of at least 1, got {chunk!r}")
    if pairwise is None:
        _warn_fallback("without the weight of the last layer", signed=targets is not None)
        return logit_margins(logits, targets)
    if not isinstance(pairwise, Tensor) or pairwise.shape != (classes, classes) or pairwise.device != logits.device:
        got = f"{tuple(pairwise.shape)} on {pairwise.device}" if isinstance(pairwise, Tensor) else repr(pairwise)
        raise ValueError(f"pairwise must be [C, C] = [{classes}, {classes}] on {logits.device}, got {got}")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    pairwise = pairwise.to(dtype)
    distances = torch.empty(rows, dtype=dtype, device=logits.device)
    size = chunk or max(1, _CHUNK // classes)
    for start in range(0, rows, size):
        z = logits[start : start + size].to(dtype)
        reference = z.argmax(1) if targets is None else targets[start : start + size].long()
        outside = (reference < 0) | (reference >= classes)
        reference = reference.clamp(0, classes - 1)
        norms = pairwise[reference]
        gaps = z.gather(1, reference[:, None]) - z
        # (z_c - z_j) / norm(W_c - W_j); the norm is 0 for j = c too
        nearest = (gaps / norms).masked_fill_(norms == 0, torch.inf).amin(1)
        distances[start : start + size] = nearest.masked_fill_(outside, torch.nan)
    return distances


def logit_margins(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """[N] what stands in for the distance: z_(1) - z_(2), or with `targets` the signed z_y - max_{j != y} z_j."""
    stat = "top2_margin" if targets is None else "margin"
    labels = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device) if targets is None else targets
    margins = getattr(per_sample_stats(logits, labels, stats=(stat,), ignore_index=-1), stat)
    return margins if targets is None else margins.masked_fill(targets == -1, torch.nan)


@torch.no_grad()
def pairwise_weight_norms(weight: Tensor) -> Tensor:
    """[C, C] norms of W_c - W_j for the weight [C, d] of a last linear layer: once a round, not once a batch.

    The differences themselves are squared and summed, in float64: norm(a)^2 + norm(b)^2 - 2 a.b would cancel where two
    classes are close. Equal rows give exactly 0. Returns float32, float64 for a float64 weight.
    Raises TypeError (dtype), ValueError (shape, or C above 4096: use the margin of the logits there).
    """
    _check_matrix("weight", weight)
    if weight.shape[0] > MAX_CLASSES:
        raise ValueError(
            f"pairwise norms are for at most {MAX_CLASSES} classes, got {weight.shape[0]}: above, pass pairwise=None"
            " (distance='top2_margin')"
        )
    rows = weight.detach().to(torch.float64)
    norms = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return norms.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def last_linear(model: nn.Module) -> nn.Linear:
    """The last module of `model` that has parameters of its own, when it is an nn.Linear; in the order of definition.

    Raises ValueError when it is something else, and says what to pass instead.
    """
    last: tuple[str, nn.Module] | None = None
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            last = name, module
    if last is not None and isinstance(last[1], nn.Linear):
        return last[1]
    got = "no parameters" if last is None else f"{type(last[1]).__name__} ({last[0] or 'the model itself'})"
    raise ValueError(f"the model must end in an nn.Linear, got {got}; {WHAT_TO_PASS}")


WHAT_TO_PASS = (
    "pass weight= (the [C, d] weight that makes the logits), or use distance='top2_margin' (reference='predicted')"
    " or distance='margin' (reference='label')"
)


def _warn_fallback(reason: str, signed: bool) -> None:
    instead = "z_y - max_{j != y} z_j" if signed else "the difference of the two largest logits (top2_margin)"
    warnings.warn(f"{reason} the distance to the boundary is not known: using {instead}", UserWarning, stacklevel=4)


def _check_matrix(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of floats, got {got}")
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(f"{name} must be two-dimensional and not empty, got {tuple(value.shape)}")


def _check_targets(targets: Tensor, logits: Tensor) -> None:
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets must be int64 or int32, got {got}")
    if targets.shape != logits.shape[:1] or targets.device != logits.device:
        raise ValueError(
            f"targets must be [{logits.shape[0]}] on {logits.device}, got {tuple(targets.shape)} on {targets.device}"
        )
    if targets.device.type == "cpu":
        outside = (targets < 0) | (targets >= logits.shape[1])
        if outside.any():
            row = int(outside.to(torch.int8).argmax())
            raise IndexError(f"targets must be in [0, {logits.shape[1]}), got {int(targets[row])} in row {row}")
