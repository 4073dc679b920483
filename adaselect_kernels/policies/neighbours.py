"""Methods of neighbouring papers that choose after a scoring forward: Selective-Backprop, RHO-LOSS, importance sampling."""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaselect_kernels.draws import draw_keys, draw_with_replacement, empirical_cdf, push_losses, uniform_noise
from adaselect_kernels.functional import (
    SampleStats,
    Selection,
    WeightedSelection,
    per_sample_stats,
    select_topk,
)
from adaselect_kernels.grad_norms.dial import Forward
from adaselect_kernels.ops import rows_of
from adaselect_kernels.options import require_choice
from adaselect_kernels.policies.adaselection import Baseline, GradNorm
from adaselect_kernels.policies.policy import PolicyConfig, Scored
from adaselect_kernels.reference import valid_samples

COUNTS = ("fixed", "random")


@dataclass(frozen=True)
class SelectiveBackpropConfig(PolicyConfig):
    """PolicyConfig, and: beta >= 0, the power (None: 1/gamma - 1); history, R; count, "fixed" or "random"."""

    beta: float | None = None
    history: int = 1024
    count: str = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None:
            if isinstance(self.beta, bool) or not isinstance(self.beta, numbers.Real):
                raise TypeError(f"beta must be a number or None, got {self.beta!r}")
            if not 0.0 <= self.beta < math.inf:
                raise ValueError(f"beta must be finite and at least 0, got {self.beta!r}")
        if isinstance(self.history, bool) or not isinstance(self.history, int):
            raise TypeError(f"history must be an int, got {self.history!r}")
        if self.history < 1:
            raise ValueError(f"history must be at least 1, got {self.history}")
        require_choice("count", self.count, COUNTS)

    @property
    def power(self) -> float:
        return 1.0 / float(self.gamma) - 1.0 if self.beta is None else float(self.beta)


class SelectiveBackprop(Baseline):
    """Keeps row i with probability CDF(l_i)^beta (Jiang et al. 2019, arXiv 1910.00762).

    CDF(l) is the share, at most l, of the last `history` valid losses before this batch; 1 while there are none. `beta`
    None is 1/gamma - 1: where CDF(l) is uniform on (0, 1), E CDF^beta = 1 / (1 + beta) = gamma is the share kept.

    count="fixed": exactly k rows, drawn without replacement with weights CDF^beta; the scores are the keys
        beta log CDF(l_i) - log E_i that rank them. Rows of weight 0 only when fewer than k others are valid.
    count="random": the paper's independent coins; the number of rows varies, may be 0, and is read from the device. The
        scores are the probabilities.
    """

    name: ClassVar[str] = "selective_backprop"
    method: ClassVar[str | None] = "big_loss"
    config_type: ClassVar[type[PolicyConfig]] = SelectiveBackpropConfig
    config: SelectiveBackpropConfig

    def __init__(self, config: SelectiveBackpropConfig, device: torch.device | str | None = None) -> None:
        super().__init__(config, device)
        self.history = torch.full((config.history,), math.nan, device=self.state.device)  # a ring; NaN: no loss yet
        self.seen = torch.zeros((), dtype=torch.int64, device=self.state.device)  # losses pushed so far

    def select(self, logits: Tensor, targets: Tensor) -> Selection:
        return self._draw(super().select(logits, targets))

    def select_from_losses(self, losses: Tensor, grad_norms: Tensor | None = None) -> Selection:
        return self._draw(super().select_from_losses(losses))

    def _draw(self, base: Selection) -> Selection:
        self._follow()
        valid, cdf = base.scores > -math.inf, empirical_cdf(self.history, base.losses)
        push_losses(self.history, self.seen, base.losses, valid)
        step, seed, power = self.state.step - 1, self.state.seed, self.config.power
        if self.config.count == "fixed":
            scores = draw_keys(torch.where(valid, cdf, math.nan), step, seed, power=power)
            indices = select_topk(scores, base.indices.shape[0], order=self.config.order, impl=self.config.impl)
        else:
            chance = torch.where(valid, cdf**power, -math.inf)
            scores = chance.to(torch.float32)
            indices = (uniform_noise(len(chance), step, seed, chance.device) < chance).nonzero()[:, 0]
            indices = _ordered(indices, scores[indices], self.config.order)
        return Selection(indices, scores, base.losses, base.n_valid)

    def _follow(self) -> None:
        """The ring lives where the state does."""
        self.history, self.seen = self.history.to(self.state.device), self.seen.to(self.state.device)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"history": self.history.clone(), "seen": self.seen.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not isinstance(state_dict, Mapping) or not {"history", "seen"} <= set(state_dict):
            raise ValueError(f"not a state of {self.name!r}: the keys 'history' and 'seen' are missing")
        rest = dict(state_dict)
        history, seen = rest.pop("history"), rest.pop("seen")
        for name, value, own in (("history", history, self.history), ("seen", seen, self.seen)):
            if not isinstance(value, Tensor) or value.shape != own.shape or value.dtype != own.dtype:
                raise ValueError(f"corrupt state: {name} must be {own.dtype} of shape {tuple(own.shape)}")
        filled = min(max(int(seen), 0), len(history))
        if (
            int(seen) < 0
            or history.isinf().any()
            or history.isnan()[:filled].any()
            or not history[filled:].isnan().all()
        ):
            raise ValueError(f"corrupt state: history does not hold the last of {int(seen)} losses")
        super().load_state_dict(rest)
        self._follow()
        self.history.copy_(history)
        self.seen.copy_(seen)


