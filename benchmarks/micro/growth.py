"""How time and memory of the selection step grow with N, C, the number of methods and gamma: a slope, not one point.

Each sweep changes one parameter and keeps the others. The slope is the least-squares exponent of the median time (and of
the extra memory) over the parameter; on the ends of a sweep a fixed cost shows as an exponent below one.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from adaselect_kernels.options import METHODS
from benchmarks.micro.case import OURS, Case, Group
from benchmarks.micro.fused_select import select_case
from benchmarks.timing import log_slope

PARAMETERS = {"N": "n", "C": "classes", "gamma": "gamma", "methods": "methods"}
# big_loss first: a sweep over the number of methods takes the first M of these
ORDERED = ("big_loss", "small_loss", "grad_norm", "uniform", *(m for m in METHODS if m.startswith(("ada", "core"))))


def cases(device: torch.device, quick: bool) -> list[Case]:
    if quick:
        rows, classes, fixed_n, gammas, counts = (32, 64), (8, 16), 32, (0.2, 0.5), (1, 7)
    else:
        large = device.type == "cuda"
        rows = tuple(4**i for i in range(5, 12 if large else 11))  # 1024 to a million (four on a GPU)
        classes = (10, 100, 1000, 10_000, 100_000)
        fixed_n, gammas, counts = (262_144 if large else 65_536), (0.05, 0.1, 0.2, 0.5, 1.0), (1, 2, 4, 7)
    names = (OURS, "naive")
    sweeps = {
        "N": [{"n": n, "classes": 10} for n in rows],
        "C": [{"n": min(256, fixed_n), "classes": c} for c in classes],
        "gamma": [{"n": fixed_n, "classes": 10, "gamma": g} for g in gammas],
        "methods": [{"n": fixed_n, "classes": 10, "methods": ORDERED[:m]} for m in counts],
    }
    found = []
    for sweep, points in sweeps.items():
        for point in points:
            case = select_case(dtype="float32", quick=quick, names=names, sweep=sweep, **point)
            value = case.params[PARAMETERS[sweep]]
            found.append(Case(f"{sweep}={value}", case.params, case.input_bytes, case.min_bytes, case.build))
    return found


def fits(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponent of time and of extra memory over each sweep's parameter, a contender at a time."""
    points = defaultdict(list)
    for record in records:
        if record["status"] == "measured":
            points[record["params"]["sweep"], record["contender"]].append(record)
    found = []
    for (sweep, contender), rows in points.items():
        xs = [row["params"][PARAMETERS[sweep]] for row in rows]
        for quantity, ys in (("time", [r["us"]["p50"] for r in rows]), ("memory", [r["extra_bytes"] for r in rows])):
            usable = len(set(xs)) > 1 and all(y is not None and y > 0 for y in ys)
            slope = log_slope(xs, ys) if usable else math.nan
            if math.isfinite(slope):
                fit = {"sweep": sweep, "contender": contender, "quantity": quantity, "slope": round(slope, 3)}
                found.append(fit | {"first": [xs[0], ys[0]], "last": [xs[-1], ys[-1]]})
    return found


GROUP = Group("growth", "Growth of time and memory", cases, weight=1.5, memory=True, fits=fits)
