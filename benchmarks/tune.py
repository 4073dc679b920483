"""Tune the tables that the Triton launchers choose their configurations from: `python -m benchmarks tune`.

For each entry of a table, the entry and its neighbours (one number halved or doubled) run the work that entry is for. Each
is held to the correctness gate, then all take turns; on a GPU from a CUDA graph, so that kernels are timed and not launches.
The table is printed with every candidate's time, then as source that can replace it: an entry changes where a neighbour was
faster by more than NOISE in four rounds of five. Run again to walk further. Nothing is changed by itself: a table is code.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaselect_kernels import dispatch, fused_select, per_sample_stats, select_from_losses, select_topk
from adaselect_kernels.kernels import batch_large, row_stats, runtime, select
from adaselect_kernels.kernels.runtime import ceil_div
from benchmarks import gate, records, timing
from benchmarks.micro.case import MIN_CAPTURED_CALLS, make_logits
from benchmarks.timing import Prepared

NOISE = 0.02
ENTRY_SECONDS = 1.0  # of timed rounds
LAST = 2**31  # the key of a table's last entry
STATS = ("loss", "grad_norm")
GAMMA = 0.2


class Work(NamedTuple):
    """What an entry of a table is for: one call a buffer, and what must hold of the first ones' results."""

    name: str
    calls: Sequence[Callable[[], Any]]
    check: Callable[[], None]


@dataclass(frozen=True)
class Family:
    """A table of one kernel family. work(key, device, quick); bounds of each number that is tuned."""

    name: str
    variable: str
    table: dict[int, Any]
    work: Callable[[int, torch.device, bool], Work]
    bounds: dict[str, tuple[int, int]]


def _statistics(cases: Sequence[tuple[int, int]], device: torch.device) -> Work:
    """Row statistics of [n, classes] logits of float32 and bfloat16."""
    inputs, checks = [], []
    for dtype, (n, classes) in itertools.product(("float32", "bfloat16"), cases):
        size = n * classes * (4 if dtype == "float32" else 2)
        copies = timing.buffer_count(size, timing.cache_bytes(device)) if device.type == "cuda" else 1
        made = [make_logits(n, classes, dtype, device, seed) for seed in range(copies)]
        inputs += made
        checks.append((made[0], gate.RowOracle(*made[0], sampled=True)))

    def check() -> None:
        for given, oracle in checks:
            found = per_sample_stats(*given, stats=STATS, impl="triton")
            gate.check_stats({name: getattr(found, name) for name in STATS}, oracle)

    calls = [partial(per_sample_stats, *given, stats=STATS, impl="triton") for given in inputs]
    return Work(", ".join(f"{n}x{classes}" for n, classes in cases), calls, check)


_STATISTICS_BYTES = 1 << 28


