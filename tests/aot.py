"""Compiles shipped kernel configurations ahead of time for a GPU that need not be there, and reads what came out."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adaselect_kernels.kernels.runtime import Compilation

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Report:
    """What a configuration costs on one target."""

    name: str
    target: str
    registers: int  # a thread
    spilled: int  # bytes a thread of local memory
    shared: int  # bytes a program
    load_bits: int  # widest global load


def source(entry: Compilation) -> ASTSource:
    """The source a real launch would compile: the same constants, types and divisibility."""
    names = entry.kernel.arg_names
    missing = set(entry.pointers) | set(entry.constexprs) | set(entry.ones) | set(entry.multiples)
    assert missing <= set(names), f"{entry.name}: no such arguments {sorted(missing - set(names))}"
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        if name in entry.constexprs or name in entry.ones:
            signature[name] = "constexpr"
            constants[name] = entry.constexprs.get(name, 1)
        elif name in entry.pointers:
            signature[name] = "*" + entry.pointers[name]
        else:
            signature[name] = "i64" if name == "seed" or name.endswith("_bits") else "i32"
        if name in entry.pointers or name in entry.multiples:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(entry.kernel, signature, constants, attributes)


def compile_for(entry: Compilation, target: str) -> Report:
    compiled = triton.compile(source(entry), target=TARGETS[target], options={"num_warps": entry.num_warps})
    shared = compiled.metadata.shared
    if target.startswith("sm_"):
        registers, spilled = _cubin_resources(compiled.asm["cubin"])
        return Report(entry.name, target, registers, spilled, shared, _ptx_load_bits(compiled.asm["ptx"]))
    text = compiled.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
    spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text)[1])
    widths = [32 * int(n) for n in re.findall(r"(?:global|buffer)_load_dwordx(\d)", text)]
    return Report(entry.name, target, registers, spilled, shared, max(widths, default=32))


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory a thread (stack frame and spills)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert usage, f"no resource usage in {text!r}"
    return int(usage[1]), int(usage[2]) + int(usage[3])


def _ptx_load_bits(ptx: str) -> int:
    widths = [int(vector or 1) * int(bits) for vector, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)]
    return max(widths, default=0)
