"""Compiles shipped kernel configurations ahead of time for a GPU that need not be there, and reads what came out.

What a kernel streams is the largest block it loads through its first argument: logits, losses, scores or features. Every load
of that block must have the width the configuration declares (`load_bits`), and so must every other load in a loop that holds one:
a single wide load among narrow ones is no proof. Triton's intermediate code says which source positions load the block; the
PTX, or the assembly of AMD, says under the same positions (`.loc`) how wide each load is, and its labels and branches back
say where the loops are.
"""

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adaselect_kernels.kernels import bank, batch_stage, fused, grad_norms, linear, losses, row_stats, select
from adaselect_kernels.kernels.runtime import TRITON_VERSION, Compilation

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FAMILIES: dict[str, Any] = {
    "row_stats": row_stats,
    "batch_stage": batch_stage,
    "select": select,
    "fused": fused,
    "grad_norms": grad_norms,
    "bank": bank,
    "losses": losses,
    "linear": linear,
}
ROOMY = ("sm_80", "sm_90", "sm_100")  # targets that run shipped_for_roomy()
TENSOR_MEMORY = ("sm_90", "sm_100")  # targets that run shipped_with_tensor_memory()
WORKERS = 2

# Bytes a thread. A row or batch kernel that spills has lost its point: one register, kept aside once around a call of the
# float64 division, is all. All eight statistics or seven methods at once may spill a little. Float64 doubles every
# register: all seven methods on 4096 rows spill 264 bytes, once a batch, with 8 warps and with 16.
ONE_REGISTER = 8
FLOAT64_SPILL = 304 if TRITON_VERSION < (3, 7) else 288  # triton 3.6 spills two registers more
# The matrix tiles of `linear` may spill around the sums that they add once a block of classes, never in the product's loop: most
# the wide one on Blackwell, whose accumulators come from memory of their own, for triton 3.6.
WIDE_SPILL = 640 if TRITON_VERSION < (3, 7) else 128
# by word of a configuration's name
SPILL_LIMITS = {"fp64": FLOAT64_SPILL, "all": 64, "every": 64, "wide": WIDE_SPILL, "square": 96, "small": 96}
SHARED_LIMIT = 64 * 1024  # every target has this much a program, on AMD exactly
SHARED_LIMITS = {"roomy": grad_norms.ROOMY_SHARED, "tensor": linear.WIDE_SHARED}  # by the last word of the name

Position = tuple[str, int, int]  # file, line, column
Job = tuple[str, str, str]  # family, target, name of the configuration


@dataclass(frozen=True)
class Report:
    """What a configuration costs on one target."""

    name: str
    target: str
    registers: int  # a thread
    spilled: int  # bytes a thread of local memory
    shared: int  # bytes a program
    loads: tuple[int, ...]  # bits of each load of the streamed block, and of what else a loop around one loads
    spills_in_loop: bool  # whether local memory is touched in a loop that loads the streamed block, or that multiplies

    @property
    def load_bits(self) -> int:
        """The narrowest of them; 0 where there are none."""
        return min(self.loads, default=0)


@lru_cache
def shipped(family: str, target: str) -> tuple[Compilation, ...]:
    """A family's configurations as they are launched on the target: its wave of threads, its shared memory."""
    module, wave = FAMILIES[family], TARGETS[target].warp_size
    sized = {m: m.WARP_SIZE for m in FAMILIES.values() if hasattr(m, "WARP_SIZE")}
    try:
        for each in sized:
            each.WARP_SIZE = wave
        _forget(sized)
        found = list(module.shipped())
        if target in ROOMY and hasattr(module, "shipped_for_roomy"):
            found += module.shipped_for_roomy()
        if target in TENSOR_MEMORY and hasattr(module, "shipped_with_tensor_memory"):
            found += module.shipped_with_tensor_memory()
    finally:
        for each, before in sized.items():
            each.WARP_SIZE = before
        _forget(sized)
    return tuple(found)


def find(job: Job) -> Compilation:
    family, target, name = job
    return next(entry for entry in shipped(family, target) if entry.name == name)


