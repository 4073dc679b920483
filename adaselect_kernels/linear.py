"""Scoring at the scale of a vocabulary: statistics and selection from hidden states and the classifier, logits never stored."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels import dispatch
from adaselect_kernels.checks import (
    check_labels,
    check_linear,
    check_options,
    check_rows,
    check_state,
    check_stats,
    check_targets,
    selected_count,
)
from adaselect_kernels.functional import DEFAULT_METHODS, SampleStats, Selection
from adaselect_kernels.ops import rows_of
from adaselect_kernels.options import (
    METHODS,
    ORDERS,
    PARTIALS,
    STATS,
    AdaSelectionOptions,
    check_methods,
    compute_dtype,
    require_choice,
)
from adaselect_kernels.reference import mean_over_positions, valid_samples
from adaselect_kernels.state import AdaSelectionState

SCORE_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
_NEED_ALL_CLASSES = ("margin", "top2_margin", "correct")
_BLOCK = 2**22  # elements of a temporary copy


def linear_per_sample_stats(
    hidden: Tensor,  # [N, H] or [N, T, H]; float16, bfloat16, float32, float64; any strides
    weight: Tensor,  # [V, H], of the dtype of hidden
    targets: Tensor,  # [N] or [N, T]; int64 or int32
    *,
    bias: Tensor | None = None,  # [V], of the dtype of hidden
    softcap: float | None = None,
    logit_scale: float = 1.0,
    stats: Sequence[str] = ("loss", "grad_norm"),
    unit: str = "sample",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    score_dtype: torch.dtype | None = None,
    vocab_stride: int = 1,
    impl: str = "auto",
) -> SampleStats:
    """`per_sample_stats` of the logits z = softcap tanh(u / softcap), u = logit_scale (hidden weight^T + bias), never stored.

    bias: None is none. softcap: positive, or None for z = u. logit_scale: finite, not 0.
    stats, unit, ignore_index, label_smoothing: as in `per_sample_stats`. grad_norm is the norm of softmax(z) - onehot(y).
    Under torch.autocast hidden, weight and bias are cast as torch.nn.functional.linear casts them.

    Products accumulate in float32 (float64 for float64 hidden) and are not rounded to a half type in between, so a bfloat16
    call is nearer to the exact statistics than the unfused one. Two approximations, off by default; docs/language_models.md
    has their measured rank agreement and time:
    score_dtype: torch.bfloat16, torch.float16 or torch.float8_e4m3fn: hidden, weight and bias are rounded to it first
        (float8: hidden and weight, a scale a row). weight and bias may be of that type already (not float8) whatever hidden
        is; otherwise the call makes a copy of weight in it.
    vocab_stride: s > 1 looks at the target and the classes 0, s, 2s, ... alone, the sums over others than the target scaled
        by (V - 1) / (those seen). The target's own logit is of hidden and weight as given. For the loss; gradient norms
        suffer more. Statistics that need the largest of all logits ("margin", "top2_margin", "correct") are refused.

    Returns SampleStats, [N] float32 each (float64 for float64 hidden), None where not asked for. Not differentiable.
    Memory beyond inputs and outputs: O(N), and on a CPU one block of logits a thread; with score_dtype the copies in it.
    Raises as `per_sample_stats` does, and TypeError or ValueError for weight, bias, softcap, logit_scale, score_dtype and
    vocab_stride (1, or below V) that are not as said, RuntimeError where the machine cannot compute in score_dtype.

    >>> hidden, weight = torch.eye(3)[:2], torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> linear_per_sample_stats(hidden, weight, torch.tensor([0, 0]), stats=("margin",)).margin
    tensor([ 2., -1.])
    """
    codes = check_stats(stats)
    check_approximation(codes, score_dtype, vocab_stride)
    given = hidden
    hidden, weight, bias = check_classifier(
        hidden, weight, targets, bias, softcap, logit_scale, unit, ignore_index, label_smoothing, score_dtype
    )
    check_targets(targets, weight.shape[0], ignore_index)
    check_stride(weight.shape[0], vocab_stride)
    backend = dispatch.resolve(impl, hidden.device)
    labels = (unit, ignore_index, float(label_smoothing))
    logits = (float(softcap or 0.0), float(logit_scale))
    if score_dtype is None and vocab_stride == 1:
        table = backend.linear_per_sample_stats(hidden, weight, targets, bias, codes, *labels, *logits)
    else:
        table = _approximate_stats(
            backend, hidden, weight, targets, bias, codes, *labels, *logits, score_dtype, vocab_stride
        )
    return SampleStats(**dict(zip(stats, table.to(compute_dtype(given)).unbind(0), strict=True)))


def fused_linear_select(
    hidden: Tensor,  # [N, H] or [N, T, H]; float16, bfloat16, float32, float64; any strides
    weight: Tensor,  # [V, H], of the dtype of hidden
    targets: Tensor,  # [N] or [N, T]; int64 or int32
    gamma: float,
    *,
    bias: Tensor | None = None,  # [V], of the dtype of hidden
    softcap: float | None = None,
    logit_scale: float = 1.0,
    methods: Sequence[str] = DEFAULT_METHODS,
    state: AdaSelectionState | None = None,
    options: AdaSelectionOptions | None = None,
    unit: str = "sample",
    order: str = "index",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    seed: int = 0,
    score_dtype: torch.dtype | None = None,
    vocab_stride: int = 1,
    impl: str = "auto",
) -> Selection:
    """`fused_select` from hidden states and the classifier: the logits [N, V] are never stored.

    bias, softcap, logit_scale, score_dtype, vocab_stride: as in `linear_per_sample_stats`; everything else, the Selection
    returned and the errors are those of `fused_select`.

    >>> hidden = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.0, 3.0]])
    >>> fused_linear_select(hidden, torch.eye(2), torch.tensor([0, 0, 1, 0]), gamma=0.5, methods=("big_loss",)).indices
    tensor([1, 3])
    """
    options = AdaSelectionOptions() if options is None else check_options(options)
    names = check_methods(methods)
    wanted = stats_of_methods(names)
    check_approximation(wanted, score_dtype, vocab_stride)
    hidden, weight, bias = check_classifier(
        hidden, weight, targets, bias, softcap, logit_scale, unit, ignore_index, label_smoothing, score_dtype
    )
    check_targets(targets, weight.shape[0], ignore_index)
    check_stride(weight.shape[0], vocab_stride)
    k = selected_count(gamma, rows_of(hidden, unit))
    require_choice("order", order, ORDERS)
    buffer, seed = check_state(state, names, hidden.device, seed)
    backend = dispatch.resolve(impl, hidden.device)
    codes = [METHODS.index(name) for name in names]
    labels = (ignore_index, float(label_smoothing))
    logits = (float(softcap or 0.0), float(logit_scale))
    if score_dtype is None and vocab_stride == 1:
        return Selection(
            *backend.fused_linear_select(
                hidden, weight, targets, bias, buffer, codes, k, unit, order, *labels, *logits, seed, options.packed
            )
        )
    table = _approximate_stats(
        backend, hidden, weight, targets, bias, wanted, unit, *labels, *logits, score_dtype, vocab_stride
    )
    valid = valid_samples(targets, unit, ignore_index)
    return select_from_stats(backend, table, valid, buffer, codes, k, order, seed, options)


def stats_of_methods(names: Sequence[str]) -> list[int]:
    """What `select_from_stats` needs: the losses, and the gradient norms where a method ranks by them."""
    return [STATS.index("loss"), STATS.index("grad_norm")][: 2 if "grad_norm" in names else 1]


def select_from_stats(
    backend: Any, table: Tensor, valid: Tensor, buffer: Tensor | None, codes: list[int], k: int, order: str, seed: int,
    options: AdaSelectionOptions,
) -> Selection:  # fmt: skip
    """The batch stage and the choice, from the losses (and gradient norms, where a method needs them) in `table` [1 or 2, N]."""
    grad_norms = table[1] if len(table) > 1 else None
    scores, n_valid = backend.batch_scores(table[0], grad_norms, valid, buffer, codes, k, seed, options.packed)
    indices = backend.select_topk(scores, k, True, order)
    return Selection(indices, scores, table[0].to(torch.float32), n_valid)


def autocast_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors as torch.nn.functional.linear would see them: cast where autocast is on."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Any) -> Any:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(hidden), cast(weight), cast(bias)


def check_classifier(
    hidden, weight, targets, bias, softcap, logit_scale, unit, ignore_index, label_smoothing, score_dtype=None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs of a linear classifier, checked, detached and as autocast or a weight kept in score_dtype wants them."""
    check_rows("hidden", "H", hidden, targets)
    hidden, weight, bias = autocast_linear(hidden, weight, bias)
    if score_dtype not in (None, torch.float8_e4m3fn) and getattr(weight, "dtype", None) == score_dtype:
        hidden = hidden.to(score_dtype)
        bias = bias.to(score_dtype) if isinstance(bias, Tensor) else bias
    check_linear(hidden, weight, bias, softcap, logit_scale)
    check_labels(unit, ignore_index, label_smoothing)
    return hidden.detach(), weight.detach(), None if bias is None else bias.detach()


