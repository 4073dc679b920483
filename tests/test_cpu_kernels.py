"""The compiled CPU kernels against the oracle: every dtype, layout, instruction set and edge that their code treats apart."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from adaselect_kernels import AdaSelectionOptions, AdaSelectionState, dispatch, fused_select, reference
from adaselect_kernels.options import METHODS, STATS
from tests.oracle import (
    EPS32,
    assert_statistic,
    assert_within_budget,
    check_scores,
    drawn_targets,
    naive_stats,
    oracle_stats,
)

kernels = dispatch.EXTENSION
pytestmark = pytest.mark.skipif(kernels is None, reason=dispatch.EXTENSION_ERROR)

ALL_STATS = list(range(len(STATS)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One class; fewer than a vector; whole vectors and one more or less, of every instruction set; the last narrow and the
# first wide shape; a partial last block; many blocks.
CLASSES = (1, 2, 3, 10, 16, 17, 63, 64, 65, 100, 128, 129, 1000, 4097, 33000)
PLAIN = AdaSelectionOptions().packed
M = len(METHODS)


def cpu_select(*args, **kwargs):
    return fused_select(*args, impl="cpu", **kwargs)


def stats_of(logits, targets, stats=ALL_STATS, unit="sample", ignore_index=-100, label_smoothing=0.0):
    return kernels.per_sample_stats(logits, targets, stats, unit, ignore_index, label_smoothing)


def check_stats(logits, targets, label_smoothing=0.0):
    """Every statistic within twice PyTorch's own float32 error. Stored values are exact inputs of all three computations."""
    got = stats_of(logits, targets, label_smoothing=label_smoothing)
    assert got.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    oracle = oracle_stats(logits, targets, STATS, label_smoothing=label_smoothing)
    peer = naive_stats(logits, targets, -100, label_smoothing)
    for i, name in enumerate(STATS):
        assert_statistic(name, got[i], oracle[i], peer[name], f"of {tuple(logits.shape)} {logits.dtype}")
    return got


