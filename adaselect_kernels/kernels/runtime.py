"""What every launcher needs: the device context, counters that are zero, and the list of what ships."""

import contextlib
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

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


_NO_CONTEXT = contextlib.nullcontext()


def launch_device(tensor: Tensor):
    """A context in which Triton launches on the tensor's device."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(tensor.device)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


CPU_MULTIPROCESSORS = 4  # the interpreter's: small, so that small shapes reach every path


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


COUNTERS = 8192  # int32 a stream: more than any launch needs
_counters: dict[tuple[int, int], Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """int32 zeros that every launch leaves zero again, so that one buffer serves all launches of a stream in turn.

    Each stream has its own: launches of two streams overlap, those of one never do, whichever threads they come from.
    A CUDA graph gets zeros of its own, set by a node of the graph: a replay may run on any stream beside eager calls.
    """
    assert count <= COUNTERS
    if device.type != "cuda":
        key = (-1, 0)
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    else:
        key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    buffer = _counters.get(key)
    if buffer is None:
        buffer = _counters.setdefault(key, torch.zeros(COUNTERS, dtype=torch.int32, device=device))
    return buffer