def check_approximation(codes: Sequence[int], score_dtype: torch.dtype | None, vocab_stride: int) -> None:
    if score_dtype is not None and score_dtype not in SCORE_DTYPES:
        raise ValueError(f"score_dtype must be None or one of {', '.join(map(str, SCORE_DTYPES))}; got {score_dtype!r}")
    if isinstance(vocab_stride, bool) or not isinstance(vocab_stride, int):
        raise TypeError(f"vocab_stride must be an int, got {vocab_stride!r}")
    refused = [STATS[i] for i in codes if STATS[i] in _NEED_ALL_CLASSES]
    if vocab_stride > 1 and refused:
        raise ValueError(
            f"{', '.join(refused)} need the largest of all logits: vocab_stride must be 1, got {vocab_stride}"
        )


def check_stride(classes: int, vocab_stride: int) -> None:
    if vocab_stride != 1 and not 1 < vocab_stride < classes:  # two classes are seen, of which one is not the target
        raise ValueError(f"vocab_stride must be 1 or below the {classes} classes, got {vocab_stride}")


def _approximate_stats(
    backend, hidden, weight, targets, bias, codes, unit, ignore_index, label_smoothing, softcap, logit_scale, score_dtype,
    vocab_stride,
) -> Tensor:  # fmt: skip
    partials = partial_stats(
        backend, hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), bias, 0, codes, ignore_index,
        label_smoothing, softcap, logit_scale, score_dtype, vocab_stride,
    )  # fmt: skip
    return stats_from_partials(
        backend, partials[None], targets, weight.shape[0], codes, unit, ignore_index, label_smoothing
    )


