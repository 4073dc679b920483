"""Batch stage and top-k of the compiled CPU kernels against the oracle, and a whole selection as its stages."""

import math

import numpy as np
import pytest
import torch

from adaselect_kernels import AdaSelectionOptions, AdaSelectionState, reference
from adaselect_kernels.options import METHODS, STATS
from tests.cpu_kernels import (
    DTYPES,
    PLAIN,
    cpu_select,
    draw,
    kernels,
    needs_kernels,
    stats_of,
    used_state,
)
from tests.oracle import (
    EPS32,
    assert_within_budget,
    check_scores,
)

pytestmark = needs_kernels

BATCH_OPTIONS = [
    AdaSelectionOptions(),
    AdaSelectionOptions(temperature=0.3, standardize=True, beta=-0.5),
    AdaSelectionOptions(update="log_ratio", weight_floor=0.4),
    AdaSelectionOptions(curriculum_power=0.5),
    AdaSelectionOptions(curriculum_power=-0.7, curriculum_scale="rms", standardize=True),
]


def draw_batch(generator, n, dtype=torch.float32):
    losses = torch.rand(n, generator=generator, dtype=torch.float64).mul(4).to(dtype)
    grad_norms = torch.rand(n, generator=generator, dtype=torch.float64).to(dtype)
    if n > 10:
        losses[[2, 7]] = torch.tensor([math.nan, math.inf], dtype=dtype)
        grad_norms[[3, 9]] = torch.tensor([math.inf, math.nan], dtype=dtype)
    return losses, grad_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", BATCH_OPTIONS, ids=range(len(BATCH_OPTIONS)))
