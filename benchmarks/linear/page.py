"""The tables of docs/performance.md for this group, from its records."""

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import number, table
from benchmarks.micro.case import OURS

LEGEND = """*product* is the matrix products that the function cannot do without and nothing else, in the same types: for scores
hidden weight^T, for a loss that and the two of the gradients. TFLOP/s counts these, so a product that is computed twice counts
once. *full* is ours on all rows. *naive* stores the logits; *compiled* is torch.compile of it; *torch* is
`torch.nn.functional.linear_cross_entropy`, *torch_chunked* its form in chunks of rows; *cce* is Apple's cut-cross-entropy, on a
CPU its form for torch.compile; *liger* is liger-kernel. These four find the loss alone: neither gradient norms nor a selection.
Memory is the peak beyond inputs and results: on a GPU of PyTorch's allocator, on a CPU the growth of the resident set in a
process of its own. The libraries are timed where they are found: `pip install --no-deps liger-kernel cut-cross-entropy`.
"""
TITLES = {
    "score": "Statistics and selection of all rows; four methods, with state update",
    "loss": "Mean loss of the chosen rows, forward and backward",
    "backward": "The same, backward alone",
    "stored": "Mean loss of the chosen rows of stored logits, forward and backward; over floor is over a read of the logits",
}
HEAD = ("case", "contender", "ms a call", "over product", "over ours", "TFLOP/s", "memory, MiB")


def tables(document: Mapping[str, Any]) -> str:
    parts, notes = [LEGEND], []
    for kind, title in TITLES.items():
        records = [r for r in document["records"] if r["params"]["kind"] == kind]
        measured = [r for r in records if r["status"] == "measured"]
        notes += [
            f"- {r['case']}, {r['contender']}: {r['status']}, {r['reason']}" for r in records if r not in measured
        ]
        notes += [
            f"- memory of {r['case']}, {r['contender']}: {r['memory_error']}" for r in measured if "memory_error" in r
        ]
        if measured:
            head = HEAD if kind != "stored" else ("over floor" if h == "over product" else h for h in HEAD)
            parts.append(f"{title}:\n\n{table(tuple(head), map(_row, measured))}")
    return "\n".join(parts) + ("\nNot measured:\n\n" + "\n".join(notes) + "\n" if notes else "")


def _row(r: Mapping[str, Any]) -> list[str]:
    p20, p50, p80 = (number(r["us"][q] / 1e3) for q in ("p20", "p50", "p80"))
    floor = "" if r["over_floor"] is None else f"{r['over_floor']:.2f}"
    ratio = "" if r["ratio"] is None or r["contender"] == OURS else f"{r['ratio']['p50']:.2f}"
    rate = f"{teraflops(r, 'p50'):.3g}" if r["params"]["flops"] else ""
    extra = r.get("extra_bytes")
    memory = "" if extra is None else f"{extra / 2**20:,.1f}"
    case = r["case"].partition(" ")[2]  # the kind is in the title
    return [case, r["contender"], f"{p50} [{p20}, {p80}]", floor, ratio, rate, memory]


def teraflops(record: Mapping[str, Any], quantile: str) -> float:
    return record["params"]["flops"] / record["us"][quantile] / 1e6
