"""Nodes of autograd that a use adds to the graph, without changing a gradient of the model."""

from collections.abc import Callable

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
