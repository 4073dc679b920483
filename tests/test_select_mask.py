"""Masks of the best valid scores, and the indices made of them: against the reference and against what the words say."""

import math

import pytest
import torch

from adaselect_kernels import dispatch, mask_to_indices, reference, select_mask

IMPLS = ["reference", *(["cpu"] if dispatch.EXTENSION is not None else [])]
needs_extension = pytest.mark.skipif(dispatch.EXTENSION is None, reason=dispatch.EXTENSION_ERROR)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One place; part of a vector; one block; more than bisection takes; chunks for several threads.
LENGTHS = (1, 7, 1000, 5000, 70000)


def draw(generator, *shape, dtype=torch.float32):
    """Scores with ties (a few hundred values), and a fifth each of NaN, -inf and +inf in places."""
    scores = (torch.randn(shape, generator=generator, dtype=torch.float64) * 100).round().div(7).to(dtype)
    kind = torch.rand(shape, generator=generator)
    for value, below in ((math.nan, 0.05), (-math.inf, 0.2), (math.inf, 0.25)):
        scores[(kind < below) & (kind >= below - 0.15)] = value
    return scores


def expected(row, gamma: float):
    """In words: the count of the finite scores, and Python's stable sort for the order of the rest."""
    finite = [i for i, x in enumerate(row.tolist()) if math.isfinite(x)]
    count = min(len(finite), max(1, math.floor(gamma * len(finite) + 0.5)))
    return torch.zeros(len(row), dtype=torch.bool).index_fill(
        0, torch.tensor(sorted(finite, key=lambda i: -row[i].item())[:count], dtype=torch.int64), True
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gamma", [0.001, 0.3, 0.5, 1.0])
def test_the_best_of_the_finite_scores(generator, impl, gamma):
    scores = draw(generator, 5, 203)
    scores[1] = torch.tensor([math.nan, math.inf, -math.inf]).repeat(68)[:203]  # no valid place
    scores[2, :-1] = -math.inf
    scores[2, -1] = -5.0  # the only one
    scores[3] = scores[3].sign()  # ties everywhere, and -0.0
    scores[3, ::3] = -0.0
    got = select_mask(scores, gamma, per_sequence=True, impl=impl)
    for row, mask in zip(scores, got, strict=True):
        assert torch.equal(mask, expected(row, gamma))
        assert torch.equal(select_mask(row, gamma, impl=impl), mask)
    assert not got[1].any()
    assert got[2].nonzero().tolist() == [[202]]


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_compiled_kernel_equals_the_reference(generator, dtype, length):
    scores = draw(generator, 3, length, dtype=dtype)
    scores[1] = scores[1].abs().clamp(max=torch.finfo(dtype).max)  # no -inf, no +inf
    wide = scores.repeat_interleave(2, 1)
    for gamma in (0.1, 1.0):
        right = reference.select_mask(scores, gamma)
        for view in (scores, scores.t().contiguous().t(), wide[:, ::2]):
            assert torch.equal(select_mask(view, gamma, per_sequence=True, impl="cpu"), right)
            assert torch.equal(select_mask(view[1], gamma, impl="cpu"), right[1])


@needs_extension
def test_the_largest_numbers_are_finite(generator):
    for dtype in DTYPES:
        info = torch.finfo(dtype)
        scores = torch.tensor([info.min, math.inf, info.max, -math.inf, info.smallest_normal, math.nan], dtype=dtype)
        assert select_mask(scores, 1.0, impl="cpu").tolist() == [True, False, True, False, True, False]
        assert select_mask(scores, 0.4, impl="cpu").tolist() == [False, False, True, False, False, False]


@needs_extension
def test_threads_change_nothing(generator):
    scores = draw(generator, 100_000)
    masks = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        masks.append(select_mask(scores, 0.3, impl="cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@needs_extension
def test_opcheck_and_compilation(generator):
    scores = draw(generator, 4, 30)
    torch.library.opcheck(torch.ops.adaselect.select_mask, (scores, 0.3))
    torch.library.opcheck(torch.ops.adaselect.select_mask, (scores.t(), 0.3))

    def choose(scores):
        mask = select_mask(scores.flatten(), 0.3)
        return mask_to_indices(mask, 36)

    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores), choose(scores))


@pytest.mark.parametrize("shape", [(1,), (50,), (4, 25)])
def test_mask_to_indices(generator, shape):
    for share in (0.0, 0.3, 1.0):
        mask = torch.rand(shape, generator=generator) < share
        right = mask.flatten().nonzero()[:, 0]
        for k in {1, (mask.numel() + 1) // 2, mask.numel()}:
            got = mask_to_indices(mask, k)
            assert got.dtype == torch.int64
            assert torch.equal(got, torch.cat([right, torch.full((k,), -1)])[:k])


def test_wrong_inputs_are_named():
    scores = torch.zeros(3, 4)
    for gamma, error in ((0.0, ValueError), (1.5, ValueError), (math.nan, ValueError), ("all", TypeError)):
        with pytest.raises(error, match="gamma"):
            select_mask(scores[0], gamma)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        select_mask(scores, 0.5)
    for per_sequence in (scores[0], scores[:0], scores[:, :0]):
        with pytest.raises(ValueError, match=r"\[S, T\]"):
            select_mask(per_sequence, 0.5, per_sequence=True)
    with pytest.raises(TypeError, match="int64"):
        select_mask(scores.long(), 0.5, per_sequence=True)
    with pytest.raises(TypeError, match="per_sequence"):
        select_mask(scores, 0.5, per_sequence=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="float32"):
        mask_to_indices(scores, 2)
    for k, error in ((0, ValueError), (13, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="k must be"):
            mask_to_indices(scores > 0, k)
