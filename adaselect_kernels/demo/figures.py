"""The three figures of the demo, drawn from its results; docs/demo.md says how to read them."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adaselect_kernels.demo.config import VARIANTS
from adaselect_kernels.training.files import replace_file

# Okabe and Ito's palette, told apart by the colour-blind; a line style besides, for print.
_STYLES = dict(
    zip(
        (variant.label for variant in VARIANTS),
        (
            ("#000000", "-"),
            ("#E69F00", "--"),
            ("#D55E00", "-."),
            ("#56B4E9", (0, (5, 1, 1, 1, 1, 1))),
            ("#0072B2", "-"),
        ),
        strict=True,
    )
)
_METHOD_STYLES = {
    "big_loss": ("#D55E00", "-."),
    "small_loss": ("#009E73", "-"),
    "grad_norm": ("#CC79A7", "-"),
    "uniform": ("#E69F00", "--"),
}
_PARTS = {"scoring": "#56B4E9", "selection": "#D55E00", "update": "#009E73", "other": "#BBBBBB"}
RC = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write every figure that `results` has data for; returns their paths."""
    figures = {"accuracy.png": _accuracy, "method_weights.png": _method_weights, "time_split.png": _time_split}
    written = []
    with matplotlib.rc_context(RC):  # pyright: ignore[reportArgumentType]
        for name, make in figures.items():
            figure = make(results)
            if figure is not None:
                path = folder / name
                replace_file(path, lambda file, figure=figure: FigureCanvasAgg(figure).print_png(file))
                written.append(path)
    return written


def _runs_of(results: dict[str, Any], label: str) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if run["variant"] == label]


def _labels(results: dict[str, Any]) -> list[str]:
    return [row["variant"] for row in results["summary"]]


def _accuracy(results: dict[str, Any]) -> Figure:
    """Test accuracy over training time and over candidate samples; line: mean over the seeds, band: least to largest."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    by_time, by_candidates = figure.subplots(1, 2, sharey=True)
    for label in _labels(results):
        curves = [run["curve"] for run in _runs_of(results, label)]
        colour, style = _STYLES[label]
        points = list(zip(*curves, strict=True))
        accuracies = [[100 * point["accuracy"] for point in at] for at in points]
        seconds = [mean(point["seconds"] for point in at) for at in points]
        for axes, x in ((by_time, seconds), (by_candidates, [at[0]["candidates"] for at in points])):
            axes.plot(x, [mean(a) for a in accuracies], color=colour, linestyle=style, label=label, linewidth=1.8)
            axes.fill_between(
                x, [min(a) for a in accuracies], [max(a) for a in accuracies], color=colour, alpha=0.12, lw=0
            )
    by_time.set(xlabel="training time, evaluation excluded (s)", ylabel="test accuracy (%)", ylim=(0, 101))
    by_candidates.set_xlabel("candidate samples seen")
    by_candidates.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (by_time, by_candidates):
        axes.set_xlim(left=0)
    handles, labels = by_time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, columnspacing=1.4)
    figure.suptitle(_accuracy_title(results), fontsize=11)
    return figure


def _accuracy_title(results: dict[str, Any]) -> str:
    config = results["config"]
    means = {row["variant"]: 100 * row["accuracy_mean"] for row in results["summary"]}
    plain = means.pop(VARIANTS[0].label, None)
    parts = [] if plain is None else [f"{plain:.1f} % without selection"]
    if means:
        low, high = min(means.values()), max(means.values())
        span = f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"
        parts.append(f"{span} % with {100 * config['gamma']:g} % of them chosen")
    seeds = len({run["seed"] for run in results["runs"]})
    return (
        f"Test accuracy after {config['candidates']:,} candidates: {', '.join(parts)}\n"
        f"digits 8x8, small CNN, mean of {seeds} seed{'s' * (seeds > 1)} (band: least to largest),"
        f" {config['threads']} CPU thread"
    )


def _method_weights(results: dict[str, Any]) -> Figure | None:
    """The method weights w of equation 3 over the selection steps, one panel for each set of candidate methods."""
    labels = [label for label in _labels(results) if _runs_of(results, label)[0]["methods"]]
    if not labels:
        return None
    figure = Figure(figsize=(5 * len(labels), 4.4), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for axes, label in zip(panels, labels, strict=True):
        runs = _runs_of(results, label)
        for position, method in enumerate(runs[0]["methods"]):
            colour, style = _METHOD_STYLES[method]
            histories = [[weights[position] for weights in run["method_weights"]] for run in runs]
            for history in histories:
                axes.plot(range(1, len(history) + 1), history, color=colour, linewidth=0.6, alpha=0.35)
            average = [mean(at) for at in zip(*histories, strict=True)]
            name = method.replace("_", " ")
            axes.plot(range(1, len(average) + 1), average, color=colour, linestyle=style, linewidth=2, label=name)
        axes.set(title=f"{label}: {_final_weight(runs)}", xlabel="selection step (candidate batch)", ylim=(-0.02, 1.02))
        axes.set_xlim(left=1)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(runs[0]["methods"]))
    panels[0].set_ylabel("method weight")
    figure.suptitle(
        "AdaSelection's method weights (as Figure 8 of arXiv 2306.10728); thin lines: single seeds, thick: mean",
        fontsize=11,
    )
    return figure


def _final_weight(runs: list[dict[str, Any]]) -> str:
    """Names the method with the largest final weight, averaged over the seeds."""
    final = [mean(weights) for weights in zip(*(run["method_weights"][-1] for run in runs), strict=True)]
    largest = max(range(len(final)), key=final.__getitem__)
    return f"{runs[0]['methods'][largest].replace('_', ' ')} ends largest ({final[largest]:.2f})"


def _time_split(results: dict[str, Any]) -> Figure:
    """Training time by part, and where (s + 3 gamma) / 3 of the time without selection would be."""
    rows = results["summary"][::-1]
    places = range(len(rows))
    figure = Figure(figsize=(9, 1.7 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ends = [0.0] * len(rows)
    for part, colour in _PARTS.items():
        widths = [row["seconds"][part] for row in rows]
        axes.barh(places, widths, left=ends, color=colour, label=part, height=0.6)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    expected = _expected_seconds(rows)
    if expected:
        low, high = [y - 0.4 for y in expected], [y + 0.4 for y in expected]
        axes.vlines(
            list(expected.values()), low, high, colors="black", linestyles=":", linewidth=2, label="expected at s = 1"
        )
    for y, row in zip(places, rows, strict=True):
        ratio = "" if row["time_ratio"] is None else f" ({row['time_ratio']:.2f}x)"
        place = max(ends[y], expected.get(y, 0.0)), y
        text = f"{row['seconds']['total']:.2f} s{ratio}"
        axes.annotate(text, place, (7, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [row["variant"] for row in rows])
    axes.set_xlabel("training time of one run (s), mean over the seeds")
    axes.set_xlim(0, 1.2 * max([*ends, *expected.values()]))
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=5, fontsize=9)
    config = results["config"]
    figure.suptitle(
        f"Where the time goes: {config['candidates']:,} candidates in every row, gamma = {config['gamma']:g},"
        f" {config['threads']} CPU thread",
        fontsize=11,
    )
    return figure


def _expected_seconds(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Expected time of every row with selection, by its place; empty while no run without selection is finished."""
    plain = next((row["seconds"]["total"] for row in rows if row["variant"] == VARIANTS[0].label), None)
    if plain is None:
        return {}
    selecting = ((y, row) for y, row in enumerate(rows) if row["variant"] != VARIANTS[0].label)
    return {y: plain * row["expected_time_ratio"] for y, row in selecting}
