"""Losses over chosen rows: value and gradients against autograd of the unfused form, and every way a training step uses them.

The budget is tests/oracle.py's: twice the error of the unfused PyTorch computation at the same dtype, plus one rounding.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adaselect_kernels import dispatch, reference, selected_cross_entropy, selected_linear_cross_entropy
from adaselect_kernels.losses import weights_of_rows
from tests.oracle import assert_within_budget

IMPLS = ["reference", *(["cpu"] if dispatch.EXTENSION is not None else [])]
needs_extension = pytest.mark.skipif(dispatch.EXTENSION is None, reason=dispatch.EXTENSION_ERROR)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORED = -100
PLAIN = {"label_smoothing": 0.0, "softcap": None, "z_loss": 0.0}
EVERYTHING = {"label_smoothing": 0.1, "softcap": 4.0, "z_loss": 1e-2}


def unfused(logits, targets, indices, reduction="mean", label_smoothing=0.0, softcap=None, z_loss=0.0) -> Tensor:
    """The formula in plain PyTorch, at the dtype of the logits."""
    z = logits.flatten(0, -2)[indices.clamp(min=0)]
    y = torch.where(indices < 0, IGNORED, targets.flatten()[indices.clamp(min=0)])
    z = z if softcap is None else softcap * (z / softcap).tanh()
    losses = F.cross_entropy(z, y, reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * torch.where(y == IGNORED, 0.0, z.logsumexp(1).square())
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (y != IGNORED).sum()


def unfused_linear(hidden, weight, targets, indices, bias=None, logit_scale=1.0, **options) -> Tensor:
    return unfused(logit_scale * F.linear(hidden, weight, bias), targets, indices, **options)


def fresh(*tensors: Tensor | None, dtype=None) -> list[Tensor | None]:
    return [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def gradients(loss: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """Of a sum that tells the rows apart."""
    factor = 1 + torch.arange(loss.numel(), dtype=loss.dtype).view(loss.shape) / 8
    return list(torch.autograd.grad((loss * factor).sum(), [t for t in inputs if t is not None]))


def check(got: Tensor, oracle: Tensor, theirs: Tensor, what: str) -> None:
    if got.dtype == torch.float64:  # as exact as the oracle: another order of the same sums
        torch.testing.assert_close(got, oracle, rtol=1e-11, atol=1e-13, msg=what)
    else:
        assert_within_budget(got, oracle, theirs, what)


def check_one_row(got: Tensor, oracle: Tensor, theirs: Tensor, what: str) -> None:
    """One row has one rounding of lse, which PyTorch's may happen to be without: no budget comes of it."""
    torch.testing.assert_close(got, oracle.to(got.dtype), msg=what)


