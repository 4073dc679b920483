"""A classifier whose vocabulary is sharded over a process group: statistics, selection and loss as if it were whole.

Every process holds all hidden states and targets, and some rows of the weight (Megatron-LM, arXiv 1909.08053, section 3).
Each finds the partial statistics of its classes; one all-gather of [PARTIALS, N] numbers a process, combined in the order of
the ranks, gives every process the same bits. docs/vocab_parallel.md says how to use it beside tensor parallelism and FSDP.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adaselect_kernels import dispatch
from adaselect_kernels.checks import (
    FLOATS,
    check_linear,
    check_options,
    check_rows,
    check_state,
    check_stats,
    check_targets,
    selected_count,
)
from adaselect_kernels.functional import DEFAULT_METHODS, SampleStats, Selection
from adaselect_kernels.linear import (
    autocast_linear,
    check_approximation,
    check_classifier,
    check_stride,
    partial_stats,
    select_from_stats,
    stats_from_partials,
    stats_of_methods,
)
from adaselect_kernels.losses import LOSS, check_loss, classifier_loss
from adaselect_kernels.ops import rows_of
from adaselect_kernels.options import METHODS, ORDERS, AdaSelectionOptions, check_methods, compute_dtype, require_choice
from adaselect_kernels.reference import valid_samples
from adaselect_kernels.state import AdaSelectionState

_SIZES = WeakIdKeyDictionary()  # weight: {group: sizes of all shards}, exchanged once


def vocab_parallel_stats(
    hidden: Tensor,  # [N, H] or [N, T, H], the same on every rank; float16, bfloat16, float32, float64; any strides
    weight_shard: Tensor,  # [V_r, H], this rank's classes, of the dtype of hidden
    targets: Tensor,  # [N] or [N, T], the same on every rank, in [0, V) of the whole vocabulary; int64 or int32
    *,
    group: Any = None,
    shard_sizes: Sequence[int] | None = None,
    bias_shard: Tensor | None = None,  # [V_r], of the dtype of hidden
    softcap: float | None = None,
    logit_scale: float = 1.0,
    stats: Sequence[str] = ("loss", "grad_norm"),
    unit: str = "sample",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    score_dtype: torch.dtype | None = None,
    vocab_stride: int = 1,
    impl: str = "auto",
) -> SampleStats:
    """`linear_per_sample_stats` of the classifier whose rows are the shards of the ranks, one after another: V = sum_r V_r.

    group: a process group, every rank of which makes this call; None is the default group.
    shard_sizes: [V_0, ..., V_{R-1}], the same on every rank. None: they are exchanged when the group first sees this weight
        tensor, which waits for the device, and remembered as long as it lives. A weight that is a new tensor every time (a
        view, a gathered or cast copy), and torch.compile, want them given.
    vocab_stride: within each shard.

    Every rank returns the same bits, however the shards are cut, up to rounding those of the whole classifier on one rank.
    One all-gather of 40 N bytes a rank (80 N for float64). Memory beyond inputs and outputs: O(R N).

    Raises as `linear_per_sample_stats` does: for hidden, targets and settings on every rank, and also where the shards of the
    ranks do not fit together when their sizes are exchanged. Besides, RuntimeError without an initialised process group,
    ValueError on a rank outside of the group or for shard_sizes that do not have this rank's.
    """
    codes = check_stats(stats)
    _, table = _score(
        hidden, weight_shard, targets, codes, group, shard_sizes, bias_shard, softcap, logit_scale, unit, ignore_index,
        label_smoothing, score_dtype, vocab_stride, impl,
    )  # fmt: skip
    return SampleStats(**dict(zip(stats, table.to(compute_dtype(hidden)).unbind(0), strict=True)))


def vocab_parallel_select(
    hidden: Tensor,  # [N, H] or [N, T, H], the same on every rank; float16, bfloat16, float32, float64; any strides
    weight_shard: Tensor,  # [V_r, H], this rank's classes, of the dtype of hidden
    targets: Tensor,  # [N] or [N, T], the same on every rank, in [0, V) of the whole vocabulary; int64 or int32
    gamma: float,
    *,
    group: Any = None,
    shard_sizes: Sequence[int] | None = None,
    bias_shard: Tensor | None = None,  # [V_r], of the dtype of hidden
    softcap: float | None = None,
    logit_scale: float = 1.0,
    methods: Sequence[str] = DEFAULT_METHODS,
    state: AdaSelectionState | None = None,
    options: AdaSelectionOptions | None = None,
    unit: str = "sample",
    order: str = "index",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    seed: int = 0,
    score_dtype: torch.dtype | None = None,
    vocab_stride: int = 1,
    impl: str = "auto",
) -> Selection:
    """`fused_linear_select` of a sharded classifier: the same selection, bit for bit, on every rank.

    state: of every rank its own, equal on all; it stays so, as each makes the same update. group, shard_sizes, communication
    and errors: as in `vocab_parallel_stats`; everything else as in `fused_linear_select`.
    """
    options = AdaSelectionOptions() if options is None else check_options(options)
    names = check_methods(methods)
    check_rows("hidden", "H", hidden, targets)
    k = selected_count(gamma, rows_of(hidden, unit))
    require_choice("order", order, ORDERS)
    buffer, seed = check_state(state, names, hidden.device, seed)
    backend, table = _score(
        hidden, weight_shard, targets, stats_of_methods(names), group, shard_sizes, bias_shard, softcap, logit_scale, unit,
        ignore_index, label_smoothing, score_dtype, vocab_stride, impl,
    )  # fmt: skip
    valid = valid_samples(targets, unit, ignore_index)
    return select_from_stats(
        backend, table, valid, buffer, [METHODS.index(name) for name in names], k, order, seed, options
    )


def vocab_parallel_cross_entropy(
    hidden: Tensor,  # [N, H] or [N, T, H], the same on every rank; float16, bfloat16, float32, float64; any strides
    weight_shard: Tensor,  # [V_r, H], this rank's classes, of the dtype of hidden
    targets: Tensor,  # [N] or [N, T], the same on every rank, in [0, V) of the whole vocabulary; int64 or int32
    indices: Tensor,  # [k] int64, the same on every rank: rows of the flattened hidden; -1 is an empty place
    *,
    group: Any = None,
    shard_sizes: Sequence[int] | None = None,
    bias_shard: Tensor | None = None,  # [V_r], of the dtype of hidden
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """`selected_linear_cross_entropy` of a sharded classifier: the same loss on every rank, differentiable.

    Every rank gets the gradient of its own weight_shard and bias_shard, and the whole gradient of hidden: the ranks' parts
    are summed once, over the chosen rows alone, in float32 (float64 for float64 hidden) before they are rounded. What made
    hidden must therefore not sum its gradient over the group again. Every rank must run the backward pass.

    One all-gather of 40 k bytes a rank forward, one all-reduce of 4 k H bytes backward where hidden requires a gradient
    (twice that for float64). group, shard_sizes and their errors: as in `vocab_parallel_stats`; everything else as in
    `selected_linear_cross_entropy`.
    """
    check_rows("hidden", "H", hidden, targets)
    z_loss = check_loss(indices, targets, reduction, ignore_index, label_smoothing, softcap, z_loss)
    shard = _shard(weight_shard, group, shard_sizes, impl)
    hidden, weight, bias = autocast_linear(hidden, weight_shard, bias_shard)
    check_linear(hidden, weight, bias, softcap, logit_scale)
    dispatch.resolve(impl, hidden.device)  # refused before any work
    settings = (float(label_smoothing), float(softcap or 0.0), float(logit_scale), z_loss)
    return classifier_loss(hidden, weight, bias, targets, indices, ignore_index, settings, reduction, shard)


class _Shard(NamedTuple):
    """Which classes this process holds of all."""

    group: Any
    rank: int
    sizes: tuple[int, ...]
    impl: str

    @property
    def first(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def classes(self) -> int:
        return sum(self.sizes)

    def partials(self, rows, weight, bias, y, ignore_index, label_smoothing, softcap, logit_scale) -> Tensor:
        """[R, PARTIALS, k] of the ranks, in their order: see losses.Whole."""
        labels, logits = (ignore_index, label_smoothing), (softcap, logit_scale)
        backend = dispatch.resolve(self.impl, rows.device)
        return _gathered_partials(backend, self, rows, weight, y, bias, LOSS, labels, logits)

    def whole_gradient(self, rows_grad: Tensor) -> Tensor:
        rows_grad = rows_grad.contiguous()
        dist.all_reduce(rows_grad, group=self.group)
        return rows_grad


def _score(
    hidden, weight_shard, targets, codes, group, shard_sizes, bias_shard, softcap, logit_scale, unit, ignore_index,
    label_smoothing, score_dtype, vocab_stride, impl,
) -> tuple[Any, Tensor]:  # fmt: skip
    """The implementation, and the statistics [S, samples]; what is wrong on every rank raises before any communication."""
    check_approximation(codes, score_dtype, vocab_stride)
    check_rows("hidden", "H", hidden, targets)
    shard = _shard(weight_shard, group, shard_sizes, impl)
    hidden, weight, bias = check_classifier(
        hidden,
        weight_shard,
        targets,
        bias_shard,
        softcap,
        logit_scale,
        unit,
        ignore_index,
        label_smoothing,
        score_dtype,
    )
    check_targets(targets, shard.classes, ignore_index)
    check_stride(min(shard.sizes), vocab_stride)
    backend = dispatch.resolve(impl, hidden.device)
    labels, logits = (ignore_index, float(label_smoothing)), (float(softcap or 0.0), float(logit_scale))
    approximation = (score_dtype, vocab_stride)
    partials = _gathered_partials(backend, shard, hidden, weight, targets, bias, codes, labels, logits, approximation)
    return backend, stats_from_partials(backend, partials, targets, shard.classes, codes, unit, *labels)


def _gathered_partials(
    backend, shard, hidden, weight, targets, bias, codes, labels, logits, approximation=(None, 1)
) -> Tensor:  # fmt: skip
    """[R, PARTIALS, N]: the partials of every process's classes, in the order of the ranks."""
    partials = partial_stats(
        backend, hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), bias, shard.first, codes, *labels,
        *logits, *approximation,
    )  # fmt: skip
    ranks, (kinds, rows) = len(shard.sizes), partials.shape
    gathered = partials.new_empty((ranks * kinds, rows))
    _all_gather(gathered, partials.contiguous(), shard.group)
    return gathered.view(ranks, kinds, rows)


