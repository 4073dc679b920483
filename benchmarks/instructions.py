"""How long the row kernels of few classes take to issue, beside their bytes: `python -m benchmarks.instructions`.

The launches of `per_sample_stats` are recorded by the stand-in of launches.py and compiled for sm_90; a kernel without loops
issues every instruction of its code once a warp, at most. Times at the assumed rates of static.py and, of a multiprocessor,
an instruction of a warp in each of four schedulers at the clock of the published matrix rate. Nothing runs on a GPU.
"""

import re
import tempfile
from typing import Any

import triton

from benchmarks import aot, static
from benchmarks.launches import MULTIPROCESSORS
from benchmarks.markdown import table
from benchmarks.micro import GROUPS

ISSUE_RATE = MULTIPROCESSORS * 4 * 1.83e9  # instructions of a warp a second: an assumption
GROUP = "per_sample_stats"


def assembly(compiled: Any) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return aot._tool("nvdisasm", "-c", cubin.name).splitlines()


def instructions(lines: list[str]) -> int | None:
    """Of a kernel without loops; None where there are loops."""
    if any(len(span) > 2 for span in aot.loops(lines)):  # behind the end there is a branch to itself
        return None
    return sum(bool(re.search(r"/\*[0-9a-f]{4,}\*/ .*;", line)) and "NOP" not in line for line in lines)


def rows() -> list[list[str]]:
    found = []
    for case in GROUPS[GROUP].cases(static.CUDA, False):
        (launch,) = static.launches_of(static.CALLS[GROUP], case)
        target, options = aot.TARGETS[aot.MAIN_TARGET], {"num_warps": launch.num_warps, "enable_fp_fusion": True}
        compiled = triton.compile(launch.source, target=target, options=options)
        count = instructions(assembly(compiled))
        if count is None:
            continue
        issue = 1e6 * count * launch.num_warps * launch.grid[0] / ISSUE_RATE
        moved = 1e6 * static.bytes_given(launch) / static.COPY_RATE
        per_row = count * launch.num_warps * launch.grid[0] / case.params["n"]
        found.append(
            [case.name, str(count), f"{per_row:,.1f}", f"{issue:,.1f}", f"{moved:,.1f}", f"{issue / moved:.2f}"]
        )
    return found


if __name__ == "__main__":
    print(table(("case", "instructions", "a row", "issue, us", "bytes, us", "issue over bytes"), rows()))
