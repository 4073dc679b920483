"""Launches of row_stats_kernels.py: the configuration by shape, the operator, and what ships."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adaselect_kernels.kernels.maths import float_bits
from adaselect_kernels.kernels.row_stats_kernels import PARTIALS, SMOOTHING_BIT, mean_kernel, stream_kernel, tile_kernel
from adaselect_kernels.kernels.runtime import (
    WARP_SIZE,
    Compilation,
    Launch,
    cached,
    ceil_div,
    counters,
    launch_device,
    next_power_of_2,
    up_to,
)
from adaselect_kernels.options import STATS


class TileConfig(NamedTuple):
    """Whole rows in registers: each row on W / VEC threads with R vectors of VEC columns each."""

    VEC: int
    R: int
    BLOCK_N: int
    W: int


class StreamConfig(NamedTuple):
    VEC: int
    R: int
    LANES: int


class TileTuning(NamedTuple):
    threads: int  # a row; see tile_config for 16-bit logits and for loads that would not fill a 32-byte sector
    warps: int  # a program


# By the power of two that holds C. Few threads a row keep the arithmetic after the sums (done by each of them) small;
# enough of them keep a row in at most 32 registers a thread. Four warps a program: small programs even out the end.
TILES = {
    16: TileTuning(threads=1, warps=4),  # one thread, one row: neighbouring rows share cache lines, nothing is shuffled
    32: TileTuning(threads=2, warps=4),
    64: TileTuning(threads=4, warps=4),
    128: TileTuning(threads=4, warps=4),
    256: TileTuning(threads=8, warps=4),
    512: TileTuning(threads=16, warps=4),
    1024: TileTuning(threads=32, warps=4),  # one warp, one row
    2048: TileTuning(threads=32, warps=4),  # 64 registers: four warps a scheduler, no reduction across warps
}
# The instructions of 16-bit rows take longer than their bytes: statistics that need little beside the logits have half the
# threads, with 64 registers of them and as many bytes in flight as float32.
FEW_REGISTERS = sum(1 << STATS.index(name) for name in ("loss", "lse", "grad_norm", "confidence"))
TILE_MAX_CLASSES = 2048  # beyond, a row would need reductions across warps: the stream does one, at its end
UNALIGNED_TILE_MAX_CLASSES = 256  # rows without a vector width: beyond, the stream's aligned body reads wider


class StreamTuning(NamedTuple):
    vectors: int  # of 16 bytes that a thread has in flight: four cover the latency of memory
    warps: int  # a program, which has one row or a part of it


# By the largest C.
STREAMS = {
    2048: StreamTuning(vectors=4, warps=1),  # unaligned rows of 257 to 2048 classes: a warp a row
    16384: StreamTuning(vectors=4, warps=4),  # 8 to 64 KB a row: several rows a multiprocessor
    2**31: StreamTuning(vectors=4, warps=8),
}


class SplitTuning(NamedTuple):
    programs: int  # wanted of a launch
    least_columns: int  # of a program
    most: int  # programs a row: a power of two, which the last of them combines at once


# By the largest C. Four programs on each of about 128 multiprocessors, a fixed number, so that sums do not depend on the
# machine; fewer rows than half of them are split, into parts that are worth a launch's last-arrival pass.
SPLITS = {
    16383: SplitTuning(programs=512, least_columns=4096, most=1),  # a part would have less than a few blocks
    2**31: SplitTuning(programs=512, least_columns=4096, most=64),
}

MEAN_BLOCK, MEAN_WARPS = 256, 4  # T is mostly 64 to 8192: a few rounds of coalesced loads


@cached
def tile_config(classes: int, vec: int, element_bytes: int, num_warps: int, want: int) -> TileConfig:
    block_c = max(16, next_power_of_2(classes))
    threads = TILES[block_c].threads
    if element_bytes == 2 and not want & ~FEW_REGISTERS:
        threads = max(threads // 2, block_c // 64, 1)
    if block_c > 16:
        threads = max(threads, 32 // (vec * element_bytes))  # each load of a row fills a 32-byte sector
    threads = min(threads, block_c // vec, WARP_SIZE)
    width = threads * vec
    return TileConfig(vec, max(1, block_c // width), num_warps * WARP_SIZE // threads, width)


def tile_warps(classes: int) -> int:
    return TILES[max(16, next_power_of_2(classes))].warps


@cached
def stream_config(classes: int, element_bytes: int) -> tuple[StreamConfig, int]:
    """The configuration and its warps."""
    tuning = up_to(STREAMS, classes)
    return StreamConfig(16 // element_bytes, tuning.vectors, tuning.warps * WARP_SIZE), tuning.warps


def split_count(n_rows: int, classes: int) -> int:
    """Programs a row."""
    tuning = up_to(SPLITS, classes)
    if n_rows * 2 > tuning.programs:
        return 1
    return max(1, min(tuning.most, tuning.programs // n_rows, classes // tuning.least_columns))


class Layout(NamedTuple):
    """Where rows are. A matrix has inner = 1; `strides` are (outer, inner, class), `target_strides` (outer, inner)."""

    classes: int
    n_rows: int
    inner: int
    strides: tuple[int, int, int]
    target_strides: tuple[int, int]
    element_bytes: int
    vec: (
        int  # columns one load may take in every row: a power of two of at most 16 bytes that divides C and row strides
    )

    @property
    def uses_tile(self) -> bool:
        wide = self.vec * self.element_bytes >= 8
        return self.classes <= (TILE_MAX_CLASSES if wide else UNALIGNED_TILE_MAX_CLASSES)

    def tile_integers(self) -> tuple[int, ...]:
        """What the tile takes of it; row strides in vectors."""
        outer, inner, column = self.strides
        return self.inner, self.classes, outer // self.vec, inner // self.vec, column, *self.target_strides

    def stream_integers(self) -> tuple[int, ...]:
        return self.inner, self.classes, *self.strides, *self.target_strides


def make_layout(
    shape: Sequence[int], strides: tuple[int, ...], target_strides: tuple[int, ...], dtype: torch.dtype, aligned: bool
) -> Layout:
    """`aligned`: the first logit is at a multiple of 16 bytes."""
    if len(shape) == 2:
        inner, strides, target_strides = 1, (strides[0], 0, strides[1]), (target_strides[0], 0)
    else:
        inner = shape[1]
    n_rows = math.prod(shape[:-1])
    if n_rows >= 2**31:
        raise ValueError(f"at most 2^31 - 1 rows, got {n_rows}")
    vec = 16 // dtype.itemsize if aligned and strides[2] == 1 else 1
    while shape[-1] % vec or strides[0] % vec or strides[1] % vec:
        vec //= 2
    return Layout(shape[-1], n_rows, inner, strides, target_strides, dtype.itemsize, vec)


def stats_code(stats: Sequence[int], label_smoothing: float) -> tuple[int, int]:
    """ORDER, the statistics as hexadecimal digits, and WANT, the same as a set of bits, with the smoothing's."""
    order, want = 0, SMOOTHING_BIT if label_smoothing > 0 else 0
    for i, stat in enumerate(stats):
        order |= stat << (4 * i)
        want |= 1 << stat
    return order, want


