"""The demo from start to end: every run, what is kept of it, and an orderly end when interrupted."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from adaselect_kernels.demo import figures, report
from adaselect_kernels.demo.config import VARIANTS, DemoConfig, Variant
from adaselect_kernels.demo.replay import Batches, method_weights, new_policy, selection_cost
from adaselect_kernels.demo.task import Digits, load_task, small_cnn
from adaselect_kernels.demo.train import one_thread, train, warm_up
from adaselect_kernels.training import Plan, PlanWarning, plan

RESULTS = "results.json"


def run(config: DemoConfig, folder: Path) -> bool:
    """Train every variant with every seed, write tables, figures and results.json to `folder`; False if interrupted.

    An interruption (KeyboardInterrupt) drops the unfinished run and reports the finished ones. Every file is replaced
    whole, so that none is ever half-written.
    """
    console = Console()
    folder.mkdir(exist_ok=True)
    with one_thread():
        return _run(config, folder, console)


def _run(config: DemoConfig, folder: Path, console: Console) -> bool:
    results = report.new_results(config)
    try:
        _run_all(config, results, folder / RESULTS, console)
    except KeyboardInterrupt:
        results["interrupted"] = True
        console.print("Interrupted: what follows is of the finished runs.", style="yellow")
    if not results["runs"]:
        return False
    report.save(results, folder / RESULTS)
    written = figures.draw(results, folder)
    report.print_results(console, results)
    console.print(f"Written: {', '.join(str(path) for path in (folder / RESULTS, *written))}")
    return not results["interrupted"]


def _run_all(config: DemoConfig, results: dict[str, Any], path: Path, console: Console) -> None:
    task = load_task()
    runs = [(config.seed + i, variant) for i in range(config.repeats) for variant in VARIANTS]
    recorded: list[tuple[Variant, Batches]] = []  # of the first seed
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("time left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        total = sum(config.epochs * config.expected_time_ratio(variant) for _, variant in runs)
        bar = progress.add_task("warming up", total=total)
        warm_up(config, task)
        progress.console.print(_plan(config, task).table(), highlight=False)
        for seed, variant in runs:
            progress.update(bar, description=f"seed {seed}, {variant.label}")
            step = config.expected_time_ratio(variant)
            entry, batches = _one_run(config, variant, seed, task, lambda step=step: progress.advance(bar, step))
            if seed == config.seed and variant.methods:
                recorded.append((variant, batches))
            results["runs"].append(entry)
            results["summary"] = report.summarise(config, results["runs"])
            report.save(results, path)
        for variant, batches in recorded:
            progress.update(bar, description=f"cost of selection, {variant.label}")
            results["selection_cost"].append(selection_cost(config, variant, config.seed, batches))


def _plan(config: DemoConfig, task: Digits) -> Plan:
    """What AdaSelection should cost here, measured on a model that is thrown away; a warning is part of the table."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)
        model = small_cnn(config.width)
        optimizer = torch.optim.SGD(model.parameters(), config.learning_rate, momentum=config.momentum)
        batch = task.train_images[: config.batch_size], task.train_labels[: config.batch_size]
        return plan(model, batch, config.gamma, policy="adaselection", optimizer=optimizer)


def _one_run(
    config: DemoConfig, variant: Variant, seed: int, task: Digits, after_epoch: Callable[[], object]
) -> tuple[dict[str, Any], Batches]:
    entry, batches = train(config, variant, seed, task, after_epoch)
    if variant.methods:
        entry["method_weights"] = method_weights(new_policy(config, variant, seed), batches)
    return entry, batches
