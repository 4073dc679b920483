"""PNGs from a group's result document; each names the device, the file, its command and the commit it was drawn from."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.end_to_end.drawing import time_split
from benchmarks.linear import drawing as linear
from benchmarks.micro.case import DTYPES
from benchmarks.micro.growth import PARAMETERS

COLORS = {
    "ours": "#0b6e4f",
    "naive": "#c1666b",
    "topk": "#c1666b",
    "compiled": "#d4a017",
    "read": "#777777",
    "copy": "#aaaaaa",
}
FOOTER_INCHES = 0.25
GRAPH_PEERS = ("naive", "compiled", "naive_graph", "compiled_graph")

Document = Mapping[str, Any]
Drawings = Mapping[str, Mapping[str, Callable[[Document], Figure | None]]]


def file_name(group: str, kind: str, folder: str) -> str:
    return f"{'-'.join(filter(None, (group, kind)))}-{folder}.png"


def draw(
    groups: Mapping[str, Document], out: Path, folder: str, drawings: Drawings | None = None
) -> dict[str, list[Path]]:
    """Draw the figures of each group, by DRAWINGS or those given; returns the files by group."""
    found: dict[str, list[Path]] = {}
    for name, document in groups.items():
        for kind, drawing in (DRAWINGS if drawings is None else drawings).get(name, {}).items():
            figure = drawing(document) if any(_measured(document)) else None
            if figure is None:
                continue
            env = document["environment"]
            commit = (env["commit"] or "unknown")[:12] + ("+changes" if env["dirty"] else "")
            source = f"{env['device']}; {folder}/{name}.json by `{document['command']}` at {commit}, {env['date']}"
            source += "; a quick run, not a measurement" * document["quick"]
            # the line that names the source, below what is drawn
            margin = FOOTER_INCHES / figure.get_figheight()
            figure.set_layout_engine("constrained", rect=(0, margin, 1, 1 - margin))
            figure.text(0.01, margin / 3, source, fontsize=7, color="#555555")
            out.mkdir(parents=True, exist_ok=True)
            path = out / file_name(name, kind, folder)
            figure.savefig(path, dpi=140, metadata={"Software": None})
            plt.close(figure)
            found.setdefault(name, []).append(path)
    return found


def _measured(document: Document) -> list[Mapping[str, Any]]:
    return [r for r in document["records"] if r["status"] == "measured"]


def _series(document: Document, **params: Any) -> dict[str, list[Mapping[str, Any]]]:
    """Measured records with these parameters, by contender."""
    found = defaultdict(list)
    for record in _measured(document):
        if all(record["params"][name] == value for name, value in params.items()):
            found[record["contender"]].append(record)
    return found


def _line(
    axes: Axes, name: str, xs: list[float], rows: list[Mapping[str, Any]], y: Callable[[float, Any], float]
) -> None:
    """Median with a band of the 20th to 80th percentile, y(us, record) of each."""
    order = sorted(range(len(xs)), key=xs.__getitem__)
    xs, rows = [xs[i] for i in order], [rows[i] for i in order]
    at = {q: [y(r["us"][q], r) for r in rows] for q in ("p20", "p50", "p80")}
    color = COLORS.get(name)
    drawn = axes.plot(xs, at["p50"], marker="o", markersize=3, label=name.replace("_", " "), color=color)
    axes.fill_between(xs, at["p20"], at["p80"], alpha=0.2, color=drawn[0].get_color(), linewidth=0)


def _speedups(document: Document) -> Figure:
    """How many times longer the peers take, a group of bars a case."""
    rows = [r for r in _measured(document) if r["contender"] in GRAPH_PEERS and r["ratio"] is not None]
    cases = list(dict.fromkeys(r["case"] for r in rows))
    names = [name for name in GRAPH_PEERS if any(r["contender"] == name for r in rows)]
    figure, axes = plt.subplots(figsize=(9, 0.5 + 0.42 * max(3, len(cases))), layout="constrained")
    height = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        found = {r["case"]: r["ratio"] for r in rows if r["contender"] == name}
        places = [cases.index(case) + (i - (len(names) - 1) / 2) * height for case in found]
        medians = [ratio["p50"] for ratio in found.values()]
        low = [ratio["p50"] - ratio["p20"] for ratio in found.values()]
        high = [ratio["p80"] - ratio["p50"] for ratio in found.values()]
        label = f"over {name.replace('_', ' ')}"
        axes.barh(places, medians, height, xerr=[low, high], label=label, color=COLORS.get(name), error_kw={"lw": 0.8})
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    ends = [f(r["ratio"][q] for r in rows) for f, q in ((min, "p20"), (max, "p80"))]
    axes.set_xlim(min(0.85, ends[0] / 1.15), 1.15 * ends[1])
    axes.set_xlabel("speed-up of ours (time of the other over ours, median of rounds)")
    axes.set_title(document["title"])
    axes.legend(fontsize=8)
    return figure


def _bandwidth(document: Document) -> Figure:
    """Bytes that must move over the time, over the number of classes, one panel a dtype."""
    dtypes = list(dict.fromkeys(r["params"]["dtype"] for r in _measured(document)))
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(5 * len(dtypes) + 1.5, 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        for name, rows in _series(document, dtype=dtype).items():
            if name != "copy":
                moved = _logits_bytes if name == "read" else (lambda r: r["bytes"])
                _line(
                    axes, name, [r["params"]["classes"] for r in rows], rows, lambda us, r, of=moved: of(r) / us / 1e3
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("classes")
        axes.set_title(dtype)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("GB/s of the fewest bytes")
    panels[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(document["title"])
    return figure


# Operations a logit that the statistics cannot do without (compare, subtract, exponential, multiply, add, each one).
OPERATIONS = {
    "loss": 4,  # maximum; z - m; exponential; sum
    "loss and gradient norm": 6,  # and the sum of squares
    "every statistic": 15,  # and sum e x, the runner-up, rank and NaN
}
ASKED = {"all_stats": "every statistic", "liger": "loss", "quack": "loss", "flash_attn": "loss"}


def _roofline(document: Document) -> Figure | None:
    """Operations a second over operations a byte, below the roof of the fastest read of the same run."""
    rows = [r for r in _measured(document) if r["cache"] == "cold"]
    rates = {name: max((_rate(r) for r in rows if r["contender"] == name), default=None) for name in ("read", "copy")}
    if rates["read"] is None:
        return None
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    names = [name for name in dict.fromkeys(r["contender"] for r in rows) if name not in rates]
    intensities = []
    for i, name in enumerate(names):
        operations = OPERATIONS[ASKED.get(name, "loss and gradient norm")]
        own = [r for r in rows if r["contender"] == name]
        count = [operations * r["params"]["n"] * r["params"]["classes"] for r in own]
        intensity = [c / r["bytes"] for c, r in zip(count, own, strict=True)]
        intensities += intensity
        # a few percent aside, so that contenders of one function do not hide each other
        xs = [x * 1.04 ** (i - len(names) / 2) for x in intensity]
        ys = [c / r["us"]["p50"] / 1e3 for c, r in zip(count, own, strict=True)]
        label = f"{name.replace('_', ' ')} ({operations} a logit)"
        axes.scatter(xs, ys, s=18, label=label, color=COLORS.get(name), alpha=0.8, zorder=3)
    ends = [min(intensities) * 0.7, max(intensities) * 1.5]
    for name, style in (("read", "-"), ("copy", "--")):
        if rates[name] is not None:
            label = f"roof: {name}, {rates[name]:,.1f} GB/s"
            axes.plot(ends, [rates[name] * x for x in ends], style, color="black", linewidth=1, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("operations that the function needs, a byte that it must move")
    axes.set_ylabel("10^9 of those operations a second")
    axes.set_title("a point a shape and type; the roof of arithmetic was not measured", fontsize=9)
    figure.suptitle(f"{document['title']}: roofline")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _rate(record: Mapping[str, Any]) -> float:
    """GB/s of a read or a copy of the case's logits."""
    return _logits_bytes(record) * (2 if record["contender"] == "copy" else 1) / record["us"]["p50"] / 1e3


