"""What the report says in numbers: means, deviations and ranks out of summaries; pure functions of them."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.paper.settings import METHODS, PAPER_SETTING

CHOSEN = "AdaSelection"  # the configuration that is best on validation
NINE = ("none", CHOSEN, "uniform", "big_loss", "small_loss", "adaboost", "grad_norm", "coreset1", "coreset2")
# Tables 4 and 5 of AdaSelection (arXiv 2306.10728), in the order of NINE.
TABLE_5 = {
    "cifar10": (92.57, 89.39, 90.74, 92.25, 91.04, 85.13, 91.97, 84.67, 84.29),
    "cifar100": (70.47, 71.38, 71.05, 70.83, 31.96, 50.19, 71.29, 69.33, 59.98),
    "svhn": (95.71, 93.38, 93.32, 65.38, 40.74, 78.14, 67.14, 67.89, 70.66),
    "regression": (10.51, 8.42, 12.37, 52.25, 10.94, 11.14, 24.13, 35.05, 12.18),
    "bike": (3.61, 3.45, 3.48, 7.08, 50.19, 87.90, 7.53, 3.75, 7.54),
    "wikitext2": (5.45, 5.52, 5.53, 5.58, 5.85, 5.85, None, 5.61, 5.60),
}
TABLE_4 = {
    "cifar10": (3.5, 8.25, 8.25, 1.75, 4.75, 7.5, 3.0, 7.0, 11.75),
    "cifar100": (8.75, 1.5, 6.25, 4.25, 12.0, 10.75, 3.5, 7.0, 10.25),
    "svhn": (1.0, 4.4, 5.8, 6.0, 13.8, 9.8, 7.2, 6.8, 11.8),
    "regression": (7.4, 1.8, 9.6, 8.6, 6.8, 7.4, 9.4, 7.4, 7.6),
    "bike": (5.6, 3.8, 4.0, 4.2, 10.8, 12.0, 5.6, 7.0, 9.6),
    "wikitext2": (1.6, 2.0, 2.4, 4.4, 7.8, 8.2, None, 5.2, 5.4),
}
PAPER_DATA = {"text": "wikitext2"}  # whose column of the paper stands beside an experiment


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (NaN of a single value) of `count` values; `diverged` more had none."""

    mean: float
    deviation: float
    count: int
    diverged: int = 0

    @staticmethod
    def of(values: Sequence[float | None]) -> "Spread":
        known = [value for value in values if value is not None]
        mean = statistics.fmean(known) if known else math.nan
        deviation = statistics.stdev(known) if len(known) > 1 else math.nan
        return Spread(mean, deviation, len(known), len(values) - len(known))


@dataclass(frozen=True)
class Results:
    """The finished runs of one summary, by method and rate (None: a method without a rate), then by seed."""

    summary: Mapping[str, Any]
    runs: Mapping[tuple[str, float | None], Mapping[int, Mapping[str, Any]]]

    @staticmethod
    def of(summary: Mapping[str, Any]) -> "Results":
        runs: dict[tuple[str, float | None], dict[int, Mapping[str, Any]]] = defaultdict(dict)
        for entry in summary["runs"]:
            config = entry["config"]
            runs[config["method"], config["gamma"]][config["seed"]] = entry
        return Results(summary, dict(runs))

    @property
    def better(self) -> Callable[..., float]:
        return max if self.summary["higher_is_better"] else min

    @property
    def methods(self) -> list[str]:
        """In the order of the settings."""
        present = {method for method, _ in self.runs}
        return [name for name in METHODS if name in present]

    @property
    def rates(self) -> list[float]:
        return sorted({rate for method, rate in self.runs if rate is not None and METHODS[method].group != "beta"})

    def at(self, method: str, rate: float | None) -> Mapping[int, Mapping[str, Any]]:
        """{seed: run}; a method without a rate is the same at every rate."""
        return self.runs.get((method, rate)) or self.runs.get((method, None)) or {}

    def values(self, method: str, rate: float | None, what: str = "test") -> list[float | None]:
        return [entry["final"][what] for _, entry in sorted(self.at(method, rate).items())]

    def over_rates(self, method: str, what: str = "test") -> dict[int, float | None]:
        """{seed: mean over the rates}, of seeds that have them all; None where a run diverged."""
        by_rate = [self.at(method, rate) for rate in self.rates] or [self.at(method, None)]
        seeds = set.intersection(*(set(found) for found in by_rate))
        means: dict[int, float | None] = {}
        for seed in sorted(seeds):
            values = [found[seed]["final"][what] for found in by_rate]
            means[seed] = None if None in values else statistics.fmean(values)
        return means

    def spread(self, method: str, what: str = "test") -> Spread:
        return Spread.of(list(self.over_rates(method, what).values()))


def chosen(results: Results) -> str | None:
    """The setting of AdaSelection with the best validation metric, mean over rates and seeds; None where there is none.

    Settings of which a run diverged are not chosen. Of equal ones the first in the order of the settings.
    """
    found = {
        name: results.spread(name, "validation") for name in results.methods if METHODS[name].group == "adaselection"
    }
    whole = {name: spread.mean for name, spread in found.items() if spread.count and not spread.diverged}
    return results.better(whole, key=whole.__getitem__) if whole else None  # type: ignore[call-overload,return-value]


