"""What a case is: a model, a batch and a loss made afresh from the random stream, and what PerSampleGradNorm must do with it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

EXACT, REFUSED, EITHER = "exact", "refused", "exact or refused"  # EITHER: the docs' matrix pins which
ROUNDING_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


def wave(output: Any) -> Tensor:
    """A loss that depends on every element of every tensor of the output, each sample's part apart from the others'."""
    return sum((1.3 * leaf + 0.4).sin().sum() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


@dataclass
class Problem:
    """One draw of a case.

    inputs: the batch, nested tensors with the samples along dimension 0; shared: further arguments, the same for all.
    loss: (model, inputs, shared) -> the loss *sum*, which the oracle takes of one sample at a time.
    inside: what is called in its place inside the context: a mean of it, or its compiled form.
    sample: (inputs, i) -> the inputs of sample i alone.
    losses: (model, inputs, shared) -> [N] losses of one forward over the batch, where a sample alone would draw another
    dropout mask or count other frequencies; the oracle then differentiates each of them.
    oracle_model: what the oracle differentiates where it is not the model (constant statistics of a BatchNorm).
    counted: (parameter name) -> whether its gradient counts.
    """

    model: nn.Module
    inputs: Any
    shared: tuple[Any, ...] = ()
    n: int | None = None
    loss: Callable[..., Tensor] | None = None
    inside: Callable[..., Tensor] | None = None
    sample: Callable[[Any, int], Any] | None = None
    losses: Callable[..., Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    oracle_model: nn.Module | None = None
    counted: Callable[[str], bool] = lambda name: True

    def __post_init__(self) -> None:
        if self.n is None:
            self.n = len(tree_leaves(self.inputs)[0])
        if self.losses is not None:
            self.loss = lambda model, inputs, shared: self.losses(model, inputs, shared).sum()
        elif self.loss is None:
            self.loss = call
        if self.sample is None:
            self.sample = lambda inputs, i: tree_map(lambda leaf: leaf[i : i + 1], inputs)

    def backward(self, model: nn.Module) -> None:
        """What a user runs inside the context."""
        (self.inside or self.loss)(model, self.inputs, self.shared).backward()


def call(model: nn.Module, inputs: Any, shared: tuple[Any, ...] = ()) -> Tensor:
    """wave of the model called with a dict as keywords, with a tuple as positional arguments."""
    if isinstance(inputs, dict):
        return wave(model(**inputs))
    return wave(model(*(inputs if isinstance(inputs, tuple) else (inputs,)), *shared))


@dataclass(frozen=True)
class Case:
    """build() draws from torch's global stream, which the caller seeds.

    message: what a refusal must say (regular expression). tolerance: of the relative error in float32, where rounding
    below float32 is part of the case. half: the float64 check says nothing (the case is about a lower precision).
    gradients: whether .grad must come out bit-identical in "plain" (compiled code may choose another order of sums).
    """

    section: str
    name: str
    build: Callable[[], Problem]
    expect: str = EXACT
    message: str = ""
    tolerance: float | None = None
    half: bool = False
    identical: bool = True

    @property
    def id(self) -> str:
        return f"{self.section}: {self.name}".replace("[", "(").replace("]", ")")


CASES: list[Case] = []


def case(section: str, name: str, expect: str = EXACT, message: str = "", **settings: Any):
    """Register the builder it decorates."""

    def register(build: Callable[..., Any]) -> Callable[..., Any]:
        assert (section, name) not in {(c.section, c.name) for c in CASES}, f"two cases {section}: {name}"
        CASES.append(Case(section, name, build, expect, message, **settings))
        return build

    return register


def module_case(
    section: str,
    name: str,
    module: Callable[[], nn.Module],
    *shapes: tuple[int, ...],
    then: bool = True,
    **settings: Any,
) -> None:
    """One module on random inputs of these shapes, before a Tanh: then=False takes its output as it is."""

    def build() -> Problem:
        layer = module()
        model = nn.Sequential(layer, nn.Tanh()) if then else layer
        return Problem(model, tuple(torch.randn(shape) for shape in shapes))

    case(section, name, **settings)(build)


def draw(case: Case, seed: int, dtype: torch.dtype = torch.float32) -> Problem:
    """A fresh draw of the case; torch's global stream is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        problem = case.build()
    if problem.oracle_model is not None:
        problem.oracle_model.to(dtype)
    return problem if dtype == torch.float32 else convert(problem, dtype)


def convert(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem with its model (in place) and floating inputs in another precision."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    problem.model.to(dtype)
    problem.inputs, problem.shared = tree_map(cast, problem.inputs), tree_map(cast, problem.shared)
    return problem
