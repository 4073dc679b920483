"""The scoring pass: a forward that leaves the model, the gradients and the random streams as if it had not run.

AdaSelection's Algorithms 1 and 2 score every candidate batch with an extra forward. A plain `with torch.no_grad()` is not
enough: it would update BatchNorm, draw dropout masks that shift every later draw, and fill the autocast cache with
weights that have no gradient.
"""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from adaselect_kernels.options import require_choice

MODES = ("eval", "train")

_LARGE = 2**20  # elements; a larger buffer outside training mode is watched instead of copied
# In eval mode these only read their statistics. Subclasses may do otherwise, so the type is compared exactly.
_STATISTICS = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
_STATISTICS |= {nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d}
_LAZY = {nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer}


def score(model: nn.Module, *inputs: Any, mode: str = "eval", autocast: torch.dtype | None = None) -> Any:
    """`model(*inputs)` without gradients and without a trace; the arguments and errors are those of `scoring_pass`.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Dropout())
    >>> score(model, torch.zeros(4, 2)).shape, model.training
    (torch.Size([4, 3]), True)
    """
    with scoring_pass(model, mode=mode, autocast=autocast):
        return model(*inputs)


@contextmanager
def scoring_pass(model: nn.Module, *, mode: str = "eval", autocast: torch.dtype | None = None) -> Iterator[None]:
    """Inside, forwards of `model` compute scores; afterwards, also after an exception, everything is as before.

    mode: "eval" runs every module in evaluation mode. "train" leaves each module the flag it has, so a BatchNorm frozen
        in evaluation mode stays frozen: the forward sees batch statistics and dropout as the training step does.
    autocast: torch.bfloat16 or torch.float16 on the device of the model; None keeps the caller's context.

    Restored bit for bit: every module's training flag; every buffer, its values and the tensor it is (BatchNorm and
    InstanceNorm statistics, power iterations of spectral_norm, counters, queues, lazily registered ones); the random
    streams of torch on the CPU and on every initialised CUDA or XPU device, of Python's random, and of NumPy's when
    imported. Gradients, the gradient mode, inference mode and the autocast cache of the caller are untouched; results
    are ordinary tensors even under the caller's inference_mode. No host synchronisation.

    Cost above the forward: in evaluation mode a few flags and host random states; in training mode one copy of the
    buffers each way. Hooks of the model run. Plain Python attributes that a forward changes are not known here.

    Raises ValueError (unknown mode; "train" with no module in training mode), TypeError (autocast), RuntimeError (lazy
    parameters that a forward would initialise; a forward that writes in place to a parameter, or to a buffer above 2^20
    elements outside training mode: those are not copied).
    """
    require_choice("mode", mode, MODES)
    check_autocast(autocast)
    modules = list(model.modules())
    if mode == "train" and not any(module.training for module in modules):
        raise ValueError(
            'mode="train" scores as the training step runs, but the model is in eval mode: call model.train()'
        )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_autocast(model, autocast))
        stack.enter_context(random_streams_kept())
        stack.enter_context(_flags_kept(modules, evaluate=mode == "eval"))
        stack.enter_context(_tensors_kept(model, modules))
        yield


def check_autocast(dtype: object) -> None:
    """Raise TypeError unless `dtype` is None, torch.bfloat16 or torch.float16."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise TypeError(f"autocast must be None, torch.bfloat16 or torch.float16, got {dtype!r}")


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Restore the global random streams on leaving: torch on the CPU, CUDA, XPU, Python's random, NumPy if imported."""
    generators = [torch.default_generator]
    for backend in (torch.cuda, torch.xpu):
        if backend.is_initialized():
            generators += backend.default_generators
    states = [generator.get_state() for generator in generators]  # of a device too: a copy on the host
    python_state = random.getstate()
    numpy_random = sys.modules.get("numpy.random")
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


@contextmanager
def _autocast(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to `dtype`, and no autocast cache: a weight cast here has no gradient and must not serve the update."""
    cached = torch.is_autocast_cache_enabled()
    with ExitStack() as stack:
        if dtype is not None:
            tensor = next(chain(model.parameters(), model.buffers()), None)
            stack.enter_context(torch.autocast("cpu" if tensor is None else tensor.device.type, dtype=dtype))
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


@contextmanager
def _flags_kept(modules: list[nn.Module], evaluate: bool) -> Iterator[None]:
    """Set and restore the flags themselves: `train()` and `eval()` may be overridden to do more than that."""
    flags = [module.training for module in modules]
    try:
        if evaluate:
            for module, flag in zip(modules, flags, strict=True):
                if flag:
                    _set_flag(module, False)
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            if module.training != flag:
                _set_flag(module, flag)


def _set_flag(module: nn.Module, flag: bool) -> None:
    attributes = vars(module)
    if "training" in attributes:
        attributes["training"] = flag  # what setattr does in the end, at a tenth of its time
    else:
        module.training = flag  # a scripted module keeps it elsewhere


@contextmanager
def _tensors_kept(model: nn.Module, modules: list[nn.Module]) -> Iterator[None]:
    """Restore the buffers; refuse in-place writes to what is too large to copy."""
    bindings: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    copied: dict[int, Tensor] = {}
    watched: dict[int, Tensor] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                watched[id(parameter)] = parameter
        buffers = dict(module._buffers)
        bindings.append((module, buffers))
        static = type(module) in _STATISTICS
        for buffer in buffers.values():
            if buffer is not None:
                copy = module.training or not (static or type(buffer) in _LAZY or buffer.numel() > _LARGE)
                (copied if copy else watched)[id(buffer)] = buffer
    lazy = {key for key, tensor in (copied | watched).items() if type(tensor) in _LAZY}
    if lazy:
        raise RuntimeError(f"not initialised yet: {', '.join(_names(model, lazy))}; run one forward before scoring")
    # An inference tensor has no version, and cannot be written to in place here.
    versions = {key: tensor._version for key, tensor in watched.items() if not tensor.is_inference()}
    saved = _Copies(copied.values())
    try:
        yield
    finally:
        for module, buffers in bindings:
            _rebind(module._buffers, buffers)
        saved.restore()
    changed = {key for key, version in versions.items() if watched[key]._version != version}
    if changed:
        names = ", ".join(_names(model, changed))
        raise RuntimeError(f"the scoring forward wrote in place to {names}: a scoring pass cannot undo that")


class _Copies:
    """Values of tensors, copied with one kernel for each device and dtype."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        for tensor in tensors:
            if not _expanded(tensor):  # an expanded tensor cannot be written to in place
                self._groups.setdefault((tensor.device, tensor.dtype), []).append((tensor, torch.empty_like(tensor)))
        for pairs in self._groups.values():
            torch._foreach_copy_([copy for _, copy in pairs], [tensor for tensor, _ in pairs])

    def restore(self) -> None:
        for pairs in self._groups.values():
            for tensor, copy in pairs:
                if tensor.shape != copy.shape:
                    tensor.data = copy
            # Through .data: values are those that a graph may have saved, so its version check need not fail.
            torch._foreach_copy_([tensor.data for tensor, _ in pairs], [copy for _, copy in pairs])


def _rebind(now: dict[str, Tensor | None], before: dict[str, Tensor | None]) -> None:
    for name in [name for name, _ in now.items() if name not in before]:  # a scripted module has items only
        del now[name]
    for name, buffer in before.items():
        if name not in now or now[name] is not buffer:
            now[name] = buffer


def _expanded(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _names(model: nn.Module, keys: set[int]) -> list[str]:
    return [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if id(tensor) in keys]
