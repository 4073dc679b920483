"""The figures of this group: the rate of scoring over V and N, the time of a loss over gamma, and memory."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.linear.page import teraflops
from benchmarks.timing import paired_ratio

COLORS = {
    "ours": "#0b6e4f",
    "full": "#0b6e4f",
    "stats": "#66b395",
    "product": "black",
    "naive": "#c1666b",
    "naive_full": "#c1666b",
    "compiled": "#d4a017",
    "torch": "#3d6fa5",
    "torch_chunked": "#8fb3d9",
    "cce": "#7b5ea7",
    "liger": "#e08e45",
}
STYLES = {"product": "--", "full": ":", "naive_full": ":"}
WITHIN = 1.15  # of gamma times the time of all rows
Record = Mapping[str, Any]


def _measured(document: Mapping[str, Any], kind: str) -> list[Record]:
    return [r for r in document["records"] if r["status"] == "measured" and r["params"]["kind"] == kind]


def _lines(axes: Axes, records: Sequence[Record], over: str, y: Callable[[Record, str], float]) -> None:
    """A line a contender: the median, and a band from the 20th to the 80th percentile."""
    for name in COLORS:
        own = sorted((r for r in records if r["contender"] == name), key=lambda r: r["params"][over])
        if not own:
            continue
        xs = [r["params"][over] for r in own]
        at = {q: [y(r, q) for r in own] for q in ("p20", "p50", "p80")}
        label = name.replace("_", " ")
        axes.plot(xs, at["p50"], STYLES.get(name, "-"), marker="o", markersize=3, label=label, color=COLORS[name])
        axes.fill_between(xs, at["p20"], at["p80"], alpha=0.15, color=COLORS[name], linewidth=0)


def _ticks(axes: Axes, values: Sequence[float], text: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(values)), [format(value, text) for value in sorted(set(values))])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def rate(document: Mapping[str, Any]) -> Figure | None:
    """Scoring: arithmetic of the product over the time. A panel a sweep over V, and one a sweep over N."""
    sweeps: list[tuple[str, list[Record]]] = []
    for over in ("classes", "n"):
        alike = defaultdict(list)
        for r in _measured(document, "score"):
            alike[tuple(r["params"][key] for key in ("n", "hidden", "classes", "dtype") if key != over)].append(r)
        sweeps += [(over, rows) for rows in alike.values() if len({r["params"][over] for r in rows}) > 1]
    if not sweeps:
        return None
    width = max(9, 4.5 * len(sweeps) + 1.5)
    figure, panels = plt.subplots(1, len(sweeps), figsize=(width, 4), squeeze=False, layout="constrained")
    for axes, (over, rows) in zip(panels[0], sweeps, strict=True):
        _lines(axes, rows, over, teraflops)
        params = rows[0]["params"]
        fixed = f"N = {params['n']:,}" if over == "classes" else f"V = {params['classes']:,}"
        axes.set_title(f"{fixed}, H = {params['hidden']:,}, {params['dtype']}", fontsize=10)
        _ticks(axes, [r["params"][over] for r in rows], ",")
        axes.set_xlabel("vocabulary V" if over == "classes" else "rows N")
        axes.set_ylim(bottom=0)
    panels[0][0].set_ylabel("TFLOP/s of the one product")
    panels[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Scoring without stored logits")
    return figure


def over_gamma(document: Mapping[str, Any]) -> Figure | None:
    """The loss of the chosen rows, forward and backward: time over gamma, and ours over gamma times that of all rows."""
    rows = _measured(document, "loss")
    full = {r["params"]["gamma"]: r for r in rows if r["contender"] == "full"}
    ours = [r for r in rows if r["contender"] == "ours" and r["params"]["gamma"] in full]
    ours.sort(key=lambda r: r["params"]["gamma"])
    if not ours:
        return None
    gammas = sorted(full)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained", width_ratios=(3, 2))
    _lines(left, [r for r in rows if r["contender"] != "full"], "gamma", lambda r, q: r["us"][q] / 1e3)
    limits = [gamma * full[gamma]["us"]["p50"] / 1e3 for gamma in gammas]
    left.plot(gammas, limits, ":", color=COLORS["full"], linewidth=2, label="gamma x ours on all rows")
    left.set_ylabel("milliseconds, forward and backward")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    ratios = [paired_ratio(r["samples_us"], full[r["params"]["gamma"]]["samples_us"]) for r in ours]
    at = {q: [ratio[q] / r["params"]["gamma"] for ratio, r in zip(ratios, ours, strict=True)] for q in ratios[0]}
    xs = [r["params"]["gamma"] for r in ours]
    right.plot(xs, at["p50"], marker="o", markersize=3, color=COLORS["ours"])
    right.fill_between(xs, at["p20"], at["p80"], alpha=0.15, color=COLORS["ours"], linewidth=0)
    right.axhline(1, color="black", linewidth=0.8)
    right.axhline(WITHIN, color="#777777", linewidth=0.8, linestyle="--", label=f"target, {WITHIN:g}")
    right.set_ylabel("ours over gamma x all rows")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.set_xticks(gammas, [f"{gamma:g}" for gamma in gammas])
        axes.set_xlabel("sampling rate gamma")
        axes.grid(alpha=0.3)
    params = ours[0]["params"]
    shape = f"N = {params['n']:,}, H = {params['hidden']:,}, V = {params['classes']:,}, {params['dtype']}"
    figure.suptitle(f"Loss of the chosen rows: {shape}")
    return figure


def memory(document: Mapping[str, Any]) -> Figure | None:
    """Bars of the peak beyond inputs and results: a panel each for the first score and for the losses of fewest and most rows."""
    cases: dict[str, dict[str, float]] = {}
    for r in (*_measured(document, "score"), *sorted(_measured(document, "loss"), key=lambda r: r["params"]["gamma"])):
        if r.get("extra_bytes") is not None and r["contender"] in COLORS:
            cases.setdefault(r["case"], {})[r["contender"]] = r["extra_bytes"] / 2**20
    if not cases:
        return None
    scores, losses = ([case for case in cases if case.startswith(kind)] for kind in ("score", "loss"))
    cases = {case: cases[case] for case in (*scores[:1], *losses[:1], *losses[1:][-1:])}
    counts = [len(found) for found in cases.values()]
    figure, panels = plt.subplots(
        len(cases), 1, figsize=(9, 0.9 + sum(0.75 + 0.22 * n for n in counts)), squeeze=False, layout="constrained",
        height_ratios=[0.75 + 0.22 * n for n in counts],
    )  # fmt: skip
    for axes, (case, found) in zip(panels[:, 0], cases.items(), strict=True):
        names = [name for name in COLORS if name in found]
        values = [found[name] for name in names]
        bars = axes.barh(range(len(names)), values, color=[COLORS[name] for name in names])
        axes.bar_label(bars, [f"{value:,.1f}" for value in values], fontsize=7, padding=2)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * max(*values, 1e-3))
        axes.set_title(case, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("peak memory beyond inputs and results, MiB")
    figure.suptitle("Memory")
    return figure
