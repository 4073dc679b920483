"""Sees every call that a parameter takes part in, and accounts for all of its gradient.

While a recorder is active, each torch function passes through it. Tensors are of three kinds: sample tensors, which have a
sample axis (the model's inputs and what is computed from them); shared tensors, the parameters and what is computed from
parameters and constants alone; constants. A function of sample and shared tensors is a use of parameters: its output
gets a hook, and when the gradient arrives there (arrivals.py) the rule of the function gives the squared norms. Uses
without a rule are refused, or differentiated one sample at a time.
"""

import functools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels.grad_norms import functions, layout, rules
from adaselect_kernels.grad_norms.arrivals import Apart, Arrivals, Shared, UnaccountedParameter, shared_of
from adaselect_kernels.grad_norms.gradients import Slot, Use, same_alone, swapped, tensors_in
from adaselect_kernels.grad_norms.layout import LEADING, Known, Layout
from adaselect_kernels.grad_norms.nodes import Attach, Held, Packed, seen_through
from adaselect_kernels.grad_norms.rows import Rows


def _saving_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """What packs and unpacks the tensors that autograd saves, if anything does (checkpointing does)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]


def _cut_off(args, kwargs, shared: Sequence[tuple[Tensor, Shared]]) -> tuple[Any, Any]:
    """The arguments with the shared tensors cut off from their gradients."""
    detached = {id(tensor): tensor.detach() for tensor, _ in shared}
    return swapped(args, detached), swapped(kwargs, detached)


def _anchor(like: Tensor) -> Tensor:
    return torch.zeros(0, requires_grad=True, device=like.device)


def _nothing(grads: Tensor) -> tuple[None]:
    return (None,)


class Recorder(Arrivals):
    """See the module's docstring; the arguments are those of Arrivals."""

    # ---- a batch

    def begin(self, inputs: Any, sample_ids: Tensor | None) -> None:
        """The model is called with `inputs`: a new batch, or more of the one whose backward pass is still to come."""
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        if self.finished or self.rows is None:
            if self._touched:
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
        self.rows, self._touched = self.rows or Rows(count, sample_ids), True
        self._inputs += found
        for tensor in found:
            if tensor.shape[self.sample_dim] == count and tensor not in self._samples:
                self._samples[tensor] = Layout(self.sample_dim)

    # ---- functions

    def _call(self, func, args, kwargs) -> Any:
        """Run a function; what checkpointing recomputes for its saved tensors is then seen as well."""
        hooks = _saving_hooks() if torch.is_grad_enabled() else None
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
        name, writes, taken = functions.described(func)
        if taken is functions.PASSED:
            return func(*args, **kwargs)
        if taken is functions.SPECIAL:
            if func is Tensor.backward:
                return self._backward(*args, **kwargs)
            if func is torch.autograd.grad:
                raise ValueError(
                    "torch.autograd.grad inside PerSampleGradNorm: its gradients could not be told from those of the loss"
                    " (double backward is not supported)"
                )
            if func is torch.nn.functional.batch_norm and self._is_training(args, kwargs):
                return self._batch_statistics(func, args, kwargs)
        tensors = tensors_in(args)
        if kwargs:
            tensors += tensors_in(kwargs)
        known, shared, others = self._sorted(tensors)
        if known and name in layout.PARTIAL:
            known = layout.sources(name, args, known)
        if shared and others:
            known = [*known, *self._adopted(others)]
        if not known:
            return self._derive(func, name, args, kwargs, tensors, shared) if shared else self._call(func, args, kwargs)
        if not shared:
            if taken is functions.SPECIAL and func is Tensor.__iter__:
                with self.on():
                    return iter(args[0].unbind(0))
            out = self._call(func, args, kwargs)
            self._mark(out, name, args, kwargs, known, writes)
            if isinstance(out, Tensor) and out.dim() == 0:
                self._note_mean(func, name, args, kwargs, tensors, out)
            return out
        return self._use(func, name, writes, args, kwargs, tensors, shared, known)

    def _sorted(self, tensors: Sequence[Tensor]) -> tuple[list[Known], list[tuple[Tensor, Shared]], list[Tensor]]:
        """The sample tensors with their layouts, the shared tensors (while gradients are recorded), and those that are neither.

        Every argument of every function passes here: the maps are read directly.
        """
        known, shared, others = [], [], []
        samples, parameters = self._samples.entries, self._shared.entries if torch.is_grad_enabled() else {}
        for tensor in tensors:
            key, neither = id(tensor), True
            entry = samples.get(key)
            if entry is not None and entry[0]() is tensor:
                known.append((tensor, entry[1]))
                neither = False
            else:
                node = tensor.grad_fn
                if node is not None and node in self._sample_nodes:  # another object for the same tensor
                    where = self._samples[tensor] = self._sample_nodes[node]
                    known.append((tensor, where))
                    neither = False
            entry = parameters.get(key)
            if entry is not None and entry[0]() is tensor:
                shared.append((tensor, entry[1]))
            elif neither:
                others.append(tensor)
        return known, shared, others

    def _mark(self, out: Any, name: str, args, kwargs, known, writes: bool) -> list[Tensor]:
        """Give the outputs their layouts; returns them."""
        assert self.rows is not None
        rows, found = self.rows.count, tensors_in(out)
        for tensor in found:
            # behind the output, recurrent layers give the last states [layers, N, H], whatever the order of the input is
            last = name in layout.RECURRENT and tensor is not found[0]
            where = Layout(tensor.dim() - 2) if last else layout.through(tensor, name, args, kwargs, known, rows)
            self._set_layout(tensor, where)
        if name == "__setitem__" and isinstance(args[0], Tensor):
            target = args[0]
            front = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            whole = front is Ellipsis or (isinstance(front, slice) and front == slice(None))
            leading = whole and target.dim() and target.shape[0] == self.rows.count
            self._set_layout(target, LEADING if leading and all(at == LEADING for _, at in known) else None)
        elif writes and isinstance(args[0], Tensor) and not any(tensor is args[0] for tensor in found):
            self._set_layout(args[0], layout.through(args[0], name, args, kwargs, known, rows))
        return found

    def _set_layout(self, tensor: Tensor, where: Layout | None) -> None:
        self._samples.entries[id(tensor)] = weakref.ref(tensor), where
        node = tensor.grad_fn
        if node is not None:
            self._sample_nodes[node] = where

    def _adopted(self, tensors: Sequence[Tensor]) -> Iterator[Known]:
        for tensor in tensors:
            if tensor not in self._samples and self._adopts(tensor):
                yield tensor, self._samples[tensor]

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

    def _account(self, outputs: Sequence[Tensor], above: set[Any]) -> None:
        """The nodes that a call made, between its outputs and its inputs."""
        accounted, stack = self._accounted, [tensor.grad_fn for tensor in outputs]
        while stack:
            node = stack.pop()
            if node is not None and node not in above and node not in accounted:
                accounted.add(node)
                stack += [below for below, _ in node.next_functions]

    # ---- shared tensors

    def _derive(self, func, name: str, args, kwargs, tensors: Sequence[Tensor], shared) -> Any:
        """A function of parameters and constants alone."""
        self._touched = True
        above = {tensor.grad_fn for tensor in tensors}
        out = self._call(func, args, kwargs)
        outputs = [tensor for tensor in tensors_in(out) if tensor.requires_grad]
        self._account(outputs, above)
        sources = tuple(dict.fromkeys([leaf for _, of in shared for leaf in of.sources]))
        whole = shared[0][1].whole if len(shared) == 1 and functions.selects(name, args, kwargs) else None
        made = shared_of(sources, whole)
        for tensor in outputs:
            if tensor in self._shared:
                continue
            self._shared[tensor] = made
            self._shared_nodes[tensor.grad_fn] = made.sources
            if made.leaves and self.weight_gradients != "none":
                # entries keep the tensor while they need it; a strong reference here would be a cycle
                tensor.register_hook(functools.partial(self._leaving, weakref.ref(tensor)))
        return out

    # ---- uses

    def _use(self, func, name: str, writes: bool, args, kwargs, tensors, shared, known) -> Any:
        wanted = [tensor for tensor, of in shared if of.leaves]
        if not wanted:
            given = _cut_off(args, kwargs, shared) if self.weight_gradients == "none" else (args, kwargs)
            out = self._call(func, *given)
            self._mark(out, name, args, kwargs, known, writes)
            return out
        call = self._bind(name, args, kwargs, wanted, known) if not writes else None
        simple = name in rules.ELEMENTWISE or name in rules.JOINING
        if call is None and not simple and isinstance(func, types.FunctionType):
            body = functions.opened(func)
            if body is not None and name not in rules.RULES:
                with self.on():
                    return body(*args, **kwargs)
        if None in [where for _, where in known]:
            shapes = ", ".join(str(list(tensor.shape)) for tensor, where in known if where is None)
            raise self._refusal(
                self._leaf_of(wanted[0]),
                f"{name} together with a tensor {shapes} of which it is not known which part belongs to which sample",
            )
        if writes and name not in ("add", "sub"):
            raise self._refusal(self._leaf_of(wanted[0]), f"{name}_, which overwrites its input")
        if call is None and not simple and self.fallback != "per_sample":
            raise self._refusal(
                self._leaf_of(wanted[0]),
                f"{name}, which has no rule (fallback='per_sample' differentiates it sample by sample)",
            )
        return self._record(func, name, writes, args, kwargs, tensors, shared, wanted, known, call)

    def _bind(self, name: str, args, kwargs, wanted: Sequence[Tensor], known: Sequence[Known]) -> rules.Call | None:
        """The call as its rule reads it: one sample tensor, and every wanted shared tensor in a role that the rule has."""
        if len(known) != 1:
            return None
        if name in rules.BROADCASTING:
            alone = len(wanted) == 1 and len(args) == 2 and not kwargs
            return rules.broadcast(name, wanted[0]) if alone else None
        call = rules.RULES[name](*args, **kwargs) if name in rules.RULES else None
        if call is None or call.input is not known[0][0]:
            return None
        call.input = None  # checkpointing may drop it
        covered = {id(tensor) for tensor in call.roles.values()}
        return call if covered.issuperset(map(id, wanted)) else None

    def _record(self, func, name: str, writes: bool, args, kwargs, tensors, shared, wanted, known, call) -> Any:
        above = {tensor.grad_fn for tensor in tensors}
        slots: dict[int, Slot] = {}
        for i, (tensor, _) in enumerate(known):
            slots.setdefault(id(tensor), Slot(i))
        by_id = {id(tensor): of for tensor, of in shared if of.leaves}
        if call is None:
            roles = {str(id(tensor)): tensor for tensor in wanted}
        else:
            roles = {role: tensor for role, tensor in call.roles.items() if id(tensor) in by_id}
        layouts = [where for _, where in known]
        use = Use(func, name, swapped(args, slots), swapped(kwargs, slots), call, roles, layouts)
        use.fused = self._may_fuse(name, use, shared)
        apart = self.weight_gradients == "none" or use.fused
        given_args, given_kwargs = _cut_off(args, kwargs, shared) if apart else (args, kwargs)
        hooks = _saving_hooks()
        out = func(*given_args, **given_kwargs) if hooks is None else self._call(func, given_args, given_kwargs)
        outputs = self._mark(out, name, args, kwargs, known, writes)
        outputs = [tensor for tensor in outputs if tensor.is_floating_point()]
        use.out_layouts = [self._samples[tensor] for tensor in outputs]
        if None in use.out_layouts:
            raise self._refusal(self._leaf_of(wanted[0]), f"{name}, of whose output the sample axis is not known")
        if call is not None and call.moments is not None and hooks is None:
            use.moments = call.moments(outputs[0])
        simple = name in rules.ELEMENTWISE or name in rules.JOINING
        if simple:
            self._align(use, outputs)
        samples = [tensor for tensor, _ in known]
        if call is None and not simple and not self._replays(use, samples, outputs):
            raise self._refusal(
                self._leaf_of(wanted[0]), f"{name}, which does not give a sample alone what it gives it in the batch"
            )
        if len(outputs) > 1:
            # one may be computed from another inside the call: hooks see what comes from outside, on nodes of their own
            anchor = _anchor(outputs[0])
            apart_from = {id(t): Attach.apply(_nothing, False, t, anchor) for t in outputs}
            out = swapped(out, apart_from)
            outputs = bases = list(apart_from.values())
            attached = True
        else:
            # a view is rebased when it, or another view of its base, is written in place: only the base keeps its history
            bases = [tensor if tensor._base is None else tensor._base for tensor in outputs]
            attached = use.fused or not bases[0].requires_grad
            if use.fused:
                gradients = functools.partial(self._fired_fused, use, seen_through(outputs[0], bases[0]))
                Attach.apply(gradients, True, bases[0], *use.shared.values())
            elif attached:
                Attach.apply(_nothing, True, bases[0], _anchor(bases[0]))
        self._account(outputs if bases[0] is outputs[0] else [*outputs, *bases], above)
        if attached:  # to other nodes
            for tensor, where in zip(outputs, use.out_layouts, strict=True):
                self._set_layout(tensor, where)
        if hooks is None:  # what is its own output must not be kept by its own hook
            use.kept = Held([tensor.detach() for tensor in samples] if writes else samples)
        else:
            use.kept = Packed(_anchor(outputs[0]), samples)
        if use.fused:
            pass
        elif len(outputs) == 1:
            through = seen_through(outputs[0], bases[0])
            bases[0].register_hook(functools.partial(self._fired_one, use, through))
        else:
            torch.autograd.graph.register_multi_grad_hook(outputs, lambda grads: self._fired(use, list(grads)))
        if not use.late:
            self._uses.append((use, bases[0].grad_fn))
        use.leaves = list(dict.fromkeys([leaf for t in use.shared.values() for leaf in by_id[id(t)].leaves]))
        for leaf in use.leaves:
            leaf.uses += not use.late
            leaf.late_uses += use.late
        return out

    def _align(self, use: Use, outputs: Sequence[Tensor]) -> None:
        """A shared tensor may have as many entries along the output's sample axis: then sample i meets its entry i."""
        assert self.rows is not None
        at = use.out_layouts[0]
        for tensor in [*tensors_in(use.args), *tensors_in(use.kwargs)]:
            if tensor in self._shared:
                dim = at.dim - max(0, outputs[0].dim() - tensor.dim()) if use.name != "stack" else use.layouts[0].dim
                if dim >= 0 and tensor.shape[dim] == at.outer * self.rows.count * at.inner and tensor.shape[dim] > 1:
                    use.aligned[id(tensor)] = at._replace(dim=dim)

    def _replays(self, use: Use, samples: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        """Whether the call can be made again for one sample, with its other tensors whole or cut down along with it."""
        assert self.rows is not None
        with Apart(self), torch.random.fork_rng([t.device for t in outputs[:1] if t.is_cuda]):
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

    def _may_fuse(self, name: str, use: Use, shared: Sequence[tuple[Tensor, Shared]]) -> bool:
        if self.weight_gradients != "fused" or name != "linear":
            return False
        plain = all(id(tensor) in self.leaves for tensor, _ in shared) and len(shared) == len(use.shared)
        return plain and "weight" in use.shared

    # ---- batch statistics and means

    def _is_training(self, args, kwargs) -> bool:
        return bool(kwargs.get("training", args[5] if len(args) > 5 else False))

    def _batch_statistics(self, func, args, kwargs) -> Any:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, args, strict=False)) | kwargs
        if self.batchnorm != "fixed_statistics":
            kinds = ("running_mean", "weight")
            owned = [id(given.get(kind)) for kind in kinds if given.get(kind) is not None]
            found = [(name, getattr(m, kind, None)) for name, m in self.model.named_modules() for kind in kinds]
            where = [f" in module {name!r}" for name, tensor in found if id(tensor) in owned]
            raise UnaccountedParameter(
                f"BatchNorm in training mode{where[0] if where else ''}: the loss of a sample depends on the whole batch, so"
                " its gradient norm is not defined. Use eval mode, another normalisation, or batchnorm='fixed_statistics',"
                " which takes the statistics of the batch for constants"
            )
        self.labels["batchnorm: the statistics of the batch are constants, also for .grad"] = None
        x, eps = given["input"], given.get("eps", 1e-5)
        with Apart(self):
            plain = func(**(given | {"input": x.detach()}))  # the running statistics move, as without us
            dims = [dim for dim in range(x.dim()) if dim != 1]
            var, mean = torch.var_mean(x.float() if x.dtype != torch.float64 else x, dims, correction=0)
        with self.on():
            out = func(x, mean, var, given.get("weight"), given.get("bias"), False, 0.0, eps)
        with Apart(self):
            out.detach().copy_(plain)  # the same numbers, to the last digit
        return out

    def _note_mean(self, func, name: str, args, kwargs, tensors: Sequence[Tensor], out: Tensor) -> None:
        """How many terms a mean loss is the mean of; it stays that when it is multiplied by a number."""
        if func is torch.nn.functional.cross_entropy or func is torch.nn.functional.nll_loss:
            count = functions.mean_count(args, kwargs)
            if count is not None:
                self._means[out] = count
                self.means_seen = True
        elif name in ("mul", "div", "true_divide", "neg", "to", "float", "double"):
            marked = [self._means[tensor] for tensor in tensors if tensor in self._means]
            if len(marked) == 1 and sum(tensor in self._samples for tensor in tensors) == 1:
                self._means[out] = marked[0]