def ranks(values: Mapping[str, float | None], higher_is_better: bool) -> dict[str, float]:
    """1 is best; equal values share the mean of their ranks; None (diverged) comes last."""
    worst = -math.inf if higher_is_better else math.inf
    keys = {name: worst if value is None else value for name, value in values.items()}
    if higher_is_better:
        keys = {name: -key for name, key in keys.items()}
    return {
        name: 1 + sum(other < key for other in keys.values()) + (sum(other == key for other in keys.values()) - 1) / 2
        for name, key in keys.items()
    }


def average_ranks(results: Results, names: Mapping[str, str], what: str = "test") -> dict[str, float]:
    """Mean over the rates of the ranks of the means over seeds; names: {shown name: method}."""
    found: dict[str, list[float]] = defaultdict(list)
    for rate in results.rates:
        means: dict[str, float | None] = {}
        for name, method in names.items():
            spread = Spread.of(results.values(method, rate, what))
            if spread.count or spread.diverged:
                means[name] = None if spread.diverged else spread.mean
        for name, rank in ranks(means, results.summary["higher_is_better"]).items():
            found[name].append(rank)
    return {name: statistics.fmean(values) for name, values in found.items()}


def nine(results: Results) -> dict[str, str]:
    """{name in NINE: method}, of those that were run."""
    best = chosen(results)
    names = {name: name for name in NINE if name in results.methods}
    return {name: best if name == CHOSEN else name for name in NINE if name in names or (name == CHOSEN and best)}  # type: ignore[misc]


@dataclass(frozen=True)
class Difference:
    """One method less another, paired by seed, each the mean over the rates."""

    mean: float
    deviation: float
    count: int

    def verdict(self, higher_is_better: bool) -> str:
        """better or worse where the 95 % interval of the mean (Student's t) leaves out zero, else no difference seen."""
        if self.count < 2:
            return "one seed: not known"
        if abs(self.mean) <= t_95(self.count) * self.deviation / math.sqrt(self.count):
            return "no difference seen"
        return "better" if (self.mean > 0) == higher_is_better else "worse"


def t_95(count: int) -> float:
    """Two-sided 95 % quantile of Student's t with count - 1 degrees of freedom, from a table; above it the next smaller."""
    table = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 20: 2.093}
    return table[max(n for n in table if n <= count)]


def difference(results: Results, method: str, other: str, what: str = "test") -> Difference | None:
    """None where the two have no seed in common that did not diverge."""
    a, b = results.over_rates(method, what), results.over_rates(other, what)
    pairs = ((a[seed], b[seed]) for seed in a if seed in b)
    values = [x - y for x, y in pairs if x is not None and y is not None]
    if not values:
        return None
    spread = Spread.of(values)
    return Difference(spread.mean, spread.deviation, spread.count)


FACTORS = ("candidates", "update", "standardize", "curriculum")


def factors(method: str) -> dict[str, str] | None:
    """Where a setting of AdaSelection stands among candidates, update, standardisation and curriculum; None for others."""
    found = METHODS[method]
    if found.group != "adaselection" or not method.startswith(("ada2-", "ada3-", "ada4-")):
        return None
    return {
        "candidates": ", ".join(found.config["methods"]).replace("_", " "),
        "update": found.config["update"],
        "standardize": "yes" if found.config.get("standardize") else "no",
        "curriculum": "no" if found.config.get("curriculum_power") is None else "yes",
    }


def factor_means(results: Results) -> dict[str, dict[str, tuple[Spread, float, int]]]:
    """{factor: {level: (validation over seeds, average rank on validation, settings)}}.

    For a factor other than the curriculum the settings with a curriculum are left out, and for the curriculum those that
    standardise: then every level meets the same levels of the other factors. Only levels of equally many settings compare.
    """
    settings = {name: found for name in results.methods if (found := factors(name)) is not None}
    rank = average_ranks(results, {name: name for name in settings}, "validation")
    table: dict[str, dict[str, tuple[Spread, float, int]]] = {}
    for factor in FACTORS:
        off = "standardize" if factor == "curriculum" else "curriculum"
        levels: dict[str, list[str]] = defaultdict(list)
        for name, found in settings.items():
            if found[off] == "no":
                levels[found[factor]].append(name)
        table[factor] = {}
        for level, names in levels.items():
            by_seed = [results.over_rates(name, "validation") for name in names]
            seeds = set.intersection(*(set(found) for found in by_seed))
            means: list[float | None] = []
            for seed in sorted(seeds):
                values = [value for found in by_seed if (value := found[seed]) is not None]
                means.append(statistics.fmean(values) if len(values) == len(by_seed) else None)
            ranked = [rank[name] for name in names if name in rank]
            table[factor][level] = Spread.of(means), statistics.fmean(ranked) if ranked else math.nan, len(names)
    return table


def time_ratio(results: Results, method: str, rate: float | None = None) -> float | None:
    """Seconds over those of no selection, mean over common seeds, at a rate or as the mean over the rates."""
    base = results.at("none", None)
    rates = [rate] if rate is not None else results.rates or [None]
    ratios = [
        entry["final"]["seconds"] / base[seed]["final"]["seconds"]
        for one in rates
        for seed, entry in results.at(method, one).items()
        if seed in base and not entry["final"]["diverged"] and not base[seed]["final"]["diverged"]
    ]
    return statistics.fmean(ratios) if ratios else None


__all__ = ["CHOSEN", "NINE", "PAPER_SETTING", "Difference", "Results", "Spread"]
