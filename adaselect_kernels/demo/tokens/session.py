"""The comparison from start to end: every seed, what is kept of it, and how it goes on after an interruption."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from adaselect_kernels.demo.report import save
from adaselect_kernels.demo.tokens import figures, report
from adaselect_kernels.demo.tokens.config import VARIANTS, TokensConfig
from adaselect_kernels.demo.tokens.corpus import Corpus, load_text, make_corpus
from adaselect_kernels.demo.tokens.train import reference_run, runs_of_seed

_WARM_UP = 2  # steps


def run(config: TokensConfig, folder: Path, files: Sequence[Path] = ()) -> bool:
    """Compare, and write tokens_VOCABULARY.json and .png to `folder`; False if interrupted.

    files: the text, one after the other; none: the sources of Python's standard library.
    A seed that is finished is kept: the same call, with the same text and versions, goes on after it. An interruption
    (KeyboardInterrupt) drops the seed that was running. Raises ValueError for a text that is missing or too short.
    """
    console = Console()
    corpus = make_corpus(*load_text(files), config)
    folder.mkdir(exist_ok=True)
    path = folder / f"tokens_{config.vocabulary}.json"
    results = _resumed(report.new_results(config, corpus), path, console)
    console.print(report.introduction(config, corpus), highlight=False)
    try:
        _run_all(config, corpus, results, path, console)
        results["interrupted"] = False
    except KeyboardInterrupt:
        console.print("Interrupted: the same command goes on after the seeds that are finished.", style="yellow")
    if not results["runs"]:
        return False
    save(results, path)
    figure = figures.draw(results, path.with_suffix(".png"))
    report.print_results(console, results)
    console.print(f"Written: {path}, {figure}")
    return not results["interrupted"]


def _resumed(fresh: dict[str, Any], path: Path, console: Console) -> dict[str, Any]:
    """What `path` holds, if it is of the same settings, text and versions; otherwise `fresh`."""
    if not path.is_file():
        return fresh
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        same = all(results[key] == json.loads(json.dumps(fresh[key])) for key in report.IDENTITY)
    except (ValueError, KeyError, TypeError):
        results, same = fresh, False
    if not same:
        console.print(f"{path} is of another comparison and will be replaced.", style="yellow")
        return fresh
    done = len(results["references"])
    console.print(f"{path} has {done} finished seeds of this comparison: they are kept. Remove it to measure anew.")
    return results | {"interrupted": True}


def _run_all(config: TokensConfig, corpus: Corpus, results: dict[str, Any], path: Path, console: Console) -> None:
    done = {entry["seed"] for entry in results["references"]}
    seeds = [seed for seed in range(config.seed, config.seed + config.seeds) if seed not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("time left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("warming up", total=len(seeds) * (len(VARIANTS) + 1) * config.seconds)
        if seeds:
            _warm_up(config, corpus)
        for seed in seeds:

            def show(what: str, seed: int = seed) -> None:
                progress.update(bar, description=f"seed {seed}, {what}", advance=config.seconds / config.turns)

            reference, entries = _one_seed(config, seed, corpus, show)
            results["references"].append(reference)
            results["runs"] += entries
            results["summary"] = report.summarise(results["runs"])
            save(results, path)


def _one_seed(
    config: TokensConfig, seed: int, corpus: Corpus, show: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The reference model alone, then all variants in turns, so that what else the machine does meets them alike."""
    ends = [config.seconds * (turn + 1) / config.turns for turn in range(config.turns)]
    reference = reference_run(config, seed, corpus)
    for end in ends:
        reference.train_until(end)
        show("reference model")
    reference.evaluate()
    runs = runs_of_seed(config, VARIANTS, seed, corpus, reference.model)
    for end in ends:
        for one in runs:
            one.train_until(end)
            one.evaluate()
            show(one.variant.label)
    busy = {"variant": "reference model", "seed": seed, "load": _load()}
    return reference.entry() | busy, [one.entry() for one in runs]


def _load() -> float | None:
    """Processes that ran or waited over the last minute, this one included; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _warm_up(config: TokensConfig, corpus: Corpus) -> None:
    """A few steps of models that are thrown away: the first calls of a process are slower than the others."""
    reference = config.model(corpus.vocabulary)
    for one in runs_of_seed(config, VARIANTS, 0, corpus, reference):
        for _ in range(_WARM_UP):
            one.step()
