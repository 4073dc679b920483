"""ResNet-18 (He et al. 2016) for 32x32 images: a 3x3 stem with stride 1 and no max-pool, then eight residual blocks."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from adaselect_kernels.options import require_choice

NORMS = ("batch", "group")

Conv = Callable[..., nn.Module]  # (inputs, outputs, kernel, stride=, padding=), without bias
Norm = Callable[[int], nn.Module]
Linear = Callable[[int, int], nn.Module]


def resnet18(classes: int = 10, width: int = 64, norm: str = "batch", channels: int = 3) -> "ResNet18":
    """A ResNet-18 that takes images [N, channels, 32, 32] (any size from 8 up) and gives logits [N, classes].

    width: channels of the first stage; the four stages have 1, 2, 4 and 8 times as many.
    norm: "batch", or "group": GroupNorm with 8 groups (the largest divisor of both where 8 does not divide), which does
        not mix samples, as per-sample gradient norms need.
    With the defaults it has 11,173,962 parameters. Raises ValueError (norm, a size below 1) or TypeError.

    >>> resnet18(width=8)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    require_choice("norm", norm, NORMS)
    normalise: Norm = nn.BatchNorm2d if norm == "batch" else lambda n: nn.GroupNorm(math.gcd(8, n), n)
    return ResNet18(classes, width, channels, _conv, _conv, normalise, nn.Linear)


class ResNet18(nn.Module):
    """The network, from the layers that the factories make; `stem` makes the first convolution, `linear` the head."""

    def __init__(
        self, classes: int, width: int, channels: int, stem: Conv, conv: Conv, norm: Norm, linear: Linear
    ) -> None:
        for name, value in (("classes", classes), ("width", width), ("channels", channels)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        super().__init__()
        self.conv = stem(channels, width, 3, stride=1, padding=1)
        self.norm = norm(width)
        blocks, inner = [], width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(BasicBlock(inner, width << stage, stride, conv, norm))
                inner = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = linear(inner, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.norm(self.conv(images))))
        return self.head(features.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a 1x1 convolution on the skip where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int, conv: Conv, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inner, outer, 3, stride=stride, padding=1), norm(outer)
        self.conv2, self.norm2 = conv(outer, outer, 3, stride=1, padding=1), norm(outer)
        self.skip = nn.Sequential()
        if stride != 1 or inner != outer:
            self.skip = nn.Sequential(conv(inner, outer, 1, stride=stride, padding=0), norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.skip(x))


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int, padding: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
