"""Every shipped kernel configuration compiled ahead of time: it builds for each target, spills little, loads wide.

No GPU is needed. Hopper gets every configuration; the other targets get the heaviest of each kernel and input type, or
every one with ADASELECT_AOT=all. A fresh cache directory keeps an old success from hiding a new failure.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from adaselect_kernels.kernels import batch_stage, fused, row_stats, select
from tests.aot import TARGETS, Report, compile_for

FAMILIES = {"row_stats": row_stats, "batch_stage": batch_stage, "select": select, "fused": fused}
WORKERS = 2

# Bytes a thread. A row or batch kernel that spills has lost its point: one register, kept aside once around a call of the
# float64 division, is all. All eight statistics or seven methods at once may spill a little. Float64 doubles every
# register: all seven methods on 4096 rows spill 264 bytes, once a batch, with 8 warps and with 16. On AMD's 64-lane
# waves the compiler keeps more in flight.
ONE_REGISTER = 8
SPILL_LIMITS = {"fp64": 288, "all": 64, "every": 64}
AMD_SPILL_LIMIT = 256
SHARED_LIMIT = 64 * 1024  # every target has this much a program, on AMD exactly


def use_cache(path: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = path


def compile_numbered(family: str, number: int, target: str) -> Report:
    return compile_for(list(FAMILIES[family].shipped())[number], target)


def heaviest(entries) -> list[int]:
    """The last configuration of every kernel and input type: shipped() goes from light to heavy."""
    last = {(entry.kernel.fn.__name__, tuple(entry.pointers.values())): i for i, entry in enumerate(entries)}
    return sorted(last.values())


def spill_limit(name: str, target: str) -> int:
    if target == "gfx942":
        return AMD_SPILL_LIMIT
    return max((limit for word, limit in SPILL_LIMITS.items() if word in name.split("-")), default=ONE_REGISTER)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_shipped_configuration_compiles(family, tmp_path, capsys):
    entries = list(FAMILIES[family].shipped())
    assert len({entry.name for entry in entries}) == len(entries)
    everything = os.environ.get("ADASELECT_AOT") == "all"
    jobs = [
        (number, target)
        for target in TARGETS
        for number in (range(len(entries)) if everything or target == "sm_90" else heaviest(entries))
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context, use_cache, (str(tmp_path),)) as pool:
        pending = [(number, target, pool.submit(compile_numbered, family, number, target)) for number, target in jobs]
        reports = [(entries[number], target, future.result()) for number, target, future in pending]
    if os.environ.get("ADASELECT_AOT_REPORT"):
        with capsys.disabled():
            for _, _, r in reports:
                print(
                    f"\n{r.name:40} {r.target:7} {r.registers:4} registers {r.spilled:4} spilled {r.shared:6} shared",
                    end="",
                )
    wrong = []
    for entry, target, report in reports:
        if report.spilled > spill_limit(entry.name, target):
            wrong.append(f"{entry.name} on {target} spills {report.spilled} bytes a thread")
        if report.shared > SHARED_LIMIT:
            wrong.append(f"{entry.name} on {target} takes {report.shared} bytes of shared memory")
        if report.load_bits < entry.load_bits:
            wrong.append(f"{entry.name} on {target} loads {report.load_bits} bits at a time, not {entry.load_bits}")
    assert not wrong, "\n".join(wrong)