def _logits_bytes(record: Mapping[str, Any]) -> int:
    params = record["params"]
    return params["n"] * params["classes"] * DTYPES[params["dtype"]].itemsize


def _topk(document: Document) -> Figure:
    """Time over N at one share k/N, and over that share where several were measured at one N."""
    rows = [r for r in _measured(document) if not r["params"]["ties"]]
    shares_at: dict[int, set[float]] = defaultdict(set)
    for row in rows:
        shares_at[row["params"]["n"]].add(row["params"]["share"])
    share = max(sorted({r["params"]["share"] for r in rows}), key=[r["params"]["share"] for r in rows].count)
    panels = [("share", share, "n", "scores N", f"k = {share:g} N")]
    panels += [("n", n, "share", "k / N", f"N = {n:,}") for n, found in sorted(shares_at.items()) if len(found) > 1]
    figure, every = plt.subplots(
        1, len(panels), figsize=(max(9, 4 * len(panels)), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (fixed, value, over, label, title) in zip(every[0], panels, strict=True):
        for name, found in _series(document, ties=False, **{fixed: value}).items():
            if name != "copy":
                _line(axes, name, [r["params"][over] for r in found], found, lambda us, r: us)
        axes.set_xscale("log" if over == "n" else "linear")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    every[0][0].set_ylabel("microseconds")
    every[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(document["title"])
    return figure


def _speedup_over(document: Document) -> Figure | None:
    """How many times longer the naive step takes, over N and over C."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, (sweep, fixed) in zip(panels, (("N", "C"), ("C", "N")), strict=True):
        for name, rows in _series(document, sweep=sweep).items():
            rows = [r for r in rows if r["ratio"] is not None]
            if name == "ours" or not rows:
                continue
            rows.sort(key=lambda r: r["params"][PARAMETERS[sweep]])
            xs = [r["params"][PARAMETERS[sweep]] for r in rows]
            at = {q: [r["ratio"][q] for r in rows] for q in ("p20", "p50", "p80")}
            color = COLORS.get(name)
            drawn = axes.plot(xs, at["p50"], marker="o", markersize=3, label=name.replace("_", " "), color=color)
            axes.fill_between(xs, at["p20"], at["p80"], alpha=0.2, color=drawn[0].get_color(), linewidth=0)
            axes.set_title(f"{fixed} = {rows[0]['params'][PARAMETERS[fixed]]:,}", fontsize=10)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.set_xlabel(sweep)
        axes.grid(alpha=0.3, which="both")
    if not panels[0].lines[1:]:
        plt.close(figure)
        return None
    panels[0].set_ylabel("time of the other over ours")
    panels[0].legend(fontsize=8)
    figure.suptitle("Selection step: speed-up of ours")
    return figure


def _growth(document: Document) -> Figure:
    """Time over each swept parameter, with the fitted exponent in the legend."""
    slopes = {(f["sweep"], f["contender"]): f["slope"] for f in document["fits"] if f["quantity"] == "time"}
    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for axes, (sweep, parameter) in zip(panels.flat, PARAMETERS.items(), strict=True):
        for name, rows in _series(document, sweep=sweep).items():
            _line(axes, name, [r["params"][parameter] for r in rows], rows, lambda us, r: us)
            slope = slopes.get((sweep, name))
            axes.lines[-1].set_label(name if slope is None else f"{name}, exponent {slope:.2f}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = sorted({r["params"][parameter] for r in _measured(document) if r["params"]["sweep"] == sweep})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(sweep)
        axes.set_ylabel("microseconds")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.suptitle(document["title"])
    return figure


def _over_plain(document: Document) -> Figure | None:
    """Per-sample gradient norms: the time of each way over a plain forward and backward, a group of bars a case."""
    rows = _measured(document)
    plain = {r["case"]: r["us"]["p50"] for r in rows if r["contender"] == "plain"}
    rows = [r for r in rows if r["case"] in plain and r["contender"] != "plain"]
    if not rows:
        return None
    cases, names = (list(dict.fromkeys(r[key] for r in rows)) for key in ("case", "contender"))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.2 * len(names) * len(cases)), layout="constrained")
    height = 0.85 / len(names)
    for i, name in enumerate(names):
        own = [r for r in rows if r["contender"] == name]
        places = [cases.index(r["case"]) + (i - (len(names) - 1) / 2) * height for r in own]
        at = {q: [r["us"][q] / plain[r["case"]] for r in own] for q in ("p20", "p50", "p80")}
        spread = [[m - low for low, m in zip(at["p20"], at["p50"], strict=True)]]
        spread.append([high - m for m, high in zip(at["p50"], at["p80"], strict=True)])
        label = name.replace("_", " ")
        drawn = axes.barh(places, at["p50"], height, xerr=spread, label=label, error_kw={"lw": 0.8})
        axes.bar_label(drawn, [f"{m:.2f}" for m in at["p50"]], label_type="center", fontsize=6, color="white")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time over that of a plain forward and backward (median, 20th to 80th percentile)")
    axes.set_title(document["title"])
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


# group -> kind of figure -> drawing; None where there is too little to draw
DRAWINGS: Drawings = {
    "fused_select": {"": _speedups},
    "per_sample_stats": {"": _bandwidth, "roofline": _roofline},
    "select_topk": {"": _topk},
    "growth": {"": _growth, "speedup": _speedup_over},
    "grad_norms": {"": _over_plain},
    "linear": {"": linear.rate, "gamma": linear.over_gamma, "memory": linear.memory},
    "end_to_end": {"": time_split},
}
