"""What works on this machine: every backend proven on a small batch, versions, overrides, and what is missing.

`examine()` returns plain data, ready for JSON; `render()` prints it, with rich where rich is installed.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaselect_kernels import dispatch
from adaselect_kernels._version import __version__
from adaselect_kernels.checks import DEBUG_VARIABLE
from adaselect_kernels.functional import Selection, fused_select
from adaselect_kernels.options import METHODS
from adaselect_kernels.state import AdaSelectionState

ENVIRONMENT = (dispatch.ENVIRONMENT_VARIABLE, DEBUG_VARIABLE, "ADASELECT_CPU_CAPABILITY", "TRITON_INTERPRET")
DEMO_PACKAGES = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}  # module: distribution

_PROOF_STEPS = 2  # the second one uses the weights that the first one's losses moved


class Agreement(NamedTuple):
    """Rows that only one of two selections chose: within the tolerance of the k-th best score, and beyond it."""

    near_ties: int
    wrong: int


def compare_choices(first: Tensor, second: Tensor, scores: Tensor, tolerance: float) -> Agreement:
    """Compare two choices of k rows by `scores` [N]; a near tie is within `tolerance` of the k-th best, relatively.

    A row chosen twice is wrong, as is one too many or too few.
    """
    only_one = torch.zeros(len(scores), dtype=torch.int8, device=scores.device)
    only_one[first] += 1
    only_one[second] -= 1
    best = scores.topk(len(first)).values
    allowed = tolerance * float(best[-1].abs())
    distance = (scores[only_one != 0] - best[-1]).abs()
    wrong = int((distance > allowed).sum()) + abs(len(first.unique()) - len(second.unique()))
    return Agreement(near_ties=int((distance <= allowed).sum()), wrong=wrong)


def examine() -> dict[str, Any]:
    """Everything `adaselect doctor` reports; `problems` lists what is wrong, not what is merely absent."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    backends = [_examine_backend(impl, device) for device in devices for impl in dispatch.IMPLS[1:]]
    auto = {str(device): _auto_choice(device) for device in devices}
    problems = [f"{b['impl']} on {b['device']} is BROKEN: {b['detail']}" for b in backends if b["status"] == "broken"]
    if dispatch.EXTENSION is None and _extension_file() is not None:
        problems.append(f"the extension is built, but {dispatch.EXTENSION_ERROR}")
    problems += [f"impl='auto' on {device}: {choice['error']}" for device, choice in auto.items() if choice["error"]]
    return {
        "ok": not problems,
        "problems": problems,
        "devices": [_describe_device(device, auto[str(device)]["impl"]) for device in devices],
        "backends": backends,
        "extension": None if dispatch.EXTENSION is None else dict(dispatch.EXTENSION.build_info()),
        "versions": versions(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "missing": _missing(),
    }


def versions() -> dict[str, str | None]:
    """Versions of the package and of what it runs on; None for what is not installed."""
    return {
        "adaselect_kernels": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda of torch": torch.version.cuda,
        "triton": _installed_version("triton"),
        "compiler": _compiler_version(),
    }


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler_version() -> str | None:
    """First line of what the C++ compiler says of itself; None when there is none."""
    candidates = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    path = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if path is None:
        return None
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return answer.splitlines()[0] if answer else None


def _describe_device(device: torch.device, auto: str | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": str(device), "auto": auto}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return facts | {"name": name, "capability": f"sm_{major}{minor}", "threads": None}
    name = platform.processor() or platform.machine()
    return facts | {
        "name": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _auto_choice(device: torch.device) -> dict[str, str | None]:
    """What impl="auto" runs on `device`, or why it refuses."""
    try:
        served = dispatch.resolve("auto", device)
    except (ValueError, RuntimeError, ImportError) as error:
        return {"impl": None, "error": str(error)}
    usable = (impl for impl in dispatch.IMPLS[1:] if dispatch.unavailable(impl, device) is None)
    return {"impl": next(impl for impl in usable if dispatch.resolve(impl, device) is served), "error": None}


def _examine_backend(impl: str, device: torch.device) -> dict[str, str]:
    entry = {"device": str(device), "impl": impl}
    reason = dispatch.unavailable(impl, device)
    if reason is not None:
        return entry | {"status": "unavailable", "detail": reason}
    try:
        fault = _prove(impl, device)
    except Exception as error:  # whatever a backend raises here is the finding
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        return entry | {"status": "broken", "detail": fault}
    return entry | {"status": "ok", "detail": "agrees with the float64 reference"}


def _prove(impl: str, device: torch.device) -> str | None:
    """Run two steps of fused_select with every method; what differs from the float64 reference, None when nothing."""
    generator = torch.Generator().manual_seed(0)
    state = AdaSelectionState.create(METHODS, device=device)
    oracle_state = AdaSelectionState.create(METHODS)
    for step in range(1, _PROOF_STEPS + 1):
        logits = torch.randn(48, 10, generator=generator) * 2
        targets = torch.randint(10, (48,), generator=generator)
        oracle = fused_select(logits.double(), targets, 0.25, methods=METHODS, state=oracle_state, impl="reference")
        got = fused_select(logits.to(device), targets.to(device), 0.25, methods=METHODS, state=state, impl=impl)
        fault = _difference(Selection(*(tensor.cpu() for tensor in got)), oracle)
        if fault is None and not torch.allclose(state.weights.cpu(), oracle_state.weights, rtol=1e-3):
            fault = f"method weights {state.weights.tolist()}, expected {oracle_state.weights.tolist()}"
        if fault is not None:
            return f"step {step}: {fault}"
    return None


def _difference(got: Selection, oracle: Selection) -> str | None:
    """A coarse check, to tell right from wrong; the tests hold the backends to their rounding."""
    for name, rtol in (("losses", 1e-4), ("scores", 1e-3)):
        value, expected = getattr(got, name), getattr(oracle, name)
        if not torch.allclose(value, expected, rtol=rtol, atol=1e-6):
            row = int((value - expected).abs().nan_to_num(nan=torch.inf).argmax())
            return f"{name}[{row}] is {float(value[row]):.6g}, expected {float(expected[row]):.6g}"
    agreement = compare_choices(got.indices, oracle.indices, oracle.scores, tolerance=1e-3)
    if agreement.wrong:
        return f"{agreement.wrong} rows differ from the reference's choice"
    return (
        None
        if int(got.n_valid) == int(oracle.n_valid)
        else f"n_valid {int(got.n_valid)}, expected {int(oracle.n_valid)}"
    )


def _extension_file() -> Path | None:
    """The compiled extension beside this file, whether or not it loads."""
    folder = Path(__file__).parent
    paths = (folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _missing() -> list[dict[str, str]]:
    """What this machine lacks, and how to get it."""
    missing = []
    if dispatch.EXTENSION is None:
        missing.append({"what": "compiled extension (impl='cpu')", "hint": _extension_hint()})
    if importlib.util.find_spec("triton") is None:
        missing.append({"what": "triton (impl='triton')", "hint": "pip install 'adaselect_kernels[triton]'"})
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        how = (
            "no driver or device is visible to torch"
            if built
            else "this torch is built without CUDA: pytorch.org has one"
        )
        missing.append({"what": "CUDA device", "hint": how})
    absent = [name for module, name in DEMO_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if absent:
        missing.append(
            {"what": ", ".join(absent), "hint": "pip install 'adaselect_kernels[demo]' (for `adaselect demo`)"}
        )
    return missing


def _extension_hint() -> str:
    if _extension_file() is not None:
        return "it is built: put right what the problem below names, or build it again"
    if _compiler_version() is None:
        return "install a C++17 compiler (Debian, Ubuntu: apt install g++), then pip install . in the source folder"
    return "build it against the torch that is installed: pip install --no-build-isolation . in the source folder"


class _Section(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _show(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "-" if value in (None, "") else str(value)


def _facts(table: dict[str, Any]) -> list[tuple[str, ...]]:
    return [(name, _show(value)) for name, value in table.items()]


def _sections(report: dict[str, Any]) -> list[_Section]:
    devices = [
        (d["device"], d["name"], d["capability"], _show(d["threads"]), _show(d["auto"])) for d in report["devices"]
    ]
    backends = [(b["device"], b["impl"], b["status"].upper(), b["detail"]) for b in report["backends"]]
    missing = [(m["what"], m["hint"]) for m in report["missing"]]
    return [
        _Section("Backends", ("device", "impl", "status", "detail"), backends),
        _Section("Devices", ("device", "name", "capability", "threads", "impl='auto' runs"), devices),
        _Section("Compiled extension", ("fact", "value"), _facts(report["extension"] or {"extension": "not loaded"})),
        _Section("Versions", ("of", "version"), _facts(report["versions"])),
        _Section("Environment", ("variable", "value"), _facts(report["environment"])),
        _Section("Missing", ("what", "how to get it"), missing),
    ]


def render(report: dict[str, Any]) -> None:
    """Print the report as tables, then the verdict."""
    sections = [section for section in _sections(report) if section.rows]
    if importlib.util.find_spec("rich") is None:
        _print_plain(sections)
    else:
        _print_rich(sections)
    for problem in report["problems"]:
        print(f"PROBLEM: {problem}")
    if report["ok"]:
        print("Everything available here works.")


def _print_plain(sections: list[_Section]) -> None:
    for title, header, rows in sections:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        print(f"\n{title}")
        for row in (header, *rows):
            print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


def _print_rich(sections: list[_Section]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"OK": "green", "UNAVAILABLE": "yellow", "BROKEN": "bold red"}
    console = Console()
    for title, header, rows in sections:
        table = Table(*header, title=title, title_justify="left", title_style="bold", header_style="dim")
        for row in rows:
            table.add_row(*(Text(cell, style=colours.get(cell, "")) for cell in row))
        console.print(table)
