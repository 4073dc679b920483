"""The figure of this group: bars of the time split, the limit beside them."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.end_to_end.settings import STAGES

COLORS = {"score": "#7aa6c2", "select": "#c1666b", "update": "#d9d4c7"}
LABELS = {"score": "scoring forward", "select": "selecting", "update": "k / N of an update"}
BARS = (("naive", -0.21), ("ours", 0.21))
WIDTH = 0.38


def time_split(document: Mapping[str, Any]) -> Figure | None:
    """A panel a type and mode: time a candidate batch over that of a step without selection, by sampling rate."""
    kinds: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for r in document["records"]:
        if r["status"] == "measured" and "over_plain" in r:
            kind = (r["params"]["dtype"], r["params"]["mode"])
            kinds.setdefault(kind, {}).setdefault(r["params"]["gamma"], {})[r["contender"]] = r
    if not kinds:
        return None
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(max(7, 4.2 * columns), 3.8 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(kinds) :]:
        axes.set_visible(False)
    for axes, ((dtype, mode), found) in zip(panels.flat, kinds.items(), strict=False):
        _panel(axes, found)
        axes.set_title(f"{dtype}, {mode}", fontsize=10)
    panels[0][0].legend(fontsize=7, loc="upper left")
    for row in panels:
        row[0].set_ylabel("time / step without selection")
    figure.suptitle(f"{document['title']} (left bar naive, right bar ours)", fontsize=11)
    return figure


def _panel(axes: Axes, found: Mapping[float, Mapping[str, Any]]) -> None:
    gammas = sorted(found)
    for name, offset in BARS:
        for at, gamma in enumerate(gammas):
            record = found[gamma].get(name)
            if record is None:
                continue
            # the median of each part, in the proportions that make the bar the median ratio
            medians, bottom = {stage: record["split_us"][stage]["p50"] for stage in STAGES}, 0.0
            for stage in STAGES:
                height = medians[stage] * record["over_plain"]["p50"] / sum(medians.values())
                axes.bar(at + offset, height, WIDTH, bottom, color=COLORS[stage])
                bottom += height
            ends = record["over_plain"]
            axes.vlines(at + offset, ends["p20"], ends["p80"], color="black", linewidth=0.8)
    limits = [next((r["limit"]["p50"] for r in found[g].values() if "limit" in r), float("nan")) for g in gammas]
    for at, value in enumerate(limits):
        axes.hlines(value, at - 0.45, at + 0.45, color="black", linewidth=1.5)
    axes.axhline(1, color="#777777", linewidth=0.8, linestyle="--")
    for stage in STAGES:
        axes.bar(0, 0, color=COLORS[stage], label=LABELS[stage])
    axes.plot([], [], color="black", linewidth=1.5, label="limit (s + 3 k/N) / 3")
    axes.plot([], [], color="#777777", linewidth=0.8, linestyle="--", label="no selection")
    axes.set_xticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
    axes.set_xlabel("sampling rate gamma")
