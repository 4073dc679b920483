"""What happens when gradients arrive: each use of a parameter gives its part, and the last one the norms.

Before a backward pass the graph is walked: a parameter that it reaches by a way that was not seen is refused, so no part
of a gradient is ever left out.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from adaselect_kernels.grad_norms import rules
from adaselect_kernels.grad_norms.gradients import Entry, Leaf, Use, by_rule, sample_gradient, sq_norms_of
from adaselect_kernels.grad_norms.layout import Layout
from adaselect_kernels.grad_norms.nodes import Held
from adaselect_kernels.grad_norms.rows import Rows


class UnaccountedParameter(ValueError):
    """A parameter takes part in the loss in a way whose per-sample gradients are not known; nothing was computed."""


class TensorMap:
    """What is known of a tensor, by the object that it is; it may go when it likes.

    entries: by id; an entry holds for the tensor that its reference leads to, not for another that has come to its address.
    """

    def __init__(self, entries: dict[int, tuple[weakref.ref, Any]] | None = None) -> None:
        self.entries = {} if entries is None else entries

    def __setitem__(self, tensor: Tensor, value: Any) -> None:
        self.entries[id(tensor)] = weakref.ref(tensor), value

    def __contains__(self, tensor: Tensor) -> bool:
        entry = self.entries.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    def __getitem__(self, tensor: Tensor) -> Any:
        entry = self.entries.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            raise KeyError(tensor.shape)
        return entry[1]

    def get(self, tensor: Tensor) -> Any:
        return self.entries[id(tensor)][1] if tensor in self else None


class Shared(NamedTuple):
    """What a tensor computed from parameters and constants alone is made of."""

    sources: tuple[Leaf, ...]  # its parameters
    leaves: tuple[Leaf, ...]  # those of them that count
    whole: Leaf | None  # the one whose elements it is, each at most once


def shared_of(sources: tuple[Leaf, ...], whole: Leaf | None) -> Shared:
    counted = tuple([leaf for leaf in sources if leaf.wanted])
    return Shared(sources, sources if len(counted) == len(sources) else counted, whole)


class Apart:
    """For our own arithmetic: neither seen nor differentiated. A class, as a generator's context takes three times as long."""

    __slots__ = ("_busy", "_grads", "_recorder", "_unseen")

    def __init__(self, recorder: "Arrivals") -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        self._busy, self._recorder._busy = self._recorder._busy, True
        self._grads = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self._unseen = torch._C.DisableTorchFunction()
        self._unseen.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._unseen.__exit__(*error)
        torch._C._set_grad_enabled(self._grads)
        self._recorder._busy = self._busy


