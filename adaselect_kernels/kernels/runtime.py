"""What every launcher needs: launches prepared once, the device context, counters that are zero, and the list of what ships."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache, reduce
from operator import or_
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
WARP_SIZE = 64 if torch.version.hip else 32


class Compilation(NamedTuple):
    """One shipped configuration of a kernel: what an ahead-of-time compilation needs to know of its launch."""

    name: str
    kernel: Any  # triton.JITFunction
    pointers: dict[str, str]  # element types, as Triton writes them; allocations are 16-byte aligned
    constexprs: dict[str, Any]
    num_warps: int
    ones: tuple[str, ...] = ()  # integers that are 1, which Triton turns into constants
    multiples: tuple[str, ...] = ()  # integers that are multiples of 16, which Triton specialises on
    load_bits: int = 0  # the widest global load it must have, where that is what makes it fast
    descriptors: Mapping[str, str] = MappingProxyType({})  # of tensor descriptors: type and block, "bf16[128, 64]"


# Versions whose compiled kernels were seen to be called alike, on NVIDIA (on AMD Triton also specialises on the size of a
# tensor). Everywhere else, and in the interpreter, every launch goes through Triton's own dispatch.
DIRECT = (
    (3, 6) <= TRITON_VERSION <= (3, 9) and not torch.version.hip and not knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]
)


_NO_METADATA_NOR_HOOKS = (None, None, None)


class Launch:
    """A launch of which only the tensors and the options are open; call it with them.

    The kernel's parameters are, in this order: the tensors; the `integers`; options, annotated tl.int64 and in
    do_not_specialize; constants. The first call goes through Triton's dispatch, which looks at every argument; later ones
    with tensors of the same types on the same devices go straight to the kernel it compiled. That is right because all that
    Triton specialises on is fixed (every integer, every constant) or looked at: a tensor that is not 16-byte aligned, or a
    profiler's hook, takes Triton's dispatch. The launch is on the tensors' device, which must be current.
    `direct` False: every call takes Triton's dispatch, which is what turns a tensor descriptor into what a kernel is given.
    """

    __slots__ = ("_compiled", "_n_options", "_tail", "constants", "direct", "grid", "integers", "kernel", "num_warps")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        integers: tuple[int, ...],
        constants: Mapping[str, Any],
        num_warps: int,
        direct: bool = True,
    ) -> None:
        self.kernel, self.integers, self.constants, self.num_warps = kernel, integers, dict(constants), num_warps
        self.direct = direct
        self.grid = grid + (1,) * (3 - len(grid))
        self._tail = tuple(self.constants[name] for name in kernel.arg_names[-len(self.constants) :])
        self._compiled: dict[Any, tuple[Any, Any, Any, Any]] = {}
        # an interpreted kernel has no parameters to look at, and is never launched directly
        options = [parameter for parameter in getattr(kernel, "params", ()) if parameter.annotation == "i64"]
        if not all(option.do_not_specialize for option in options):
            raise TypeError(f"{kernel.fn.__name__} specialises on an option: {[option.name for option in options]}")
        self._n_options = len(options)

    def __call__(self, *tensors: Any, options: tuple[int, ...] = ()) -> None:
        if not DIRECT or not self.direct:
            self._dispatch(tensors, options)
            return
        devices = [tensor.get_device() for tensor in tensors]
        pointers = [tensor.data_ptr() for tensor in tensors]
        key = (len(options) == self._n_options, *devices, *[tensor.dtype for tensor in tensors])
        aligned = reduce(or_, pointers) % 16 == 0
        if key in self._compiled and aligned and not _observed():
            run, function, metadata, _ = self._compiled[key]
            stream = triton.runtime.driver.active.get_current_stream(devices[0])
            arguments = (*pointers, *self.integers, *options, *self._tail)
            run(*self.grid, stream, function, metadata, *_NO_METADATA_NOR_HOOKS, *arguments)
            return
        compiled = self._dispatch(tensors, options)
        if compiled is not None and aligned:
            # the kernel too: it unloads its function when nothing holds it any more
            self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled

    def _dispatch(self, tensors: tuple[Any, ...], options: tuple[int, ...]) -> Any:
        return self.kernel[self.grid](
            *tensors, *self.integers, *options, **self.constants, num_warps=self.num_warps, enable_fp_fusion=True
        )


def _observed() -> bool:
    """Whether a profiler waits for launches: it is told of those that Triton dispatches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


