"""Where the sample axis of a tensor is, and where it goes when a function reshapes, transposes or reduces the tensor.

Exact or unknown: a layout that cannot be told is None, and a layer that meets a tensor of unknown layout is refused.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Dimension `dim` has size outer * rows * inner; index i of it belongs to row (i // inner) % rows."""

    dim: int
    outer: int = 1
    inner: int = 1


LEADING = Layout(0)
Known = tuple[Tensor, Layout | None]  # a sample tensor and its layout, None where that is not known

# A reshape keeps the linear order of the elements.
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as", "ravel"}
_TRANSPOSITIONS = {"transpose", "swapaxes", "swapdims", "t", "T", "mT", "H", "mH", "permute", "movedim"}
# Dimensions may be added on the left; the others stay or grow.
_EXPANSIONS = {"expand", "expand_as", "broadcast_to", "repeat", "tile"}
# Dimensions may be added on the right.
_LOOKUPS = {"embedding", "one_hot", "__getitem__"}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
# Elements move along a dimension, or meet there: the sample axis must not be the one named by `dim`.
# fmt: off
_ALONG_A_DIMENSION = {
    "flip", "roll", "sort", "argsort", "topk", "gather", "index_select", "take_along_dim", "scatter",
    "scatter_add", "softmax", "log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin",
    "select", "narrow", "split", "chunk", "unbind", "tensor_split", "cat", "concat", "concatenate", "unfold",
    "index_add", "index_copy", "diff", "sum", "mean", "amax", "amin", "max", "min", "std", "var", "var_mean",
    "std_mean", "prod", "logsumexp", "norm", "argmax", "argmin", "any", "all", "median", "glu", "normalize",
    "cosine_similarity", "renorm",
}
# fmt: on
# Where `dim` stands among the arguments, when not second, and what it is when it is not given, when not "all".
_POSITION_OF_DIM: dict[str, int] = dict.fromkeys(
    ("split", "chunk", "tensor_split", "topk", "norm", "cosine_similarity", "normalize", "roll"), 2
)
_DEFAULT_DIM: dict[str, int] = dict.fromkeys(
    ("cat", "concat", "concatenate", "split", "chunk", "unbind", "tensor_split"), 0
) | {
    **dict.fromkeys(("glu", "sort", "argsort", "topk", "diff"), -1),
    **dict.fromkeys(("cosine_similarity", "normalize"), 1),
}


# Only the first argument's values go into the result; the others name a shape, a type or a device.
_LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
_FACTORIES = {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "new_empty_strided"}
PARTIAL = _LIKE | _FACTORIES
# Positions meet in a window, and all but the first two dimensions are positions.
_WINDOWS = (
    "pool",
    "conv",
    "interpolate",
    "upsample",
    "grid_sample",
    "pixel_",
    "channel_shuffle",
    "fold",
    "response_norm",
)
_CHANNEL_NORMS = {"group_norm", "instance_norm", "batch_norm"}
_PRODUCTS = {"matmul", "bmm", "mm", "baddbmm", "addmm", "__matmul__"}


@functools.lru_cache(maxsize=1024)
def _kinds(name: str) -> tuple[str, str]:
    """How function `name` moves dimensions, and how positions may meet in it where shapes alone would not tell."""
    moves = (
        ("reshape", _RESHAPES), ("expand", _EXPANSIONS), ("permute", _TRANSPOSITIONS), ("index", {"__getitem__"}),
        ("look up", _LOOKUPS), ("along", _ALONG_A_DIMENSION), ("einsum", {"einsum"}), ("stack", {"stack"}),
    )  # fmt: skip
    mixes = (
        ("norm", {"layer_norm", "rms_norm"}), ("attention", {"scaled_dot_product_attention"}), ("product", _PRODUCTS)
    )  # fmt: skip
    window = "window" if any(part in name for part in _WINDOWS) or name in _CHANNEL_NORMS else ""
    move, mix = (next((kind for kind, names in kinds if name in names), "") for kinds in (moves, mixes))
    return move, window or mix


def sources(name: str, args: Sequence[Any], known: list[Known]) -> list[Known]:
    """Those of the sample tensors among the arguments whose values go into the result of a function of PARTIAL."""
    if name in _FACTORIES:
        return []
    return [one for one in known if one[0] is args[0]] if args else known


