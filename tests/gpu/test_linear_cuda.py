"""On a GPU: scoring from hidden states and the classifier, as it really runs, at real sizes. Collected only with CUDA."""

import pytest
import torch

from adaselect_kernels import AdaSelectionState, fused_linear_select, linear_per_sample_stats, reference
from adaselect_kernels.kernels import linear, row_stats, runtime
from adaselect_kernels.linear import to_float8
from adaselect_kernels.options import STATS
from tests.oracle import assert_statistic

CUDA = torch.device("cuda")
ALL = tuple(range(len(STATS)))
SELECTION = ("loss", "grad_norm")
OPTIONS = {"softcap": 30.0, "logit_scale": 0.5, "label_smoothing": 0.1}
needs_tensor_memory = pytest.mark.skipif(
    torch.cuda.is_available() and not linear.has_tensor_memory(CUDA), reason="no tensor-memory accelerator"
)


def problem(n, features, classes, dtype, ignored=0.1):
    """Logits of size 3 or so."""
    hidden = (torch.randn(n, features, device=CUDA) * 3 / features**0.5).to(dtype)
    weight, bias = (torch.randn(size, device=CUDA).to(dtype) for size in ((classes, features), (classes,)))
    targets = torch.randint(classes, (n,), device=CUDA)
    targets[torch.rand(n, device=CUDA) < ignored] = -100
    return hidden, weight, targets, bias


