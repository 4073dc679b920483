"""Every operator: schema, fake (shape) implementation, and where its implementations come from.

Importing this module needs neither Triton nor the compiled extension. The extension registers the CPU kernels itself when
it is loaded (dispatch.py); the CUDA kernels are the Triton launchers, imported at their first call.

All backends (reference.py, the extension, kernels/) implement these signatures:

per_sample_stats   -> [S, N] float32 (float64 for float64 logits), one row per entry of `stats`, a position in STATS.
batch_scores       -> scores [N] float32, n_valid [] int64; `state` ([2M + 1] float64, see state.py) is updated in place.
select_topk        -> [k] int64; best `k` of `scores` [N], ties to the lower row, NaN last.
select_from_losses -> indices [k], scores [N], n_valid []: batch_scores and select_topk in one call.
fused_select       -> indices [k], scores [N], losses [N] float32, n_valid []: all three stages in one call.
bank_select        -> picked [k] int64, predictions [n]: of the bank `rows` [n] of features [N, D] the k rows of best predicted
                      loss theta . [x; norm], in the order of the bank, ties to the earlier; theta and predictions are
                      float32 (float64 for float64 features, which may be uint8).

Over logits that are never stored, z = softcap * tanh(u / softcap), u = logit_scale * (hidden @ weight.T + bias); softcap 0 is
none; hidden [N, H] or [N, T, H], weight [V, H] and bias [V] of one dtype:

linear_per_sample_stats -> as per_sample_stats.
fused_linear_select     -> as fused_select.
linear_partials         -> [PARTIALS, N] (options.py has the rows), float32 (float64 for float64 hidden): what the V classes
                           first_class + class_stride * v say of the rows of hidden [N, H], the target's own class left out of
                           every sum. hidden_scale [N] and weight_scale [V] float32 multiply rows of float8_e4m3fn hidden and
                           weight. `stats` and label_smoothing tell which partials will be read; the others, and those of
                           ignored rows, may hold anything.
combine_partials        -> [S, N]: the statistics from the partials [R, PARTIALS, N] of R disjoint sets of classes that make
                           up all `classes`. An ignored row is 0, a target outside [0, classes) NaN.

Gradients of sum_i w_i l_i, l_i = (1 - eps)(lse - z_y) + eps (lse - mean_j z_j) + z_loss lse^2 with the weights w (`row_weight`):
rows of weight 0 are exactly 0 whatever their logits, rows of weight NaN are NaN; lse is given, in the dtype of the statistics or,
so that no digit of it is lost, in float64.

cross_entropy_backward  -> like logits [N, C], of their dtype, contiguous.
linear_loss_backward    -> rows [N, H] in the dtype of the statistics, weight [V, H] and bias [V] in that of weight; those not
                           `wanted` are [0]. The V classes start at first_class, of `classes` in all. Sums are accumulated in
                           the dtype of the statistics.
select_mask             -> bool [S, T]: of each row of scores [S, T] the clamp(floor(gamma n + 0.5), 1, n) best of its n finite
                           scores, counted on the device; ties to the lower place; none where n = 0.

Squared norms of the gradient of each sample's loss, [N] float32 (float64 for float64 inputs), from what a layer saw:

linear_grad_sq_norms    -> |G_i^T A_i|^2 (weight) + |sum_t g_it|^2 (bias); A = activations [N, T, d], G = grads [N, T, p] of
                           the loss sum at the output; `form` "direct", "gram" or "auto", the cheapest by arithmetic;
                           of 3 x 3 convolutions of stride 1 on the CPU also "winograd".
linear_grads_and_sq_norms -> the same, weight and (when asked, else zeros [0]) bias included, with the batch's gradients in
                           the same pass: sq_norms [N], sum_i G_i^T A_i [p, d] and sum_it g_it [p], both in the dtype of grads.
conv_grad_sq_norms      -> the same of a convolution: input [N, C, ...], grads [N, O, ...], one to three spatial dimensions,
                           zero padding. A transposed convolution has input and grads swapped, and no bias.
embedding_grad_sq_norms -> sum_v |sum_{t: id_it = v} g_it|^2, v != padding_idx; ids [N, T], grads [N, T, d].
affine_grad_sq_norms    -> |sum_t g_it * xhat_it|^2 (weight) + |sum_t g_it|^2 (bias), xhat = (values - mean) * rstd; values,
                           grads, mean and rstd [N, T, C] (mean, rstd: None are 0 and 1, or float32/float64 of the result).

Sums are accumulated in float32 at least; activations and grads have the same dtype. N = 0 and T = 0 give [N] zeros.

`methods` are positions in METHODS, `options` is a PackedOptions, `seed` a 64-bit pattern as a signed integer,
`state=None` a fresh state. A row outside `valid` (None: all) or of non-finite loss is invalid: score -inf, importance 0;
so is one of non-finite grad_norm when the grad_norm method is asked for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from adaselect_kernels.options import PARTIALS, compute_dtype

LIBRARY = torch.library.Library("adaselect", "DEF")

SCHEMAS = {
    "per_sample_stats": "(Tensor logits, Tensor targets, int[] stats, str unit, int ignore_index, float label_smoothing)"
    " -> Tensor",
    "batch_scores": "(Tensor losses, Tensor? grad_norms, Tensor? valid, Tensor(a!)? state, int[] methods, SymInt k, int seed,"
    " float[] options) -> (Tensor, Tensor)",
    "select_topk": "(Tensor scores, SymInt k, bool largest, str order) -> Tensor",
    "select_from_losses": "(Tensor losses, Tensor? grad_norms, Tensor(a!)? state, int[] methods, SymInt k, str order, int seed,"
    " float[] options) -> (Tensor, Tensor, Tensor)",
    "fused_select": "(Tensor logits, Tensor targets, Tensor(a!)? state, int[] methods, SymInt k, str unit, str order,"
    " int ignore_index, float label_smoothing, int seed, float[] options) -> (Tensor, Tensor, Tensor, Tensor)",
    "linear_per_sample_stats": "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, int[] stats, str unit,"
    " int ignore_index, float label_smoothing, float softcap, float logit_scale) -> Tensor",
    "fused_linear_select": "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor(a!)? state, int[] methods,"
    " SymInt k, str unit, str order, int ignore_index, float label_smoothing, float softcap, float logit_scale, int seed,"
    " float[] options) -> (Tensor, Tensor, Tensor, Tensor)",
    "linear_partials": "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? hidden_scale,"
    " Tensor? weight_scale, int first_class, int class_stride, int[] stats, int ignore_index, float label_smoothing,"
    " float softcap, float logit_scale) -> Tensor",
    "combine_partials": "(Tensor partials, Tensor targets, SymInt classes, int[] stats, int ignore_index,"
    " float label_smoothing) -> Tensor",
    "cross_entropy_backward": "(Tensor row_weight, Tensor logits, Tensor targets, Tensor lse, float label_smoothing,"
    " float softcap, float z_loss) -> Tensor",
    "linear_loss_backward": "(Tensor row_weight, Tensor rows, Tensor weight, Tensor targets, Tensor lse, Tensor? bias,"
    " int first_class, SymInt classes, float label_smoothing, float softcap, float logit_scale, float z_loss,"
    " bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    "select_mask": "(Tensor scores, float gamma) -> Tensor",
    "bank_select": "(Tensor features, Tensor rows, Tensor theta, float norm, SymInt k, bool largest) -> (Tensor, Tensor)",
    "linear_grad_sq_norms": "(Tensor activations, Tensor grads, bool weight, bool bias, str form) -> Tensor",
    "linear_grads_and_sq_norms": "(Tensor activations, Tensor grads, bool bias) -> (Tensor, Tensor, Tensor)",
    "conv_grad_sq_norms": "(Tensor input, Tensor grads, int[] kernel_size, int[] stride, int[] padding, int[] dilation,"
    " int groups, bool weight, bool bias, str form) -> Tensor",
    "embedding_grad_sq_norms": "(Tensor ids, Tensor grads, int padding_idx) -> Tensor",
    "affine_grad_sq_norms": "(Tensor values, Tensor grads, Tensor? mean, Tensor? rstd, bool weight, bool bias) -> Tensor",
}


def _cuda_kernel(name: str):
    def launch(*args):
        from adaselect_kernels import kernels

        return getattr(kernels, name)(*args)

    return launch


for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    LIBRARY.impl(_name, _cuda_kernel(_name), "CUDA")
    # Selection is not differentiable: skip autograd, so that outputs never require a gradient.
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def rows_of(logits: Tensor, unit: str) -> int:
    """How many samples `logits` [N, C] or [N, T, C] holds under `unit`."""
    return logits.shape[0] * logits.shape[1] if logits.dim() == 3 and unit == "token" else logits.shape[0]


@torch.library.register_fake("adaselect::per_sample_stats", lib=LIBRARY)
def _(
    logits: Tensor, targets: Tensor, stats: Sequence[int], unit: str, ignore_index: int, label_smoothing: float
) -> Tensor:
    return logits.new_empty((len(stats), rows_of(logits, unit)), dtype=compute_dtype(logits))


@torch.library.register_fake("adaselect::batch_scores", lib=LIBRARY)
def _(losses, grad_norms, valid, state, methods, k, seed, options) -> tuple[Tensor, Tensor]:
    return losses.new_empty((losses.shape[0],), dtype=torch.float32), losses.new_empty((), dtype=torch.int64)


@torch.library.register_fake("adaselect::select_topk", lib=LIBRARY)
def _(scores: Tensor, k: int, largest: bool, order: str) -> Tensor:
    return scores.new_empty((k,), dtype=torch.int64)


@torch.library.register_fake("adaselect::select_from_losses", lib=LIBRARY)
def _(losses, grad_norms, state, methods, k, order, seed, options) -> tuple[Tensor, Tensor, Tensor]:
    return (
        losses.new_empty((k,), dtype=torch.int64),
        losses.new_empty((losses.shape[0],), dtype=torch.float32),
        losses.new_empty((), dtype=torch.int64),
    )


@torch.library.register_fake("adaselect::fused_select", lib=LIBRARY)
def _(
    logits, targets, state, methods, k, unit, order, ignore_index, label_smoothing, seed, options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = rows_of(logits, unit)
    return (
        logits.new_empty((k,), dtype=torch.int64),
        logits.new_empty((n,), dtype=torch.float32),
        logits.new_empty((n,), dtype=torch.float32),
        logits.new_empty((), dtype=torch.int64),
    )


@torch.library.register_fake("adaselect::linear_per_sample_stats", lib=LIBRARY)
def _(hidden, weight, targets, bias, stats, unit, ignore_index, label_smoothing, softcap, logit_scale) -> Tensor:
    return hidden.new_empty((len(stats), rows_of(hidden, unit)), dtype=compute_dtype(hidden))


@torch.library.register_fake("adaselect::fused_linear_select", lib=LIBRARY)
def _(
    hidden, weight, targets, bias, state, methods, k, unit, order, ignore_index, label_smoothing, softcap, logit_scale,
    seed, options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n = rows_of(hidden, unit)
    return (
        hidden.new_empty((k,), dtype=torch.int64),
        hidden.new_empty((n,), dtype=torch.float32),
        hidden.new_empty((n,), dtype=torch.float32),
        hidden.new_empty((), dtype=torch.int64),
    )


@torch.library.register_fake("adaselect::linear_partials", lib=LIBRARY)
def _(
    hidden, weight, targets, bias, hidden_scale, weight_scale, first_class, class_stride, stats, ignore_index,
    label_smoothing, softcap, logit_scale,
) -> Tensor:  # fmt: skip
    return hidden.new_empty((len(PARTIALS), hidden.shape[0]), dtype=compute_dtype(hidden))


@torch.library.register_fake("adaselect::combine_partials", lib=LIBRARY)
def _(partials, targets, classes, stats, ignore_index, label_smoothing) -> Tensor:
    return partials.new_empty((len(stats), partials.shape[2]))


@torch.library.register_fake("adaselect::cross_entropy_backward", lib=LIBRARY)
def _(row_weight, logits, targets, lse, label_smoothing, softcap, z_loss) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("adaselect::linear_loss_backward", lib=LIBRARY)
def _(
    row_weight, rows, weight, targets, lse, bias, first_class, classes, label_smoothing, softcap, logit_scale, z_loss, wanted,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        rows.new_empty(rows.shape if wanted[0] else (0,), dtype=compute_dtype(rows)),
        weight.new_empty(weight.shape if wanted[1] else (0,)),
        weight.new_empty(weight.shape[:1] if wanted[2] else (0,)),
    )


@torch.library.register_fake("adaselect::select_mask", lib=LIBRARY)
def _(scores: Tensor, gamma: float) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


@torch.library.register_fake("adaselect::bank_select", lib=LIBRARY)
def _(features: Tensor, rows: Tensor, theta: Tensor, norm: float, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    return rows.new_empty((k,)), theta.new_empty((rows.shape[0],))


def _sq_norms(grads: Tensor) -> Tensor:
    return grads.new_empty((grads.shape[0],), dtype=compute_dtype(grads))


@torch.library.register_fake("adaselect::linear_grad_sq_norms", lib=LIBRARY)
def _(activations, grads, weight, bias, form) -> Tensor:
    return _sq_norms(grads)


@torch.library.register_fake("adaselect::linear_grads_and_sq_norms", lib=LIBRARY)
def _(activations, grads, bias) -> tuple[Tensor, Tensor, Tensor]:
    features = grads.shape[2]
    weight_grad = grads.new_empty((features, activations.shape[2]))
    return _sq_norms(grads), weight_grad, grads.new_empty((features if bias else 0,))


@torch.library.register_fake("adaselect::conv_grad_sq_norms", lib=LIBRARY)
def _(input, grads, kernel_size, stride, padding, dilation, groups, weight, bias, form) -> Tensor:
    return _sq_norms(grads)


@torch.library.register_fake("adaselect::embedding_grad_sq_norms", lib=LIBRARY)
def _(ids, grads, padding_idx) -> Tensor:
    return _sq_norms(grads)


@torch.library.register_fake("adaselect::affine_grad_sq_norms", lib=LIBRARY)
def _(values, grads, mean, rstd, weight, bias) -> Tensor:
    return _sq_norms(grads)
