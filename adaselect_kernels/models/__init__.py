"""Models: a ResNet-18 for 32x32 images, a small GPT, and slimmable networks that hold a thinner copy of themselves."""

from adaselect_kernels.models.convert import make_slimmable
from adaselect_kernels.models.gpt import GPT
from adaselect_kernels.models.resnet import ResNet18, resnet18
from adaselect_kernels.models.slimmable import (
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLinear,
    joint_backward,
    slim_cost,
    slim_flops_ratio,
    slimmable_resnet18,
    use_width,
    widths_of,
)

__all__ = [
    "GPT",
    "ResNet18",
    "SlimmableBatchNorm2d",
    "SlimmableConv2d",
    "SlimmableLinear",
    "joint_backward",
    "make_slimmable",
    "resnet18",
    "slim_cost",
    "slim_flops_ratio",
    "slimmable_resnet18",
    "use_width",
    "widths_of",
]