def stored(hidden, weight, targets, bias, names, dtype, softcap=0.0, logit_scale=1.0, label_smoothing=0.0, rows=256):
    """The statistics from stored logits in `dtype`, a few rows at a time."""
    codes = [STATS.index(name) for name in names]
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    parts = [
        reference.linear_per_sample_stats(
            h.to(dtype), weight, y, bias, codes, "token", -100, label_smoothing, softcap, logit_scale
        )
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(parts, 1)


@pytest.fixture
def exact_products():
    """The peer's float32 products in full precision, whatever the machine's default."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def compare(got, hidden, weight, targets, bias, names, **options):
    exact = stored(hidden, weight, targets, bias, names, torch.float64, **options)
    peer = stored(hidden, weight, targets, bias, names, torch.float32, **options)
    for name, right, eager in zip(names, exact, peer, strict=True):
        mine = getattr(got, name)
        if mine.dtype == torch.float64:
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)
        elif name == "correct":  # a tie within a rounding may fall either way
            assert (mine != right).float().mean() < 1e-3
        else:
            assert_statistic(name, mine, right, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("n", "features", "classes"),
    [
        (1, 16, 1),
        (1, 4096, 128_256),  # one row: memory decides
        (300, 72, 1003),  # nothing is a multiple of a block
        (129, 8192, 5001),
        (2049, 512, 32_000),
    ],
    ids=str,
)
@pytest.mark.parametrize("names", [SELECTION, STATS], ids=["selection", "all"])
def test_statistics(exact_products, dtype, n, features, classes, names):
    if dtype == torch.float64 and n * features * classes > 2**33:
        n = 64
    hidden, weight, targets, bias = problem(n, features, classes, dtype)
    got = linear_per_sample_stats(hidden, weight, targets, bias=bias, stats=names, **OPTIONS)
    compare(got, hidden, weight, targets, bias, names, **OPTIONS)


def test_a_language_model_batch(exact_products):
    """The size of the target; only the rows that are compared need an oracle, spread over all blocks of rows."""
    hidden, weight, targets, _ = problem(8192, 4096, 128_256, torch.bfloat16)
    got = linear_per_sample_stats(hidden, weight, targets, stats=SELECTION)
    some = torch.arange(0, 8192, 61, device=CUDA)
    picked = type(got)(**{name: getattr(got, name)[some] for name in SELECTION})
    compare(picked, hidden[some], weight, targets[some], None, SELECTION, rows=16)
    again = linear_per_sample_stats(hidden, weight, targets, stats=SELECTION)
    assert torch.equal(got.loss, again.loss)
    assert torch.equal(got.grad_norm, again.grad_norm)


@needs_tensor_memory
@pytest.mark.parametrize("names", [SELECTION, STATS], ids=["selection", "all"])
def test_descriptors_and_pointers_agree(exact_products, monkeypatch, names):
    hidden, weight, targets, bias = problem(700, 1000, 3001, torch.bfloat16)
    through_descriptors = linear_per_sample_stats(hidden, weight, targets, bias=bias, stats=names, **OPTIONS)
    monkeypatch.setattr(linear, "has_tensor_memory", lambda device: False)
    through_pointers = linear_per_sample_stats(hidden, weight, targets, bias=bias, stats=names, **OPTIONS)
    for got in (through_descriptors, through_pointers):
        compare(got, hidden, weight, targets, bias, names, **OPTIONS)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "weight transposed", "off the boundary", "strided"])
def test_layouts(exact_products, layout):
    hidden, weight, targets, bias = problem(640, 256, 3000, torch.bfloat16)
    if layout == "sliced":
        hidden, targets = hidden.view(10, 64, 256)[:, :-1], targets.view(10, 64)[:, 1:]
    elif layout == "transposed":
        hidden = hidden.t().contiguous().t()
    elif layout == "weight transposed":
        weight = weight.t().contiguous().t()
    elif layout == "off the boundary":
        hidden = torch.cat([hidden.new_zeros(1), hidden.flatten()])[1:].view(hidden.shape)
    else:
        weight = weight.repeat_interleave(2, 0)[::2]
    got = linear_per_sample_stats(hidden, weight, targets, bias=bias, unit="token", stats=SELECTION)
    compare(got, hidden.reshape(-1, 256), weight, targets.reshape(-1), bias, SELECTION)


def test_offsets_of_ten_thousand(exact_products):
    hidden, weight, targets, _ = problem(500, 512, 5000, torch.bfloat16)
    bias = torch.full((5000,), 1e4, device=CUDA, dtype=torch.bfloat16)
    got = linear_per_sample_stats(hidden, weight, targets, bias=bias, stats=SELECTION)
    compare(got, hidden, weight, targets, bias, SELECTION)


def test_rows_that_are_ignored_cost_nothing_and_say_nothing():
    hidden, weight, targets, _ = problem(4096, 512, 5000, torch.bfloat16)
    targets[:] = -100
    hidden[:] = float("nan")
    assert not linear_per_sample_stats(hidden, weight, targets, stats=STATS).loss.any()


def test_float8():
    if torch.version.hip or torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(RuntimeError, match=r"8\.9 or later"):
            linear._require_float8(CUDA)
        return
    hidden, weight, targets, _ = problem(700, 1024, 5000, torch.bfloat16, ignored=0)
    got = linear_per_sample_stats(hidden, weight, targets, stats=("loss",), score_dtype=torch.float8_e4m3fn)
    (rows, row_scale), (columns, column_scale) = to_float8(hidden), to_float8(weight)
    rounded = rows.double() * row_scale.double()[:, None], columns.double() * column_scale.double()[:, None]
    exact = stored(*rounded, targets, None, ("loss",), torch.float64)[0]
    # the tensor cores of Hopper keep some fourteen bits of a sum of float8 products
    assert (got.loss.double() - exact).abs().max() < 2e-2


def test_results_do_not_depend_on_the_number_of_multiprocessors(monkeypatch):
    hidden, weight, targets, _ = problem(1000, 512, 30_000, torch.bfloat16)
    tables = []
    for count in (runtime.multiprocessors(CUDA), 17, 1):
        monkeypatch.setattr(linear, "multiprocessors", lambda device, count=count: count)
        tables.append(linear_per_sample_stats(hidden, weight, targets, stats=SELECTION).loss)
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])


def test_graph_replays_with_new_inputs():
    hidden, weight, targets, _ = problem(1000, 512, 30_000, torch.bfloat16)
    state = AdaSelectionState.create(("big_loss", "grad_norm"), CUDA)

    def step():
        return fused_linear_select(hidden, weight, targets, 0.1, methods=("big_loss", "grad_norm"), state=state)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = problem(1000, 512, 30_000, torch.bfloat16)
    hidden.copy_(other[0])
    targets.copy_(other[2])
    before = state.buffer.clone()
    graph.replay()
    torch.cuda.synchronize()
    got = [x.clone() for x in captured]
    state.buffer.copy_(before)
    for mine, right in zip(got, step(), strict=True):
        assert torch.equal(mine, right)


def test_two_streams_at_once():
    problems = [problem(1000, 512, 30_000, torch.bfloat16) for _ in range(2)]
    alone = [fused_linear_select(h, w, y, 0.1) for h, w, y, _ in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(10):
        together = []
        for stream, (h, w, y, _) in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                together.append(fused_linear_select(h, w, y, 0.1))
        torch.cuda.synchronize()
        for mine, right in zip(together, alone, strict=True):
            assert torch.equal(mine.indices, right.indices)
            assert torch.equal(mine.losses, right.losses)


def test_compiles_whole():
    hidden, weight, targets, _ = problem(300, 256, 5000, torch.bfloat16)

    @torch.compile(fullgraph=True)
    def step(hidden, weight, targets):
        picked = fused_linear_select(hidden, weight, targets, 0.1)
        return picked.indices, picked.losses * 2

    indices, doubled = step(hidden, weight, targets)
    right = fused_linear_select(hidden, weight, targets, 0.1)
    assert torch.equal(indices, right.indices)
    assert torch.equal(doubled, right.losses * 2)


def test_memory_is_a_few_numbers_a_row():
    hidden, weight, targets, _ = problem(8192, 1024, 128_256, torch.bfloat16)
    linear_per_sample_stats(hidden, weight, targets, stats=SELECTION)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_per_sample_stats(hidden, weight, targets, stats=SELECTION)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    _, want = row_stats.stats_code(ALL[:1] + ALL[2:3], 0.0)
    rows = len(linear.used_rows(want))
    # partials of at most MOST_SPLITS shares, and the results; the logits would take two gigabytes
    assert extra <= (linear.MOST_SPLITS * rows + 2) * 8192 * 4 + 2**20
