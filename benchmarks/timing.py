"""Measuring tools: interleaved rounds of contenders, percentiles, caches, CUDA graphs, memory.

A sample is the mean time of `inner` calls back to back, at least about a millisecond long, so that the clock and the Python
loop do not show. Contenders take turns (A B C A B C ...), so drift of the machine hits all of them alike and the ratio of
two contenders can be taken within each round. CPU time is `perf_counter`; CUDA time is between two events around the calls,
which is the wall time a call where launches are slower than kernels and the time of the kernels where they are not.
Inputs rotate over `buffer_count` copies, more bytes than the last-level cache holds, once they are large enough for a
bandwidth to be read off; smaller inputs stay warm, as they are after a forward pass.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_SAMPLE_S = 1e-3
MIN_ROUNDS, MAX_ROUNDS = 5, 40
MAX_INNER = 2000
COLD_SHARE = 8  # inputs above 1/8 of the cache rotate over more than the cache holds
DEFAULT_CACHE_BYTES = 32 << 20


class Prepared(NamedTuple):
    """A contender ready to be timed: one callable a buffer, and how many calls of the function each of them makes."""

    calls: Sequence[Callable[[], Any]]
    repeats: int = 1


class Samples(NamedTuple):
    """Seconds a call, in the order of the rounds; `error` where the contender broke off."""

    seconds: list[float]
    inner: int
    error: str | None = None


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between order statistics; ValueError without samples."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def spread(samples: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    return {f"p{q}": percentile(samples, q) for q in (20, 50, 80)}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Percentiles of numerator / denominator, taken within each round both have."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=False)])


def log_slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least-squares slope of log y over log x: the exponent of growth."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 of a GPU, the largest level the kernel reports for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=DEFAULT_CACHE_BYTES)


def buffer_count(input_bytes: int, cache: int) -> int:
    """How many copies of the inputs to rotate: twice the cache for inputs that are to come from memory, else two."""
    if input_bytes * COLD_SHARE < cache:
        return 2
    return max(1, math.ceil(2 * cache / input_bytes))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(calls: Sequence[Callable[[], Any]], inner: int, device: torch.device) -> float:
    """Seconds for `inner` calls back to back, over the buffers in turn."""
    run = itertools.islice(itertools.cycle(calls), inner)
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        for call in run:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3
    start = time.perf_counter()
    for call in run:
        call()
    return time.perf_counter() - start


def warm_up(prepared: Prepared, device: torch.device, seconds: float) -> float:
    """Run every buffer at least once and for `seconds` in all; returns the fastest time of one callable."""
    fastest, start = math.inf, time.perf_counter()
    while True:
        once = time_calls(prepared.calls, len(prepared.calls), device) / len(prepared.calls)
        fastest = min(fastest, once)
        if time.perf_counter() - start >= seconds:
            return fastest


def compiled_graphs() -> int:
    """How many graphs torch.compile has made so far: it must not change inside a timed loop."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def interleave(
    contenders: dict[str, Prepared],
    device: torch.device,
    *,
    budget_s: float,
    min_sample_s: float = MIN_SAMPLE_S,
    warm_s: float = 0.05,
    min_rounds: int = MIN_ROUNDS,
    deadline: float = math.inf,
) -> dict[str, Samples]:
    """Time the contenders in turns for about `budget_s` seconds: at least `min_rounds` rounds, at most MAX_ROUNDS.

    deadline: of time.monotonic(); no further round begins after it once there are three. A contender that raises is
    recorded with its error and left out of the remaining rounds. One that makes torch.compile trace again inside the
    loop has no valid time: as it cannot be told which, all of the run have that error.
    """
    inner, round_s = {}, 0.0
    results = {name: Samples([], 0) for name in contenders}
    alive = dict(contenders)
    for name, prepared in contenders.items():
        try:
            once = warm_up(prepared, device, warm_s)
        except Exception as error:
            results[name] = Samples([], 0, describe_error(error))
            del alive[name]
            continue
        inner[name] = min(max(1, math.ceil(min_sample_s / max(once, 1e-9))), MAX_INNER)
        round_s += inner[name] * once
    rounds = min(max(min_rounds, int(budget_s / max(round_s, 1e-9))), MAX_ROUNDS)
    graphs = compiled_graphs()
    for done in range(rounds):
        if done >= 3 and time.monotonic() > deadline:
            break
        for name, prepared in list(alive.items()):
            try:
                seconds = time_calls(prepared.calls, inner[name], device) / (inner[name] * prepared.repeats)
            except Exception as error:
                results[name] = Samples([], inner[name], describe_error(error))
                del alive[name]
                continue
            results[name] = Samples([*results[name].seconds, seconds], inner[name])
    if compiled_graphs() != graphs:
        return {
            name: Samples([], s.inner, "torch.compile traced again inside the timed loop")
            for name, s in results.items()
        }
    return results


def describe_error(error: BaseException) -> str:
    """The error's type and first line, with nothing of the machine's folders."""
    first = (str(error).strip() or "no message").splitlines()[0]
    words = [word if not word.lstrip("'\"(").startswith("/") else "<path>" for word in first.split(" ")]
    return f"{type(error).__name__}: {' '.join(words)}"[:300]


def capture(steps: Sequence[Callable[[], Any]], warm_ups: int = 3) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A CUDA graph of `steps` one after another, and what each returned (static tensors the graph refreshes)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [step() for step in steps]
    return graph, outputs


def read_bytes(tensor: Tensor) -> Callable[[], Tensor]:
    """Read the tensor once and do next to nothing with it: a sum of its bytes as the widest integers that fit."""
    flat = tensor.reshape(-1)
    for dtype in (torch.int64, torch.int32, torch.int16):
        if flat.numel() * flat.element_size() % dtype.itemsize == 0 and dtype.itemsize >= flat.element_size():
            return flat.view(dtype).sum
    return flat.sum


def copy_bytes(tensor: Tensor) -> Callable[[], Tensor]:
    """Copy the tensor: its bytes once in and once out."""
    out = torch.empty_like(tensor)
    return lambda: out.copy_(tensor)


def extra_bytes(call: Callable[[], Sequence[Tensor]], device: torch.device) -> int:
    """Peak memory a call takes from PyTorch's allocator beyond its inputs and outputs.

    What a kernel takes from elsewhere (its stack, thread-local scratch) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        outputs = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            outputs = call()
        peak = level = 0
        results = profile.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
        for event in results.events():  # pyright: ignore[reportOptionalMemberAccess]
            if event.name() == "[memory]":
                level += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
                peak = max(peak, level)
    kept = sum(t.untyped_storage().nbytes() for t in outputs if isinstance(t, Tensor))
    return max(0, peak - kept)
