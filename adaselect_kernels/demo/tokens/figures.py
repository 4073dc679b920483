"""The figure: held-out loss over training time, and what is left of it at the end, seed by seed."""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from adaselect_kernels.demo.figures import RC
from adaselect_kernels.demo.tokens.config import FULL, VARIANTS
from adaselect_kernels.training.files import replace_file

# Okabe and Ito's palette, told apart by the colour-blind; a line style besides, for print.
_STYLES = dict(
    zip(
        (variant.label for variant in VARIANTS),
        (
            ("#000000", "-"),
            ("#D55E00", "-."),
            ("#CC79A7", (0, (5, 1, 1, 1, 1, 1))),
            ("#0072B2", "-"),
            ("#E69F00", "--"),
        ),
        strict=True,
    )
)


def draw(results: dict[str, Any], path: Path) -> Path:
    """Write the figure as a PNG to `path`, and return it."""
    with matplotlib.rc_context(RC):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(10, 4.8), layout="constrained")
        curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
        _curves(curves, results)
        _differences(ends, results)
        handles, labels = curves.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, columnspacing=1.4)
        figure.suptitle(_title(results), fontsize=11)
        replace_file(path, lambda file: FigureCanvasAgg(figure).print_png(file))
    return path


def _curves(axes: Axes, results: dict[str, Any]) -> None:
    """Line: mean over the seeds; band: least to largest. The start, far above, is cut off."""
    lows, highs = [], []
    for label, (colour, style) in _STYLES.items():
        curves = [run["curve"] for run in results["runs"] if run["variant"] == label]
        points = list(zip(*curves, strict=True))
        losses = [[point["bits_per_byte"] for point in at] for at in points]
        seconds = [mean(point["seconds"] for point in at) for at in points]
        axes.plot(seconds, [mean(at) for at in losses], color=colour, linestyle=style, label=label, linewidth=1.8)
        axes.fill_between(
            seconds, [min(at) for at in losses], [max(at) for at in losses], color=colour, alpha=0.12, lw=0
        )
        lows.append(min(map(min, losses)))
        highs.append(max(losses[min(len(losses) - 1, 1 + len(losses) // 5)]))
    margin = 0.05 * (max(highs) - min(lows))
    axes.set(xlabel="training time, scoring included (s)", ylabel="held-out loss (bits per byte)")
    axes.set(xlim=(0, results["config"]["seconds"]), ylim=(min(lows) - margin, max(highs) + margin))


def _differences(axes: Axes, results: dict[str, Any]) -> None:
    rows = [row for row in results["summary"] if row["variant"] != FULL.label][::-1]
    for y, row in enumerate(rows):
        colour, _ = _STYLES[row["variant"]]
        found = row["less_full_loss"]
        axes.plot(found["values"], [y] * len(found["values"]), "o", color=colour, alpha=0.5, markersize=5)
        axes.plot([found["mean"]], [y], "|", color=colour, markersize=22, markeredgewidth=2.5)
        axes.annotate(
            f"{found['mean']:+.3f}", (found["mean"], y), (0, 14), textcoords="offset points", ha="center", fontsize=9
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.set_ylim(-0.5, len(rows) - 0.3)
    axes.margins(x=0.15)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("loss at the end less that of the full loss;\ndot: a seed, bar: their mean; right of 0: worse")


def _title(results: dict[str, Any]) -> str:
    config = results["config"]
    best = min(results["summary"], key=lambda row: row["bits_per_byte"]["mean"])
    seeds = len(results["references"])
    reached = f"{best['variant']}, {best['bits_per_byte']['mean']:.3f} bits a byte"
    return (
        f"Lowest after {config['seconds']:g} s of training: {reached}\n"
        f"GPT, {config['layers']} layers of width {config['width']}; {results['corpus']['vocabulary']:,} {config['vocabulary']},"
        f" head {100 * config['head_share']:.0f} % of a forward; gamma {config['gamma']:g};"
        f" {seeds} seed{'s' * (seeds > 1)}"
    )
