"""Runs an experiment's list, several processes of one thread each beside one another; interrupted, it goes on where it was."""

import queue
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adaselect_kernels.demo.train import one_thread
from benchmarks.paper import run as runs
from benchmarks.paper.datasets import Data
from benchmarks.paper.settings import RunConfig, expected_cost
from benchmarks.paper.tasks import Experiment

START = "spawn"  # how a worker begins; a fork would not do where CUDA is in use
PATIENCE = 120.0  # seconds that a worker has to reach its next record after a stop
Report = Callable[[int, float], bool]  # (number of the run, share of it that is over) -> whether to stop


@dataclass
class Outcome:
    """finished: also those of earlier calls. failed: {slug: error}. stopped: interrupted, or out of time."""

    finished: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    stopped: bool = False


@dataclass(frozen=True)
class Job:
    """What the runs of a list share; sent to every worker."""

    configs: Sequence[RunConfig]
    experiment: Experiment
    data: Data
    folder: Path
    facts: Mapping[str, Any]
    checkpoint_seconds: float


def run_all(job: Job, workers: int, time_limit: float | None = None, console: Console | None = None) -> Outcome:
    """Run what is not finished yet. Ctrl-C or the time limit ends every run at its next record, with a checkpoint."""
    waiting = [i for i, c in enumerate(job.configs) if not (job.folder / c.slug / runs.DONE).exists()]
    outcome = Outcome(finished=len(job.configs) - len(waiting))
    if not waiting:
        return outcome
    batches = max(1, len(job.data.train.targets) // job.experiment.batch_size)
    costs = [expected_cost(config, batches) for config in job.configs]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    deadline = None if time_limit is None else time.monotonic() + time_limit
    with Progress(*columns, console=console, transient=True, speed_estimate_period=300) as progress:
        bar = progress.add_task(job.experiment.name, total=round(sum(costs[i] for i in waiting)))
        shares = dict.fromkeys(waiting, 0.0)

        def show(number: int, share: float) -> None:
            shares[number] = share
            progress.update(bar, completed=round(sum(costs[i] * part for i, part in shares.items())))

        if workers == 1:
            _run_here(job, waiting, outcome, show, deadline)
        else:
            _run_beside(job, waiting, outcome, show, deadline, min(workers, len(waiting)), progress.console)
    return outcome


def _one(job: Job, number: int, report: Report, data: Data) -> None:
    runs.run(
        job.configs[number],
        job.experiment,
        data,
        job.folder,
        job.facts,
        checkpoint_seconds=job.checkpoint_seconds,
        after_epoch=lambda epoch, epochs: report(number, epoch / epochs),
    )


def _run_here(
    job: Job, waiting: Sequence[int], outcome: Outcome, show: Callable[[int, float], None], deadline: float | None
) -> None:
    def report(number: int, share: float) -> bool:
        show(number, share)
        return deadline is not None and time.monotonic() > deadline

    data = job.data.to(torch.device(job.configs[0].device))
    with one_thread():
        for number in waiting:
            try:
                _one(job, number, report, data)
                outcome.finished += 1
                show(number, 1.0)
            except (runs.Stopped, KeyboardInterrupt):  # after Ctrl-C the last checkpoint is what there is
                outcome.stopped = True
                return
            except Exception as error:
                outcome.failed[job.configs[number].slug] = _said(error)
            if deadline is not None and time.monotonic() > deadline and number != waiting[-1]:
                outcome.stopped = True
                return


def _run_beside(
    job: Job,
    waiting: Sequence[int],
    outcome: Outcome,
    show: Callable[[int, float], None],
    deadline: float | None,
    workers: int,
    console: Console,
) -> None:
    context = torch.multiprocessing.get_context(START)
    todo, news, stop = context.Queue(), context.Queue(), context.Event()
    for number in waiting:
        todo.put(number)
    for _ in range(workers):
        todo.put(None)
    processes = [context.Process(target=_work, args=(job, todo, news, stop), daemon=True) for _ in range(workers)]
    for process in processes:
        process.start()
    running: dict[int, int] = {}  # process id: the run it is at
    give_up: float | None = None
    try:
        while any(process.is_alive() for process in processes) or not news.empty():
            try:
                with suppress(queue.Empty):
                    _hear(news.get(timeout=0.5), job, outcome, show, running)
                late = deadline is not None and time.monotonic() > deadline
            except KeyboardInterrupt:
                if stop.is_set():
                    break
                console.print("Stopping at the next record of every run; Ctrl-C again to stop now.", style="yellow")
                late = True
            if late and not stop.is_set():
                stop.set()
                outcome.stopped = True
                give_up = time.monotonic() + PATIENCE
            if give_up is not None and time.monotonic() > give_up:
                break
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
        todo.cancel_join_thread()
    for process in processes:
        if process.exitcode and not outcome.stopped and process.pid in running:
            slug = job.configs[running[process.pid]].slug
            outcome.failed[slug] = f"its process ended with {process.exitcode}"


def _hear(
    message: tuple[Any, ...],
    job: Job,
    outcome: Outcome,
    show: Callable[[int, float], None],
    running: dict[int, int],
) -> None:
    kind, process, number, value = message
    running[process] = number
    if kind == "progress":
        show(number, value)
        return
    running.pop(process)
    if kind == "done":
        outcome.finished += 1
        show(number, 1.0)
    elif kind == "failed":
        outcome.failed[job.configs[number].slug] = value
        show(number, 1.0)


def _work(job: Job, todo: Any, news: Any, stop: Any) -> None:
    """A worker: runs numbers from `todo` until it finds None or is told to stop. Ctrl-C is for the parent."""
    import os

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    data, told = job.data.to(torch.device(job.configs[0].device)), 0.0

    def report(number: int, share: float) -> bool:
        nonlocal told
        if time.monotonic() - told > 0.5:
            told = time.monotonic()
            news.put(("progress", os.getpid(), number, share))
        return stop.is_set()

    while not stop.is_set():
        number = todo.get()
        if number is None:
            return
        news.put(("progress", os.getpid(), number, 0.0))
        try:
            _one(job, number, report, data)
            news.put(("done", os.getpid(), number, None))
        except runs.Stopped:
            return
        except Exception as error:
            news.put(("failed", os.getpid(), number, _said(error)))


def _said(error: Exception) -> str:
    """What happened and where, without the folders of this machine."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
