"""The models that norms are measured on, as every contender can take them: no tied weights, no in-place operations."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


class Residual(nn.Module):
    """Two 3 x 3 convolutions with group normalisation, and a 1 x 1 convolution on the skip where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, outer), nn.GroupNorm(8, outer)
        changes = stride != 1 or inner != outer
        skip = [nn.Conv2d(inner, outer, 1, stride, bias=False), nn.GroupNorm(8, outer)] if changes else []
        self.skip = nn.Sequential(*skip)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.skip(x))


def resnet18(width: int = 64, blocks: int = 2) -> nn.Module:
    """ResNet-18 for 32 x 32 images, group normalisation in place of batch normalisation."""
    layers, inner = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU()], width
    for stage in range(4):
        for block in range(blocks):
            outer = width << stage
            layers.append(Residual(inner, outer, 2 if stage > 0 and block == 0 else 1))
            inner = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, CLASSES))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.rise, self.fall = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (
            z.view(n, t, self.heads, d // self.heads).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, d))
        return x + self.fall(F.gelu(self.rise(self.norm2(x))))


class Transformer(nn.Module):
    """A causal language model; its positions are ids [N, T] a sample, the form that all contenders accept."""

    def __init__(self, vocabulary: int, d: int, depth: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.blocks = nn.Sequential(*(Block(d, max(1, d // 64)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.ones_like(ids).cumsum(1) - 1  # contiguous: Opacus takes a view
        return self.head(self.norm(self.blocks(self.token(ids) + self.position(positions))))


class Task(NamedTuple):
    """A model in training mode and a batch; the loss is the sum over samples and positions."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    autocast: bool = False

    def loss(self, model: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.autocast):
            logits = model(inputs)
        logits = logits.float() if self.autocast else logits
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")

    def first(self, n: int) -> "Task":
        return self._replace(inputs=self.inputs[:n], targets=self.targets[:n])


def image_task(n: int, width: int, blocks: int, size: int, device: torch.device) -> Task:
    """Random images and classes."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(n, 3, size, size), torch.randint(CLASSES, (n,))
    return Task(resnet18(width, blocks).to(device), inputs.to(device), targets.to(device))


def text_task(n: int, length: int, d: int, depth: int, vocabulary: int, autocast: bool, device: torch.device) -> Task:
    """Random tokens, the next one to be predicted."""
    torch.manual_seed(0)
    tokens = torch.randint(vocabulary, (n, length + 1))
    model = Transformer(vocabulary, d, depth, length)
    return Task(
        model.to(device), tokens[:, :-1].contiguous().to(device), tokens[:, 1:].contiguous().to(device), autocast
    )


def one_backward_a_sample(task: Task, dtype: torch.dtype) -> Tensor:
    """[n] float64 norms by one forward and backward a sample, on a copy of the model in `dtype`; in float64 not autocast."""
    model, norms = copy.deepcopy(task.model).to(dtype), []
    if dtype == torch.float64:
        task = task._replace(autocast=False)
    for x, y in zip(task.inputs.split(1), task.targets.split(1), strict=True):
        model.zero_grad(set_to_none=True)
        task.loss(model, x.to(dtype) if x.is_floating_point() else x, y).backward()
        norms.append(norm_of_gradients(model))
    return torch.stack(norms)


def norm_of_gradients(model: nn.Module) -> Tensor:
    """[] float64."""
    return torch.stack([p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