def draw(generator, rows, classes, dtype=torch.float32, scale=3.0, offset=0.0):
    logits = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale + offset).to(dtype)
    return logits, drawn_targets(logits, generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_stats(generator, dtype, classes):
    logits, targets = draw(generator, 37, classes, dtype)  # 37: a partial tile of every vector length
    targets[5] = -100
    check_stats(logits, targets)
    check_stats(logits, targets, label_smoothing=0.1)


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_stats_at_large_offsets(generator, classes, offset):
    check_stats(*draw(generator, 33, classes, offset=offset))


@pytest.mark.parametrize(
    ("dtype", "most", "error"), [(torch.float32, 75, 1e-5), (torch.float64, 650, 1e-12)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_confident_rows_keep_their_digits(generator, classes, dtype, most, error):
    """S1 far below one rounding of d, which log d must not lose; its square below what the type has."""
    logits, targets = draw(generator, 41, classes, dtype)
    logits.scatter_(1, targets[:, None], torch.linspace(5, most, 41, dtype=dtype)[:, None])
    got = stats_of(logits, targets, [STATS.index("loss"), STATS.index("grad_norm")])
    oracle = oracle_stats(logits, targets, ("loss", "grad_norm"))
    assert ((got - oracle).abs() <= error * oracle).all(), ((got - oracle).abs() / oracle).max()


@pytest.mark.parametrize("classes", [2, 200])
def test_one_other_class_keeps_its_digits(generator, classes):
    """Its e^x alone makes the norm, sqrt(2) e^x / (1 + e^x): an exponential that is a rounding worse is seen."""
    x = -torch.rand(20_000, generator=generator)
    logits = torch.full((20_000, classes), -1e30)
    logits[:, 0], logits[:, 1] = 0.0, x
    got = stats_of(logits, torch.zeros(20_000).long(), [STATS.index("grad_norm")])[0]
    e = x.double().exp()
    error = (got.double() * (1 + e) / (math.sqrt(2) * e) - 1) / EPS32
    assert error.abs().max() < 2.5
    assert error.square().mean().sqrt() < 0.5


@pytest.mark.parametrize("classes", [10, 128, 1000])
def test_sums_over_the_classes_keep_their_digits(generator, classes):
    """The confidence of a largest logit is 1 / d. Sums that round once for every eight terms lose half as much again."""
    logits = torch.randn(5000, classes, generator=generator)
    got = stats_of(logits, logits.argmax(1), [STATS.index("confidence")])[0]
    error = (got.double() / logits.double().softmax(1).amax(1) - 1) / EPS32
    assert error.square().mean().sqrt() < {10: 0.5, 128: 0.45, 1000: 0.6}[classes]


@pytest.mark.parametrize(("classes", "impossible"), [(20, 10), (5000, 2048), (5000, 2500)])
def test_classes_that_cannot_happen_and_smoothing(generator, classes, impossible):
    """The mean of lse - z_j over the classes is infinite, also where they fill a block of 2048; nothing else is."""
    logits, targets = draw(generator, 9, classes)
    logits[:, :impossible] = -math.inf
    targets = targets % (classes - impossible) + impossible
    table = check_stats(logits, targets, label_smoothing=0.1)
    assert table[STATS.index("loss")].eq(math.inf).all()


def test_one_class_that_is_not_finite():
    for value in (math.nan, math.inf, -math.inf):
        table = check_stats(torch.full((3, 1), value), torch.zeros(3).long())
        assert table[STATS.index("top2_margin")].eq(math.inf).all()


def layouts(logits):
    classes = logits.shape[1]
    wide = torch.full((2 * logits.shape[0], 3 * classes), math.nan, dtype=logits.dtype)
    wide[::2, 1 : 1 + 2 * classes : 2] = logits
    padded = torch.full((logits.shape[0], classes + 3), math.nan, dtype=logits.dtype)
    padded[:, 2 : 2 + classes] = logits
    return {
        "transposed": logits.t().contiguous().t(),
        "sliced rows and classes": wide[::2, 1 : 1 + 2 * classes : 2],
        "rows further apart": padded[:, 2 : 2 + classes],
        "expanded classes": logits[:, :1].expand(-1, classes),
        "expanded rows": logits[:1].expand(logits.shape[0], -1),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 16, 100, 300, 2500])
def test_strides_change_nothing(generator, dtype, classes):
    logits, targets = draw(generator, 29, classes, dtype)
    for name, view in layouts(logits).items():
        assert torch.equal(stats_of(view, targets), stats_of(view.contiguous(), targets)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [2, 5, 20])
def test_a_row_depends_on_no_other(generator, dtype, classes):
    """Whole-vector loads of a narrow row must not rely on what follows the tensor; rows are finished many at a time."""
    logits, targets = draw(generator, 150, classes, dtype)
    logits[[3, 70, 149], 1] = math.nan
    targets[[5, 64, 140]] = -100
    expected = stats_of(logits, targets).nan_to_num(nan=1e9)
    for rows in (*range(1, 18), 63, 64, 65, 129, 150):
        got = stats_of(logits[:rows].clone(), targets[:rows])
        assert torch.equal(got.nan_to_num(nan=1e9), expected[:, :rows])


@pytest.mark.parametrize("classes", [2, 10, 128, 1000, 4097])
def test_what_cannot_happen_adds_nothing(generator, classes):
    """e^(z - m) of -inf and of a logit far below the largest is exactly 0."""
    logits, targets = torch.full((20, classes), -math.inf), torch.randint(classes, (20,), generator=generator)
    logits[10:] = -200.0
    logits.scatter_(1, targets[:, None], torch.rand(20, 1, generator=generator))
    certain = {"loss": 0.0, "grad_norm": 0.0, "entropy": 0.0, "confidence": 1.0}
    got = stats_of(logits, targets, [STATS.index(name) for name in certain])
    assert torch.equal(got, torch.tensor(list(certain.values()))[:, None].expand(-1, 20))


def test_int32_and_strided_targets(generator):
    logits, targets = draw(generator, 50, 20)
    targets[7] = -1
    expected = stats_of(logits, targets, ignore_index=-1)
    assert expected[0, 7] == 0
    assert torch.equal(stats_of(logits, targets.int(), ignore_index=-1), expected)
    assert torch.equal(stats_of(logits, torch.stack([targets, targets], 1)[:, 1], ignore_index=-1), expected)
    assert torch.equal(stats_of(logits, torch.stack([targets.int()] * 3, 1)[:, 2], ignore_index=-1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [4, 40, 700, 5000])
def test_non_finite_rows(generator, dtype, classes):
    logits, targets = draw(generator, 24, classes, dtype)
    targets[:] = 1
    logits[0, 2] = math.nan
    logits[1, 1] = math.nan  # the target
    logits[2, 2] = math.inf
    logits[3, 1] = math.inf
    logits[4, :3] = math.inf
    logits[5] = -math.inf
    logits[6, 1:] = -math.inf
    logits[7, 0] = -math.inf
    logits[8, : classes - 1] = -math.inf  # whole blocks of -inf before the maximum
    logits[9, 1] = -math.inf
    logits[10] = torch.finfo(dtype).min  # masks written as the lowest finite value
    logits[11, 3] = math.nan
    logits[11, 2] = math.inf
    logits[12] = -math.inf
    targets[12] = 0  # the first of equal -inf
    logits[13, : classes - 1] = -math.inf  # NaN in a block that has nothing finite
    logits[13, 0] = math.nan
    got = stats_of(logits, targets)
    oracle = oracle_stats(logits, targets, STATS)
    special = {"nan": 1e40, "posinf": 2e40, "neginf": -2e40}
    finite = oracle.isfinite()
    for i, name in enumerate(STATS):
        rows = (~finite[i]).nonzero().flatten()
        assert torch.equal(
            got[i, rows].double().nan_to_num(**special), oracle[i, rows].double().nan_to_num(**special)
        ), name
        assert got[i, finite[i]].isfinite().all(), name
    correct = STATS.index("correct")
    assert torch.equal(got[correct].double(), oracle[correct].double())
    rows = finite.all(0)
    assert rows.sum() >= 11
    check_stats(logits[rows], targets[rows])


@pytest.mark.parametrize("classes", [6, 200])
def test_ties_of_the_maximum(generator, classes):
    logits = torch.randint(0, 2, (200, classes), generator=generator).float()  # almost every maximum is shared
    targets = torch.randint(min(classes, 4), (200,), generator=generator)
    got = check_stats(logits, targets)[STATS.index("correct")]
    assert 0 < got.mean() < 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [7, 130, 3001])
def test_identical_rows_tie_bit_for_bit(generator, dtype, classes):
    row, target = draw(generator, 1, classes, dtype)
    for rows in (1, 16, 39):
        table = stats_of(row.repeat(rows, 1), target.repeat(rows))
        assert torch.equal(table, table[:, :1].expand(-1, rows))
        assert torch.equal(table[:, 0], stats_of(row, target)[:, 0])


@pytest.mark.parametrize("stat", ALL_STATS)
def test_one_statistic_equals_the_whole_table(generator, stat):
    for classes in (10, 1000):
        logits, targets = draw(generator, 20, classes)
        alone, table = stats_of(logits, targets, [stat])[0], stats_of(logits, targets)[stat]
        assert torch.equal(alone, table)
    reversed_order = stats_of(logits, targets, ALL_STATS[::-1])
    assert torch.equal(reversed_order[len(STATS) - 1 - stat], table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("unit", ["sample", "token"])
def test_sequences(generator, dtype, unit):
    n, t, c = 13, 7, 37
    logits = torch.randn(n, t, c, generator=generator, dtype=dtype)
    targets = torch.randint(c, (n, t), generator=generator)
    targets[torch.rand(n, t, generator=generator) < 0.3] = -100
    targets[4] = -100
    got = stats_of(logits, targets, unit=unit)
    oracle = oracle_stats(logits, targets, STATS, unit)
    peer = naive_stats(logits.reshape(-1, c), targets.reshape(-1), -100, 0.0)
    kept = targets != -100
    for i, name in enumerate(STATS):
        values = peer[name]
        if unit == "sample":
            values = values.view(n, t)
            total = values.square().sum(1).sqrt() if name == "grad_norm" else values.sum(1)
            values = torch.where(kept.any(1), total / kept.sum(1), 0.0)
        assert_within_budget(got[i], oracle[i], values, f"{name} {unit}")
    permuted = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(stats_of(permuted, targets.t().contiguous().t(), unit=unit), got)


def test_the_first_of_several_bad_rows_is_named(generator):
    """Of ranges of rows that different threads have, whichever ends last."""
    logits, targets = draw(generator, 30_000, 10)
    targets[[77, 78, 14_000, 29_999]] = torch.tensor([10, 11, 12, 13])
    for _ in range(40):
        with pytest.raises(IndexError, match="target 10 of row 77 is"):
            stats_of(logits, targets)


@pytest.mark.parametrize("bad", [-1, 10, 2**40, -(2**40)])
@pytest.mark.parametrize("shape", [(50, 10), (9, 6, 10)])
def test_bad_target_is_refused_before_anything_changes(generator, bad, shape):
    logits = torch.randn(*shape, generator=generator)
    targets = torch.randint(10, shape[:-1], generator=generator)
    targets.view(-1)[[17, 19, 40]] = bad
    state = AdaSelectionState.create(METHODS)
    before = state.buffer.clone()
    message = rf"^target {bad} of row 17 is outside \[0, 10\) and not ignore_index=-100$"
    with pytest.raises(IndexError, match=message):
        cpu_select(logits, targets, 0.5, methods=METHODS, state=state)
    with pytest.raises(IndexError, match=message):
        torch.ops.adaselect.per_sample_stats(logits, targets, [0], "sample", -100, 0.0)
    assert torch.equal(state.buffer.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


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


def used_state(generator, m=M):
    weights = torch.randn(m, generator=generator).double().log_softmax(0)
    return torch.cat([weights, torch.rand(m, generator=generator).double() + 0.5, torch.tensor([9.0]).double()])


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


# the other operators: test_cpu_grad_norms.py, linear/
STORED = ["per_sample_stats", "batch_scores", "select_topk", "bank_select", "select_from_losses", "fused_select"]


def opcheck_inputs(generator, layout, with_state):
    logits = torch.randn(6, 5, 4, generator=generator)
    targets = torch.randint(4, (6, 5), generator=generator)
    losses, grad_norms = torch.rand(12, generator=generator), torch.rand(12, generator=generator)
    if layout == "permuted":
        logits = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        targets = targets.t().contiguous().t()
        losses, grad_norms = losses[::2], grad_norms[::2]
    state = used_state(generator) if with_state else None
    codes = list(range(len(METHODS)))
    options = list(PLAIN)
    return {
        "per_sample_stats": (logits, targets, ALL_STATS, "sample", -100, 0.1),
        "batch_scores": (losses, grad_norms, losses > 0.1, state, codes, 3, 5, options),
        "select_topk": (losses, 3, True, "score"),
        "bank_select": (logits[0], torch.tensor([3, 0, 4, 0])[::2], torch.rand(5, generator=generator), 1.5, 1, True),
        "select_from_losses": (losses, grad_norms, state, codes, 3, "index", 5, options),
        "fused_select": (logits, targets, state, codes, 2, "token", "index", -100, 0.0, 5, options),
    }


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("name", STORED)
def test_opcheck(generator, name, layout, with_state):
    arguments = opcheck_inputs(generator, layout, with_state)[name]
    torch.library.opcheck(getattr(torch.ops.adaselect, name).default, arguments)
    direct = getattr(kernels, name)(*opcheck_copy(arguments))
    registered = getattr(torch.ops.adaselect, name)(*opcheck_copy(arguments))
    for one, two in zip(*(x if isinstance(x, tuple) else (x,) for x in (direct, registered)), strict=True):
        assert torch.equal(one, two)


def opcheck_copy(arguments):
    """A fresh state for every call."""
    return [x.clone() if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x for x in arguments]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=250
    )


SET_NAMES = kernels.build_info()["instruction_sets"] if kernels is not None else []


BATCHES = [(129, 1, "float32"), (129, 4, "float64"), (129, 0, "bfloat16"), (9001, 4, "float32"), (2048, 1, "float64")]


# The set that runs in this process has all tests of this file.
@pytest.mark.parametrize("capability", [name for name in SET_NAMES if name != kernels.build_info()["cpu_capability"]])
def test_every_other_instruction_set(capability):
    """The tests of this file, on the shapes that exercise each kernel, with a lower instruction set."""
    if SET_NAMES.index(capability) < SET_NAMES.index(kernels.build_info()["cpu_capability"]):
        result = run_python("import adaselect_kernels._C", ADASELECT_CPU_CAPABILITY=capability)
        assert result.returncode != 0
        pytest.skip(f"this machine lacks {capability}; it was refused")
    shapes = [f"test_stats[{classes}-{dtype}]" for classes in (3, 17, 129, 4097) for dtype in DTYPES]
    shapes += [f"test_batch_scores[{n}-{i}-torch.{name}]" for n, i, name in BATCHES]
    shapes += [
        "test_chunks_far_from_each_other",
        "test_valid_rows_of_any_alignment",
        "test_baseline_selectors[adaboost-index]",
    ]
    shapes += [f"test_select_topk[4097-{kind}-{dtype}]" for kind in ("heavy ties", "special") for dtype in DTYPES]
    for layout in ("bracket of everything", "few values"):
        shapes += [
            f"test_select_topk_of_misleading_orders[4000-{layout}-torch.{real}]" for real in ("float32", "float64")
        ]
    shapes += [f"test_non_finite_rows[{classes}-torch.float32]" for classes in (4, 700)]
    shapes += ["test_noise_is_exact", "test_confident_rows_keep_their_digits", "test_strides_change_nothing"]
    names = [f"{__file__}::{shape}" for shape in shapes]
    linear = Path(__file__).parent / "linear" / "test_cpu_linear.py"
    names += [f"{linear}::test_{name}" for name in ("statistics", "softcap", "logits_that_are_not_finite")]
    names += [f"{linear}::test_uneven_shards_combine_to_the_statistics"]
    code = f"""
import sys, pytest
from adaselect_kernels.dispatch import EXTENSION
assert EXTENSION.build_info()["cpu_capability"] == {capability!r}
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *{names}]))
"""
    result = run_python(code, ADASELECT_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_unknown_instruction_set_is_refused():
    result = run_python("import torch, adaselect_kernels.ops, adaselect_kernels._C", ADASELECT_CPU_CAPABILITY="sse9")
    assert result.returncode != 0
    assert "ADASELECT_CPU_CAPABILITY=sse9 is not an instruction set of this machine and build; it has" in result.stderr


def test_direct_calls_are_checked():
    """The module's functions are called without functional.py's validation: a mistake must not read out of bounds."""
    logits, targets = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="targets must have the shape"):
        stats_of(logits, targets[:3])
    with pytest.raises(TypeError, match="logits must be float16"):
        stats_of(logits.int(), targets)
    with pytest.raises(TypeError, match="targets must be int64 or int32"):
        stats_of(logits, targets.float())
    with pytest.raises(ValueError, match="unknown statistic 8"):
        stats_of(logits, targets, [8])
    with pytest.raises(ValueError, match=r"k must be in \[1, N\]"):
        kernels.select_topk(torch.zeros(4), 5, True, "index")
    with pytest.raises(ValueError, match="order must be one of"):
        kernels.select_topk(torch.zeros(4), 1, True, "best")
    with pytest.raises(ValueError, match="methods must be distinct"):
        kernels.batch_scores(torch.zeros(4), None, None, None, [0, 0], 1, 0, PLAIN)
    with pytest.raises(ValueError, match="state must be"):
        kernels.batch_scores(torch.zeros(4), None, None, torch.zeros(3), [0], 1, 0, PLAIN)
    with pytest.raises(ValueError, match="needs grad_norms"):
        kernels.batch_scores(torch.zeros(4), None, None, None, [2], 1, 0, PLAIN)
