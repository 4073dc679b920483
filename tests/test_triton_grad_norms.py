"""The Triton kernels of per-sample gradient norms in Triton's interpreter, element by element against the float64 oracle.

Like test_triton_kernels.py it needs a process of its own: TRITON_INTERPRET=1 python -m pytest tests/test_triton_grad_norms.py.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)

from adaselect_kernels import kernels, reference
from adaselect_kernels.kernels import grad_norms, runtime
from tests.oracle import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter: inf - inf

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMS = ["direct", "gram", "auto"]


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched, in order, with their constants."""
    log = []
    dispatched = runtime.Launch._dispatch

    def record(launch, tensors, options):
        log.append((launch.kernel.fn.__name__.removesuffix("_kernel"), launch.grid, launch.constants))
        return dispatched(launch, tensors, options)

    monkeypatch.setattr(runtime.Launch, "_dispatch", record)
    return log


@pytest.fixture
def float32_precision():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def names(launches):
    return [name for name, _, _ in launches]


def normal(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def peer_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(operator, tensors, *rest, peer=None):
    """Compare an operator with the float64 oracle, within twice the error of the oracle's float32 (or `peer`'s)."""
    before = [None if t is None else t.clone() for t in tensors]
    got = getattr(kernels, operator)(*tensors, *rest)
    for tensor, copy in zip(tensors, before, strict=True):
        assert tensor is None or torch.equal(tensor, copy), "an input was written"
    oracle = getattr(reference, operator)(
        *(t if t is None or not t.is_floating_point() else t.double() for t in tensors), *rest
    )
    floats = [t for t in tensors if t is not None and t.is_floating_point()]
    wide = [t if t is None or not t.is_floating_point() else t.to(peer_dtype(t.dtype)) for t in tensors]
    eager = getattr(reference, operator)(*wide, *rest) if peer is None else peer(*wide)
    assert got.dtype == peer_dtype(floats[0].dtype)
    assert got.shape == (floats[0].shape[0],)
    if got.dtype == torch.float64:  # the oracle itself, in another order
        torch.testing.assert_close(got, oracle, rtol=1e-13, atol=1e-13)
    else:
        assert_within_budget(got, oracle, eager, operator)
    return got


# --- linear layers ----------------------------------------------------------------------------------------------------


def gram_peer(weight, bias):
    def peer(a, g):
        a, g = a.to(peer_dtype(a.dtype)), g.to(peer_dtype(g.dtype))
        return (((a @ a.mT) * weight + bias) * (g @ g.mT)).sum((1, 2))

    return peer


LINEAR = [
    (1, 1, 1, 1),  # nothing to sum
    (5, 1, 150, 70),  # one position
    (3, 5, 17, 33),  # blocks barely filled
    (2, 37, 150, 200),  # several tiles of G^T A
    (2, 150, 40, 24),  # several pairs of Gram blocks, several blocks of T
    (1, 200, 20, 24),  # the largest Gram block of 16 bits, twice
    (70, 3, 9, 5),  # more samples than anything else
    (2, 33, 130, 16),  # a second row of tiles with two rows in it
]


@pytest.mark.parametrize(
    ("form", "dtype", "n", "t", "p", "d"),
    [
        (form, dtype, *shape)
        for shape in LINEAR
        for dtype in (DTYPES if shape in LINEAR[2:4] else DTYPES[:2])
        for form in (FORMS if shape[1] <= 5 else FORMS[:2])  # "auto" is one of the two, but for a single position
    ],
)
def test_linear(generator, launches, dtype, form, n, t, p, d):
    a, g = normal(generator, n, t, d, dtype=dtype), normal(generator, n, t, p, dtype=dtype)
    check("linear_grad_sq_norms", (a, g), True, True, form, peer=gram_peer(1, 1) if form != "direct" else None)
    assert names(launches)[0] in {"direct": ("direct",), "gram": ("gram",), "auto": ("outer", "direct", "gram")}[form]
    if form == "auto":
        assert ("outer" in names(launches)) == (t == 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("t", [1, 20])
def test_weight_and_bias_apart(generator, launches, form, weight, bias, t):
    a, g = normal(generator, 3, t, 40), normal(generator, 3, t, 70)
    got = check("linear_grad_sq_norms", (a, g), weight, bias, form, peer=gram_peer(weight, bias))
    if not weight:
        assert set(names(launches)) <= {"affine", "combine"}
    assert weight or bias or not got.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "broadcast", "offset"])
