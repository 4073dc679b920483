"""Public functions: what they compute, what they accept, and which implementation runs.

Everything here is validated before any work: a refused call leaves its inputs and its state untouched.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaselect_kernels import dispatch
from adaselect_kernels.checks import (
    FLOATS,
    check_float_vector,
    check_logits,
    check_options,
    check_state,
    check_stats,
    describe,
    may_synchronise,
    selected_count,
)
from adaselect_kernels.ops import rows_of
from adaselect_kernels.options import (
    METHODS,
    ORDERS,
    AdaSelectionOptions,
    PackedOptions,
    check_methods,
    require_choice,
)
from adaselect_kernels.state import AdaSelectionState

DEFAULT_METHODS = ("big_loss", "small_loss", "uniform")

_DEFAULT_OPTIONS = AdaSelectionOptions()
_METHOD_CODES = {name: code for code, name in enumerate(METHODS)}


class Selection(NamedTuple):
    """What a selection returns; every tensor is on the device of the input and requires no gradient."""

    indices: Tensor  # [k] int64, rows chosen
    scores: Tensor  # [N] float32, -inf on invalid rows
    losses: Tensor  # [N] float32
    n_valid: Tensor  # [] int64, on the device


class WeightedSelection(Selection):
    """A Selection whose rows count differently: the loss to train on is the mean over rows of `weights` times loss."""

    weights: Tensor  # [k] float32, of the rows in `indices`, in their order

    def __new__(
        cls, indices: Tensor, scores: Tensor, losses: Tensor, n_valid: Tensor, weights: Tensor
    ) -> "WeightedSelection":
        self = super().__new__(cls, indices, scores, losses, n_valid)
        self.weights = weights
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.weights)  # copies and pickles keep them

    def _replace(self, **changes: Tensor) -> "WeightedSelection":  # pyright: ignore[reportIncompatibleMethodOverride]
        weights = changes.pop("weights", self.weights)
        return WeightedSelection(*Selection(*self)._replace(**changes), weights)


class SampleStats(NamedTuple):
    """Per-sample statistics, [N] float32 each (float64 for float64 logits); None where not asked for."""

    loss: Tensor | None = None  # cross-entropy
    lse: Tensor | None = None  # log sum_j exp z_j
    grad_norm: Tensor | None = None  # norm of softmax(z) - onehot(y)
    margin: Tensor | None = None  # z_y - max_{j != y} z_j
    top2_margin: Tensor | None = None  # largest minus second largest logit
    entropy: Tensor | None = None  # of softmax(z), in nats
    confidence: Tensor | None = None  # p_y
    correct: Tensor | None = None  # 1.0 if argmax_j z_j == y else 0.0


def fused_select(
    logits: Tensor,  # [N, C] or [N, T, C]; float16, bfloat16, float32, float64; any strides
    targets: Tensor,  # [N] or [N, T]; int64 or int32
    gamma: float,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    state: AdaSelectionState | None = None,
    options: AdaSelectionOptions | None = None,
    unit: str = "sample",
    order: str = "index",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    seed: int = 0,
    impl: str = "auto",
) -> Selection:
    """Choose the k = clamp(floor(gamma N + 0.5), 1, N) samples most worth a backward pass, by AdaSelection.

    One read of the logits gives the cross-entropy l_i and the gradient norm of every sample; the importances alpha_i^m of
    `methods`, their weights w^m and the curriculum reward r_i give the score s_i = r_i sum_m w^m alpha_i^m, of which the
    k largest are chosen, ties to the lower row (arXiv 2306.10728, equations 2 to 6; AdaSelectionOptions has the settings).

    gamma: sampling rate, 0 < gamma <= 1.
    methods: distinct names out of "big_loss", "small_loss", "grad_norm", "adaboost", "coreset1", "coreset2", "uniform".
    state: carries w, the method losses and the step from call to call, updated in place; None is a fresh state (equal
        weights, step 1), which leaves no trace.
    unit: "sample": one loss per leading row, the mean over its positions that are not ignored. "token": every position
        is a sample; indices count the flattened [N*T] positions, and k is taken of all of them.
    order: of the indices; "index", ascending rows, or "score", best first.
    ignore_index: rows with this target are invalid: loss 0, score -inf, chosen only when fewer than k rows are valid. So are
        rows whose loss is NaN or infinite, which keep their loss.
    label_smoothing: in [0, 1], as torch.nn.functional.cross_entropy defines it; the gradient norm uses the plain one-hot.
    seed: of the noise of "uniform", for calls without a state.
    impl: "auto", "reference", "cpu" or "triton".

    Returns a Selection: indices [k] int64, scores [N] float32, losses [N] float32, n_valid [] int64 on the device.
    Computes in float32, in float64 for float64 logits. Deterministic; not differentiable; never writes its inputs.
    Memory beyond inputs and outputs: O(N).

    Raises ValueError (gamma, an empty input, shapes or devices that disagree, an unknown name, a state of other methods or
    another device), TypeError (dtypes), IndexError (on a CPU: a target outside [0, C) that is not ignore_index; on CUDA
    such a row is invalid with loss NaN, and ADASELECT_DEBUG=1 raises), RuntimeError (impl cannot serve the call).

    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.0, 3.0]])
    >>> fused_select(logits, torch.tensor([0, 0, 1, 0]), gamma=0.5, methods=("big_loss",)).indices
    tensor([1, 3])
    """
    options = _DEFAULT_OPTIONS if options is None else check_options(options)
    names = check_methods(methods)
    return _select_from_logits(
        logits, targets, gamma, names, state, options.packed, unit, order, ignore_index, label_smoothing, seed, impl
    )


def select_from_losses(
    losses: Tensor,  # [N]; float16, bfloat16, float32, float64; any stride
    gamma: float,
    *,
    grad_norms: Tensor | None = None,  # [N], of the dtype of losses; needed by the method "grad_norm"
    methods: Sequence[str] = DEFAULT_METHODS,
    state: AdaSelectionState | None = None,
    options: AdaSelectionOptions | None = None,
    order: str = "index",
    seed: int = 0,
    impl: str = "auto",
) -> Selection:
    """`fused_select` from per-sample losses that the caller has: regression, detection, any task.

    A row is valid when its loss is finite and, where "grad_norm" is one of the methods, its gradient norm too. The other
    arguments, the errors and the result are those of `fused_select`; `losses` of the result are the given ones as float32.

    >>> select_from_losses(torch.tensor([0.1, 2.0, 0.5, 1.0]), gamma=0.5, methods=("big_loss",)).indices
    tensor([1, 3])
    """
    options = _DEFAULT_OPTIONS if options is None else check_options(options)
    names = check_methods(methods)
    return _select_from_losses(losses, grad_norms, gamma, names, state, options.packed, order, seed, impl)


def baseline_select(
    logits: Tensor,
    targets: Tensor,
    gamma: float,
    method: str,
    *,
    state: AdaSelectionState | None = None,
    unit: str = "sample",
    order: str = "index",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    seed: int = 0,
    impl: str = "auto",
) -> Selection:
    """What `method` alone chooses (AdaSelection section 3.1), on its raw key instead of a softmax importance.

    | method | chooses | score |
    |---|---|---|
    | uniform | k largest of i.i.d. noise E | E |
    | big_loss | k largest losses | l |
    | small_loss | k smallest losses | -l |
    | grad_norm | k largest gradient norms | g |
    | adaboost | k largest a = 0.5 log((1+t)/(1-t)), t = max(l, 0) / ((1 + 1e-6) max l): monotone in l, equals big_loss | a |
    | coreset1 | ceil(k/2) largest and floor(k/2) smallest losses, disjoint | max(l - min l, max l - l) |
    | coreset2 | k smallest abs(l - mean l) | -abs(l - mean l) |

    `state` (of this one method) only advances its step, which the noise of "uniform" draws from. Arguments, errors and
    result otherwise as in `fused_select`.
    """
    names = check_methods((method,))
    return _select_from_logits(
        logits, targets, gamma, names, state, _BASELINE, unit, order, ignore_index, label_smoothing, seed, impl
    )


def baseline_select_from_losses(
    losses: Tensor,
    gamma: float,
    method: str,
    *,
    grad_norms: Tensor | None = None,
    state: AdaSelectionState | None = None,
    order: str = "index",
    seed: int = 0,
    impl: str = "auto",
) -> Selection:
    """`baseline_select` from per-sample losses [N] (and gradient norms [N] for "grad_norm") that the caller has."""
    names = check_methods((method,))
    return _select_from_losses(losses, grad_norms, gamma, names, state, _BASELINE, order, seed, impl)


def per_sample_stats(
    logits: Tensor,  # [N, C] or [N, T, C]; float16, bfloat16, float32, float64; any strides
    targets: Tensor,  # [N] or [N, T]; int64 or int32
    *,
    stats: Sequence[str] = ("loss", "grad_norm"),
    unit: str = "sample",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    impl: str = "auto",
) -> SampleStats:
    """Any subset of the per-sample statistics from one read of the logits.

    With m = max_j z_j, e_j = exp(z_j - m), d = sum_j e_j and the target y:

    | name | formula |
    |---|---|
    | loss | log d - (z_y - m), with label smoothing as torch.nn.functional.cross_entropy defines it |
    | lse | m + log d |
    | grad_norm | sqrt(S1^2 + S2) / d, S1 = sum_{j != y} e_j, S2 = sum_{j != y} e_j^2: norm of softmax(z) - onehot(y) |
    | margin | z_y - max_{j != y} z_j (label margin, signed) |
    | top2_margin | largest minus second largest logit |
    | entropy | log d - sum_j e_j (z_j - m) / d, in nats; 0 * -inf counts 0 |
    | confidence | p_y = exp(-loss without smoothing) |
    | correct | 1.0 if argmax_j z_j == y else 0.0; the lowest class wins a tie |

    grad_norm is the last-layer bound of Katharopoulos & Fleuret 2018, also EL2N. A sample of [N, T, C] logits under
    unit="sample" has the mean over its positions that are not ignored, except grad_norm = sqrt(sum_t g_t^2) / (their
    number), the norm for the mean loss. Ignored rows have statistics 0. With one class both margins are +inf.

    Returns SampleStats, [N] float32 each (float64 for float64 logits), None where not asked for. Not differentiable.
    Raises as `fused_select` does, and ValueError for unknown, repeated or no stats.

    >>> stats = per_sample_stats(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), stats=("margin", "correct"))
    >>> stats.margin, stats.correct, stats.loss
    (tensor([2.]), tensor([1.]), None)
    """
    codes = check_stats(stats)
    check_logits(logits, targets, unit, ignore_index, label_smoothing)
    backend = dispatch.resolve(impl, logits.device)
    if logits.requires_grad:
        logits = logits.detach()
    table = backend.per_sample_stats(logits, targets, codes, unit, ignore_index, float(label_smoothing))
    return SampleStats(**dict(zip(stats, table.unbind(0), strict=True)))


def select_topk(
    scores: Tensor,  # [N]; float16, bfloat16, float32, float64; any stride
    k: int,
    *,
    largest: bool = True,
    order: str = "score",
    impl: str = "auto",
) -> Tensor:
    """Rows of the k best scores, exact and deterministic: ties go to the lower row, -0.0 equals 0.0, NaN comes last.

    largest: the largest scores are best, or the smallest.
    order: "score", best first, or "index", ascending rows, which is cheaper to find and to gather.
    Returns indices [k] int64. Memory beyond inputs and outputs: O(N). Not differentiable.
    Raises ValueError (k outside [1, N], no scores, not one-dimensional, unknown order), TypeError (dtypes).

    >>> select_topk(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3)
    tensor([1, 3, 2])
    """
    check_float_vector("scores", scores)
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, got {k!r}")
    if not 1 <= k <= scores.shape[0]:
        raise ValueError(f"k must be in [1, N] = [1, {scores.shape[0]}], got {k}")
    if not isinstance(largest, bool):
        raise TypeError(f"largest must be a bool, got {largest!r}")
    require_choice("order", order, ORDERS)
    return dispatch.resolve(impl, scores.device).select_topk(scores.detach(), k, largest, order)


def select_mask(
    scores: Tensor,  # [N], or [S, T] with per_sequence; float16, bfloat16, float32, float64; any strides
    gamma: float,
    *,
    per_sequence: bool = False,
    impl: str = "auto",
) -> Tensor:
    """True for the clamp(floor(gamma n + 0.5), 1, n) best scores, n = how many are finite, counted on the device.

    Where the valid rows are fewer than all, as tokens beside padding, `select_topk` would take gamma of all rows; this takes
    gamma of the valid ones, without a synchronisation. -inf, +inf and NaN are not valid and never chosen; ties go to the
    lower place; no finite score gives all False. per_sequence: scores [S, T], gamma of the finite ones of every row.

    Returns bool, of the shape of scores; `mask_to_indices` makes rows of it. Memory beyond inputs and outputs: O(N).
    Raises ValueError (gamma, shapes), TypeError (dtypes), RuntimeError (impl cannot serve the call).

    >>> select_mask(torch.tensor([0.5, float("-inf"), 2.0, 1.0]), gamma=0.67)
    tensor([False, False,  True,  True])
    """
    if not isinstance(per_sequence, bool):
        raise TypeError(f"per_sequence must be a bool, got {per_sequence!r}")
    if per_sequence and isinstance(scores, Tensor):
        if scores.dim() != 2 or scores.numel() == 0:
            raise ValueError(f"scores per sequence must be [S, T] with S, T >= 1, got shape {tuple(scores.shape)}")
        check_float_vector("scores", scores[0])
    else:
        check_float_vector("scores", scores)
    selected_count(gamma, 1)  # its checks
    backend = dispatch.resolve(impl, scores.device)
    scores = scores.detach()
    if per_sequence:
        return backend.select_mask(scores, float(gamma))
    return backend.select_mask(scores[None], float(gamma))[0]


def mask_to_indices(mask: Tensor, k: int) -> Tensor:
    """[k] int64: the flattened places where `mask` (bool, of `select_mask`) is true, ascending, then -1; no synchronisation.

    Places beyond the first k are dropped: with k = clamp(floor(gamma N + 0.5), 1, N) of all N rows a mask of
    `select_mask(scores, gamma)` has none.
    Raises ValueError (k outside [1, N]), TypeError (dtypes).

    >>> mask_to_indices(torch.tensor([False, True, False, True]), 3)
    tensor([ 1,  3, -1])
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, got {got}")
    mask = mask.reshape(-1)
    n = mask.shape[0]
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, got {k!r}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, N] = [1, {n}], got {k}")
    place = mask.cumsum(0) - 1
    place = torch.where(mask & (place < k), place, k)  # k: the place that is cut off
    return place.new_full((k + 1,), -1).scatter(0, place, torch.arange(n, device=mask.device))[:k]


