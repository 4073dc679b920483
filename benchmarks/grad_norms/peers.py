"""How each contender finds the norms of a batch: a function of no arguments that leaves nothing but .grad behind.

A library that is not installed raises ImportError, a model that it has no rule for NotImplementedError.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from adaselect_kernels import PerSampleGradNorm
from benchmarks.grad_norms.models import Task, norm_of_gradients

Step = Callable[[], list[Tensor]]  # returns the norms [n], or nothing


def plain(task: Task) -> Step:
    """Forward and backward, no norms: what every other time is held against."""

    def step() -> list[Tensor]:
        task.model.zero_grad(set_to_none=True)
        task.loss(*task[:3]).backward()
        return []

    return step


def ours(task: Task, mode: str) -> Step:
    """mode: of weight_gradients."""

    def step() -> list[Tensor]:
        task.model.zero_grad(set_to_none=True)
        with PerSampleGradNorm(task.model, weight_gradients=mode) as norms:
            task.loss(*task[:3]).backward()
        return [norms.total()]

    return step


def loop(task: Task) -> Step:
    """One forward and backward a sample, as one writes it without a library."""

    def step() -> list[Tensor]:
        norms = []
        for x, y in zip(task.inputs.split(1), task.targets.split(1), strict=True):
            task.model.zero_grad(set_to_none=True)
            task.loss(task.model, x, y).backward()
            norms.append(norm_of_gradients(task.model))
        return [torch.stack(norms)]

    return step


def vmap_grad(task: Task) -> Step:
    """torch.func: vmap of grad, every sample's gradient in memory. Leaves no .grad."""
    parameters = {name: p.detach() for name, p in task.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return task.loss(lambda inputs: functional_call(task.model, parameters, (inputs,)), x[None], y[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))

    def step() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # the only one that vmap does not fall back to a loop over
            found = gradients(parameters, task.inputs, task.targets)
        return [torch.stack([g.flatten(1).float().square().sum(1) for g in found.values()]).sum(0).sqrt()]

    return step


def opacus(task: Task) -> Step:
    """Ghost norms: Opacus' fast gradient clipping up to the norms, without its second backward."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model = GradSampleModuleFastGradientClipping(copy.deepcopy(task.model), loss_reduction="sum", strict=False)

    def step() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        task.loss(model, task.inputs, task.targets).backward()
        return [model.get_norm_sample()]

    return step


def backpack(task: Task) -> Step:
    """BackPACK's squared norms of every parameter."""
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import BatchL2Grad

    model, loss = copy.deepcopy(task.model), nn.CrossEntropyLoss(reduction="sum")
    extend(model)
    extend(loss)

    def step() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        with extensions(BatchL2Grad()):
            loss(model(task.inputs).flatten(0, -2), task.targets.flatten()).backward()
        squares = [getattr(p, "batch_l2", None) for p in model.parameters()]
        found = [s for s in squares if s is not None]
        if len(found) < len(squares):
            raise NotImplementedError("parameters without a norm")
        return [torch.stack(found).sum(0).sqrt()]

    return step


OURS = {"ours": "plain", "ours_fused": "fused", "ours_none": "none"}
PEERS: dict[str, Callable[[Task], Step]] = {"loop": loop, "vmap": vmap_grad}
OPTIONAL: dict[str, Callable[[Task], Step]] = {"opacus": opacus, "backpack": backpack}