MAIN_TARGET = "sm_90"
MAIN_TYPES, OTHER_TYPES = {"fp32", "bf16"}, {"fp16", "fp64"}
HEAVY = {"all", "every"}  # statistics or methods


def input_type(entry: Compilation) -> str:
    return next(iter({*MAIN_TYPES, *OTHER_TYPES}.intersection(entry.name.split("-"))), "fp32")


def heaviest(family: str, target: str, types: set[str], each_type: bool = True) -> set[str]:
    """The last configuration of every kernel and of its kind of layer, with everything asked of it; of each input type, or
    of the last of `types` alone."""
    last: dict[tuple[Any, ...], Compilation] = {}
    for entry in sorted(shipped(family, target), key=lambda entry: bool(HEAVY & set(entry.name.split("-")))):
        if input_type(entry) in types:
            kind = entry.kernel.fn.__name__, entry.name.split("-")[0], "conv" in entry.name
            last[(*kind, input_type(entry) if each_type else "")] = entry
    return {entry.name for entry in last.values()}


def every_job(family: str) -> list[Job]:
    return [(family, target, entry.name) for target in TARGETS for entry in shipped(family, target)]


def cover(family: str) -> list[Job]:
    """What benchmarks/compiled.json holds: a quarter of all.

    Every float32 and bfloat16 configuration for Hopper; the heaviest of each kernel of float16, which is bfloat16's code
    but for the conversion, and of float64; and the heaviest of each kernel of both types for the other targets.
    """
    chosen = {target: heaviest(family, target, MAIN_TYPES) for target in TARGETS}
    chosen[MAIN_TARGET] = heaviest(family, MAIN_TARGET, OTHER_TYPES)
    chosen[MAIN_TARGET] |= {e.name for e in shipped(family, MAIN_TARGET) if input_type(e) in MAIN_TYPES}
    return [job for job in every_job(family) if job[2] in chosen[job[1]]]


def sample(family: str) -> list[Job]:
    """What `make test` has the time to compile again: of the cover, the heaviest of each kernel of one type for Hopper, and
    one for each other target, another kernel for each."""
    chosen = [
        (family, MAIN_TARGET, name) for name in sorted(heaviest(family, MAIN_TARGET, MAIN_TYPES, each_type=False))
    ]
    for i, target in enumerate(TARGETS):
        names = sorted(heaviest(family, target, MAIN_TYPES, each_type=False))
        if target != MAIN_TARGET:
            chosen.append((family, target, names[i % len(names)]))
    return chosen


def compile_jobs(jobs: Sequence[Job], cache: str | None = None) -> Iterator[Report]:
    """Reports of the jobs in their order, by WORKERS processes.

    cache: a folder for compiled kernels; an empty one hides no failure behind an old success. None: Triton's own.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context, _use_cache, (cache,)) as pool:
        yield from pool.map(_compile_job, jobs)


def _use_cache(folder: str | None) -> None:
    if folder is not None:
        os.environ["TRITON_CACHE_DIR"] = folder


def _compile_job(job: Job) -> Report:
    return compile_for(find(job), job[1])


def spill_limit(name: str) -> int:
    return max((limit for word, limit in SPILL_LIMITS.items() if word in name.split("-")), default=ONE_REGISTER)


def faults(entry: Compilation, report: Report) -> list[str]:
    """What of the configuration's compiled code is not as it must be: a line each."""
    shared_limit = SHARED_LIMITS.get(entry.name.split("-")[-1], SHARED_LIMIT)
    found = []
    if report.spilled > spill_limit(entry.name):
        found.append(f"spills {report.spilled} bytes a thread")
    if report.spills_in_loop:
        found.append("touches local memory in its main loop")
    if report.shared > shared_limit:
        found.append(f"takes {report.shared} bytes of shared memory")
    if report.load_bits < entry.load_bits:
        found.append(f"loads {report.load_bits} bits at a time, not {entry.load_bits}")
    return [f"{entry.name} on {report.target} {fault}" for fault in found]


