"""Scoring from hidden states and the classifier in Triton's interpreter, element by element against the float64 oracle.

In a process of its own: TRITON_INTERPRET=1 python -m pytest <this file>. Tiles are small here, so that small shapes have
several blocks of rows, of classes and of features, and several shares of the classes.
"""

import itertools
import math
import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)

from adaselect_kernels import AdaSelectionOptions, kernels, reference
from adaselect_kernels.kernels import linear, runtime
from adaselect_kernels.linear import to_float8
from adaselect_kernels.options import METHODS, PARTIALS, STATS
from tests.linear.unfused import eager, widened
from tests.oracle import assert_statistic, assert_within_budget, check_choice, check_scores, drawn_targets

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter: inf - inf

ALL = tuple(range(len(STATS)))
SELECTION = (STATS.index("loss"), STATS.index("grad_norm"))
ROWS, CLASSES, FEATURES = (
    19,
    150,
    40,
)  # two blocks of rows, three of classes in two shares, three of features, none whole


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    small = {name: (linear.TileConfig(16, 64, 16, 2), warps) for name, (_, warps) in linear.TILES.items()}
    monkeypatch.setattr(linear, "TILES", small)
    monkeypatch.setattr(linear, "MOST_SPLITS", 2)
    runtime.forget()
    yield
    runtime.forget()


@pytest.fixture
def tensor_memory(monkeypatch):
    monkeypatch.setattr(linear, "has_tensor_memory", lambda device: True)


@pytest.fixture
def launches(monkeypatch):
    """The launches, in order."""
    log = []
    dispatched = runtime.Launch._dispatch

    def record(launch, tensors, options):
        log.append(launch)
        return dispatched(launch, tensors, options)

    monkeypatch.setattr(runtime.Launch, "_dispatch", record)
    return log


def names(launches):
    return [launch.kernel.fn.__name__.removesuffix("_kernel") for launch in launches]


def normal(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def check_rows(names, got, exact, peer, largest=0.0):
    """largest: of the logits. A margin is a difference of two of them, each with a rounding of its own at least."""
    least = torch.finfo(torch.float32).eps * largest
    for name, mine, right, theirs in zip(names, got, exact, peer, strict=True):
        if "margin" in name:
            theirs = torch.where((theirs - right).abs() < least, right + least, theirs)
        if got.dtype == torch.float64:  # the oracle itself, in another order
            torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12, equal_nan=True)
        else:
            assert_statistic(name, mine, right, theirs)


def check(hidden, weight, targets, bias=None, stats=ALL, smoothing=0.0, softcap=0.0, scale=1.0, unit="token"):
    before = hidden.clone(), weight.clone()
    table = kernels.linear_per_sample_stats(hidden, weight, targets, bias, stats, unit, -100, smoothing, softcap, scale)
    for tensor, copy in zip((hidden, weight), before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.5), copy.nan_to_num(7.5)), "an input was written"
    bad = (targets != -100) & ((targets < 0) | (targets >= weight.shape[0]))
    harmless = torch.where(bad, -100, targets)

    def call(hidden, weight):
        shifted = None if bias is None else bias.to(hidden.dtype)
        return reference.linear_per_sample_stats(
            hidden, weight, harmless, shifted, stats, unit, -100, smoothing, softcap, scale
        )

    exact = call(hidden.double(), weight.double())
    assert table.dtype == reference.compute_dtype(hidden.dtype)
    bad = bad.flatten() if unit == "token" else torch.zeros(table.shape[1], dtype=torch.bool)
    assert table[:, bad].isnan().all()
    peer = eager(call, hidden, weight, exact)
    logits = reference.linear_logits(
        hidden.double(), weight.double(), None if bias is None else bias.double(), softcap, scale
    )
    largest = logits[logits.isfinite()].abs().max().item() if logits.isfinite().any() else 0.0
    check_rows([STATS[i] for i in stats], table[:, ~bad], exact[:, ~bad], peer[:, ~bad], largest)
    return table


PATHS = [
    (torch.float32, False), (torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "through_descriptors"), PATHS, ids=str)
