"""Shipped kernel configurations compiled ahead of time: each builds for its targets, does not spill, and loads wide.

No GPU is needed. benchmarks/compiled.json says of a quarter of all what they compiled to; a sample of it is compiled here,
the rest is held to be of the kernels as they are. ADASELECT_AOT=all compiles every configuration for every target.
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
from benchmarks import aot, compiled, instructions, static
from benchmarks.launches import record, stand_in
from benchmarks.records import ROOT

TABLE = compiled.read()


@pytest.mark.parametrize("family", aot.FAMILIES)
def test_the_table_is_of_the_kernels_as_they_are(family):
    """Else a kernel that lost a wide load, or spills, could be committed with a suite that passes."""
    jobs = aot.cover(family)
    assert [job for job in TABLE.rows if job[0] == family] == jobs, compiled.REGENERATE
    assert compiled.stale(jobs, TABLE) == [], compiled.REGENERATE
    wrong = [fault for job in jobs for fault in aot.faults(aot.find(job), TABLE.rows[job].report(job))]
    assert not wrong, "\n".join(wrong)


def test_the_table_is_of_the_pinned_compiler_and_of_no_other_family():
    assert f"triton=={TABLE.triton}" in (ROOT / "constraints.txt").read_text().split(), compiled.REGENERATE
    assert {job[0] for job in TABLE.rows} == set(aot.FAMILIES)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", aot.FAMILIES)
def test_shipped_configurations_compile(family, generator, monkeypatch, tmp_path):
    for target in aot.TARGETS:
        names = [entry.name for entry in aot.shipped(family, target)]
        assert len(set(names)) == len(names)
    cover = aot.cover(family)
    drawn = cover[int(torch.randint(len(cover), (), generator=generator))]  # in time, each has its turn
    if os.environ.get("ADASELECT_AOT") == "all":
        wanted = aot.every_job(family)
        reports = aot.compile_jobs(wanted, str(tmp_path))
    else:
        wanted = [*aot.sample(family), drawn]
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        reports = (aot.compile_for(aot.find(job), job[1]) for job in wanted)
    wrong = []
    for job, report in zip(wanted, reports, strict=True):
        wrong += aot.faults(aot.find(job), report)
        row = TABLE.rows.get(job)
        if row is not None and TABLE.triton == triton.__version__ and row != (now := compiled.Row.of(job, report)):
            wrong.append(f"{' '.join(job)} compiles to {now}, the table says {row}")
    assert not wrong, "\n".join(wrong)
    assert list(tmp_path.iterdir()), "it was not compiled"


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


@pytest.mark.parametrize(("target", "block"), [("sm_90", 16384), ("gfx942", 32768)])
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


MODULE = """
import triton
import triton.language as tl

SCALE = tl.constexpr(2.0)

@triton.jit
def scaled(x):
    return x * SCALE

@triton.jit
def planted_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    '''Scales n values.'''
    rows = tl.arange(0, BLOCK)
    tl.store(out_ptr + rows, scaled(tl.load(x_ptr + rows, mask=rows < n)), mask=rows < n)
"""


class TestFingerprint:
    @pytest.fixture
    def kernel(self, tmp_path):
        """(old, new) -> the kernel of MODULE with that replaced."""

        def make(old: str = "", new: str = ""):
            assert old in MODULE
            path = tmp_path / f"module{len(list(tmp_path.iterdir()))}.py"
            path.write_text(MODULE.replace(old, new, 1))
            specification = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(module)
            return module.planted_kernel

        return make

    def test_only_what_is_compiled_counts(self, kernel):
        def fingerprint(*replaced):
            return compiled.fingerprint(planted(kernel(*replaced), 64), "sm_90")

        same = [
            ("Scales n", "Doubles n"),
            ("* SCALE", "* SCALE  # a comment"),
            ("\n@triton", "\n\nUNUSED = 1\n@triton"),
        ]
        other = [
            ("rows < n)", "rows <= n)"),
            ("x * SCALE", "x + SCALE"),
            ("(2.0)", "(3.0)"),
            ("out_ptr +", "out_ptr + 1 +"),
        ]
        assert {fingerprint(*replaced) for replaced in same} == {fingerprint()}
        assert len({fingerprint(), *(fingerprint(*replaced) for replaced in other)}) == 1 + len(other)

    def test_every_part_of_a_configuration_counts(self, kernel):
        entry = planted(kernel(), 64)
        others = [entry._replace(num_warps=8), entry._replace(constexprs={"BLOCK": 128}), entry._replace(multiples=())]
        others.append(entry._replace(pointers={"x_ptr": "fp32", "out_ptr": "bf16"}))
        found = {compiled.fingerprint(each, "sm_90") for each in (entry, *others)}
        assert len(found | {compiled.fingerprint(entry, "sm_80")}) == 2 + len(others)

    def test_a_row_of_another_kernel_is_stale_and_what_is_current_is_not_compiled_again(self, tmp_path, monkeypatch):
        """And so is every row where reports were read otherwise, or another Triton compiled them."""
        jobs = list(TABLE.rows)
        table = TABLE._replace(rows=TABLE.rows | {jobs[3]: TABLE.rows[jobs[3]]._replace(fingerprint="0")})
        assert compiled.stale(jobs, table) == [jobs[3]]
        assert compiled.stale([*jobs[:2], jobs[3]], TABLE._replace(rows={jobs[0]: TABLE.rows[jobs[0]]})) == [
            jobs[1],
            jobs[3],
        ]
        assert compiled.stale(jobs[:2], TABLE._replace(reader="0")) == jobs[:2]
        asked = []

        def compile_jobs(wanted):
            asked.append(list(wanted))
            return (TABLE.rows[job].report(job) for job in wanted)

        monkeypatch.setattr(aot, "compile_jobs", compile_jobs)
        for version, expected in ((triton.__version__, [jobs[3]]), ("0.0", jobs)):
            compiled.write(table._replace(triton=version), path := tmp_path / "table.json")
            assert compiled.refresh(path) == TABLE.reports()
            assert asked.pop() == expected
            assert compiled.read(path) == TABLE._replace(triton=triton.__version__)


def test_the_page_is_written_from_the_table_and_the_predictions_of_today(monkeypatch):
    """docs/static_gate.md does not depend on the versions of the compilers here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # gigabytes nobody reads
    assert static.PAGE.read_text() == static.text(TABLE.reports()), compiled.REGENERATE


def test_instructions_are_counted_where_each_runs_once():
    once = ["/*0000*/ MOV R1, c[0x0][0x28] ;", "/*0010*/ EXIT ;", ".L_x_0:", "/*0020*/ BRA `(.L_x_0);", "/*0030*/ NOP;"]
    assert instructions.instructions(once) == 3
    looping = [once[0], ".L_x_1:", "/*0010*/ IADD3 R1, R1, 1, RZ ;", "/*0020*/ @P0 BRA `(.L_x_1) ;", *once[1:]]
    assert instructions.instructions(looping) is None


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
