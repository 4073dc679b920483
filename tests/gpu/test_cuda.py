"""On a GPU: contract items 1 to 9 for the Triton kernels as they really run. Collected only where CUDA is available."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from adaselect_kernels import AdaSelectionOptions, AdaSelectionState, fused_select, per_sample_stats, select_topk
from adaselect_kernels.options import METHODS, STATS
from tests.oracle import assert_statistic, check_fused_select, naive_stats, oracle_stats

CUDA = torch.device("cuda")


def batch(n, c, dtype=torch.float32, scale=3.0):
    logits = (torch.randn(n, c, device=CUDA) * scale).to(dtype)
    return logits, torch.randint(c, (n,), device=CUDA)


SIZES = [
    (1, 1),  # nothing to compare with
    (128, 10),  # the paper's batch: one launch
    (128, 100),
    (128, 1000),
    (4096, 100),  # the largest single launch
    (4097, 100),  # the smallest that is not
    (1024, 1000),
    (65_536, 10),  # recommenders
    (1_000_000, 10),
    (1_000_000, 100),
    (2048, 32_000),  # vocabulary rows, not a power of two
    (512, 128_256),
    (3, 262_144),  # few rows: each split over programs
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "c"), SIZES, ids=str)
def test_selection_equals_the_oracle(n, c, dtype):
    logits, targets = batch(n, c, dtype)
    targets[:: max(2, n // 7)] = -100
    state = AdaSelectionState.create(METHODS, CUDA, seed=5)
    for _ in range(2):
        check_fused_select(fused_select, logits, targets, 0.2, methods=METHODS, state=state)


TILE_AND_STREAM = [(300, 1000), (64, 32_001)]
SHAPES_OF = {  # float16 is bfloat16's code but for the conversion; compiling takes most of the time of these tests
    torch.float32: [(77, 2), (1000, 17), *TILE_AND_STREAM, (5, 200_003)],
    torch.bfloat16: [(77, 2), (1000, 17), *TILE_AND_STREAM, (5, 200_003)],
    torch.float16: TILE_AND_STREAM,
    torch.float64: TILE_AND_STREAM,
}


@pytest.mark.parametrize(
    ("dtype", "n", "c"), [(dtype, *shape) for dtype, shapes in SHAPES_OF.items() for shape in shapes], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "misaligned"])
def test_statistics_equal_the_oracle(n, c, dtype, layout):
    logits, targets = batch(n, c, dtype)
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    if layout == "misaligned":
        wide = torch.full((n, c + 3), float("nan"), device=CUDA, dtype=dtype)
        wide[:, 1 : c + 1] = logits
        logits = wide[:, 1 : c + 1]
    got = per_sample_stats(logits, targets, stats=STATS)
    peer = naive_stats(logits, targets, -100, 0.0)
    for name, right in zip(STATS, oracle_stats(logits, targets, STATS), strict=True):
        assert_statistic(name, getattr(got, name), right, peer[name])


@pytest.mark.parametrize(
    "options",
    [
        AdaSelectionOptions(beta=-0.5, update="log_ratio", standardize=True, weight_floor=0.1, curriculum_power=-0.5),
        AdaSelectionOptions(method_loss="selected", curriculum_power=0.1, curriculum_scale="rms"),
    ],
    ids=["ours", "selected"],
)
@pytest.mark.parametrize("n", [128, 20_000])
def test_options_follow_the_oracle_for_a_hundred_steps(options, n):
    state = AdaSelectionState.create(METHODS, CUDA, seed=5)
    for _ in range(100):
        logits, targets = batch(n, 10)
        check_fused_select(fused_select, logits, targets, 0.3, methods=METHODS, state=state, options=options)


def test_more_than_two_to_the_31_logits():
    n, c = 17_000, 131_072  # 2.2e9 elements
    logits = torch.randn(n, c, device=CUDA, dtype=torch.bfloat16)
    targets = torch.randint(c, (n,), device=CUDA)
    got = per_sample_stats(logits, targets, stats=STATS)
    for rows in (slice(0, 50), slice(16_350, 16_420), slice(n - 50, n)):  # row 16,384 starts at 2^31
        peer = naive_stats(logits[rows], targets[rows], -100, 0.0)
        for name, right in zip(STATS, oracle_stats(logits[rows], targets[rows], STATS), strict=True):
            assert_statistic(name, getattr(got, name)[rows], right, peer[name])


@pytest.mark.parametrize(("n", "c"), [(128, 10), (5000, 10), (64, 50_000)], ids=str)
def test_a_bad_target_makes_its_row_invalid_and_reads_nothing_outside(monkeypatch, n, c):
    logits, targets = batch(n, c)
    clean = fused_select(logits, targets, 0.5, methods=("big_loss",))
    targets[3], targets[7], targets[11] = c, -1, 2**62
    got = fused_select(logits, targets, 0.5, methods=("big_loss",))
    bad = torch.tensor([3, 7, 11], device=CUDA)
    assert got.losses[bad].isnan().all()
    assert got.scores[bad].isneginf().all()
    assert int(got.n_valid) == n - 3
    fine = torch.ones(n, dtype=torch.bool, device=CUDA).index_fill(0, bad, False)
    assert torch.equal(got.losses[fine], clean.losses[fine])
    monkeypatch.setenv("ADASELECT_DEBUG", "1")
    with pytest.raises(IndexError, match=f"target {c} of row 3"):
        fused_select(logits, targets, 0.5)


@pytest.mark.parametrize(("n", "c"), [(128, 10), (8192, 100), (64, 50_000)], ids=str)
def test_a_captured_graph_replays_a_thousand_steps_as_eager_does(n, c):
    options = AdaSelectionOptions(curriculum_power=-0.5)
    states = [AdaSelectionState.create(METHODS, CUDA, seed=9) for _ in range(2)]
    logits, targets = batch(n, c)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up: compiles, allocates the workspace
        fused_select(logits, targets, 0.3, methods=METHODS, state=states[0], options=options)
    torch.cuda.current_stream().wait_stream(side)
    states[0].reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused_select(logits, targets, 0.3, methods=METHODS, state=states[0], options=options)
    states[0].reset()
    for step in range(1000):
        logits.mul_(0.999).add_(0.001)
        graph.replay()
        right = fused_select(logits, targets, 0.3, methods=METHODS, state=states[1], options=options)
        if step % 50 == 0 or step > 990:
            assert all(torch.equal(a, b) for a, b in zip(captured, right, strict=True)), step
            assert torch.equal(states[0].buffer, states[1].buffer), step


def test_nothing_synchronises_the_host():
    logits, targets = batch(512, 100)
    state = AdaSelectionState.create(METHODS, CUDA)
    scores = torch.randn(200_000, device=CUDA)

    def everything():
        fused_select(logits, targets, 0.3, methods=METHODS, state=state)
        fused_select(logits, targets, 0.3, options=AdaSelectionOptions(method_loss="selected"))
        per_sample_stats(logits, targets, stats=STATS)
        for order in ("index", "score"):
            select_topk(scores, 50_000, order=order)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("n", "c"), [(128, 10), (20_000, 50)], ids=str)
def test_streams_and_threads_do_not_disturb_each_other(n, c):
    inputs = [batch(n, c) for _ in range(4)]
    expected = [fused_select(*pair, 0.3, methods=METHODS, seed=i) for i, pair in enumerate(inputs)]
    torch.cuda.synchronize()

    def wrong(i: int) -> int:
        """How many of 200 calls on a stream of its own differ; an error in the thread comes out of its result."""
        with torch.cuda.stream(torch.cuda.Stream()):
            results = (fused_select(*inputs[i], 0.3, methods=METHODS, seed=i) for _ in range(200))
            return sum(not all(map(torch.equal, got, expected[i])) for got in results)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(wrong, range(4))) == [0] * 4


@pytest.mark.parametrize(("n", "c"), [(128, 10), (20_000, 50), (8, 100_000)], ids=str)
def test_launches_of_two_streams_overlap_without_harm(n, c):
    """Nothing waits between the calls, so that launches of both streams are on the device at once."""
    inputs = [batch(n, c) for _ in range(2)]
    expected = [fused_select(*pair, 0.3, methods=METHODS) for pair in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(100):
        for pair, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(fused_select(*pair, 0.3, methods=METHODS))
    torch.cuda.synchronize()
    for i, got in enumerate(results):
        assert all(map(torch.equal, got, expected[i % 2])), i


@pytest.mark.parametrize("n", [1, 513, 4097, 1_000_003, 16_000_000])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
def test_topk_equals_a_stable_sort(n, kind):
    scores = torch.randn(n, device=CUDA)
    scores = {"normal": scores, "ties": (scores * 3).floor(), "equal": scores * 0}[kind]
    ranked = torch.sort(scores, descending=True, stable=True).indices
    for k in {1, max(1, n // 10), max(1, n // 2), n}:
        assert torch.equal(select_topk(scores, k), ranked[:k])
        assert torch.equal(select_topk(scores, k, order="index"), ranked[:k].sort().values)


@pytest.mark.parametrize(("n", "c"), [(128, 10), (20_000, 1000), (7, 200_000)], ids=str)
def test_repeats_are_bit_identical(n, c):
    logits, targets = batch(n, c)
    first = fused_select(logits, targets, 0.3, methods=METHODS)
    for _ in range(20):
        again = fused_select(logits, targets, 0.3, methods=METHODS)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_equals_the_eager_one(mode):
    def step(logits, targets, state):
        got = fused_select(logits * 2, targets, 0.3, methods=METHODS, state=state)
        return got.indices, got.scores, logits[got.indices].sum()

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    one, two = (AdaSelectionState.create(METHODS, CUDA, seed=1) for _ in range(2))
    for _ in range(5):
        logits, targets = batch(256, 10)
        mine = [t.clone() for t in compiled(logits, targets, one)]
        for a, b in zip(mine, step(logits, targets, two), strict=True):
            torch.testing.assert_close(a, b)
    assert torch.equal(one.buffer, two.buffer)


@pytest.mark.parametrize(("n", "c"), [(1_000_000, 100), (2048, 32_000)], ids=str)
def test_memory_beyond_inputs_and_outputs_is_a_small_multiple_of_n(n, c):
    logits, targets = batch(n, c, torch.bfloat16)
    fused_select(logits, targets, 0.3, methods=METHODS)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = fused_select(logits, targets, 0.3, methods=METHODS)
    torch.cuda.synchronize()
    outputs = sum(t.numel() * t.element_size() for t in got)
    assert torch.cuda.max_memory_allocated() - before - outputs <= 64 * n + (4 << 20)
