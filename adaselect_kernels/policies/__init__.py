"""Policies: which rows of a batch deserve a backward pass, with the state that the answer carries from step to step."""

import dataclasses
from typing import Any

from adaselect_kernels.options import AdaSelectionOptions
from adaselect_kernels.policies.adaselection import (
    AdaBoost,
    AdaSelection,
    AdaSelectionConfig,
    Baseline,
    BigLoss,
    Coreset1,
    Coreset2,
    GradNorm,
    SmallLoss,
    Uniform,
)
from adaselect_kernels.policies.neighbours import Importance, RhoLoss, SelectiveBackprop
from adaselect_kernels.policies.policy import Policy, PolicyConfig, Scored
from adaselect_kernels.policies.tokens import TokenSelection, TokenSelector, TokenSelectorConfig

_BASELINES = (Uniform, BigLoss, SmallLoss, GradNorm, AdaBoost, Coreset1, Coreset2)
_NEIGHBOURS = (SelectiveBackprop, RhoLoss, Importance)
POLICIES: dict[str, type[AdaSelection] | type[Baseline]] = {
    policy.name: policy for policy in (AdaSelection, *_BASELINES, *_NEIGHBOURS)
}
SAMPLER_NAMES = ("rs2", "impon", "p_sgd", "c_sgd", "infobatch", "dynams")  # they choose before the forward
# Settings of "adaselection" that our experiments favour over the paper's (docs/when_it_pays.md): get_policy(..., **RECOMMENDED)
RECOMMENDED: dict[str, Any] = {"methods": ("big_loss", "uniform"), "update": "log_ratio"}
_OPTIONS = tuple(field.name for field in dataclasses.fields(AdaSelectionOptions))


def get_policy(name: str, gamma: float, **config: Any) -> Policy:
    """The policy `name` at the sampling rate `gamma` in (0, 1]. (Tokens by their hidden states: `TokenSelector`.)

    name: "adaselection" or one of the baselines "uniform", "big_loss", "small_loss", "grad_norm", "adaboost" (monotone
        in the loss, so alone it equals "big_loss"), "coreset1", "coreset2"; or of the neighbours "selective_backprop",
        "rho_loss", "importance".
    config: of every policy seed, unit, order, ignore_index, label_smoothing, impl (see `fused_select`), and device
        (where the state lives from the start; None: that of the first call); of "grad_norm" and "importance" also
        source, layers and probes (see `grad_norms.sample_grad_norms`); of "selective_backprop" beta, history and count;
        of "rho_loss" reference, a model; of "adaselection" methods and the fields of AdaSelectionOptions: beta,
        temperature, standardize, update, method_loss, weight_floor, curriculum_power, curriculum_scale.

    Raises ValueError (unknown name, a value outside what is accepted) or TypeError (unknown setting, wrong type).

    >>> import torch
    >>> policy = get_policy("big_loss", gamma=0.5)
    >>> policy.select_from_losses(torch.tensor([0.1, 2.0, 0.5, 1.0])).indices
    tensor([1, 3])
    """
    if isinstance(name, str) and name in SAMPLER_NAMES:
        raise ValueError(
            f"{name!r} chooses which rows to load, before any forward: it is a sampler, use samplers.get_sampler({name!r},"
            f" rows, batch_size). Samplers are {', '.join(map(repr, SAMPLER_NAMES))}"
        )
    if not isinstance(name, str) or name not in POLICIES:
        raise ValueError(f"name must be one of {', '.join(map(repr, POLICIES))}; got {name!r}")
    policy = POLICIES[name]
    objects = {key: config.pop(key) for key in ("device", *policy.objects) if key in config}
    accepted = [f.name for f in dataclasses.fields(policy.config_type) if f.name not in ("gamma", "options")]
    options = _OPTIONS if policy is AdaSelection else ()
    unknown = [setting for setting in config if setting not in accepted and setting not in options]
    if unknown:
        raise TypeError(
            f"the policy {name!r} has no setting {', '.join(map(repr, unknown))};"
            f" it accepts {', '.join([*accepted, *options, *policy.objects, 'device'])}"
        )
    if policy is AdaSelection:
        given = {option: config.pop(option) for option in options if option in config}
        config["options"] = AdaSelectionOptions(**given)
    return policy(policy.config_type(gamma, **config), **objects)  # type: ignore[arg-type]


__all__ = [
    "POLICIES",
    "RECOMMENDED",
    "SAMPLER_NAMES",
    "AdaSelectionConfig",
    "Policy",
    "PolicyConfig",
    "Scored",
    "TokenSelection",
    "TokenSelector",
    "TokenSelectorConfig",
    "get_policy",
]