def through(
    out: Tensor, name: str, args: Sequence[Any], kwargs: dict[str, Any], known: Sequence[Known], rows: int
) -> Layout | None:
    """The layout of an output of function `name`, from the layouts `known` of its sample tensors."""
    for _, layout in known:
        if layout is None:
            return None
    found: Sequence[tuple[Tensor, Layout]] = known  # pyright: ignore[reportAssignmentType]
    moves, mixes = _kinds(name)
    if mixes and _mixes(mixes, name, args, kwargs, found):
        return None
    if not moves:
        return _prefix(found, out)
    subject, layout = found[0]
    is_subject = bool(args) and args[0] is subject
    if moves == "einsum":
        return _einsum(args, found, out)
    if moves == "stack":
        at = kwargs.get("dim", args[1] if len(args) > 1 else 0) % (subject.dim() + 1)
        return _agree([_shift(given, int(at <= given.dim)) for _, given in found])
    if is_subject and moves == "reshape":
        return _reshaped(subject.shape, layout, out.shape, rows)
    if is_subject and moves == "expand":
        return _same_size(_shift(layout, out.dim() - subject.dim()), out, layout, rows)
    if is_subject and moves == "permute":
        return Layout(_place(name, args, kwargs, subject.dim(), layout.dim), layout.outer, layout.inner)
    if is_subject and moves == "index":
        at = _indexed(args[1], subject.dim(), layout.dim)
        return None if at is None else _same_size(layout._replace(dim=at), out, layout, rows)
    if moves in ("look up", "index"):
        return _same_size(layout, out, layout, rows)
    if moves == "along":
        along = _along(name, args, kwargs)
        if along is None or any(d % tensor.dim() == at.dim for tensor, at in found for d in along):
            return None
        gone = sum(d % subject.dim() < layout.dim for d in along)
        if is_subject and gone:  # those dimensions are gone, or stay with another size
            return _without(subject, layout, out, len(along), gone, rows)
    return _prefix(found, out)


def _shift(layout: Layout, by: int) -> Layout:
    return Layout(layout.dim + by, layout.outer, layout.inner) if by else layout


def _agree(layouts: Sequence[Layout]) -> Layout | None:
    return layouts[0] if len(layouts) == layouts.count(layouts[0]) else None


def _same_size(layout: Layout, out: Tensor, of: Layout, rows: int) -> Layout | None:
    fits = 0 <= layout.dim < out.dim() and out.shape[layout.dim] == of.outer * rows * of.inner
    return layout if fits else None


def _prefix(found: Sequence[tuple[Tensor, Layout]], out: Tensor) -> Layout | None:
    """Any other function: what is in front of the axis stays (or is broadcast, aligned from the right), and so does the axis."""
    if len(found) == 1:
        tensor, layout = found[0]
        if not layout.dim and tensor.dim() == out.dim():
            return layout if tensor.size(0) == out.size(0) else None
    layouts, new = [], out.shape
    for tensor, layout in found:
        shape, at = tensor.shape, layout.dim
        added = max(0, len(new) - len(shape))
        if at + added >= len(new) or new[at + added] != shape[at]:
            return None
        if at + added:
            front = zip(shape[:at], new[added : at + added], strict=True)
            if len(new) < len(shape) or any(old not in (1, size) for old, size in front):
                return None
        layouts.append(_shift(layout, added))
    return _agree(layouts)


def _reshaped(shape: Sequence[int], layout: Layout, new: Sequence[int], rows: int) -> Layout | None:
    """row = (linear index // stride) % rows, before and after."""
    if rows == 0:
        return LEADING if new and new[0] == 0 else None
    if layout == LEADING and new and new[0] == rows and 0 not in shape:
        return LEADING
    stride = layout.inner * math.prod(shape[layout.dim + 1 :])
    for dim, size in enumerate(new):
        below = math.prod(new[dim + 1 :])
        if below and stride % below == 0 and stride and size * below % (stride * rows) == 0:
            return Layout(dim, size * below // (stride * rows), stride // below)
    return None


def _place(name: str, args: Sequence[Any], kwargs: dict[str, Any], dims: int, axis: int) -> int:
    """Where dimension `axis` is after a transposition or permutation."""
    rest = [*args[1:], *kwargs.values()]
    if name in ("T", "H"):
        return dims - 1 - axis
    if name == "permute":
        given = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list, torch.Size)) else rest
        return [dim % dims for dim in given].index(axis)
    if name == "movedim":
        source, target = ([d % dims for d in ([given] if isinstance(given, int) else given)] for given in rest)
        if axis in source:
            return target[source.index(axis)]
        free = [dim for dim in range(dims) if dim not in target]
        return free[[dim for dim in range(dims) if dim not in source].index(axis)]
    if name in ("t", "mT", "mH"):
        rest = [-1, -2] if dims >= 2 else [0, 0]
    a, b = rest[0] % dims, rest[1] % dims
    return b if axis == a else a if axis == b else axis


