"""How each contender does it: from inputs to a call of no arguments that returns a tuple of what it found.

"score": losses first, then what else the contender finds. "loss", "backward", "stored": the loss, then its gradients.
A library that is not installed, or that cannot run here, raises Unavailable.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaselect_kernels import (
    AdaSelectionState,
    fused_linear_select,
    linear_per_sample_stats,
    selected_cross_entropy,
    selected_linear_cross_entropy,
)
from benchmarks import naive, timing
from benchmarks.linear.problem import Inputs, Problem
from benchmarks.micro.case import Unavailable, compile_peer
from benchmarks.micro.fused_select import METHODS, naive_select_fusible

Call = Callable[[], tuple[Tensor, ...]]
Losses = Callable[..., Tensor]  # (rows [k, H], weight [V, H], targets [k], reduction) -> losses
CPU_CHUNK = 512  # rows: the fastest tried of torch's chunked form on a CPU, which takes 16 of itself

ROLES = {"ours": "ours", "full": "ours", "stats": "part", "product": "floor"}  # the others are peers
LOSS_ONLY = ("liger", "cce", "torch", "torch_chunked")  # neither gradient norms nor a selection
COMPILED = ("compiled", "cce")  # traced at the first call of a shape


def make_call(name: str, problem: Problem, inputs: Inputs, quick: bool) -> Call:
    """The call of contender `name`. quick: what is compiled is traced without generating code."""
    if problem.kind == "stored":
        return _stored(name, inputs)
    if name == "product":
        return _product(problem, inputs)
    if problem.kind == "score":
        return _score(name, problem, inputs, quick)
    return _loss(name, problem, inputs, quick)


def _product(problem: Problem, inputs: Inputs) -> Call:
    """The products that the function needs and nothing else: of all rows, or of those chosen."""
    hidden, weight, _, indices = inputs
    if problem.kind == "score":
        return lambda: (hidden @ weight.T,)
    rows, gradient = hidden[indices], torch.randn(problem.k, problem.classes, device=hidden.device).to(hidden.dtype)
    if problem.kind == "backward":
        return lambda: (gradient @ weight, gradient.T @ rows)
    return lambda: (rows @ weight.T, gradient @ weight, gradient.T @ rows)


def _score(name: str, problem: Problem, inputs: Inputs, quick: bool) -> Call:
    hidden, weight, targets, _ = inputs
    if name == "ours":
        state = AdaSelectionState.create(METHODS, hidden.device)

        def ours() -> tuple[Tensor, ...]:
            found = fused_linear_select(hidden, weight, targets, problem.gamma, methods=METHODS, state=state)
            return found.losses, found.scores, found.indices

        return ours
    if name == "stats":
        return lambda: tuple(t for t in linear_per_sample_stats(hidden, weight, targets) if t is not None)
    if name == "naive":
        return _naive_score(naive_linear_select, problem, inputs)
    if name == "compiled":
        return _naive_score(compile_peer(fusible_linear_select, hidden.device, quick), problem, inputs)
    losses = torch.no_grad()(_losses(name, hidden.device))
    return lambda: (losses(hidden, weight, targets, "none"),)


def naive_linear_select(hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Any) -> Any:
    return naive.naive_select(F.linear(hidden, weight), targets, *rest)


def fusible_linear_select(hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Any) -> Any:
    return naive_select_fusible(F.linear(hidden, weight), targets, *rest)


def _naive_score(function: Callable[..., Any], problem: Problem, inputs: Inputs) -> Call:
    state = naive.fresh_state(len(METHODS), inputs.hidden.device)

    def call() -> tuple[Tensor, ...]:
        nonlocal state
        found, state = function(*inputs[:3], problem.k, METHODS, state)
        return found.losses, found.scores, found.indices

    return call


def _loss(name: str, problem: Problem, inputs: Inputs, quick: bool) -> Call:
    """The mean over the chosen rows and its gradients for hidden and weight. "full" and "naive_full": over all rows."""
    hidden, weight = (t.detach().requires_grad_() for t in inputs[:2])
    targets, indices = inputs[2:]
    if name in ("ours", "full"):
        if name == "full":
            indices = torch.arange(problem.n, device=hidden.device)
        forward = partial(selected_linear_cross_entropy, hidden, weight, targets, indices)
    elif name == "naive_full":
        forward = partial(naive_loss, hidden, weight, targets, "mean")
    else:
        losses = _losses(name, hidden.device, quick)

        def forward() -> Tensor:
            return losses(hidden[indices], weight, targets[indices], "mean")

    return _with_gradients(forward, (hidden, weight), backward_only=problem.kind == "backward")


def _with_gradients(forward: Callable[[], Tensor], of: tuple[Tensor, ...], *, backward_only: bool) -> Call:
    if backward_only:
        kept = forward()
        return lambda: (kept.detach(), *torch.autograd.grad(kept, of, retain_graph=True))

    def call() -> tuple[Tensor, ...]:
        loss = forward()
        return loss.detach(), *torch.autograd.grad(loss, of)

    return call


def _stored(name: str, inputs: Inputs) -> Call:
    logits, (targets, indices) = inputs.hidden.detach().requires_grad_(), inputs[2:]
    if name == "full":
        indices = torch.arange(len(targets), device=targets.device)
    if name in ("ours", "full"):
        forward = partial(selected_cross_entropy, logits, targets, indices)
    else:

        def forward() -> Tensor:
            return F.cross_entropy(logits[indices].float(), targets[indices])

    return _with_gradients(forward, (logits,), backward_only=False)


def naive_loss(rows: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(F.linear(rows, weight).float(), targets, reduction=reduction)


def _losses(name: str, device: torch.device, quick: bool = False) -> Losses:
    if name == "naive":
        return naive_loss
    if name == "compiled":
        return compile_peer(naive_loss, device, quick)
    return {"liger": _liger, "cce": _cce, "torch": _torch, "torch_chunked": _torch_chunked}[name](device)


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed or does not load: {timing.describe_error(error)}") from None


def _liger(device: torch.device) -> Losses:
    if device.type == "cpu":
        raise Unavailable("liger-kernel needs a GPU")
    function = _module("liger_kernel.transformers.functional", "liger-kernel").liger_fused_linear_cross_entropy
    return lambda rows, weight, targets, reduction: function(rows, weight, targets, reduction=reduction)


def _cce(device: torch.device) -> Losses:
    """On a CPU its form for torch.compile, which stores the logits."""
    function = _module("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    impl = "torch_compile" if device.type == "cpu" else "cce"
    return lambda rows, weight, targets, reduction: function(rows, weight, targets, reduction=reduction, impl=impl)


def _torch(device: torch.device, **options: Any) -> Losses:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    return lambda rows, weight, targets, reduction: function(rows, weight, targets, reduction=reduction, **options)


def _torch_chunked(device: torch.device) -> Losses:
    kind = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if kind is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy in chunks")
    if device.type == "cpu":
        return _torch(device, options=kind(chunking_method=None, batch_chunk_size=CPU_CHUNK))
    return _torch(device, options=kind())
