"""Everything a GPU machine is lent for, in one command: build, GPU tests, sanitizers, then the groups, stale ones first.

Nothing is fetched: it uses the Python, torch and compilers found, builds in place, and puts the repository on PYTHONPATH.
Wheels in the folder .whl of the repository (published peers, pytest) are installed into a folder that lasts as long as the
run. Each step runs in a process of its own with a limit of its own, so that a fault or a hang in one leaves the others
their turn; a result file is written as each group finishes.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.groups import GROUPS
from benchmarks.targets import TARGETS

STEPS = ("build", "tests", "sanitizers", "groups")
# Seconds at most; each is also held to half of the time that is left, so that every later step has its turn.
LIMITS = {"wheels": 60, "build": 300, "tests": 240, "sanitizers": 90}
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_TARGET = "tests/gpu/sanitizer_target.py"
TESTS, TEST_WORKERS = "tests/gpu", 4  # each takes up to 15 GB of the GPU's memory
OVERRUN = 1.5  # of a group's share, and GRACE_S: then it is stopped; before, it stops by itself between two cases
GRACE_S = 20.0
WHEELS = records.ROOT / ".whl"


class Run:
    """The time that is left, the environment of the steps, and what became of each."""

    def __init__(self, time_limit: float) -> None:
        self.end = time.monotonic() + time_limit
        self.outcome: dict[str, str] = {}
        paths = [str(records.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def left(self) -> float:
        return self.end - time.monotonic()

    def limit(self, step: str) -> float:
        return min(LIMITS[step], self.left() / 2)

    def step(self, name: str, command: Sequence[str], seconds: float) -> None:
        """Run a command and note "ok" or what went wrong; a process that is late is ended with all its children."""
        if seconds < 1:
            self.outcome[name] = "skipped: no time left"
            return
        print(f"== {name}, {seconds:.0f} s at most", flush=True)
        process = subprocess.Popen(command, cwd=records.ROOT, env=self.environment, start_new_session=True)
        began = time.monotonic()
        try:
            code = process.wait(seconds)
            took = f"{time.monotonic() - began:.0f} s"
            self.outcome[name] = f"ok, {took}" if code == 0 else f"failed: exit code {code}, {took}"
        except subprocess.TimeoutExpired:
            self.outcome[name] = f"failed: not done within {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def failed(self) -> bool:
        return any(result.startswith("failed") for result in self.outcome.values())

    def summary(self) -> None:
        print("\nsummary")
        for name, result in self.outcome.items():
            print(f"  {name:20} {result}", flush=True)


def _wheels(run: Run, target: Path) -> None:
    """Install the wheels that were brought along, behind the packages of the machine's own torch."""
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if not wheels:
        run.outcome["wheels"] = "skipped: none in .whl"
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    run.step("wheels", [*pip, *wheels], run.limit("wheels"))
    run.environment["PYTHONPATH"] += os.pathsep + str(target)


def _importable(run: Run, module: str) -> bool:
    """In the processes of the steps."""
    command = [sys.executable, "-c", f"import {module}"]
    return (
        subprocess.run(command, env=run.environment, cwd=records.ROOT, capture_output=True, check=False).returncode == 0
    )


def _tests(run: Run) -> None:
    if not _importable(run, "pytest"):
        run.outcome["tests"] = "not available: pytest is not installed (a wheel in .whl would do)"
        return
    # the plugins that pyproject.toml configures may not be there: no configuration
    options = ["-c", os.devnull, "--rootdir", str(records.ROOT), "-p", "no:cacheprovider", "-q", "--durations=10"]
    if _importable(run, "xdist"):
        options += ["-n", str(TEST_WORKERS)]  # most of their time compiles kernels
    run.step("tests", [sys.executable, "-m", "pytest", *options, TESTS], run.limit("tests"))


