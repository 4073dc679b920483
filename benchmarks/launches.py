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
    """The part of a Triton driver that a launch asks; `log` receives the launches, unless it is None."""

    def __init__(self, log: list[Launch] | None) -> None:
        self.log = log

    def get_current_device(self) -> int:
        return _DEVICE

    def get_current_stream(self, device: int) -> int:
        return _STREAM

    def get_current_target(self) -> GPUTarget:
        return TARGET


class _Kernel:
    """Takes the place of a compiled kernel."""

    function = 0
    packed_metadata = ()

    def __init__(self, source: ASTSource, num_warps: int) -> None:
        self.source, self.num_warps = source, num_warps

    def launch_metadata(self, grid, stream, *arguments) -> None:
        return None

    def run(
        self, x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments
    ) -> None:
        log = triton.runtime.driver.active.log  # pyright: ignore[reportAttributeAccessIssue]
        if log is not None:
            log.append(Launch(self.source.fn.__name__, (x, y, z), self.num_warps, self.source, arguments))


def _compile_nothing(self, key, signature, device, constexprs, options, attrs, warmup) -> _Kernel:
    kernel = _Kernel(ASTSource(self, signature, constexprs, attrs), options.num_warps)
    self.device_caches[device][0][key] = kernel
    return kernel


@contextmanager
def stand_in(log: list[Launch] | None) -> Iterator[None]:
    """Within it `impl="triton"` serves CPU tensors, and launches are appended to `log`.

    Raises RuntimeError under TRITON_INTERPRET=1, where kernels are not launched through a driver.
    """
    if dispatch.triton_interpreted():
        raise RuntimeError("launches are recorded without TRITON_INTERPRET=1; it is set")
    served = (("triton", "cpu"), ("auto", "cpu"))
    config: Any = triton.runtime.driver
    before = config._active, JITFunction._do_compile, runtime.CPU_MULTIPROCESSORS, dict(dispatch._EAGER)
    config._active, JITFunction._do_compile, runtime.CPU_MULTIPROCESSORS = (
        _Driver(log),
        _compile_nothing,
        MULTIPROCESSORS,
    )
    dispatch._EAGER.update(dict.fromkeys(served, kernels))
    runtime.multiprocessors.cache_clear()
    try:
        yield
    finally:
        config._active, JITFunction._do_compile, runtime.CPU_MULTIPROCESSORS, eager = before
        dispatch._EAGER.clear()
        dispatch._EAGER.update(eager)
        runtime.multiprocessors.cache_clear()


def record(call: Callable[[], Any]) -> list[Launch]:
    """The launches of `call`, in order, all through Triton's dispatch: tensors among the arguments are the tensors given."""
    log: list[Launch] = []
    direct, runtime.DIRECT = runtime.DIRECT, False
    try:
        with stand_in(log):
            call()
    finally:
        runtime.DIRECT = direct
    return log


def host_cost(call: Callable[[], Any], calls: int = 500, rounds: int = 15) -> float:
    """Microseconds of this thread's CPU time that `call` takes once it is warm: the mean of the best round."""
    with stand_in(None):
        for _ in range(20):
            call()
        best = float("inf")
        collecting = gc.isenabled()
        gc.disable()
        try:
            for _ in range(rounds):
                start = time.thread_time()
                for _ in range(calls):
                    call()
                best = min(best, time.thread_time() - start)
        finally:
            if collecting:
                gc.enable()
    return best / calls * 1e6


def cpu_batch(n: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, classes] and targets [n] to record a call with; their values are never read."""
    return torch.zeros(n, classes, dtype=dtype), torch.zeros(n, dtype=torch.int64)
