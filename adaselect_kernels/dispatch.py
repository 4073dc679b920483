"""Which implementation serves a call, and why another cannot.

`impl="auto"` takes the fastest that works on the tensor's device; the environment variable ADASELECT_IMPL overrides it.
An explicit implementation is used or refused with the reasons, never replaced.
"""

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch

from adaselect_kernels import ops, reference

IMPLS = ("auto", "reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "ADASELECT_IMPL"
CUDA_OPERATORS = ("embedding_grad_sq_norms",)  # those with a CUDA C++ kernel


def _load_extension(name: str, what: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"adaselect_kernels.{name}"), ""
    except ImportError as error:
        return None, f"the {what} is missing or does not load: {error}"


# loading them registers the CPU kernels, and torch.ops.adaselect_cuda
EXTENSION, EXTENSION_ERROR = _load_extension("_C", "compiled extension")
CUDA_EXTENSION, CUDA_EXTENSION_ERROR = _load_extension(
    "_cuda", "extension of the CUDA kernels (ADASELECT_CUDA=1 builds it)"
)


def triton_interpreted() -> bool:
    """Triton kernels run on the CPU, interpreted: TRITON_INTERPRET=1 was set before Triton was imported."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]


def unavailable(impl: str, device: torch.device, operator: str | None = None) -> str | None:
    """Why `impl` cannot serve tensors on `device`; None when it can.

    "cuda" serves the operators of CUDA_OPERATORS alone: it is available only to a caller that names one of them.
    """
    if impl == "reference":
        return None
    if impl == "cpu":
        if EXTENSION is None:
            return EXTENSION_ERROR
        return None if device.type == "cpu" else f"it serves cpu tensors, got {device}"
    if impl == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if device.type == "cuda":
            return "TRITON_INTERPRET is set, which serves cpu tensors only" if triton_interpreted() else None
        if device.type != "cpu":
            return f"it serves cuda tensors, got {device}"
        if not triton_interpreted():
            return "it serves cuda tensors, got cpu (set TRITON_INTERPRET=1 before the first import to interpret it)"
        return "the interpreter cannot be traced by torch.compile" if torch.compiler.is_compiling() else None
    if operator not in CUDA_OPERATORS:
        return "no operator of this function has a CUDA C++ kernel: the Triton one is the fastest, use impl='triton'"
    if CUDA_EXTENSION is None:
        return CUDA_EXTENSION_ERROR
    return None if device.type == "cuda" else f"it serves cuda tensors, got {device}"


def resolve(impl: str, device: torch.device, operator: str | None = None) -> Any:
    """The object whose attributes are the operators of ops.py, for `impl` on `device`; for "cuda" only `operator`.

    Raises ValueError for an unknown name, RuntimeError with every reason when an explicit request cannot be served.
    """
    if impl == "auto" and ENVIRONMENT_VARIABLE in os.environ:  # get() raises and catches an error where it is not
        impl = os.environ[ENVIRONMENT_VARIABLE]
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if not traced and (impl, device.type) in _EAGER:
        return _EAGER[impl, device.type]
    chosen = _fastest(device) if impl == "auto" else impl
    if chosen not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}; got {impl!r}")
    reason = unavailable(chosen, device, operator)
    if reason is not None:
        others = "; ".join(
            f"{name}: {unavailable(name, device, operator) or 'available'}" for name in IMPLS[1:] if name != chosen
        )
        raise RuntimeError(f"impl={chosen!r} is not available for {device}: {reason}. Others: {others}")
    if chosen == "reference":
        return reference
    if chosen == "cuda":
        return torch.ops.adaselect_cuda
    if traced:
        return torch.ops.adaselect
    _EAGER[impl, device.type] = EXTENSION if chosen == "cpu" else importlib.import_module("adaselect_kernels.kernels")
    return _EAGER[impl, device.type]


# What eager calls of (impl, device type) run, once checked: a small call is 20 microseconds, the check was five of them.
_EAGER: dict[tuple[str, str], ModuleType | None] = {}


def _fastest(device: torch.device) -> str:
    if device.type == "cpu" and EXTENSION is not None:
        return "cpu"
    if device.type == "cuda" and unavailable("triton", device) is None:
        return "triton"
    return "reference"


__all__ = [
    "CUDA_OPERATORS",
    "ENVIRONMENT_VARIABLE",
    "EXTENSION",
    "EXTENSION_ERROR",
    "IMPLS",
    "ops",
    "resolve",
    "triton_interpreted",
    "unavailable",
]
