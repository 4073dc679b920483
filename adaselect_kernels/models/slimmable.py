"""Slimmable networks (Yu et al. 2019): one set of weights, several widths; DynaMS's parameter-sharing proxy (PSP).

A layer at width w uses the first floor(w n + 0.5) of its n channels: the weights W[:out, :in]. The first layer keeps all its
inputs, the last one all its outputs, and there is one BatchNorm for each width, since its statistics differ. Which width
runs is a plain attribute of the layers, set by `use_width`: nothing of it is in a state_dict.
"""

import copy
import itertools
import math
import numbers
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaselect_kernels.models.resnet import ResNet18

WIDTHS = (1.0, 0.25)


def slim_channels(channels: int, width: float) -> int:
    """floor(width channels + 0.5). Raises ValueError when that is zero."""
    slim = math.floor(width * channels + 0.5)
    if slim < 1:
        raise ValueError(f"width {width:g} gives zero of {channels} channels")
    return slim


def check_widths(widths: Sequence[float]) -> tuple[float, ...]:
    """Return `widths` as a tuple: 1.0 first, then smaller ones in (0, 1), largest first. Raises TypeError, ValueError."""
    if isinstance(widths, str) or not isinstance(widths, (tuple, list)):
        raise TypeError(f"widths must be a tuple or list of numbers, got {widths!r}")
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, numbers.Real):
            raise TypeError(f"widths must be numbers, got {width!r}")
    checked = tuple(float(width) for width in widths)
    falling = all(a > b for a, b in itertools.pairwise(checked))
    if len(checked) < 2 or checked[0] != 1.0 or not falling or not checked[-1] > 0.0:
        raise ValueError(f"widths must be 1.0 and then smaller ones above 0, largest first, got {tuple(widths)!r}")
    return checked


class _Slimmable:
    """What the layers share: their widths and the one that runs. `width` is set by `use_width`."""

    widths: tuple[float, ...]
    width: float = 1.0


