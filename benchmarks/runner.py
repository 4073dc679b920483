"""Run groups: gate, prepare and time every case, and write one JSON file a group as it finishes."""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import records, timing
from benchmarks.micro.case import OURS, Case, Contender, Group, Unavailable
from benchmarks.timing import Prepared, Samples

CASE_SECONDS = (0.3, 3.0)  # of timed rounds, least and most
TIMED_SHARE = 0.5  # of a case's time; the rest makes inputs, oracle and compiled peers
QUICK_SECONDS = 0.01


@contextmanager
def progress(title: str, total: int):
    """A function to call with each case's name: a bar on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield lambda name: print(f"{title}: {name}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task, started = bars.add_task(title, total=total), 0

        def step(name: str) -> None:
            nonlocal started
            bars.update(task, description=f"{title}: {name}", completed=started)
            started += 1

        yield step
        bars.update(task, description=title, completed=total)


def run_groups(
    groups: Sequence[Group], device: torch.device, out: Path, *, quick: bool, time_limit: float
) -> list[dict[str, Any]]:
    """Run the groups in turn, each with its share of what is left of `time_limit` seconds; returns the documents."""
    end = time.monotonic() + time_limit
    documents = []
    for i, group in enumerate(groups):
        left = max(0.0, end - time.monotonic())
        share = group.weight / sum(g.weight for g in groups[i:])
        path, deadline = out / f"{group.name}.json", time.monotonic() + left * share
        document = run_group(group, device, quick=quick, deadline=deadline, path=path if group.resume else None)
        records.write(path, document)
        documents.append(document)
    return documents


def run_group(
    group: Group, device: torch.device, *, quick: bool, deadline: float = float("inf"), path: Path | None = None
) -> dict[str, Any]:
    """One group's document (records.py has the format). Cases after the deadline are recorded as skipped.

    path: where an earlier run may have left its document. If that was cut short and is of these sources, environment and
    command, the cases it measured are taken over; and the document so far is written there after each case.
    """
    began = time.monotonic()
    # before anything runs: the sources may change meanwhile
    document = {
        "format": records.FORMAT,
        "group": group.name,
        "title": group.title,
        "command": " ".join(
            ["python -m benchmarks run", group.name, *[group.arguments] * bool(group.arguments), *["--quick"] * quick]
        ),
        "quick": quick,
        "complete": False,
        "seconds": 0.0,
        "implementation": records.implementation(device),
        "environment": records.environment(device),
        "kernels": records.kernel_hashes(device.type, group.families),
        "records": [],
        "fits": [],
    }
    cases = group.cases(device, quick)
    done = {} if path is None else records.measured_before(path, document)
    found: list[dict[str, Any]] = []
    with progress(group.title, len(cases)) as announce:
        for i, case in enumerate(cases):
            announce(case.name)
            if case.name in done:
                found += done[case.name]
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                found.append(_record(case, OURS, "ours", "skipped", records.CUT_SHORT))
                continue
            least, most = CASE_SECONDS
            budget = QUICK_SECONDS if quick else min(max(TIMED_SHARE * left / (len(cases) - i), least), most)
            found += run_case(case, device, budget_s=budget, quick=quick, deadline=deadline, memory=group.memory)
            if path is not None:
                records.write(path, document | {"seconds": round(time.monotonic() - began, 1), "records": found})
    return document | {
        "complete": not any(r["reason"] == records.CUT_SHORT for r in found),
        "seconds": round(time.monotonic() - began, 1),
        "records": found,
        "fits": group.fits(found),
    }


def run_case(
    case: Case, device: torch.device, *, budget_s: float, quick: bool, deadline: float, memory: bool
) -> list[dict[str, Any]]:
    """Gate and prepare each contender, time those that passed together, and describe all of them."""
    if case.finish is None:
        _release(device)
    cache = timing.cache_bytes(device)
    buffers = 2 if quick else timing.buffer_count(case.input_bytes, cache)
    try:
        contenders = case.build(device, buffers)
    except Exception as error:
        return [_record(case, OURS, "ours", "failed", timing.describe_error(error))]
    by_name = {contender.name: contender for contender in contenders}
    ready: dict[str, Prepared] = {}
    done: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        if time.monotonic() > deadline:
            done[contender.name] = _record(case, contender.name, contender.role, "skipped", records.CUT_SHORT)
            continue
        done[contender.name], prepared = _prepare(case, contender)
        if prepared is not None:
            ready[contender.name] = prepared
    settings: dict[str, Any] = {"min_sample_s": 1e-4, "warm_s": 0.0} if quick else {"min_rounds": case.rounds}
    if case.finish is not None:
        settings = {"min_sample_s": 0.0, "warm_s": 0.0}
    samples = timing.interleave(ready, device, budget_s=budget_s, deadline=deadline, **settings)
    for name, taken in samples.items():
        _add_times(done[name], taken, cold=case.input_bytes * timing.COLD_SHARE >= cache, bytes_=case.min_bytes)
        if memory and taken.error is None and by_name[name].role != "floor":
            done[name] |= _memory(by_name[name], ready[name], device)
    _compare(done, samples, case, device)
    if case.finish is not None:
        case.finish(done)
    return list(done.values())


def _memory(contender: Contender, prepared: Prepared, device: torch.device) -> dict[str, Any]:
    if contender.extra_bytes is None:
        return {"extra_bytes": timing.extra_bytes(prepared.calls[0], device)}
    try:
        return {"extra_bytes": contender.extra_bytes()}
    except Exception as error:
        return {"extra_bytes": None, "memory_error": timing.describe_error(error)}


def _release(device: torch.device) -> None:
    """Forget what the last case compiled and allocated."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _record(case: Case, contender: str, role: str, status: str, reason: str | None = None) -> dict[str, Any]:
    return {
        "case": case.name,
        "params": case.params,
        "contender": contender,
        "role": role,
        "status": status,
        "reason": reason,
        "bytes": case.min_bytes,
    }


