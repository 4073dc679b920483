"""From the calls that a parameter took part in, and the gradients at their outputs, to its squared per-sample norms."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaselect_kernels.grad_norms import rules
from adaselect_kernels.grad_norms.layout import Layout
from adaselect_kernels.grad_norms.nodes import Held, Packed
from adaselect_kernels.grad_norms.rows import Rows


class Leaf:
    """A trainable parameter, and what is known of its gradient in this batch."""

    __slots__ = (
        *("name", "module_name", "module", "parameter", "wanted"),
        *("uses", "late_uses", "fired", "late_fired", "entries", "sq_norms", "closed", "fresh"),
    )

    def __init__(self, name: str, module_name: str, module: nn.Module, parameter: nn.Parameter, wanted: bool) -> None:
        self.name, self.module_name, self.module = name, module_name, module
        self.parameter, self.wanted = parameter, wanted
        self.reset()

    def reset(self) -> None:
        self.uses = self.late_uses = 0  # late: seen during a backward pass (a recomputation of checkpointing)
        self.fired = self.late_fired = 0
        self.entries: list[Entry] = []
        self.sq_norms: Tensor | None = None
        self.closed = False
        self.fresh = False  # a use has fired since a gradient last arrived

    def close(self, sq_norms: Tensor | None) -> None:
        """All of its gradient has arrived; `sq_norms` [N] are known (None: those of another leaf of its module hold them)."""
        self.sq_norms, self.entries, self.closed = sq_norms, [], True

    @property
    def described(self) -> str:
        where = f"module {self.module_name!r}" if self.module_name else "the model itself"
        return f"parameter {self.name!r} of {where} ({type(self.module).__name__})"


class Use:
    """One call with parameters: how to call it again, and which tensors in it are which."""

    __slots__ = (
        *("func", "name", "args", "kwargs", "call", "shared", "leaves", "layouts", "aligned", "out_layouts", "late"),
        *("moments", "kept", "fused", "__weakref__"),
    )

    def __init__(
        self, func, name: str, args, kwargs, call: rules.Call | None, shared: dict[str, Tensor], layouts: list[Layout]
    ) -> None:
        self.func, self.name, self.args, self.kwargs, self.call = func, name, args, kwargs, call
        self.shared = shared  # role -> tensor, of the wanted ones
        self.leaves: Sequence[Leaf] = ()  # whose gradient it is a part of
        self.layouts = layouts  # of the sample tensors, in the order of their slots
        self.out_layouts: Sequence[Layout] = ()
        self.aligned: dict[int, Layout] = {}  # id of a shared tensor -> where its own sample axis is
        self.late = torch._C._current_graph_task_id() != -1
        # mean and rstd of a normalisation, where they need not be found again
        self.moments: tuple[Tensor, Tensor] | None = None
        self.kept: Held | Packed | None = None  # the sample tensors
        self.fused = False


class Entry:
    """A use whose gradient has arrived, as part of one parameter's gradient; or that part itself, `explicit` [N, ...].

    plain: the call has a rule and saw the parameter itself, or elements of it, each at most once, in a shape that does not
    matter to the rule: the norm is then that of the parameter's gradient, as far as this call goes.
    """

    __slots__ = ("explicit", "grads", "plain", "role", "samples", "tensor", "use")

    def __init__(
        self, use: Use | None, role: str, tensor: Tensor | None, samples, grads, plain: bool, explicit=None
    ) -> None:
        self.use, self.role, self.tensor, self.samples, self.grads = use, role, tensor, samples, grads
        self.plain = plain
        self.explicit: Tensor | None = explicit


class Slot(int):
    """Stands for a sample tensor in the arguments that a use keeps."""


_TENSORS = frozenset((Tensor, nn.Parameter))
_SCALARS = frozenset((type(None), int, float, bool, str, torch.dtype, torch.device, slice))
_FLAT = _TENSORS | _SCALARS  # most arguments are; isinstance of torch.Tensor takes several times as long as a set


def tensors_in(value: Any) -> list[Tensor]:
    """In a nest of tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    found = []
    for item in items:
        kind = type(item)
        if kind in _TENSORS:
            found.append(item)
        elif kind in _SCALARS:
            continue
        elif isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list, dict)):
            found += tensors_in(item)
    return found


