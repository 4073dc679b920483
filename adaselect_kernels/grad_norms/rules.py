"""Rules: squared norms of per-sample parameter gradients of one call, from its inputs and the gradient at its output.

A rule is found by the function's name. `bind` reads the call; None means that this use of the parameters has no rule.
Formulas: docs/grad_norms.md; the arithmetic is in the operators (ops.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaselect_kernels import dispatch
from adaselect_kernels.grad_norms.layout import Layout
from adaselect_kernels.grad_norms.rows import Rows


@dataclass(slots=True)
class Call:
    """A call that has a rule. `sq_norms(rows, x, layout, grads, grads_layout, weight, bias)` -> [samples].

    kind: calls of one kind on one parameter may be joined along their positions, where `positions` gives [N, T, ...].
    moments(output) -> the mean and rstd that the call computed, to be handed to `sq_norms` as moments=; None: not there.
    """

    kind: str
    input: Tensor | None  # the sample tensor, while the call is read
    roles: dict[str, Tensor]  # "weight", "bias": the parameters, those given
    sq_norms: Callable[..., Tensor | None]  # None: not this way, by calling again
    positions: Callable[..., tuple[Tensor, ...]] | None = None
    isometric: bool = True  # the norm does not depend on how the parameter is transposed or shaped
    moments: Callable[[Tensor], tuple[Tensor, Tensor] | None] | None = None


def _operator(name: str, tensor: Tensor) -> Callable[..., Any]:
    return getattr(dispatch.resolve("auto", tensor.device), name)


def _same_dtype(x: Tensor, grads: Tensor) -> Tensor:
    """Under autocast the layer saw x rounded to the dtype of its output."""
    return x if x.dtype == grads.dtype else x.to(grads.dtype)


def _given(**roles: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in roles.items() if isinstance(tensor, Tensor)}


# ---- linear layers: y = x W^T + b


def _linear_positions(rows: Rows, x: Tensor, layout: Layout, grads: Tensor, grads_layout: Layout) -> tuple[Tensor, ...]:
    """A [N, T, d], G [N, T, p]."""
    return rows.positions(_same_dtype(x, grads), layout), rows.positions(grads, grads_layout)


def linear_sq_norms(a: Tensor, g: Tensor, weight: bool, bias: bool) -> Tensor:
    return _operator("linear_grad_sq_norms", g)(a, g, weight, bias, "auto")


def _linear_call_sq_norms(rows, x, layout, grads, grads_layout, weight, bias) -> Tensor:
    a, g = _linear_positions(rows, x, layout, grads, grads_layout)
    return linear_sq_norms(a, g, weight, bias)


def _linear_call(x: Tensor, roles: dict[str, Tensor]) -> Call | None:
    return None if x.dim() < 2 else Call("linear", x, roles, _linear_call_sq_norms, _linear_positions)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    return _linear_call(input, _given(weight=weight, bias=bias))


def _matmul(input: Tensor, other: Tensor) -> Call | None:
    return _linear_call(input, {"weight": other}) if other.dim() == 2 else None


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Call | None:
    if (beta, alpha) != (1, 1) or input.dim() != 1:
        return None
    return _linear_call(mat1, {"weight": mat2, "bias": input})


def linear_grads_and_sq_norms(a: Tensor, g: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _operator("linear_grads_and_sq_norms", g)(a, g, bias)


def tied_products(a: Tensor, g: Tensor, ids: Tensor, u: Tensor, padding_idx: int) -> Tensor:
    """<G_i^T A_i, sum_s e_{id_s} u_s^T> = sum_{t, s} G[t, id_s] <a_t, u_s>: head and embedding of one table [V, d]."""
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    found = []
    for i in range(g.shape[0]):  # T x S numbers at a time
        ids_i = ids[i].long()
        facing = g[i][:, ids_i].to(wide) * (ids_i != padding_idx)
        found.append((facing * (a[i].to(wide) @ u[i].to(wide).mT)).sum())
    return torch.stack(found) if found else g.new_zeros(0, dtype=wide)


# ---- convolutions


def _tuple(value: Any, n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else list(value) * (n if len(value) == 1 else 1)


def _leading(layout: Layout, grads_layout: Layout) -> bool:
    return layout == grads_layout == Layout(0)


def _conv_rule(dims: int) -> Callable[..., Call | None]:
    def bind(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Call | None:
        if input.dim() != dims + 2:
            return None
        kernel = list(weight.shape[2:])
        stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)

        def sq_norms(rows, x, layout, grads, grads_layout, want_weight, want_bias) -> Tensor | None:
            if not _leading(layout, grads_layout) or rows.samples != rows.count:
                return None
            x, pads = _same_dtype(x, grads), padding
            if pads == "valid":
                pads = 0
            elif pads == "same":
                total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
                x = F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
                pads = 0
            return _operator("conv_grad_sq_norms", grads)(
                x, grads, kernel, stride, _tuple(pads, dims), dilation, groups, want_weight, want_bias, "auto"
            )

        return Call("conv", input, _given(weight=weight, bias=bias), sq_norms)

    return bind


def _conv_transpose_rule(dims: int) -> Callable[..., Call | None]:
    def bind(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1) -> Call | None:
        if input.dim() != dims + 2:
            return None
        kernel = list(weight.shape[2:])

        def sq_norms(rows, x, layout, grads, grads_layout, want_weight, want_bias) -> Tensor | None:
            if not _leading(layout, grads_layout) or rows.samples != rows.count:
                return None
            # dW[ci, co] = sum_t x[ci, t] g[co, t stride + k dilation - padding]: the roles of input and grads swap
            operator = _operator("conv_grad_sq_norms", grads)
            where = (kernel, *(_tuple(v, dims) for v in (stride, padding, dilation)), groups)
            total = operator(grads, _same_dtype(x, grads), *where, want_weight, False, "auto")
            if want_bias:
                total = total + bias_sq_norms(grads.flatten(2).mT)
            return total

        return Call("conv", input, _given(weight=weight, bias=bias), sq_norms)

    return bind


def bias_sq_norms(g: Tensor) -> Tensor:
    """|sum_t g_it|^2 of g [N, T, p]."""
    return _operator("affine_grad_sq_norms", g)(g, g, None, None, False, True)


# ---- embeddings


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Call | None:  # fmt: skip
    skipped = -1 if padding_idx is None else padding_idx % weight.shape[0]

    def positions(rows, ids, layout, grads, grads_layout) -> tuple[Tensor, Tensor]:
        if scale_grad_by_freq:
            # the gradient of a row of the table is divided by how often the whole batch uses it
            grads = grads / torch.bincount(ids.flatten(), minlength=weight.shape[0])[ids].unsqueeze(-1).to(grads.dtype)
        i, g = rows.by_sample(ids, layout), rows.by_sample(grads, grads_layout)
        return i.reshape(i.shape[0], math.prod(i.shape[1:])), g.reshape(g.shape[0], math.prod(i.shape[1:]), g.shape[-1])

    def sq_norms(rows, ids, layout, grads, grads_layout, want_weight, want_bias) -> Tensor:
        i, g = positions(rows, ids, layout, grads, grads_layout)
        return embedding_sq_norms(i, g, skipped)

    return Call(f"embedding {skipped}", input, {"weight": weight}, sq_norms, positions, isometric=False)


def embedding_sq_norms(ids: Tensor, g: Tensor, padding_idx: int) -> Tensor:
    return _operator("embedding_grad_sq_norms", g)(ids, g, padding_idx)


def _getitem(table: Tensor, index: Any) -> Call | None:
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32):
        return _embedding(index % table.shape[0], table)
    return None


# ---- normalisation layers: y = xhat * weight + bias


def _affine_call(
    x: Tensor,
    roles: dict[str, Tensor],
    normalized: Callable[..., tuple[Tensor | None, ...] | None],
    node: str = "",
) -> Call:
    """normalized(rows, x, layout, grads, grads_layout, moments) -> values [N, T, C], mean, rstd, grads [N, T, C].

    node: of autograd, that saves mean and rstd as its second and third result.
    """

    def moments(out: Tensor) -> tuple[Tensor, Tensor] | None:
        if not node or out.grad_fn is None or out.grad_fn.name() != node:
            return None
        found = tuple(getattr(out.grad_fn, f"_saved_result{i}", None) for i in (1, 2))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # half precision may save halves
        mean, rstd = (m.detach() if isinstance(m, Tensor) and m.dtype == wide else None for m in found)
        return None if mean is None or rstd is None else (mean, rstd)

    def sq_norms(rows, x, layout, grads, grads_layout, weight, bias, moments=None) -> Tensor | None:
        found = normalized(rows, _same_dtype(x, grads), layout, grads, grads_layout, moments)
        if found is None:
            return None
        values, mean, rstd, g = found
        assert g is not None
        return _operator("affine_grad_sq_norms", g)(values, g, mean, rstd, weight, bias)

    return Call("affine", x, roles, sq_norms, moments=moments)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _trailing(rows: Rows, tensor: Tensor, layout: Layout, dims: int) -> Tensor | None:
    """[N, T, C], C = the last `dims` dimensions together."""
    return None if layout.dim >= tensor.dim() - dims else rows.positions(tensor, layout, dims)


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5) -> Call:
    dims = len(normalized_shape)

    def normalized(rows, x, layout, grads, grads_layout, moments):
        values, g = _trailing(rows, x, layout, dims), _trailing(rows, grads, grads_layout, dims)
        if values is None or g is None:
            return None
        if moments is None:
            _, *moments = torch.native_layer_norm(_wide(values), values.shape[2:], None, None, eps)
        else:  # [..., 1 for each normalized dimension]
            moments = [rows.positions(m, layout, dims) for m in moments]
        mean, rstd = (m.expand_as(values) for m in moments)
        return values, mean, rstd, g

    return _affine_call(input, _given(weight=weight, bias=bias), normalized, "NativeLayerNormBackward0")


def _rms_norm(input, normalized_shape, weight=None, eps=None) -> Call:
    dims = len(normalized_shape)

    def normalized(rows, x, layout, grads, grads_layout, moments):
        values, g = _trailing(rows, x, layout, dims), _trailing(rows, grads, grads_layout, dims)
        if values is None or g is None:
            return None
        least = torch.finfo(x.dtype).eps if eps is None else eps
        rstd = (_wide(values).square().mean(2, keepdim=True) + least).rsqrt()
        return values, None, rstd.expand_as(values), g

    return _affine_call(input, _given(weight=weight), normalized)


def _channels(x: Tensor, values: Tensor) -> Tensor:
    """[N, L, C] view of [N, C, ...]."""
    return values.reshape(values.shape[0], x.shape[1], -1).mT


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5) -> Call:
    def normalized(rows, x, layout, grads, grads_layout, moments):
        if not _leading(layout, grads_layout) or rows.samples != rows.count:
            return None
        values = _channels(x, x)
        n, positions, channels = values.shape
        if moments is None:
            _, *moments = torch.native_group_norm(
                _wide(x).contiguous(), None, None, n, channels, positions, num_groups, eps
            )  # [N, groups] each
        each = channels // num_groups
        mean, rstd = (
            m[:, None, :, None].expand(n, 1, num_groups, each).reshape(n, 1, channels).expand_as(values)
            for m in moments
        )
        return values, mean, rstd, _channels(x, grads)

    return _affine_call(input, _given(weight=weight, bias=bias), normalized, "NativeGroupNormBackward0")


def _instance_norm(
    input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
) -> Call | None:
    if use_input_stats:
        return _group_norm(input, input.shape[1], weight, bias, eps)
    return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Call | None:
    """With constant statistics; in training mode the recorder has dealt with the call before."""
    if training:
        return None

    def normalized(rows, x, layout, grads, grads_layout, moments):
        if not _leading(layout, grads_layout) or rows.samples != rows.count:
            return None
        values = _channels(x, x)
        mean, rstd = _wide(running_mean), (_wide(running_var) + eps).rsqrt()
        return values, mean.expand_as(values), rstd.expand_as(values), _channels(x, grads)

    return _affine_call(input, _given(weight=weight, bias=bias), normalized)


def _prelu(input: Tensor, weight: Tensor) -> Call:
    """y = max(x, 0) + weight min(x, 0)."""

    def normalized(rows, x, layout, grads, grads_layout, moments):
        if not _leading(layout, grads_layout) or rows.samples != rows.count:
            return None
        n, channels = x.shape[0], weight.numel()
        g = grads.expand_as(x)
        if channels == 1:
            return x.clamp(max=0).reshape(n, -1, 1), None, None, g.reshape(n, -1, 1)
        return _channels(x, x.clamp(max=0)), None, None, _channels(x, g)

    return _affine_call(input, {"weight": weight}, normalized)


RULES: dict[str, Callable[..., Call | None]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "__matmul__": _matmul,
    "addmm": _addmm,
    "conv1d": _conv_rule(1),
    "conv2d": _conv_rule(2),
    "conv3d": _conv_rule(3),
    "conv_transpose1d": _conv_transpose_rule(1),
    "conv_transpose2d": _conv_transpose_rule(2),
    "conv_transpose3d": _conv_transpose_rule(3),
    "embedding": _embedding,
    "__getitem__": _getitem,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
    "prelu": _prelu,
}

# ---- elementwise functions: x + parameter, x * parameter

BROADCASTING = {"add", "sub", "mul"}


def broadcast(name: str, tensor: Tensor) -> Call:
    """The gradient of `tensor` is that of the output (times x), summed over the dimensions it is broadcast along."""

    def sq_norms(rows, x, layout, grads, grads_layout, weight, bias) -> Tensor | None:
        part = _wide(grads) * x if name == "mul" else _wide(grads)
        added = part.dim() - tensor.dim()
        sizes = [1] * added + list(tensor.shape)
        faces = sizes.pop(grads_layout.dim) != 1  # one entry a row, as x has
        if faces and rows.samples != rows.count:
            return None
        found = rows.by_sample(part, grads_layout)  # [N, F, the other dimensions]
        summed = [2 + i for i, size in enumerate(sizes) if size == 1] + ([] if faces else [1])
        if summed:
            found = found.sum(summed)
        return found.flatten(1).square().sum(1)

    return Call("broadcast", None, {"weight": tensor}, sq_norms)


# Functions of several tensors that broadcast, or join along a dimension: a parameter's part in them is found by calling them
# again on one sample, whichever argument it is.
ELEMENTWISE = {
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "true_divide",
    "where",
    "lerp",
    "addcmul",
    "maximum",
    "minimum",
    "pow",
}
JOINING = {"cat", "concat", "concatenate", "stack"}
