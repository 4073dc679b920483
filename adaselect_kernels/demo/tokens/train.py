"""One run: a small GPT trained for a given time, on the loss of every token or of those that a rule chooses."""

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaselect_kernels.demo.tokens.config import FULL, TokensConfig, Variant
from adaselect_kernels.demo.tokens.corpus import Batches, Corpus, held_out_windows
from adaselect_kernels.losses import selected_linear_cross_entropy
from adaselect_kernels.models.gpt import GPT

PARTS = ("forward", "select", "update")
_REFERENCE_SEED = 2**20  # of the reference models: other weights and another stream than those of any run


class Run:
    """A model in training. Its clock runs only inside `train_until`, so that runs can take turns and be evaluated."""

    def __init__(
        self, config: TokensConfig, variant: Variant, seed: int, corpus: Corpus, tokens: Tensor, reference: GPT | None
    ) -> None:
        torch.manual_seed(seed)
        self.config, self.variant, self.seed, self.corpus, self.reference = config, variant, seed, corpus, reference
        self.model = config.model(corpus.vocabulary)
        self.selector = config.selector(variant, seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self.batches = Batches(tokens, config, seed)
        self.steps = 0
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.curve: list[dict[str, float]] = []

    @property
    def elapsed(self) -> float:
        return sum(self.seconds.values())

    def train_until(self, seconds: float) -> None:
        """Steps until the clock has passed `seconds`."""
        while self.elapsed < seconds:
            self.step()

    def step(self) -> None:
        times = [time.perf_counter()]
        share = self.elapsed / self.config.seconds
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * rate(share)
        inputs, targets = next(self.batches)
        hidden = self.model(inputs)
        times.append(time.perf_counter())
        if self.selector is None:
            times.append(times[-1])
            loss = F.cross_entropy(self.model.logits(hidden).flatten(0, 1), targets.flatten())
        else:
            chosen = self.selector.select(hidden, self.model.head, targets, reference=self._reference(inputs, targets))
            times.append(time.perf_counter())
            loss = selected_linear_cross_entropy(hidden, self.model.head, targets, chosen.indices)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        times.append(time.perf_counter())
        self.steps += 1
        for part, start, end in zip(PARTS, times, times[1:], strict=False):
            self.seconds[part] += end - start

    @torch.no_grad()
    def _reference(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        if self.reference is None or self.selector is None:
            return None
        return self.selector.reference_losses(self.reference(inputs), self.reference.head, targets)

    @torch.no_grad()
    def evaluate(self) -> None:
        """A point of the curve: the loss of held-out text, in bits a byte; off the clock."""
        nats = size = 0.0
        windows = held_out_windows(self.corpus.held_out, self.config)
        for inputs, targets in zip(*(x.split(self.config.batch) for x in windows), strict=True):
            logits = self.model.logits(self.model(inputs))
            nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            size += self.corpus.token_bytes[targets].sum().item()
        tokens = self.steps * self.config.tokens_a_step
        point = {
            "seconds": self.elapsed,
            "steps": self.steps,
            "tokens": tokens,
            "bits_per_byte": nats / size / math.log(2),
        }
        self.curve.append(point)

    def entry(self) -> dict[str, Any]:
        """What results hold of the run."""
        return {
            "variant": self.variant.label,
            "seed": self.seed,
            "bits_per_byte": self.curve[-1]["bits_per_byte"],
            "steps": self.steps,
            "tokens_seen": self.steps * self.config.tokens_a_step,
            "tokens_trained_on": self.steps * self.config.chosen(self.variant),
            "seconds": self.seconds | {"total": self.elapsed},
            "curve": self.curve,
        }


def rate(share: float) -> float:
    """Of the largest learning rate, after `share` of the time: up over the first tenth, and linearly down to 0."""
    return min(1.0, (share + 0.01) / 0.1) * max(0.0, 1.0 - share)


def reference_run(config: TokensConfig, seed: int, corpus: Corpus) -> Run:
    """The run of a reference model: the full loss, on text that no other run sees."""
    return Run(config, FULL, _REFERENCE_SEED + seed, corpus, corpus.reference, None)


def runs_of_seed(
    config: TokensConfig, variants: tuple[Variant, ...], seed: int, corpus: Corpus, reference: GPT
) -> list[Run]:
    """A run of every variant, from the same weights and over the same stream of batches, each evaluated once."""
    runs = [
        Run(config, variant, seed, corpus, corpus.train, reference if variant.rule == "excess_loss" else None)
        for variant in variants
    ]
    for run in runs:
        run.evaluate()
    return runs
