"""The Triton kernels in Triton's interpreter, element by element against the float64 oracle; every path, and which one ran.

Triton decides when it is imported whether kernels are interpreted, for the whole process, so this file runs in one of its
own: TRITON_INTERPRET=1 python -m pytest tests/test_triton_kernels.py. Shapes are small: the interpreter is slow.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime import interpreter

from adaselect_kernels import AdaSelectionOptions, AdaSelectionState, fused_select, reference
from adaselect_kernels.functional import baseline_select, per_sample_stats, select_from_losses, select_topk
from adaselect_kernels.kernels import batch_large, batch_stage, batch_terms, maths, row_stats, runtime, select
from adaselect_kernels.options import METHODS, STATS
from tests.oracle import (
    assert_statistic,
    check_fused_select,
    drawn_targets,
    naive_stats,
    oracle_stats,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter: overflow, all-NaN

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def triton_select(*args, **kwargs):
    return fused_select(*args, impl="triton", **kwargs)


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Tests change what launches are made of."""
    runtime.forget()
    yield
    runtime.forget()


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched, in order, with their grids and constants."""
    log = []
    dispatched = runtime.Launch._dispatch

    def record(launch, tensors, options):
        log.append((launch.kernel.fn.__name__.removesuffix("_kernel"), launch.grid, launch.constants))
        return dispatched(launch, tensors, options)

    monkeypatch.setattr(runtime.Launch, "_dispatch", record)
    return log


def names(launches):
    return [name for name, _, _ in launches]


def assert_counters_are_zero():
    assert not runtime.counters(torch.device("cpu"), runtime.COUNTERS).any(), "a counter was left behind"


def batch(generator, *shape, dtype=torch.float32, scale=3.0, offset=0.0):
    logits = (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + offset).to(dtype)
    return logits, drawn_targets(logits, generator)


def check_stats(logits, targets, stats=STATS, ignore_index=-100, label_smoothing=0.0):
    got = per_sample_stats(
        logits, targets, stats=stats, ignore_index=ignore_index, label_smoothing=label_smoothing, impl="triton"
    )
    oracle = oracle_stats(logits, targets, stats, "sample", ignore_index, label_smoothing)
    peer = naive_stats(logits, targets, ignore_index, label_smoothing)
    for i, stat in enumerate(stats):
        assert_statistic(stat, getattr(got, stat), oracle[i], peer[stat])


# --- row statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "classes", "kernel"),
    [
        (5, 1, "tile"),  # one class: margins are infinite
        (131, 10, "tile"),  # CIFAR: more rows than one program, vectors narrower than 16 bytes
        (37, 100, "tile"),  # several threads a row
        (23, 512, "tile"),  # many threads a row
        (23, 1000, "tile"),  # ImageNet: a warp a row
        (23, 2048, "tile"),  # the largest tile
        (23, 301, "stream"),  # odd and beyond the unaligned tile: a warp a row, head and tail
        (23, 5003, "stream"),  # several blocks, every row aligned differently
        (16, 17000, "stream"),  # the widest block, not split: many rows
    ],
)
def test_row_stats(generator, launches, monkeypatch, dtype, n, classes, kernel):
    monkeypatch.setitem(row_stats.SPLITS, 2**31, row_stats.SPLITS[2**31]._replace(programs=16))
    check_stats(*batch(generator, n, classes, dtype=dtype), label_smoothing=0.1)
    if dtype == torch.float64 and classes == 301:
        kernel = "tile"  # one float64 is wide enough a load
    assert names(launches) == [kernel]
    assert launches[0][2].get("MAX_SPLITS", 1) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_long_rows_are_split(generator, launches, dtype):
    check_stats(*batch(generator, 4, 40003, dtype=dtype))
    (name, grid, constants), *_ = launches
    assert name == "stream"
    assert grid[0] > 4
    assert constants["MAX_SPLITS"] == row_stats.SPLITS[2**31].most
    assert_counters_are_zero()


@pytest.mark.parametrize("stat", STATS)
@pytest.mark.parametrize("classes", [20, 2500])
def test_each_statistic_alone(generator, stat, classes):
    check_stats(*batch(generator, 24, classes), stats=(stat,))


@pytest.mark.parametrize("classes", [24, 2500])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "broadcast", "offset"])
def test_strides(generator, classes, layout):
    logits, targets = batch(generator, 16, classes)
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    elif layout == "sliced":
        wide = torch.full((32, classes + 5), math.nan)
        wide[::2, 2:-3] = logits
        logits = wide[::2, 2:-3]
    elif layout == "broadcast":
        logits = logits[:1].expand(16, classes)
    else:  # a base that is not 16-byte aligned
        flat = torch.full((16 * classes + 1,), math.nan)
        flat[1:] = logits.flatten()
        logits = flat[1:].view(16, classes)
    check_stats(logits, targets.to(torch.int32))
    check_stats(logits, torch.stack([targets, targets + 1], 1)[:, 0])


@pytest.mark.parametrize("classes", [10, 2500])
def test_large_offsets_keep_their_digits(generator, classes):
    check_stats(*batch(generator, 24, classes, offset=1e4))


@pytest.mark.parametrize("classes", [10, 2500])
def test_confident_rows_keep_a_tiny_loss(generator, classes):
    logits, targets = batch(generator, 6, classes, scale=1.0)
    logits[torch.arange(6), targets] = torch.tensor([20.0, 30.0, 50.0, 80.0, 85.0, 5.0])
    got = per_sample_stats(logits, targets, stats=("loss", "grad_norm"), impl="triton")
    oracle = oracle_stats(logits, targets, ("loss", "grad_norm"))
    for value, right in zip((got.loss, got.grad_norm), oracle, strict=True):
        assert value.gt(0).all()
        # the exponent's rounding, relative: |z - m| eps
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=0)


def test_a_confident_sequence_keeps_its_gradient_norm():
    logits = torch.zeros(2, 3, 5)
    logits[:, :, 1] = torch.tensor([[50.0, 52.0, 60.0], [70.0, 71.0, 90.0]])
    targets = torch.tensor([[1, 1, -100], [1, 1, -100]])
    got = per_sample_stats(logits, targets, impl="triton").grad_norm
    norms = math.sqrt(20) * (-logits[:, :2, 1].double()).exp()
    torch.testing.assert_close(got.double(), norms.square().sum(1).sqrt() / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [7, 300, 2500])
def test_non_finite_logits(generator, classes):
    logits, targets = batch(generator, 10, classes)
    other = (targets + 1) % classes
    logits[0, other[0]] = math.nan
    logits[1, targets[1]] = math.nan
    logits[2, other[2]] = math.inf
    logits[3, targets[3]] = math.inf
    logits[4, other[4]] = -math.inf
    logits[5, targets[5]] = -math.inf
    logits[6] = -math.inf
    logits[7, :] = math.nan
    logits[9, 1:] = -math.inf
    got = per_sample_stats(logits, targets, stats=STATS, impl="triton")
    oracle = oracle_stats(logits, targets, STATS)
    for i, stat in enumerate(STATS):
        torch.testing.assert_close(
            getattr(got, stat).double(), oracle[i], rtol=2e-5, atol=1e-6, equal_nan=True, msg=stat
        )


@pytest.mark.parametrize("classes", [7, 2500])
def test_masked_vocabulary(generator, classes):
    """Most logits -inf, whole blocks of them: they weigh nothing."""
    logits, targets = batch(generator, 24, classes)
    logits[:, 5:] = -math.inf
    check_stats(logits, targets % 5)


def test_ties_of_the_largest_logit():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]] * 4)
    got = per_sample_stats(
        logits, torch.tensor([0, 1, 2, 3]), stats=("correct", "top2_margin", "margin"), impl="triton"
    )
    assert got.correct.tolist() == [0, 1, 0, 0]
    assert got.top2_margin.tolist() == [0, 0, 0, 0]
    assert got.margin.tolist() == [-2, 0, 0, -3]


@pytest.mark.parametrize("classes", [10, 2500])
def test_bad_targets_read_nothing(generator, classes):
    """As on a GPU: the row is invalid, its statistics NaN; ignored rows are 0 whatever their logits."""
    logits, _ = batch(generator, 5, classes)
    logits[1] = math.nan
    targets = torch.tensor([3, -100, classes, -1, 2**40])
    out = row_stats.per_sample_stats(logits, targets, range(len(STATS)), "sample", -100, 0.1)
    assert out[:, 2:].isnan().all()
    assert out[:, 1].eq(0).all()
    assert out[:, 0].isfinite().all()


@pytest.mark.parametrize("unit", ["sample", "token"])
@pytest.mark.parametrize("permuted", [False, True])
def test_positions(generator, launches, unit, permuted):
    logits, targets = batch(generator, 5, 9, 12)
    targets[targets == 3] = -100
    targets[2] = -100  # a sample without positions
    if permuted:
        logits, targets = logits.transpose(0, 1).contiguous().transpose(0, 1), targets.t().contiguous().t()
    got = per_sample_stats(logits, targets, stats=STATS, unit=unit, label_smoothing=0.1, impl="triton")
    oracle = oracle_stats(logits, targets, STATS, unit, label_smoothing=0.1)
    codes = range(len(STATS))
    peer = reference.per_sample_stats(logits, targets, codes, unit, -100, 0.1)
    for i, stat in enumerate(STATS):
        assert_statistic(stat, getattr(got, stat), oracle[i], peer[i])
    assert names(launches) == (["tile", "mean"] if unit == "sample" else ["tile"])


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, ["block"]),
        (128, ["block"]),  # every pair compared
        (129, ["block"]),  # the first searched size
        (1000, ["block"]),
        (4096, ["block"]),  # the largest in one program
        (4097, ["radix"]),  # the smallest radix select
    ],
)
def test_select_topk(generator, launches, dtype, n, expected):
    scores = torch.randn(2 * n, generator=generator, dtype=torch.float64).to(dtype)[::2]
    if n > 100:
        scores[3], scores[5], scores[6] = math.nan, math.inf, -math.inf
        scores[1], scores[2] = 0.0, -0.0
        scores[n // 2 : n // 2 + 20] = scores[0]  # ties across the threshold for some k
    # several programs are slow here: of the other types, which only their keys know, one k
    for k in {1, max(1, n // 5), n} if n <= 4096 or dtype == torch.float32 else {n // 5}:
        for largest in (True, False):
            for order in ("index", "score") if k < 1000 else ("index",):
                launches.clear()
                got = select_topk(scores, k, largest=largest, order=order, impl="triton")
                assert torch.equal(got, reference.select_topk(scores, k, largest, order)), (k, largest, order)
                ranked = order == "index" or k == 1 or n <= select.ALL_ROWS_RANKED.value
                assert names(launches) == expected + ([] if ranked else ["rank"])


def test_select_topk_orders_many_by_a_radix_sort(launches, monkeypatch, generator):
    monkeypatch.setattr(select, "RANK_MAX", 100)
    for dtype in (torch.float32, torch.float64):
        launches.clear()
        scores = torch.randn(600, generator=generator, dtype=dtype)
        scores[100:200], scores[7] = scores[0], math.nan
        got = select_topk(scores, 600, order="score", impl="triton")
        assert torch.equal(got, reference.select_topk(scores, 600, True, "score"))
        assert names(launches) == ["block", "gather_keys"]


@pytest.mark.parametrize("n", [200, 5000])
def test_equal_scores_go_to_the_lower_row(n):
    assert torch.equal(select_topk(torch.ones(n), n // 3, order="index", impl="triton"), torch.arange(n // 3))
    every = torch.full((n,), math.nan)
    assert torch.equal(select_topk(every, n // 3, order="score", impl="triton"), torch.arange(n // 3))


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 77, -(2**63)])
def test_noise_is_the_one_every_backend_draws(seed):
    state = AdaSelectionState.create(("uniform",), seed=seed)
    state.step.fill_(2**33 + 5)
    buffer = state.buffer.clone()
    scores, _ = batch_stage.batch_scores(
        torch.ones(50), None, None, buffer, [METHODS.index("uniform")], 5, seed, batch_terms.NO_OPTIONS
    )
    uniform = reference.philox_uniform(50, torch.tensor(2**33 + 5), seed)
    torch.testing.assert_close(scores.double(), -uniform.log(), rtol=3e-7, atol=0)
    assert buffer[2] == 2**33 + 6


# --- batch stage and fused selection ----------------------------------------------------------------------------------

OPTIONS = {
    "paper": AdaSelectionOptions(),
    "standardized": AdaSelectionOptions(standardize=True, temperature=0.5),
    "log_ratio": AdaSelectionOptions(update="log_ratio", beta=-0.3, weight_floor=0.2),
    "fading": AdaSelectionOptions(curriculum_power=-0.5, curriculum_scale="rms"),
    "printed": AdaSelectionOptions(curriculum_power=1.0),
    "selected": AdaSelectionOptions(method_loss="selected"),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [60, 4500])
def test_fused_select(generator, launches, options, n):
    """Both sizes of the batch stage, every method; three steps of one state for the small one.

    The losses of the methods' own rows are a selection a method: of a large batch, for three.
    """
    methods = METHODS[4:] if options == "selected" and n > 1000 else METHODS
    state = AdaSelectionState.create(methods, seed=2**35 + 1)
    for _ in range(3 if n < 1000 else 1):
        launches.clear()
        logits, targets = batch(generator, n, 10)
        targets[::7] = -100
        logits[1] = math.nan
        check_fused_select(triton_select, logits, targets, 0.3, methods=methods, state=state, options=OPTIONS[options])
        path = names(launches)
        if options == "selected":
            assert path.count("chosen_loss") == len(methods)
        elif n == 60:
            assert path == ["fused"]
        else:
            assert path == ["tile", "large"]


@pytest.mark.parametrize(
    ("dtype", "order"),
    [*((dtype, "index") for dtype in DTYPES), (torch.float32, "score")],  # the order is of scores alone
)
@pytest.mark.parametrize(
    ("n", "classes", "path"),
    [
        (1, 1, ["fused"]),
        (128, 10, ["fused"]),  # the paper's setting: one program
        (130, 100, ["fused"]),  # several programs, the last one searches
        (20, 2100, ["stream", "batch"]),  # long rows: the row kernel, then one program
    ],
)
def test_one_launch(generator, launches, dtype, order, n, classes, path):
    check_fused_select(triton_select, *batch(generator, n, classes, dtype=dtype), 0.25, order=order)
    ranked = order == "index" or n <= select.ALL_ROWS_RANKED.value
    assert names(launches) == path + ([] if ranked else ["rank"])
    if (n, classes) == (130, 100):
        assert launches[0][1][0] > 1
    assert_counters_are_zero()


@pytest.mark.parametrize("unit", ["sample", "token"])
@pytest.mark.parametrize("methods", [("big_loss",), ("grad_norm", "uniform", "coreset1")])
def test_positions_are_selected(generator, launches, unit, methods):
    logits, targets = batch(generator, 9, 8, 11)
    targets[targets > 8] = -100
    targets[4] = -100
    logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    check_fused_select(triton_select, logits, targets, 0.4, methods=methods, unit=unit, label_smoothing=0.2)
    assert names(launches) == (["fused"] if unit == "token" else ["tile", "mean", "batch"])


@pytest.mark.parametrize("gamma", [1e-6, 0.5, 1.0])
def test_fewer_valid_rows_than_asked_for(generator, gamma):
    logits, targets = batch(generator, 40, 5)
    targets[3:] = -100
    check_fused_select(triton_select, logits, targets, gamma, order="score")
    state = AdaSelectionState.create(("big_loss", "small_loss", "uniform"))
    targets[:] = -100
    check_fused_select(triton_select, logits, targets, gamma, state=state)


@pytest.mark.parametrize(
    ("method", "n"), [(method, 60) for method in METHODS] + [("coreset1", 4300), ("coreset2", 4300), ("uniform", 4300)]
)
def test_baselines(generator, launches, method, n):
    logits, targets = batch(generator, n, 8)
    targets[::9] = -100
    state = AdaSelectionState.create((method,), seed=3)
    twin = AdaSelectionState.create((method,), seed=3)
    for order in ("index", "score") if n == 60 else ("index",):
        got = baseline_select(logits, targets, 0.3, method, state=state, order=order, impl="triton")
        right = baseline_select(logits, targets, 0.3, method, state=twin, order=order, impl="reference")
        torch.testing.assert_close(got.scores, right.scores, rtol=2e-5, atol=2e-6)
        # the reference computes in float32 too: rows whose keys differ by a rounding may change places
        same = set(got.indices.tolist()) & set(right.indices.tolist())
        assert len(same) >= len(right.indices) - 2
        assert len(got.indices.unique()) == len(right.indices)
        assert torch.equal(state.buffer.nan_to_num(), twin.buffer.nan_to_num())
    if n == 60 and method != "coreset1":
        assert set(names(launches)) == {"fused"}


@pytest.mark.parametrize(
    ("n", "dtype"),
    [*((50, dtype) for dtype in DTYPES), (4200, torch.float32), (4200, torch.float64)],  # as they compute
)
def test_select_from_losses(generator, launches, n, dtype):
    losses = (torch.rand(2 * n, generator=generator, dtype=torch.float64) * 4).to(dtype)[::2]
    grads = (torch.rand(2 * n, generator=generator, dtype=torch.float64) * 4).to(dtype)[::2]
    losses[3], grads[7] = math.nan, math.inf
    for methods in (METHODS, ("big_loss", "coreset2")):
        got = select_from_losses(losses, 0.2, grad_norms=grads, methods=methods, impl="triton")
        oracle = select_from_losses(losses.double(), 0.2, grad_norms=grads.double(), methods=methods, impl="reference")
        assert torch.equal(got.scores.isfinite(), oracle.scores.isfinite())
        torch.testing.assert_close(got.scores, oracle.scores, rtol=4e-6, atol=1e-9)
        assert int(got.n_valid) == int(oracle.n_valid)
        assert len(set(got.indices.tolist()) & set(oracle.indices.tolist())) >= len(oracle.indices) - 1
    assert names(launches)[0] == ("batch" if n == 50 else "large")


@pytest.mark.parametrize(
    "options",
    [
        AdaSelectionOptions(beta=0.5),
        AdaSelectionOptions(update="log_ratio", weight_floor=0.5, standardize=True, curriculum_power=-1.0),
    ],
)
def test_state_over_60_steps(generator, options):
    """Losses that shrink as training would make them; the state stays with the oracle's to float32 roundings."""
    methods = ("big_loss", "small_loss", "adaboost", "uniform")
    state = AdaSelectionState.create(methods, seed=11)
    twin = AdaSelectionState.create(methods, seed=11)
    for step in range(60):
        losses = torch.rand(24, generator=generator) * (2.0 / (1 + 0.06 * step))
        select_from_losses(losses, 0.25, methods=methods, state=state, options=options, impl="triton")
        select_from_losses(losses.double(), 0.25, methods=methods, state=twin, options=options, impl="reference")
    assert state.step == twin.step == 61
    torch.testing.assert_close(state.buffer, twin.buffer, rtol=2e-5, atol=2e-5)


