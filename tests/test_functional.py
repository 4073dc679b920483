"""The public functions: contract items 1 to 9 against the oracle, for every implementation that runs in this process."""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adaselect_kernels
from adaselect_kernels import (
    AdaSelectionOptions,
    AdaSelectionState,
    dispatch,
    fused_select,
    per_sample_stats,
    select_from_losses,
    select_topk,
)
from adaselect_kernels.checks import selected_count
from adaselect_kernels.functional import baseline_select, baseline_select_from_losses
from adaselect_kernels.options import METHODS, STATS
from tests.oracle import (
    assert_statistic,
    assert_within_budget,
    check_fused_select,
    expected_count,
    naive_stats,
    oracle_stats,
)

IMPLS = ["reference"] + (["cpu"] if dispatch.EXTENSION is not None else [])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def test_the_extension_is_there_where_it_is_required():
    if os.environ.get("ADASELECT_REQUIRE_EXTENSION") == "1":
        assert dispatch.EXTENSION is not None, dispatch.EXTENSION_ERROR


def with_impl(impl, function=fused_select):
    def call(*args, **kwargs):
        return function(*args, impl=impl, **kwargs)

    return call


def random_batch(generator, n, c, dtype=torch.float32, scale=3.0, offset=0.0):
    logits = (torch.randn(n, c, generator=generator, dtype=torch.float64) * scale + offset).to(dtype)
    return logits, torch.randint(c, (n,), generator=generator)