class Arrivals(TorchFunctionMode):
    """The backward half of the recorder, and what a batch's records are.

    leaves: every trainable parameter of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        leaves: Sequence[Leaf],
        *,
        weight_gradients: str,
        batchnorm: str,
        fallback: str,
        sample_dim: int,
    ) -> None:
        super().__init__()
        self.model, self.leaves = model, {id(leaf.parameter): leaf for leaf in leaves}
        self._parameters = {
            key: (weakref.ref(leaf.parameter), shared_of((leaf,), leaf)) for key, leaf in self.leaves.items()
        }
        self._watched: list[Any] = []
        self._touched = False  # something was seen since the last reset
        self.weight_gradients, self.batchnorm, self.fallback = weight_gradients, batchnorm, fallback
        self.sample_dim = sample_dim
        self.rows: Rows | None = None
        self.labels: dict[str, None] = {}
        self.means_seen = False  # cross_entropy or nll_loss with reduction="mean"
        self.mean_count: Tensor | int | None = None  # of the loss that was differentiated, where it is one of those
        self.finished = False  # a backward pass has ended: the norms are there
        self._busy = False  # gradients that flow now are of our own asking
        self._closed = False  # the context has been left
        self._forget()

    # ---- a batch

    def _forget(self) -> None:
        self._samples = TensorMap()  # tensor -> Layout or None
        self._shared = TensorMap()  # tensor -> Shared
        self._sample_nodes: dict[Any, Layout | None] = {}
        self._accounted: set[Any] = set()
        self._shared_nodes: dict[Any, tuple[Leaf, ...]] = {}
        self._segments: set[Any] = set()  # nodes of reentrant checkpoints
        self._uses: list[tuple[Use, Any]] = []  # of the forward pass, with the node whose gradient each waits for
        self._inputs: list[Tensor] = []  # kept, so that a recomputation finds the same objects
        self._means = TensorMap()  # mean losses -> how many terms

    def reset(self) -> None:
        self._forget()
        self.finished = False
        self.means_seen, self.mean_count = False, None
        self._shared = TensorMap(self._parameters.copy())
        if self._touched:
            for leaf in self.leaves.values():
                leaf.reset()
        self._touched = False

    def open(self) -> None:
        self.reset()
        self.rows, self._closed = None, False

    def close(self) -> None:
        """Keep the norms and drop what only a backward pass needs; a later one is none of ours."""
        self._closed = True
        self._forget()

    def on(self) -> contextlib.AbstractContextManager:
        """Autograd runs its nodes, and a mode its own function, without the mode: see functions there too."""
        active = any(mode is self for mode in _get_current_function_mode_stack())
        return contextlib.nullcontext() if active else self

    # ---- the graph

    def _walk(self, nodes: Sequence[Any]) -> tuple[list[Layout | None], list[tuple[Leaf, str]], set[Any]]:
        """Down the graph: layouts of the sample tensors first met, leaves that a node not seen here leads to, all nodes."""
        layouts, leaves, seen = [], [], set()
        stack = [(node, False) for node in nodes]  # and whether a sample tensor is above
        while stack:
            node, below_sample = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self._sample_nodes:
                if not below_sample:
                    layouts.append(self._sample_nodes[node])
                below_sample = True
            accounted = node in self._accounted
            if type(node).__name__ == "CheckpointFunctionBackward" and node not in self._segments:
                # it calls its part of the model again when its turn comes
                self._segments.add(node)
                node.register_prehook(lambda grads: self.__enter__() and None)
                node.register_hook(lambda above, below: self.__exit__(None, None, None))
            for below, _ in node.next_functions:
                if below is None:
                    continue
                if not accounted:
                    leaf = self.leaves.get(id(getattr(below, "variable", None)))
                    sources = self._shared_nodes.get(below, ()) if leaf is None else (leaf,)
                    leaves += [(source, node.name()) for source in sources if source.wanted]
                stack.append((below, below_sample))
        return layouts, leaves, seen

    def _leaf_of(self, tensor: Tensor) -> Leaf:
        return self._shared[tensor].sources[0]

    def _refusal(self, leaf: Leaf, how: str) -> UnaccountedParameter:
        return UnaccountedParameter(
            f"{leaf.described} is used by {how}: its per-sample gradient norms are not known."
            " Leave it out with parameters=..., or compute this part outside"
        )

    # ---- gradients

    def _samples_of(self, use: Use) -> tuple[Tensor, ...]:
        if use.kept is None:
            raise ValueError("a second backward pass through the same graph: its norms were formed by the first")
        if type(use.kept) is Held:
            kept = use.kept.tensors()
        else:
            with self.on():  # checkpointing may recompute them here
                kept = use.kept.tensors()
        use.kept = None
        return kept

    def _fired_one(self, use: Use, through: Callable[[Tensor], Tensor], grads: Tensor) -> None:
        self._fired(use, [through(grads)])

    def _fired(self, use: Use, grads: Sequence[Tensor | None]) -> None:
        if self._closed:
            return
        samples = self._samples_of(use)
        with Apart(self):
            self._arrive(use, samples, grads)

    def _arrive(self, use: Use, samples: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> None:
        call, late = use.call, use.late
        for leaf in use.leaves:
            if leaf.closed:
                raise self._closed_before(leaf, use)
            leaf.fired += not late
            leaf.late_fired += late
            leaf.fresh = True
        for role, tensor in use.shared.items():
            shared = self._shared[tensor]
            for leaf in shared.leaves:
                view = call is not None and call.isometric and shared.whole is leaf
                plain = call is not None and (view or tensor is leaf.parameter)
                leaf.entries.append(Entry(use, role, tensor, samples, grads, plain))
        self._close_together(
            [leaf for leaf in use.leaves if leaf.fired == leaf.uses and (not late or leaf.late_fired == leaf.late_uses)]
        )

    def _closed_before(self, leaf: Leaf, use: Use) -> UnaccountedParameter:
        return self._refusal(
            leaf,
            f"{use.name} again after its norm was formed: it is shared between segments of reentrant checkpointing"
            " (use_reentrant=False works)",
        )

    def _close_together(self, ready: list[Leaf]) -> None:
        """Weight and bias of one call take one pass when nothing else feeds them."""
        assert self.rows is not None
        alone = [leaf for leaf in ready if len(leaf.entries) == 1 and leaf.entries[0].plain]
        if len(alone) == 2 and alone[0].module_name == alone[1].module_name:
            found = by_rule(alone[0].entries[0], self.rows, weight=True, bias=True)
            if found is not None:
                alone[0].close(found)
                alone[1].close(None)
        for leaf in ready:
            if not leaf.closed:
                leaf.close(sq_norms_of(leaf, self.rows))

    def _fired_fused(self, use: Use, through: Callable[[Tensor], Tensor], grads: Tensor) -> tuple[Tensor, ...]:
        """The weight's and bias's gradients, and where nothing else feeds them their norms in the same pass."""
        samples = self._samples_of(use)
        assert use.call is not None
        assert use.call.positions is not None
        with Apart(self):
            grads = through(grads)
            a, g = use.call.positions(self.rows, samples[0], use.layouts[0], grads, use.out_layouts[0])
            bias = "bias" in use.shared
            sq_norms, *found = rules.linear_grads_and_sq_norms(a, g, bias)
            if not self._closed:
                self._arrive_fused(use, samples, grads, sq_norms)
            return tuple(part.to(t.dtype) for part, t in zip(found, use.shared.values(), strict=bias))

    def _arrive_fused(self, use: Use, samples: tuple[Tensor, ...], grads: Tensor, sq_norms: Tensor) -> None:
        leaves = use.leaves
        alone = all((leaf.uses, leaf.late_uses) == (not use.late, use.late) for leaf in leaves)
        if not alone:
            self._arrive(use, samples, [grads])
            return
        found: Tensor | None = sq_norms
        for leaf in leaves:
            if leaf.closed:
                raise self._closed_before(leaf, use)
            leaf.fresh = True
            leaf.close(found)
            found = None  # the first has all of it

    def _leaving(self, derived: Callable[[], Tensor | None], grads: Tensor) -> None:
        """The graph behind a derived tensor is about to run, and to be freed: take what still needs it."""
        tensor = derived()
        if tensor is None or self._closed:
            return
        with Apart(self):
            for leaf in self._shared[tensor].sources:
                mine = [entry for entry in leaf.entries if entry.tensor is tensor and entry.explicit is None]
                if mine and not leaf.closed:
                    leaf.entries = [entry for entry in leaf.entries if entry not in mine]
                    assert self.rows is not None
                    parts = [sample_gradient(leaf, mine, self.rows, i) for i in range(self.rows.samples)]
                    leaf.entries.append(Entry(None, "", None, (), (), False, torch.stack(parts)))

    # ---- backward

    def watch(self) -> None:
        """Hooks on the parameters: a gradient that arrives without a use having been seen is refused."""
        arrives = self._arrives
        for leaf in self.leaves.values():
            self._watched.append(leaf.parameter.register_hook(functools.partial(arrives, leaf)))

    def unwatch(self) -> None:
        while self._watched:
            self._watched.pop().remove()

    def _arrives(self, leaf: Leaf, grads: Tensor) -> None:
        if self._busy or not leaf.wanted:
            return
        if self.weight_gradients == "none" or not leaf.fresh:
            raise self._refusal(
                leaf,
                "a part of the model that was not seen (reentrant checkpoints in reentrant ones, or around the whole model:"
                " use_reentrant=False works)",
            )
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
        self._touched = True
        _, reached, nodes = self._walk([] if loss.grad_fn is None else [loss.grad_fn])
        if reached:
            leaf, node = reached[0]
            raise self._refusal(
                leaf, f"{node}, which is not a torch function that can be seen (a scripted module, an"
                " autograd.Function, or a call of the model outside this context)",
            )  # fmt: skip
        loss.backward(gradient, retain_graph, create_graph)  # another context around this one sees it as well
        for use, node in self._uses:
            if use.kept is not None and node in nodes:
                raise self._refusal(use.leaves[0], f"{use.name}, which no gradient reached although the loss has it")
        self._uses.clear()
        with Apart(self):
            for leaf in self.leaves.values():
                if leaf.entries and not leaf.closed:  # some of its uses had no part in the loss
                    assert self.rows is not None
                    leaf.close(sq_norms_of(leaf, self.rows))
        self.finished = True
