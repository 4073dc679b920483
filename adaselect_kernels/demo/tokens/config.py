"""What `adaselect tokens` runs: settings, the sizes of the model, and the variants that are compared."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

from adaselect_kernels.checks import selected_count
from adaselect_kernels.models.gpt import GPT
from adaselect_kernels.options import AdaSelectionOptions, require_choice
from adaselect_kernels.policies import RECOMMENDED, TokenSelector

LAYERS = {
    "bytes": 4,
    "words": 2,
}  # with a large vocabulary the head is most of the arithmetic, and the body is kept small


@dataclass(frozen=True)
class Variant:
    """One way to train: a rule of TokenSelector, None for the loss of every token."""

    label: str
    rule: str | None = None


FULL = Variant("full loss")
VARIANTS = (
    FULL,
    Variant("largest loss", "loss"),
    Variant("excess loss", "excess_loss"),
    Variant("AdaSelection", "adaselection"),
    Variant("random tokens", "uniform"),
)


@dataclass(frozen=True)
class TokensConfig:
    """Settings; every variant trains for `seconds` with each of the seeds seed, seed + 1, ...

    vocabulary: "bytes", 256 tokens, or "words": the most frequent words of the training text and the bytes for the rest,
        `words` tokens in all. gamma: share of the tokens of a batch that are trained on, in (0, 1].
    turns: evaluations of each run; the variants of a seed take turns between them.

    Raises ValueError or TypeError for a value outside what is accepted.
    """

    vocabulary: str = "bytes"
    gamma: float = 0.3
    seconds: float = 15.0
    seeds: int = 3
    seed: int = 0
    words: int = 8192
    batch: int = 8  # sequences
    context: int = 64  # tokens of a sequence
    width: int = 128
    heads: int = 4
    learning_rate: float = 3e-3  # AdamW's, after a warm-up over the first tenth; falls linearly to 0 at `seconds`
    weight_decay: float = 0.1
    turns: int = 6
    held_out_windows: int = 96

    def __post_init__(self) -> None:
        require_choice("vocabulary", self.vocabulary, tuple(LAYERS))
        selected_count(self.gamma, self.batch * self.context)
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, numbers.Real):
            raise TypeError(f"seconds must be a number, got {self.seconds!r}")
        if not 0.0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be positive and finite, got {self.seconds!r}")
        for name, least in (("seeds", 1), ("seed", 0), ("words", 257), ("turns", 1), ("held_out_windows", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    @property
    def layers(self) -> int:
        return LAYERS[self.vocabulary]

    @property
    def tokens_a_step(self) -> int:
        return self.batch * self.context

    def chosen(self, variant: Variant) -> int:
        """Tokens of a step whose loss is trained on."""
        return self.tokens_a_step if variant.rule is None else selected_count(self.gamma, self.tokens_a_step)

    def model(self, vocabulary: int) -> GPT:
        return GPT(vocabulary, self.context, self.width, self.layers, self.heads)

    def selector(self, variant: Variant, seed: int) -> TokenSelector | None:
        """AdaSelection has the settings that docs/when_it_pays.md recommends over the paper's."""
        if variant.rule is None:
            return None
        more: dict[str, Any] = {}
        if variant.rule == "adaselection":
            more = {"methods": RECOMMENDED["methods"], "options": AdaSelectionOptions(update=RECOMMENDED["update"])}
        return TokenSelector(variant.rule, self.gamma, seed=seed, **more)

    def head_share(self, vocabulary: int) -> float:
        """Multiply-adds of the head over those of a whole forward, a token."""
        head = vocabulary * self.width
        body = self.layers * (12 * self.width**2 + self.context * self.width)  # attention looks back T / 2, twice
        return head / (head + body)
