"""Row statistics of the compiled CPU kernels against the oracle: every dtype, layout and edge that their code treats apart."""

import math

import pytest
import torch

from adaselect_kernels import AdaSelectionState
from adaselect_kernels.options import METHODS, STATS
from tests.cpu_kernels import (
    ALL_STATS,
    DTYPES,
    cpu_select,
    draw,
    needs_kernels,
    stats_of,
)
from tests.oracle import (
    EPS32,
    assert_statistic,
    assert_within_budget,
    naive_stats,
    oracle_stats,
)

pytestmark = needs_kernels

# One class; fewer than a vector; whole vectors and one more or less, of every instruction set; the last narrow and the
# first wide shape; a partial last block; many blocks.
CLASSES = (1, 2, 3, 10, 16, 17, 63, 64, 65, 100, 128, 129, 1000, 4097, 33000)


def check_stats(logits, targets, label_smoothing=0.0):
    """Every statistic within twice PyTorch's own float32 error. Stored values are exact inputs of all three computations."""
    got = stats_of(logits, targets, label_smoothing=label_smoothing)
    assert got.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    oracle = oracle_stats(logits, targets, STATS, label_smoothing=label_smoothing)
    peer = naive_stats(logits, targets, -100, label_smoothing)
    for i, name in enumerate(STATS):
        assert_statistic(name, got[i], oracle[i], peer[name], f"of {tuple(logits.shape)} {logits.dtype}")
    return got


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
