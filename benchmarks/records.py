"""The JSON files of results: environment, kernel hashes, writing, reading, and whether one is out of date.

One file a group, `results/<device>/<group>.json`:

    format, group, title, command, quick, complete, seconds
    implementation  what impl="auto" took: "cpu", "triton", or "reference" where nothing faster was there
    environment   device, driver, CPU, threads, instruction set, versions, commit, dirty (no host names, no paths)
    kernels       {path in the repository: first 16 hex digits of its sha256} of the sources the group times
    records       one a case and contender:
        case, params, contender, role ("ours", "part", "peer", "floor"),
        status ("measured", "skipped", "failed") and reason (null when measured; then the rest has values),
        us {p20, p50, p80}, samples_us [...] in the order of the rounds, inner (callables a sample),
        bytes (fewest the case must move), cache ("warm" or "cold"),
        floor_us and over_floor (median over it), ratio {p20, p50, p80} (this over ours, within each round),
        gate {check: error found}, extra_bytes (groups that measure memory; memory_error where that failed), and what
        benchmarks/end_to_end/group.py adds
    fits          growth only: {sweep, contender, quantity, slope, first, last}
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Collection
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from adaselect_kernels import dispatch

FORMAT = 1
CUT_SHORT = "the time limit was reached"  # reason of a record that the next run may fill in
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MEASURED_CODE = ("adaselect_kernels", "csrc", "benchmarks", "setup.py")
SOURCES = {
    "cpu": ("csrc/*", "csrc/cpu/**/*"),
    "cuda": ("adaselect_kernels/kernels/**/*", "csrc/cuda/**/*"),
}
SOURCE_SUFFIXES = {".py", ".h", ".cuh", ".inc", ".cpp", ".cu"}
# What the names of a kernel family's files begin with; the first three make the selection.
FAMILIES = {
    "row_stats": ("row_stats",),
    "select": ("select",),
    "batch_stage": ("batch_",),
    "grad_norms": ("grad_norms", "layer_sq_norms", "embedding_norms"),
    "bank": ("bank",),
    "linear": ("linear", "losses", "gemm"),
}
SELECTION = tuple(FAMILIES)[:3]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> dict[str, Any]:
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", *MEASURED_CODE, ":!benchmarks/results") if commit else None
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _build_info() -> dict[str, Any] | None:
    """What the extension says of itself, without anything that looks like a path."""
    extension = dispatch.EXTENSION
    if extension is None or not hasattr(extension, "build_info"):
        return None
    return _without_paths(dict(extension.build_info()))


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_paths(v) for k, v in value.items() if not (isinstance(v, str) and "/" in v)}
    if isinstance(value, (list, tuple)):
        return [_without_paths(v) for v in value if not (isinstance(v, str) and "/" in v)]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(type(value).__name__)


def environment(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge a figure, and nothing that names the machine."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "device_type": device.type,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "build_info": _build_info(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **_commit(),
    }
    if device.type == "cuda":
        facts |= {"driver": _driver(), "cuda": torch.version.cuda}
    return facts


def implementation(device: torch.device) -> str:
    """Which implementation impl="auto" takes on the device."""
    backend = dispatch.resolve("auto", device)
    if backend is dispatch.reference:
        return "reference"
    return "cpu" if backend is dispatch.EXTENSION else "triton"


def device_slug(device: torch.device) -> str:
    """Name of the folder of a device's results, such as "nvidia-h200" or "intel-xeon-2.80ghz-2-threads"."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = re.sub(r"\((R|TM)\)|@|\b(CPU|Processor)\b", " ", _cpu_model()) + f" {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def kernel_hashes(device_type: str, families: Collection[str], root: Path = ROOT) -> dict[str, str]:
    """{path: hash} of the kernel sources of a device, without the families that a group does not use."""
    unused = tuple(name for family, names in FAMILIES.items() if family not in families for name in names)
    matched = {path for pattern in SOURCES[device_type] for path in root.glob(pattern)}
    files = sorted(path for path in matched if path.suffix in SOURCE_SUFFIXES and not path.name.startswith(unused))
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}


def write(path: Path, document: dict[str, Any]) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump(document, stream, indent=1, allow_nan=False)
            stream.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path) -> dict[str, Any]:
    """Read a group's file; ValueError when it is not one of this format."""
    try:
        document = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path.name} is not a result file of format {FORMAT}")
    return document


def measured_before(path: Path, document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """{case: its records} of an unfinished run in `path` like the one of `document`: same command, sources, environment.

    The date may differ. A case with a record that failed, or that the time limit cut short, is left out.
    """
    try:
        earlier = read(path)
    except (FileNotFoundError, ValueError):
        return {}
    same = ("command", "quick", "implementation", "kernels")
    environments = [{k: v for k, v in d["environment"].items() if k != "date"} for d in (earlier, document)]
    if earlier["complete"] or any(earlier[k] != document[k] for k in same) or environments[0] != environments[1]:
        return {}
    found: dict[str, list[dict[str, Any]]] = {}
    for record in earlier["records"]:
        found.setdefault(record["case"], []).append(record)
    return {
        case: rows
        for case, rows in found.items()
        if all(r["status"] != "failed" and r["reason"] != CUT_SHORT for r in rows)
    }


def stale(path: Path, hashes: dict[str, str], took: str) -> str | None:
    """Why a group's results must be measured again; None when they are of these very kernels.

    hashes: kernel_hashes() of today's sources; took: the implementation that impl="auto" takes today.
    """
    if not path.exists():
        return "no results"
    try:
        document = read(path)
    except ValueError as error:
        return str(error)
    if document["quick"]:
        return "results of a quick run"
    if not document["complete"]:
        return "the last run did not finish"
    if document["implementation"] != took:
        return f"measured with impl {document['implementation']!r}, now {took!r}"
    stored = document["kernels"]
    changed = sorted(name for name in stored.keys() | hashes.keys() if stored.get(name) != hashes.get(name))
    return f"kernels changed since: {', '.join(changed)}" if changed else None