class SlimmableLinear(_Slimmable, nn.Linear):
    """nn.Linear that at width w computes x W[:out, :in]^T + b[:out].

    widths: 1.0 and the smaller ones. slim_in, slim_out: whether inputs and outputs become fewer; the first layer of a
    network keeps all inputs, the last one all outputs.
    positions: features of one input channel, next to each other: height x width of what was flattened. The slim input
    is then the first slim channels with all their positions. Must divide in_features.
    `active_weight` is the part of the weight that the width in force uses. At full width this is nn.Linear itself.

    Raises ValueError (a width that gives zero channels, positions), TypeError.

    >>> layer = SlimmableLinear(8, 4, widths=(1.0, 0.25))
    >>> with use_width(layer, 0.25):
    ...     layer(torch.zeros(1, 2)).shape
    torch.Size([1, 1])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        widths: Sequence[float] = WIDTHS,
        slim_in: bool = True,
        slim_out: bool = True,
        positions: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        checked = check_widths(widths)
        if positions < 1 or in_features % positions:
            raise ValueError(f"positions must divide in_features = {in_features}, got {positions}")
        name = f"Linear({in_features}, {out_features})"
        channels = in_features // positions
        sizes = {
            w: (_part(channels, w, slim_in, name) * positions, _part(out_features, w, slim_out, name)) for w in checked
        }
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.widths, self._sizes = checked, sizes
        self.slim_in, self.slim_out, self.positions = slim_in, slim_out, positions

    @property
    def active_weight(self) -> Tensor:
        """[out, in] view of the weight at the width in force."""
        inputs, outputs = self._sizes[self.width]
        return self.weight[:outputs, :inputs]

    def forward(self, input: Tensor) -> Tensor:
        if self.width == 1.0:
            return super().forward(input)
        weight = self.active_weight
        return F.linear(input, weight, None if self.bias is None else self.bias[: weight.shape[0]])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, widths={self.widths}"


class SlimmableConv2d(_Slimmable, nn.Conv2d):
    """nn.Conv2d that at width w convolves with W[:out, :in], as `SlimmableLinear`.

    With groups the slim layer has the first groups only, whole: a depthwise convolution the filters of the first
    channels. Both channel counts at every width must therefore be the same number of whole groups; anything else, and
    groups in a layer that keeps all inputs or all outputs, is refused (ValueError).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        widths: Sequence[float] = WIDTHS,
        slim_in: bool = True,
        slim_out: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        checked = check_widths(widths)
        name = f"Conv2d({in_channels}, {out_channels}{'' if groups == 1 else f', groups={groups}'})"
        sizes = {w: (_part(in_channels, w, slim_in, name), _part(out_channels, w, slim_out, name)) for w in checked}
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )  # fmt: skip
        if groups > 1 and not (slim_in and slim_out):
            raise ValueError(f"{name}: groups in a layer that keeps all its inputs or outputs cannot be slim")
        for width, (inputs, outputs) in sizes.items():
            whole = inputs * groups % in_channels == 0 and inputs * out_channels == outputs * in_channels
            if groups > 1 and not whole:
                raise ValueError(
                    f"{name}: width {width:g} gives {inputs} inputs and {outputs} outputs, not whole groups of"
                    f" {in_channels // groups} and {out_channels // groups}"
                )
        self.widths, self._sizes = checked, sizes
        self.slim_in, self.slim_out = slim_in, slim_out

    def forward(self, input: Tensor) -> Tensor:
        if self.width == 1.0:
            return super().forward(input)
        inputs, outputs = self._sizes[self.width]
        groups = self.groups if self.groups == 1 else self.groups * inputs // self.in_channels
        weight = self.weight[:outputs, : inputs // groups]
        bias = None if self.bias is None else self.bias[:outputs]
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, widths={self.widths}"


class SlimmableBatchNorm2d(_Slimmable, nn.BatchNorm2d):
    """nn.BatchNorm2d at full width, and one nn.BatchNorm2d of its own in `slim` for each smaller width.

    slim_features: False when the input keeps all its channels at every width (before the first layer, after the last).
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        widths: Sequence[float] = WIDTHS,
        slim_features: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        checked = check_widths(widths)
        name = f"BatchNorm2d({num_features})"
        sizes = [_part(num_features, width, slim_features, name) for width in checked[1:]]
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.widths, self.slim_features = checked, slim_features
        make = partial(
            nn.BatchNorm2d, eps=eps, momentum=momentum, affine=affine, track_running_stats=track_running_stats
        )
        self.slim = nn.ModuleList(make(size, device=device, dtype=dtype) for size in sizes)

    def forward(self, input: Tensor) -> Tensor:
        if self.width == 1.0:
            return super().forward(input)
        return self.slim[self.widths.index(self.width) - 1](input)


def slimmable_resnet18(
    classes: int = 10, widths: Sequence[float] = WIDTHS, width: int = 64, channels: int = 3
) -> ResNet18:
    """`resnet18` with batch normalisation whose layers are slimmable; at full width its state_dict has the same names.

    Raises ValueError for a width that gives zero channels.
    """
    conv = partial(SlimmableConv2d, bias=False, widths=widths)
    return ResNet18(
        classes,
        width,
        channels,
        partial(conv, slim_in=False),
        conv,
        partial(SlimmableBatchNorm2d, widths=widths),
        partial(SlimmableLinear, widths=widths, slim_out=False),
    )


def widths_of(model: nn.Module) -> tuple[float, ...]:
    """The widths of a slimmable model. Raises ValueError when it has no slimmable layer, or layers that disagree."""
    found = {layer.widths for layer in _layers(model)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no slimmable layer: see slimmable_resnet18, make_slimmable")
    if len(found) > 1:
        raise ValueError(f"the slimmable layers have different widths: {sorted(found)}")
    return found.pop()


@contextmanager
def use_width(model: nn.Module, width: float) -> Iterator[None]:
    """Inside, forwards of `model` run at `width`; afterwards, also after an exception, at the width as it was.

    Raises ValueError when `width` is not one of the model's, or the model is not slimmable.
    """
    widths = widths_of(model)
    if width not in widths:
        raise ValueError(f"width must be one of {widths}, got {width!r}")
    layers = _layers(model)
    before = [layer.width for layer in layers]
    try:
        for layer in layers:
            layer.width = float(width)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.width = old


def joint_backward(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inplace_distill: bool = False,
    *,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> dict[float, Tensor]:
    """Forward, loss and backward at every width of the model, full width first; gradients accumulate.

    The caller steps the optimizer once: that step then follows the sum of the losses.
    loss_fn: `loss_fn(model(inputs), targets)`, a scalar.
    inplace_distill: smaller widths learn from the full one instead of the targets: the mean cross-entropy of their logits
        [N, C] with softmax(full logits), detached (Yu & Huang 2019).
    scale: applied to every loss before its backward: `GradScaler.scale`, or a division by accumulation steps.
    Forwards run in the caller's autocast context, backwards outside it.

    Returns {width: loss []}, detached and unscaled. Raises ValueError when the model is not slimmable.

    >>> hidden, head = SlimmableLinear(2, 4, slim_in=False), SlimmableLinear(4, 3, slim_out=False)
    >>> model = nn.Sequential(hidden, nn.ReLU(), head)
    >>> losses = joint_backward(model, torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64), nn.functional.cross_entropy)
    >>> list(losses), model[0].weight.grad.shape
    ([1.0, 0.25], torch.Size([4, 2]))
    """
    losses: dict[float, Tensor] = {}
    teacher: Tensor | None = None
    for width in widths_of(model):
        with use_width(model, width):
            outputs = model(inputs)
            if teacher is None:
                loss = loss_fn(outputs, targets)
            else:
                loss = F.cross_entropy(_accurate(outputs), teacher)
            if inplace_distill and width == 1.0:
                teacher = _accurate(outputs.detach()).softmax(1)
            with torch.autocast(loss.device.type, enabled=False):
                (loss if scale is None else scale(loss)).backward()  # inside: a checkpointed layer runs again here
        losses[width] = loss.detach()
    return losses


def slim_cost(
    model: nn.Module,
    batch: Any,
    width: float,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    repeats: int = 5,
) -> float:
    """rho: measured time of a forward at `width` over one at full width, both in eval mode without gradients.

    batch: inputs, or a pair (inputs, targets), or anything that `forward(model, batch)` takes.
    The fastest of `repeats` forwards of each, run alternately after one of each, on a copy of the model: what else the
    machine does must not count. The model and torch's random streams are as before.
    PSP saves arithmetic only if Q keep < (1 - rho) / (3 rho).
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats must be an int of at least 1, got {repeats!r}")
    seconds: dict[float, list[float]] = {1.0: [], float(width): []}
    with _trial(model, batch, width, forward) as run:
        for _ in range(repeats + 1):
            for w, times in seconds.items():
                start = time.perf_counter()
                run(w)
                times.append(time.perf_counter() - start)
    return min(seconds[float(width)][1:]) / min(seconds[1.0][1:])


