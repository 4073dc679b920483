"""AdaSelection and the baselines it is compared with (arXiv 2306.10728), as policies."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaselect_kernels.functional import (
    DEFAULT_METHODS,
    Selection,
    baseline_select,
    baseline_select_from_losses,
    fused_select,
    select_from_losses,
)
from adaselect_kernels.grad_norms.dial import Forward, check_dial, sample_grad_norms
from adaselect_kernels.options import GRAD_NORM_SOURCES, AdaSelectionOptions, check_methods, require_choice
from adaselect_kernels.policies.policy import Policy, PolicyConfig


@dataclass(frozen=True)
class AdaSelectionConfig(PolicyConfig):
    """PolicyConfig, the candidate methods, and the settings of equations 2 to 5."""

    methods: tuple[str, ...] = DEFAULT_METHODS
    options: AdaSelectionOptions = field(default_factory=AdaSelectionOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "methods", check_methods(self.methods))


class AdaSelection(Policy):
    """k largest s_i = r_i sum_m w^m alpha_i^m; the method weights w follow the method losses (equations 2 to 6)."""

    name: ClassVar[str] = "adaselection"
    config_type: ClassVar[type[PolicyConfig]] = AdaSelectionConfig
    config: AdaSelectionConfig

    def __init__(self, config: AdaSelectionConfig, device: torch.device | str | None = None) -> None:
        super().__init__(config, config.methods, device)

    def select(self, logits: Tensor, targets: Tensor) -> Selection:
        return self._choose(fused_select, logits, targets, self.config.gamma, **self._settings, **self.config.call)

    def select_from_losses(self, losses: Tensor, grad_norms: Tensor | None = None) -> Selection:
        return self._choose(
            select_from_losses,
            losses,
            self.config.gamma,
            grad_norms=grad_norms,
            order=self.config.order,
            **self._settings,
        )

    def method_weights(self) -> dict[str, float]:
        return dict(zip(self.methods, self.state.weights.tolist(), strict=True))

    @property
    def _settings(self) -> dict[str, Any]:
        return {"methods": self.config.methods, "options": self.config.options}


class Baseline(Policy):
    """What one method alone chooses (section 3.1), on its raw key; only the step of the state advances."""

    config_type: ClassVar[type[PolicyConfig]] = PolicyConfig
    method: ClassVar[str | None] = None  # its name among METHODS where that is not the policy's own

    def __init__(self, config: PolicyConfig, device: torch.device | str | None = None) -> None:
        super().__init__(config, (self.method or self.name,), device)

    def select(self, logits: Tensor, targets: Tensor) -> Selection:
        return self._choose(baseline_select, logits, targets, self.config.gamma, self.methods[0], **self.config.call)

    def select_from_losses(self, losses: Tensor, grad_norms: Tensor | None = None) -> Selection:
        return self._choose(
            baseline_select_from_losses,
            losses,
            self.config.gamma,
            self.methods[0],
            grad_norms=grad_norms,
            order=self.config.order,
        )


class Uniform(Baseline):
    """k rows at random without replacement: the k largest of i.i.d. noise, fresh from (seed, step) in every call."""

    name: ClassVar[str] = "uniform"


class BigLoss(Baseline):
    """k largest losses."""

    name: ClassVar[str] = "big_loss"


class SmallLoss(Baseline):
    """k smallest losses."""

    name: ClassVar[str] = "small_loss"


@dataclass(frozen=True)
class GradNormConfig(PolicyConfig):
    """PolicyConfig, and where the norms come from: `source`, `layers` and `probes` of `grad_norms.sample_grad_norms`."""

    source: str = "logits"
    layers: int = 2
    probes: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("source", self.source, GRAD_NORM_SOURCES)
        check_dial(self.layers, self.probes)


class GradNorm(Baseline):
    """k largest gradient norms; of logits, norm(softmax(z) - onehot(y)) (Katharopoulos & Fleuret 2018).

    With another `source` the norms are those of the model's parameters: `SelectedBatches` asks `score` for them, and a
    loop of one's own passes its result on as `select_from_losses(stats.loss, stats.grad_norm)`.
    """

    name: ClassVar[str] = "grad_norm"
    config_type: ClassVar[type[PolicyConfig]] = GradNormConfig
    config: GradNormConfig

    def select(self, logits: Tensor, targets: Tensor) -> Selection:
        if self.config.source != "logits":
            raise ValueError(
                f"source={self.config.source!r} needs the model: stats = policy.score(model, batch), then"
                " policy.select_from_losses(stats.loss, stats.grad_norm)"
            )
        return super().select(logits, targets)

    def score(self, model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
        """Losses and norms of a batch as SampleStats; for the source "logits" what `forward` gives."""
        if self.config.source == "logits" and forward is not None:
            return forward(model, batch)
        settings = {
            name: getattr(self.config, name) for name in ("layers", "probes", "ignore_index", "label_smoothing")
        }
        return sample_grad_norms(
            model, batch, method=self.config.source, forward=forward, seed=self.config.seed, **settings
        )


class AdaBoost(Baseline):
    """k largest a = 0.5 log((1 + t) / (1 - t)), t = max(l, 0) / ((1 + 1e-6) max l).

    Monotone in the loss, so alone it equals `BigLoss`; the printed formula is undefined for l >= 1, hence the scaling.
    """

    name: ClassVar[str] = "adaboost"


class Coreset1(Baseline):
    """ceil(k/2) largest and floor(k/2) smallest losses, disjoint."""

    name: ClassVar[str] = "coreset1"


class Coreset2(Baseline):
    """k smallest abs(l - mean l)."""

    name: ClassVar[str] = "coreset2"
