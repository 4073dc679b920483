"""What a torch function does with its arguments, by its name."""

import functools
import types
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels.grad_norms import rules

TENSOR_PROPERTIES = {"T", "mT", "H", "mH", "data", "real", "imag"}
# Their results are elements of the parameter, each at most once: the gradient has the same norm there.
SELECTIONS = {
    *("t", "T", "mT", "transpose", "permute", "movedim", "swapaxes", "view", "reshape", "flatten", "unflatten"),
    *("squeeze", "unsqueeze", "contiguous", "view_as", "reshape_as", "narrow", "select", "split", "chunk", "unbind"),
}


# How the recorder takes a function: it is followed, it is not (a property that holds no values), or there is more to ask.
FOLLOWED, PASSED, SPECIAL = range(3)


@functools.lru_cache(maxsize=1024)
def described(func: Any) -> tuple[str, bool, int]:
    """The function's name without marks of operators, whether it writes into its first argument, and how it is taken."""
    name, writes = _canonical(func)
    own = getattr(func, "__name__", "")
    if own == "__set__" or (own == "__get__" and name not in TENSOR_PROPERTIES):
        return name, writes, PASSED
    special = (Tensor.backward, torch.autograd.grad, torch.nn.functional.batch_norm, Tensor.__iter__)
    return name, writes, SPECIAL if func in special else FOLLOWED


def _canonical(func: Any) -> tuple[str, bool]:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return func.__self__.__name__, False
    if name.startswith("__") and name.endswith("__"):
        plain = name.strip("_")
        if plain in rules.ELEMENTWISE:
            return plain, False
        if plain[0] in "ri" and plain[1:] in rules.ELEMENTWISE:
            return plain[1:], plain[0] == "i"
        return name, name == "__setitem__"
    return (name[:-1], True) if name.endswith("_") and name[:-1] else (name, False)


def opened(func: types.FunctionType) -> types.FunctionType | None:
    """A Python function of torch as its own body runs it: without asking for an override of itself."""
    asks = [name for name in func.__globals__ if name.startswith("has_torch_function")]
    if not asks:
        return None
    scope = func.__globals__ | dict.fromkeys(asks, lambda *tensors: False)
    body = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def selects(name: str, args, kwargs) -> bool:
    """Whether the result is elements of the one parameter, each at most once: the gradient has the same norm there."""
    if name == "__getitem__":
        items = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items)
    if name == "embedding" and len(args) > 1:  # of constants, as a table of positions is used
        given = (
            dict(zip(("input", "weight", "padding_idx", "max_norm", "norm_type", "scale"), args, strict=False)) | kwargs
        )
        plain = given.get("padding_idx") is None and not given.get("scale") and not given.get("scale_grad_by_freq")
        with torch._C.DisableTorchFunction():
            return plain and given["input"].unique().numel() == given["input"].numel()
    return name in SELECTIONS


def mean_count(args, kwargs) -> Tensor | int | None:
    """Of cross_entropy or nll_loss: how many terms its mean loss is the mean of."""
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("reduction", "mean") != "mean" or not torch.is_grad_enabled():
        return None
    target = given["target"]
    if target.is_floating_point():  # class probabilities
        return target.numel() // target.shape[1 if target.dim() > 1 else 0]
    with torch._C.DisableTorchFunction(), torch.no_grad():
        kept, weight = target != given.get("ignore_index", -100), given.get("weight")
        return kept.sum() if weight is None else (weight[target.where(kept, 0)] * kept).sum()
