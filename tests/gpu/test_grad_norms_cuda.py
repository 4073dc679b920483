"""On a GPU: per-sample gradient norms as they really run, at real sizes. Collected only where CUDA is available."""

import threading

import pytest
import torch

from adaselect_kernels import dispatch, kernels, reference
from adaselect_kernels.kernels import grad_norms
from tests.oracle import assert_within_budget

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
needs_extension = pytest.mark.skipif(dispatch.CUDA_EXTENSION is None, reason=dispatch.CUDA_EXTENSION_ERROR)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=CUDA, dtype=torch.float32).to(dtype)


def compare(got, oracle, peer, what):
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, oracle, rtol=1e-11, atol=1e-11)
    else:
        assert_within_budget(got, oracle, peer, what)


def wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def gram_peer(a, g, bias=1):
    a, g = wide(a), wide(g)
    return ((a @ a.mT + bias) * (g @ g.mT)).sum((1, 2))


LINEAR = [
    (4096, 1, 768, 768),  # one position
    (64, 7, 1000, 513),  # nothing is a multiple of a block
    (32, 128, 768, 768),  # a small transformer
    (4, 512, 4096, 1024),  # a wide one
    (3, 1000, 300, 700),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["direct", "gram", "auto"])
@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear(dtype, form, shape):
    n, t, p, d = shape
    a, g = normal(n, t, d, dtype=dtype), normal(n, t, p, dtype=dtype)
    oracle = torch.cat([reference.linear_grad_sq_norms(*(x.double() for x in part), True, True, form)
                        for part in zip(a.split(64), g.split(64), strict=True)])  # fmt: skip
    compare(kernels.linear_grad_sq_norms(a, g, True, True, form), oracle, gram_peer(a, g), form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("shape", [*LINEAR[1:], (9, 600, 40, 50), (2, 2048, 1024, 1024)], ids=str)
def test_fused(monkeypatch, dtype, layout, shape):
    monkeypatch.setattr(grad_norms, "fused_pays", lambda *shape: True)
    n, t, p, d = shape
    a, g = normal(n, t, d, dtype=dtype), normal(n, t, p, dtype=dtype)
    if layout == "transposed":
        a, g = (x.mT.contiguous().mT for x in (a, g))
    got = kernels.linear_grads_and_sq_norms(a, g, True)
    oracle = reference.linear_grads_and_sq_norms(a.double(), g.double(), True)
    peer = reference.linear_grads_and_sq_norms(wide(a), wide(g), True)
    for name, mine, right, eager in zip(("sq_norms", "weight", "bias"), got, oracle, peer, strict=True):
        compare(mine, right, eager.to(mine.dtype), name)


CONVS = [
    # input, output channels, kernel, stride, padding, dilation, groups
    ((8, 3, 224, 224), 64, (7, 7), (2, 2), (3, 3), (1, 1), 1),  # the first layer of a ResNet
    ((16, 64, 32, 32), 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((16, 256, 14, 14), 512, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    ((16, 512, 7, 7), 512, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((16, 96, 30, 29), 96, (7, 7), (1, 1), (3, 3), (1, 1), 96),  # depthwise
    ((16, 64, 30, 29), 96, (3, 3), (1, 2), (1, 0), (2, 1), 32),  # grouped
    ((8, 40, 1000), 80, (5,), (2,), (2,), (3,), 1),
    ((4, 8, 10, 20, 20), 16, (3, 3, 3), (1, 2, 2), (1, 1, 1), (1, 1, 1), 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["direct", "gram", "auto"])
@pytest.mark.parametrize("case", CONVS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution(dtype, form, case, channels_last):
    shape, out, kernel, *geometry = case
    if form == "gram" and shape[2] > 100:
        form = "auto"  # a hundred million products of pairs of positions prove no more
    if channels_last and len(kernel) != 2:
        pytest.skip("channels_last is a layout of two dimensions")
    x = normal(*shape, dtype=dtype)
    with torch.device("meta"):
        weight = torch.empty(out, shape[1] // geometry[-1], *kernel)
        sizes = reference._CONV[len(kernel)](torch.empty(shape), weight, None, *geometry).shape
    g = normal(*sizes, dtype=dtype)
    if channels_last:
        x, g = (z.to(memory_format=torch.channels_last) for z in (x, g))
    got = kernels.conv_grad_sq_norms(x, g, kernel, *geometry, True, True, form)
    oracle = reference.conv_grad_sq_norms(x.double(), g.double(), kernel, *geometry, True, True, form)
    allowed = 1e-12 if dtype == torch.float64 else 2e-6 if form == "direct" else 2e-5  # Gram sums cancel
    torch.testing.assert_close(got.double(), oracle, rtol=allowed, atol=0.0)


EMBEDDINGS = [(8, 2048, 4096, 128_256), (64, 512, 768, 30_000), (3, 5000, 100, 7), (5, 1, 33, 10), (2, 4096, 64, 1)]


@pytest.mark.parametrize("impl", ["triton", pytest.param("cuda", marks=needs_extension)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EMBEDDINGS, ids=str)
@pytest.mark.parametrize("aligned", [True, False])
def test_embedding(impl, dtype, shape, aligned):
    n, t, d, vocabulary = shape
    ids = torch.randint(vocabulary, (n, t), device=CUDA)
    g = normal(n, t, d + 3, dtype=dtype)[:, :, 3:] if not aligned else normal(n, t, d, dtype=dtype)
    operator = dispatch.resolve(impl, CUDA, "embedding_grad_sq_norms").embedding_grad_sq_norms
    for these in (ids, ids.int()):
        got = operator(these, g, int(ids[0, 0]))
        oracle = segment_oracle(ids, g.double(), int(ids[0, 0]))
        compare(got, oracle, segment_oracle(ids, wide(g), int(ids[0, 0])), impl)
        assert torch.equal(got, operator(these, g, int(ids[0, 0])))


def segment_oracle(ids, g, padding_idx):
    """By a table a sample: the oracle's T x T products do not fit."""
    out = []
    for sample, rows in zip(ids, g, strict=True):
        values, inverse = sample.unique(return_inverse=True)
        sums = torch.zeros(len(values), g.shape[2], dtype=g.dtype, device=CUDA).index_add_(0, inverse, rows)
        out.append(sums[values != padding_idx].square().sum())
    return torch.stack(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 512, 768), (16, 3136, 64), (500, 1, 100)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_affine(dtype, shape, layout):
    x, g = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    if layout == "transposed":
        x, g = (z.mT.contiguous().mT for z in (x, g))
    mean = wide(x).mean(2, keepdim=True).expand(shape)
    rstd = wide(x).var(2, keepdim=True).add(1e-5).rsqrt().expand(shape)
    oracle = reference.affine_grad_sq_norms(x.double(), g.double(), mean.double(), rstd.double(), True, True)
    peer = reference.affine_grad_sq_norms(wide(x), wide(g), mean, rstd, True, True)
    compare(kernels.affine_grad_sq_norms(x, g, mean, rstd, True, True), oracle, peer, "affine")


def everything(a, g, x, h, ids):
    results = [kernels.linear_grad_sq_norms(a, g, True, True, form) for form in ("direct", "gram", "auto")]
    results += kernels.linear_grads_and_sq_norms(a, g, True)
    for groups in (1, 8, 16):
        results.append(kernels.conv_grad_sq_norms(x, h, (3, 3), (1, 1), (1, 1), (1, 1), groups, True, True, "auto"))
    results.append(kernels.embedding_grad_sq_norms(ids, g, 3))
    if dispatch.CUDA_EXTENSION is not None:
        results.append(torch.ops.adaselect_cuda.embedding_grad_sq_norms(ids, g, 3))
    return [*results, kernels.affine_grad_sq_norms(g, g, None, None, True, True)]


def inputs():
    images = normal(8, 16, 20, 20), normal(8, 16, 20, 20)
    return (
        normal(8, 600, 200, dtype=torch.bfloat16), normal(8, 600, 300, dtype=torch.bfloat16), *images,
        torch.randint(50, (8, 600), device=CUDA),
    )  # fmt: skip


def test_repeats_are_bit_identical():
    tensors = inputs()
    first = everything(*tensors)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(*tensors), strict=True))


def test_a_captured_graph_replays_as_eager_does():
    tensors = inputs()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        everything(*tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(*tensors)
    for _ in range(5):
        for tensor, fresh in zip(tensors, inputs(), strict=True):
            tensor.copy_(fresh)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, everything(*tensors), strict=True))


def test_nothing_synchronises_the_host():
    tensors = inputs()
    everything(*tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_and_threads_do_not_disturb_each_other():
    batches = [inputs() for _ in range(4)]
    expected = [everything(*tensors) for tensors in batches]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                got = everything(*batches[i])
                if not all(torch.equal(a, b) for a, b in zip(got, expected[i], strict=True)):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_more_than_two_to_the_31_elements():
    n, t, d = 1100, 512, 4096  # 2.3e9 elements
    a = torch.randn(n, t, d, device=CUDA, dtype=torch.bfloat16)
    g = torch.randn(n, t, 64, device=CUDA, dtype=torch.bfloat16)
    got = {form: kernels.linear_grad_sq_norms(a, g, True, True, form) for form in ("direct", "gram")}
    for rows in (slice(0, 3), slice(1022, 1026), slice(n - 3, n)):  # sample 1024 starts at 2^31
        oracle = reference.linear_grad_sq_norms(a[rows].double(), g[rows].double(), True, True, "direct")
        for form, norms in got.items():
            torch.testing.assert_close(norms[rows].double(), oracle, rtol=1e-4, atol=0.0, msg=form)


def test_memory_of_the_fused_pass_is_not_a_gradient_a_sample():
    a, g = normal(16, 1024, 2048, dtype=torch.bfloat16), normal(16, 1024, 2048, dtype=torch.bfloat16)
    assert grad_norms.fused_pays(1024, 2048, 2048, 2)
    kernels.linear_grads_and_sq_norms(a, g, True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = kernels.linear_grads_and_sq_norms(a, g, True)
    torch.cuda.synchronize()
    outputs = sum(x.numel() * x.element_size() for x in got)
    assert torch.cuda.max_memory_allocated() - before - outputs <= 2 << 20


def test_tf32_is_used_only_when_the_user_allows_it():
    a, g = normal(4, 600, 256), normal(4, 600, 256)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        exact = kernels.linear_grad_sq_norms(a, g, True, False, "direct")
        oracle = reference.linear_grad_sq_norms(a.double(), g.double(), True, False, "direct")
        torch.testing.assert_close(exact.double(), oracle, rtol=1e-6, atol=0.0)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        rounded = kernels.linear_grad_sq_norms(a, g, True, False, "direct")
        torch.testing.assert_close(rounded.double(), oracle, rtol=5e-3, atol=0.0)
        assert not torch.equal(rounded, exact)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@needs_extension
def test_the_cuda_operator_is_right_under_opcheck_and_compile():
    ids, g = torch.randint(9, (4, 50), device=CUDA), normal(4, 50, 16)
    operator = torch.ops.adaselect_cuda.embedding_grad_sq_norms
    torch.library.opcheck(operator, (ids, g, 2), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda ids, g: operator(ids, g * 2, 2), fullgraph=True)
    torch.testing.assert_close(compiled(ids, g), operator(ids, g, 2) * 4)
