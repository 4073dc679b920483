"""Peak memory of a call on a CPU, as the operating system sees it: in a process of its own, allocator or not.

`python -m benchmarks.linear.memory '<problem as JSON>' CONTENDER` prints the bytes beyond inputs and results by which the
resident set grew at its highest. Everything a first call sets up (threads, buffers of the BLAS) is set up by a small
problem before, code that is compiled by the problem itself.
"""

import ctypes
import gc
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.linear.contenders import COMPILED, make_call
from benchmarks.linear.problem import Problem

SMALL = {"n": 64, "hidden": 32, "classes": 256}  # of the problem that warms up
TIME_LIMIT_S = 120


def _status(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def peak_growth(problem: Problem, name: str) -> int:
    """In this process, which should have done nothing else."""
    device = torch.device("cpu")
    warm = problem if name in COMPILED else replace(problem, **SMALL)
    make_call(name, warm, warm.make(device, 0), False)()
    call = make_call(name, problem, problem.make(device, 0), False)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is that of now
    before = _status("VmRSS")
    results = call()
    grown = _status("VmHWM") - before
    return max(0, grown - sum(t.untyped_storage().nbytes() for t in results))


def measure(problem: Problem, name: str) -> int:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.linear.memory", json.dumps(asdict(problem)), name]
    done = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return int(done.stdout)


if __name__ == "__main__":
    print(peak_growth(Problem(**json.loads(sys.argv[1])), sys.argv[2]))