def bank_select(
    features: Tensor,  # [N, D]; float16, bfloat16, float32, float64 or uint8; any strides
    rows: Tensor,  # [n] int64, the bank: row numbers of features
    theta: Tensor,  # [D + 1]; float32, or float64 for float64 features
    k: int,
    *,
    norm: float = 1.0,
    largest: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rows of a bank that a linear model of the loss predicts to be worst: IMPON's scoring and pick in one operator.

    Predicts theta . c_i with the context c_i = [x_i; norm] for each row of the bank, x_i = features[rows[i]], and picks the k
    largest predictions (the smallest with largest=False), ties to the earlier place in the bank, NaN last.

    Returns picked [k] int64, row numbers in the order of the bank, and predictions [n], of the dtype of theta. Sums are in
    that dtype. Deterministic; not differentiable. Memory beyond inputs and outputs: O(n), features are gathered on the fly.
    Raises ValueError (shapes, devices, k outside [1, n]), TypeError (dtypes), IndexError (on a CPU: a row outside [0, N); on
    CUDA its prediction is NaN, and ADASELECT_DEBUG=1 raises), RuntimeError (impl cannot serve the call).

    >>> features = torch.tensor([[1.0], [4.0], [2.0], [3.0]])
    >>> bank_select(features, torch.tensor([3, 0, 2]), torch.tensor([1.0, 0.5]), k=2)
    (tensor([3, 2]), tensor([3.5000, 1.5000, 2.5000]))
    """
    for name, tensor in (("features", features), ("rows", rows), ("theta", theta)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != features.device:
            raise ValueError(f"{name} must be on the device of features, {features.device}, got {tensor.device}")
    if features.dtype not in (*FLOATS, torch.uint8):
        raise TypeError(f"features must be float16, bfloat16, float32, float64 or uint8, got {features.dtype}")
    if features.dim() != 2:
        raise ValueError(f"features must be [N, D], got shape {tuple(features.shape)}")
    if rows.dtype != torch.int64:
        raise TypeError(f"rows must be int64, got {rows.dtype}")
    if rows.dim() != 1 or rows.shape[0] == 0:
        raise ValueError(f"rows must be [n] with n >= 1, got shape {tuple(rows.shape)}")
    expected = torch.float64 if features.dtype == torch.float64 else torch.float32
    if theta.dtype != expected:
        raise TypeError(f"theta must be {expected} for features of {features.dtype}, got {theta.dtype}")
    if theta.shape != (features.shape[1] + 1,):
        raise ValueError(f"theta must be [D + 1] = [{features.shape[1] + 1}], got shape {tuple(theta.shape)}")
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, got {k!r}")
    if not 1 <= k <= rows.shape[0]:
        raise ValueError(f"k must be in [1, n] = [1, {rows.shape[0]}], got {k}")
    if isinstance(norm, bool) or not isinstance(norm, numbers.Real):
        raise TypeError(f"norm must be a number, got {norm!r}")
    if not isinstance(largest, bool):
        raise TypeError(f"largest must be a bool, got {largest!r}")
    if features.device.type == "cuda" and may_synchronise(rows):
        bad = (rows < 0) | (rows >= features.shape[0])
        if bad.any():
            place = int(bad.to(torch.int8).argmax())
            raise IndexError(f"row {int(rows[place])} at place {place} of the bank is outside [0, {features.shape[0]})")
    backend = dispatch.resolve(impl, features.device)
    return backend.bank_select(features.detach(), rows, theta.detach(), float(norm), k, largest)


_BASELINE: PackedOptions = _DEFAULT_OPTIONS.packed._replace(baseline=1.0)


def _select_from_logits(
    logits, targets, gamma, names, state, packed, unit, order, ignore_index, label_smoothing, seed, impl
) -> Selection:
    check_logits(logits, targets, unit, ignore_index, label_smoothing)
    k = selected_count(gamma, rows_of(logits, unit))
    require_choice("order", order, ORDERS)
    buffer, seed = check_state(state, names, logits.device, seed)
    backend = dispatch.resolve(impl, logits.device)
    if logits.requires_grad:
        logits = logits.detach()
    codes = [_METHOD_CODES[name] for name in names]
    return Selection(
        *backend.fused_select(
            logits, targets, buffer, codes, k, unit, order, ignore_index, float(label_smoothing), seed, packed
        )
    )


def _select_from_losses(losses, grad_norms, gamma, names, state, packed, order, seed, impl) -> Selection:
    check_float_vector("losses", losses)
    k = selected_count(gamma, losses.shape[0])
    if "grad_norm" in names:
        if grad_norms is None:
            raise ValueError("the method 'grad_norm' needs grad_norms [N], got None")
        check_float_vector("grad_norms", grad_norms)
        if grad_norms.shape != losses.shape or grad_norms.device != losses.device or grad_norms.dtype != losses.dtype:
            raise ValueError(f"grad_norms must be like losses, {describe(losses)}, got {describe(grad_norms)}")
        grad_norms = grad_norms.detach()
    else:
        grad_norms = None
    require_choice("order", order, ORDERS)
    buffer, seed = check_state(state, names, losses.device, seed)
    backend = dispatch.resolve(impl, losses.device)
    losses = losses.detach()
    if not math.isnan(packed.curriculum_power) and may_synchronise(losses):
        negative = (losses < 0) & losses.isfinite()
        if negative.any():
            row = int(negative.to(torch.int8).argmax())
            raise ValueError(f"a curriculum needs losses >= 0, got {float(losses[row])} in row {row}")
    codes = [_METHOD_CODES[name] for name in names]
    indices, scores, n_valid = backend.select_from_losses(losses, grad_norms, buffer, codes, k, order, seed, packed)
    return Selection(indices, scores, losses.to(torch.float32), n_valid)
