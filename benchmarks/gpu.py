"""Everything a GPU machine is lent for, in one command: build, GPU tests, then the groups whose results are out of date.

Nothing is fetched: it uses the Python and torch found, builds in place, and puts the repository on PYTHONPATH. Each step
runs in a process of its own with the time that is left, so a fault in one leaves the others their turn.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.micro import GROUPS

BUILD_SECONDS, TEST_SECONDS = 300, 300  # at most


def _step(name: str, command: Sequence[str], seconds: float) -> str:
    """Run a command of this repository; returns "ok" or what went wrong."""
    if seconds <= 0:
        return "skipped: no time left"
    paths = [str(records.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    print(f"== {name}: {' '.join(command)}", flush=True)
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=records.ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"failed: not done within {seconds:.0f} s"
    return "ok" if done.returncode == 0 else f"failed: exit code {done.returncode}"


def _test(name: str, device: torch.device, seconds: float) -> str:
    if not any((records.ROOT / "tests" / "gpu").glob("test_*.py")):
        return "skipped: there are no GPU tests"
    if importlib.util.find_spec("pytest") is None:
        return "skipped: pytest is not installed"
    return _step(name, ["-m", "pytest", "tests/gpu", "-q"], seconds)


def run(groups: Sequence[str], time_limit: float, out: Path | None, *, force: bool, dry_run: bool) -> int:
    """Build, test, measure; returns the exit code: 1 when a step or a group failed.

    force: also measure groups whose results are of these very kernels. dry_run: on a CPU, with tiny shapes, no build and
    no tests, into a folder that is removed unless `out` is given: it proves the script, not the kernels.
    """
    end = time.monotonic() + time_limit
    device = torch.device("cpu" if dry_run else "cuda")
    if not dry_run and not torch.cuda.is_available():
        print("no CUDA device: this needs one (try --dry-run)", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        if out is None:
            out = Path(scratch) if dry_run else records.RESULTS / records.device_slug(device)
        outcome: dict[str, str] = {}
        if dry_run:
            outcome["build"] = outcome["tests"] = "skipped: dry run"
        else:
            left = min(BUILD_SECONDS, end - time.monotonic())
            outcome["build"] = _step("build", ["setup.py", "build_ext", "--inplace"], left)
            outcome["tests"] = _test("tests", device, min(TEST_SECONDS, end - time.monotonic()))
        for i, group in enumerate(groups):
            weights = [GROUPS[name].weight for name in groups[i:]]
            share = (end - time.monotonic()) * weights[0] / sum(weights)
            outcome[group] = _measure(group, device, out, share, end - time.monotonic(), force=force, quick=dry_run)
    print("\nsummary")
    for name, result in outcome.items():
        print(f"  {name:20} {result}")
    return int(any(result.startswith("failed") for result in outcome.values()))


def _measure(
    group: str, device: torch.device, out: Path, share: float, left: float, *, force: bool, quick: bool
) -> str:
    """Measure one group in its own process, unless its results are of these very kernels."""
    hashes = records.kernel_hashes(device.type, GROUPS[group].families)
    reason = records.stale(out / f"{group}.json", hashes, records.implementation(device))
    if reason is None and not force:
        return "up to date"
    print(f"-- {group}: {reason or 'asked for'}", flush=True)
    limit = max(1.0, share)
    command = [
        "-m",
        "benchmarks",
        "run",
        group,
        "--device",
        device.type,
        "--out",
        str(out),
        "--time-limit",
        f"{limit:.0f}",
    ]
    return _step(group, command + ["--quick"] * quick, left)  # the limit is soft: a slow compile may use a later share
