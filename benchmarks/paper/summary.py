"""summary.json of an experiment: every finished run's configuration, commit, curve and final metrics, and nothing else."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaselect_kernels.training.files import replace_file
from benchmarks.paper import run as runs
from benchmarks.paper.settings import METHODS, RunConfig
from benchmarks.paper.settings import runs as all_runs
from benchmarks.paper.tasks import Experiment

FORMAT = 1
NAME = "summary.json"
CURVE = ("epoch", "updates", "seconds", "train_loss", "validation", "test")


def collect(
    experiment: Experiment,
    folder: Path,
    costs: Mapping[str, float] | None,
    train_rows: int,
    device: str,
    smoke: bool,
    *,
    data: Mapping[str, Any],
    command: str,
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """The summary of the finished runs in folder / "runs" that are of the present settings of the experiment."""
    found = {slug: (config, done, lines) for slug, config, done, lines in _finished(folder / "runs")}
    rates = sorted({config["config"]["gamma"] for config, _, _ in found.values()} - {None})
    seeds = sorted({config["config"]["seed"] for config, _, _ in found.values()})
    methods = [method for method in METHODS.values() if costs is not None or method.key != "scored"]
    expected = all_runs(experiment, methods, rates, seeds, costs, train_rows, device, smoke)
    environments: list[dict[str, Any]] = []
    entries = [_entry(config, *found[config.slug], environments) for config in expected if config.slug in found]
    commands = [command]
    if (folder / NAME).exists():
        commands = list(dict.fromkeys([*read(folder / NAME)["commands"], command]))
    return {
        "format": FORMAT,
        "experiment": experiment.name,
        "title": experiment.title,
        "task": experiment.task,
        "metric": experiment.metric,
        "higher_is_better": experiment.higher_is_better,
        "smoke": smoke,
        "commands": commands,
        "data": dict(data),
        "costs": None if costs is None else dict(costs),
        "environments": environments,
        "failed": dict(failed),
        "runs": entries,
    }


def _finished(folder: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    for path in sorted(folder.glob(f"*/{runs.DONE}")):
        home = path.parent
        lines = [json.loads(line) for line in (home / runs.RECORDS).read_text().splitlines()]
        yield home.name, json.loads((home / runs.CONFIG).read_text()), json.loads(path.read_text()), lines


def _entry(
    config: RunConfig,
    document: Mapping[str, Any],
    done: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    environments: list[dict[str, Any]],
) -> dict[str, Any]:
    environment = document["environment"]
    if environment not in environments:
        environments.append(environment)
    curve: dict[str, Any] = {name: [_rounded(line[name]) for line in lines] for name in CURVE}
    if lines and lines[0]["weights"] is not None:
        curve["weights"] = {
            method: [_rounded(line["weights"][method]) for line in lines] for method in lines[0]["weights"]
        }
    return {
        "directory": config.slug,
        "config": config.as_dict(),
        "commit": document["commit"],
        "dirty": document["dirty"],
        "resumed_at": document["resumed_at"],
        "environment": environments.index(environment),
        "final": {name: _rounded(value) for name, value in done.items()},
        "curve": curve,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write(path: Path, summary: Mapping[str, Any]) -> None:
    """A line a run, so that a change of one run is a change of one line."""
    head = {name: value for name, value in summary.items() if name != "runs"}
    lines = ",\n".join("  " + json.dumps(entry, separators=(",", ":"), allow_nan=False) for entry in summary["runs"])
    text = json.dumps(head, indent=1, allow_nan=False)[:-2] + f',\n "runs": [\n{lines}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: file.write(text.encode()))


def read(path: Path) -> dict[str, Any]:
    """ValueError when it is not a summary of this format."""
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path}: not a summary of format {FORMAT}")
    return document
