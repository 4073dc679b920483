"""What the demo says: a summary of the runs, tables on the terminal, results.json."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from adaselect_kernels import doctor
from adaselect_kernels.demo.config import VARIANTS, DemoConfig, Variant
from adaselect_kernels.training.files import replace_file

PARTS = ("scoring", "selection", "update", "other")
CAVEAT = "A small task on a CPU: whether fewer backward passes pay off depends on the task and the hardware."


def new_results(config: DemoConfig) -> dict[str, Any]:
    """Results without runs; `save` keeps the file complete after every run that is added."""
    return {
        "config": asdict(config) | {"candidates": config.candidates, "threads": torch.get_num_threads()},
        "versions": doctor.versions(),
        "interrupted": False,
        "runs": [],
        "summary": [],
        "selection_cost": [],
    }


def save(results: dict[str, Any], path: Path) -> None:
    """Write results.json, whole or not at all."""
    text = json.dumps(results, indent=1, allow_nan=False)
    replace_file(path, lambda file: file.write(text.encode()))


def summarise(config: DemoConfig, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant that has runs: means over its seeds, and its time beside that of no selection."""
    by_variant = [(v, [run for run in runs if run["variant"] == v.label]) for v in VARIANTS]
    rows = [_summary_row(config, variant, of) for variant, of in by_variant if of]
    plain = next((row for row in rows if row["variant"] == VARIANTS[0].label), None)
    if plain is not None:
        forward = plain["seconds"]["update"] / 3 / plain["backward_samples"]  # an update is forward and backward: 3 F
        for row in rows:
            row["time_ratio"] = row["seconds"]["total"] / plain["seconds"]["total"]
            row["measured_scoring_cost"] = row["seconds"]["scoring"] / config.candidates / forward
            row["no_selection_at_same_time"] = _plain_accuracy_at_same_time(runs, row["variant"])
    return rows


def _summary_row(config: DemoConfig, variant: Variant, runs: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = [run["accuracy"] for run in runs]
    return {
        "variant": variant.label,
        "seeds": [run["seed"] for run in runs],
        "accuracy_mean": mean(accuracies),
        "accuracy_std": stdev(accuracies) if len(runs) > 1 else None,
        "backward_samples": runs[0]["backward_samples"],
        "updates": runs[0]["updates"],
        "seconds": {part: mean(run["seconds"][part] for run in runs) for part in (*PARTS, "total")},
        "time_ratio": None,
        "expected_time_ratio": config.expected_time_ratio(variant),
        "measured_scoring_cost": None,
        "no_selection_at_same_time": None,
    }


def _plain_accuracy_at_same_time(runs: list[dict[str, Any]], variant: str) -> float:
    """Accuracy without selection once it has trained as long as `variant`, of the same seed, did in all.

    Linear between evaluations; mean over the seeds.
    """
    plain = {run["seed"]: run["curve"] for run in runs if run["variant"] == VARIANTS[0].label}
    accuracies = []
    for run in runs:
        if run["variant"] == variant:
            curve = plain[run["seed"]]
            seconds, accuracy = ([point[axis] for point in curve] for axis in ("seconds", "accuracy"))
            accuracies.append(float(np.interp(run["seconds"]["total"], seconds, accuracy)))
    return mean(accuracies)


def print_results(console: Console, results: dict[str, Any]) -> None:
    """The tables, and what they do not show."""
    if results["summary"]:
        console.print(_accuracy_table(results))
        console.print(_time_table(results))
        console.print(_expectation(results["summary"]), style="dim")
    if results["selection_cost"]:
        console.print(_cost_table(results["selection_cost"]))
        if all(cost["naive_over_kernels"] is None for cost in results["selection_cost"]):
            console.print(
                "Naive PyTorch (benchmarks/naive.py) is not part of the package: run the demo from a checkout."
            )
    console.print(CAVEAT)


def table(title: str, *columns: str) -> Table:
    """A table that fits 80 columns: the first column is text, the others are numbers."""
    table = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    return table


def _accuracy_table(results: dict[str, Any]) -> Table:
    config = results["config"]
    seeds = len({run["seed"] for run in results["runs"]})
    title = f"Test accuracy in %, {'mean ± std over ' if seeds > 1 else ''}{seeds} seed{'s' * (seeds > 1)}"
    made = table(
        f"{title}; {config['candidates']:,} candidates, gamma {config['gamma']:g}",
        *("variant", "accuracy", "no selection,\nsame time", "backward\nsamples", "updates"),
    )
    for row in results["summary"]:
        spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.1f}"
        plain = row["no_selection_at_same_time"]
        made.add_row(
            row["variant"],
            f"{100 * row['accuracy_mean']:.1f}{spread}",
            "-" if plain is None else f"{100 * plain:.1f}",
            f"{row['backward_samples']:,}",
            str(row["updates"]),
        )
    return made


def _time_table(results: dict[str, Any]) -> Table:
    title = f"Training time in seconds, {results['config']['threads']} CPU thread; ratio: over no selection"
    made = table(title, "variant", "score", "select", "update", "total", "ratio", "expected")
    for row in results["summary"]:
        times = [f"{row['seconds'][part]:.2f}" for part in ("scoring", "selection", "update", "total")]
        ratio = "-" if row["time_ratio"] is None else f"{row['time_ratio']:.2f}"
        made.add_row(row["variant"], *times, ratio, f"{row['expected_time_ratio']:.2f}")
    return made


def _expectation(summary: list[dict[str, Any]]) -> str:
    text = "expected: (s + 3 gamma) / 3; s = 1, as if a scoring forward cost a training forward; uniform does not score, s = 0."
    scored = {variant.label for variant in VARIANTS if variant.policy and variant.scored}
    measured = [row["measured_scoring_cost"] for row in summary if row["variant"] in scored]
    measured = [cost for cost in measured if cost is not None]
    return f"{text} Measured here: s = {mean(measured):.2f}." if measured else text


def _cost_table(costs: list[dict[str, Any]]) -> Table:
    n, classes = costs[0]["shape"]
    title = f"Selection alone in µs a call, on the {n} x {classes} batches that training saw"
    made = table(title, "variant", f"kernels ({costs[0]['implementation']})", "naive PyTorch", "ratio", "same rows")
    for cost in costs:
        times = {name: f"{t['median']:.1f}" for name, t in cost["microseconds"].items()}
        ratio = cost["naive_over_kernels"]
        made.add_row(
            cost["variant"],
            times["kernels"],
            times.get("naive", "-"),
            "-" if ratio is None else f"{ratio:.1f}x",
            _verdict(cost["agreement"]),
        )
    return made


def _verdict(agreement: dict[str, int] | None) -> str:
    if agreement is None:
        return "-"
    if agreement["wrong"]:
        return f"NO: {agreement['wrong']} of {agreement['rows']:,} differ"
    ties = f", {agreement['near_ties']} near ties" if agreement["near_ties"] else ""
    return f"yes ({agreement['rows']:,}{ties})"