def strided(logits: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values behind other strides."""
    if layout == "transposed":
        return logits.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((logits.shape[0] * 2, logits.shape[1] + 3), math.nan, dtype=logits.dtype)
        wide[::2, 2:-1] = logits
        return wide[::2, 2:-1]
    return logits


# --- contract 1, 7, 8: values and choice -----------------------------------------------------------------------------


@st.composite
def cases(draw):
    big = draw(st.integers(0, 5)) == 0
    n = draw(st.integers(1, 5000)) if big else draw(st.integers(1, 200))
    c = (
        draw(st.integers(1, 30))
        if big
        else draw(st.sampled_from([1, 2, 3, 7, 10, 16, 17, 31, 64, 65, 100, 257, 1000, 2000]))
    )
    return {
        "n": n,
        "c": c,
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(["contiguous", "transposed", "sliced"])),
        "gamma": draw(st.one_of(st.floats(1e-4, 1.0), st.just(1e-9), st.just(1.0))),
        "offset": draw(st.sampled_from([0.0, 1e4, -1e4])),
        "scale": draw(st.sampled_from([0.0, 0.1, 3.0, 30.0])),
        "faults": draw(st.sampled_from(["none", "ignored", "nan", "all_ignored", "mixed"])),
        "order": draw(st.sampled_from(["index", "score"])),
        "smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "methods": tuple(draw(st.lists(st.sampled_from(METHODS), min_size=1, max_size=7, unique=True))),
        "options": draw(
            st.builds(
                AdaSelectionOptions,
                beta=st.floats(-1, 1),
                temperature=st.sampled_from([0.5, 1.0, 4.0]),
                standardize=st.booleans(),
                update=st.sampled_from(["relative", "log_ratio"]),
                method_loss=st.sampled_from(["weighted", "selected"]),
                weight_floor=st.sampled_from([0.0, 0.2, 1.0]),
                curriculum_power=st.sampled_from([None, -0.5, 1.0]),
                curriculum_scale=st.sampled_from(["sum_squares", "rms"]),
            )
        ),
        "seed": draw(st.integers(-(2**63), 2**64 - 1)),
        "torch_seed": draw(st.integers(0, 2**32)),
    }


def check_any_selection(impl, case):
    generator = torch.Generator().manual_seed(case["torch_seed"])
    logits, targets = random_batch(generator, case["n"], case["c"], case["dtype"], case["scale"], case["offset"])
    if case["faults"] in ("nan", "mixed"):
        logits[torch.rand(case["n"], generator=generator) < 0.2, -1] = math.nan
        logits[torch.rand(case["n"], generator=generator) < 0.1, 0] = math.inf
        logits[torch.rand(case["n"], generator=generator) < 0.1, 0] = -math.inf
    if case["faults"] in ("ignored", "mixed"):
        targets[torch.rand(case["n"], generator=generator) < 0.3] = -100
    if case["faults"] == "all_ignored":
        targets[:] = -100
    state = AdaSelectionState.create(case["methods"], seed=case["seed"])
    for labels in (targets, targets.roll(1)):  # other losses: the methods' own change, and with them the weights
        check_fused_select(
            with_impl(impl), strided(logits, case["layout"]), labels, case["gamma"], methods=case["methods"],
            state=state, options=case["options"], order=case["order"], label_smoothing=case["smoothing"],
        )  # fmt: skip


@pytest.mark.skipif(dispatch.EXTENSION is None, reason="the compiled extension is missing")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_selection_equals_the_oracle(case):
    check_any_selection("cpu", case)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_selection_of_the_reference_equals_its_own_in_float64(case):
    check_any_selection("reference", case)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "c"), [(1, 1), (5, 2), (128, 10), (33, 63), (16, 64), (17, 65), (9, 1000), (3, 5003)], ids=str
)
def test_statistics_equal_the_oracle(generator, impl, dtype, n, c):
    logits, targets = random_batch(generator, n, c, dtype)
    targets[n // 2] = -100
    got = per_sample_stats(logits, targets.int(), stats=STATS, impl=impl)
    oracle = oracle_stats(logits, targets, STATS)
    peer = naive_stats(logits, targets, -100, 0.0)
    for name, right in zip(STATS, oracle, strict=True):
        value = getattr(got, name)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_statistic(name, value, right, peer[name])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stats", [("margin",), ("confidence", "loss"), ("correct", "entropy", "top2_margin")], ids=str)
def test_any_subset_of_statistics_in_any_order(generator, impl, stats):
    logits, targets = random_batch(generator, 20, 12)
    got = per_sample_stats(logits, targets, stats=stats, impl=impl)
    everything = per_sample_stats(logits, targets, stats=STATS, impl=impl)
    for name in STATS:
        assert (getattr(got, name) is not None) == (name in stats)
        if name in stats:
            torch.testing.assert_close(getattr(got, name), getattr(everything, name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_confident_row_keeps_its_gradient_norm_and_loss(impl, offset):
    """sum p^2 - 2 p_y + 1 and lse - z_y cancel as p_y -> 1; ours must not."""
    margins = (30.0, 50.0, 80.0)  # of the last two, the square of the norm is below what float32 has
    for classes in (5, 300):
        logits = torch.zeros(3, classes) + offset
        logits[:, 2] += torch.tensor(margins)
        got = per_sample_stats(logits, torch.full((3,), 2), impl=impl)
        others = classes - 1
        for i, margin in enumerate(margins):
            p = math.exp(-margin) / (1 + others * math.exp(-margin))
            assert got.grad_norm[i].item() == pytest.approx(math.sqrt((others * p) ** 2 + others * p**2), rel=1e-5)
            assert got.loss[i].item() == pytest.approx(math.log1p(others * math.exp(-margin)), rel=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_confident_sequence_keeps_its_gradient_norm(impl):
    logits = torch.zeros(2, 3, 5)
    logits[:, :, 1] = torch.tensor([[50.0, 52.0, 60.0], [70.0, 71.0, 90.0]])
    targets = torch.tensor([[1, 1, -100], [1, 1, -100]])
    got = per_sample_stats(logits, targets, impl=impl).grad_norm
    norms = math.sqrt(20) * (-logits[:, :2, 1].double()).exp()
    torch.testing.assert_close(got.double(), norms.square().sum(1).sqrt() / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("unit", ["sample", "token"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_sequences(generator, impl, unit, layout):
    logits = torch.randn(9, 6, 11, generator=generator)
    if layout == "permuted":
        logits = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    targets = torch.randint(11, (9, 6), generator=generator)
    targets[torch.rand(9, 6, generator=generator) < 0.3] = -1
    targets[4] = -1
    logits[3, 2, 1] = math.nan
    got = check_fused_select(
        with_impl(impl), logits, targets, 0.4, methods=("big_loss", "grad_norm", "coreset2"), unit=unit, ignore_index=-1
    )
    assert len(got.scores) == (9 if unit == "sample" else 54)
    stats = per_sample_stats(logits, targets, stats=STATS, unit=unit, ignore_index=-1, impl=impl)
    for name, right in zip(STATS, oracle_stats(logits, targets, STATS, unit, -1), strict=True):
        assert_within_budget(getattr(stats, name), right, right.float(), name) if name == "correct" else None
        torch.testing.assert_close(getattr(stats, name).double(), right, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_dimensional_logits_have_the_same_samples_and_tokens(generator, impl):
    logits, targets = random_batch(generator, 30, 4)
    one = fused_select(logits, targets, 0.3, unit="sample", impl=impl)
    two = fused_select(logits, targets, 0.3, unit="token", impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_scores_are_chosen_in_row_order(impl):
    logits, targets = torch.zeros(1000, 10), torch.zeros(1000, dtype=torch.long)
    got = fused_select(logits, targets, 0.25, methods=("big_loss", "small_loss"), impl=impl)
    assert got.indices.tolist() == list(range(250))


@pytest.mark.parametrize("impl", IMPLS)
def test_invalid_rows_are_chosen_last_and_lowest_first(impl):
    logits, targets = torch.randn(10, 3), torch.full((10,), -100)
    targets[[4, 7]] = 1
    got = fused_select(logits, targets, 0.5, impl=impl)
    assert got.indices.tolist() == [0, 1, 2, 4, 7]
    assert int(got.n_valid) == 2
    assert got.losses[[0, 1, 2, 3]].tolist() == [0.0] * 4


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_is_not_finite_keeps_its_loss_and_spoils_no_other(generator, impl):
    logits, targets = random_batch(generator, 12, 5)
    targets[:] = 1
    clean = fused_select(logits, targets, 0.5, methods=("big_loss", "coreset2"), impl=impl)
    logits[3, 0], logits[5, 1], logits[8, 2] = math.nan, -math.inf, math.inf
    got = fused_select(logits, targets, 0.5, methods=("big_loss", "coreset2"), impl=impl)
    assert got.losses[3].isnan()
    assert got.losses[5] == math.inf
    assert got.losses[8].isnan()
    assert int(got.n_valid) == 9
    fine = torch.tensor([i not in (3, 5, 8) for i in range(12)])
    assert torch.equal(got.losses[fine], clean.losses[fine])
    assert got.scores[fine].isfinite().all()
    assert got.scores[~fine].isneginf().all()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 127, 128, 1000])
def test_k_is_rounded_half_up_and_clamped(n):
    for gamma in (1e-12, 0.001, 0.05, 0.1, 0.15, 0.25, 0.29, 0.35, 0.5, 0.999, 1.0, 1):
        assert selected_count(gamma, n) == expected_count(gamma, n)
    assert [selected_count(0.5, m) for m in (1, 3, 5)] == [1, 2, 3]


# --- contract 2: determinism -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n", "c"), [(128, 10), (5000, 7), (40, 3000)], ids=str)
def test_repeats_are_bit_identical(generator, impl, n, c):
    logits, targets = random_batch(generator, n, c)
    first = fused_select(logits, targets, 0.3, methods=METHODS, impl=impl)
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, threads):
            torch.set_num_threads(count)
            again = fused_select(logits, targets, 0.3, methods=METHODS, impl=impl)
            if impl == "reference" and count != threads:
                continue  # PyTorch's own reductions depend on the number of threads
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", IMPLS)
def test_identical_rows_tie_exactly_wherever_they_stand(generator, impl):
    for c in (3, 10, 17, 100, 1003):
        row = torch.randn(1, c, generator=generator)
        logits = row.repeat(37, 1)
        stats = per_sample_stats(logits, torch.full((37,), c - 1), stats=STATS, impl=impl)
        if impl != "reference":
            assert all(len(set(value.tolist())) == 1 for value in stats)
    losses = torch.rand(1, generator=generator).repeat(1003)
    for name in METHODS[:6]:
        got = select_from_losses(losses, 0.1, grad_norms=losses, methods=(name,), impl=impl)
        assert got.indices.tolist() == list(range(100)), name


# --- contract 3, 4: one operator, no gradient ------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
def test_outputs_need_no_gradient_and_the_graph_is_untouched(generator, impl):
    logits, targets = random_batch(generator, 16, 4)
    logits.requires_grad_()
    hidden = logits * 2
    got = fused_select(hidden, targets, 0.5, impl=impl)
    assert not any(t.requires_grad for t in got)
    assert not per_sample_stats(hidden, targets, impl=impl).loss.requires_grad
    assert not select_from_losses(hidden[:, 0], 0.5, impl=impl).losses.requires_grad
    assert not select_topk(hidden[:, 0], 3, impl=impl).requires_grad
    hidden[got.indices].sum().backward()
    expected = torch.zeros_like(logits).index_fill(0, got.indices, 2.0)
    assert torch.equal(logits.grad, expected)


# --- select_from_losses and the baselines ----------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_from_losses_equals_the_fused_one(generator, impl, dtype):
    logits, targets = random_batch(generator, 300, 6)
    stats = per_sample_stats(logits, targets, impl=impl)
    losses, norms = stats.loss.to(dtype), stats.grad_norm.to(dtype)
    got = select_from_losses(losses[::2], 0.3, grad_norms=norms[::2], methods=METHODS, seed=4, impl=impl)
    again = select_from_losses(
        losses[::2].double(), 0.3, grad_norms=norms[::2].double(), methods=METHODS, seed=4, impl="reference"
    )
    torch.testing.assert_close(got.scores, again.scores, rtol=2e-5, atol=1e-9)
    assert torch.equal(got.losses, losses[::2].float())
    assert torch.equal(got.indices, select_topk(got.scores, len(got.indices), order="index", impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_norms_that_are_not_finite_make_a_row_invalid_only_for_their_method(impl):
    losses, norms = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, math.nan, 2.0])
    got = select_from_losses(losses, 1.0, grad_norms=norms, methods=("big_loss", "grad_norm"), impl=impl)
    assert got.scores.isneginf().tolist() == [False, True, False]
    got = select_from_losses(losses, 1.0, grad_norms=norms, methods=("big_loss",), impl=impl)
    assert int(got.n_valid) == 3


BASELINES = {
    "big_loss": [0, 4],
    "small_loss": [1, 3],
    "grad_norm": [1, 2],
    "adaboost": [0, 4],
    "coreset1": [0, 1],
    "coreset2": [2, 3],
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("method", METHODS)
def test_baselines_choose_by_their_raw_key(generator, impl, method):
    losses = torch.tensor([9.0, 0.1, 4.0, 2.0, 7.0])
    norms = torch.tensor([0.1, 3.0, 2.0, 0.2, 0.3])
    got = baseline_select_from_losses(losses, 0.4, method, grad_norms=norms, impl=impl)
    if method in BASELINES:
        assert got.indices.tolist() == BASELINES[method]
    logits, targets = random_batch(generator, 200, 5)
    targets[::7] = -100
    for order in ("index", "score"):
        mine = baseline_select(logits, targets, 0.3, method, order=order, seed=9, impl=impl)
        right = baseline_select(logits.double(), targets, 0.3, method, order=order, seed=9, impl="reference")
        torch.testing.assert_close(mine.scores, right.scores, rtol=3e-5, atol=1e-6)
        assert sorted(mine.indices.tolist()) == sorted(right.indices.tolist())


@pytest.mark.parametrize("impl", IMPLS)
def test_losses_far_apart_do_not_tie_in_a_baseline(impl):
    """Softmax importances of losses hundreds apart underflow to equal scores; the raw keys must not."""
    losses = torch.arange(20.0) * 100
    got = baseline_select_from_losses(losses, 0.5, "big_loss", impl=impl)
    assert got.indices.tolist() == list(range(10, 20))


@pytest.mark.parametrize("impl", IMPLS)
def test_uniform_draws_anew_each_step_and_repeats_with_the_seed(impl):
    logits, targets = torch.randn(500, 3), torch.zeros(500, dtype=torch.long)
    runs = []
    for _ in range(2):
        state = AdaSelectionState.create(("uniform",), seed=42)
        runs.append(
            [baseline_select(logits, targets, 0.1, "uniform", state=state, impl=impl).indices for _ in range(3)]
        )
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert len({tuple(indices.tolist()) for indices in runs[0]}) == 3


# --- select_topk -----------------------------------------------------------------------------------------------------


def right_topk(scores, k, largest, order):
    """Python's stable sort: best first, NaN last, ties to the lower row."""
    values = scores.double().tolist()
    sign = -1 if largest else 1
    ranked = sorted(
        range(len(values)), key=lambda i: (math.isnan(values[i]), 0 if math.isnan(values[i]) else sign * values[i])
    )
    return sorted(ranked[:k]) if order == "index" else ranked[:k]


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(1, 3000),
    share=st.floats(0, 1),
    levels=st.sampled_from([1, 2, 50, 10**6]),
    largest=st.booleans(),
    order=st.sampled_from(["index", "score"]),
    dtype=st.sampled_from(DTYPES),
    special=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_topk_equals_a_stable_sort(impl, n, share, levels, largest, order, dtype, special, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = ((torch.rand(n, generator=generator) * levels).floor() / levels - 0.4).to(dtype)
    if special:
        picks = torch.randint(6, (n,), generator=generator)
        for code, value in enumerate((math.nan, math.inf, -math.inf, 0.0, -0.0)):
            scores[(picks == code) & (torch.rand(n, generator=generator) < 0.5)] = value
    k = max(1, round(share * n))
    got = select_topk(scores, k, largest=largest, order=order, impl=impl)
    assert got.tolist() == right_topk(scores, k, largest, order)


@pytest.mark.parametrize("impl", IMPLS)
def test_topk_of_strided_scores(generator, impl):
    scores = torch.randn(100, 3, generator=generator)
    for column in (scores[:, 1], scores.t()[2], scores[0].expand(3)):
        assert select_topk(column, 3, impl=impl).tolist() == right_topk(column, 3, True, "score")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [100_003, 1_000_000])
def test_topk_of_many_scores(generator, impl, n):
    for scores in (torch.randn(n, generator=generator), torch.randint(9, (n,), generator=generator).float()):
        ranked = torch.sort(scores, descending=True, stable=True).indices
        for k in (1, n // 5, n):
            assert torch.equal(select_topk(scores, k, impl=impl), ranked[:k])
            assert torch.equal(select_topk(scores, k, order="index", impl=impl), ranked[:k].sort().values)


# --- contract 9: trajectories ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "reference"])
@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (1000, AdaSelectionOptions()),
        (
            250,
            AdaSelectionOptions(
                beta=-0.5, update="log_ratio", standardize=True, weight_floor=0.1, curriculum_power=-0.5
            ),
        ),
        (250, AdaSelectionOptions(beta=0.3, method_loss="selected", curriculum_power=0.1, curriculum_scale="rms")),
    ],
    ids=["paper", "ours", "selected"],
)
def test_many_steps_follow_the_oracle(generator, impl, steps, options):
    """The weights at the end differ from the float64 oracle's by no more than twice the float32 reference's."""
    methods = METHODS
    states = {name: AdaSelectionState.create(methods, seed=3) for name in ("oracle", "peer", "mine")}
    for step in range(steps):
        logits, targets = random_batch(generator, 64, 10, scale=2.0)
        common = {"methods": methods, "options": options}
        fused_select(logits.double(), targets, 0.25, state=states["oracle"], impl="reference", **common)
        fused_select(logits, targets, 0.25, state=states["peer"], impl="reference", **common)
        fused_select(logits, targets, 0.25, state=states["mine"], impl=impl, **common)
        if step == steps // 2:  # a save and load in the middle continues bit for bit
            restored = AdaSelectionState.create(methods)
            restored.load_state_dict(states["mine"].state_dict())
            assert torch.equal(restored.buffer, states["mine"].buffer)
            states["mine"] = restored
    oracle, peer, mine = (states[name] for name in ("oracle", "peer", "mine"))
    assert mine.step.item() == steps + 1
    for name in ("log_weights", "previous_losses"):
        right = getattr(oracle, name)
        allowed = 2 * (getattr(peer, name) - right).abs().max() + 1e-6 * (1 + right.abs().max())
        assert (getattr(mine, name) - right).abs().max() <= allowed, name