class RhoLoss(Baseline):
    """k largest l_i - l_i(reference): learnable, not yet learnt, and not noise (Mindermann et al. 2022, arXiv 2206.07137).

    The reference losses are given to `select` or `select_from_losses`, [N] on the device of the input; or `reference` is a
    model, in evaluation mode, which `score` (and so `SelectedBatches`) runs on every candidate batch. The scores are the
    differences in float32; a row whose reference loss is NaN or infinite is invalid.
    """

    name: ClassVar[str] = "rho_loss"
    method: ClassVar[str | None] = "big_loss"
    objects: ClassVar[tuple[str, ...]] = ("reference",)

    def __init__(
        self, config: PolicyConfig, device: torch.device | str | None = None, reference: nn.Module | None = None
    ) -> None:
        super().__init__(config, device)
        if reference is not None and not isinstance(reference, nn.Module):
            raise TypeError(f"reference must be a model (nn.Module) or None, got {type(reference).__name__}")
        self.reference = reference

    def select(self, logits: Tensor, targets: Tensor, reference_losses: Tensor | None = None) -> Selection:
        if isinstance(logits, Tensor) and logits.dim() in (2, 3):
            _check_reference(reference_losses, logits, rows_of(logits, self.config.unit))
        return self._excess(super().select(logits, targets), reference_losses)

    def select_from_losses(
        self, losses: Tensor, grad_norms: Tensor | None = None, reference_losses: Tensor | None = None
    ) -> Selection:
        if isinstance(losses, Tensor) and losses.dim() == 1:
            _check_reference(reference_losses, losses, losses.shape[0])
        return self._excess(super().select_from_losses(losses), reference_losses)

    def _excess(self, base: Selection, reference_losses: Any) -> Selection:
        excess = base.scores - reference_losses.detach().to(torch.float32)  # of big_loss the score is the loss
        scores = torch.where(excess.isfinite(), excess, -math.inf)
        indices = select_topk(scores, base.indices.shape[0], order=self.config.order, impl=self.config.impl)
        return Selection(indices, scores, base.losses, excess.isfinite().sum())

    def score(self, model: nn.Module, batch: Any, forward: Forward) -> Any:
        """What `forward` gives for the model, with the losses that it gives for the reference model."""
        if self.reference is None:
            raise ValueError("rho_loss needs reference losses: get_policy('rho_loss', gamma, reference=model)")
        if any(module.training for module in self.reference.modules()):
            raise ValueError("the reference model must be in evaluation mode: call reference.eval()")
        result = forward(model, batch)
        with torch.no_grad():
            losses = losses_of(forward(self.reference, batch), self.config)
        return Scored(result, {"reference_losses": losses})


class Importance(GradNorm):
    """k rows drawn with replacement, p_i = g_i / sum g, weights 1 / (N p_i) (Katharopoulos & Fleuret 2018, arXiv 1803.00942).

    The mean over the k rows of weight times loss is an unbiased estimate of the mean loss of the N valid rows (its
    gradient too), up to rows with g_i = 0, which are never drawn: of cross-entropy their loss and gradient are 0. All
    g_i = 0: uniform. Returns a WeightedSelection: indices with repetitions, and `weights` [k]; the scores are g. Invalid
    rows are drawn only when no row is valid, with weight 0. `source`, `layers`, `probes` as "grad_norm" has them.
    """

    name: ClassVar[str] = "importance"
    weighted: ClassVar[bool] = True
    method: ClassVar[str | None] = "grad_norm"

    def select(self, logits: Tensor, targets: Tensor) -> WeightedSelection:
        return self._draw(super().select(logits, targets))

    def select_from_losses(self, losses: Tensor, grad_norms: Tensor | None = None) -> WeightedSelection:
        return self._draw(super().select_from_losses(losses, grad_norms))

    def _draw(self, base: Selection) -> WeightedSelection:
        norms = torch.where(base.scores > -math.inf, base.scores, math.nan)
        rows, chances = draw_with_replacement(norms, base.indices.shape[0], self.state.step - 1, self.state.seed)
        places = _ordered(torch.arange(len(rows), device=rows.device), base.scores[rows], self.config.order)
        weights = torch.where(base.n_valid > 0, 1.0 / (base.n_valid * chances), 0.0).to(torch.float32)
        return WeightedSelection(rows[places], base.scores, base.losses, base.n_valid, weights[places])


def losses_of(result: Any, config: PolicyConfig) -> Tensor:
    """Losses [N] of what a forward gives: (logits, targets), losses, or SampleStats; NaN on ignored rows of the first."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, SampleStats):
        if result.loss is None:
            raise TypeError("SampleStats need a loss")
        return result.loss
    logits, targets = result
    settings = {name: getattr(config, name) for name in ("unit", "ignore_index", "label_smoothing")}
    loss = per_sample_stats(logits, targets, stats=("loss",), impl=config.impl, **settings).loss
    assert loss is not None
    return torch.where(valid_samples(targets, config.unit, config.ignore_index), loss, math.nan)


def _check_reference(losses: Any, like: Tensor, rows: int) -> None:
    if losses is None:
        raise ValueError("rho_loss needs reference_losses [N], got None")
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        raise TypeError(f"reference_losses must be a tensor of floats, got {getattr(losses, 'dtype', type(losses))}")
    if losses.shape != (rows,) or losses.device != like.device:
        raise ValueError(
            f"reference_losses must be [{rows}] on {like.device}, got {tuple(losses.shape)} on {losses.device}"
        )


def _ordered(indices: Tensor, keys: Tensor, order: str) -> Tensor:
    """`indices` as they are, or by falling `keys` of each, ties as they are."""
    return indices if order == "index" else indices[keys.sort(descending=True, stable=True).indices]