def slim_flops_ratio(
    model: nn.Module, batch: Any, width: float, forward: Callable[[nn.Module, Any], Any] | None = None
) -> float:
    """Multiply-adds of a forward at `width` over those at full width, of matrix products and convolutions; as `slim_cost`."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    with _trial(model, batch, width, forward) as run:
        for w in (float(width), 1.0):
            with FlopCounterMode(display=False) as counter:
                run(w)
            counts.append(counter.get_total_flops())
    if counts[1] == 0:
        raise ValueError("the forward has no matrix product or convolution whose operations could be counted")
    return counts[0] / counts[1]


@contextmanager
def _trial(
    model: nn.Module, batch: Any, width: float, forward: Callable[[nn.Module, Any], Any] | None
) -> Iterator[Callable[[float], None]]:
    """A function that runs one forward of a copy at a width, and waits for it."""
    if width not in widths_of(model):
        raise ValueError(f"width must be one of {widths_of(model)}, got {width!r}")
    trial = copy.deepcopy(model).eval()
    tensor = next(trial.parameters())
    inputs = batch[0] if forward is None and isinstance(batch, (tuple, list)) else batch

    def run(w: float) -> None:
        with use_width(trial, w):
            trial(inputs) if forward is None else forward(trial, batch)
        if tensor.device.type != "cpu":
            torch.accelerator.synchronize()

    devices = [tensor.device] if tensor.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        yield run


def _accurate(outputs: Tensor) -> Tensor:
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _Slimmable)]


def _part(channels: int, width: float, slim: bool, name: str) -> int:
    try:
        return slim_channels(channels, width) if slim else channels
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
