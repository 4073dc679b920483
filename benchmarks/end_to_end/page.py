"""The table of docs/performance.md for this group, from its records."""

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import table

LEGEND = """Times are milliseconds a candidate batch of 128 images: scoring forward, selecting (all that is neither forward nor
update), and the share k / N of an update. *plain* is the step on every image, *forward* its forward alone, *score* the scoring
forward alone. s = score / forward; the limit is (s + 3 k / N) / 3; *over parts* is the time over score + k / N x plain, which
does not assume that a backward takes two forwards. What is measured and how: [end_to_end.md](end_to_end.md).
"""


def times_table(document: Mapping[str, Any]) -> str:
    rows, notes = [], []
    for r in document["records"]:
        if r["status"] != "measured":
            notes.append(f"- {r['case']}, {r['contender']}: {r['status']}, {r['reason']}")
            continue
        us, split = r["us"], r.get("split_us")
        cells = [f"{us['p50'] / 1e3:.2f} [{us['p20'] / 1e3:.2f}, {us['p80'] / 1e3:.2f}]"]
        cells += [f"{split[stage]['p50'] / 1e3:.3f}" for stage in split] if split else [""] * 3
        cells.append(f"{100 * r['selection_share']['p50']:.2f} %" if "selection_share" in r else "")
        cells += [f"{r[name]['p50']:.3f}" if name in r else "" for name in ("over_plain", "limit", "over_limit")]
        cells.append("" if r["over_floor"] is None else f"{r['over_floor']:.3f}")
        rows.append([r["case"], r["contender"], *cells, f"{r['images_per_second']:,.0f}"])
    head = ("case", "contender", "ms", "scoring", "selecting", "updating", "selecting / plain")
    head += ("time / plain", "limit", "over limit", "over parts", "images/s")
    without = "\nWithout a time:\n\n" + "\n".join(notes) + "\n" if notes else ""
    return f"{_what(document)}\n{LEGEND}\n{table(head, rows)}{without}"


def _what(document: Mapping[str, Any]) -> str:
    params = document["records"][0]["params"]
    images = "random images" if params["images"] == "random" else f"images of {params['images']}"
    return f"Width {params['width']} (the published network has 64), batch {params['n']}, {images}."