def test_a_call_without_state_leaves_no_trace_and_repeats(generator):
    logits, targets = batch(generator, 150, 20)
    first = triton_select(logits, targets, 0.3, methods=METHODS)
    for _ in range(2):
        again = triton_select(logits, targets, 0.3, methods=METHODS)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("n", [60, 4200])
def test_equal_losses_tie_exactly(n):
    """The same losses shifted by a permutation give the same scores, and ties go to the lower row."""
    losses = torch.tensor([0.25, 1.5, 0.75]).repeat(n // 3)
    got = select_from_losses(losses, 1 / 3, methods=("big_loss", "coreset2"), impl="triton")
    for value in (0.25, 1.5, 0.75):
        assert len(got.scores[losses == value].unique()) == 1
    assert torch.equal(got.indices, select_topk(got.scores, n // 3, order="index", impl="reference"))


def start_in_any_order(monkeypatch, generator):
    """Programs of a grid start in a random order of their program ids."""
    builder = interpreter.interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    order = []

    def dim(x, y, z):
        order[:] = torch.randperm(x, generator=generator).tolist()
        set_dim(x, y, z)

    monkeypatch.setattr(builder, "set_grid_dim", dim)
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_index(order[x], y, z))


@pytest.mark.parametrize("spread", ["usual", "one value", "two values apart", "last digit only", "one NaN"])
def test_top_k_whatever_order_programs_start_in(generator, monkeypatch, spread):
    """Steps of a launch go by tickets, so program ids mean nothing; one program at a time is enough to reach the end."""
    monkeypatch.setitem(select.RADIX, 2**31, select.RADIX[2**31]._replace(block=1024, programs=4))
    n, k = 4600, 1300
    scores = {
        "usual": torch.rand(n, generator=generator).square(),
        "one value": torch.full((n,), 0.5),
        "two values apart": torch.where(torch.rand(n, generator=generator) < 0.2, 3e38, -1e-38),
        "last digit only": (torch.randint(250, (n,), generator=generator) + 0x3F800000).int().view(torch.float32),
        "one NaN": torch.full((n,), -0.0),
    }[spread]
    if spread == "one NaN":
        scores[7], scores[100:3000:2] = math.nan, 0.0
    start_in_any_order(monkeypatch, generator)
    got = select_topk(scores, k, order="index", impl="triton")
    assert torch.equal(got, reference.select_topk(scores, k, True, "index"))
    assert_counters_are_zero()


FOUR = ("big_loss", "small_loss", "grad_norm", "uniform")


@pytest.mark.parametrize(("methods", "programs"), [(FOUR, 256), (FOUR, 2), (METHODS, 256)], ids=["four", "few", "all"])
def test_large_batch_whatever_order_programs_start_in(generator, monkeypatch, launches, methods, programs):
    """Both forms of the first steps: sums in the step of the moments, and in one of their own. Blocks differ in extremes."""
    monkeypatch.setitem(batch_large.LARGE, 2**31, batch_large.LARGE[2**31]._replace(programs=programs))
    losses = (
        torch.rand(4200, generator=generator) + 9 * torch.arange(4200).div(1024, rounding_mode="floor").sub(2).abs()
    )
    grads = losses.flip(0).clone()
    losses[5] = math.nan
    states = [AdaSelectionState.create(methods, seed=4) for _ in range(3)]
    for state in states:
        state.previous_losses[:] = torch.linspace(1, 2, len(methods))

    def call(state, impl="triton", dtype=torch.float32):
        return select_from_losses(
            losses.to(dtype), 0.2, grad_norms=grads.to(dtype), methods=methods, state=state, impl=impl
        )

    first = call(states[0])
    start_in_any_order(monkeypatch, generator)
    monkeypatch.setattr(runtime, "CPU_MULTIPROCESSORS", 64)
    runtime.multiprocessors.cache_clear()
    again = call(states[1])
    for name in ("indices", "scores", "n_valid"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    assert torch.equal(states[0].buffer, states[1].buffer)
    assert launches[0][2]["ONLINE"] == (len(methods) == 4)
    assert_counters_are_zero()
    oracle = call(states[2], "reference", torch.float64)
    torch.testing.assert_close(first.scores, oracle.scores, rtol=4e-6, atol=1e-9)
    torch.testing.assert_close(states[0].buffer, states[2].buffer, rtol=4e-6, atol=1e-9)


def test_counters_of_graphs_are_apart_and_run_out():
    reserve = runtime._Reserve(torch.device("cpu"), 100)
    first, second = reserve.take(1), reserve.take(33)
    assert (first.numel(), second.numel()) == (1, 33)
    assert second.data_ptr() - first.data_ptr() == 4 * runtime._SEPARATE
    assert reserve.take(5) is None, "no more than there are"
    assert reserve.take(4) is not None


def test_more_than_half_a_block_a_program(monkeypatch, generator):
    """Programs that walk several blocks, as those of more than a million rows do."""
    for table in (batch_large.LARGE, select.RADIX):
        monkeypatch.setitem(table, 2**31, table[2**31]._replace(programs=2))
    losses = torch.rand(9000, generator=generator)
    got = select_from_losses(losses, 0.3, methods=METHODS[:2] + METHODS[3:], impl="triton")
    oracle = select_from_losses(losses.double(), 0.3, methods=METHODS[:2] + METHODS[3:], impl="reference")
    torch.testing.assert_close(got.scores, oracle.scores, rtol=4e-6, atol=1e-12)
    assert torch.equal(got.indices, select_topk(got.scores, 2700, order="index", impl="reference"))


def test_options_travel_as_float64():
    assert maths.float_bits(1.0) == 0x3FF0000000000000
    assert maths.float_bits(-0.1) == -0x4046666666666666