def test_strides(generator, launches, form, layout):
    a, g = normal(generator, 3, 40, 33), normal(generator, 3, 40, 50)
    if layout == "transposed":
        a, g = (x.mT.contiguous().mT for x in (a, g))
    elif layout == "sliced":
        wide = torch.full((6, 80, 70), math.nan)
        wide[::2, ::2, 2:35] = a
        a = wide[::2, ::2, 2:35]
    elif layout == "broadcast":  # position embeddings: the same input for every sample
        a = a[:1].expand(3, 40, 33)
    else:
        flat = torch.full((3 * 40 * 50 + 1,), math.nan)
        flat[1:] = g.flatten()
        g = flat[1:].view(3, 40, 50)
    check("linear_grad_sq_norms", (a, g), True, True, form, peer=gram_peer(1, 1))
    assert launches[0][2]["A_T_LAST"] == launches[0][2]["G_T_LAST"] == (layout == "transposed")


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (3, 0, 5, 6), (3, 4, 0, 6), (3, 4, 5, 0)])
@pytest.mark.parametrize("form", FORMS)
def test_empty_linear(generator, form, shape):
    n, t, p, d = shape
    a, g = normal(generator, n, t, d), normal(generator, n, t, p)
    check("linear_grad_sq_norms", (a, g), True, True, form)
    got = kernels.linear_grads_and_sq_norms(a, g, True)
    for mine, right in zip(got, reference.linear_grads_and_sq_norms(a, g, True), strict=True):
        torch.testing.assert_close(mine, right)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form must be one of 'auto', 'direct', 'gram'; got 'ghost'"):
        kernels.linear_grad_sq_norms(torch.ones(1, 2, 3), torch.ones(1, 2, 3), True, True, "ghost")


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
@pytest.mark.parametrize("form", ["direct", "gram"])
def test_float32_products_are_exact_unless_the_user_allows_tf32(generator, launches, float32_precision, setting, form):
    torch.backends.cuda.matmul.fp32_precision = setting
    for dtype in (torch.float32, torch.bfloat16):
        a, g = normal(generator, 2, 20, 16, dtype=dtype), normal(generator, 2, 20, 16, dtype=dtype)
        kernels.linear_grad_sq_norms(a, g, True, False, form)
        expected = setting if dtype == torch.float32 else "ieee"
        assert [kwargs["PRECISION"] for _, _, kwargs in launches if "PRECISION" in kwargs] == [expected]
        launches.clear()


# --- weight gradient and norms in one pass ----------------------------------------------------------------------------


def check_fused(a, g, bias):
    got = kernels.linear_grads_and_sq_norms(a, g, bias)
    oracle = reference.linear_grads_and_sq_norms(a.double(), g.double(), bias)
    wide = peer_dtype(g.dtype)
    peer = reference.linear_grads_and_sq_norms(a.to(wide), g.to(wide), bias)
    assert [x.dtype for x in got] == [wide, g.dtype, g.dtype]
    assert got[2].shape == (g.shape[2] if bias else 0,)
    for name, mine, right, eager in zip(("sq_norms", "weight", "bias"), got, oracle, peer, strict=True):
        if g.dtype == torch.float64:
            torch.testing.assert_close(mine, right, rtol=1e-13, atol=1e-12)
        else:
            assert_within_budget(mine, right, eager.to(mine.dtype), name)
    return got


FUSED = [
    (3, 128, 70, 40, 2),  # two samples a split
    (2, 70, 150, 200, 1),  # more tiles than multiprocessors
    (7, 64, 16, 16, 4),  # one tile: the samples are split, unevenly
]


