"""Operators under torch.compile(fullgraph=True), fake tensors and opcheck: schemas, fakes and strides agree with the kernels."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from adaselect_kernels import (
    AdaSelectionOptions,
    AdaSelectionState,
    dispatch,
    fused_select,
    per_sample_stats,
    select_from_losses,
    select_topk,
)
from adaselect_kernels.options import METHODS, STATS

needs_extension = pytest.mark.skipif(dispatch.EXTENSION is None, reason="the compiled extension is missing")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(generator, n=48, c=7):
    return torch.randn(n, c, generator=generator), torch.randint(c, (n,), generator=generator)


@needs_extension  # inductor rounds the reference's plain torch differently; the operators it must leave alone
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_step_with_state_compiles_whole_and_equals_eager(generator, backend):
    options = AdaSelectionOptions(beta=0.5, curriculum_power=-1.0)

    def step(logits, targets, state):
        got = fused_select(logits, targets, 0.3, methods=METHODS, state=state, options=options)
        return got, logits[got.indices].sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    one, two = (AdaSelectionState.create(METHODS, seed=1) for _ in range(2))
    for _ in range(4):
        logits, targets = batch(generator)
        (mine, total), (right, total_right) = compiled(logits, targets, one), step(logits, targets, two)
        assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))
        torch.testing.assert_close(total, total_right)
        assert torch.equal(one.buffer, two.buffer)


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_public_function_compiles_whole(generator, dynamic):
    counter = CompileCounter()

    def everything(logits, targets):
        stats = per_sample_stats(logits, targets, stats=STATS)
        chosen = select_from_losses(stats.loss, 0.25, grad_norms=stats.grad_norm, methods=METHODS)
        return stats, chosen, select_topk(stats.margin, 3, largest=False), fused_select(logits.double(), targets, 0.5)

    compiled = torch.compile(everything, fullgraph=True, backend=counter, dynamic=dynamic)
    for n in (48, 31, 30):
        logits, targets = batch(generator, n)
        mine, right = compiled(logits, targets), everything(logits, targets)
        for a, b in zip(torch.utils._pytree.tree_leaves(mine), torch.utils._pytree.tree_leaves(right), strict=True):
            assert torch.equal(a, b)
    if dynamic:
        assert counter.frame_count == 1


def test_compiled_selection_feeds_a_differentiable_loss(generator):
    weight = torch.randn(7, 5, generator=generator, requires_grad=True)
    inputs, targets = torch.randn(48, 7, generator=generator), torch.randint(5, (48,), generator=generator)

    def step(inputs, targets):
        with torch.no_grad():
            indices = fused_select(inputs @ weight, targets, 0.25).indices
        return torch.nn.functional.cross_entropy(inputs[indices] @ weight, targets[indices])

    (right,) = torch.autograd.grad(step(inputs, targets), weight)
    (mine,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(inputs, targets), weight)
    torch.testing.assert_close(mine, right)


def layouts(tensor):
    return {
        "contiguous": tensor,
        "permuted": tensor.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": tensor.repeat_interleave(2, 0)[::2],
    }


OPTIONS = tuple(AdaSelectionOptions().packed)
CODES = list(range(len(METHODS)))


@needs_extension
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
@pytest.mark.parametrize("unit", ["sample", "token"])
def test_opcheck_of_the_row_operators(generator, layout, unit):
    logits = layouts(torch.randn(6, 4, 5, generator=generator))[layout]
    targets = layouts(torch.randint(5, (6, 4), generator=generator))[layout]
    torch.library.opcheck(torch.ops.adaselect.per_sample_stats, (logits, targets, [0, 2, 5], unit, -100, 0.1))
    for state in (None, AdaSelectionState.create(METHODS).buffer):
        torch.library.opcheck(
            torch.ops.adaselect.fused_select,
            (logits, targets, state, CODES, 3, unit, "index", -100, 0.0, 7, OPTIONS),
        )


@needs_extension
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_opcheck_of_the_batch_and_selection_operators(generator, layout):
    losses = layouts(torch.rand(20, generator=generator))[layout]
    norms = layouts(torch.rand(20, generator=generator))[layout]
    valid = losses > 0.2
    for state in (None, AdaSelectionState.create(METHODS).buffer):
        torch.library.opcheck(torch.ops.adaselect.batch_scores, (losses, norms, valid, state, CODES, 5, 7, OPTIONS))
        torch.library.opcheck(
            torch.ops.adaselect.select_from_losses, (losses, norms, state, CODES, 5, "score", 7, OPTIONS)
        )
    for order in ("index", "score"):
        torch.library.opcheck(torch.ops.adaselect.select_topk, (losses, 4, True, order))


@needs_extension
def test_the_operators_equal_the_direct_calls(generator):
    logits, targets = batch(generator)
    for name, arguments in {
        "per_sample_stats": (logits, targets, list(range(len(STATS))), "sample", -100, 0.0),
        "fused_select": (logits, targets, None, CODES, 9, "sample", "score", -100, 0.0, 3, OPTIONS),
        "select_topk": (logits[:, 0], 9, False, "index"),
        "batch_scores": (logits[:, 0], logits[:, 1], None, None, CODES, 9, 3, OPTIONS),
        "select_from_losses": (logits[:, 0], logits[:, 1], None, CODES, 9, "index", 3, OPTIONS),
    }.items():
        one = getattr(torch.ops.adaselect, name)(*arguments)
        two = getattr(dispatch.EXTENSION, name)(*arguments)
        for a, b in zip(torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(two), strict=True):
            assert torch.equal(a.nan_to_num(nan=3.0), b.nan_to_num(nan=3.0)), name
