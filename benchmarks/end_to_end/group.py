"""The group `end_to_end`: cases, the gate, and what the records say beyond a time.

A case is a type, a mode and a sampling rate. Contenders: plain (a training step without selection), forward (its forward
alone) and score (the scoring forward alone), from which s comes; ours and naive, whose time is that of a candidate batch:
scoring, selecting and the share k / N of an update. Added to a record of those two:

    split_us, split_samples_us   {score, select, update}, microseconds a candidate batch
    wall_us                      the samples as they came, before an update was counted as its share
    rate, candidates, updates    k / N, and of all samples together
    share, limit                 s and (s + 3 k / N) / 3, {p20, p50, p80} as all that follow
    over_plain, over_limit       time over a step without selection; that over the limit
    selection_share              selecting over a step without selection
    floor_us, over_floor         score + k / N x plain, and the time over it: the limit without assuming backward = 2 forwards
    images_per_second            candidates looked at (plain: trained on)
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels import reference
from benchmarks import gate, naive, timing
from benchmarks.end_to_end.loops import Chooser, Graphs, Loop, Naive, NaiveChooser, Ours, Watch, steps
from benchmarks.end_to_end.rig import Marks, Rig
from benchmarks.end_to_end.settings import METHODS, STAGES, Settings, limit, settings_for
from benchmarks.micro.case import OURS, Case, Contender, Group
from benchmarks.timing import Prepared

Record = dict[str, Any]


@lru_cache(maxsize=1)  # of the mode at hand; the one before is freed
def rig_of(settings: Settings, dtype: str, mode: str, device: torch.device) -> Rig:
    torch._dynamo.reset()
    return Rig(settings, dtype, mode, device)


def first_noise(n: int, device: torch.device) -> Tensor:
    """[n] float32, the Exp(1) variables of ours at step 1 with seed 0."""
    return -reference.philox_uniform(n, torch.ones((), dtype=torch.float64, device=device), 0).to(torch.float32).log()


def check_loop(loop: Loop, *, ours: bool) -> gate.Report:
    """One sample of a fresh loop: its first choice against the float64 oracle, every update against what was chosen.

    The naive loop is given the oracle's noise where it runs eagerly; else its choice is held to what any draw satisfies.
    """
    loop.watch = watch = Watch()
    same_noise = ours or loop.rig.mode == "eager"
    if isinstance(loop, Naive) and same_noise:
        loop.choose.noise = first_noise(loop.rig.settings.batch, loop.rig.device)
    loop.run(Marks(loop.rig.device), loop.candidates)
    loop.watch = None
    check_updates(watch, loop.rig.settings.batch)
    targets = watch.candidates[0][1]
    oracle = gate.SelectionOracle(gate.RowOracle(watch.logits[0], targets), METHODS, loop.gamma)
    return gate.check_selection(*_checked(watch.choices[0]), oracle, same_noise=same_noise, peer=not ours)


def check_updates(watch: Watch, batch: int) -> None:
    """The updates were on the chosen rows, in their order, `batch` at a time, and none is missing."""
    pairs = list(zip(watch.candidates, watch.choices, strict=True))
    expected = [torch.cat([both[i][chosen.indices] for both, chosen in pairs]) for i in (0, 1)]
    if len(watch.updates) != len(expected[0]) // batch:
        raise gate.GateError(f"{len(expected[0])} rows were chosen, and {len(watch.updates)} updates made")
    for number, got in enumerate(watch.updates):
        rows = slice(number * batch, (number + 1) * batch)
        if not all(torch.equal(mine, wanted[rows]) for mine, wanted in zip(got, expected, strict=True)):
            raise gate.GateError(f"update {number} was not on the rows chosen")


def check_same_rows(rig: Rig, gamma: float, choosers: Sequence[Callable[..., Any]] = ()) -> gate.Report:
    """Ours and naive on the same logits and noise, each against the oracle: where they differ the scores are as good as equal."""
    inputs, targets = rig.batches[0]
    rig.model.eval()
    logits = rig.score(inputs)
    rig.model.train()
    peer = NaiveChooser(rig, gamma)
    peer.select = naive.naive_select  # also where it is compiled for the loop: its noise can be given here
    peer.noise = first_noise(len(targets), rig.device)
    ours, theirs = (choose(logits, targets) for choose in choosers or (Chooser(rig, gamma), peer))
    oracle = gate.SelectionOracle(gate.RowOracle(logits, targets), METHODS, gamma)
    gate.check_selection(*_checked(ours), oracle)
    gate.check_selection(*_checked(theirs), oracle, peer=True)
    only_one = set(ours.indices.tolist()) ^ set(theirs.indices.tolist())
    return {"rows that ours and naive choose differently": float(len(only_one))}


def _checked(chosen: Any) -> tuple[Tensor, Tensor, Tensor]:
    return chosen.indices, chosen.scores, chosen.losses


def make_loop(rig: Rig, name: str, gamma: float) -> Loop:
    if rig.mode == "graph":
        return Graphs(rig, gamma, Chooser if name == OURS else NaiveChooser)
    return Ours(rig, gamma) if name == OURS else Naive(rig, gamma)


def case(settings: Settings, dtype: str, mode: str, gamma: float) -> Case:
    loops: dict[str, Loop] = {}

    def build(device: torch.device, buffers: int) -> list[Contender]:
        rig = rig_of(settings, dtype, mode, device)

        def check(name: str) -> gate.Report:
            report = check_loop(make_loop(rig, name, gamma), ours=name == OURS)
            return report | (check_same_rows(rig, gamma) if name == OURS else {})

        def prepare_loop(name: str) -> Prepared:
            loop = loops[name] = make_loop(rig, name, gamma)
            return Prepared([loop.sample], repeats=loop.candidates)  # its gate has compiled what it calls

        def prepare_steps(name: str) -> Prepared:
            step = steps(rig, name)
            return Prepared([step.sample], repeats=step.ready())

        found = [Contender(name, "part", partial(prepare_steps, name)) for name in ("plain", "forward", "score")]
        roles = {OURS: "ours", "naive": "peer"}
        return [*found, *(Contender(n, r, partial(prepare_loop, n), partial(check, n)) for n, r in roles.items())]

    image_bytes = 3 * settings.size * settings.size * 4
    return Case(
        name=f"{dtype} {mode} gamma={gamma:g}",
        params={
            **{"n": settings.batch, "classes": settings.classes, "dtype": dtype, "mode": mode, "gamma": gamma},
            **{"width": settings.width, "size": settings.size, "methods": len(METHODS)},
            "images": "random" if settings.data is None else settings.data.name,
        },
        input_bytes=settings.batch * image_bytes,
        min_bytes=settings.batch * image_bytes,
        build=build,
        finish=lambda done: finish(done, loops),
    )


def finish(done: dict[str, Record], loops: dict[str, Loop]) -> None:
    """Complete the records of a case: the split of ours and naive, and everything against the step without selection."""
    for name, loop in loops.items():
        record = done[name]
        if record["status"] == "measured":
            taken = loop.taken[-len(record["samples_us"]) :]  # not the warm-up
            splits = [sample.split(loop.rate) for sample in taken]
            add_split(record, [{stage: s * 1e6 for stage, s in split.items()} for split in splits])
            counts = {what: sum(getattr(sample, what) for sample in taken) for what in ("candidates", "updates")}
            record |= {"rate": loop.rate, **counts}
        loop.taken.clear()
    compare(done)


def add_split(record: Record, splits: Sequence[dict[str, float]]) -> None:
    """Microseconds by stage of each sample; the record's time becomes their sum."""
    record["wall_us"] = record["samples_us"]
    record["split_samples_us"] = {stage: [round(split[stage], 3) for split in splits] for stage in STAGES}
    record["split_us"] = {stage: _spread(values) for stage, values in record["split_samples_us"].items()}
    record["samples_us"] = [round(sum(split.values()), 3) for split in splits]
    record["us"] = _spread(record["samples_us"])