def _indexed(index: Any, dims: int, axis: int) -> int | None:
    """Where dimension `axis` is after x[index]; None when the index chooses along it or is more than slices and integers."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, (Tensor, list, bool)) for item in items):
        # one index tensor behind the axis keeps what is in front of it
        front = items[: axis + 1]
        plain = all(isinstance(item, slice) and item == slice(None) for item in front)
        return axis if plain and len(front) == axis + 1 else None
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (dims - used)
    items += [slice(None)] * (dims - sum(item is not None for item in items))
    old, new = 0, 0
    for item in items:
        if item is None:
            new += 1
            continue
        if old == axis:
            return new if isinstance(item, slice) and item == slice(None) else None
        new += isinstance(item, slice)
        old += 1
    return None


def _along(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[int] | None:
    """The dimensions that the function works along; None: all of them, or not known."""
    at = _POSITION_OF_DIM.get(name, 1)
    dim = kwargs.get("dim", kwargs.get("dims", args[at] if len(args) > at else _DEFAULT_DIM.get(name)))
    if isinstance(dim, int) and not isinstance(dim, bool):
        return [dim]
    if isinstance(dim, (tuple, list)) and all(isinstance(d, int) for d in dim):
        return list(dim)
    return [] if name in ("max", "min") and isinstance(dim, Tensor) else None  # max(x, y) is elementwise


def _without(subject: Tensor, layout: Layout, out: Tensor, removed: int, in_front: int, rows: int) -> Layout | None:
    moved = _shift(layout, -in_front) if out.dim() == subject.dim() - removed else layout
    return _same_size(moved, out, layout, rows) if out.dim() in (subject.dim(), subject.dim() - removed) else None


def _mixes(
    kind: str, name: str, args: Sequence[Any], kwargs: dict[str, Any], found: Sequence[tuple[Tensor, Layout]]
) -> bool:
    """Whether the function lets positions of the sample axis meet, where its shapes alone would not tell."""
    if kind == "window":
        return any(at.dim != 0 for _, at in found)
    if kind == "norm":
        shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
        return any(at.dim >= tensor.dim() - len(shape) for tensor, at in found)
    if kind == "attention":
        return any(at.dim >= tensor.dim() - 2 for tensor, at in found)
    left, right = ([*args, *kwargs.values()])[-2:] if name not in ("baddbmm", "addmm") else args[1:3]
    contracted = [(left, 1), (right, 2 if right.dim() > 1 else 1)]
    if any(tensor is side and at.dim == tensor.dim() - d for tensor, at in found for side, d in contracted):
        return True
    both = [at.dim >= tensor.dim() - 2 for tensor, at in found if tensor is left or tensor is right]
    return len(both) > 1 and any(both)


def _einsum(args: Sequence[Any], found: Sequence[tuple[Tensor, Layout]], out: Tensor) -> Layout | None:
    """The axis must have one letter in all operands, and the output must have it."""
    if not isinstance(args[0], str) or "." in args[0]:
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    inputs, arrow, output = args[0].replace(" ", "").partition("->")
    layouts = {id(tensor): at for tensor, at in found}
    letters = set()
    for operand, term in zip(operands, inputs.split(","), strict=True):
        if id(operand) in layouts:
            at = layouts[id(operand)]
            letters.add((term[at.dim], at.outer, at.inner))
    if len(letters) != 1 or not arrow:
        return None
    letter, outer, inner = letters.pop()
    return Layout(output.index(letter), outer, inner) if letter in output else None