@pytest.mark.parametrize(("dtype", "bias"), [(dtype, dtype != torch.float16) for dtype in DTYPES])
@pytest.mark.parametrize(("n", "t", "p", "d", "splits"), FUSED)
def test_fused(generator, launches, monkeypatch, dtype, bias, n, t, p, d, splits):
    monkeypatch.setattr(grad_norms, "fused_pays", lambda *shape: True)
    a, g = normal(generator, n, t, d, dtype=dtype), normal(generator, n, t, p, dtype=dtype)
    tiles = grad_norms._tiling(grad_norms.linear_layer(a, g))[2]
    monkeypatch.setattr(grad_norms, "multiprocessors", lambda device: splits * tiles)
    check_fused(a, g, bias)
    assert launches[0][0] == "direct"
    assert launches[0][2]["WRITE"]
    assert launches[0][1] == (splits * tiles, 1, 1)
    check_fused(a.mT.contiguous().mT, g.expand(n, t, p), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "fused"), [(1, False), (3, False), (512, True)])
def test_one_pass_where_it_pays(generator, launches, dtype, t, fused):
    a, g = normal(generator, 2, t, 48, dtype=dtype), normal(generator, 2, t, 64, dtype=dtype)
    check_fused(a, g, True)
    assert fused == any(kwargs.get("WRITE") for _, _, kwargs in launches)


def test_splits_change_no_norm(generator, monkeypatch):
    """A sample's norm is the same bits alone, in any batch, and however the samples are shared out."""
    monkeypatch.setattr(grad_norms, "fused_pays", lambda *shape: True)
    a, g = normal(generator, 6, 70, 100), normal(generator, 6, 70, 150)
    results = []
    for count in (1, 18, 1000):
        monkeypatch.setattr(grad_norms, "multiprocessors", lambda device, count=count: count)
        results.append(check_fused(a, g, True))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][0], results[2][0])
    alone = kernels.linear_grads_and_sq_norms(a[2:3], g[2:3], True)[0]
    assert torch.equal(alone, results[0][0][2:3])
    direct = kernels.linear_grad_sq_norms(a, g, True, True, "direct")
    assert torch.equal(direct, results[0][0])


def test_the_choice_follows_the_arithmetic():
    assert grad_norms.cheaper_form(2, 512, 512, 2, False) == "gram"
    assert grad_norms.cheaper_form(64, 4096, 4096, 2, False) == "gram"
    assert grad_norms.cheaper_form(4096, 64, 64, 2, False) == "direct"
    assert grad_norms.cheaper_form(12544, 64, 147, 2, True) == "direct"  # the first layer of a ResNet
    assert not grad_norms.fused_pays(16, 4096, 4096, 2)
    assert grad_norms.fused_pays(2048, 4096, 4096, 2)
    for shape in ((7, 30, 50, 4, False), (300, 64, 64, 2, True)):
        costs = grad_norms.form_costs(*shape)
        assert costs["plain"] == 2 * shape[0] * shape[1] * shape[2]
        assert costs["fused"] > costs["direct"] > costs["plain"]


# --- convolutions -----------------------------------------------------------------------------------------------------

CONVS = [
    # input [C, ...], output channels, kernel, stride, padding, dilation, groups, kernel of the direct form
    ((5, 19), 7, (3,), (2,), (1,), (1,), 1, "direct"),  # one dimension
    ((6, 9, 11), 8, (3, 3), (2, 2), (1, 1), (1, 1), 2, "direct"),  # groups, an output that does not cover the input
    ((4, 8, 9), 6, (3, 2), (1, 2), (2, 0), (2, 3), 1, "direct"),  # nothing square
    ((3, 7, 7), 6, (3, 3), (1, 1), (1, 1), (1, 1), 3, "direct"),  # depthwise with a multiplier
    ((8, 7, 6), 4, (3, 2), (2, 1), (0, 1), (1, 2), 4, "depthwise"),  # one output channel of two inputs
    ((5, 6, 7), 9, (1, 1), (1, 1), (0, 0), (1, 1), 1, "direct"),  # a linear layer in disguise
    ((5, 6, 7), 9, (1, 1), (2, 2), (0, 0), (1, 1), 1, "direct"),  # and one that is not
    ((3, 5, 6, 7), 4, (2, 3, 1), (1, 2, 2), (1, 0, 2), (1, 2, 1), 1, "direct"),  # three dimensions
    ((4, 4, 5, 6), 4, (2, 2, 3), (1, 1, 2), (0, 1, 1), (2, 1, 1), 4, "depthwise"),
    ((40, 6, 6), 70, (3, 3), (1, 1), (1, 1), (1, 1), 1, "direct"),  # several tiles
]