class RowPlan(NamedTuple):
    launch: Launch
    n_rows: int
    splits: int  # programs a row


@cached
def _row_plan(
    shape: Sequence[int], strides: tuple[int, ...], target_strides: tuple[int, ...], dtype: torch.dtype, aligned: bool,
    stats: tuple[int, ...], ignore_index: int, label_smoothing: float,
) -> RowPlan:  # fmt: skip
    layout = make_layout(shape, strides, target_strides, dtype, aligned)
    order, want = stats_code(stats, label_smoothing)
    codes = {"ORDER": order, "S": len(stats), "WANT": want}
    n_rows, classes = layout.n_rows, layout.classes
    if layout.uses_tile:
        num_warps = tile_warps(classes)
        config = tile_config(classes, layout.vec, dtype.itemsize, num_warps, want)
        integers = (n_rows, *layout.tile_integers(), ignore_index)
        grid = (ceil_div(n_rows, config.BLOCK_N),)
        return RowPlan(Launch(tile_kernel, grid, integers, codes | config._asdict(), num_warps), n_rows, 1)
    config, num_warps = stream_config(classes, dtype.itemsize)
    splits = split_count(n_rows, classes)
    integers = (n_rows, *layout.stream_integers(), ignore_index, splits)
    constants = codes | config._asdict() | {"MAX_SPLITS": up_to(SPLITS, classes).most if splits > 1 else 1}
    return RowPlan(Launch(stream_kernel, (n_rows * splits,), integers, constants, num_warps), n_rows, splits)


def row_stats(
    logits: Tensor, targets: Tensor, stats: Sequence[int], ignore_index: int, label_smoothing: float
) -> Tensor:
    """[S, rows] of every position of [N, C] or [N, T, C] logits."""
    device = logits.device
    plan = _row_plan(
        logits.shape, logits.stride(), targets.stride(), logits.dtype, logits.data_ptr() % 16 == 0,
        tuple(stats), ignore_index, label_smoothing,
    )  # fmt: skip
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    out = torch.empty((len(stats), plan.n_rows), dtype=compute, device=device)
    with launch_device(logits):
        scratch = ()
        if plan.launch.kernel is stream_kernel:
            scratch = (out, out)
            if plan.splits > 1:
                partials = torch.empty(plan.n_rows * plan.splits * PARTIALS.value, dtype=compute, device=device)
                scratch = (partials, counters(device, plan.n_rows))
        plan.launch(logits, targets, out, *scratch, options=(float_bits(label_smoothing),))
    return out


