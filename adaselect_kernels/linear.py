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
    require_choice,
)
from adaselect_kernels.reference import mean_over_positions, valid_samples
from adaselect_kernels.state import AdaSelectionState

SCORE_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


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
        (float8: hidden and weight, a scale a row). Takes a copy of weight in that type for the call.
    vocab_stride: s > 1 looks at the classes 0, s, 2s, ... and the target only, the sums over the others scaled by
        (V - 1) / (those seen). The target's own logit stays exact; margins and `correct` are of the classes seen.

    Returns SampleStats, [N] float32 each (float64 for float64 hidden), None where not asked for. Not differentiable.
    Memory beyond inputs and outputs: O(N), and on a CPU one block of logits a thread.
    Raises as `per_sample_stats` does, and TypeError or ValueError for weight, bias, softcap, logit_scale, score_dtype and
    vocab_stride that are not as said, RuntimeError where the machine cannot compute in score_dtype.

    >>> hidden, weight = torch.eye(3)[:2], torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> linear_per_sample_stats(hidden, weight, torch.tensor([0, 0]), stats=("margin",)).margin
    tensor([ 2., -1.])
    """
    codes = check_stats(stats)
    hidden, weight, bias = _check(
        hidden, weight, targets, bias, softcap, logit_scale, unit, ignore_index, label_smoothing
    )
    _check_approximation(weight, score_dtype, vocab_stride)
    backend = dispatch.resolve(impl, hidden.device)
    if score_dtype is None and vocab_stride == 1:
        table = backend.linear_per_sample_stats(
            hidden,
            weight,
            targets,
            bias,
            codes,
            unit,
            ignore_index,
            float(label_smoothing),
            softcap or 0.0,
            float(logit_scale),
        )
    else:
        table = _approximate_stats(
            backend, hidden, weight, targets, bias, codes, unit, ignore_index, float(label_smoothing), softcap or 0.0,
            float(logit_scale), score_dtype, vocab_stride,
        )  # fmt: skip
    return SampleStats(**dict(zip(stats, table.unbind(0), strict=True)))


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
    hidden, weight, bias = _check(
        hidden, weight, targets, bias, softcap, logit_scale, unit, ignore_index, label_smoothing
    )
    k = selected_count(gamma, rows_of(hidden, unit))
    require_choice("order", order, ORDERS)
    _check_approximation(weight, score_dtype, vocab_stride)
    buffer, seed = check_state(state, names, hidden.device, seed)
    backend = dispatch.resolve(impl, hidden.device)
    codes = [METHODS.index(name) for name in names]
    shared = (unit, ignore_index, float(label_smoothing), softcap or 0.0, float(logit_scale))
    if score_dtype is None and vocab_stride == 1:
        return Selection(
            *backend.fused_linear_select(
                hidden, weight, targets, bias, buffer, codes, k, unit, order, *shared[1:], seed, options.packed
            )
        )
    wanted = [STATS.index("loss"), STATS.index("grad_norm")][: 2 if "grad_norm" in names else 1]
    table = _approximate_stats(backend, hidden, weight, targets, bias, wanted, *shared, score_dtype, vocab_stride)
    valid = valid_samples(targets, unit, ignore_index)
    return select_from_stats(backend, table, valid, buffer, codes, k, order, seed, options)


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


def _check(
    hidden, weight, targets, bias, softcap, logit_scale, unit, ignore_index, label_smoothing
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs, checked, detached and as autocast wants them."""
    check_rows("hidden", "H", hidden, targets)
    hidden, weight, bias = autocast_linear(hidden, weight, bias)
    check_linear(hidden, weight, bias, softcap, logit_scale)
    check_labels(unit, ignore_index, label_smoothing)
    check_targets(targets, weight.shape[0], ignore_index)
    return hidden.detach(), weight.detach(), None if bias is None else bias.detach()


def _check_approximation(weight: Tensor, score_dtype: torch.dtype | None, vocab_stride: int) -> None:
    if score_dtype is not None and score_dtype not in SCORE_DTYPES:
        raise ValueError(f"score_dtype must be None or one of {', '.join(map(str, SCORE_DTYPES))}; got {score_dtype!r}")
    if isinstance(vocab_stride, bool) or not isinstance(vocab_stride, int):
        raise TypeError(f"vocab_stride must be an int, got {vocab_stride!r}")
    if not 1 <= vocab_stride <= weight.shape[0]:
        raise ValueError(f"vocab_stride must be in [1, V] = [1, {weight.shape[0]}], got {vocab_stride}")


def _approximate_stats(
    backend, hidden, weight, targets, bias, codes, unit, ignore_index, label_smoothing, softcap, logit_scale, score_dtype,
    vocab_stride,
) -> Tensor:  # fmt: skip
    shape, classes = targets.shape, weight.shape[0]
    hidden, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    seen, seen_bias = weight[::vocab_stride], None if bias is None else bias[::vocab_stride]
    rows = hidden
    if score_dtype == torch.float8_e4m3fn:
        (rows, hidden_scale), (seen, weight_scale) = to_float8(rows), to_float8(seen)
        scales = hidden_scale, weight_scale
        seen_bias = None if seen_bias is None else seen_bias.to(torch.float32)
    elif score_dtype is not None:
        rows, seen = rows.to(score_dtype), seen.to(score_dtype)
        seen_bias = None if seen_bias is None else seen_bias.to(score_dtype)
    partials = backend.linear_partials(
        rows, seen, y, seen_bias, *scales, 0, vocab_stride, codes, ignore_index, label_smoothing, softcap, logit_scale
    )
    if vocab_stride > 1:
        partials = _as_if_all_seen(partials, hidden, weight, y, bias, softcap, logit_scale)
    table = backend.combine_partials(partials[None], y, classes, codes, ignore_index, label_smoothing)
    if len(shape) == 2 and unit == "sample":
        kept = targets != ignore_index
        table = torch.stack(
            [mean_over_positions(STATS[i], row.view(shape), kept) for i, row in zip(codes, table, strict=True)]
        )
    return table


def _as_if_all_seen(partials: Tensor, hidden, weight, y, bias, softcap, logit_scale) -> Tensor:
    """Scale the sums over some of the classes to all of them, and put the exact logit of the target in."""
    row = {name: i for i, name in enumerate(PARTIALS)}
    others = weight.shape[0] - 1
    factor = others / partials[row["count"]].clamp(min=1)
    for name in ("sum", "sum_sq", "sum_ex", "sum_x"):
        partials[row[name]] *= factor
    partials[row["count"]] = others
    inside = y.clamp(0, others).to(torch.int64)
    u = (hidden.to(partials.dtype) * weight[inside].to(partials.dtype)).sum(1)
    u = logit_scale * (u if bias is None else u + bias[inside])
    partials[row["target"]] = softcap * (u / softcap).tanh() if softcap > 0 else u
    return partials


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [R, H] as float8_e4m3fn, and the scales [R] float32 that bring them back."""
    largest = rows.abs().amax(1).to(torch.float32)
    scale = torch.where(largest > 0, largest / _FLOAT8_MAX, 1.0)
    return (rows.to(torch.float32) / scale[:, None]).to(torch.float8_e4m3fn), scale