def conv_tensors(generator, shape, out, kernel, stride, padding, dilation, dtype, n=2):
    x = normal(generator, n, *shape, dtype=dtype)
    sizes = [
        (size + 2 * pad - dil * (k - 1) - 1) // step + 1
        for size, k, step, pad, dil in zip(shape[1:], kernel, stride, padding, dilation, strict=True)
    ]
    return x, normal(generator, n, out, *sizes, dtype=dtype)


@pytest.mark.parametrize(
    ("form", "dtype", "case"),
    [
        (form, dtype, case)
        for i, case in enumerate(CONVS)
        for dtype in (DTYPES if i in (1, 4) else DTYPES[:1])
        for form in (FORMS if i in (0, 4) else FORMS[:2])  # "auto" is one of the two
    ],
    ids=str,
)
def test_convolution(generator, launches, dtype, form, case):
    shape, out, kernel, stride, padding, dilation, groups, direct = case
    x, g = conv_tensors(generator, shape, out, kernel, stride, padding, dilation, dtype)
    peer = None
    if form != "direct":

        def peer(x, g):
            return conv_gram(x, g, kernel, stride, padding, dilation, groups)

    geometry = (kernel, stride, padding, dilation, groups)
    check("conv_grad_sq_norms", (x, g), *geometry, True, True, form, peer=peer)
    if form != "auto":
        assert names(launches)[0] == (direct if form == "direct" else "gram")
    assert (launches[0][2]["DIMS"] == 0) == ((kernel, stride) == ((1, 1), (1, 1)))


def test_more_channels_than_a_block(generator, launches):
    geometry = (2, 3), (1, 1), (1, 1), (1, 1), 70
    x, g = conv_tensors(generator, (70, 4, 5), 70, *geometry[:4], torch.float32)
    check("conv_grad_sq_norms", (x, g), *geometry, True, True, "auto")
    assert names(launches) == ["depthwise", "affine", "combine"]
    assert launches[0][1] == (2 * 2, 1, 1)


def conv_gram(x, g, kernel, stride, padding, dilation, groups):
    """The Gram form in eager PyTorch: its sums cancel more than those of the direct form."""
    x, g = x.to(peer_dtype(x.dtype)), g.to(peer_dtype(g.dtype))
    columns = []
    for offset in torch.cartesian_prod(*(torch.arange(k) for k in kernel)).view(-1, len(kernel)).tolist():
        padded = torch.nn.functional.pad(x, [side for pad in reversed(padding) for side in (pad, pad)])
        for dim, (at, step, dil, size) in enumerate(zip(offset, stride, dilation, g.shape[2:], strict=True)):
            index = torch.arange(size) * step + at * dil
            padded = padded.index_select(2 + dim, index)
        columns.append(padded.flatten(2).unflatten(1, (groups, -1)))
    a = torch.cat(columns, 2)  # [N, groups, d, T]
    g = g.flatten(2).unflatten(1, (groups, -1))
    return ((a.mT @ a + 1) * (g.mT @ g)).sum((1, 2, 3))


