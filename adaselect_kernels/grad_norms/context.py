"""PerSampleGradNorm: the norms of per-sample gradients of any model, from one ordinary backward pass."""

import contextlib
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from adaselect_kernels.grad_norms.gradients import Leaf
from adaselect_kernels.grad_norms.recorder import Recorder
from adaselect_kernels.options import require_choice


class PerSampleGradNorm:
    """Norms of the gradient of every sample's loss, while `with PerSampleGradNorm(model) as norms:` is open.

    n_i = |d l_i / d theta|, theta the trainable parameters, l_i the loss of sample i; the rules are those of METHODS
    (Goodfellow 2015 for linear layers, Rochette et al. 2019 for convolutions), documented in docs/grad_norms.md. Inside, call
    the model, then `loss.backward()`. Exact or refused: every part of every trainable parameter's gradient is accounted
    for, or UnaccountedParameter (a ValueError) names the parameter and the module before a number is given. The model is
    not changed, and neither are its gradients. Compiled models run eagerly inside.

    loss_reduction: the loss that is differentiated is the "sum" of the samples' losses, or their "mean", whose gradients
        are multiplied by the number of terms (of cross_entropy and nll_loss: the targets that are not ignored, or the sum of
        their weights; else N), or a number: the divisor itself.
    parameters: names, parameters or modules that count; None: all trainable ones.
    weight_gradients: "plain": .grad bit for bit as without the context; "fused": those of nn.Linear come from the pass that
        finds their norms, equal up to rounding; "none", the scoring mode: .grad stays untouched, and the arithmetic of the
        weight gradients is saved.
    batchnorm: in training mode "refuse", or "fixed_statistics": the statistics of the batch are constants, also for .grad.
    fallback: operations without a rule "refuse", or "per_sample": are called again, and differentiated, sample by sample.
    sample_ids: [rows] int64, the sample of each row of the inputs, 0 to N - 1, for batches folded to N*T rows.
    sample_dim: the dimension of the inputs that counts samples (rows).

    Memory beyond the backward pass's own: O(N + the largest layer); parameters used more than once keep their layers' inputs
    and output gradients until the last use has its gradient. Raises ValueError or TypeError for what is not accepted.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    >>> with PerSampleGradNorm(model) as norms:
    ...     model(x).sum().backward()
    >>> norms.total()
    tensor([5., 2.])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_reduction: str | float = "sum",
        *,
        parameters: Any = None,
        weight_gradients: str = "plain",
        batchnorm: str = "refuse",
        fallback: str = "refuse",
        sample_ids: Tensor | None = None,
        sample_dim: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(loss_reduction, str):
            require_choice("loss_reduction", loss_reduction, ("sum", "mean"))
        elif isinstance(loss_reduction, bool) or not isinstance(loss_reduction, numbers.Real) or not loss_reduction > 0:
            raise ValueError(f"loss_reduction must be 'sum', 'mean' or a positive number, got {loss_reduction!r}")
        require_choice("weight_gradients", weight_gradients, ("plain", "fused", "none"))
        require_choice("batchnorm", batchnorm, ("refuse", "fixed_statistics"))
        require_choice("fallback", fallback, ("refuse", "per_sample"))
        if isinstance(sample_dim, bool) or not isinstance(sample_dim, int) or sample_dim < 0:
            raise ValueError(f"sample_dim must be an integer of at least 0, got {sample_dim!r}")
        self._model, self._reduction, self._sample_ids = model, loss_reduction, _checked_ids(sample_ids)
        leaves = _leaves(model, parameters)
        self._recorder = Recorder(
            model,
            leaves,
            weight_gradients=weight_gradients,
            batchnorm=batchnorm,
            fallback=fallback,
            sample_dim=sample_dim,
        )
        self._leaves = [leaf for leaf in leaves if leaf.wanted]
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "PerSampleGradNorm":
        self._recorder.open()
        with contextlib.ExitStack() as stack:
            stack.callback(self._model.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True).remove)
            stack.callback(self._recorder.unwatch)
            self._recorder.watch()
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self._recorder)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)
        self._recorder.close()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._recorder.begin((args, kwargs), self._sample_ids)

    def total(self) -> Tensor:
        """[N] norms over all parameters that count: float32, float64 for models that have float64 parameters.

        Raises RuntimeError before a backward pass inside the context.
        """
        return self._norm(self._leaves)

    def by_layer(self) -> dict[str, Tensor]:
        """{name in model.named_modules(): [N] norms over the module's own parameters}; their squares add up to total's."""
        modules: dict[str, list[Leaf]] = {}
        for leaf in self._leaves:
            modules.setdefault(leaf.module_name, []).append(leaf)
        return {name: self._norm(leaves) for name, leaves in modules.items()}

    @property
    def labels(self) -> tuple[str, ...]:
        """What a reader of the norms must know, such as that batch statistics were taken for constants."""
        return tuple(self._recorder.labels)

    def _norm(self, leaves: list[Leaf]) -> Tensor:
        recorder = self._recorder
        if not recorder.finished or recorder.rows is None:
            raise RuntimeError("no norms yet: call the model and loss.backward() inside the context")
        double = any(leaf.parameter.dtype == torch.float64 for leaf in self._leaves)
        device = next((leaf.parameter.device for leaf in self._leaves), torch.device("cpu"))
        parts = [leaf.sq_norms.to(device) for leaf in leaves if leaf.sq_norms is not None]
        if parts:
            total = torch.stack(parts).sum(0, dtype=torch.float64)
        else:
            total = torch.zeros(recorder.rows.samples, dtype=torch.float64, device=device)
        return (total.sqrt() * self._scale()).to(torch.float64 if double else torch.float32)

    def _scale(self) -> Tensor | float:
        if self._reduction == "sum":
            return 1.0
        if self._reduction != "mean":
            return float(self._reduction)
        recorder = self._recorder
        assert recorder.rows is not None
        if recorder.mean_count is not None:
            return recorder.mean_count
        if recorder.means_seen:
            raise ValueError(
                "loss_reduction='mean' needs the loss to be one mean (times a number), and other terms were added to it:"
                " give the divisor as a number, or sum the losses"
            )
        return float(recorder.rows.samples)


def _checked_ids(sample_ids: Tensor | None) -> Tensor | None:
    if sample_ids is None:
        return None
    if not isinstance(sample_ids, Tensor) or sample_ids.dtype != torch.int64 or sample_ids.dim() != 1:
        got = f"{sample_ids.dtype} {list(sample_ids.shape)}" if isinstance(sample_ids, Tensor) else repr(sample_ids)
        raise TypeError(f"sample_ids must be an int64 tensor [rows], got {got}")
    if len(sample_ids) and int(sample_ids.min()) < 0:
        raise ValueError(f"sample_ids must be at least 0, got {int(sample_ids.min())}")
    return sample_ids


def _leaves(model: nn.Module, parameters: Any) -> list[Leaf]:
    """Every trainable parameter, each once, under the first name it has."""
    found: dict[int, Leaf] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in found:
                full = f"{module_name}.{name}" if module_name else name
                found[id(parameter)] = Leaf(full, module_name, module, parameter, parameters is None)
    if parameters is not None:
        _restrict(model, found, parameters)
    if not any(leaf.wanted for leaf in found.values()):
        raise ValueError("the model has no trainable parameter" + ("" if parameters is None else " among parameters"))
    return list(found.values())


def _restrict(model: nn.Module, leaves: dict[int, Leaf], parameters: Any) -> None:
    several = isinstance(parameters, Iterable) and not isinstance(parameters, (str, nn.Module, Tensor))
    items: Iterable[Any] = parameters if several else [parameters]
    modules, named = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    for item in items:
        if isinstance(item, str) and item in named:
            chosen = [named[item]]
        elif isinstance(item, str) and item in modules:
            chosen = list(modules[item].parameters())
        elif isinstance(item, nn.Module):
            chosen = list(item.parameters())
        elif isinstance(item, Tensor):
            chosen = [item]
        else:
            raise ValueError(f"parameters must be names, parameters or modules of the model, got {item!r}")
        mine = [leaves[id(parameter)] for parameter in chosen if id(parameter) in leaves]
        if not mine:
            what = repr(item) if isinstance(item, str) else type(item).__name__
            raise ValueError(f"parameters: {what} is or has no trainable parameter of the model")
        for leaf in mine:
            leaf.wanted = True