@pytest.mark.parametrize("n", [1, 2, 16, 129, 2048, 9001])  # one row; a vector; a partial one; a chunk; several
def test_batch_scores(generator, dtype, options, n):
    losses, grad_norms = draw_batch(generator, n, dtype)
    valid = torch.rand(n, generator=generator) < 0.9
    state = used_state(generator)
    oracle_state, peer_state = state.clone(), state.clone()
    codes, k = list(range(len(METHODS))), max(1, n // 5)
    arguments = (codes, k, 77, options.packed)
    scores, n_valid = kernels.batch_scores(losses, grad_norms, valid, state, *arguments)
    oracle, oracle_valid = reference.batch_scores(losses.double(), grad_norms.double(), valid, oracle_state, *arguments)
    peer, _ = reference.batch_scores(losses.float(), grad_norms.float(), valid, peer_state, *arguments)
    assert int(n_valid) == int(oracle_valid)
    check_scores(scores, oracle, peer, losses)
    tolerance = 2 * (peer_state - oracle_state).abs() + 1e-6 * (1 + oracle_state.abs())
    assert ((state - oracle_state).abs() <= tolerance).all(), (state, oracle_state)
    strided = [torch.stack([x, x], 1)[:, 0] for x in (losses, grad_norms, valid)]
    again, _ = kernels.batch_scores(*strided, None, *arguments)
    assert torch.equal(again, kernels.batch_scores(losses, grad_norms, valid, None, *arguments)[0])


@pytest.mark.parametrize("n", [2, 3, 40, 5000])
def test_distances_to_the_mean_of_close_losses(generator, n):
    """The mean of losses near 2 with a spread of 1e-3, rounded to float32, is off by 1e-4 of the spread."""
    losses = 2 + 1e-3 * torch.randn(n, generator=generator)
    arguments = ([METHODS.index("coreset2")], 1, 0, AdaSelectionOptions(standardize=True).packed)
    scores, _ = kernels.batch_scores(losses, None, None, None, *arguments)
    oracle, _ = reference.batch_scores(losses.double(), None, None, None, *arguments)
    assert ((scores - oracle).abs() <= 32 * EPS32 * oracle).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "methods", [("big_loss",), ("small_loss",), ("grad_norm",), ("coreset1", "grad_norm", "uniform")]
)
@pytest.mark.parametrize("standardize", [False, True])
def test_chunks_far_from_each_other(generator, dtype, methods, standardize):
    """Sums relative to the extremes of each chunk: one holds all the weight of a method, one is empty, none fits the others."""
    n = 5 * 2048 + 77
    place = torch.arange(n) // 2048
    losses, grad_norms = draw_batch(generator, n, dtype)
    losses += torch.tensor([150.0, 0.0, 40.0, 400.0, 90.0, 41.0])[place].to(dtype)
    grad_norms += torch.tensor([0.0, 9.0, 30.0, 3.0, 250.0, 8.0])[place].to(dtype)
    losses[place == 1] = math.nan
    codes = [METHODS.index(name) for name in methods]
    state = used_state(generator, len(codes))
    oracle_state, peer_state = state.clone(), state.clone()
    arguments = (codes, n // 5, 7, AdaSelectionOptions(standardize=standardize).packed)
    scores, n_valid = kernels.batch_scores(losses, grad_norms, None, state, *arguments)
    oracle, oracle_valid = reference.batch_scores(losses.double(), grad_norms.double(), None, oracle_state, *arguments)
    peer, _ = reference.batch_scores(losses, grad_norms, None, peer_state, *arguments)
    assert int(n_valid) == int(oracle_valid)
    check_scores(scores, oracle, peer, losses)
    tolerance = 2 * (peer_state - oracle_state).abs() + 1e-6 * (1 + oracle_state.abs())
    assert ((state - oracle_state).abs() <= tolerance).all(), (state, oracle_state)


@pytest.mark.parametrize("method", ["big_loss", "small_loss", "grad_norm", "adaboost", "coreset1", "coreset2"])
def test_identical_samples_tie_in_every_chunk(generator, method):
    """Also where the rows around them, and so the sums of their chunks, differ."""
    n = 3 * 2048 + 5
    losses, grad_norms = draw_batch(generator, n)
    twins = torch.tensor([11, 2047, 2048, 5000, n - 1])
    losses[twins], grad_norms[twins] = 1.25, 0.5
    losses[4000] = 30.0
    scores, _ = kernels.batch_scores(losses, grad_norms, None, None, [METHODS.index(method)], 5, 0, PLAIN)
    assert torch.equal(scores[twins], scores[twins[:1]].expand(len(twins)))


def test_valid_rows_of_any_alignment(generator):
    losses, grad_norms = draw_batch(generator, 4200)
    valid = torch.rand(4200, generator=generator) < 0.5
    for first, count in ((0, 4200), (1, 4199), (3, 2051), (2048, 2048), (7, 9)):
        rows = slice(first, first + count)
        arguments = (None, [0, 2, 6], 1, 3, PLAIN)
        got, n_valid = kernels.batch_scores(losses[rows], grad_norms[rows], valid[rows], *arguments)
        copies = [torch.where(valid[rows], losses[rows], math.nan), grad_norms[rows].clone()]
        expected, _ = kernels.batch_scores(*copies, None, *arguments)
        assert torch.equal(got, expected)
        assert torch.equal(got.isneginf(), ~(valid[rows] & losses[rows].isfinite() & grad_norms[rows].isfinite()))
        assert int(n_valid) == int((~got.isneginf()).sum())


@pytest.mark.parametrize("n", [3, 400, 5000])
def test_selected_method_losses(generator, n):
    losses, grad_norms = draw_batch(generator, n, torch.float64)  # float64: no rank depends on rounding
    state = used_state(generator)
    oracle_state = state.clone()
    arguments = (list(range(len(METHODS))), max(1, n // 3), 5, AdaSelectionOptions(method_loss="selected").packed)
    kernels.batch_scores(losses, grad_norms, None, state, *arguments)
    reference.batch_scores(losses, grad_norms, None, oracle_state, *arguments)
    assert torch.allclose(state, oracle_state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ["index", "score"])
@pytest.mark.parametrize("method", METHODS)
def test_baseline_selectors(generator, method, order):
    packed = PLAIN._replace(baseline=1.0)
    for n, k in ((1, 1), (12, 12), (200, 41), (6000, 1200)):
        losses, grad_norms = draw_batch(generator, n, torch.float64)
        arguments = (None, [METHODS.index(method)], k, order, 3, packed)
        indices, scores, _ = kernels.select_from_losses(losses, grad_norms, *arguments)
        expected, oracle, _ = reference.select_from_losses(losses, grad_norms, *arguments)
        assert torch.equal(indices, expected)
        finite = oracle.isfinite()
        assert torch.equal(scores.isneginf(), oracle.isneginf())
        assert torch.allclose(scores[finite], oracle[finite], rtol=3e-7, atol=0)


def test_batch_without_a_valid_row():
    losses = torch.full((20,), math.nan)
    state = used_state(torch.Generator().manual_seed(1), 2)
    expected = state.clone()
    indices, scores, n_valid = kernels.select_from_losses(losses, None, state, [0, 6], 3, "score", 0, PLAIN)
    reference.select_from_losses(losses, None, expected, [0, 6], 3, "score", 0, PLAIN)
    assert indices.tolist() == [0, 1, 2]
    assert scores.isneginf().all()
    assert n_valid == 0
    assert torch.allclose(state, expected, rtol=1e-12)


def test_noise_is_exact(generator):
    """The method "uniform" alone, as a baseline, shows E = -log u of the shared Philox stream."""
    for seed, step in ((0, 1.0), (2**63 - 1, 2.0**33 + 5), (-12345, 77.0)):
        state = torch.tensor([0.0, math.nan, step], dtype=torch.float64)
        n = 2100
        options = PLAIN._replace(baseline=1.0)
        u = reference.philox_uniform(n, torch.tensor(step, dtype=torch.float64), seed)
        for dtype in (torch.float32, torch.float64):
            ones = torch.ones(n, dtype=dtype)
            _, scores, _ = kernels.select_from_losses(ones, None, state.clone(), [6], 1, "index", seed, options)
            assert_within_budget(scores, -u.log(), -u.float().log(), f"noise of seed {seed}, {dtype}")


def sortable(generator, kind, n, dtype):
    if kind == "distinct":
        values = torch.randn(n, generator=generator)
    elif kind == "heavy ties":
        values = torch.randint(-2, 3, (n,), generator=generator).float()
    elif kind == "one value":
        values = torch.full((n,), 0.25)
    else:  # signed zeros, infinities and NaN
        values = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40])[
            torch.randint(6, (n,), generator=generator)
        ]
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["distinct", "heavy ties", "one value", "special"])
# bisection; the smallest sample; the last keys made once and more; chunks for several threads
@pytest.mark.parametrize("n", [1, 37, 1025, 4096, 4097, 20_000])
def test_select_topk(generator, dtype, kind, n):
    values = sortable(generator, kind, n, dtype)
    strided = torch.stack([values, torch.full_like(values, 9.0)], 1)[:, 0]
    for k in {1, (n + 4) // 5, n - n // 7, n}:
        for largest in (True, False):
            for order in ("index", "score"):
                expected = reference.select_topk(values, k, largest, order)
                assert torch.equal(kernels.select_topk(values, k, largest, order), expected), (k, largest, order)
                assert torch.equal(kernels.select_topk(strided, k, largest, order), expected), "strided"


def test_select_topk_of_a_million(generator):
    scores = torch.randn(1_000_003, generator=generator).softmax(0)
    for k in (10, 200_000):
        assert torch.equal(
            kernels.select_topk(scores, k, True, "index"), reference.select_topk(scores, k, True, "index")
        )
        assert torch.equal(
            kernels.select_topk(scores, k, True, "score"), reference.select_topk(scores, k, True, "score")
        )


def sampled_rows(n):
    """Rows whose keys place the bracket around the k-th: sampled_bracket in csrc/cpu/select.cpp."""
    count = min(max(n // 64, 256), 4096)
    i = torch.arange(count)
    return i * n // count + (n // count * (i * 0x9E3779B9 % 2**32) >> 32)


def misleading(generator, layout, n, eps):
    """Scores in an order that makes a sample say little or nothing of them."""
    values = 1.1 + torch.randn(n, generator=generator, dtype=torch.float64) * 1e-4  # one digit of the radix select
    sampled = sampled_rows(n)
    rest = torch.ones(n).index_fill(0, sampled, 0).nonzero()[:, 0]
    below, inside, above = rest[torch.randperm(len(rest), generator=generator)].tensor_split(
        [int(0.35 * len(rest)), int(0.75 * len(rest))]
    )

    def one_of(low, high, count):
        return low + torch.randint(2, (count,), generator=generator).double() * (high - low)

    def mislead(rows, low, high):  # the bracket of a sample of these rows, in this order, has these ends
        again = sampled_rows(len(rows))
        values[rows[again]] = one_of(low, high, len(again))

    if layout == "high sample":
        values[sampled] = 3.0
    elif layout == "low sample":
        values[sampled] = -3.0
    elif layout == "bracket of everything":  # twice
        mislead(torch.arange(n), -3.0, 3.0)
        mislead(rest, 1.01, 1.21)
    elif layout == "second bracket of everything":
        mislead(torch.arange(n), 1.02, 1.2)
        values[below], values[above] = -9.0, 9.0
        mislead(inside.sort().values, 1.03, 1.19)
    elif layout == "ends of the bracket":
        values[sampled] = 1 + one_of(0, 4, len(sampled)) * eps
        values[below], values[above] = 1 - 2 * eps, 1 + 9 * eps
        values[inside] = 1 + one_of(1, 3, len(inside)) * eps
    elif layout == "periodic":
        values = torch.arange(n) % 64 + values
    elif layout == "plateaus":
        values = torch.randint(7, (n,), generator=generator).double().sort().values
    elif layout == "few values":
        values = torch.randint(7, (n,), generator=generator).double()
    else:
        values = values.sort(descending=layout == "descending").values
    return values


MISLEADING = ("high sample", "low sample", "bracket of everything", "second bracket of everything")
MISLEADING += ("ends of the bracket", "periodic", "plateaus", "few values", "ascending", "descending")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", MISLEADING)
@pytest.mark.parametrize("n", [4000, 50_003])  # keys made once; chunks for several threads, the last a partial vector
def test_select_topk_of_misleading_orders(generator, dtype, layout, n):
    values = misleading(generator, layout, n, torch.finfo(dtype).eps).to(dtype)
    for largest in (True, False):
        ranked = torch.from_numpy(np.argsort(-values.numpy() if largest else values.numpy(), kind="stable"))
        for k in (1, 400, n // 5, n // 2, n - 400, n):
            got = kernels.select_topk(values, k, largest, "index")  # before its memory may hold the right rows
            assert torch.equal(got, ranked[:k].sort().values), (k, largest)
        assert torch.equal(kernels.select_topk(values, n, largest, "score"), ranked), largest


@pytest.mark.parametrize("n", [700, 1100])  # bisection; a sample
def test_select_topk_of_every_k_of_neighbouring_numbers(generator, n):
    for ranks in (torch.randperm(n, generator=generator), torch.randint(n // 3, (n,), generator=generator)):
        values = (ranks.to(torch.int32) + 0x3F800000).view(torch.float32)
        ranked = torch.from_numpy(np.argsort(-values.numpy(), kind="stable"))
        for k in range(1, n + 1):
            assert torch.equal(kernels.select_topk(values, k, True, "index"), ranked[:k].sort().values), k


@pytest.mark.parametrize("shape", [(128, 10), (300, 1000), (20_000, 10), (40, 9, 50)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit", ["sample", "token"])
def test_fused_select_is_its_stages(generator, shape, dtype, unit):
    """Bit for bit the three stages, which the tests above compare with the oracle."""
    logits = (torch.randn(*shape, generator=generator, dtype=torch.float64) * 2).to(dtype)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    targets[1] = -100
    logits[(3,) * (len(shape) - 1)] = math.nan
    codes = list(range(len(METHODS)))
    for options in (BATCH_OPTIONS[0], BATCH_OPTIONS[4]):
        state = used_state(generator)
        for order in ("index", "score"):
            stage_state = state.clone()
            table = stats_of(logits, targets, [STATS.index("loss"), STATS.index("grad_norm")], unit, -100, 0.05)
            valid = reference.valid_samples(targets, unit, -100)
            k = table.shape[1] // 3
            scores, n_valid = kernels.batch_scores(*table, valid, stage_state, codes, k, 11, options.packed)
            got = kernels.fused_select(logits, targets, state, codes, k, unit, order, -100, 0.05, 11, options.packed)
            indices = kernels.select_topk(scores, k, True, order)
            for one, two in zip(got, (indices, scores, table[0].float(), n_valid), strict=True):
                assert torch.equal(one.nan_to_num(nan=1e30), two.nan_to_num(nan=1e30))
            assert torch.equal(state, stage_state)
            assert int(n_valid) == table.shape[1] - (10 if len(shape) == 3 and unit == "token" else 2)


def test_trajectory_of_200_steps(generator):
    """Errors of the weights must not grow beyond what float32 losses explain."""
    options = AdaSelectionOptions(beta=0.3, update="log_ratio")
    methods = ("big_loss", "small_loss", "grad_norm", "coreset2", "uniform")
    state = AdaSelectionState.create(methods, seed=4)
    oracle = AdaSelectionState.create(methods, seed=4)
    codes = [METHODS.index(name) for name in methods]
    for _ in range(200):
        logits, targets = draw(generator, 64, 10)
        cpu_select(logits, targets, 0.25, methods=methods, state=state, options=options)
        arguments = (codes, 16, "sample", "index", -100, 0.0, 4, options.packed)
        reference.fused_select(logits.double(), targets, oracle.buffer, *arguments)
    assert state.step == oracle.step == 201
    assert torch.allclose(state.weights, oracle.weights, rtol=1e-5)
    assert torch.allclose(state.previous_losses, oracle.previous_losses, rtol=1e-5)
    assert not torch.allclose(state.weights, torch.full_like(state.weights, 0.2), rtol=1e-3), "the weights never moved"


def test_threads_change_no_bit(generator):
    threads = torch.get_num_threads()
    logits, targets = draw(generator, 40_000, 20)
    wide, wide_targets = draw(generator, 70, 30_000)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            state = AdaSelectionState.create(METHODS, seed=1)
            options = AdaSelectionOptions(standardize=True, curriculum_power=-0.5)
            runs = [cpu_select(logits, targets, 0.2, methods=METHODS, state=state, options=options) for _ in range(2)]
            tables = [stats_of(wide, wide_targets), stats_of(logits, targets)]
            chosen = kernels.select_topk(wide.flatten(), 300_000, True, "index")
            results.append([*runs[0], *runs[1], state.buffer, *tables, chosen])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)