@pytest.mark.parametrize(
    ("layout", "wide"),
    [
        ("channels_last", False),
        ("channels_last", True),
        ("grads channels_last", False),
        ("sliced", True),
        ("broadcast", False),
    ],
)
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("form", ["direct", "gram"])
def test_convolution_layouts(generator, launches, monkeypatch, form, groups, layout, wide):
    if wide:
        monkeypatch.setattr(grad_norms, "WIDE_SPAN", 1)
    geometry = (3, 3), (2, 1), (1, 1), (1, 2)
    x, g = conv_tensors(generator, (6, 9, 8), 6, *geometry, torch.float32)
    if "channels_last" in layout:
        g = g.to(memory_format=torch.channels_last)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "sliced":
        big = torch.full((4, 6, 20, 9), math.nan)
        big[::2, :, 1:19:2, :8] = x
        x = big[::2, :, 1:19:2, :8]
        big = torch.full((2, 6, g.shape[2], 2 * g.shape[3]), math.nan)  # positions without a common stride
        big[..., ::2] = g
        g = big[..., ::2]
    if layout == "broadcast":
        x = x[:1].expand(2, -1, -1, -1)

    def peer(x, g):
        return conv_gram(x, g, *geometry, groups)

    check("conv_grad_sq_norms", (x, g), *geometry, groups, True, True, form, peer=peer)
    assert launches[0][2]["WIDE"] == wide


def test_only_inputs_that_span_two_to_the_31_take_wide_offsets():
    g = torch.empty(1, 1, 1, 1)
    geometry = (1, 1), (1, 1), (1, 1), (1, 1), 1
    for width, wide in ((2**20, False), (2**31, True)):
        x = torch.empty(1).expand(1, 1, 1, width)
        assert not grad_norms.conv_layer(x, g, *geometry).wide  # stride 0 goes nowhere
        x = torch.empty_strided((1, 1, 2, 2), (0, 0, width, 1), device="meta")
        assert grad_norms.conv_layer(x, g, *geometry).wide == wide


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_convolution(generator, shape):
    n, width = shape
    x, g = normal(generator, n, 2, 6), normal(generator, n, 3, width)
    check("conv_grad_sq_norms", (x, g), (3,), (1,), (0,), (1,), 1, True, True, "auto")


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True)])
@pytest.mark.parametrize("groups", [1, 4])
def test_convolution_weight_and_bias_apart(generator, weight, bias, groups):
    geometry = (3, 3), (1, 1), (1, 1), (1, 1)
    x, g = conv_tensors(generator, (4, 6, 6), 4, *geometry, torch.float32)
    check("conv_grad_sq_norms", (x, g), *geometry, groups, weight, bias, "direct")


# --- embedding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "t", "d", "vocabulary"),
    [
        (3, 1, 5, 4),  # one position
        (2, 50, 17, 5),  # many repeats
        (2, 140, 9, 3),  # segments longer than a chunk
        (1, 70, 520, 1000),  # few repeats, more channels than a block
        (2, 64, 8, 1),  # one segment
    ],
)
def test_embedding(generator, dtype, n, t, d, vocabulary):
    ids = torch.randint(vocabulary, (n, t), generator=generator)
    g = normal(generator, n, t, d, dtype=dtype)
    check("embedding_grad_sq_norms", (ids, g), -1)
    check("embedding_grad_sq_norms", (ids.int(), g), vocabulary - 1)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "broadcast"])
def test_embedding_strides(generator, layout):
    ids, g = torch.randint(9, (4, 70), generator=generator), normal(generator, 4, 70, 20)
    if layout == "transposed":
        ids, g = ids.mT.contiguous().mT, g.mT.contiguous().mT
    elif layout == "sliced":
        wide = torch.full((8, 70, 25), math.nan)
        wide[::2, :, 3:23] = g
        ids, g = torch.stack([ids, ids + 1], 2)[..., 0], wide[::2, :, 3:23]
    else:  # position ids
        ids, g = torch.arange(70)[None].expand(4, 70), g[:, :1].expand(4, 70, 20)
    check("embedding_grad_sq_norms", (ids, g), 2)


def test_large_and_negative_ids(generator):
    ids = torch.tensor([[2**62, -5, 2**31, 2**62, -5, 0, 2**63 - 1, -(2**63)]])
    check("embedding_grad_sq_norms", (ids, normal(generator, 1, 8, 6)), -5)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_embedding(generator, shape):
    ids = torch.zeros(shape[:2], dtype=torch.int64)
    check("embedding_grad_sq_norms", (ids, normal(generator, *shape)), -1)


