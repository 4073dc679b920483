"""Nodes of autograd that a use adds to the graph, without changing a gradient of the model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Keep(torch.autograd.Function):
    """A node that is in no loss's graph and keeps tensors through the saved-tensor hooks: checkpointing may drop them."""

    @staticmethod
    def forward(ctx, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx, *grads):
        raise AssertionError("no loss depends on it")


class Held:
    """Tensors for the backward pass where no hook packs what autograd saves; written to in between they are refused, as there."""

    __slots__ = ("_tensors", "_versions")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._versions = tuple(tensors), [tensor._version for tensor in tensors]

    def tensors(self) -> tuple[Tensor, ...]:
        for tensor, version in zip(self._tensors, self._versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: the input"
                    f" {list(tensor.shape)} of a call with parameters is at version {tensor._version}, expected {version}"
                )
        return self._tensors


class Packed:
    """Tensors for the backward pass as the hooks on saved tensors have packed them."""

    __slots__ = ("_output",)

    def __init__(self, anchor: Tensor, tensors: Sequence[Tensor]) -> None:
        with torch._C.DisableTorchFunction(), torch.enable_grad():
            self._output = Keep.apply(anchor, *tensors)

    def tensors(self) -> tuple[Tensor, ...]:
        return self._output.grad_fn.saved_tensors  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


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


def seen_through(tensor: Tensor, base: Tensor) -> Callable[[Tensor], Tensor]:
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