def partial_stats(
    backend, hidden, weight, y, bias, first_class, codes, ignore_index, label_smoothing, softcap, logit_scale,
    score_dtype=None, vocab_stride=1,
) -> Tensor:  # fmt: skip
    """[PARTIALS, N]: what the classes of `weight`, from first_class on, say of the rows hidden [N, H] with targets y [N]."""
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    rows, seen = hidden, weight[::vocab_stride]
    seen_bias = None if bias is None else bias[::vocab_stride]
    if score_dtype == torch.float8_e4m3fn:
        (rows, hidden_scale), (seen, weight_scale) = to_float8(rows), to_float8(seen)
        scales = hidden_scale, weight_scale
        seen_bias = None if seen_bias is None else seen_bias.to(torch.float32)
    elif score_dtype is not None:
        rows, seen = rows.to(score_dtype), seen.to(score_dtype)
        seen_bias = None if seen_bias is None else seen_bias.to(score_dtype)
    partials = backend.linear_partials(
        rows, seen, y, seen_bias, *scales, first_class, vocab_stride, codes, ignore_index, label_smoothing,
        softcap, logit_scale,
    )  # fmt: skip
    if vocab_stride > 1:
        partials = _as_if_all_seen(partials, hidden, weight, y - first_class, bias, softcap, logit_scale)
    return partials


def stats_from_partials(
    backend, partials, targets, classes, codes, unit, ignore_index, label_smoothing
) -> Tensor:  # fmt: skip
    """[S, samples] from the partials [R, PARTIALS, N] of sets that make up all classes; targets [N] or [N, T]."""
    table = backend.combine_partials(partials, targets.reshape(-1), classes, codes, ignore_index, label_smoothing)
    if targets.dim() == 2 and unit == "sample":
        kept = targets != ignore_index
        rows = zip(codes, table.view(-1, *targets.shape), strict=True)
        table = torch.stack([mean_over_positions(STATS[i], row, kept) for i, row in rows])
    return table


def _as_if_all_seen(partials: Tensor, hidden, weight, y, bias, softcap, logit_scale) -> Tensor:
    """Scale the sums over some of the classes to all of them, and put the exact logit of the target in, where it is here."""
    row = {name: i for i, name in enumerate(PARTIALS)}
    here = (y >= 0) & (y < weight.shape[0])
    others = weight.shape[0] - here.to(partials.dtype)
    factor = others / partials[row["count"]]
    for name in ("sum", "sum_sq", "sum_ex", "sum_x"):
        partials[row[name]] *= factor
    partials[row["count"]] = others
    u = logit_scale * _target_products(hidden, weight, torch.where(here, y, 0).long(), bias, partials.dtype)
    z = softcap * (u / softcap).tanh() if softcap > 0 else u
    partials[row["target"]] = torch.where(here, z, 0.0)
    partials[row["nan"]] = torch.maximum(partials[row["nan"]], (here & z.isnan()).to(z.dtype))
    return partials


def _target_products(hidden, weight, y, bias, dtype) -> Tensor:
    """hidden_i . weight_{y_i} + bias_{y_i} [N], a block of rows at a time: the rows of weight are a copy."""
    size = max(1, _BLOCK // hidden.shape[1])
    products = [
        (h.to(dtype) * weight[c].to(dtype)).sum(1) for h, c in zip(hidden.split(size), y.split(size), strict=True)
    ]
    found = torch.cat(products)
    return found if bias is None else found + bias[y].to(dtype)


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [R, H] as float8_e4m3fn, and the scales [R] float32 that bring them back; a block of rows at a time."""
    largest = torch.maximum(rows.amax(1), -rows.amin(1)).to(torch.float32)
    scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp(min=torch.finfo(torch.float32).tiny)
    size = max(1, _BLOCK // rows.shape[1])
    blocks = zip(rows.split(size), scale[:, None].split(size), strict=True)
    return torch.cat([(block.to(torch.float32) / s).to(torch.float8_e4m3fn) for block, s in blocks]), scale
