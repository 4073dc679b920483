"""A sequential network made slimmable: what is kept, what is sliced, and what is refused, by position."""

import copy
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from adaselect_kernels.models.slimmable import (
    WIDTHS,
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLinear,
    check_widths,
)

# Compared exactly: a subclass may do something else.
_ELEMENTWISE = {
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Threshold),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Dropout, nn.AlphaDropout),
}
_SPATIAL = {
    *(nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.Dropout2d, nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
}
_LAYERS = (nn.Conv2d, nn.Linear)


def make_slimmable(model: nn.Sequential, widths: Sequence[float] = WIDTHS) -> nn.Sequential:
    """A slimmable copy of a sequential network with the same weights and the same output at full width.

    Converted: Conv2d, BatchNorm2d, Linear, in nested Sequentials too. Kept: activations, dropout, pooling, padding and Flatten,
    which work on any number of channels, and a softmax at the end. A Linear after convolutions and Flatten takes the slim
    channels with all their positions. The slim BatchNorms start as the first channels of the full one. Names in the
    state_dict stay, and "slim" ones come with every BatchNorm. Devices, dtypes, training flags and requires_grad stay;
    `model` is not touched, and an optimizer of its parameters does not know those of the copy.

    Raises TypeError (not a Sequential), and ValueError, with the position, for a module that would break at a smaller
    width or that is not known, for modules or parameters used twice, for hooks, and for a width with zero channels.

    >>> model = make_slimmable(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)), widths=(1.0, 0.5))
    >>> model[0].active_weight.shape, model[0].widths
    (torch.Size([8, 2]), (1.0, 0.5))
    """
    if type(model) is not nn.Sequential:
        raise TypeError(f"make_slimmable takes an nn.Sequential, got {type(model).__name__}")
    walk = _Walk(check_widths(widths))
    leaves = list(_leaves(model, ""))
    _check_alone(model, leaves)
    layers = [i for i, (_, module) in enumerate(leaves) if type(module) in _LAYERS]
    if len(layers) < 2:
        raise ValueError(f"a slim part lies between two Conv2d or Linear layers, this model has {len(layers)}")
    converted: dict[str, nn.Module] = {}
    for i, (position, module) in enumerate(leaves):
        try:
            converted[position] = walk.convert(module, first=i <= layers[0], last=i >= layers[-1])
        except ValueError as error:  # noqa: PERF203
            raise ValueError(f"module {position} of the Sequential: {error}") from None
    return _rebuild(model, "", converted)


class _Walk:
    """Converts one module after the other, and knows what the activations are."""

    def __init__(self, widths: tuple[float, ...]) -> None:
        self.widths = widths
        self.last_layer: nn.Conv2d | nn.Linear | None = None
        self.flat = False  # [N, C] for sure: a Flatten or a Linear came

    @property
    def channels(self) -> int | None:
        """Of the activations at full width; None before the first layer."""
        layer = self.last_layer
        return None if layer is None else layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features

    def convert(self, module: nn.Module, first: bool, last: bool) -> nn.Module:
        """first: nothing was slim before; last: nothing is slim after it."""
        kind = type(module)
        known = kind in _ELEMENTWISE or (kind is nn.PReLU and module.num_parameters == 1)
        if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
            made = self._conv(module, first, last)
        elif isinstance(module, nn.Linear) and kind is nn.Linear:
            made = self._linear(module, first, last)
        elif isinstance(module, nn.BatchNorm2d) and kind is nn.BatchNorm2d:
            made = self._norm(module, first or last)
        elif known or kind in _SPATIAL or kind is nn.Flatten or (last and kind in (nn.Softmax, nn.LogSoftmax)):
            if kind in _SPATIAL:
                self._expect_images(kind.__name__)
            if isinstance(module, nn.Flatten):
                if module.start_dim != 1 or module.end_dim not in (-1, 3):
                    raise ValueError(f"{module} does not make [N, C H W] of [N, C, H, W]")
                self.flat = True
            return copy.deepcopy(module)
        else:
            raise ValueError(f"{module} is not known to work with fewer channels")
        return _with_values(made, module)

    def _conv(self, module: nn.Conv2d, first: bool, last: bool) -> nn.Module:
        self._expect_images("Conv2d")
        self._expect_channels("Conv2d", module.in_channels)
        self.last_layer = module
        return SlimmableConv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # pyright: ignore[reportArgumentType]
            module.stride,  # pyright: ignore[reportArgumentType]
            module.padding,  # pyright: ignore[reportArgumentType]
            module.dilation,  # pyright: ignore[reportArgumentType]
            module.groups,
            module.bias is not None,
            module.padding_mode,
            widths=self.widths,
            slim_in=not first,
            slim_out=not last,
            device="meta",
        )

    def _linear(self, module: nn.Linear, first: bool, last: bool) -> nn.Module:
        positions = 1
        if isinstance(self.last_layer, nn.Conv2d):
            if not self.flat:
                raise ValueError("Linear after a convolution without Flatten: its inputs would not be channels")
            positions, rest = divmod(module.in_features, self.last_layer.out_channels)
            if rest:
                raise ValueError(
                    f"Linear takes {module.in_features} features, no multiple of the"
                    f" {self.last_layer.out_channels} channels before"
                )
        else:  # after a Linear, Flatten would put positions before channels
            self._expect_channels("Linear", module.in_features)
        self.last_layer, self.flat = module, True
        return SlimmableLinear(
            module.in_features,
            module.out_features,
            module.bias is not None,
            widths=self.widths,
            slim_in=not first,
            slim_out=not last,
            positions=positions,
            device="meta",
        )

    def _norm(self, module: nn.BatchNorm2d, whole: bool) -> nn.Module:
        self._expect_images("BatchNorm2d")
        self._expect_channels("BatchNorm2d", module.num_features)
        return SlimmableBatchNorm2d(
            *(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats),
            widths=self.widths,
            slim_features=not whole,
            device="meta",
        )

    def _expect_channels(self, name: str, channels: int) -> None:
        if self.channels not in (None, channels):
            raise ValueError(f"{name} takes {channels} channels, the layer before gives {self.channels}")

    def _expect_images(self, name: str) -> None:
        if self.flat:
            raise ValueError(f"{name} after Flatten or Linear")


