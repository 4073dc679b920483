"""What a call launches, and what it costs in Python, told without a GPU.

A stand-in takes the place of Triton's driver: the launchers of this package run as they do on a GPU (sm_90), on CPU tensors,
through Triton's own dispatch, but nothing is compiled and nothing runs. Outputs stay uninitialised.

    record(lambda: fused_select(logits, targets, 0.3, impl="triton"))     # [Launch(kernel="fused_kernel", grid=(8, 1, 1), ...)]

Launches by PyTorch (a copy, a sort) are not seen, nor, in the cost, what only a CUDA build does: the look-up of the stream,
its caching allocator, and the launch itself inside the driver.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from adaselect_kernels import dispatch, kernels
from adaselect_kernels.kernels import runtime

TARGET = GPUTarget("cuda", 90, 32)
MULTIPROCESSORS = 132  # of an H100 or H200
_DEVICE = -1  # what Triton files the stand-in's kernels under: no real device
_STREAM = 0


class Launch(NamedTuple):
    """One launch of a Triton kernel."""

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    source: (
        Any  # triton.compiler.ASTSource: signature, constants and attributes (divisibility by 16) it was compiled for
    )
    arguments: tuple[Any, ...]  # in the order of the kernel's parameters; constants included


class _Driver:
    """The part of a Triton driver that a launch asks."""

    def get_current_device(self) -> int:
        return _DEVICE

    def get_current_stream(self, device: int) -> int:
        return _STREAM

    def get_current_target(self) -> GPUTarget:
        return TARGET


class _Kernel:
    """Takes the place of a compiled kernel; `log` receives its launches, unless it is None."""

    function = 0
    packed_metadata = ()

    def __init__(self, source: ASTSource, num_warps: int, log: list[Launch] | None) -> None:
        self.source, self.num_warps, self.log = source, num_warps, log
        self.name = source.fn.__name__

    def launch_metadata(self, grid, stream, *arguments) -> None:
        return None

    def run(
        self, x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments
    ) -> None:
        if self.log is not None:
            self.log.append(Launch(self.name, (x, y, z), self.num_warps, self.source, arguments))


@contextmanager
def stand_in(log: list[Launch] | None) -> Iterator[None]:
    """Within it `impl="triton"` serves CPU tensors, and launches are appended to `log`.

    Raises RuntimeError under TRITON_INTERPRET=1, where kernels are not launched through a driver.
    """
    if dispatch.triton_interpreted():
        raise RuntimeError("launches are recorded without TRITON_INTERPRET=1; it is set")
    made: list[JITFunction] = []

    def compile_nothing(self, key, signature, device, constexprs, options, attrs, warmup):
        kernel = _Kernel(ASTSource(self, signature, constexprs, attrs), options.num_warps, log)
        self.device_caches[device][0][key] = kernel
        made.append(self)
        return kernel

    served = {key: dispatch._EAGER.get(key) for key in (("triton", "cpu"), ("auto", "cpu"))}
    config: Any = triton.runtime.driver
    before = config._active, JITFunction._do_compile, runtime.CPU_MULTIPROCESSORS
    config._active, JITFunction._do_compile, runtime.CPU_MULTIPROCESSORS = _Driver(), compile_nothing, MULTIPROCESSORS
    dispatch._EAGER.update(dict.fromkeys(served, kernels))
    runtime.multiprocessors.cache_clear()
    try:
        yield
    finally:
        config._active, JITFunction._do_compile, runtime.CPU_MULTIPROCESSORS = before
        for key, implementation in served.items():
            dispatch._EAGER.pop(key)
            if implementation is not None:
                dispatch._EAGER[key] = implementation
        runtime.multiprocessors.cache_clear()
        for function in made:
            function.device_caches.pop(_DEVICE, None)


def record(call: Callable[[], Any]) -> list[Launch]:
    """The launches of `call`, in order."""
    log: list[Launch] = []
    with stand_in(log):
        call()
    return log


def host_cost(call: Callable[[], Any], calls: int = 500, rounds: int = 15) -> float:
    """Microseconds of Python that `call` takes once it is warm: the best round's mean, as other processes only add to it."""
    with stand_in(None):
        for _ in range(20):
            call()
        best = float("inf")
        collecting = gc.isenabled()
        gc.disable()
        try:
            for _ in range(rounds):
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                best = min(best, time.perf_counter() - start)
        finally:
            if collecting:
                gc.enable()
    return best / calls * 1e6


def cpu_batch(n: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, classes] and targets [n] to record a call with; their values are never read."""
    return torch.zeros(n, classes, dtype=dtype), torch.zeros(n, dtype=torch.int64)
