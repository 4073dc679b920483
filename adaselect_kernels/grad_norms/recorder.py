"""Sees every call that a parameter takes part in, and accounts for all of its gradient.

While a recorder is active, each torch function passes through it. Tensors are of three kinds: sample tensors, which have a
sample axis (the model's inputs and what is computed from them); shared tensors, the parameters and what is computed from
parameters and constants alone; constants. A function of sample and shared tensors is a use of parameters: its output
gets a hook, and when the gradient arrives there the rule of the function gives the squared norms. Uses without a rule
are refused, or differentiated one sample at a time. Before a backward pass the graph is walked: a parameter that it
reaches by a way not seen here is refused too, so no part of a gradient is ever left out.
"""

import contextlib
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from adaselect_kernels.grad_norms import layout, rules
from adaselect_kernels.grad_norms.gradients import (
    Entry,
    Leaf,
    Slot,
    Use,
    by_rule,
    replaced,
    same_alone,
    sample_gradient,
    sq_norms_of,
    tensors_in,
)
from adaselect_kernels.grad_norms.layout import LEADING, Layout
from adaselect_kernels.grad_norms.rows import Rows


class UnaccountedParameter(ValueError):
    """A parameter takes part in the loss in a way whose per-sample gradients are not known; nothing was computed."""


class TensorMap:
    """What is known of a tensor, by the object that it is; it may go when it likes."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref, Any]] = {}

    def __setitem__(self, tensor: Tensor, value: Any) -> None:
        self._entries[id(tensor)] = weakref.ref(tensor), value

    def __contains__(self, tensor: Tensor) -> bool:
        entry = self._entries.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    def __getitem__(self, tensor: Tensor) -> Any:
        if tensor not in self:
            raise KeyError(tensor.shape)
        return self._entries[id(tensor)][1]

    def get(self, tensor: Tensor) -> Any:
        return self._entries[id(tensor)][1] if tensor in self else None


class Keep(torch.autograd.Function):
    """A node that is in no loss's graph and keeps tensors through the saved-tensor hooks: checkpointing may drop them."""

    @staticmethod
    def forward(ctx, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx, *grads):
        raise AssertionError("no loss depends on it")


