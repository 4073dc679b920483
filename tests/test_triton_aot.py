"""Shipped kernel configurations compiled ahead of time: each builds for its targets, does not spill, and loads wide.

No GPU is needed. ADASELECT_AOT=all compiles every configuration for every target, in four times the time.
"""

import importlib.util
import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import torch
import triton
import triton.language as tl

from adaselect_kernels import select_topk
from adaselect_kernels.kernels.runtime import Compilation
from benchmarks import aot, static
from benchmarks.launches import record, stand_in
from benchmarks.records import ROOT


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", aot.FAMILIES)
def test_every_shipped_configuration_compiles(family, tmp_path):
    for target in aot.TARGETS:
        names = [entry.name for entry in aot.shipped(family, target)]
        assert len(set(names)) == len(names)
    wanted = aot.every_job(family) if os.environ.get("ADASELECT_AOT") == "all" else aot.cover(family)
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


@triton.jit
def moving_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """The sum again, with a pointer that moves."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(x_ptr + tl.arange(0, BLOCK), mask=start + tl.arange(0, BLOCK) < n, other=0.0)
        x_ptr += BLOCK
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


def planted(kernel, block: int, *, multiples: tuple[str, ...] = ("n",), num_warps: int = 4) -> Compilation:
    pointers = {"x_ptr": "fp32", "out_ptr": "fp32"}
    return Compilation("planted", kernel, pointers, {"BLOCK": block}, num_warps, multiples=multiples, load_bits=128)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_lost_wide_load_is_seen(target):
    for kernel in (wide_kernel, moving_kernel):
        right = aot.compile_for(planted(kernel, 2048), target)
        assert set(right.loads) == {128}
        assert aot.faults(planted(kernel, 2048), right) == []
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


class TestPage:
    """docs/static_gate.md, in all that does not depend on the versions of the compilers."""

    @pytest.fixture
    def page(self) -> str:
        return static.PAGE.read_text()

    def test_predictions_are_those_of_today(self, page, tmp_path, monkeypatch):
        """Written anew beside the compiled code, the page is as it was."""
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # gigabytes nobody reads
        stale = tmp_path / "page.md"
        stale.write_text(page.replace(" us |", " ms |", 1))
        static.write_predictions(stale)
        assert stale.read_text() == page, "run `python -m benchmarks static`"

    def test_configurations_are_those_that_ship(self, page):
        rows = [line.split(" | ") for line in page.split(static.COMPILED)[1].splitlines() if line.startswith("| ")]
        found = [(row[0].removeprefix("| "), *row[1:3]) for row in rows if row[0] != "| configuration"]
        expected = []
        for family in aot.FAMILIES:
            entries = {name: aot.find((family, target, name)) for _, target, name in aot.cover(family)}
            expected += [(name, str(entry.num_warps), str(entry.load_bits or "")) for name, entry in entries.items()]
        assert sorted(found) == sorted(expected), "run `python -m benchmarks static`"


class TestModel:
    def test_a_tensor_counts_once_a_launch(self):
        scores = torch.empty(1 << 20)
        (launch,) = record(lambda: select_topk(scores, 1 << 10, order="index", impl="triton"))
        assert static.bytes_given(launch) >= 4 << 20
        arguments = (scores, scores, scores[1:], 7, torch.empty(5, dtype=torch.int64))
        assert static.bytes_given(launch._replace(arguments=arguments)) == 2 * (4 << 20) - 4 + 40

    def test_the_time_is_launches_waits_and_bytes(self):
        scores = torch.empty(1 << 20)
        (launch,) = record(lambda: select_topk(scores, 5, order="index", impl="triton"))
        names = launch.source.fn.arg_names
        programs = launch.arguments[names.index("programs")]
        assert launch.grid[0] == (static.waits(launch) + 1) * programs
        assert static.waits(launch) >= 3, "a wait for each digit but the first, and for the compaction"
        of_a_megabyte = [torch.empty(1_000_000, dtype=torch.uint8) if name == "scores_ptr" else 0 for name in names]
        of_a_megabyte[names.index("programs")] = programs
        of_a_megabyte = launch._replace(arguments=tuple(of_a_megabyte))
        assert static.predicted_us([of_a_megabyte] * 3) == pytest.approx(3 * (2.0 + static.waits(launch) + 1 / 4.3))
        alone = of_a_megabyte._replace(grid=(programs, 1, 1))
        assert static.predicted_us([alone]) == pytest.approx(2.0 + 1 / 4.3)

    @pytest.mark.parametrize(
        ("registers", "shared", "num_warps", "expected"),
        [
            (32, 0, 4, (2048, "threads")),
            (33, 0, 4, (1536, "registers")),  # rounded up to 40: 12 warps a scheduler
            (255, 0, 8, (256, "registers")),
            (168, 0, 4, (384, "registers")),
            (32, 64 * 1024, 4, (384, "shared")),  # 65 KB with what a program takes beside its own
            (16, 0, 1, (1024, "threads")),  # 32 programs of a warp each
        ],
    )
    def test_resident_threads(self, registers, shared, num_warps, expected):
        report = aot.Report("", "sm_90", registers, 0, shared, (), False)
        assert static.resident(report, num_warps) == expected


def test_the_sanitizers_see_every_kernel():
    """tests/gpu/sanitizer_target.py launches each kernel that ships, though not each configuration."""
    specification = importlib.util.spec_from_file_location("sanitizer_target", ROOT / "tests/gpu/sanitizer_target.py")
    target = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(target)
    with stand_in(log := []):
        for call in target.paths(torch.device("cpu")).values():
            call()
    launched = {launch.kernel for launch in log}
    shipped = {entry.kernel.fn.__name__ for family in aot.FAMILIES for entry in aot.shipped(family, aot.MAIN_TARGET)}
    assert shipped - launched == set()