def _prepare(case: Case, contender: Contender) -> tuple[dict[str, Any], Prepared | None]:
    """The gate first: a contender that fails it is never timed."""
    try:
        report = contender.gate()
        prepared = contender.prepare()
    except Unavailable as error:
        return _record(case, contender.name, contender.role, "skipped", str(error)), None
    except Exception as error:  # any failure of a contender is a line of the report, not the end of the run
        return _record(case, contender.name, contender.role, "failed", timing.describe_error(error)), None
    record = _record(case, contender.name, contender.role, "measured")
    record["gate"] = {name: float(f"{error:.3g}") for name, error in report.items()}
    return record, prepared


def _rounded(values: dict[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


def _add_times(record: dict[str, Any], taken: Samples, *, cold: bool, bytes_: int) -> None:
    if taken.error is not None:
        record |= {"status": "failed", "reason": taken.error}
        return
    record["us"] = _rounded(timing.spread([s * 1e6 for s in taken.seconds]), 3)
    record["samples_us"] = [round(s * 1e6, 3) for s in taken.seconds]
    record["inner"] = taken.inner
    record["cache"] = "cold" if cold else "warm"


def floor_us(done: dict[str, dict[str, Any]], case: Case, device: torch.device) -> float | None:
    """The time of the case's own floor, or the least its bytes take: on a CPU the measured read of the inputs, on CUDA bytes
    over the copy rate."""
    name = case.floor or ("copy" if device.type == "cuda" else "read")
    us = done.get(name, {}).get("us")
    if us is None:
        return None
    if name == "copy":
        return us["p50"] * case.min_bytes / (2 * case.input_bytes)  # a copy reads and writes
    return us["p50"]


def _compare(done: dict[str, dict[str, Any]], samples: dict[str, Samples], case: Case, device: torch.device) -> None:
    """Add time over floor, and the ratio to ours taken within each round."""
    floor = floor_us(done, case, device)
    ours = samples.get(OURS)
    if ours is not None and ours.error is not None:
        ours = None
    for name, record in done.items():
        if record["status"] != "measured":
            continue
        record["floor_us"] = None if floor is None else round(floor, 3)
        record["over_floor"] = None if floor is None else round(record["us"]["p50"] / floor, 3)
        ratio = None if ours is None else timing.paired_ratio(samples[name].seconds, ours.seconds)
        record["ratio"] = None if ratio is None else _rounded(ratio, 4)


def failures(document: dict[str, Any]) -> list[str]:
    """What of this library failed in a group: these make a run fail, a failing peer does not."""
    return [
        f"{r['case']} {r['contender']}: {r['reason']}"
        for r in document["records"]
        if r["status"] == "failed" and r["role"] in ("ours", "part")
    ]


def summary(document: dict[str, Any], line: Callable[[str], None] = print) -> None:
    """One line a case: ours, and how many times longer each other contender takes."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for record in document["records"]:
        by_case.setdefault(record["case"], []).append(record)
    line(f"{document['group']}: {document['seconds']:.0f} s, impl {document['implementation']!r}")
    for case, rows in by_case.items():
        parts = []
        for r in rows:
            if r["status"] != "measured":
                parts.append(f"{r['contender']} {r['status']}")
            elif r["contender"] == OURS:
                parts.append(f"ours {r['us']['p50']:.1f} us")
            elif r["ratio"] is not None:
                parts.append(f"{r['contender']} {r['ratio']['p50']:.2f}x")
        line(f"  {case:24} {', '.join(parts)}")
    for failure in failures(document):
        line(f"  FAILED {failure}")
