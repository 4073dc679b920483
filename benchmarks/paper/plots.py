"""Figures of docs/experiments.md; each names the file and the command that its numbers come from."""

import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.paper.settings import BETA_RATE, METHODS
from benchmarks.paper.tables import Results, Spread, chosen, time_ratio

WEIGHTS = ("ada3-relative", "ada3-log_ratio", "ada4-relative")
CONTROLS = ("none", "short_scored", "rs2", "uniform")
COLORS = {
    **{"none": "#222222", "short_scored": "#777777", "rs2": "#d4a017", "uniform": "#c1666b", "chosen": "#0b6e4f"},
    **{"big_loss": "#4a6fa5", "small_loss": "#9d79bc", "grad_norm": "#3fa7d6", "coreset1": "#8c6d46"},
}


def draw(results: Results, out: Path, source: str) -> dict[str, Path]:
    """Draw what the results allow; {kind: file}. source: of the numbers, written below each figure."""
    found: dict[str, Path] = {}
    for kind, drawing in DRAWINGS.items():
        figure = drawing(results)
        if figure is None:
            continue
        lines = textwrap.wrap(source, int(21 * figure.get_figwidth()))
        margin = (0.1 + 0.11 * len(lines)) / figure.get_figheight()
        figure.set_layout_engine("constrained", rect=(0, margin, 1, 1 - margin))
        figure.text(0.01, 0.01, "\n".join(lines), fontsize=6, color="#555555", verticalalignment="bottom")
        out.mkdir(parents=True, exist_ok=True)
        found[kind] = out / f"experiments-{results.summary['experiment']}-{kind}.png"
        figure.savefig(found[kind], dpi=130, metadata={"Software": None})
        plt.close(figure)
    return found


def near_rate(results: Results) -> float | None:
    """The rate of the figures at one rate: the one nearest to 0.2."""
    return min(results.rates, key=lambda rate: abs(rate - BETA_RATE), default=None)


def shown(results: Results) -> dict[str, tuple[str, str]]:
    """{method: (label, colour)} of the lines of a figure."""
    best = chosen(results)
    lines = {name: (METHODS[name].label, COLORS[name]) for name in COLORS if name in results.methods}
    if best is not None:
        label = METHODS[best].label.removeprefix("AdaSelection, ")
        lines[best] = (f"AdaSelection ({label})", COLORS["chosen"])
    return lines


def _over_time(results: Results) -> Figure | None:
    """Test metric over training seconds: means over seeds of both, record by record."""
    rate = near_rate(results)
    figure, axes = plt.subplots(figsize=(9, 4.5))
    for name, (label, color) in shown(results).items():
        curves = [run["curve"] for run in results.at(name, rate).values() if not run["final"]["diverged"]]
        curves = [curve for curve in curves if len(curve["test"]) == max(len(c["test"]) for c in curves)]
        if curves:
            seconds, metric = (_means(curve[what] for curve in curves) for what in ("seconds", "test"))
            axes.plot(seconds, metric, marker="o", markersize=2.5, linewidth=1.2, label=label, color=color)
    if not axes.lines:
        plt.close(figure)
        return None
    _finish_axes(axes, results, "training seconds, scoring included", f"rate {rate:g}" if rate else "")
    return figure


def _over_rate(results: Results) -> Figure | None:
    """Final test metric over the sampling rate, with the standard deviation over seeds."""
    if len(results.rates) < 2:
        return None
    figure, axes = plt.subplots(figsize=(9, 4.5))
    for name, (label, color) in shown(results).items():
        found = [(rate, Spread.of(results.values(name, rate))) for rate in results.rates]
        found = [(rate, spread) for rate, spread in found if spread.count]
        if found and not METHODS[name].rated:
            axes.axhline(found[0][1].mean, color=color, linestyle="--", linewidth=1, label=label)
        elif found:
            spreads = [spread for _, spread in found]
            bars = [0.0 if spread.count < 2 else spread.deviation for spread in spreads]
            xs, ys = [rate for rate, _ in found], [spread.mean for spread in spreads]
            axes.errorbar(
                xs, ys, yerr=bars, marker="o", markersize=3, capsize=2, linewidth=1.2, label=label, color=color
            )
    _finish_axes(axes, results, "sampling rate", "")
    return figure