def compare(done: dict[str, Record]) -> None:
    """Ratios within each round: over ours, over the step without selection, over the limit."""
    measured = {name: r for name, r in done.items() if r["status"] == "measured"}
    samples = {name: r["samples_us"] for name, r in measured.items()}
    for name, record in measured.items():
        record["images_per_second"] = round(record["params"]["n"] / record["us"]["p50"] * 1e6, 1)
        if OURS in samples:
            record["ratio"] = _rounded(timing.paired_ratio(samples[name], samples[OURS]))
        if "split_us" not in record or "plain" not in samples:
            continue
        selecting = record["split_samples_us"]["select"]
        record["selection_share"] = _rounded(timing.paired_ratio(selecting, samples["plain"]))
        over_plain = [a / b for a, b in zip(samples[name], samples["plain"], strict=False)]
        record["over_plain"] = _rounded(timing.spread(over_plain))
        if {"score", "forward"} <= samples.keys():
            shares = [a / b for a, b in zip(samples["score"], samples["forward"], strict=False)]
            limits = [limit(share, record["rate"]) for share in shares]
            record["share"], record["limit"] = _rounded(timing.spread(shares)), _rounded(timing.spread(limits))
            record["over_limit"] = _rounded(timing.paired_ratio(over_plain, limits))
            parts = [a + record["rate"] * b for a, b in zip(samples["score"], samples["plain"], strict=False)]
            record["floor_us"] = round(timing.percentile(parts, 50), 3)
            record["over_floor"] = round(timing.paired_ratio(samples[name], parts)["p50"], 4)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in timing.spread(values).items()}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items()}


def cases(device: torch.device, quick: bool, width: int | None, data: Path | None) -> Sequence[Case]:
    settings = settings_for(device, quick, width, data)
    return [case(settings, dtype, mode, gamma) for dtype, mode in settings.kinds for gamma in settings.gammas]


def group(width: int | None = None, data: Path | None = None) -> Group:
    """width: None is the device's default; data: an .npz of uint8 images and labels, None for random ones."""
    given = (f"--width {width}" if width else "", f"--data {data.name}" if data else "")
    return Group(
        "end_to_end",
        "ResNet-18 end to end: selection inside a training step",
        lambda device, quick: cases(device, quick, width, data),
        weight=6.0,
        resume=True,
        arguments=" ".join(filter(None, given)),
    )


GROUP = group()