def draw(generator, n: int, classes: int, dtype=torch.float32, scale=3.0, offset=0.0):
    logits = (torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale + offset).to(dtype)
    targets = torch.randint(classes, (n,), generator=generator)
    targets[n // 2] = IGNORED
    indices = torch.randperm(n, generator=generator)[: max(1, n // 2)]
    indices[-1:] = n // 2  # an ignored row among the chosen
    return logits, targets, torch.cat([indices, torch.tensor([-1])])


def draw_linear(generator, n: int, width: int, classes: int, dtype=torch.float32):
    _, targets, indices = draw(generator, n, classes)
    hidden = torch.randn(n, width, generator=generator).to(dtype)
    weight = (torch.randn(classes, width, generator=generator) * 2 / width**0.5).to(dtype)
    return hidden, weight, torch.randn(classes, generator=generator).to(dtype), targets, indices


# ---- against the unfused form


# Part of a vector; a row of many vectors and a tail; more than the 64 vectors that one sum takes.
# So many rows that PyTorch cannot happen to be exact in all of them.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "classes"), [(33, 3), (31, 101), (12, 2500)])
def test_cross_entropy(generator, impl, dtype, n, classes):
    logits, targets, indices = draw(generator, n, classes, dtype)
    before = logits.clone()
    for reduction, options in itertools.product(("mean", "sum", "none"), (PLAIN, EVERYTHING)):
        (mine,), (right,), (peer,) = fresh(logits), fresh(logits, dtype=torch.float64), fresh(logits)
        got = selected_cross_entropy(mine, targets, indices, reduction=reduction, impl=impl, **options)
        oracle = unfused(right, targets, indices, reduction, **options)
        theirs = unfused(peer, targets, indices, reduction, **options)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check(got, oracle, theirs, f"loss {reduction}")
        (got,), (oracle,), (theirs,) = gradients(got, mine), gradients(oracle, right), gradients(theirs, peer)
        assert got.dtype == dtype
        check(got, oracle, theirs, f"gradient {reduction}")
        out = torch.ones(n, dtype=torch.bool).index_fill(0, indices[:-2], False)
        assert torch.equal(got[out], torch.zeros_like(got[out]))
    assert torch.equal(logits, before), "logits were written"


# Tiles of 128 rows and 256 classes, their edges, and one row; widths of part of a vector, of many, and the most.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width", "classes"), [(1, 16, 5), (40, 3, 257), (275, 40, 700), (48, 8192, 60)])
def test_linear_cross_entropy(generator, impl, dtype, n, width, classes):
    hidden, weight, bias, targets, indices = draw_linear(generator, n, width, classes, dtype)
    if n == 1:
        targets[0], indices = 2, torch.tensor([0])
    judge = check_one_row if n == 1 else check
    for has_bias, options in ((False, PLAIN), (True, {**EVERYTHING, "logit_scale": 0.7})):
        inputs = (hidden, weight, bias if has_bias else None)
        mine, right, peer = fresh(*inputs), fresh(*inputs, dtype=torch.float64), fresh(*inputs)
        results = [
            call(h, w, targets, indices, bias=b, reduction="none", **options, **more)
            for call, (h, w, b), more in (
                (selected_linear_cross_entropy, mine, {"impl": impl}),
                (unfused_linear, right, {}),
                (unfused_linear, peer, {}),
            )
        ]
        judge(*results, "loss")
        grads = [gradients(loss, *leaves) for loss, leaves in zip(results, (mine, right, peer), strict=True)]
        for name, got, oracle, theirs in zip(("hidden", "weight", "bias"), *grads, strict=False):
            assert got.dtype == dtype
            judge(got, oracle, theirs, f"gradient of {name}")
        if n > 1:
            out = torch.ones(n, dtype=torch.bool).index_fill(0, indices[:-2], False)
            assert torch.equal(grads[0][0][out], torch.zeros(int(out.sum()), width, dtype=dtype))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_blocks_of_rows_and_classes(generator, dtype):
    """Wide rows: blocks of 256 rows and classes, gradients summed over them; a fifth of the rows has weight 0."""
    n, width, classes = 400, 16384, 270
    rows = torch.randn(n, width, generator=generator).to(dtype)
    # so small that no row's probability is near 1, which would make the largest error one of a few rows
    weight = (torch.randn(classes, width, generator=generator) / 200).to(dtype)
    targets = torch.randint(classes, (n,), generator=generator)
    row_weight = torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < 0.8)
    lse = reference.linear_logits(rows, weight, None, 0.0, 1.0).logsumexp(1)
    settings = (classes, 0.1, 0.0, 1.0, 0.0, [True, True, True])
    got = dispatch.EXTENSION.linear_loss_backward(row_weight, rows, weight, targets, lse, None, 0, *settings)
    right = reference.linear_loss_backward(
        row_weight.double(), rows.double(), weight.double(), targets, lse.double(), None, 0, *settings
    )
    peer = reference.linear_loss_backward(row_weight, rows, weight, targets, lse, None, 0, *settings)
    for name, one, oracle, theirs in zip(("rows", "weight", "bias"), got, right, peer, strict=True):
        check(one, oracle, theirs, f"{name} {dtype}")
    assert torch.equal(got[0][row_weight == 0], torch.zeros(int((row_weight == 0).sum()), width))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_offsets(generator, impl, dtype):
    """lse near 1e4 has lost digits that the gradient must not miss."""
    logits, targets, indices = draw(generator, 20, 300, dtype, offset=1e4 if dtype == torch.float32 else 100.0)
    (mine,), (right,), (peer,) = fresh(logits), fresh(logits, dtype=torch.float64), fresh(logits)
    got = gradients(selected_cross_entropy(mine, targets, indices, impl=impl), mine)[0]
    oracle, theirs = (gradients(unfused(x, targets, indices), x)[0] for x in (right, peer))
    check(got, oracle, theirs, "gradient")


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(generator, impl):
    logits, targets, indices = draw(generator, 7, 5, torch.float64)
    hidden, weight, bias, *_ = draw_linear(generator, 7, 4, 5, torch.float64)
    for reduction in ("mean", "sum", "none"):
        (leaf,) = fresh(logits)
        assert torch.autograd.gradcheck(
            lambda x, reduction=reduction: selected_cross_entropy(
                x, targets, indices, reduction=reduction, impl=impl, **EVERYTHING
            ),
            leaf,
        )
        assert torch.autograd.gradcheck(
            lambda h, w, b, reduction=reduction: selected_linear_cross_entropy(
                h, w, targets, indices, bias=b, logit_scale=0.7, reduction=reduction, impl=impl, **EVERYTHING
            ),
            tuple(fresh(hidden, weight, bias)),
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_the_mean_is_that_of_cross_entropy(generator, impl):
    logits, targets, indices = draw(generator, 30, 11)
    hidden, weight, _, _, _ = draw_linear(generator, 30, 6, 11)
    indices = indices[:-1]
    for chosen in (indices, indices[:1], torch.arange(30), indices.flip(0)):
        mine = selected_cross_entropy(logits, targets, chosen, impl=impl)
        torch.testing.assert_close(mine, F.cross_entropy(logits[chosen], targets[chosen]), equal_nan=True)
        mine = selected_linear_cross_entropy(hidden, weight, targets, chosen, impl=impl)
        torch.testing.assert_close(mine, F.cross_entropy((hidden @ weight.T)[chosen], targets[chosen]), equal_nan=True)


# ---- rows that are special


@pytest.mark.parametrize("impl", IMPLS)
def test_all_ignored(generator, impl):
    logits, targets, indices = draw(generator, 8, 5)
    hidden, weight, bias, *_ = draw_linear(generator, 8, 3, 5)
    for y, chosen in ((torch.full_like(targets, IGNORED), indices), (targets, torch.tensor([-1, -1]))):
        for reduction in ("mean", "sum"):
            leaves = fresh(logits, hidden, weight, bias)
            loss = selected_cross_entropy(leaves[0], y, chosen, reduction=reduction, impl=impl)
            linear = selected_linear_cross_entropy(
                leaves[1], leaves[2], y, chosen, bias=leaves[3], reduction=reduction, impl=impl
            )
            assert loss.isnan() and linear.isnan() if reduction == "mean" else loss == 0 and linear == 0
            for grad in torch.autograd.grad(loss + linear, leaves):
                assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_chosen_cannot_spoil(generator, impl, bad):
    """Row 0 stands in for empty places, and an ignored row is gathered too: neither reaches a sum."""
    logits, targets, _ = draw(generator, 8, 5)
    hidden, weight, bias, *_ = draw_linear(generator, 8, 3, 5)
    targets[3] = IGNORED
    for spoilt in (logits, hidden):
        spoilt[0] = spoilt[3] = spoilt[7] = bad
    indices = torch.tensor([1, 3, 2, -1, 5])
    leaves = fresh(logits, hidden, weight, bias)
    loss = selected_cross_entropy(leaves[0], targets, indices, impl=impl, **EVERYTHING)
    linear = selected_linear_cross_entropy(
        leaves[1], leaves[2], targets, indices, bias=leaves[3], impl=impl, **EVERYTHING
    )
    assert loss.isfinite()
    assert linear.isfinite()
    for leaf, grad in zip(leaves, torch.autograd.grad(loss + linear, leaves), strict=True):
        assert grad.isfinite().all()
        if len(leaf) == 8:
            assert torch.equal(grad[[0, 3, 4, 6, 7]], torch.zeros_like(grad[:5]))
            assert (grad[[1, 2, 5]] != 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_chosen_row_of_nan_is_nan(generator, impl):
    logits, targets, _ = draw(generator, 6, 5)
    hidden, weight, *_ = draw_linear(generator, 6, 3, 5)
    targets[:] = 1
    logits[2, 4] = hidden[2, 0] = math.nan
    leaves = fresh(logits, hidden, weight)
    indices = torch.tensor([1, 2])
    loss = selected_cross_entropy(leaves[0], targets, indices, reduction="none", impl=impl)
    linear = selected_linear_cross_entropy(leaves[1], leaves[2], targets, indices, reduction="none", impl=impl)
    assert loss.isnan().tolist() == linear.isnan().tolist() == [False, True]
    for grad, spoilt in zip(torch.autograd.grad((loss + linear).sum(), leaves), (2, 2, slice(None)), strict=True):
        assert grad[spoilt].isnan().all()
        assert grad.isfinite().sum() == (0 if spoilt == slice(None) else grad.numel() - grad[2].numel())


def test_the_weight_of_a_row_is_nan_where_its_loss_is():
    """What a target out of range comes to where the host may not look at it: the gradient must not be that of no target."""
    losses = torch.tensor([math.nan, 1.0, math.nan, math.inf])
    got = weights_of_rows(torch.full((4,), 0.5), losses, torch.tensor([7, 2, IGNORED, 0]), IGNORED)
    assert torch.equal(got.nan_to_num(nan=9.0), torch.tensor([9.0, 0.5, 0.0, 0.5]))


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_classes_have_no_gradient(generator, impl):
    logits, targets, indices = draw(generator, 10, 40)
    logits[:, 7::5] = -math.inf
    targets[targets >= 0] = 3
    (mine,), (theirs,) = fresh(logits), fresh(logits)
    got = gradients(selected_cross_entropy(mine, targets, indices, impl=impl), mine)[0]
    torch.testing.assert_close(got, gradients(unfused(theirs, targets, indices), theirs)[0])
    assert torch.equal(got[:, 7::5], torch.zeros_like(got[:, 7::5]))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_named_twice_counts_twice(generator, impl):
    logits, targets, _ = draw(generator, 6, 5)
    hidden, weight, bias, *_ = draw_linear(generator, 6, 3, 5)
    targets[:] = 2
    indices = torch.tensor([4, 1, 4, 4])
    mine, theirs = fresh(logits, hidden, weight, bias), fresh(logits, hidden, weight, bias)
    got = selected_cross_entropy(mine[0], targets, indices, impl=impl) + selected_linear_cross_entropy(
        mine[1], mine[2], targets, indices, bias=mine[3], impl=impl
    )
    right = unfused(theirs[0], targets, indices) + unfused_linear(theirs[1], theirs[2], targets, indices, theirs[3])
    torch.testing.assert_close(got, right)
    for a, b in zip(torch.autograd.grad(got, mine), torch.autograd.grad(right, theirs), strict=True):
        torch.testing.assert_close(a, b)


@needs_extension
def test_layouts(generator):
    """Sequences, strided and transposed tensors, int32 targets, a transposed weight: bit for bit the contiguous answer."""
    logits, targets, indices = draw(generator, 24, 33)
    hidden, weight, bias, *_ = draw_linear(generator, 24, 10, 33)

    def run(logits, hidden, weight, bias, targets):
        leaves = fresh(logits, hidden, weight, bias)
        loss = selected_cross_entropy(leaves[0], targets, indices, impl="cpu") + selected_linear_cross_entropy(
            leaves[1], leaves[2], targets, indices, bias=leaves[3], impl="cpu"
        )
        return [g.reshape(-1, g.shape[-1]) for g in torch.autograd.grad(loss, leaves)]

    right = run(logits, hidden, weight, bias, targets)
    for variant in (
        (logits.view(4, 6, -1), hidden.view(4, 6, -1), weight, bias, targets.view(4, 6)),
        (logits.t().contiguous().t(), hidden.t().contiguous().t(), weight.t().contiguous().t(), bias, targets.int()),
        *[tuple(t.repeat_interleave(2, -1)[..., ::2] for t in (logits, hidden, weight, bias, targets))],
    ):
        for a, b in zip(run(*variant), right, strict=True):
            assert torch.equal(a, b)


# ---- ways of training


@pytest.mark.parametrize("impl", IMPLS)
def test_what_requires_no_gradient_gets_none(generator, impl):
    hidden, weight, bias, targets, indices = draw_linear(generator, 9, 4, 6)
    whole = fresh(hidden, weight, bias)
    loss = selected_linear_cross_entropy(whole[0], whole[1], targets, indices, bias=whole[2], impl=impl)
    right = torch.autograd.grad(loss, whole)
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [t.detach().requires_grad_(want) for t, want in zip(whole, wanted, strict=True)]
        loss = selected_linear_cross_entropy(leaves[0], leaves[1], targets, indices, bias=leaves[2], impl=impl)
        assert loss.requires_grad == any(wanted)
        if not any(wanted):
            continue
        loss.backward()
        for leaf, grad, want in zip(leaves, right, wanted, strict=True):
            assert leaf.grad is None if not want else torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_calls_and_second_backwards(generator, impl):
    """Two losses of one step on the same tensors, and one loss asked twice: the sums of what each gives alone."""
    logits, targets, indices = draw(generator, 12, 5)
    hidden, weight, *_ = draw_linear(generator, 12, 4, 5)

    def losses(leaves, chosen):
        return selected_cross_entropy(leaves[0], targets, chosen, impl=impl) + selected_linear_cross_entropy(
            leaves[1], leaves[2], targets, chosen, impl=impl
        )

    halves = indices[:3], indices[3:]
    alone = [
        torch.autograd.grad(losses(leaves, half), leaves)
        for half in halves
        for leaves in [fresh(logits, hidden, weight)]
    ]
    leaves = fresh(logits, hidden, weight)
    first, second = losses(leaves, halves[0]), losses(leaves, halves[1])
    (first + second).backward(retain_graph=True)
    for leaf, a, b in zip(leaves, *alone, strict=True):
        torch.testing.assert_close(leaf.grad, a + b)
        leaf.grad = None
    first.backward(retain_graph=True)
    first.backward()
    for leaf, a in zip(leaves, alone[0], strict=True):
        assert torch.equal(leaf.grad, 2 * a)


class TinyLanguageModel(torch.nn.Module):
    """A classifier tied to the embedding, whose gradient is the sum over both uses."""

    def __init__(self, generator, vocabulary=50, width=8):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.mixer = torch.nn.Linear(width, width)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)

    def forward(self, tokens):
        return self.mixer(self.embedding(tokens)).tanh()


def next_tokens(generator, sequences=4, length=9):
    tokens = torch.randint(50, (sequences, length + 1), generator=generator)
    chosen = torch.randperm(sequences * length, generator=generator)[:10].sort().values
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), chosen


def parameter_gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("impl", IMPLS)
def test_tied_embeddings_and_accumulation(generator, impl):
    model = TinyLanguageModel(generator)
    batches = [next_tokens(generator) for _ in range(2)]
    for tokens, targets, chosen in batches:  # micro-batches, their gradients added up by backward
        (
            selected_linear_cross_entropy(model(tokens), model.embedding.weight, targets, chosen, impl=impl) / 2
        ).backward()
    right = parameter_gradients(
        model,
        sum(unfused(model(x) @ model.embedding.weight.T, y, chosen) / 2 for x, y, chosen in batches),
    )
    for parameter, grad in zip(model.parameters(), right, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(generator, impl, use_reentrant):
    model = TinyLanguageModel(generator)
    tokens, targets, chosen = next_tokens(generator)
    hidden = model(tokens)

    def loss_of(hidden):
        linear = selected_linear_cross_entropy(hidden, model.embedding.weight, targets, chosen, impl=impl)
        return linear + selected_cross_entropy(hidden @ model.embedding.weight.T, targets, chosen, impl=impl)

    loss_of(hidden).backward()
    right = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(loss_of, model(tokens), use_reentrant=use_reentrant).backward()
    for parameter, grad in zip(model.parameters(), right, strict=True):
        assert torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(generator, impl):
    """Inside torch.autocast: bit for bit the call on tensors cast to bfloat16, gradients in the dtype of the parameters."""
    hidden, weight, bias, targets, indices = draw_linear(generator, 20, 6, 30)
    logits = draw(generator, 20, 30)[0]

    def run(logits, hidden, weight, bias):
        loss = selected_linear_cross_entropy(hidden, weight, targets, indices, bias=bias, impl=impl)
        return loss + selected_cross_entropy(logits, targets, indices, impl=impl)

    mine, right = fresh(logits, hidden, weight, bias), fresh(logits, hidden, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run(*mine)
        grads = torch.autograd.grad(loss, mine)
    expected = run(right[0], *(t.bfloat16() for t in right[1:]))
    assert torch.equal(loss, expected)
    for a, b in zip(grads, torch.autograd.grad(expected, right), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@needs_extension
def test_compiled_whole(generator):
    model = TinyLanguageModel(generator)

    def loss_of(tokens, targets, chosen):
        hidden = model(tokens)
        linear = selected_linear_cross_entropy(
            hidden, model.embedding.weight, targets, chosen, softcap=5.0, z_loss=1e-3
        )
        return linear + selected_cross_entropy(hidden @ model.embedding.weight.T, targets, chosen)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    for sequences in (4, 6):
        batch = next_tokens(generator, sequences)
        batch[1][0, 0] = IGNORED
        loss, right = compiled(*batch), loss_of(*batch)
        torch.testing.assert_close(loss, right)
        for a, b in zip(parameter_gradients(model, loss), parameter_gradients(model, right), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives_are_refused(generator, impl):
    logits, targets, indices = draw(generator, 6, 5)
    hidden, weight, *_ = draw_linear(generator, 6, 3, 5)
    leaves = fresh(logits, hidden, weight)
    for loss in (
        selected_cross_entropy(leaves[0], targets, indices, impl=impl),
        selected_linear_cross_entropy(leaves[1], leaves[2], targets, indices, impl=impl),
    ):
        grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            sum(g.square().sum() for g in grads if g is not None).backward()


# ---- the operators


@needs_extension
def test_threads_change_nothing(generator):
    """The blocks are the same and a tile is one thread's, whoever takes it."""
    hidden, weight, bias, targets, _ = draw_linear(generator, 300, 70, 900)
    row_weight = torch.rand(300, generator=generator)
    lse = reference.linear_logits(hidden, weight, bias, 0.0, 1.0).logsumexp(1)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(
            dispatch.EXTENSION.linear_loss_backward(
                row_weight, hidden, weight, targets, lse, bias, 0, 900, 0.0, 0.0, 1.0, 0.0, [True, True, True]
            )
        )
    torch.set_num_threads(before)
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0], strict=True))


@needs_extension
def test_shards_of_the_classes_add_up(generator):
    hidden, weight, bias, targets, _ = draw_linear(generator, 20, 6, 31)
    row_weight = torch.randn(20, generator=generator)
    lse = reference.linear_logits(hidden, weight, bias, 3.0, 1.0).logsumexp(1)
    settings = (31, 0.1, 3.0, 1.0, 1e-2, [True, True, True])
    backward = dispatch.EXTENSION.linear_loss_backward
    whole = backward(row_weight, hidden, weight, targets, lse, bias, 0, *settings)
    parts = [
        backward(row_weight, hidden, weight[a:b], targets, lse, bias[a:b], a, *settings) for a, b in ((0, 11), (11, 31))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), whole[i])


@needs_extension
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(generator, transposed):
    def laid_out(tensor):
        return tensor.t().contiguous().t() if transposed else tensor

    hidden, weight, bias, targets, _ = draw_linear(generator, 7, 4, 6, torch.bfloat16)
    logits = draw(generator, 7, 6, torch.bfloat16)[0]
    row_weight, lse = torch.rand(2, 7, generator=generator)
    torch.library.opcheck(
        torch.ops.adaselect.cross_entropy_backward, (row_weight, laid_out(logits), targets, lse, 0.1, 2.0, 0.01)
    )
    for wanted in ([True, True, True], [False, True, False], [True, False, False]):
        torch.library.opcheck(
            torch.ops.adaselect.linear_loss_backward,
            (row_weight, laid_out(hidden), laid_out(weight), targets, lse, bias, 0, 6, 0.1, 2.0, 0.5, 0.01, wanted),
        )


def test_wrong_inputs_are_named(generator):
    logits, targets, indices = draw(generator, 6, 5)
    hidden, weight, bias, *_ = draw_linear(generator, 6, 3, 5)
    for loss in (
        lambda indices=indices, targets=targets, **options: selected_cross_entropy(logits, targets, indices, **options),
        lambda indices=indices, targets=targets, **options: selected_linear_cross_entropy(
            hidden, weight, targets, indices, **options
        ),
    ):
        for changed, error, message in (
            ({"indices": indices.int()}, TypeError, "torch.int32"),
            ({"indices": targets > 2}, TypeError, "mask_to_indices"),
            ({"indices": [1, 2]}, TypeError, "list"),
            ({"indices": indices[:0]}, ValueError, r"\(0,\)"),
            ({"indices": torch.tensor([1, 6])}, IndexError, r"index 6 at place 1 is outside \[-1, 6\)"),
            ({"indices": torch.tensor([-2])}, IndexError, "index -2 at place 0"),
            ({"targets": targets.where(targets < 0, 5)}, IndexError, r"target 5 .*\[0, 5\)"),
            ({"targets": targets.float()}, TypeError, "torch.float32"),
            ({"targets": targets[1:]}, ValueError, r"\(5,\)"),
            ({"reduction": "max"}, ValueError, "'max'"),
            ({"softcap": 0.0}, ValueError, "softcap"),
            ({"softcap": "30"}, TypeError, "softcap"),
            ({"z_loss": -1.0}, ValueError, "z_loss"),
            ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
            ({"ignore_index": 1.0}, TypeError, "ignore_index"),
            ({"impl": "fast"}, ValueError, "'fast'"),
        ):
            with pytest.raises(error, match=message):
                loss(**changed)
    for changed, error, message in (
        ({"weight": weight[:, 1:]}, ValueError, r"\(5, 2\)"),
        ({"weight": weight.double()}, TypeError, "torch.float64"),
        ({"bias": bias[1:]}, ValueError, r"\(4,\)"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale"),
    ):
        with pytest.raises(error, match=message):
            selected_linear_cross_entropy(
                **{"hidden": hidden, "weight": weight, "targets": targets, "indices": indices, **changed}
            )
    with pytest.raises(TypeError, match="int64"):
        selected_cross_entropy(logits.long(), targets, indices)
