"""Shipped kernel configurations compiled ahead of time: each builds for its targets, does not spill, and loads wide.

No GPU is needed. Every float32 and bfloat16 configuration is compiled for Hopper; the other targets, float16 (bfloat16's code
but for the conversion) and float64 get the heaviest of each kernel and input types. `python -m benchmarks static` compiles
every configuration for every target, with the same checks; ADASELECT_AOT=all does here.
"""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton
import triton.language as tl

from adaselect_kernels.kernels.runtime import Compilation
from benchmarks import aot

MAIN_TARGET = "sm_90"
MAIN_TYPES, OTHER_TYPES = {"fp32", "bf16"}, {"fp16", "fp64"}
HEAVY = {"all", "every"}  # statistics or methods


def input_type(entry: Compilation) -> str:
    return next(iter({*MAIN_TYPES, *OTHER_TYPES}.intersection(entry.name.split("-"))), "fp32")


def heaviest(family: str, target: str, types: set[str]) -> set[str]:
    """The last configuration of every kernel, of its kind of layer and of each input type, with everything asked of it."""
    last: dict[tuple, Compilation] = {}
    for entry in sorted(aot.shipped(family, target), key=lambda entry: bool(HEAVY & set(entry.name.split("-")))):
        last[entry.kernel.fn.__name__, entry.name.split("-")[0], "conv" in entry.name, input_type(entry)] = entry
    return {entry.name for entry in last.values() if input_type(entry) in types}


def jobs(family: str) -> list[aot.Job]:
    every = [(family, target, entry.name) for target in aot.TARGETS for entry in aot.shipped(family, target)]
    if os.environ.get("ADASELECT_AOT") == "all":
        return every
    chosen = {target: heaviest(family, target, MAIN_TYPES) for target in aot.TARGETS}
    chosen[MAIN_TARGET] = heaviest(family, MAIN_TARGET, OTHER_TYPES)
    chosen[MAIN_TARGET] |= {e.name for e in aot.shipped(family, MAIN_TARGET) if input_type(e) in MAIN_TYPES}
    return [job for job in every if job[2] in chosen[job[1]]]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", aot.FAMILIES)
def test_every_shipped_configuration_compiles(family, tmp_path):
    for target in aot.TARGETS:
        names = [entry.name for entry in aot.shipped(family, target)]
        assert len(set(names)) == len(names)
    wanted = jobs(family)
    reports = aot.compile_jobs(wanted, str(tmp_path))
    wrong = [fault for job, report in zip(wanted, reports, strict=True) for fault in aot.faults(aot.find(job), report)]
    assert not wrong, "\n".join(wrong)


@triton.jit
def wide_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Adds up n values; n is a multiple of 16, so that a mask cannot end inside a vector."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + rows, mask=rows < n, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def half_narrow_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Beside each wide load another, one off the boundary: the widest load alone looks right."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + rows, mask=rows < n, other=0.0)
        total += tl.load(x_ptr + 1 + rows, mask=rows < n - 1, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


def planted(kernel, block: int, *, multiples: tuple[str, ...] = ("n",), num_warps: int = 4) -> Compilation:
    pointers = {"x_ptr": "fp32", "out_ptr": "fp32"}
    return Compilation("planted", kernel, pointers, {"BLOCK": block}, num_warps, multiples=multiples, load_bits=128)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_lost_wide_load_is_seen(target):
    right = aot.compile_for(planted(wide_kernel, 2048), target)
    assert set(right.loads) == {128}
    assert aot.faults(planted(wide_kernel, 2048), right) == []
    # the same kernel when nothing is known of n; and one that keeps half of its loads wide
    for entry in (planted(wide_kernel, 2048, multiples=()), planted(half_narrow_kernel, 2048)):
        report = aot.compile_for(entry, target)
        assert aot.faults(entry, report) == [f"planted on {target} loads 32 bits at a time, not 128"]
    assert max(report.loads) == 128


@pytest.mark.parametrize(("target", "block"), [("sm_90", 16384), ("gfx942", 65536)])
def test_spills_and_local_memory_in_the_loop_are_seen(target, block):
    entry = planted(wide_kernel, block, num_warps=1)  # as many sums a thread as it has registers, or more
    report = aot.compile_for(entry, target)
    assert report.spills_in_loop
    assert aot.faults(entry, report)[:2] == [
        f"planted on {target} spills {report.spilled} bytes a thread",
        f"planted on {target} touches local memory in its main loop",
    ]


def test_shared_memory_over_the_limit_is_seen():
    entry = planted(wide_kernel, 2048)
    report = aot.Report("planted", "sm_80", 32, 0, aot.SHARED_LIMIT + 1, (128,), False)
    assert aot.faults(entry, report) == ["planted on sm_80 takes 65537 bytes of shared memory"]


def test_every_block_that_must_be_wide_is_found():
    """A family that declares a width has it checked on every configuration of its streaming kernels."""
    declared = {entry.kernel.fn.__name__ for f in aot.FAMILIES for entry in aot.shipped(f, "sm_90") if entry.load_bits}
    assert {"tile_kernel", "stream_kernel", "fused_kernel"} <= declared


def test_waves_of_64_have_their_own_configurations():
    def first(target):
        return next(e.constexprs for e in aot.shipped("row_stats", target) if e.name == "tile-fp32-all-C16-vec4")

    assert first("gfx942")["BLOCK_N"] == 2 * first("sm_90")["BLOCK_N"]
    assert aot.row_stats.WARP_SIZE == 32