def _tile_work(key: int, device: torch.device, quick: bool) -> Work:
    classes = {16: 10, 1024: 1000}.get(key, key * 25 // 32)  # 10, 25, 50, 100, ... 1000, 1600
    return _statistics([(9 if quick else _STATISTICS_BYTES // (4 * classes), classes)], device)


def _stream_work(key: int, device: torch.device, quick: bool) -> Work:
    classes = {2048: 1001, 16384: 8193}.get(key, 2 * 16384 + 1 if quick else 128256)
    return _statistics([(2 if quick else _STATISTICS_BYTES // (4 * classes), classes)], device)


def _split_work(key: int, device: torch.device, quick: bool) -> Work:
    return _statistics([(1, 16384)] if quick or key < LAST else [(8, 128256), (64, 128256)], device)


def _block_work(key: int, device: torch.device, quick: bool) -> Work:
    n, classes = (20 if quick else key), 10
    logits, targets = make_logits(n, classes, "float32", device, 0)

    def call():
        return fused_select(logits, targets, GAMMA, impl="triton")

    def check() -> None:
        rows = gate.RowOracle(logits, targets)
        oracle = gate.SelectionOracle(rows, ("big_loss", "small_loss", "uniform"), GAMMA)
        got = call()
        gate.check_selection(got.indices, got.scores, got.losses, oracle)

    return Work(f"fused_select {n}x{classes}", [call], check)


def _scores(n: int, device: torch.device) -> Tensor:
    return torch.rand(n, generator=torch.Generator(device).manual_seed(n), device=device)


def _top_k_work(key: int, device: torch.device, quick: bool) -> Work:
    n = 4097 if quick else 1 << 20
    scores, k = _scores(n, device), int(GAMMA * n)

    def call():
        return select_topk(scores, k, order="index", impl="triton")

    def check() -> None:
        gate.check_topk(call(), scores, k, exact_ties=True)

    return Work(f"select_topk {n}", [call], check)


def _rank_work(key: int, device: torch.device, quick: bool) -> Work:
    n = 200 if quick else 4096
    scores, k = _scores(n, device), n // 2

    def call():
        return select_topk(scores, k, order="score", impl="triton")

    def check() -> None:
        chosen = call()
        gate.check_topk(chosen.sort().values, scores, k, exact_ties=True)
        if (scores[chosen].diff() > 0).any():
            raise gate.GateError("the chosen rows are not in the order of their scores")

    return Work(f"select_topk {n} by score", [call], check)


def _large_work(key: int, device: torch.device, quick: bool) -> Work:
    n = 4097 if quick else 1 << 20
    losses = _scores(n, device)

    def call():
        return select_from_losses(losses, GAMMA, impl="triton")

    def check() -> None:
        got, right = call(), select_from_losses(losses.double(), GAMMA, impl="reference")
        error = ((got.scores - right.scores) / right.scores).abs().max().item()
        if not error < 1e-5:
            raise gate.GateError(f"scores: relative error {error:.3g}")
        gate.check_topk(got.indices, got.scores, len(got.indices), exact_ties=True)

    return Work(f"select_from_losses {n}", [call], check)


_PROGRAMS = {"block": (512, 8192), "warps": (4, 16), "programs": (256, 2048)}
FAMILIES = {
    family.name: family
    for family in (
        Family("tile", "TILES", row_stats.TILES, _tile_work, {"threads": (1, 32), "warps": (1, 8)}),
        Family("stream", "STREAMS", row_stats.STREAMS, _stream_work, {"vectors": (1, 8), "warps": (1, 16)}),
        Family(
            "split", "SPLITS", row_stats.SPLITS, _split_work, {"programs": (128, 2048), "least_columns": (1024, 16384)}
        ),
        Family("block", "BLOCKS", select.BLOCKS, _block_work, {"warps": (2, 16)}),
        Family("radix", "RADIX", select.RADIX, _top_k_work, _PROGRAMS),
        Family("rank", "RANKS", select.RANKS, _rank_work, {"block": (8, 64), "others": (256, 4096), "warps": (2, 8)}),
        Family("large", "LARGE", batch_large.LARGE, _large_work, _PROGRAMS),
    )
}


def candidates(family: Family, key: int) -> list[Any]:
    """The entry of the table, then its neighbours: one number halved or doubled, within its bounds."""
    entry = family.table[key]
    found = [entry]
    for name, (low, high) in family.bounds.items():
        value = getattr(entry, name)
        found += [entry._replace(**{name: v}) for v in (value // 2, value * 2) if low <= v <= high]
    return found


@contextmanager
def instead(family: Family, key: int, entry: Any) -> Iterator[None]:
    """The launchers find `entry` at `key`."""
    before = family.table[key]
    family.table[key] = entry
    runtime.forget()
    try:
        yield
    finally:
        family.table[key] = before
        runtime.forget()


def _prepare(family: Family, key: int, entry: Any, work: Work, device: torch.device) -> Prepared:
    if device.type == "cuda":
        with instead(family, key, entry):
            repeats = ceil_div(MIN_CAPTURED_CALLS, len(work.calls))
            graph, _ = timing.capture([*work.calls] * repeats)
        return Prepared([graph.replay], len(work.calls) * repeats)

    def call() -> None:
        with instead(family, key, entry):
            for once in work.calls:
                once()

    return Prepared([call], len(work.calls))


def _gated(family: Family, key: int, entry: Any, work: Work, device: torch.device) -> Prepared | str:
    """The candidate ready to be timed, or what is wrong with it: too many registers, or a wrong result."""
    try:
        with instead(family, key, entry):
            work.check()
        return _prepare(family, key, entry, work, device)
    except Exception as error:
        return timing.describe_error(error)


def tune_entry(family: Family, key: int, device: torch.device, *, quick: bool) -> list[dict[str, Any]]:
    """Gate and time the candidates of one entry; a record each, the table's own first."""
    work = family.work(key, device, quick)
    tried = candidates(family, key)[: 2 if quick else None]
    gated = {repr(entry): _gated(family, key, entry, work, device) for entry in tried}
    ready = {name: prepared for name, prepared in gated.items() if isinstance(prepared, Prepared)}
    budget, warm = (0.01, 0.0) if quick else (ENTRY_SECONDS, 0.05)
    samples = timing.interleave(ready, device, budget_s=budget, warm_s=warm)
    reasons = {name: reason for name, reason in gated.items() if isinstance(reason, str)}
    reasons |= {name: found.error for name, found in samples.items() if found.error is not None}
    own = repr(tried[0])
    found = []
    for entry in tried:
        name = repr(entry)
        record = {
            "family": family.name, "key": key, "work": work.name, "entry": entry._asdict(), "source": name,
            "current": name == own, "winner": False, "status": "failed" if name in reasons else "measured",
            "reason": reasons.get(name), "us": None, "samples_us": [], "ratio": None,
        }  # fmt: skip
        if name not in reasons:
            record["samples_us"] = [1e6 * seconds for seconds in samples[name].seconds]
            record["us"] = timing.spread(record["samples_us"])
            if own not in reasons:
                record["ratio"] = timing.paired_ratio(samples[name].seconds, samples[own].seconds)
        found.append(record)
    _mark_winner(found)
    return found


def _mark_winner(found: Sequence[dict[str, Any]]) -> None:
    """The fastest of those that beat the table's own entry beyond noise; its own where none does."""
    faster = [r for r in found if r["ratio"] is not None and r["ratio"]["p80"] < 1 - NOISE]
    own = found[0] if found[0]["status"] == "measured" else None
    best = min(faster, key=lambda r: r["ratio"]["p50"], default=own)
    if best is not None:
        best["winner"] = True


def page(family: Family, found: Sequence[dict[str, Any]]) -> list[str]:
    """What was tried, then the table as source."""
    lines = [f"{family.name}: {family.variable} of {family_file(family)}"]
    notes: dict[int, tuple[str, str]] = {}
    for record in found:
        figures = f"{record['status']}: {record['reason']}"
        if record["us"] is not None:
            figures = f"{record['us']['p50']:10.2f} us"
        if record["ratio"] is not None:
            figures += f"  {record['ratio']['p50']:5.3f}"
            if record["winner"] and not record["current"]:
                own = family.table[record["key"]]
                notes[record["key"]] = record["source"], f"  # {record['ratio']['p50']:.3f} of the time of {own!r}"
        marks = " ".join(word for word in ("current", "winner") if record[word])
        lines.append(f"  {record['key']:>11} {record['work']:32} {record['source']:64} {figures}  {marks}".rstrip())
    lines += ["", f"{family.variable} = {{"]
    for key, entry in family.table.items():
        source, note = notes.get(key, (repr(entry), ""))
        lines.append(f"    {'2**31' if key == LAST else key}: {source},{note}")
    return [*lines, "}"]


def family_file(family: Family) -> str:
    """Name of the source file whose table it is."""
    modules = (row_stats, select, batch_large)
    return next(Path(str(m.__file__)).name for m in modules if vars(m).get(family.variable) is family.table)


def run(
    names: Sequence[str], device: torch.device, out: Path, *, quick: bool, time_limit: float
) -> tuple[dict[str, Any], list[str]]:
    """Tune the named families, write `out`/tune.json, and return the document and the lines to print.

    Raises RuntimeError where Triton does not serve the device, and on a CPU unless `quick`: the interpreter has no times.
    """
    if device.type == "cpu" and not quick:
        raise RuntimeError("tuning needs a GPU; on a CPU only --quick runs, in the interpreter")
    reason = dispatch.unavailable("triton", device)
    if reason is not None:
        raise RuntimeError(f"Triton is not available: {reason}")
    began = time.monotonic()
    environment, kernels = records.environment(device), records.kernel_hashes("cuda", records.FAMILIES)
    found: list[dict[str, Any]] = []
    lines: list[str] = []
    complete = True
    for name in names:
        family = FAMILIES[name]
        tuned: list[dict[str, Any]] = []
        for key in family.table:
            if time.monotonic() - began > time_limit:
                complete = False
                break
            tuned += tune_entry(family, key, device, quick=quick)
        found += tuned
        lines += [*page(family, tuned), ""]
    if quick:
        lines.append("a quick run: none of this was measured")
    if not complete:
        lines.append("the time limit was reached: entries without a time are as they were")
    document = {
        "format": records.FORMAT, "group": "tune", "title": "Candidates of the launchers' tables",
        "command": f"python -m benchmarks tune {' '.join(names)}{' --quick' if quick else ''}",
        "quick": quick, "complete": complete, "seconds": round(time.monotonic() - began, 1), "implementation": "triton",
        "environment": environment, "kernels": kernels, "records": found,
    }  # fmt: skip
    records.write(out / "tune.json", document)
    return document, lines