def test_every_statistic_of_every_path(generator, launches, request, dtype, through_descriptors):
    if through_descriptors:
        request.getfixturevalue("tensor_memory")
    hidden, weight, bias = (
        normal(generator, *shape, dtype=dtype) for shape in ((ROWS, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    )
    targets = drawn_targets((hidden @ weight.t()).float(), generator)
    targets[1], targets[2], targets[3] = -100, CLASSES, -1
    targets[5], targets[6] = 0, CLASSES - 1  # nothing is before the first class; the last is in the unfinished block
    check(hidden, weight, targets, bias, smoothing=0.1, softcap=5.0, scale=0.7)
    assert names(launches) == ["product", "merge"]
    product, merge = (launch.constants for launch in launches)
    assert (product["TMA"], product["EVEN"], merge["SETS"]) == (through_descriptors, False, 2)
    assert launches[0].grid[0] == 4  # two blocks of rows, two shares: as many tasks, and as many multiprocessors
    assert launches[0].direct != through_descriptors


def test_one_program_runs_through_several_tasks(generator, tensor_memory, monkeypatch, launches):
    """A persistent grid smaller than the tasks; a band of rows that ends early; the same bits as with a program a task."""
    monkeypatch.setattr(linear, "BAND", 2)
    # three blocks of rows: a whole band and a part of one
    hidden, weight = normal(generator, 40, 16, dtype=torch.bfloat16), normal(generator, 150, 16, dtype=torch.bfloat16)
    targets = torch.randint(150, (40,), generator=generator)
    tables = []
    for multiprocessors in (1, 4, 100):
        monkeypatch.setattr(linear, "multiprocessors", lambda device, count=multiprocessors: count)
        tables.append(check(hidden, weight, targets, stats=SELECTION))
    assert [launch.grid[0] for launch in launches[::2]] == [1, 4, 6]
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("name", STATS)
def test_only_what_a_statistic_needs(generator, launches, name):
    # one block of rows, one of features, a class more than two blocks: each statistic alone
    hidden, weight = normal(generator, 16, 16), normal(generator, 129, 16)
    targets = drawn_targets(hidden @ weight.t(), generator)
    targets[0] = 128
    check(hidden, weight, targets, stats=(STATS.index(name),))
    extra = {"grad_norm": 1, "entropy": 1, "margin": 1, "top2_margin": 2, "correct": 2}
    assert launches[0].constants["USED"] == 3 + extra.get(name, 0)  # max, sum and target, and what it needs
    assert launches[0].constants["EVEN"]


def test_one_class(generator):
    check(normal(generator, 3, 16), normal(generator, 1, 16), torch.tensor([0, -100, 0]), smoothing=0.1)


@pytest.mark.parametrize(
    "layout", ["transposed", "weight transposed", "sliced", "off the boundary", "vocabulary strided"]
)
def test_layouts(generator, tensor_memory, launches, layout):
    """Descriptors serve rows whose elements are next to each other, at multiples of 16 bytes; pointers all others."""
    dtype = torch.bfloat16
    hidden, weight = normal(generator, 3, 6, 24, dtype=dtype), normal(generator, 100, 24, dtype=dtype)
    bias = normal(generator, 200, dtype=dtype)[::2]
    targets = torch.randint(100, (3, 6), generator=generator)
    if layout == "transposed":
        hidden = hidden.flatten(0, 1).t().contiguous().t()
        targets = targets.flatten()
    elif layout == "weight transposed":
        weight = weight.t().contiguous().t()
    elif layout == "sliced":  # the last position of every sequence left out: rows without a common stride are copied
        hidden, targets = hidden[:, :-1], targets[:, 1:]
    elif layout == "off the boundary":
        flat = torch.full((weight.numel() + 1,), math.nan, dtype=dtype)
        flat[1:] = weight.flatten()
        weight = flat[1:].view_as(weight)
    else:
        weight = torch.stack([weight, torch.full_like(weight, math.nan)], 1).flatten(0, 1)[::2]
    check(hidden, weight, targets, bias, stats=SELECTION)
    assert launches[0].constants["TMA"] == (layout in ("sliced", "vocabulary strided"))


def test_rows_that_are_all_ignored_take_no_products(generator, monkeypatch):
    products = []
    dot = linear.dot
    monkeypatch.setattr(linear, "dot", lambda *arguments: products.append(None) or dot(*arguments))
    hidden, weight = torch.full((33, 16), math.nan), normal(generator, 60, 16)
    targets = torch.full((33,), -100)
    assert not check(hidden, weight, targets, stats=SELECTION).any()
    assert not products
    hidden[20], targets[20] = 1.0, 3  # in the second block of rows
    check(hidden, weight, targets, stats=SELECTION)
    assert len(products) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_logits(generator, value):
    # a class's bias is not finite: the target of row 0, not of the others; row 1 has NaN of its own; in the second block
    hidden, weight, bias = normal(generator, 24, 16), normal(generator, 70, 16), torch.zeros(70)
    bias[67] = value
    hidden[1, 3] = math.nan
    targets = torch.randint(67, (24,), generator=generator)
    targets[0], targets[3] = 67, 69
    check(hidden, weight, targets, bias, smoothing=0.1)


def test_nothing_but_minus_infinity():
    bias = torch.full((70,), -math.inf)
    check(torch.ones(3, 16), torch.ones(70, 16), torch.tensor([0, 5, 69]), bias)
    bias[5] = 1.0
    check(torch.ones(3, 16), torch.ones(70, 16), torch.tensor([0, 5, 69]), bias)


def test_offsets_of_ten_thousand(generator):
    hidden, weight = normal(generator, 17, 33, dtype=torch.bfloat16), normal(generator, 70, 33, dtype=torch.bfloat16)
    targets = torch.randint(70, (17,), generator=generator)
    check(hidden, weight, targets, torch.full((70,), 1e4, dtype=torch.bfloat16), smoothing=0.1)


def test_ties_go_to_the_lower_class():
    # the same logit in all classes: right only where the target is the first; equal in different blocks and shares
    hidden, weight = torch.ones(4, 16), torch.full((CLASSES, 16), 0.25)
    table = check(
        hidden, weight, torch.tensor([0, 1, 64, 149]), stats=(STATS.index("correct"), STATS.index("top2_margin"))
    )
    assert table[0].tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("softcap", "sizes"), [(0.1, (0.05, 1e4)), (30.0, (1.0, 2.0))])
def test_softcap_small_and_large(generator, softcap, sizes):
    """Rows where tanh bends and rows where it is flat (with few between, that PyTorch may be lucky in); nearly straight ones."""
    hidden, weight = normal(generator, 60, 16) * torch.tensor(sizes).repeat(30)[:, None], normal(generator, 20, 16)
    targets = torch.randint(20, (60,), generator=generator)
    for dtype in (torch.float32, torch.float64):
        check(hidden.to(dtype), weight.to(dtype), targets, softcap=softcap, scale=-0.5)


# --- partials ---------------------------------------------------------------------------------------------------------

# of 150 classes: two unequal shards, the second of one class; every other class and the rest of them
SETS = [((0, 1, 0, 149), (149, 1, 149, 150)), ((0, 2, 0, 75), (1, 2, 75, 150))]


@pytest.mark.parametrize("sets", SETS, ids=["shards", "interleaved"])
def test_partials_of_disjoint_sets_of_classes(generator, launches, sets):
    # rows enough that eager PyTorch is not lucky in all of them, also of those whose target is the one class of a shard
    hidden, classifier, all_bias = normal(generator, 48, 20), normal(generator, 150, 20), normal(generator, 150)
    targets = drawn_targets(hidden @ classifier.t(), generator)
    targets[:4], targets[4::3] = torch.tensor([77, -100, 0, 148]), 149
    rest = ALL, -100, 0.1, 8.0, 1.5
    kept = targets != -100
    mine, exact, peers = [], [], []
    for first, step, begin, end in sets:
        weight, bias = classifier[begin:end], all_bias[begin:end]
        mine.append(kernels.linear_partials(hidden, weight, targets, bias, None, None, first, step, *rest))

        def call(hidden, weight, first=first, step=step, bias=bias):
            return reference.linear_partials(
                hidden, weight, targets, bias.to(hidden.dtype), None, None, first, step, *rest
            )

        exact.append(call(hidden.double(), weight.double()))
        peers.append(eager(call, hidden, weight, exact[-1]))
        check_rows(PARTIALS, mine[-1][:, kept], exact[-1][:, kept], peers[-1][:, kept])
    table, right, peer = (
        operators.combine_partials(torch.stack(partials), targets, 150, ALL, -100, 0.1)
        for operators, partials in ((kernels, mine), (reference, exact), (reference, peers))
    )
    assert names(launches) == ["product", "merge"] * 2 + ["merge"]
    assert not table[:, 1].any()
    check_rows(STATS, table, right, peer, 8.0)  # the softcap


def test_partials_that_others_made(generator):
    """Five sets, one without a class but the target; NaN marked in a set of its own; targets out of range."""
    logits = normal(generator, 38, 41)
    logits[3, 7] = math.nan
    targets = torch.randint(41, (38,), generator=generator)
    targets[:6] = torch.tensor([40, 0, 13, 20, -100, 41])
    rest = ALL, -100, 0.1, 0.0, 1.0
    sets = []
    for begin, end in itertools.pairwise([0, 7, 8, 30, 40, 41]):
        seen, identity = logits[:, begin:end].double(), torch.eye(end - begin, dtype=torch.float64)
        sets.append(reference.linear_partials(seen, identity, targets, None, None, None, begin, 1, *rest))
    exact = torch.stack(sets)
    got, right, peer = (
        operators.combine_partials(partials, targets, 41, ALL, -100, 0.1)
        for operators, partials in ((kernels, exact.float()), (reference, exact), (reference, exact.float()))
    )
    check_rows(STATS, got, right, peer, 4.0)
    assert got[:, 5].isnan().all()


@pytest.mark.parametrize("through_descriptors", [False, True])
def test_float8_with_a_scale_a_row(generator, launches, request, through_descriptors):
    if through_descriptors:
        request.getfixturevalue("tensor_memory")
    # rows of very different size, so that a scale in the wrong place is seen
    hidden = normal(generator, 21, 48) * torch.logspace(-2, 1, 21)[:, None]
    weight = normal(generator, 70, 48) * torch.logspace(-1, 1, 70)[:, None]
    (rows, row_scale), (columns, column_scale) = to_float8(hidden), to_float8(weight)
    targets, bias, stats = torch.randint(70, (21,), generator=generator), normal(generator, 70), SELECTION
    targets[0], targets[4] = 69, -100
    rest = targets, bias, row_scale, column_scale, 0, 1, stats, -100, 0.0, 0.0, 1.0
    got = kernels.combine_partials(kernels.linear_partials(rows, columns, *rest)[None], targets, 70, stats, -100, 0.0)
    assert (launches[0].constants["TMA"], launches[0].constants["BLOCK_K"]) == (through_descriptors, 32)

    def call(hidden, weight):
        shifted = bias.to(hidden.dtype)
        return reference.linear_per_sample_stats(hidden, weight, targets, shifted, stats, "sample", -100, 0.0, 0.0, 1.0)

    hidden, weight = rows.double() * row_scale.double()[:, None], columns.double() * column_scale.double()[:, None]
    exact = call(hidden, weight)
    check_rows([STATS[i] for i in stats], got, exact, eager(call, hidden.float(), weight.float(), exact))


def test_float8_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    with pytest.raises(RuntimeError, match=r"float8_e4m3fn need .* 8\.9 or later; A card has 8\.6"):
        linear._require_float8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    linear._require_float8(torch.device("cuda"))


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "unit", "dtype"),
    [((23,), "sample", torch.float64), ((9, 4), "token", torch.bfloat16), ((19, 4), "sample", torch.float32)],
)
def test_fused_linear_select(generator, launches, shape, unit, dtype):
    hidden, weight, bias = (normal(generator, *s, dtype=dtype) for s in ((*shape, 16), (70, 16), (70,)))
    targets = torch.randint(70, shape, generator=generator)
    targets[1] = -100  # a row, or all positions of a sample
    methods = [METHODS.index(name) for name in ("big_loss", "grad_norm", "uniform")]
    n = targets.numel() if unit == "token" else shape[0]
    k, options = max(1, n // 3), AdaSelectionOptions().packed
    rest = None, methods, k, unit, "index", -100, 0.1, 9.0, 0.5, 7, options
    indices, scores, losses, n_valid = kernels.fused_linear_select(hidden, weight, targets, bias, *rest)
    exact, peer = (
        reference.fused_linear_select(h, w, targets, b, *rest)
        for h, w, b in (
            (hidden.double(), weight.double(), bias.double()),
            (widened(hidden), widened(weight), widened(bias)),
        )
    )
    expected = ["product", "merge", "mean"] if unit == "sample" and len(shape) > 1 else ["product", "merge"]
    assert names(launches)[: len(expected)] == expected
    assert losses.dtype == scores.dtype == torch.float32
    assert int(n_valid) == int(exact[3])
    assert_within_budget(losses, exact[2], peer[2], "losses")
    allowed = check_scores(scores, exact[1], peer[1], exact[2])
    check_choice(indices, scores, exact[1], k, "index", allowed)


def test_two_launches_before_the_batch_stage(generator, launches):
    hidden, weight = normal(generator, 5, 16), normal(generator, 9, 16)
    rest = None, [0], 2, "sample", "index", -100, 0.0, 0.0, 1.0, 0, AdaSelectionOptions().packed
    kernels.fused_linear_select(hidden, weight, torch.arange(5), None, *rest)
    assert names(launches)[:2] == ["product", "merge"]
    assert len(launches) == 3
    assert launches[0].constants["USED"] == 3  # big_loss alone: no squares


def test_means_over_positions(generator):
    hidden, weight = normal(generator, 15, 7, 16), normal(generator, 20, 16)
    targets = torch.randint(20, (15, 7), generator=generator)
    targets[0, 2:] = targets[1] = -100
    check(hidden, weight, targets, stats=SELECTION, unit="sample")


# --- what the launchers decide ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_float32_products_are_exact_unless_the_user_allows_tf32(generator, launches, setting):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        for dtype in (torch.float32, torch.bfloat16):
            hidden, weight = normal(generator, 2, 16, dtype=dtype), normal(generator, 5, 16, dtype=dtype)
            kernels.linear_per_sample_stats(
                hidden, weight, torch.zeros(2).long(), None, (0,), "sample", -100, 0.0, 0.0, 1.0
            )
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert [launch.constants["PRECISION"] for launch in launches[::2]] == [setting, "ieee"]


def test_tensor_memory_where_the_machine_has_it(monkeypatch):
    has = linear.has_tensor_memory.__wrapped__
    device = torch.device("cuda", 0)
    for major, shared, expected in ((8, 163, False), (9, 227, True), (10, 227, True), (12, 99, False)):
        found = SimpleNamespace(major=major, shared_memory_per_block_optin=shared * 1024)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        assert has(device) == expected
    assert not has(torch.device("cpu"))


def test_the_tile_follows_from_type_and_statistics():
    light, heavy = (1 << STATS.index("loss")) | (1 << STATS.index("grad_norm")), 1 << STATS.index("entropy")
    smoothed = linear.stats_code(SELECTION, 0.1)[1]
    found = [
        linear.tile(dtype, want, precision, tensor_memory, large)[0]
        for dtype, want, precision, tensor_memory, large in (
            (torch.bfloat16, light, "ieee", True, True),
            (torch.float8_e4m3fn, light, "ieee", True, True),
            (torch.float16, heavy, "ieee", True, True),
            (torch.bfloat16, smoothed, "ieee", True, True),
            (torch.bfloat16, light, "ieee", False, True),
            (torch.bfloat16, light, "ieee", False, False),
            (torch.float32, light, "ieee", False, True),
            (torch.float32, light, "tf32", False, True),
            (torch.float64, light, "ieee", False, True),
        )
    ]
    assert found == ["wide", "wide", "square", "square", "square", "small", "exact", "tf32", "double"]


def test_shares_cover_the_classes_and_keep_a_machine_busy(monkeypatch):
    monkeypatch.setattr(linear, "MOST_SPLITS", 128)
    config = linear.TileConfig(128, 256, 64, 4)
    for n, classes in ((1, 128_256), (8192, 128_256), (8192, 32_000), (8192, 300), (2**20, 128_256), (5, 7)):
        share, splits = linear.shares(n, classes, config)
        blocks = -(-classes // 256)
        assert 1 <= splits <= 128
        assert (splits - 1) * share < blocks <= splits * share
        tasks = -(-n // 128) * splits
        # rounds of 132 programs: the last one wastes under 2 %, or the shares are single blocks, or as many as may be
        assert -(-tasks // 132) / (tasks / 132) < 1.02 or share == 1 or splits > 60