def replaced(value: Any, by: Callable[[Any], Any]) -> Any:
    """The same nest of tuples, lists and dictionaries with every leaf replaced."""
    if isinstance(value, (tuple, list)):
        items = [replaced(item, by) if isinstance(item, (tuple, list, dict)) else by(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: replaced(item, by) for key, item in value.items()}
    return by(value)


def swapped(value: Any, by_id: dict[int, Any]) -> Any:
    """The same nest with other values for some of its objects."""
    if type(value) is tuple and _FLAT.issuperset(map(type, value)):
        return tuple([by_id.get(id(item), item) for item in value])
    return replaced(value, lambda item: by_id.get(id(item), item)) if value else value


def sq_norms_of(leaf: Leaf, rows: Rows) -> Tensor:
    """[N], by the cheapest way there is: the call's rule, its calls joined, or one sample's gradient after the other."""
    entries, found = leaf.entries, None
    if len(entries) == 1 and entries[0].plain:
        role = entries[0].role
        found = by_rule(entries[0], rows, role == "weight", role == "bias")
    elif len(entries) > 1 and all(entry.plain and entry.tensor is leaf.parameter for entry in entries):
        found = _joined(entries, rows)
    elif len(entries) > 1 and all(entry.plain for entry in entries) and _disjoint(leaf, entries):
        parts = [by_rule(entry, rows, entry.role == "weight", entry.role == "bias") for entry in entries]
        found = torch.stack([part for part in parts if part is not None]).sum(0) if None not in parts else None
    if found is None:
        dtype = torch.float64 if leaf.parameter.dtype == torch.float64 else torch.float32
        parts = [sample_gradient(leaf, entries, rows, i).to(dtype).square().sum() for i in range(rows.samples)]
        found = torch.stack(parts) if parts else leaf.parameter.new_zeros(0, dtype=dtype)
    return found


def by_rule(entry: Entry, rows: Rows, weight: bool, bias: bool) -> Tensor | None:
    use = entry.use
    assert use is not None
    assert use.call is not None
    where = (rows, entry.samples[0], use.layouts[0], entry.grads[0], use.out_layouts[0])
    more = {} if use.moments is None else {"moments": use.moments}
    return use.call.sq_norms(*where, weight, bias, **more)


def _disjoint(leaf: Leaf, entries: Sequence[Entry]) -> bool:
    """Whether the calls saw parts of the parameter that have no element in common, each one piece of its memory."""
    parts = [entry.tensor for entry in entries if entry.tensor is not None]
    if any(part._base is not leaf.parameter or not part.is_contiguous() for part in parts):
        return False
    spans = sorted((part.storage_offset(), part.storage_offset() + part.numel()) for part in parts)
    return all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def _joined(entries: Sequence[Entry], rows: Rows) -> Tensor | None:
    """Several calls with one parameter: joined along their positions, or an embedding tied to a linear layer."""
    joined: dict[str, list[tuple[Tensor, ...]]] = {}
    for entry in entries:
        use = entry.use
        assert use is not None
        assert use.call is not None
        if entry.role != "weight" or use.call.positions is None or use.name not in ("linear", "embedding"):
            return None
        pair = use.call.positions(rows, entry.samples[0], use.layouts[0], entry.grads[0], use.out_layouts[0])
        joined.setdefault(use.call.kind, []).append(pair)
    pairs = {kind: tuple(torch.cat(part, 1) for part in zip(*found, strict=True)) for kind, found in joined.items()}
    linear = pairs.pop("linear", None)
    total = None if linear is None else rules.linear_sq_norms(*linear, weight=True, bias=False)
    if len(pairs) > 1:
        return None  # lookups that skip different rows of the table
    for kind, (ids, u) in pairs.items():
        skipped = int(kind.split()[1])
        lookups = rules.embedding_sq_norms(ids, u, skipped)
        if linear is None or total is None:
            return lookups
        a, g = linear
        return (total + lookups + 2 * rules.tied_products(a, g, ids, u, skipped)).clamp(min=0)
    return total


def sample_gradient(leaf: Leaf, entries: Sequence[Entry], rows: Rows, sample: int) -> Tensor:
    """One sample's gradient of the parameter, by calling the functions again on that sample."""
    total = torch.zeros_like(leaf.parameter)
    for entry in entries:
        found = entry.explicit[sample] if entry.explicit is not None else _call_again(entry, rows, sample)
        if found is not None and entry.tensor is not None and entry.tensor is not leaf.parameter:
            with torch.enable_grad():
                (found,) = torch.autograd.grad(
                    entry.tensor, leaf.parameter, found, retain_graph=True, allow_unused=True
                )
        if found is not None:
            total += found
    return total


def _on_one(
    use: Use, samples: Sequence[Tensor], rows: Rows, sample: int, subject: Tensor | None, variable: Any
) -> list:
    """The outputs of the call for one sample alone, with `variable` in the place of the shared tensor `subject`."""
    with torch.enable_grad():  # the function may write into its input: it must not be a view made without gradients
        inputs = [rows.one(tensor.detach(), at, sample) for tensor, at in zip(samples, use.layouts, strict=True)]

        def choose(value: Any) -> Any:
            if isinstance(value, Slot):
                return inputs[value]
            if subject is not None and value is subject:
                return variable
            if isinstance(value, Tensor):
                mine = use.aligned.get(id(value))
                return (value if mine is None else rows.one(value, mine, sample)).detach()
            return value

        out = use.func(*replaced(use.args, choose), **replaced(use.kwargs, choose))
    return [tensor for tensor in tensors_in(out) if tensor.is_floating_point()]


def same_alone(use: Use, samples: Sequence[Tensor], outputs: Sequence[Tensor], rows: Rows) -> bool:
    """Whether the call gives the first and the last sample, alone, what it gave them in the batch."""
    for sample in {0, rows.samples - 1} if rows.samples else ():
        try:
            again = _on_one(use, samples, rows, sample, None, None)
        except (RuntimeError, ValueError, IndexError):  # the shapes do not fit together
            return False
        for tensor, whole, at in zip(again, outputs, use.out_layouts, strict=True):
            part = rows.one(whole.detach(), at, sample)
            if part.shape != tensor.shape or not torch.allclose(tensor, part, rtol=1e-3, atol=1e-5, equal_nan=True):
                return False
    return True


def _call_again(entry: Entry, rows: Rows, sample: int) -> Tensor | None:
    """The gradient of the entry's shared tensor."""
    use, subject = entry.use, entry.tensor
    assert use is not None
    assert subject is not None
    at = use.aligned.get(id(subject))
    variable = (subject if at is None else rows.one(subject, at, sample)).detach().requires_grad_()
    out = _on_one(use, entry.samples, rows, sample, subject, variable)
    arrived = [
        (tensor, rows.one(grads, where, sample).to(tensor.dtype))
        for tensor, grads, where in zip(out, entry.grads, use.out_layouts, strict=True)
        if grads is not None
    ]
    (found,) = torch.autograd.grad(
        [tensor for tensor, _ in arrived], variable, [grads for _, grads in arrived], allow_unused=True
    )
    if found is None or at is None:
        return found
    whole = torch.zeros_like(subject)
    rows.put(whole, at, sample, found)
    return whole