# --- contract 6: errors ----------------------------------------------------------------------------------------------

Z, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
L = torch.rand(4)
STATE = AdaSelectionState.create(("big_loss", "uniform"))

ERRORS = [
    ("gamma zero", lambda i: fused_select(Z, Y, 0.0, impl=i), ValueError, r"gamma must be in \(0, 1\], got 0.0"),
    ("gamma above", lambda i: fused_select(Z, Y, 1.01, impl=i), ValueError, r"got 1.01"),
    ("gamma nan", lambda i: fused_select(Z, Y, math.nan, impl=i), ValueError, "gamma .* got nan"),
    ("gamma type", lambda i: fused_select(Z, Y, "0.5", impl=i), TypeError, "gamma must be a number"),
    ("gamma bool", lambda i: fused_select(Z, Y, True, impl=i), TypeError, "gamma must be a number"),
    ("N = 0", lambda i: fused_select(Z[:0], Y[:0], 0.5, impl=i), ValueError, r"must not be empty, got shape \(0, 3\)"),
    ("C = 0", lambda i: fused_select(Z[:, :0], Y, 0.5, impl=i), ValueError, r"must not be empty, got shape \(4, 0\)"),
    ("T = 0", lambda i: fused_select(Z[None, :0], Y[None, :0], 0.5, impl=i), ValueError, "must not be empty"),
    (
        "1-D logits",
        lambda i: fused_select(Z[0], Y, 0.5, impl=i),
        ValueError,
        r"\[N, C\] or \[N, T, C\], got shape \(3,\)",
    ),
    ("short targets", lambda i: fused_select(Z, Y[:3], 0.5, impl=i), ValueError, r"shape \(4,\).*got \(3,\)"),
    ("integer logits", lambda i: fused_select(Z.int(), Y, 0.5, impl=i), TypeError, "float16, .*got torch.int32"),
    ("complex logits", lambda i: fused_select(Z.cfloat(), Y, 0.5, impl=i), TypeError, "got torch.complex64"),
    (
        "float targets",
        lambda i: fused_select(Z, Y.float(), 0.5, impl=i),
        TypeError,
        "int64 or int32, got torch.float32",
    ),
    ("list logits", lambda i: fused_select([[1.0]], Y, 0.5, impl=i), TypeError, "must be tensors, got list"),
    ("target C", lambda i: fused_select(Z, Y + 1, 0.5, impl=i), IndexError, r"target 3 of row 2 is outside \[0, 3\)"),
    ("target -1", lambda i: fused_select(Z, Y - 1, 0.5, impl=i), IndexError, "target -1 of row 0 .*ignore_index=-100"),
    ("target stats", lambda i: per_sample_stats(Z, Y + 1, impl=i), IndexError, "target 3 of row 2"),
    (
        "other device",
        lambda i: fused_select(Z, Y.to("meta"), 0.5, impl=i),
        ValueError,
        "device of logits, cpu, got meta",
    ),
    (
        "unknown method",
        lambda i: fused_select(Z, Y, 0.5, methods=("loss",), impl=i),
        ValueError,
        "one of 'big_loss'.*'loss'",
    ),
    ("method string", lambda i: fused_select(Z, Y, 0.5, methods="uniform", impl=i), TypeError, "tuple or list"),
    ("methods twice", lambda i: fused_select(Z, Y, 0.5, methods=("uniform",) * 2, impl=i), ValueError, "distinct"),
    ("no methods", lambda i: fused_select(Z, Y, 0.5, methods=(), impl=i), ValueError, "at least one"),
    (
        "unit",
        lambda i: fused_select(Z, Y, 0.5, unit="row", impl=i),
        ValueError,
        "unit must be one of 'sample', 'token'",
    ),
    (
        "order",
        lambda i: fused_select(Z, Y, 0.5, order="best", impl=i),
        ValueError,
        "order must be one of 'index', 'score'",
    ),
    (
        "smoothing",
        lambda i: fused_select(Z, Y, 0.5, label_smoothing=1.5, impl=i),
        ValueError,
        r"label_smoothing .* got 1.5",
    ),
    ("smoothing type", lambda i: fused_select(Z, Y, 0.5, label_smoothing="a", impl=i), TypeError, "label_smoothing"),
    (
        "ignore_index",
        lambda i: fused_select(Z, Y, 0.5, ignore_index=1.0, impl=i),
        TypeError,
        "ignore_index must be an int",
    ),
    (
        "options",
        lambda i: fused_select(Z, Y, 0.5, options={"beta": 1}, impl=i),
        TypeError,
        "AdaSelectionOptions, got dict",
    ),
    ("seed", lambda i: fused_select(Z, Y, 0.5, seed=2**64, impl=i), ValueError, "seed must fit in 64 bits"),
    (
        "state type",
        lambda i: fused_select(Z, Y, 0.5, state={}, impl=i),
        TypeError,
        "state must be an AdaSelectionState",
    ),
    ("state methods", lambda i: fused_select(Z, Y, 0.5, state=STATE, impl=i), ValueError, "state is of methods"),
    (
        "state device",
        lambda i: fused_select(Z, Y, 0.5, methods=STATE.methods, state=STATE.to("meta"), impl=i),
        ValueError,
        "state must be on the device of the input, cpu, got meta",
    ),
    ("stats string", lambda i: per_sample_stats(Z, Y, stats="loss", impl=i), TypeError, "tuple or list"),
    ("unknown stat", lambda i: per_sample_stats(Z, Y, stats=("el2n",), impl=i), ValueError, "stats must be one of"),
    ("no stats", lambda i: per_sample_stats(Z, Y, stats=(), impl=i), ValueError, "at least one"),
    ("k zero", lambda i: select_topk(L, 0, impl=i), ValueError, r"k must be in \[1, N\] = \[1, 4\], got 0"),
    ("k above", lambda i: select_topk(L, 5, impl=i), ValueError, "got 5"),
    ("k type", lambda i: select_topk(L, 2.0, impl=i), TypeError, "k must be an int"),
    ("k largest", lambda i: select_topk(L, 2, largest=1, impl=i), TypeError, "largest must be a bool"),
    ("2-D scores", lambda i: select_topk(Z, 1, impl=i), ValueError, r"scores must be \[N\]"),
    ("integer scores", lambda i: select_topk(Y, 1, impl=i), TypeError, "scores must be float16"),
    ("empty losses", lambda i: select_from_losses(L[:0], 0.5, impl=i), ValueError, "N >= 1"),
    ("integer losses", lambda i: select_from_losses(Y, 0.5, impl=i), TypeError, "losses must be float16"),
    (
        "no grad_norms",
        lambda i: select_from_losses(L, 0.5, methods=("grad_norm",), impl=i),
        ValueError,
        "needs grad_norms",
    ),
    (
        "grad_norms shape",
        lambda i: select_from_losses(L, 0.5, grad_norms=L[:2], methods=("grad_norm",), impl=i),
        ValueError,
        r"grad_norms must be like losses, torch.float32 \(4,\)",
    ),
    (
        "negative losses",
        lambda i: select_from_losses(L - 2, 0.5, options=AdaSelectionOptions(curriculum_power=1.0), impl=i),
        ValueError,
        "a curriculum needs losses >= 0",
    ),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("call", "error", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_bad_input_is_refused_by_name(impl, call, error, message):
    with pytest.raises(error, match=message):
        call(impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_refused_call_leaves_the_state_untouched(generator, impl):
    logits, targets = random_batch(generator, 8, 3)
    state = AdaSelectionState.create(METHODS)
    fused_select(logits, targets, 0.5, methods=METHODS, state=state, impl=impl)
    before = state.buffer.clone()
    targets[5] = 3
    with pytest.raises(IndexError, match="target 3 of row 5"):
        fused_select(logits, targets, 0.5, methods=METHODS, state=state, impl=impl)
    with pytest.raises(ValueError, match="gamma"):
        fused_select(logits, targets, 2.0, methods=METHODS, state=state, impl=impl)
    assert torch.equal(state.buffer, before)


def test_an_unknown_or_unavailable_implementation_is_refused_with_the_reasons():
    with pytest.raises(
        ValueError, match="impl must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda'; got 'numpy'"
    ):
        fused_select(Z, Y, 0.5, impl="numpy")
    with pytest.raises(
        RuntimeError, match=r"impl='triton' is not available for cpu: .*TRITON_INTERPRET.*reference: available"
    ):
        fused_select(Z, Y, 0.5, impl="triton")
    with pytest.raises(RuntimeError, match="impl='cuda' is not available"):
        select_topk(L, 1, impl="cuda")


def test_the_environment_chooses_for_auto_only(monkeypatch):
    monkeypatch.setenv("ADASELECT_IMPL", "triton")
    with pytest.raises(RuntimeError, match="impl='triton' is not available"):
        fused_select(Z, Y, 0.5)
    assert fused_select(Z, Y, 0.5, impl="reference").indices.shape == (2,)
    monkeypatch.setenv("ADASELECT_IMPL", "gpu")
    with pytest.raises(ValueError, match="'gpu'"):
        fused_select(Z, Y, 0.5)


def test_auto_takes_the_compiled_kernels_on_a_cpu():
    expected = dispatch.EXTENSION if dispatch.EXTENSION is not None else dispatch.reference
    assert dispatch.resolve("auto", torch.device("cpu")) is expected


def test_every_public_name_has_a_docstring():
    for name in adaselect_kernels.__all__:
        if name != "__version__":
            assert getattr(adaselect_kernels, name).__doc__