def per_sample_stats(
    logits: Tensor, targets: Tensor, stats: Sequence[int], unit: str, ignore_index: int, label_smoothing: float
) -> Tensor:
    per_position = row_stats(logits, targets, stats, ignore_index, label_smoothing)
    return of_unit(per_position, targets, stats, unit, ignore_index)


def of_unit(per_position: Tensor, targets: Tensor, stats: Sequence[int], unit: str, ignore_index: int) -> Tensor:
    """What a unit's samples get from the statistics of every position: themselves, or means."""
    if targets.dim() == 1 or unit == "token":
        return per_position
    return mean_over_positions(per_position, targets, stats, ignore_index, None)


def mean_over_positions(
    per_position: Tensor, targets: Tensor, stats: Sequence[int], ignore_index: int, valid: Tensor | None
) -> Tensor:
    """[S, N] from [S, N * T]; `valid` [N] uint8 receives whether a sample has a position that is not ignored."""
    n, positions = targets.shape
    out = torch.empty((len(stats), n), dtype=per_position.dtype, device=targets.device)
    launch = _mean_launch(n, positions, targets.stride(), ignore_index, tuple(stats), valid is not None)
    with launch_device(targets):
        launch(per_position, targets, out, out if valid is None else valid)
    return out


@cached
def _mean_launch(n, positions, target_strides, ignore_index, stats, has_valid) -> Launch:
    constants = {"ORDER": stats_code(stats, 0.0)[0], "HAS_VALID": has_valid, "BLOCK_T": MEAN_BLOCK}
    return Launch(mean_kernel, (n, len(stats)), (n, positions, *target_strides, ignore_index), constants, MEAN_WARPS)


_POINTEE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_ALL = tuple(range(len(STATS)))
_LOSS_AND_NORM = (0, 2)


def shipped() -> Iterator[Compilation]:
    """Every tile and stream configuration for float32 and bfloat16, with the statistics of a selection and with all of
    them; float16 has bfloat16's, float64's are few: of both the middle ones."""
    for dtype, pointee in _POINTEE.items():
        compute = "fp64" if dtype == torch.float64 else "fp32"
        pointers = {"logits_ptr": pointee, "targets_ptr": "i64", "out_ptr": compute}
        full = 16 // dtype.itemsize
        for stats in (_LOSS_AND_NORM, _ALL):
            order, want = stats_code(stats, 0.1 if stats is _ALL else 0.0)
            codes = {"ORDER": order, "S": len(stats), "WANT": want}
            label = f"{pointee}-{'all' if stats is _ALL else 'loss+norm'}"
            fully = dtype in (torch.float32, torch.bfloat16)
            for classes in TILES if fully else (16, 128, 1024):
                for vec in {full, 1} if classes <= UNALIGNED_TILE_MAX_CLASSES else {full}:
                    num_warps = tile_warps(classes)
                    config = tile_config(classes, vec, dtype.itemsize, num_warps, want)
                    yield Compilation(
                        f"tile-{label}-C{classes}-vec{vec}", tile_kernel, pointers, codes | config._asdict(), num_warps,
                        ones=("inner", "stride_class", "stride_target_outer"),
                        load_bits=8 * vec * dtype.itemsize,
                    )  # fmt: skip
            streams = ((2048, 1), (16384, 1), (131072, 1), (131072, up_to(SPLITS, 131072).most))
            for classes, splits in streams if fully else streams[1:2]:
                config, num_warps = stream_config(classes, dtype.itemsize)
                yield Compilation(
                    f"stream-{label}-C{classes}-split{splits}", stream_kernel,
                    pointers | {"partials_ptr": compute, "arrivals_ptr": "i32"},
                    codes | config._asdict() | {"MAX_SPLITS": splits}, num_warps,
                    ones=("inner", "stride_class", "stride_target_outer"), load_bits=128,
                )  # fmt: skip
        yield Compilation(
            f"mean-{pointee}", mean_kernel,
            {"stats_ptr": compute, "targets_ptr": "i64", "out_ptr": compute, "valid_ptr": "u8"},
            {"ORDER": stats_code(_LOSS_AND_NORM, 0.0)[0], "HAS_VALID": True, "BLOCK_T": MEAN_BLOCK},
            MEAN_WARPS, ones=("stride_target_inner",),
        )  # fmt: skip
