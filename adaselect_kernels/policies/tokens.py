"""Token selection: which positions of a batch of sequences deserve a backward pass of the classifier."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from adaselect_kernels.checks import check_float_vector, check_rows, check_state, check_stats, describe, selected_count
from adaselect_kernels.dispatch import IMPLS
from adaselect_kernels.functional import (
    DEFAULT_METHODS,
    SampleStats,
    baseline_select_from_losses,
    fused_select,
    mask_to_indices,
    per_sample_stats,
    select_from_losses,
    select_mask,
)
from adaselect_kernels.linear import check_approximation, fused_linear_select, linear_per_sample_stats
from adaselect_kernels.options import AdaSelectionOptions, check_methods, require_choice
from adaselect_kernels.policies.policy import Chooser
from adaselect_kernels.state import AdaSelectionState

RULES = ("loss", "excess_loss", "margin", "entropy", "grad_norm", "adaselection", "uniform")
_STATS = {"margin": ("loss", "margin"), "entropy": ("loss", "entropy"), "grad_norm": ("loss", "grad_norm")}


class TokenSelection(NamedTuple):
    """Which tokens were chosen; every tensor is on the device of the input and requires no gradient.

    Shapes of mask, scores and losses are those of the targets, [B, T] (or [N]).
    """

    indices: Tensor  # [k] int64, places in the flattened [B * T], ascending, then -1: `selected_linear_cross_entropy` takes them
    mask: Tensor  # [B, T] bool, true where chosen
    scores: Tensor  # [B, T] float32, largest best; -inf where invalid
    losses: Tensor | None  # [B, T] float32, 0 where ignored; None for the rule "uniform", which computes none
    n_valid: Tensor  # [] int64, on the device
    n_selected: Tensor  # [] int64, on the device


@dataclass(frozen=True)
class TokenSelectorConfig:
    """Settings of a TokenSelector, whose docstring explains them.

    Raises ValueError or TypeError, when constructed, for a value that the functions would refuse.
    """

    rule: str
    gamma: float
    seed: int = 0
    per_sequence: bool = False
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    score_dtype: torch.dtype | None = None
    vocab_stride: int = 1
    methods: tuple[str, ...] = DEFAULT_METHODS
    options: AdaSelectionOptions = field(default_factory=AdaSelectionOptions)
    impl: str = "auto"

    def __post_init__(self) -> None:
        require_choice("rule", self.rule, RULES)
        require_choice("impl", self.impl, IMPLS)
        if not isinstance(self.per_sequence, bool):
            raise TypeError(f"per_sequence must be a bool, got {self.per_sequence!r}")
        check_approximation(check_stats(self.stats), self.score_dtype, self.vocab_stride)
        if self.vocab_stride < 1:
            raise ValueError(f"vocab_stride must be at least 1, got {self.vocab_stride}")
        object.__setattr__(self, "methods", check_methods(self.methods))
        settings = self.labels | self.linear | {"score_dtype": None, "vocab_stride": 1, "impl": "reference"}
        one = torch.zeros(1, 1, device="cpu")
        fused_linear_select(  # the function's own checks, on one row of one class
            *(one, one, one[0].long(), self.gamma),
            methods=self.methods,
            options=self.options,
            seed=self.seed,
            **settings,
        )

    @property
    def labels(self) -> dict[str, Any]:
        """Keyword arguments that the functions over logits share."""
        return {
            "unit": "token",
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "impl": self.impl,
        }

    @property
    def linear(self) -> dict[str, Any]:
        """Keyword arguments of the functions over hidden states that say what the logits are."""
        return {
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "score_dtype": self.score_dtype,
            "vocab_stride": self.vocab_stride,
        }

    @property
    def stats(self) -> tuple[str, ...]:
        """The statistics that the rule reads, the loss first."""
        return _STATS.get(self.rule, ("loss",))


class TokenSelector(Chooser):
    """Chooses gamma of the valid tokens of a batch by `rule`, call after call, without a host synchronisation.

    | rule | chooses | score |
    |---|---|---|
    | loss | largest losses | l |
    | excess_loss | largest excess over a reference model (Rho-1, arXiv 2404.07965; RHO-LOSS) | l - l_reference |
    | margin | smallest label margins m = z_y - max_{j != y} z_j: wrong and barely right tokens first | -m |
    | entropy | largest entropies of softmax(z), labels unused | entropy |
    | grad_norm | largest norms g of softmax(z) - onehot(y) | g |
    | adaselection | largest s = sum_m w^m alpha^m over the tokens, equations 2 to 6, with state | s |
    | uniform | at random, fresh noise E from (seed, step) in every call: the control, which scores nothing | E |

    gamma: in (0, 1]; clamp(floor(gamma n + 0.5), 1, n) of the n valid tokens are chosen, counted on the device. A token is
        valid when its target is not ignore_index and its loss and score are finite. Ties go to the earlier token.
    per_sequence: gamma of the valid tokens of every sequence, instead of the whole batch.
    ignore_index, label_smoothing, softcap, logit_scale, score_dtype, vocab_stride: as in `linear_per_sample_stats`; the last
        four say how `select` makes logits of hidden states and are not used elsewhere.
    methods, options: of the rule "adaselection". seed: of the noise of "uniform", as rule or method.
    impl: as everywhere. device: where the state lives from the start; None: that of the first call.

    The state (AdaSelectionState) counts the calls, and for "adaselection" carries the method weights; state_dict and
    load_state_dict continue a run bit for bit. Raises ValueError or TypeError for settings outside what is accepted.

    >>> hidden, head = torch.eye(3).reshape(1, 3, 3), torch.tensor([[4.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    >>> chosen = TokenSelector("loss", gamma=0.5).select(hidden, head, torch.tensor([[1, 0, -100]]))
    >>> chosen.mask, chosen.indices
    (tensor([[ True, False, False]]), tensor([ 0, -1]))
    """

    name: ClassVar[str] = "tokens"
    config: TokenSelectorConfig

    def __init__(self, rule: str, gamma: float, *, device: torch.device | str | None = None, **settings: Any) -> None:
        config = TokenSelectorConfig(rule, gamma, **settings)
        super().__init__(config, config.methods if rule == "adaselection" else ("uniform",), device)

    def select(
        self,
        hidden: Tensor,  # [B, T, H] (or [N, H]); float16, bfloat16, float32, float64; any strides
        weight: Tensor,  # [V, H], of the dtype of hidden
        targets: Tensor,  # [B, T] (or [N]); int64 or int32
        bias: Tensor | None = None,  # [V], of the dtype of hidden
        reference: Tensor | None = None,  # [B, T]; losses of the reference model, for the rule "excess_loss"
    ) -> TokenSelection:
        """Choose from hidden states and the classifier; the logits are never stored.

        Memory beyond inputs and outputs: O(B T), and on a CPU one block of logits a thread. Not differentiable.
        Raises as `linear_per_sample_stats` does, and ValueError or TypeError for a reference that is missing, not wanted
        or not like the targets, and for per_sequence without [B, T].
        """
        return self._choose(self._from_hidden, hidden, weight, targets, bias, reference)

    def select_from_logits(self, logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> TokenSelection:
        """Choose from logits [B, T, V] (or [N, V]) as the loss sees them; otherwise as `select`."""
        return self._choose(self._from_logits, logits, targets, reference)

    def select_from_losses(
        self, losses: Tensor, valid: Tensor | None = None, reference: Tensor | None = None
    ) -> TokenSelection:
        """Choose from losses [B, T] (or [N]) that the caller has; tokens outside `valid` (bool, None: all) are invalid.

        For the rules "loss", "excess_loss", "uniform", and "adaselection" without the method "grad_norm".
        """
        return self._choose(self._from_losses, losses, valid, reference)

    def reference_losses(self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        """Losses [B, T] of a reference model's hidden states, computed as `select` computes those of the model.

        For a reference model of other softcap or logit_scale use `linear_per_sample_stats(..., unit="token").loss`.
        """
        stats = linear_per_sample_stats(
            hidden, weight, targets, bias=bias, stats=("loss",), **self.config.linear, **self.config.labels
        )
        assert stats.loss is not None
        return stats.loss.view(targets.shape)

    def method_weights(self) -> dict[str, float] | None:
        if self.config.rule != "adaselection":
            return None
        return dict(zip(self.methods, self.state.weights.tolist(), strict=True))

    def _from_hidden(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, reference: Tensor | None,
        state: AdaSelectionState, impl: str,
    ) -> TokenSelection:  # fmt: skip
        config = self.config
        self._check("H", hidden, targets, reference, state)
        if config.rule == "uniform":
            return self._from_noise(targets != config.ignore_index, None, state)
        settings: dict[str, Any] = config.linear | config.labels | {"bias": bias}
        if config.rule == "adaselection":
            chosen = fused_linear_select(hidden, weight, targets, config.gamma, state=state, **self._ada, **settings)
            return self._from_scores(chosen.scores, chosen.losses, targets.shape)
        stats = linear_per_sample_stats(hidden, weight, targets, stats=config.stats, **settings)
        return self._from_stats(stats, targets, reference, state)

    def _from_logits(
        self, logits: Tensor, targets: Tensor, reference: Tensor | None, state: AdaSelectionState, impl: str
    ) -> TokenSelection:
        config = self.config
        self._check("C", logits, targets, reference, state)
        if config.rule == "uniform":
            return self._from_noise(targets != config.ignore_index, None, state)
        if config.rule == "adaselection":
            chosen = fused_select(logits, targets, config.gamma, state=state, **self._ada, **config.labels)
            return self._from_scores(chosen.scores, chosen.losses, targets.shape)
        stats = per_sample_stats(logits, targets, stats=config.stats, **config.labels)
        return self._from_stats(stats, targets, reference, state)

    def _from_losses(
        self, losses: Tensor, valid: Tensor | None, reference: Tensor | None, state: AdaSelectionState, impl: str
    ) -> TokenSelection:
        config = self.config
        if config.stats != ("loss",) or (config.rule == "adaselection" and "grad_norm" in config.methods):
            raise ValueError(f"losses alone do not serve the rule {config.rule!r} (methods {config.methods!r})")
        check_float_vector("losses", losses.flatten() if isinstance(losses, Tensor) else losses)
        self._check_call(losses, losses.shape, reference, state)
        if valid is None:
            valid = torch.ones_like(losses, dtype=torch.bool)
        elif not isinstance(valid, Tensor) or valid.dtype != torch.bool:
            raise TypeError(f"valid must be a bool tensor or None, got {getattr(valid, 'dtype', type(valid).__name__)}")
        elif valid.shape != losses.shape or valid.device != losses.device:
            raise ValueError(f"valid must be like losses, {describe(losses)}, got {describe(valid)}")
        losses = losses.detach()
        if config.rule == "uniform":
            return self._from_noise(valid & losses.isfinite(), losses, state)
        if config.rule == "adaselection":
            usable = torch.where(valid, losses, math.nan).flatten()
            chosen = select_from_losses(usable, config.gamma, state=state, impl=impl, **self._ada)
            return self._from_scores(chosen.scores, losses, losses.shape)
        return self._from_keys(losses if reference is None else losses - reference.detach(), losses, valid, state)

    def _from_stats(
        self, stats: SampleStats, targets: Tensor, reference: Tensor | None, state: AdaSelectionState
    ) -> TokenSelection:
        losses = stats.loss
        assert losses is not None
        losses = losses.view(targets.shape)
        keys = losses
        if self.config.rule == "margin":
            assert stats.margin is not None
            keys = -stats.margin.view(targets.shape)
        elif self.config.rule in ("entropy", "grad_norm"):
            keys = getattr(stats, self.config.rule).view(targets.shape)
        elif reference is not None:
            keys = losses - reference.detach()
        return self._from_keys(keys, losses, targets != self.config.ignore_index, state)

    def _from_keys(self, keys: Tensor, losses: Tensor, valid: Tensor, state: AdaSelectionState) -> TokenSelection:
        state.step.add_(1)
        scores = keys.to(torch.float32)
        scores = torch.where(valid & losses.isfinite() & scores.isfinite(), scores, -math.inf)
        return self._from_scores(scores, losses, losses.shape)

    def _from_noise(self, valid: Tensor, losses: Tensor | None, state: AdaSelectionState) -> TokenSelection:
        nothing = torch.where(valid, 0.0, math.nan).flatten()
        scores = baseline_select_from_losses(
            nothing, self.config.gamma, "uniform", state=state, impl=self.config.impl
        ).scores
        return self._from_scores(scores, losses, valid.shape)

    def _from_scores(self, scores: Tensor, losses: Tensor | None, shape: torch.Size) -> TokenSelection:
        """Scores in any shape, -inf where invalid, to what is returned."""
        config = self.config
        scores = scores.view(shape)
        losses = None if losses is None else losses.to(torch.float32).view(shape)
        if config.per_sequence:
            mask = select_mask(scores, config.gamma, per_sequence=True, impl=config.impl)
            k = shape[0] * selected_count(config.gamma, shape[1])
        else:
            mask = select_mask(scores.flatten(), config.gamma, impl=config.impl).view(shape)
            k = selected_count(config.gamma, scores.numel())
        indices = mask_to_indices(mask, k)
        return TokenSelection(indices, mask, scores, losses, (scores > -math.inf).sum(), mask.sum())

    @property
    def _ada(self) -> dict[str, Any]:
        return {"methods": self.config.methods, "options": self.config.options}

    def _check(
        self, width: str, rows: Tensor, targets: Tensor, reference: Tensor | None, state: AdaSelectionState
    ) -> None:
        check_rows({"H": "hidden", "C": "logits"}[width], width, rows, targets)
        self._check_call(targets, targets.shape, reference, state)

    def _check_call(self, like: Tensor, shape: torch.Size, reference: Tensor | None, state: AdaSelectionState) -> None:
        check_state(state, self.methods, like.device, 0)
        if len(shape) > 2:
            raise ValueError(f"losses must be [B, T] or [N], got shape {tuple(shape)}")
        if self.config.per_sequence and len(shape) != 2:
            raise ValueError(f"per_sequence needs sequences, [B, T], got shape {tuple(shape)}")
        if self.config.rule != "excess_loss":
            if reference is not None:
                raise ValueError(f"the rule {self.config.rule!r} takes no reference losses")
            return
        if reference is None:
            raise ValueError("the rule 'excess_loss' needs reference losses, got None: see reference_losses")
        if not isinstance(reference, Tensor) or not reference.is_floating_point():
            raise TypeError(
                f"reference must be a tensor of floats, got {getattr(reference, 'dtype', type(reference).__name__)}"
            )
        if reference.shape != shape or reference.device != like.device:
            raise ValueError(f"reference must be {tuple(shape)} on {like.device}, got {describe(reference)}")
