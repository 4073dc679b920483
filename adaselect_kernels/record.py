"""The logging record that every way of choosing gives: policies in their loop, samplers in theirs."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """Where a run stands. Making one reads the device: ask now and then, not in every step.

    step: optimizer updates so far. epoch: epochs finished.
    rate: rows trained on over rows looked at since the start, NaN before any.
    weights: weight of each method (AdaSelection), None where a method has none.
    loss_chosen, loss_all: mean loss of the rows chosen last, and of all rows they were chosen from; None where not known.
    seconds: host seconds so far by stage, of "load", "score", "select", "update"; a stage that is not timed is absent.
    """

    step: int
    epoch: int
    rate: float
    weights: dict[str, float] | None
    loss_chosen: float | None
    loss_all: float | None
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON line."""
        return asdict(self)