def _with_values(made: nn.Module, module: nn.Module) -> nn.Module:
    """`made`, which is on the meta device, with copies of the tensors of `module`; its slim parts get the first entries."""
    slim = list(made.slim) if isinstance(made, SlimmableBatchNorm2d) else []
    for part in (made, *slim):
        for name, value in module._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(
                    _first(value.detach(), part._parameters[name]), value.requires_grad
                )
        for name, value in module._buffers.items():
            if value is not None:
                part._buffers[name] = _first(value, part._buffers[name])
    return made.train(module.training)


def _first(value: Tensor, template: Tensor | None) -> Tensor:
    assert template is not None
    return (value if value.ndim == 0 else value[: template.shape[0]]).clone()


def _leaves(model: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, module in _children(model):
        if type(module) is nn.Sequential:
            yield from _leaves(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


def _rebuild(model: nn.Sequential, prefix: str, converted: dict[str, nn.Module]) -> nn.Sequential:
    rebuilt = nn.Sequential()
    for name, module in _children(model):
        new = converted.get(prefix + name)
        if new is None:
            assert isinstance(module, nn.Sequential)
            new = _rebuild(module, f"{prefix}{name}.", converted)
        rebuilt.add_module(name, new)
    rebuilt.training = model.training
    return rebuilt


def _children(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """As named_children, which leaves out a module that it has seen."""
    return [(name, module) for name, module in model._modules.items() if module is not None]


def _check_alone(model: nn.Sequential, leaves: list[tuple[str, nn.Module]]) -> None:
    """Raise ValueError for hooks, which a copy would lose, and for modules and parameters at two positions."""
    for position, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            raise ValueError(f"module {position or 'itself'} of the Sequential has hooks, which its copy would lose")
    seen: dict[int, str] = {}
    for position, module in leaves:
        for thing in (module, *module.parameters()):
            if id(thing) in seen:
                raise ValueError(f"module {position} of the Sequential shares what module {seen[id(thing)]} has")
            seen[id(thing)] = position