def _seconds_over_rate(results: Results) -> Figure | None:
    """Training time over that without selection, and the limit of each kind."""
    if len(results.rates) < 2 or "none" not in results.methods:
        return None
    figure, axes = plt.subplots(figsize=(9, 4.5))
    for name, (label, color) in shown(results).items():
        found = [(rate, ratio) for rate in results.rates if (ratio := time_ratio(results, name, rate)) is not None]
        if found and METHODS[name].rated:
            axes.plot(*zip(*found, strict=True), marker="o", markersize=3, linewidth=1.2, label=label, color=color)
    rates = results.rates
    axes.plot(rates, [(1 + 3 * r) / 3 for r in rates], color="black", linestyle=":", label="(s + 3 gamma) / 3, s = 1")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("sampling rate")
    axes.set_ylabel("training time over no selection")
    axes.set_ylim(bottom=0)
    axes.set_title(results.summary["title"])
    _legend_beside(axes)
    return figure


def _weights(results: Results) -> Figure | None:
    """Weights of the methods over the updates, mean over seeds (Figure 8 of the paper)."""
    rate = near_rate(results)
    found = {name: [run["curve"] for run in results.at(name, rate).values()] for name in WEIGHTS}
    found = {name: [c for c in curves if c.get("weights")] for name, curves in found.items()}
    found = {name: curves for name, curves in found.items() if curves}
    if not found:
        return None
    figure, panels = plt.subplots(1, len(found), figsize=(4 * len(found), 3.6), sharey=True, squeeze=False)
    for axes, (name, curves) in zip(panels[0], found.items(), strict=True):
        for method in curves[0]["weights"]:
            updates, weights = (_means(values) for values in _columns(curves, method))
            axes.plot(
                updates, weights, marker="o", markersize=2.5, label=method.replace("_", " "), color=COLORS.get(method)
            )
        axes.set_title(METHODS[name].label.removeprefix("AdaSelection, "), fontsize=9)
        axes.set_xlabel("updates")
        axes.set_ylim(0, 1)
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel("weight")
    figure.suptitle(f"{results.summary['title']}, rate {rate:g}", fontsize=10)
    return figure


def _columns(curves: Sequence[Mapping[str, Any]], method: str) -> tuple[list[list[float]], list[list[float]]]:
    shortest = min(len(curve["updates"]) for curve in curves)
    return (
        [curve["updates"][:shortest] for curve in curves],
        [curve["weights"][method][:shortest] for curve in curves],
    )


def _beta(results: Results) -> Figure | None:
    """Final test metric over beta (Figure 7 of the paper)."""
    found = []
    for name in results.methods:
        method = METHODS[name]
        if method.group == "beta" or name == "ada3-relative":
            spread = Spread.of(results.values(name, BETA_RATE)) if results.runs.get((name, BETA_RATE)) else None
            if spread is not None and spread.count:
                found.append((method.config.get("beta", 1.0), spread))
    if len(found) < 2:
        return None
    found.sort()
    figure, axes = plt.subplots(figsize=(8, 4))
    bars = [0.0 if spread.count < 2 else spread.deviation for _, spread in found]
    axes.errorbar(
        [beta for beta, _ in found], [spread.mean for _, spread in found], yerr=bars,
        marker="o", capsize=3, color=COLORS["chosen"], label="AdaSelection, 3 candidates, relative",
    )  # fmt: skip
    _finish_axes(axes, results, "beta", f"rate {BETA_RATE:g}")
    return figure


class _PlainLog(LogFormatter):
    """0.2 where Matplotlib writes 2 x 10^-1; the same ticks have a label."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _finish_axes(axes: Any, results: Results, x: str, note: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(f"test {results.summary['metric']}")
    if not results.summary["higher_is_better"]:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_PlainLog())
        axes.yaxis.set_minor_formatter(_PlainLog(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.set_title(", ".join(filter(None, (results.summary["title"], note))), fontsize=10)
    _legend_beside(axes)


def _legend_beside(axes: Any) -> None:
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _means(columns: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]


DRAWINGS: dict[str, Callable[[Results], Figure | None]] = {
    "time": _over_time,
    "rate": _over_rate,
    "seconds": _seconds_over_rate,
    "weights": _weights,
    "beta": _beta,
}
CAPTIONS = {
    "time": "Test metric over training time at one rate (mean over seeds).",
    "rate": "Test metric over the sampling rate, with standard deviations (Figures 1, 2, 4 to 6 and 9 of AdaSelection).",
    "seconds": "Training time over that without selection (Figure 3).",
    "weights": "Weights of the candidate methods over training (Figure 8).",
    "beta": "Test metric over beta (Figure 7).",
}