def _forget(modules: Any) -> None:
    """Drop what the modules remember of configurations."""
    for module in modules:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def source(entry: Compilation) -> ASTSource:
    """The source a real launch would compile: the same constants, types and divisibility."""
    names = entry.kernel.arg_names
    missing = (
        set(entry.pointers) | set(entry.descriptors) | set(entry.constexprs) | set(entry.ones) | set(entry.multiples)
    ) - set(names)
    if missing:
        raise ValueError(f"{entry.name}: no such arguments {sorted(missing)}")
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        if name in entry.constexprs or name in entry.ones:
            signature[name] = "constexpr"
            constants[name] = entry.constexprs.get(name, 1)
        elif name in entry.pointers:
            signature[name] = "*" + entry.pointers[name]
        elif name in entry.descriptors:
            signature[name] = f"tensordesc<{entry.descriptors[name]}>"
        else:
            signature[name] = "i64" if name == "seed" or name.endswith("_bits") else "i32"
        if name in entry.pointers or name in entry.multiples:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(entry.kernel, signature, constants, attributes)


def options(entry: Compilation) -> dict[str, Any]:
    return {"num_warps": entry.num_warps, "enable_fp_fusion": True}


def compile_for(entry: Compilation, target: str) -> Report:
    compiled = triton.compile(source(entry), target=TARGETS[target], options=options(entry))
    streamed = streamed_positions(compiled.asm["ttir"], entry.kernel.arg_names[0])
    shared = compiled.metadata.shared
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        registers = int(_found(r"\.vgpr_count:\s*(\d+)", assembly)[1])
        spilled = int(_found(r"\.private_segment_fixed_size:\s*(\d+)", assembly)[1])  # scratch memory
        loads, spans = streaming_loads(assembly, streamed)
        in_loop = any("scratch_" in line for span in spans for line in assembly.splitlines()[span])
        return Report(entry.name, target, registers, spilled, shared, loads, in_loop)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = _tool("cuobjdump", "-res-usage", cubin)
        usage = _found(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
        registers, spilled = int(usage[1]), int(usage[2]) + int(usage[3])  # a stack frame holds the spills
        loads, _ = streaming_loads(compiled.asm["ptx"], streamed)
        sass = _tool("nvdisasm", "-c", cubin) if spilled > 0 else ""
        in_loop = (bool(loads) and _touches_local_in_loop(sass)) or _touches_local_in_product(sass)
    return Report(entry.name, target, registers, spilled, shared, loads, in_loop)


def _found(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in {text[:500]!r}")
    return match


def _tool(name: str, *arguments: object) -> str:
    """Output of one of the CUDA tools that Triton brings."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([folder / name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def streamed_positions(ttir: str, argument: str) -> set[Position]:
    """Source positions of the loads through a pointer argument whose block has the most elements."""
    places = _places(ttir)
    derived, sizes = {f"%{argument}"}, {}
    for line in ttir.splitlines():
        if "iter_args(" in line:  # a pointer that moves on from round to round
            derived.update(inner for inner, first in re.findall(r"(%[\w.]+) = (%[\w.]+)", line) if first in derived)
        match = re.match(r"\s*(%[\w.]+)\S* = (\S+) (.*?) loc\((#\w+)\)", line)
        if not match:
            continue
        result, operation, rest, place = match.groups()
        operands = set(re.findall(r"%[\w.]+", rest))
        if operation == "tt.load":
            if re.match(r"%[\w.]+", rest)[0] in derived:  # pyright: ignore[reportOptionalSubscript]
                shape = re.search(r"tensor<([\dx]+)x!tt.ptr", rest)
                elements = 1
                for extent in shape[1].split("x") if shape else ():
                    elements *= int(extent)
                sizes.setdefault(elements, set()).add(places[place])
        elif derived & operands and "!tt.ptr" in rest.rsplit("->" if "->" in rest else " : ", 1)[-1]:
            derived.add(result)
    return sizes[max(sizes)] if sizes else set()


def _places(ttir: str) -> dict[str, Position]:
    """Innermost source position of each location of the text: names and call sites lead to it."""
    texts = dict(re.findall(r"^(#loc\w*) = loc\((.*)\)$", ttir, re.MULTILINE))
    found: dict[str, Position] = {}

    def place(name: str) -> Position:
        if name not in found:
            text = texts.get(name, "")
            position = re.match(r'"(.*)":(\d+):(\d+)$', text)
            inner = re.search(r"#loc\w*", text)
            if position:
                found[name] = (os.path.basename(position[1]), int(position[2]), int(position[3]))
            else:
                found[name] = place(inner[0]) if inner else ("", 0, 0)
        return found[name]

    return {name: place(name) for name in texts}


_LOAD = re.compile(
    r"\bld\.global\S*?(?:\.v(?P<count>\d))?\.[bfus](?P<bits>\d+)\s"
    r"|\b(?:global|buffer|flat)_load_(?P<amd>dwordx?\d?|\w+)"
)
_AMD_BITS = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def _load_width(line: str) -> int | None:
    match = _LOAD.search(line)
    if match is None:
        return None
    if match["amd"]:
        return _AMD_BITS.get(match["amd"], 8 if "byte" in match["amd"] else 16)
    return int(match["count"] or 1) * int(match["bits"])


def streaming_loads(assembly: str, streamed: set[Position]) -> tuple[tuple[int, ...], list[slice]]:
    """Bits of each load at the positions, and of every load in the innermost loops that hold one; the lines of those loops."""
    lines = assembly.splitlines()
    files = {number: os.path.basename(path) for number, path in _file_table(lines)}
    widths: dict[int, int] = {}  # line -> bits
    of_stream: set[int] = set()
    here: Position = ("", 0, 0)
    inside = in_statement = False
    for i, line in enumerate(lines):
        location = re.match(r"\s*\.loc\s+(\d+) (\d+) (\d+)", line)
        if location:
            # within a statement of several lines of PTX the positions count on from line to line: its first one holds
            if not in_statement:
                here = (files.get(location[1], ""), int(location[2]), int(location[3]))
            continue
        if "inline asm" in line:
            inside, in_statement = "begin" in line, False
        elif inside:
            in_statement = True
        bits = _load_width(line)
        if bits is not None:
            widths[i] = bits
            if here in streamed:
                of_stream.add(i)
    spans = loops(lines)
    inner = [min(around, key=len) for i in of_stream if (around := [s for s in spans if i in s])]
    spans = [slice(s.start, s.stop) for s in sorted(set(inner), key=lambda s: s.start)]
    wanted = of_stream | {i for i in widths for s in inner if i in s}
    return tuple(widths[i] for i in sorted(wanted)), spans


def _file_table(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        match = re.match(r'\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', line)
        if match:
            yield match[1], match[2]


def loops(lines: Sequence[str]) -> list[range]:
    """Lines from a label to a later branch back to it: PTX, SASS or AMD's assembly."""
    labels: dict[str, int] = {}
    found = []
    for i, line in enumerate(lines):
        label = re.match(r"\s*([$.]?\.?L\w+):", line)
        if label:
            labels[label[1]] = i
        branch = re.search(r"\b(?:bra|BRA|s_c?branch\w*)\b[^/;]*?([$.]\.?L\w+)", line)
        if branch and branch[1] in labels:
            found.append(range(labels[branch[1]], i + 1))
    return found


def _touches_local_in_product(sass: str) -> bool:
    """Whether an innermost loop of matrix instructions loads from or stores to local memory."""
    lines = sass.splitlines()
    spans = loops(lines)
    for span in spans:
        body = [lines[i] for i in span]
        inner = any(other != span and other.start in span and other[-1] in span for other in spans)
        if not inner and any("MMA" in line for line in body) and any(re.search(r"\b(?:LDL|STL)\b", x) for x in body):
            return True
    return False


def _touches_local_in_loop(sass: str) -> bool:
    """Whether a loop that loads from global memory also loads from or stores to local memory."""
    lines = sass.splitlines()
    for span in loops(lines):
        body = [lines[i] for i in span]
        if any("LDG" in line for line in body) and any(re.search(r"\b(?:LDL|STL)\b", line) for line in body):
            return True
    return False
