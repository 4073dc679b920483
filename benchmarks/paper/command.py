"""Run one of the papers' experiments, or write docs/experiments.md from their results."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from adaselect_kernels.demo.train import one_thread
from adaselect_kernels.training.files import replace_file
from benchmarks import records
from benchmarks.paper import datasets, runner, settings, summary
from benchmarks.paper.run import measure_costs
from benchmarks.paper.settings import RunConfig
from benchmarks.paper.tasks import EXPERIMENTS, Experiment

RESULTS = records.RESULTS / "experiments"
COSTS = "costs.json"
FACTS = ("device", "device_type", "cpu", "threads", "cpu_capability", "python", "torch", "date", "driver", "cuda")
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `adaselect experiment`."""
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}; or report")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the data files, where one is needed")
    where = "default benchmarks/results/experiments/NAME; of a report, the folder of all experiments"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=where)
    parser.add_argument("--workers", type=int, metavar="N", help="runs side by side, default one a core")
    parser.add_argument("--rates", metavar="A,B", help="sampling rates in (0, 1], default those of the experiment")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the candidates")
    parser.add_argument("--methods", metavar="A,B", help=f"methods, or groups of {', '.join(settings.GROUPS)}")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop then; the same command goes on")
    parser.add_argument(
        "--smoke", action="store_true", help="few rows and epochs, one rate, one seed: proves, measures nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Returns the exit code: 0 when all runs are finished, 1 when one failed or the data are wrong, 2, or 130."""
    if options.name == "report":
        return _report(options)
    try:
        experiment, methods, workers = _checked(options)
    except ValueError as error:
        print(f"adaselect experiment: {error}", file=sys.stderr)
        return 2
    try:
        data = datasets.load(experiment.data, options.data)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"adaselect experiment {options.name}: {error}", file=sys.stderr)
        return 1
    if experiment.train is not None or experiment.held_out is not None:
        data = data.limited(experiment.train, experiment.held_out)
    folder = options.output or RESULTS / (experiment.name + "-smoke" * options.smoke)
    with one_thread():
        return _run(options, experiment, methods, workers, data, folder)


def _checked(options: argparse.Namespace) -> tuple[Experiment, list[settings.Method], int]:
    if options.name not in EXPERIMENTS:
        raise ValueError(f"NAME must be one of {', '.join(EXPERIMENTS)}, or report; got {options.name!r}")
    experiment = EXPERIMENTS[options.name]
    if options.smoke:
        experiment = settings.smoke_form(experiment)
    changed: dict[str, Any] = {}
    if options.rates is not None:
        changed["rates"] = _rates(options.rates)
    for name in ("seeds", "epochs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
        if value is not None:
            changed[name] = value
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available")
    names = None if options.methods is None else options.methods.replace(",", " ").split()
    methods = settings.choose_methods(experiment, names, options.smoke)
    return dataclasses.replace(experiment, **changed), methods, workers


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"--rates must be numbers in (0, 1], got {text!r}")
    return rates


def _run(
    options: argparse.Namespace,
    experiment: Experiment,
    methods: list[settings.Method],
    workers: int,
    data: datasets.Data,
    folder: Path,
) -> int:
    from rich.console import Console

    console = Console()
    device = torch.device(
        "cuda"
        if options.device != "cpu" and torch.cuda.is_available() and options.device in ("auto", "cuda")
        else "cpu"
    )
    folder.mkdir(parents=True, exist_ok=True)
    train_rows = len(data.train.targets)
    found = records.environment(device)
    facts = {
        "commit": found["commit"],
        "dirty": found["dirty"],
        "environment": {name: found[name] for name in FACTS if name in found},
    }
    if torch.device(device).type == "cuda":
        facts["environment"]["threads"] = 1
    costs = _costs(experiment, methods, data, folder, device, options.smoke)
    configs = settings.runs(
        experiment, methods, experiment.rates, range(experiment.seeds), costs, train_rows, str(device), options.smoke
    )
    console.print(f"{experiment.title}: {len(configs)} runs in {folder}. {data.note}", highlight=False)
    job = runner.Job(configs, experiment, data, folder / "runs", facts, checkpoint_seconds=5.0)
    outcome = runner.run_all(job, workers, options.time_limit, console)
    document = summary.collect(
        experiment,
        folder,
        costs,
        train_rows,
        str(device),
        options.smoke,
        data={"note": data.note, "differs": data.differs},
        command=command_line(options),
        failed=outcome.failed,
    )
    summary.write(folder / summary.NAME, document)
    console.print(f"{outcome.finished} of {len(configs)} runs are finished; written: {folder / summary.NAME}")
    for slug, error in outcome.failed.items():
        console.print(f"failed: {slug}: {error}", style="red", highlight=False)
    if outcome.stopped:
        console.print("Stopped before the end: the same command goes on.", style="yellow")
        return INTERRUPTED
    return int(bool(outcome.failed))


def _costs(
    experiment: Experiment,
    methods: list[settings.Method],
    data: datasets.Data,
    folder: Path,
    device: torch.device,
    smoke: bool,
) -> dict[str, float] | None:
    """The costs kept in the folder, measured where they are needed and not there yet."""
    path = folder / COSTS
    if path.exists():
        return json.loads(path.read_text())
    if not any(method.key == "scored" for method in methods):
        return None
    rate = [min(experiment.rates, key=lambda r: abs(r - settings.BETA_RATE))]
    method = settings.METHODS[settings.PAPER_SETTING]
    config: RunConfig = settings.runs(
        experiment, [method], rate, [0], None, len(data.train.targets), str(device), smoke
    )[0]
    costs = measure_costs(config, experiment, data.to(device))
    replace_file(path, lambda file: file.write((json.dumps(costs, indent=1) + "\n").encode()))
    return costs


def command_line(options: argparse.Namespace) -> str:
    """The command as a reader would type it, without folders of this machine."""
    parts = ["adaselect experiment", options.name]
    if datasets.LOADERS[EXPERIMENTS[options.name].data][1]:
        parts.append("--data FOLDER")
    for name in ("rates", "seeds", "epochs", "methods"):
        value = getattr(options, name)
        if value is not None:
            parts.append(f"--{name} {value}")
    if options.device != "auto":
        parts.append(f"--device {options.device}")
    return " ".join(parts) + " --smoke" * options.smoke


def _report(options: argparse.Namespace) -> int:
    from benchmarks.paper import report  # needs matplotlib

    try:
        for line in report.write(options.output or RESULTS, records.ROOT / "docs"):
            print(line)
    except (ValueError, OSError) as error:
        print(f"adaselect experiment report: {error}", file=sys.stderr)
        return 1
    return 0