def compute_sanitizer() -> str | None:
    """Where the tool is: on the path, or in the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "bin" for home in homes if home] + [
        Path(home) / "compute-sanitizer" for home in homes if home
    ]
    return shutil.which("compute-sanitizer") or next(
        (found for folder in folders if (found := shutil.which("compute-sanitizer", path=str(folder)))), None
    )


def _sanitizers(run: Run) -> None:
    tool = compute_sanitizer()
    if tool is None:
        run.outcome["sanitizers"] = "not available: there is no compute-sanitizer"
        return
    target = [sys.executable, SANITIZER_TARGET]
    run.step("sanitizer target", target, run.limit("sanitizers"))  # compiles the kernels, outside of the tools
    if not run.outcome["sanitizer target"].startswith("ok"):
        return
    # without PyTorch's allocator each tensor ends where its memory does
    run.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    for name in SANITIZERS:
        run.step(name, [tool, "--tool", name, "--error-exitcode", "9", *target], run.limit("sanitizers"))
    del run.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"]


def answers(group: str, device_type: str) -> int:
    """How many of the targets a group's results answer."""
    return sum(target.group == group and target.device == device_type for target in TARGETS)


def staleness(group: str, device: torch.device, out: Path) -> str | None:
    hashes = records.kernel_hashes(device.type, GROUPS[group].families)
    return records.stale(out / f"{group}.json", hashes, records.implementation(device))


def measure_command(group: str, device: torch.device, out: Path, seconds: float, quick: bool) -> list[str]:
    options = ["--device", device.type, "--out", str(out), "--time-limit", f"{seconds:.0f}"]
    return [sys.executable, "-m", "benchmarks", "run", group, *options, *["--quick"] * quick]


def _groups(run: Run, groups: Sequence[str], device: torch.device, out: Path, *, force: bool, quick: bool) -> None:
    """Those out of date first, then (when forced) the others; of each kind those that answer most targets first."""
    reasons = {group: staleness(group, device, out) for group in groups}
    ordered = sorted(groups, key=lambda group: (reasons[group] is None, -answers(group, device.type)))
    wanted = [group for group in ordered if force or reasons[group] is not None]
    run.outcome |= {group: "up to date" for group in ordered if group not in wanted}
    for i, group in enumerate(wanted):
        weights = [GROUPS[name].weight for name in wanted[i:]]
        share = run.left() * weights[0] / sum(weights)
        print(f"-- {group}: {reasons[group] or 'asked for'}", flush=True)
        command = measure_command(group, device, out, share, quick)
        run.step(group, command, min(run.left(), OVERRUN * share + GRACE_S))


def run(
    groups: Sequence[str],
    time_limit: float,
    out: Path | None,
    *,
    steps: Sequence[str] = STEPS,
    force: bool = False,
    dry_run: bool = False,
) -> int:
    """Build, test, measure; returns the exit code: 1 when a step or a group failed.

    force: also measure groups whose results are of these very kernels. dry_run: on a CPU, with tiny shapes, no build and
    no tests, into a folder that is removed unless `out` is given: it proves the script, not the kernels.
    """
    device = torch.device("cpu" if dry_run else "cuda")
    if not dry_run and not torch.cuda.is_available():
        print("no CUDA device: this needs one (try --dry-run)", file=sys.stderr)
        return 1
    state = Run(time_limit)
    with tempfile.TemporaryDirectory() as scratch:
        if out is None:
            out = Path(scratch) / "results" if dry_run else records.RESULTS / records.device_slug(device)
        _wheels(state, Path(scratch) / "wheels")
        if "build" in steps and not dry_run:
            state.step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], state.limit("build"))
        if "tests" in steps and not dry_run:
            _tests(state)
        if "sanitizers" in steps and not dry_run:
            _sanitizers(state)
        if "groups" in steps:
            _groups(state, groups, device, out, force=force, quick=dry_run)
    state.outcome |= {step: "skipped: dry run" for step in STEPS[:3] if dry_run and step in steps}
    state.summary()
    return int(state.failed())