# --- normalisation layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "weight", "bias"),
    [
        *((dtype, True, True) for dtype in DTYPES),
        *((torch.float32, *of) for of in ((True, False), (False, True), (False, False))),
    ],
)
@pytest.mark.parametrize("shape", [(3, 1, 5), (2, 40, 130), (2, 70, 64)], ids=str)
def test_affine(generator, dtype, shape, weight, bias):
    n, t, _ = shape
    x, g = normal(generator, *shape, dtype=dtype), normal(generator, *shape, dtype=dtype)
    mean = normal(generator, n, t, 1, dtype=peer_dtype(dtype)).expand(shape)  # LayerNorm
    rstd = normal(generator, n, 1, shape[2], dtype=peer_dtype(dtype)).exp().expand(shape)  # InstanceNorm
    for means, rstds in ((mean, rstd), (None, rstd), (mean, None), (None, None)):
        check("affine_grad_sq_norms", (x, g, means, rstds), weight, bias)


@pytest.mark.parametrize("layout", ["transposed", "mixed", "sliced"])
def test_affine_strides(generator, layout):
    x, g = normal(generator, 2, 40, 70), normal(generator, 2, 40, 70)
    mean = normal(generator, 2, 40, 70)
    if layout != "sliced":
        g = g.mT.contiguous().mT  # [N, C, T] in memory, as GroupNorm's
        x = x.mT.contiguous().mT if layout == "transposed" else x
    else:
        wide = torch.full((2, 80, 75), math.nan)
        wide[:, ::2, 5:] = x
        x = wide[:, ::2, 5:]
    check("affine_grad_sq_norms", (x, g, mean, mean.exp()), True, True)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_affine(generator, shape):
    x = normal(generator, *shape)
    check("affine_grad_sq_norms", (x, x, None, None), True, True)


# --- all --------------------------------------------------------------------------------------------------------------


def test_repeats_are_bit_identical(generator, monkeypatch):
    a, g = normal(generator, 2, 70, 40), normal(generator, 2, 70, 70)
    x, h = normal(generator, 2, 4, 7, 7), normal(generator, 2, 6, 7, 7)
    ids = torch.randint(7, (2, 70), generator=generator)

    def everything():
        results = [kernels.linear_grad_sq_norms(a, g, True, True, form) for form in FORMS]
        results += kernels.linear_grads_and_sq_norms(a, g, True)
        results += [
            kernels.conv_grad_sq_norms(x, h, (3, 3), (1, 1), (1, 1), (1, 1), 2, True, True, form) for form in FORMS
        ]
        return [
            *results,
            kernels.embedding_grad_sq_norms(ids, g, 3),
            kernels.affine_grad_sq_norms(g, g, None, g, True, True),
        ]

    first = everything()
    for _ in range(2):
        assert all(torch.equal(one, two) for one, two in zip(first, everything(), strict=True))


def test_nothing_is_differentiated(generator):
    a, g = normal(generator, 2, 3, 4).requires_grad_(), normal(generator, 2, 3, 5).requires_grad_()
    results = [kernels.linear_grad_sq_norms(a, g, True, True, "auto"), *kernels.linear_grads_and_sq_norms(a, g, True)]
    results.append(kernels.affine_grad_sq_norms(a, a, None, None, True, True))
    assert not any(result.requires_grad for result in results)


def test_a_sample_that_is_not_finite_spoils_no_other(generator):
    a, g = normal(generator, 3, 40, 20), normal(generator, 3, 40, 30)
    g[1, 7, 3] = math.inf
    for form in FORMS:
        got = kernels.linear_grad_sq_norms(a, g, True, True, form)
        assert not got[1].isfinite()
        fine = torch.tensor([0, 2])
        oracle = reference.linear_grad_sq_norms(a[fine].double(), g[fine].double(), True, True, form)
        torch.testing.assert_close(got[fine].double(), oracle, rtol=1e-5, atol=0.0)


def test_more_partial_sums_than_a_block(generator):
    partials = normal(generator, 3, 2500)
    got, right = grad_norms.combine(partials), partials.double().sum(1)
    assert ((got - right).abs() <= 1e-6 * partials.double().abs().sum(1)).all()
