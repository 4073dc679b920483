"""What is trained, and the arithmetic of the refill buffer: whole cycles, amortised updates, the limit (s + 3 gamma) / 3."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

METHODS = ("big_loss", "small_loss", "grad_norm", "uniform")
GAMMAS = (0.1, 0.2, 0.3, 0.4, 0.5)
STAGES: tuple[str, ...] = ("score", "select", "update")
MODES = ("eager", "compiled", "graph")
LONGEST_CYCLE = 12  # candidate batches a sample, where a whole cycle of the buffer would take too long
FULL_WIDTH = 64


@dataclass(frozen=True)
class Settings:
    """width: channels of the first stage. pool: candidate batches in memory, taken in turn. data: .npz of images, or None.

    whole: a sample is a whole cycle of the buffer, after which as many rows wait as before it; else about one.
    """

    width: int = FULL_WIDTH
    batch: int = 128
    size: int = 32
    classes: int = 10
    gammas: tuple[float, ...] = GAMMAS
    kinds: tuple[tuple[str, str], ...] = (("float32", "eager"),)  # (dtype, mode)
    pool: int = 64
    whole: bool = True
    data: Path | None = None


def settings_for(device: torch.device, quick: bool, width: int | None = None, data: Path | None = None) -> Settings:
    """The full network: in every mode on a GPU, eager and fewer steps on a CPU."""
    if quick:
        return Settings(width or 2, 8, 8, 10, (0.5,), (("float32", "eager"),), 2, True, data)
    if device.type == "cuda":
        # those with targets first; a mode's cases together, as they share what is compiled or captured
        kinds = [("float32", "eager"), ("bfloat16", "eager"), ("bfloat16", "graph"), ("float32", "graph")]
        kinds += [("bfloat16", "compiled"), ("float32", "compiled")]
        return Settings(width or FULL_WIDTH, kinds=tuple(kinds), data=data)
    kinds = [("float32", "eager"), *[("bfloat16", "eager")] * fast_bfloat16()]
    return Settings(width or FULL_WIDTH, kinds=tuple(kinds), pool=8, whole=False, data=data)


def fast_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without them a forward takes ten times that of float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def candidates_per_sample(k: int, batch: int, whole: bool) -> int:
    """Candidate batches between two readings: at least one update's worth.

    A whole cycle is batch / gcd(k, batch), after which the buffer is as before. Otherwise, where that is above
    LONGEST_CYCLE, the number up to it whose chosen rows come nearest to whole updates (the fewest, of equal ones).
    """
    cycle = batch // math.gcd(k, batch)
    if whole or cycle <= LONGEST_CYCLE:
        return cycle
    least = math.ceil(batch / k)
    return min(range(least, max(least, LONGEST_CYCLE) + 1), key=lambda c: abs(c * k / batch - round(c * k / batch)))


def per_candidate(seconds: Mapping[str, float], candidates: int, updates: int, rate: float) -> dict[str, float]:
    """Seconds a candidate batch by stage; an update counts as the share `rate` of one, whatever the sample happened to hold.

    Of a whole cycle the sum is its time over its candidates.
    """
    return {
        "score": seconds["score"] / candidates,
        "select": seconds["select"] / candidates,
        "update": rate * seconds["update"] / updates,
    }


def limit(share: float, rate: float) -> float:
    """Time over that of training on everything (METHODS.md): (s + 3 gamma) / 3, s = scoring forward / training forward."""
    return (share + 3 * rate) / 3
