"""The targets as data, and what of them the results meet. The report and nothing else reads this table.

Cases are named as the groups name them; a target whose case, contender or group has no result is "not measured".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.timing import paired_ratio

END_TO_END = {"selecting": "selection_share", "limit": "over_limit"}  # measure -> what a record calls it

Results = Mapping[str, Mapping[tuple[str, str], Mapping[str, Any]]]  # group -> (case, contender) -> record


@dataclass(frozen=True)
class Target:
    """One line of the targets table.

    measure:
        "faster"   median over rounds of the best (shortest) of `against` over `contender`; at least `limit`
        "within"   median over rounds of `contender` over `against`; at most `limit`
        "share"    share of the copy rate: the time the case's fewest bytes take at that rate, over the time; at least
        "us"       microseconds a call; at most
        "element"  time an element over that of `other_case`'s; at most
        "product"  share of the rate of the plain matrix product `against`; at least
        "rate"     time over gamma times that of `against`, which takes all rows; at most
        "memory"   peak bytes beyond inputs and results; at most
        "less"     those over the fewest of `against`; at most
        "selecting"  end_to_end: selecting over a step without selection; at most
        "limit"    end_to_end: time over (s + 3 gamma) / 3 of a step without selection; at most
    """

    device: str
    group: str
    case: str
    contender: str
    measure: str
    limit: float
    against: tuple[str, ...] = ()
    other_case: str = ""

    @property
    def wanted(self) -> str:
        names = " or ".join(self.against)
        return {
            "faster": f"{self.limit:g}x faster than {'the better of ' * (len(self.against) > 1)}{names}",
            "within": f"within {self.limit:g}x of {names}",
            "share": f"at least {100 * self.limit:g} % of the copy rate",
            "us": f"at most {self.limit:g} us",
            "element": f"at most {self.limit:g}x the time an element of {self.other_case}",
            "product": f"at least {100 * self.limit:g} % of the rate of the plain {names}",
            "rate": f"at most {self.limit:g}x gamma times the time of {names}",
            "memory": f"at most {self.limit / 2**20:g} MiB beyond inputs and results",
            "less": f"at most {self.limit:g}x the memory of {'the better of ' * (len(self.against) > 1)}{names}",
            "selecting": f"selecting at most {100 * self.limit:g} % of a step without selection",
            "limit": f"at most {self.limit:g}x the limit (s + 3 gamma) / 3",
        }[self.measure]

    def value(self, results: Results) -> float | None:
        """What was measured; None without the results it needs."""
        group = results.get(self.group, {})
        mine = _measured(group, self.case, self.contender)
        if mine is None:
            return None
        if self.measure == "us":
            return mine["us"]["p50"]
        if self.measure == "memory":
            return mine.get("extra_bytes")
        if self.measure in END_TO_END:
            found = mine.get(END_TO_END[self.measure])
            return None if found is None else found["p50"]
        if self.measure == "share":
            over = mine["over_floor"]
            return None if over is None else 1 / over
        if self.measure == "element":
            other = _measured(group, self.other_case, self.contender)
            if other is None:
                return None
            per_element = [r["us"]["p50"] / (r["params"]["n"] * r["params"]["classes"]) for r in (mine, other)]
            return per_element[0] / per_element[1]
        found = [_measured(group, self.case, name) for name in self.against]
        peers = [peer for peer in found if peer is not None]
        if len(peers) < len(found):
            return None
        if self.measure == "less":
            used, fewest = mine.get("extra_bytes"), [peer.get("extra_bytes") or 0 for peer in peers]
            return None if used is None or min(fewest) == 0 else used / min(fewest)
        best = min(peers, key=lambda peer: peer["us"]["p50"])
        pair = (best, mine) if self.measure in ("faster", "product") else (mine, best)
        ratio = paired_ratio(pair[0]["samples_us"], pair[1]["samples_us"])["p50"]
        return ratio / mine["params"]["gamma"] if self.measure == "rate" else ratio

    def met(self, value: float) -> bool:
        return value >= self.limit if self.measure in ("faster", "share", "product") else value <= self.limit

    def shown(self, value: float) -> str:
        if self.measure == "us":
            return f"{value:.1f} us"
        if self.measure == "selecting":
            return f"{100 * value:.2f} %"
        if self.measure == "memory":
            return f"{value / 2**20:.1f} MiB"
        return f"{100 * value:.0f} %" if self.measure in ("share", "product") else f"{value:.2f}x"


def _measured(
    group: Mapping[tuple[str, str], Mapping[str, Any]], case: str, contender: str
) -> Mapping[str, Any] | None:
    record = group.get((case, contender))
    return record if record is not None and record["status"] == "measured" else None


OVER_A_BACKWARD = 1.067  # 10 % of the backward, which is two thirds of a step
NORM_STEPS = ("N=32 T=64 d=256", "N=32 T=128 d=256", "N=16 T=64 d=512", "N=16 T=128 d=512")


def _cpu() -> list[Target]:
    def select(case: str, measure: str, limit: float, *against: str) -> Target:
        return Target("cpu", "fused_select", f"{case} float32", "ours", measure, limit, against)

    found = [
        select("128x10", "faster", 3, "naive", "compiled"),
        select("128x1000", "faster", 4, "naive", "compiled"),
        select("1024x1000", "faster", 6, "compiled_as_is"),
        select("1024x1000", "faster", 6, "compiled"),
        select("65536x10", "faster", 10, "compiled_as_is"),
        select("65536x10", "faster", 10, "compiled"),
        select("2048x32000", "within", 2, "read"),
        select("512x128256", "within", 2, "read"),
    ]
    for shape in ("128x10", "128x1000", "1024x1000", "65536x10", "2048x32000", "512x128256"):
        other = f"{shape} float32"
        found.append(Target("cpu", "fused_select", f"{shape} bfloat16", "ours", "element", 1.2, other_case=other))
    topk = [Target("cpu", "select_topk", f"{n} k=0.2N", "ours", "faster", 10, ("topk",)) for n in (1 << 20, 1 << 24)]
    steps = ("resnet18 N=32", *(f"transformer {sizes} float32" for sizes in NORM_STEPS))
    for case in steps:
        found += [
            Target("cpu", "grad_norms", case, "ours", "within", 1.6, ("plain",)),
            Target("cpu", "grad_norms", case, "ours_none", "within", 0.75, ("plain",)),
            Target("cpu", "grad_norms", case, "ours", "faster", 1, ("opacus", "vmap")),
        ]
    shape = "N=2048 H=512 V=32000 float32"
    found += [
        Target("cpu", "linear", f"score {shape}", "ours", "within", 1.15, ("product",)),
        Target("cpu", "linear", f"score {shape}", "ours", "memory", 64 << 20),
        Target("cpu", "linear", f"backward {shape} gamma=0.1", "ours", "within", 0.2, ("full",)),
    ]
    return [*found, *topk, *_end_to_end("cpu", 0.03, ["float32 eager"], (0.1, 0.2, 0.3, 0.4, 0.5))]


def _cuda() -> list[Target]:
    found = []
    for shape in ("128x10", "128x100"):
        case = f"{shape} float32"
        found += [
            Target("cuda", "fused_select", case, "ours_graph", "us", 10),
            Target("cuda", "fused_select", case, "ours_graph", "faster", 10, ("naive",)),
            Target("cuda", "fused_select", case, "ours_graph", "faster", 3, ("naive_graph",)),
            Target("cuda", "fused_select", case, "ours_graph", "faster", 2, ("compiled_graph",)),
        ]
    found += [
        Target("cuda", "fused_select", "128x10 float32", "ours", "us", 40),
        Target("cuda", "fused_select", "128x10 float32", "ours", "faster", 5, ("naive",)),
    ]
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        for classes in (1000, 32_000, 128_256, 262_144):
            rows = (1 << 30) // (classes * size) // 8 * 8
            found.append(Target("cuda", "per_sample_stats", f"{rows}x{classes} {dtype}", "ours", "share", 0.9))
        for classes in (10, 100):
            found.append(Target("cuda", "per_sample_stats", f"1048576x{classes} {dtype}", "ours", "share", 0.8))
    for case in ("65536x1000 float32", "8192x32000 bfloat16", "1048576x1000 bfloat16"):
        found.append(Target("cuda", "fused_select", case, "ours_graph", "within", 1.1, ("row_pass_graph",)))
    for n in (1 << 20, 1 << 22, 1 << 24):
        for share in (0.1, 0.2, 0.5):
            found.append(Target("cuda", "select_topk", f"{n} k={share:g}N", "ours", "faster", 5, ("topk",)))
    found += [Target("cuda", "select_topk", f"{1 << 20} k={s:g}N", "ours_graph", "us", 40) for s in (0.1, 0.2, 0.5)]
    shape = "N=8192 H=4096 V=131072 bfloat16"
    found += [
        Target("cuda", "linear", f"score {shape}", "ours", "product", 0.9, ("product",)),
        Target("cuda", "linear", f"score {shape}", "ours", "memory", 64 << 20),  # 8 KiB a token; the logits take 2 GiB
        Target("cuda", "linear", f"backward {shape} gamma=0.1", "ours", "within", 0.2, ("full",)),
    ]
    for gamma in (0.1, 0.3, 0.5, 1.0):
        case = f"loss {shape} gamma={gamma:g}"
        found += [
            Target("cuda", "linear", case, "ours", "rate", 1.15, ("full",)),
            Target("cuda", "linear", case, "ours", "less", 1, ("liger", "cce")),
        ]
    for length in (512, 1024, 2048):
        for dtype in ("float32", "bfloat16"):
            case = f"transformer N=8 T={length} d=1024 {dtype}"
            found += [
                Target("cuda", "grad_norms", case, "ours_fused", "within", OVER_A_BACKWARD, ("plain",)),
                Target("cuda", "grad_norms", case, "ours_none", "within", 0.7, ("plain",)),
            ]
    kinds = [f"{dtype} {mode}" for dtype in ("float32", "bfloat16") for mode in ("eager", "graph")]
    return [*found, *_end_to_end("cuda", 0.01, kinds, (0.1, 0.2, 0.5))]


def _end_to_end(device: str, share: float, kinds: Sequence[str], gammas: Sequence[float]) -> list[Target]:
    """Selection inside a ResNet-18 step."""
    limits = {"selecting": share, "limit": 1.1}
    return [
        Target(device, "end_to_end", f"{kind} gamma={gamma:g}", "ours", measure, most)
        for kind in kinds
        for gamma in gammas
        for measure, most in limits.items()
    ]


TARGETS: Sequence[Target] = (*_cpu(), *_cuda())