PLANS = 1024  # shapes and options remembered a launcher: a training loop has a few
_caches: list[Any] = []
_Function = TypeVar("_Function", bound=Callable[..., Any])


def cached(function: _Function) -> _Function:
    """Remember what a launcher works out from shapes, strides, types and options alone."""
    _caches.append(lru_cache(maxsize=PLANS)(function))
    return _caches[-1]


def forget() -> None:
    """Forget all of it: a table it was worked out from has changed."""
    for cache in _caches:
        cache.cache_clear()


_NO_CONTEXT = contextlib.nullcontext()


def launch_device(tensor: Tensor):
    """A context in which Triton launches on the tensor's device."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(tensor.device)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


_Entry = TypeVar("_Entry")


def up_to(table: Mapping[int, _Entry], size: int) -> _Entry:
    """The entry of the smallest key that is at least `size`; ValueError beyond the last."""
    return table[min(key for key in table if key >= size)]


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


CPU_MULTIPROCESSORS = 4  # the interpreter's: small, so that small shapes reach every path


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


COUNTERS = 32768  # int32 a stream: more than any launch needs
GRAPH_COUNTERS = 1 << 20  # int32 a device for all graphs, 4 MB: a selection from a large batch takes 8464
_SEPARATE = 32  # int32 of a cache line: counters of two graphs share none
_counters: dict[tuple[int, int, int], Tensor] = {}
_of_graphs: dict[int, "_Reserve"] = {}
_lock = threading.Lock()


class _Reserve:
    """Zeros dealt out once each and never taken back."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.zeros, self.used = torch.zeros(count, dtype=torch.int32, device=device), 0

    def take(self, count: int) -> Tensor | None:
        with _lock:
            first = self.used
            if first + count > self.zeros.numel():
                return None
            self.used += ceil_div(count, _SEPARATE) * _SEPARATE
        return self.zeros[first : first + count]


def counters(device: torch.device, count: int) -> Tensor:
    """[count] int32 zeros that every launch leaves zero again, so that one buffer serves all launches of a stream in turn.

    Each stream has its own: launches of two streams overlap, those of one never do, whichever threads they come from.
    Each launch captured into a CUDA graph has its own for good, as a replay may run on any stream beside other work; they
    were set to zero before, or, where no launch came before the capture or none are left, are set by a node of the graph.
    """
    assert count <= COUNTERS
    if device.type != "cuda":
        stream = (-1, 0)
    elif torch.cuda.is_current_stream_capturing():
        reserve = _of_graphs.get(device.index)
        zeros = None if reserve is None else reserve.take(count)
        return torch.zeros(count, dtype=torch.int32, device=device) if zeros is None else zeros
    else:
        stream = (device.index, triton.runtime.driver.active.get_current_stream(device.index))
    zeros = _counters.get((*stream, count))
    if zeros is None:
        buffer = _counters.get((*stream, COUNTERS))
        if buffer is None:
            buffer = _counters.setdefault((*stream, COUNTERS), torch.zeros(COUNTERS, dtype=torch.int32, device=device))
        zeros = _counters.setdefault((*stream, count), buffer[:count])
        if device.type == "cuda" and device.index not in _of_graphs:
            reserve = _Reserve(device, GRAPH_COUNTERS)
            torch.cuda.current_stream(device).synchronize()  # once a device: a replay on another stream finds zeros
            _of_graphs.setdefault(device.index, reserve)
    return zeros