class Attach(torch.autograd.Function):
    """Ties an output to `tensors` without changing it: their gradients are `gradients(g)`."""

    @staticmethod
    def forward(ctx, gradients: Callable[[Tensor], tuple], same: bool, out: Tensor, *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        if same:
            ctx.mark_dirty(out)  # it stays the same tensor, and may still be written in place
        return out

    @staticmethod
    def backward(ctx, grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, grads if ctx.needs_input_grad[2] else None, *ctx.gradients(grads)


def _seen_through(tensor: Tensor, base: Tensor) -> Callable[[Tensor], Tensor]:
    """From the gradient of `base` to that of `tensor`, itself or a view of it."""
    if tensor is base:
        return lambda grads: grads
    shape, strides, offset = tensor.shape, tensor.stride(), tensor.storage_offset() - base.storage_offset()
    size, stride = base.shape, base.stride()

    def through(grads: Tensor) -> Tensor:
        if grads.stride() != stride:
            grads = torch.empty_strided(size, stride, dtype=grads.dtype, device=grads.device).copy_(grads)
        return grads.as_strided(shape, strides, grads.storage_offset() + offset)

    return through


_TENSOR_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}
# Their results are elements of the parameter, each at most once: the gradient has the same norm there.
_SELECTIONS = {
    *("t", "T", "mT", "transpose", "permute", "movedim", "swapaxes", "view", "reshape", "flatten", "unflatten"),
    *("squeeze", "unsqueeze", "contiguous", "view_as", "reshape_as", "narrow", "select", "split", "chunk", "unbind"),
}


def canonical(func: Any) -> tuple[str, bool]:
    """The function's name without marks of operators, and whether it writes into its first argument."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return func.__self__.__name__, False
    if name.startswith("__") and name.endswith("__"):
        plain = name.strip("_")
        if plain in rules.ELEMENTWISE:
            return plain, False
        if plain[0] in "ri" and plain[1:] in rules.ELEMENTWISE:
            return plain[1:], plain[0] == "i"
        return name, name == "__setitem__"
    return (name[:-1], True) if name.endswith("_") and name[:-1] else (name, False)


def opened(func: types.FunctionType) -> types.FunctionType | None:
    """A Python function of torch as its own body runs it: without asking for an override of itself."""
    asks = [name for name in func.__globals__ if name.startswith("has_torch_function")]
    if not asks:
        return None
    scope = func.__globals__ | dict.fromkeys(asks, lambda *tensors: False)
    body = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


class Recorder(TorchFunctionMode):
    """See the module's docstring.

    leaves: every trainable parameter of the model. norm_tensors: (module's name, weight or running mean) of each module
    that has such, to name the one that is refused.
    """

    def __init__(
        self,
        leaves: Sequence[Leaf],
        norm_tensors: Sequence[tuple[str, Tensor]],
        *,
        weight_gradients: str,
        batchnorm: str,
        fallback: str,
        sample_dim: int,
    ) -> None:
        super().__init__()
        self.leaves = {id(leaf.parameter): leaf for leaf in leaves}
        self.norm_tensors = norm_tensors
        self.weight_gradients, self.batchnorm, self.fallback = weight_gradients, batchnorm, fallback
        self.sample_dim = sample_dim
        self.rows: Rows | None = None
        self.labels: dict[str, None] = {}
        self.means_seen = False  # cross_entropy or nll_loss with reduction="mean"
        self.mean_count: Tensor | int | None = None  # of the loss that was differentiated, where it is one of those
        self.finished = False  # a backward pass has ended: the norms are there
        self._busy = False  # gradients that flow now are of our own asking
        self._closed = False  # the context has been left
        self.reset()

    # ---- a batch

    def reset(self) -> None:
        self._samples = TensorMap()  # tensor -> Layout or None
        self._shared = TensorMap()  # tensor -> (ids of its leaves, the leaf it is a selection of or None)
        self._sample_nodes: dict[Any, Layout | None] = {}
        self._accounted: set[Any] = set()
        self._shared_nodes: dict[Any, frozenset[int]] = {}
        self._segments: set[Any] = set()  # nodes of reentrant checkpoints
        self._uses: list[tuple[Use, Any]] = []  # of the forward pass, with the node whose gradient each waits for
        self._inputs: list[Tensor] = []  # kept, so that a recomputation finds the same objects
        self.finished = False
        self._means = TensorMap()  # mean losses -> how many terms
        self.means_seen, self.mean_count = False, None
        for key, leaf in self.leaves.items():
            leaf.reset()
            self._shared[leaf.parameter] = (frozenset([key]), leaf)

    def open(self) -> None:
        self.reset()
        self.rows, self._closed = None, False

    def close(self) -> None:
        """Keep the norms and drop what only a backward pass needs; a later one is none of ours."""
        self._closed = True
        self._sample_nodes, self._accounted, self._shared_nodes = {}, set(), {}
        self._segments, self._uses, self._inputs = set(), [], []
        self._means = TensorMap()
        self._samples, self._shared = TensorMap(), TensorMap()

    def begin(self, inputs: Any, sample_ids: Tensor | None) -> None:
        """The model is called with `inputs`: a new batch, or more of the one whose backward pass is still to come."""
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        if self.finished or self.rows is None:
            self.reset()
            self.rows = None
        found = [tensor for tensor in tensors_in(inputs) if tensor.dim() > self.sample_dim]
        if not found:
            raise ValueError("the model was called without a tensor that has a sample dimension")
        count = found[0].shape[self.sample_dim]
        if sample_ids is not None and len(sample_ids) != count:
            raise ValueError(f"sample_ids must have one entry a row, [{count}], got [{len(sample_ids)}]")
        if self.rows is not None and self.rows.count != count:
            raise ValueError(
                f"all calls of the model before a backward must have as many rows: {self.rows.count}, {count}"
            )
        self.rows = self.rows or Rows(count, sample_ids)
        self._inputs += found
        for tensor in found:
            if tensor.shape[self.sample_dim] == count and tensor not in self._samples:
                self._samples[tensor] = Layout(self.sample_dim)

    # ---- functions

    def on(self) -> contextlib.AbstractContextManager:
        """Autograd runs its nodes, and a mode its own function, without the mode: see functions there too."""
        active = any(mode is self for mode in _get_current_function_mode_stack())
        return contextlib.nullcontext() if active else self

    def _call(self, func, args, kwargs) -> Any:
        """Run a function; what checkpointing recomputes for its saved tensors is then seen as well."""
        top_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore[reportAttributeAccessIssue]
        hooks = top_hooks(False) if torch.is_grad_enabled() else None
        if hooks is None:
            return func(*args, **kwargs)
        pack, unpack = hooks

        def unpack_seen(packed: Any) -> Any:
            with self.on():
                return unpack(packed)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack_seen):
            return func(*args, **kwargs)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._closed:
            return func(*args, **kwargs)
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func is torch.autograd.grad:
            raise ValueError(
                "torch.autograd.grad inside PerSampleGradNorm: its gradients could not be told from those of the loss"
                " (double backward is not supported)"
            )
        name, writes = canonical(func)
        if func.__name__ == "__set__" or (func.__name__ == "__get__" and name not in _TENSOR_PROPERTIES):
            return func(*args, **kwargs)
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        for tensor in tensors:
            if tensor not in self._samples and tensor.grad_fn in self._sample_nodes:
                self._samples[tensor] = self._sample_nodes[tensor.grad_fn]  # another object for the same tensor
        shared = [t for t in tensors if t in self._shared] if torch.is_grad_enabled() else []
        if func is torch.nn.functional.batch_norm and self._is_training(args, kwargs):
            return self._batch_statistics(func, args, kwargs)
        samples = layout.sources(name, args, [t for t in tensors if t in self._samples])
        if shared:
            samples += [t for t in tensors if t not in self._samples and t not in self._shared and self._adopts(t)]
        if not samples and not shared:
            return self._call(func, args, kwargs)
        if not samples:
            return self._derive(func, name, args, kwargs, tensors, shared)
        known = [(tensor, self._samples[tensor]) for tensor in samples]
        if not shared:
            if func is Tensor.__iter__:
                with self.on():
                    return iter(args[0].unbind(0))
            out = self._call(func, args, kwargs)
            self._mark(out, name, args, kwargs, known, writes)
            if isinstance(out, Tensor) and out.dim() == 0:
                self._note_mean(func, name, args, kwargs, tensors, out)
            return out
        return self._use(func, name, writes, args, kwargs, tensors, shared, known)

    def _mark(self, out: Any, name: str, args, kwargs, known, writes: bool) -> list[Tensor]:
        """Give the outputs their layouts; returns them."""
        assert self.rows is not None
        where = layout.through(name, args, kwargs, known, self.rows.count)
        found = list(tensors_in(out))
        for i, tensor in enumerate(found):
            # behind the output, recurrent layers give the last states [layers, N, H], whatever the order of the input is
            self._set_layout(tensor, Layout(tensor.dim() - 2) if i and name in layout.RECURRENT else where(tensor))
        if name == "__setitem__" and isinstance(args[0], Tensor):
            target = args[0]
            front = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            whole = front is Ellipsis or (isinstance(front, slice) and front == slice(None))
            leading = whole and target.dim() and target.shape[0] == self.rows.count
            self._set_layout(target, LEADING if leading and all(at == LEADING for _, at in known) else None)
        elif writes and isinstance(args[0], Tensor) and not any(tensor is args[0] for tensor in found):
            self._set_layout(args[0], where(args[0]))
        return found

    def _set_layout(self, tensor: Tensor, where: Layout | None) -> None:
        self._samples[tensor] = where
        if tensor.grad_fn is not None:
            self._sample_nodes[tensor.grad_fn] = where

    def _adopts(self, tensor: Tensor) -> bool:
        """A tensor that came from where torch functions are not seen: a sample tensor if its graph says so."""
        if tensor.grad_fn is None or self.rows is None:
            return False
        found, _, _ = self._walk([tensor.grad_fn])  # what it leads to is checked before the backward pass
        if not found:
            return False
        leading = tensor.shape[0] == self.rows.count and all(at == LEADING for at in found)
        self._set_layout(tensor, LEADING if leading else None)
        return True

    def _walk(self, nodes: Sequence[Any]) -> tuple[list[Layout | None], list[tuple[int, str]], set[Any]]:
        """Down the graph: layouts of the sample tensors first met, leaves that a node not seen here leads to, all nodes."""
        layouts, leaves, seen = [], [], set()
        stack = [(node, False) for node in nodes]  # and whether a sample tensor is above
        while stack:
            node, below_sample = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self._sample_nodes and not below_sample:
                layouts.append(self._sample_nodes[node])
            if node.name() == "CheckpointFunctionBackward" and node not in self._segments:
                # it calls its part of the model again when its turn comes
                self._segments.add(node)
                node.register_prehook(lambda grads: self.__enter__() and None)
                node.register_hook(lambda above, below: self.__exit__(None, None, None))
            for below, _ in node.next_functions:
                if below is None:
                    continue
                if node not in self._accounted:
                    key = id(getattr(below, "variable", None))
                    sources = frozenset([key]) if key in self.leaves else self._shared_nodes.get(below, frozenset())
                    leaves += [(source, node.name()) for source in sources if self.leaves[source].wanted]
                stack.append((below, below_sample or node in self._sample_nodes))
        return layouts, leaves, seen

    def _account(self, outputs: Sequence[Tensor], above: set[Any]) -> None:
        """The nodes that a call made, between its outputs and its inputs."""
        stack = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
        while stack:
            node = stack.pop()
            if node not in above and node not in self._accounted:
                self._accounted.add(node)
                stack += [below for below, _ in node.next_functions if below is not None]

    # ---- shared tensors

    def _derive(self, func, name: str, args, kwargs, tensors: Sequence[Tensor], shared: Sequence[Tensor]) -> Any:
        """A function of parameters and constants alone."""
        above = {tensor.grad_fn for tensor in tensors}
        out = self._call(func, args, kwargs)
        outputs = [tensor for tensor in tensors_in(out) if tensor.requires_grad]
        self._account(outputs, above)
        sources = frozenset().union(*(self._shared[tensor][0] for tensor in shared))
        of = self._shared[shared[0]][1] if len(shared) == 1 and self._selects(name, args, kwargs) else None
        for tensor in outputs:
            if tensor in self._shared:
                continue
            self._shared[tensor] = (sources, of)
            self._shared_nodes[tensor.grad_fn] = sources
            if any(self.leaves[source].wanted for source in sources) and self.weight_gradients != "none":
                # entries keep the tensor while they need it; a strong reference here would be a cycle
                tensor.register_hook(functools.partial(self._leaving, weakref.ref(tensor)))
        return out

    def _selects(self, name: str, args, kwargs) -> bool:
        if name == "__getitem__":
            items = args[1] if isinstance(args[1], tuple) else (args[1],)
            return all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items)
        if name == "embedding" and len(args) > 1:  # of constants, as a table of positions is used
            given = (
                dict(zip(("input", "weight", "padding_idx", "max_norm", "norm_type", "scale"), args, strict=False))
                | kwargs
            )
            plain = given.get("padding_idx") is None and not given.get("scale") and not given.get("scale_grad_by_freq")
            with torch._C.DisableTorchFunction():
                return plain and given["input"].unique().numel() == given["input"].numel()
        return name in _SELECTIONS

    def _leaving(self, derived: Callable[[], Tensor | None], grads: Tensor) -> None:
        """The graph behind a derived tensor is about to run, and to be freed: take what still needs it."""
        tensor = derived()
        if tensor is None or self._closed:
            return
        with self._apart():
            for source in self._shared[tensor][0]:
                leaf = self.leaves[source]
                mine = [entry for entry in leaf.entries if entry.tensor is tensor and entry.explicit is None]
                if mine and not leaf.closed:
                    leaf.entries = [entry for entry in leaf.entries if entry not in mine]
                    assert self.rows is not None
                    parts = [sample_gradient(leaf, mine, self.rows, i) for i in range(self.rows.samples)]
                    leaf.entries.append(Entry(None, "", None, (), (), False, torch.stack(parts)))

    # ---- uses

    def _use(self, func, name: str, writes: bool, args, kwargs, tensors, shared, known) -> Any:
        wanted = [t for t in shared if any(self.leaves[source].wanted for source in self._shared[t][0])]
        scoring = self.weight_gradients == "none"
        if not wanted:
            apart = [replaced(nest, self._detached) if scoring else nest for nest in (args, kwargs)]
            out = self._call(func, *apart)
            self._mark(out, name, args, kwargs, known, writes)
            return out
        call = self._bind(name, args, kwargs, wanted, [tensor for tensor, _ in known]) if not writes else None
        simple = name in rules.ELEMENTWISE or name in rules.JOINING
        if call is None and not simple and isinstance(func, types.FunctionType):
            body = opened(func)
            if body is not None and name not in rules.RULES:
                with self.on():
                    return body(*args, **kwargs)
        leaf = self.leaves[min(self._shared[wanted[0]][0])]
        if any(where is None for _, where in known):
            shapes = ", ".join(str(list(tensor.shape)) for tensor, where in known if where is None)
            raise self._refusal(
                leaf,
                f"{name} together with a tensor {shapes} of which it is not known which part belongs to which sample",
            )
        if writes and name not in ("add", "sub"):
            raise self._refusal(leaf, f"{name}_, which overwrites its input")
        if call is None and not simple and self.fallback != "per_sample":
            raise self._refusal(
                leaf, f"{name}, which has no rule (fallback='per_sample' differentiates it sample by sample)"
            )
        return self._record(func, name, writes, args, kwargs, tensors, wanted, known, call)

    def _bind(self, name: str, args, kwargs, wanted: Sequence[Tensor], samples: Sequence[Tensor]) -> rules.Call | None:
        """The call as its rule reads it: one sample tensor, and every wanted shared tensor in a role that the rule has."""
        if len(samples) != 1:
            return None
        if name in rules.BROADCASTING:
            alone = len(wanted) == 1 and len(args) == 2 and not kwargs
            return rules.broadcast(name, wanted[0]) if alone else None
        call = rules.RULES[name](*args, **kwargs) if name in rules.RULES else None
        if call is None or call.input is not samples[0]:
            return None
        covered = all(any(tensor is role for role in call.roles.values()) for tensor in wanted)
        return dataclasses.replace(call, input=None) if covered else None  # checkpointing may drop the input

    def _record(self, func, name: str, writes: bool, args, kwargs, tensors, wanted, known, call) -> Any:
        assert self.rows is not None
        above = {tensor.grad_fn for tensor in tensors}
        order = {id(tensor): Slot(i) for i, (tensor, _) in reversed(list(enumerate(known)))}
        kept_args, kept_kwargs = (replaced(nest, lambda v: order.get(id(v), v)) for nest in (args, kwargs))
        use = Use(func, name, kept_args, kept_kwargs, call)
        if call is None:
            use.shared = {str(key): tensor for key, tensor in {id(tensor): tensor for tensor in wanted}.items()}
        else:
            use.shared = {role: t for role, t in call.roles.items() if any(t is tensor for tensor in wanted)}
        use.layouts = [where for _, where in known]
        use.fused = self._may_fuse(name, use, [tensor for tensor in tensors if tensor in self._shared])
        apart = self.weight_gradients == "none" or use.fused
        given = [replaced(v, self._detached) if apart else v for v in (args, kwargs)]
        out = self._call(func, *given)
        outputs = self._mark(out, name, args, kwargs, known, writes)
        outputs = [tensor for tensor in outputs if tensor.is_floating_point()]
        where = [self._samples[tensor] for tensor in outputs]
        if any(at is None for at in where):
            raise self._refusal(self._leaf_of(wanted[0]), f"{name}, of whose output the sample axis is not known")
        use.out_layouts = [at for at in where if at is not None]
        self._align(use, outputs)
        samples = [tensor for tensor, _ in known]
        simple = name in rules.ELEMENTWISE or name in rules.JOINING
        if call is None and not simple and not self._replays(use, samples, outputs):
            raise self._refusal(
                self._leaf_of(wanted[0]), f"{name}, which does not give a sample alone what it gives it in the batch"
            )
        anchor = torch.zeros(0, requires_grad=True, device=outputs[0].device)
        if len(outputs) > 1:
            # one may be computed from another inside the call: hooks see what comes from outside, on nodes of their own
            apart_from = {id(t): Attach.apply(lambda grads: (None,), False, t, anchor) for t in outputs}
            out = replaced(out, lambda value: apart_from.get(id(value), value))
            outputs = bases = list(apart_from.values())
        else:
            # a view is rebased when it, or another view of its base, is written in place: only the base keeps its history
            bases = [tensor if tensor._base is None else tensor._base for tensor in outputs]
            if use.fused:
                gradients = functools.partial(self._fired_fused, use, _seen_through(outputs[0], bases[0]))
                Attach.apply(gradients, True, bases[0], *use.shared.values())
            elif not bases[0].requires_grad:
                Attach.apply(lambda grads: (None,), True, bases[0], anchor)
        self._account([*outputs, *bases], above)
        for tensor, where in zip(outputs, use.out_layouts, strict=True):
            self._set_layout(tensor, where)
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            use.kept = Keep.apply(anchor, *samples)
        if use.fused:
            pass
        elif len(outputs) == 1:
            through = _seen_through(outputs[0], bases[0])
            bases[0].register_hook(lambda grads: self._fired(use, [through(grads)]))
        else:
            torch.autograd.graph.register_multi_grad_hook(outputs, lambda grads: self._fired(use, list(grads)))
        if not use.late:
            self._uses.append((use, bases[0].grad_fn))
        for leaf in self._leaves_of(use):
            leaf.uses[use.late] += 1
        return out

    def _detached(self, value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) and value in self._shared else value

    def _leaf_of(self, tensor: Tensor) -> Leaf:
        return self.leaves[min(self._shared[tensor][0])]

    def _leaves_of(self, use: Use) -> list[Leaf]:
        keys = {key: None for tensor in use.shared.values() for key in sorted(self._shared[tensor][0])}
        return [self.leaves[key] for key in keys if self.leaves[key].wanted]

    def _align(self, use: Use, outputs: Sequence[Tensor]) -> None:
        """A shared tensor may have as many entries along the output's sample axis: then sample i meets its entry i."""
        assert self.rows is not None
        at = use.out_layouts[0]
        for tensor in [*tensors_in(use.args), *tensors_in(use.kwargs)]:
            if tensor in self._shared and (use.name in rules.ELEMENTWISE or use.name in rules.JOINING):
                dim = at.dim - max(0, outputs[0].dim() - tensor.dim()) if use.name != "stack" else use.layouts[0].dim
                if dim >= 0 and tensor.shape[dim] == at.outer * self.rows.count * at.inner and tensor.shape[dim] > 1:
                    use.aligned[id(tensor)] = at._replace(dim=dim)

    def _replays(self, use: Use, samples: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Whether the call can be made again for one sample, with its other tensors whole or cut down along with it."""
        assert self.rows is not None
        with self._apart(), torch.random.fork_rng([t.device for t in outputs[:1] if t.is_cuda]):
            at = use.layouts[0]
            size = at.outer * self.rows.count * at.inner
            others = [*tensors_in(use.args), *tensors_in(use.kwargs)]
            for group in ([], [t for t in others if t not in self._shared], others):  # whole first, then cut down
                for tensor in group:
                    # the first state of recurrent layers is [layers, N, H], whatever the order of the input is
                    dim = tensor.dim() - 2 if use.name in layout.RECURRENT and tensor.dim() == 3 else at.dim
                    if 0 <= dim < tensor.dim() and tensor.shape[dim] == size:
                        use.aligned[id(tensor)] = at._replace(dim=dim)
                if same_alone(use, samples, outputs, self.rows):
                    return True
            return False

    def _may_fuse(self, name: str, use: Use, shared: Sequence[Tensor]) -> bool:
        plain = all(id(tensor) in self.leaves for tensor in shared) and len(shared) == len(use.shared)
        return self.weight_gradients == "fused" and name == "linear" and plain and "weight" in use.shared

    # ---- gradients

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """For our own arithmetic: neither seen nor differentiated."""
        before, self._busy = self._busy, True
        try:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                yield
        finally:
            self._busy = before

    def _samples_of(self, use: Use) -> tuple[Tensor, ...]:
        if use.kept is None:
            raise ValueError("a second backward pass through the same graph: its norms were formed by the first")
        with self.on():  # checkpointing may recompute them here
            kept = use.kept.grad_fn.saved_tensors  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        use.kept = None
        return kept

    def _fired(self, use: Use, grads: Sequence[Tensor | None]) -> None:
        if self._closed:
            return
        samples = self._samples_of(use)
        with self._apart():
            self._arrive(use, samples, grads)

    def _arrive(self, use: Use, samples: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> None:
        ready = []
        for leaf in self._leaves_of(use):
            if leaf.closed:
                raise self._closed_before(leaf, use)
            leaf.fired[use.late] += 1
            leaf.fresh = True
            for role, tensor in use.shared.items():
                sources, whole = self._shared[tensor]
                if id(leaf.parameter) in sources:
                    view = use.call is not None and use.call.isometric and whole is leaf
                    plain = use.call is not None and (view or tensor is leaf.parameter)
                    leaf.entries.append(Entry(use, role, tensor, samples, grads, plain))
            late_done = not use.late or leaf.fired[True] == leaf.uses[True]
            if leaf.fired[False] == leaf.uses[False] and late_done:
                ready.append(leaf)
        self._close_together(use, ready)

    def _closed_before(self, leaf: Leaf, use: Use) -> UnaccountedParameter:
        return self._refusal(
            leaf,
            f"{use.name} again after its norm was formed: it is shared between segments of reentrant checkpointing"
            " (use_reentrant=False works)",
        )

    def _close_together(self, use: Use, ready: list[Leaf]) -> None:
        """Weight and bias of one call take one pass when nothing else feeds them."""
        assert self.rows is not None
        alone = [leaf for leaf in ready if len(leaf.entries) == 1 and leaf.entries[0].plain]
        if len(alone) == 2 and alone[0].module_name == alone[1].module_name:
            found = by_rule(alone[0].entries[0], self.rows, weight=True, bias=True)
            if found is not None:
                alone[0].close(found)
                alone[1].close(torch.zeros_like(found))
        for leaf in ready:
            if not leaf.closed:
                leaf.close(sq_norms_of(leaf, self.rows))

    def _fired_fused(self, use: Use, through: Callable[[Tensor], Tensor], grads: Tensor) -> tuple[Tensor, ...]:
        """The weight's and bias's gradients, and where nothing else feeds them their norms in the same pass."""
        samples = self._samples_of(use)
        assert use.call is not None
        assert use.call.positions is not None
        with self._apart():
            grads = through(grads)
            a, g = use.call.positions(self.rows, samples[0], use.layouts[0], grads, use.out_layouts[0])
            bias = "bias" in use.shared
            sq_norms, *found = rules.linear_grads_and_sq_norms(a, g, bias)
            if not self._closed:
                self._arrive_fused(use, samples, grads, sq_norms)
            return tuple(part.to(t.dtype) for part, t in zip(found, use.shared.values(), strict=bias))

    def _arrive_fused(self, use: Use, samples: tuple[Tensor, ...], grads: Tensor, sq_norms: Tensor) -> None:
        leaves = self._leaves_of(use)
        alone = all(leaf.uses[use.late] == 1 and not (use.late and leaf.uses[False]) for leaf in leaves)
        if not alone:
            self._arrive(use, samples, [grads])
            return
        for leaf in leaves:
            if leaf.closed:
                raise self._closed_before(leaf, use)
            leaf.fresh = True
            leaf.close(sq_norms)
            sq_norms = torch.zeros_like(sq_norms)  # the first has all of it

    # ---- what cannot be split by sample

    def _refusal(self, leaf: Leaf, how: str) -> UnaccountedParameter:
        return UnaccountedParameter(
            f"{leaf.described} is used by {how}: its per-sample gradient norms are not known."
            " Leave it out with parameters=..., or compute this part outside"
        )

    def _is_training(self, args, kwargs) -> bool:
        return bool(kwargs.get("training", args[5] if len(args) > 5 else False))

    def _batch_statistics(self, func, args, kwargs) -> Any:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, args, strict=False)) | kwargs
        if self.batchnorm != "fixed_statistics":
            owned = [id(given.get(name)) for name in ("running_mean", "weight") if given.get(name) is not None]
            where = [f" in module {name!r}" for name, tensor in self.norm_tensors if id(tensor) in owned]
            raise UnaccountedParameter(
                f"BatchNorm in training mode{where[0] if where else ''}: the loss of a sample depends on the whole batch, so"
                " its gradient norm is not defined. Use eval mode, another normalisation, or batchnorm='fixed_statistics',"
                " which takes the statistics of the batch for constants"
            )
        self.labels["batchnorm: the statistics of the batch are constants, also for .grad"] = None
        x, eps = given["input"], given.get("eps", 1e-5)
        with self._apart():
            plain = func(**(given | {"input": x.detach()}))  # the running statistics move, as without us
            dims = [dim for dim in range(x.dim()) if dim != 1]
            var, mean = torch.var_mean(x.float() if x.dtype != torch.float64 else x, dims, correction=0)
        with self.on():
            out = func(x, mean, var, given.get("weight"), given.get("bias"), False, 0.0, eps)
        with self._apart():
            out.detach().copy_(plain)  # the same numbers, to the last digit
        return out

    def _note_mean(self, func, name: str, args, kwargs, tensors: Sequence[Tensor], out: Tensor) -> None:
        """How many terms a mean loss is the mean of; it stays that when it is multiplied by a number."""
        if func is torch.nn.functional.cross_entropy or func is torch.nn.functional.nll_loss:
            count = self._mean_count(args, kwargs)
            if count is not None:
                self._means[out] = count
                self.means_seen = True
        elif name in ("mul", "div", "true_divide", "neg", "to", "float", "double"):
            marked = [self._means[tensor] for tensor in tensors if tensor in self._means]
            if len(marked) == 1 and sum(tensor in self._samples for tensor in tensors) == 1:
                self._means[out] = marked[0]

    def _mean_count(self, args, kwargs) -> Tensor | int | None:
        names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("reduction", "mean") != "mean" or not torch.is_grad_enabled():
            return None
        target = given["target"]
        if target.is_floating_point():  # class probabilities
            return target.numel() // target.shape[1 if target.dim() > 1 else 0]
        with self._apart():
            kept, weight = target != given.get("ignore_index", -100), given.get("weight")
            return kept.sum() if weight is None else (weight[target.where(kept, 0)] * kept).sum()

    # ---- backward

    def watch(self) -> list[Any]:
        """Hooks on the parameters: a gradient that arrives without a use having been seen is refused."""
        return [leaf.parameter.register_hook(functools.partial(self._arrives, leaf)) for leaf in self.leaves.values()]

    def _arrives(self, leaf: Leaf, grads: Tensor) -> None:
        if self._busy or not leaf.wanted:
            return
        if self.weight_gradients == "none" or not leaf.fresh:
            raise self._refusal(leaf, "a part of the model that was not seen (nested or unusual checkpointing)")
        leaf.fresh = False

    def _backward(self, loss: Tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None) -> None:
        if inputs is not None:
            raise ValueError(
                "backward(inputs=...) leaves gradients out, and the norms would lack them: call backward()"
            )
        self.mean_count = self._means.get(loss)
        if loss in self._shared:
            raise self._refusal(
                self._leaf_of(loss),
                "a loss that no input was seen to reach (call the model itself; a scripted module hides its inputs)",
            )
        _, reached, nodes = self._walk([] if loss.grad_fn is None else [loss.grad_fn])
        if reached:
            key, node = reached[0]
            raise self._refusal(
                self.leaves[key], f"{node}, which is not a torch function that can be seen (a scripted module, an"
                " autograd.Function, or a call of the model outside this context)",
            )  # fmt: skip
        loss.backward(gradient, retain_graph, create_graph)  # another context around this one sees it as well
        for use, node in self._uses:
            if use.kept is not None and node in nodes:
                raise self._refusal(
                    self._leaves_of(use)[0], f"{use.name}, which no gradient reached although the loss has it"
                )
        self._uses.clear()
        with self._apart():
            for leaf in self.leaves.values():
                if leaf.entries and not leaf.closed:  # some of its uses had no part in the loss
                    assert self.rows is not None
                    leaf.close(sq_norms_of(leaf, self.rows))
        self.finished = True