def _shard(weight: Tensor, group: Any, shard_sizes: Sequence[int] | None, impl: str) -> _Shard:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("there is no process group: call torch.distributed.init_process_group first")
    group = dist.group.WORLD if group is None else group
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"the group does not have this process, rank {dist.get_rank()} of {dist.get_world_size()}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [V_r, H], got shape {tuple(weight.shape)}")
    if shard_sizes is not None:
        return _Shard(group, rank, _check_sizes(weight, rank, dist.get_world_size(group), shard_sizes), impl)
    if torch.compiler.is_compiling():
        raise RuntimeError("sizes of shards cannot be exchanged while tracing: pass shard_sizes")
    known: dict[Any, tuple[int, ...]] = _SIZES.setdefault(weight, {})  # pyright: ignore[reportAssignmentType]
    if group not in known:
        known[group] = _exchange_sizes(weight, group)
    return _Shard(group, rank, known[group], impl)


def _check_sizes(weight: Tensor, rank: int, ranks: int, shard_sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shard_sizes)
    if len(sizes) != ranks or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(f"shard_sizes must be {ranks} ints of at least 1, one a rank, got {shard_sizes!r}")
    if sizes[rank] != weight.shape[0]:
        raise ValueError(f"shard_sizes has {sizes[rank]} for rank {rank}, whose weight has {weight.shape[0]} classes")
    return sizes


def _exchange_sizes(weight: Tensor, group: Any) -> tuple[int, ...]:
    """The number of classes of every rank; what does not fit together raises on all of them, where it would be waited for."""
    dtype = FLOATS.index(weight.dtype) if weight.dtype in FLOATS else -1
    mine = torch.tensor([*weight.shape, dtype], device=weight.device)
    everyone = mine.new_empty(dist.get_world_size(group) * 3)
    _all_gather(everyone, mine, group)
    shards = everyone.view(-1, 3).tolist()
    seen = [
        f"[{v}, {h}] {str(FLOATS[d]).removeprefix('torch.') if d >= 0 else 'of no float type'}" for v, h, d in shards
    ]
    if len({(h, d) for _, h, d in shards}) > 1 or any(v < 1 or d < 0 for v, _, d in shards):
        raise ValueError(f"the shards of weight must be [V_r >= 1, H] of one dtype, got {', '.join(seen)}")
    return tuple(v for v, _, _ in shards)


def _all_gather(gathered: Tensor, mine: Tensor, group: Any) -> None:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(gathered, mine, group=group)
