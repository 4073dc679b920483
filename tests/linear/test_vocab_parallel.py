"""Shards of a vocabulary over processes give what one process gives of the whole, and every process the same bits."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from adaselect_kernels import (
    AdaSelectionState,
    dispatch,
    distributed,
    fused_linear_select,
    linear_per_sample_stats,
    reference,
)
from adaselect_kernels.linear import partial_stats, stats_from_partials
from adaselect_kernels.options import STATS
from tests.oracle import assert_within_budget, naive_stats

# classes of each rank: uneven, and with four ranks one class alone
SIZES = {2: (7, 16), 4: (5, 1, 9, 8)}
V, H, N = 23, 8, 24
IGNORED = -7
IMPLS = ("reference",) if dispatch.EXTENSION is None else ("reference", "cpu")
CAP, SCALE, SMOOTHING, Z = 6.0, 0.5, 0.1, 0.01
HEAD = {"softcap": CAP, "logit_scale": SCALE, "ignore_index": IGNORED, "label_smoothing": SMOOTHING}

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def draw_problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets: the targets are in every class, and rows 3 and 9 are ignored."""
    hidden, weight, bias = 3 * torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    targets = torch.cat([torch.randperm(V), torch.zeros(N - V, dtype=torch.int64)])
    targets[3] = targets[9] = IGNORED
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def same_everywhere(*tensors: Tensor) -> None:
    """Bit for bit, NaN included."""
    for tensor in tensors:
        mine = tensor.flatten().view(torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        assert all(torch.equal(other, mine) for other in everyone)


def raises_everywhere(error: type[Exception], match: str, call) -> None:
    """On every rank, or the others would wait; a barrier shows that none does."""
    with pytest.raises(error, match=match):
        call()
    dist.barrier()


def close(got: Tensor, oracle: Tensor, peers: list[Tensor], what: str) -> None:
    """peers: the same unfused computation with the features summed in other orders; at least four roundings of the largest,
    as a small batch may be a lucky one."""
    finite = oracle.isfinite()
    error = torch.stack([(peer.double() - oracle.double()).abs() for peer in peers]).amax(0)[finite].max()
    error = error.clamp(min=4 * torch.finfo(peers[0].dtype).eps * float(oracle[finite].abs().max()))
    peer = oracle.double() + error
    if got.dtype == torch.float64:  # the oracle is no better
        torch.testing.assert_close(got, oracle, rtol=1e-12, atol=1e-12, msg=lambda m: f"{what}: {m}")
    else:
        assert_within_budget(got, oracle, peer, what)


def feature_orders() -> list[Tensor]:
    return [torch.randperm(H) for _ in range(3)]


def logits_of(hidden, weight, bias) -> Tensor:
    return CAP * torch.tanh(SCALE * (hidden @ weight.T + bias) / CAP)


def statistics(mine: slice, impl: str, dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = draw_problem(dtype)
    for y in (targets, torch.where(targets < 5, targets, 2)):  # the second: no target but in the first shard
        got = distributed.vocab_parallel_stats(
            hidden, weight[mine], y, bias_shard=bias[mine], stats=STATS, impl=impl, **HEAD
        )
        same_everywhere(*got)
        # peers: the unfused computation of these inputs in float32
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        peers = []
        for order in feature_orders():
            stored = logits_of(hidden[:, order].to(wide), weight[:, order].to(wide), bias.to(wide))
            peers.append(naive_stats(stored, y, IGNORED, SMOOTHING))
        z = logits_of(hidden.double(), weight.double(), bias.double())
        oracle = reference.per_sample_stats(z, y, range(len(STATS)), "token", IGNORED, SMOOTHING)
        for name, row, right in zip(STATS, got, oracle, strict=True):
            assert row.dtype == wide
            close(row, right, [peer[name] for peer in peers], name)
    folded = distributed.vocab_parallel_stats(
        hidden.view(8, 3, H), weight[mine], targets.view(8, 3), bias_shard=bias[mine], impl=impl, **HEAD
    )
    whole = linear_per_sample_stats(hidden.view(8, 3, H), weight, targets.view(8, 3), bias=bias, impl=impl, **HEAD)
    torch.testing.assert_close(folded.loss, whole.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(folded.grad_norm, whole.grad_norm, rtol=2e-6, atol=2e-6)


def selection(mine: slice, impl: str) -> None:
    methods = ("big_loss", "grad_norm", "uniform")
    ours, theirs = (AdaSelectionState.create(methods, seed=5) for _ in range(2))
    for step in range(2):
        hidden, weight, bias, targets = draw_problem(torch.float64)
        common = {"methods": methods, "unit": "token" if step else "sample", "impl": impl, **HEAD}
        shape = (8, 3) if step else (N,)
        hidden, targets = hidden.view(*shape, H), targets.view(shape)
        got = distributed.vocab_parallel_select(
            hidden, weight[mine], targets, 0.4, bias_shard=bias[mine], state=ours, **common
        )
        right = fused_linear_select(hidden, weight, targets, 0.4, bias=bias, state=theirs, **common)
        same_everywhere(*got, ours.buffer)
        assert torch.equal(got.indices, right.indices)
        assert int(got.n_valid) == int(right.n_valid) == N - 2
        torch.testing.assert_close(got.scores, right.scores)
        torch.testing.assert_close(got.losses, right.losses)
        torch.testing.assert_close(ours.buffer, theirs.buffer, rtol=1e-12, atol=1e-12)


def loss_and_gradients(mine: slice, impl: str, dtype: torch.dtype, reduction: str) -> None:
    hidden, weight, bias, targets = draw_problem(dtype)
    indices = torch.tensor([1, 3, 4, -1, 8, 22, 23])  # row 3 is ignored, -1 an empty place
    row_weight = torch.randn(len(indices)) if reduction == "none" else torch.ones(())

    def of_one_process(kind: torch.dtype, order: Tensor) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in (hidden, weight, bias)]
        kept = indices[(indices >= 0) & (targets[indices] != IGNORED)]
        z = logits_of(leaves[0][:, order], leaves[1][:, order], leaves[2])[kept]
        lse = z.logsumexp(1)
        smooth = (1 - SMOOTHING) * z.gather(1, targets[kept][:, None])[:, 0] + SMOOTHING * z.mean(1)
        losses = lse - smooth + Z * lse.square()
        places = torch.tensor([0, 2, 4, 5, 6])
        losses = losses.new_zeros(len(indices)).index_copy(0, places, losses)
        losses = losses if reduction == "none" else losses.sum() / len(kept)
        return [losses.detach(), *torch.autograd.grad((losses * row_weight.to(losses.dtype)).sum(), leaves)]

    h, w, b = (
        hidden.clone().requires_grad_(),
        weight[mine].clone().requires_grad_(),
        bias[mine].clone().requires_grad_(),
    )
    loss = distributed.vocab_parallel_cross_entropy(
        h, w, targets, indices, bias_shard=b, reduction=reduction, z_loss=Z, impl=impl, **HEAD
    )
    (loss * row_weight.to(loss.dtype)).sum().backward()
    same_everywhere(loss.detach(), h.grad)
    oracle = of_one_process(torch.float64, torch.arange(H))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    peers = [of_one_process(wide, order) for order in feature_orders()]
    got = [loss.detach(), h.grad, w.grad, b.grad]
    assert [t.dtype for t in got[1:]] == [dtype] * 3
    for i, name in enumerate(("loss", "hidden", "weight", "bias")):
        value = got[i]
        if i > 1:  # a shard, among the right ones: the peer's error is that of the whole
            value = oracle[i].to(dtype).index_copy(0, torch.arange(V)[mine], got[i])
        close(value, oracle[i], [peer[i] for peer in peers], f"{name}, {dtype}, {reduction}")
    unchosen = torch.ones(N, dtype=torch.bool).index_fill(0, indices[indices >= 0], False)
    assert (h.grad[unchosen] == 0).all()
    assert (h.grad[3] == 0).all()


def rounded_once(mine: slice, impl: str) -> None:
    """Parts of the ranks that cancel: summed in bfloat16 they would leave errors larger than the sum."""
    hidden, targets = (torch.randn(4, H) / 300).bfloat16().requires_grad_(), torch.full((4,), V - 1)
    weight = torch.zeros(V, H)
    weight[0], weight[V - 1] = 300.0, 298.0  # the first rank gives 300 p, the last 298 (q - 1)
    bias = torch.full((V,), -1e4)
    bias[0] = bias[V - 1] = 0.0
    indices = torch.arange(4)
    distributed.vocab_parallel_cross_entropy(
        hidden, weight[mine].bfloat16(), targets, indices, bias_shard=bias[mine].bfloat16(), impl=impl
    ).backward()
    h = hidden.detach().double().requires_grad_()
    w = weight.bfloat16().double()
    torch.nn.functional.cross_entropy(h @ w.T + bias.bfloat16().double(), targets).backward()
    allowed = h.grad.abs() * 2**-8 + 300 * 2**-20
    assert ((hidden.grad.double() - h.grad).abs() <= allowed).all()


def approximations(sizes: tuple[int, ...], mine: slice, impl: str) -> None:
    hidden, weight, bias, targets = draw_problem(torch.float32)
    backend = dispatch.resolve(impl, hidden.device)
    settings = (IGNORED, SMOOTHING, CAP, SCALE)
    if len(sizes) == 4:  # one of the shards is of one class
        raises_everywhere(
            ValueError,
            "below the 1 classes",
            lambda: distributed.vocab_parallel_stats(
                hidden, weight[mine], targets, ignore_index=IGNORED, vocab_stride=2
            ),
        )
    for kind, stride in ((torch.bfloat16, 1), *([] if len(sizes) == 4 else [(None, 3), (torch.bfloat16, 2)])):
        got = distributed.vocab_parallel_stats(
            hidden,
            weight[mine],
            targets,
            bias_shard=bias[mine],
            score_dtype=kind,
            vocab_stride=stride,
            impl=impl,
            **HEAD,
        )
        firsts = [sum(sizes[:r]) for r in range(len(sizes))]
        partials = [
            partial_stats(backend, hidden, w, targets, b, first, [0, 2], *settings, kind, stride)
            for first, w, b in zip(firsts, weight.split(sizes), bias.split(sizes), strict=True)
        ]
        right = stats_from_partials(backend, torch.stack(partials), targets, V, [0, 2], "token", IGNORED, SMOOTHING)
        same_everywhere(got.loss, got.grad_norm)
        torch.testing.assert_close(torch.stack([got.loss, got.grad_norm]), right, rtol=2e-6, atol=2e-6)


def errors(mine: slice, rank: int, ranks: int) -> None:
    hidden, weight, _, targets = draw_problem(torch.float32)
    weight = weight[mine].clone()

    def stats(h=hidden, w=weight, y=targets, **keywords):
        return distributed.vocab_parallel_stats(h, w, y, impl="reference", ignore_index=IGNORED, **keywords)

    bad = targets.clone()
    bad[5] = V  # outside of the whole, though inside no shard's own numbers would tell
    raises_everywhere(IndexError, rf"target {V} of row 5 is outside \[0, {V}\)", lambda: stats(y=bad))
    raises_everywhere(ValueError, "shard_sizes must be", lambda: stats(shard_sizes=[V]))
    wrong = [n + 1 for n in SIZES[ranks]]
    raises_everywhere(ValueError, f"whose weight has {len(weight)} classes", lambda: stats(shard_sizes=wrong))
    # one rank's shard is another's trouble: all of them raise
    odd = weight.double() if rank == 1 else weight.clone()
    raises_everywhere(ValueError, r"of one dtype, got .*, 8\] float32.* float64", lambda: stats(w=odd))
    narrow = weight[:, : 5 if rank == 0 else H].clone()
    raises_everywhere(ValueError, r"must be \[V_r >= 1, H\].*, 5\]", lambda: stats(w=narrow))
    empty = weight[: 0 if rank == 0 else None].clone()
    raises_everywhere(ValueError, r"got \[0, 8\] float32", lambda: stats(w=empty))
    raises_everywhere(TypeError, "weight must have the dtype of hidden", lambda: stats(h=hidden.double()))
    raises_everywhere(
        IndexError,
        r"index 24 at place 1 is outside \[-1, 24\)",
        lambda: distributed.vocab_parallel_cross_entropy(
            hidden, weight, targets, torch.tensor([0, N]), ignore_index=IGNORED, impl="reference"
        ),
    )


def sizes_are_exchanged_once(mine: slice, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a rank's shard is as large as one it has seen, and the others' are not."""
    exchanged = []
    exchange = distributed._exchange_sizes
    monkeypatch.setattr(distributed, "_exchange_sizes", lambda *a: exchanged.append(a[0].shape) or exchange(*a))
    hidden, weight, _, targets = draw_problem(torch.float32)
    small = torch.ones(2 if rank == 0 else 2 + rank, H)  # no draw: the ranks would draw apart
    first = weight[mine].clone()
    for _ in range(2):
        for w in (first, small, small[: 2 if rank == 0 else 3]):
            distributed.vocab_parallel_stats(hidden, w, torch.zeros_like(targets), impl="reference")
    assert len(exchanged) == 2 + 2  # the third is a new tensor each time
    sizes = [2, *[3] * (dist.get_world_size() - 1)]
    distributed.vocab_parallel_stats(hidden, small[: sizes[rank]], targets * 0, shard_sizes=sizes, impl="reference")
    assert len(exchanged) == 4


def part_of_the_ranks(rank: int) -> None:
    """A group of the first two of four; the others are not in it."""
    hidden, weight, _, targets = draw_problem(torch.float32)
    group = dist.new_group([0, 1])
    shards = weight.split([7, 16])

    def call():
        return distributed.vocab_parallel_stats(
            hidden, shards[min(rank, 1)], targets, group=group, ignore_index=IGNORED, impl="reference"
        )

    if rank < 2:
        right = linear_per_sample_stats(hidden, weight, targets, ignore_index=IGNORED, impl="reference")
        torch.testing.assert_close(call().loss, right.loss, rtol=2e-6, atol=2e-6)
    else:
        with pytest.raises(ValueError, match=f"the group does not have this process, rank {rank} of 4"):
            call()
    dist.barrier()


def worker(rank: int, ranks: int, seed: int, folder: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{folder}/store")
    torch.set_num_threads(1)
    torch.manual_seed(seed)  # the same on every rank
    sizes = SIZES[ranks]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for impl in IMPLS:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            statistics(mine, impl, dtype)
            loss_and_gradients(mine, impl, dtype, "none" if dtype == torch.float32 else "mean")
        selection(mine, impl)
        rounded_once(mine, impl)
        approximations(sizes, mine, impl)
    errors(mine, rank, ranks)
    with pytest.MonkeyPatch.context() as monkeypatch:
        sizes_are_exchanged_once(mine, rank, monkeypatch)
    if ranks == 4:
        part_of_the_ranks(rank)
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_over_processes(generator, tmp_path, ranks):
    seed = int(torch.randint(1 << 30, (), generator=generator))
    multiprocessing.set_forkserver_preload(["torch", "pytest"])  # imported once, not by each process
    torch.multiprocessing.start_processes(worker, (ranks, seed, str(tmp_path)), nprocs=ranks, start_method="forkserver")


def test_compiled_without_a_graph_break(generator):
    """The collectives are traced with the rest; the sizes of the shards must be known."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        hidden, weight = (torch.randn(n, H, generator=generator) for n in (N, V))
        targets = torch.randint(V, (N,), generator=generator)

        def step(hidden, weight, shard_sizes):
            chosen = distributed.vocab_parallel_select(hidden, weight, targets, 0.3, shard_sizes=shard_sizes)
            loss = distributed.vocab_parallel_cross_entropy(
                hidden, weight, targets, chosen.indices, shard_sizes=shard_sizes
            )
            return chosen.indices, loss

        found = []
        for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            indices, loss = run(*leaves, (V,))
            found.append([indices, loss.detach(), *torch.autograd.grad(loss, leaves)])
        for eager, compiled in zip(*found, strict=True):
            torch.testing.assert_close(compiled, eager)
        with pytest.raises(RuntimeError, match="cannot be exchanged while tracing: pass shard_sizes"):
            torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight, None)
    finally:
        dist.destroy_process_group()


def test_no_process_group():
    with pytest.raises(RuntimeError, match="there is no process group: call"):
        distributed.vocab_parallel_select(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), 0.5)
