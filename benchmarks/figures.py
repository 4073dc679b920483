"""One PNG a group, from its result document; each names the device, the file and the commit it was drawn from."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def file_name(group: str, folder: str) -> str:
    return f"{group}-{folder}.png"


def draw(groups: Mapping[str, Document], out: Path, folder: str) -> list[Path]:
    """Draw each group that has a figure; returns the files, in the order of the groups."""
    found = []
    for name, document in groups.items():
        if name in DRAWINGS and any(r["status"] == "measured" for r in document["records"]):
            figure = DRAWINGS[name](document)
            env = document["environment"]
            commit = (env["commit"] or "unknown")[:12] + ("+changes" if env["dirty"] else "")
            source = f"{env['device']}; {folder}/{name}.json at {commit}, {env['date']}"
            source += "; a quick run, not a measurement" * document["quick"]
            # the line that names the source, below what is drawn
            margin = FOOTER_INCHES / figure.get_figheight()
            figure.set_layout_engine("constrained", rect=(0, margin, 1, 1 - margin))
            figure.text(0.01, margin / 3, source, fontsize=7, color="#555555")
            out.mkdir(parents=True, exist_ok=True)
            path = out / file_name(name, folder)
            figure.savefig(path, dpi=140, metadata={"Software": None})
            plt.close(figure)
            found.append(path)
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
    axes.set_xlabel("speed-up of ours (time of the other over ours, median of rounds)")
    axes.set_title(document["title"])
    axes.legend(fontsize=8)
    return figure


def _bandwidth(document: Document) -> Figure:
    """Bytes that must move over the time, over the number of classes, one panel a dtype."""
    dtypes = list(dict.fromkeys(r["params"]["dtype"] for r in _measured(document)))
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(5 * len(dtypes), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        for name, rows in _series(document, dtype=dtype).items():
            if name != "copy":
                _line(axes, name, [r["params"]["classes"] for r in rows], rows, lambda us, r: r["bytes"] / us / 1e3)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("classes")
        axes.set_title(dtype)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("GB/s of the fewest bytes")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(document["title"])
    return figure


def _topk(document: Document) -> Figure:
    """Time over N, one panel a share k/N."""
    shares = sorted({r["params"]["share"] for r in _measured(document)})
    figure, panels = plt.subplots(
        1, len(shares), figsize=(max(9, 5 * len(shares)), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, share in zip(panels[0], shares, strict=True):
        wanted = _series(document, share=share, ties=False)
        for name, rows in wanted.items():
            if name != "copy":
                _line(axes, name, [r["params"]["n"] for r in rows], rows, lambda us, r: us)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("scores N")
        axes.set_title(f"k = {share:g} N")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("microseconds")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(document["title"])
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


DRAWINGS: dict[str, Callable[[Document], Figure]] = {
    "fused_select": _speedups,
    "per_sample_stats": _bandwidth,
    "select_topk": _topk,
    "growth": _growth,
}
