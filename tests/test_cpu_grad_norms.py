"""CPU operators of per-sample gradient norms against the float64 oracle, element by element, on fresh random inputs."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaselect_kernels import dispatch, reference
from tests.oracle import EPS32

pytestmark = pytest.mark.skipif(dispatch.EXTENSION is None, reason="the compiled extension is missing")
C = dispatch.EXTENSION
FORMS = ("direct", "gram", "auto")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def randn(generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def check(got: Tensor, oracle: Tensor, dtype: torch.dtype, absolute: Tensor | float = 0.0, terms: int = 1) -> None:
    """Relative error of every norm at most 1e-6 (float64: 1e-12), of the squared norm twice that.

    absolute: the oracle of the absolute inputs, sums of `terms` terms. Where it is further above the oracle than terms of
    random signs put it, the sums cancel, and a rounding of a term shows as many times more.
    """
    assert got.dtype == compute(dtype)
    assert got.shape == oracle.shape
    cancelled = (absolute / (terms * oracle)).sqrt().nan_to_num(nan=1.0).clamp(min=1)
    allowed = 2 * (1e-12 if dtype == torch.float64 else 1e-6) * oracle * cancelled + torch.finfo(torch.float32).tiny
    error = (got.double() - oracle).abs()
    worst = int((error - allowed).argmax()) if len(error) else 0
    assert (error <= allowed).all(), (
        f"sample {worst}: {got[worst]:.9g}, oracle {oracle[worst]:.9g}, error {error[worst] / oracle[worst]:.3g}"
    )


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values as strided, misaligned and stride-0 views."""
    last = tensor.dim() - 1
    spaced = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan, dtype=tensor.dtype)
    spaced[..., 1::2] = tensor
    shifted = torch.full((tensor.numel() + 1,), math.nan, dtype=tensor.dtype)
    shifted[1:] = tensor.flatten()
    return {
        "contiguous": tensor,
        "transposed": tensor.transpose(1, last).contiguous().transpose(1, last),
        "batch last": tensor.movedim(0, -1).contiguous().movedim(-1, 0),
        "spaced": spaced[..., 1::2],
        "misaligned": shifted[1:].view(tensor.shape),
        "expanded": tensor[:1].expand(tensor.shape),
    }


def pairs(generator, one: Tensor, two: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every layout of either tensor once, matched at random."""
    ones, twos = list(layouts(one).values()), list(layouts(two).values())
    return [(a, twos[i]) for a, i in zip(ones, torch.randperm(len(twos), generator=generator).tolist(), strict=True)]


def check_linear(a: Tensor, g: Tensor, weight: bool, bias: bool) -> None:
    oracle = reference.linear_grad_sq_norms(a.double(), g.double(), weight, bias, "auto")
    absolute = reference.linear_grad_sq_norms(a.double().abs(), g.double().abs(), weight, bias, "auto")
    for form in FORMS:
        check(C.linear_grad_sq_norms(a, g, weight, bias, form), oracle, g.dtype, absolute, g.shape[1])


def conv_forms(kernel, stride, padding, dilation, *rest) -> tuple[str, ...]:
    return (*FORMS, "winograd") if (kernel, stride, dilation) == ([3, 3], [1, 1], [1, 1]) else FORMS


def check_conv(x: Tensor, g: Tensor, *rest) -> None:
    oracle = reference.conv_grad_sq_norms(x.double(), g.double(), *rest, "auto")
    absolute = reference.conv_grad_sq_norms(x.double().abs(), g.double().abs(), *rest, "auto")
    for form in conv_forms(*rest):
        check(C.conv_grad_sq_norms(x, g, *rest, form), oracle, g.dtype, absolute, math.prod(g.shape[2:]))


def check_embedding(ids: Tensor, g: Tensor, padding_idx: int) -> None:
    oracle = reference.embedding_grad_sq_norms(ids, g.double(), padding_idx)
    absolute = reference.embedding_grad_sq_norms(ids, g.double().abs(), padding_idx)
    check(C.embedding_grad_sq_norms(ids, g, padding_idx), oracle, g.dtype, absolute, g.shape[1])


def check_affine(x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: bool, bias: bool) -> None:
    y, centre, scale = g.double(), 0.0 if mean is None else mean.double(), 1.0 if rstd is None else rstd.double()
    double = [None if s is None else s.double() for s in (mean, rstd)]
    oracle = reference.affine_grad_sq_norms(x.double(), y, *double, weight, bias)
    hat = (x.double().abs() + abs(centre)) * abs(scale)
    absolute = reference.affine_grad_sq_norms(hat, y.abs(), None, None, weight, bias)
    check(C.affine_grad_sq_norms(x, g, mean, rstd, weight, bias), oracle, g.dtype, absolute, g.shape[1])


# ---- linear

# N, T, d, p: one position; nothing a multiple of a tile; exactly tiles; a single feature; more positions than one block of
# products; two stripes of a Gram matrix; vectors of several blocks, in several blocks of columns.
LINEAR = (
    (5, 1, 37, 19),
    (3, 7, 1, 1),
    (4, 48, 32, 24),
    (3, 61, 45, 33),
    (2, 53, 1, 70),
    (2, 301, 17, 5),
    (1, 531, 9, 300),
    (2, 1100, 6, 7),
    (2, 41, 1100, 2055),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEAR)
def test_linear(generator, shape, dtype):
    n, t, d, p = shape
    a, g = randn(generator, n, t, d, dtype=dtype), randn(generator, n, t, p, dtype=dtype)
    for weight, bias in itertools.product((False, True), repeat=2):
        check_linear(a, g, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_of_any_layout(generator, dtype):
    a, g = randn(generator, 3, 29, 21, dtype=dtype), randn(generator, 3, 29, 18, dtype=dtype)
    for x, y in pairs(generator, a, g):
        check_linear(x, y, True, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
# Short sequences take the norms apart from the gradient, long ones together; the last spans several chunks of samples.
@pytest.mark.parametrize("shape", [*LINEAR, (3, 260, 70, 50), (40, 300, 64, 48)])
def test_linear_with_the_gradients_of_the_batch(generator, shape, bias, dtype):
    n, t, d, p = shape
    a, g = randn(generator, n, t, d, dtype=dtype), randn(generator, n, t, p, dtype=dtype)
    got = C.linear_grads_and_sq_norms(a, g, bias)
    oracle = reference.linear_grads_and_sq_norms(a.double(), g.double(), bias)
    absolute = reference.linear_grad_sq_norms(a.double().abs(), g.double().abs(), True, bias, "auto")
    check(got[0], oracle[0], dtype, absolute, t)
    eps = torch.finfo(dtype).eps
    sum_eps = torch.finfo(compute(dtype)).eps * math.sqrt(n * t)
    terms = (g.double().abs().flatten(0, 1).mT @ a.double().abs().flatten(0, 1), g.double().abs().sum((0, 1)))
    for mine, right, size in zip(got[1:], oracle[1:], terms, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == right.shape
        assert ((mine.double() - right).abs() <= eps * right.abs() + sum_eps * size[: len(right)]).all()


# ---- convolution


def conv_arguments(generator, n, channels, features, space, kernel, stride, padding, dilation, groups, dtype):
    x = randn(generator, n, channels, *space, dtype=dtype)
    positions = [
        (size + 2 * pad - dil * (k - 1) - 1) // step + 1
        for size, k, step, pad, dil in zip(space, kernel, stride, padding, dilation, strict=True)
    ]
    g = randn(generator, n, features, *positions, dtype=dtype)
    return x, g, list(kernel), list(stride), list(padding), list(dilation), groups


# channels, features, space, kernel, stride, padding, dilation, groups
CONV = {
    "plain": (17, 13, (9, 11), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "strided": (9, 20, (12, 11), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "stride beyond the kernel": (5, 7, (13, 14), (2, 1), (3, 4), (0, 1), (1, 1), 1),
    "dilated": (6, 9, (12, 13), (3, 2), (1, 2), (2, 1), (2, 3), 1),
    "padding beyond the input": (3, 4, (2, 3), (3, 3), (1, 1), (4, 5), (1, 1), 1),
    "kernel of the whole input": (8, 10, (4, 5), (4, 5), (1, 1), (0, 0), (1, 1), 1),
    "pointwise": (33, 18, (7, 6), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "pointwise, strided": (33, 18, (7, 6), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "pointwise, padded to its own size": (5, 4, (3,), (1,), (2,), (1,), (1,), 1),
    "pointwise, one position of padding": (5, 4, (1,), (1,), (3,), (1,), (1,), 1),
    "pointwise, padded": (5, 4, (4, 3), (1, 1), (2, 1), (1, 1), (1, 1), 1),
    "grouped": (12, 18, (8, 7), (3, 3), (1, 2), (1, 1), (1, 1), 3),
    "grouped, wide": (40, 44, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "depthwise": (19, 19, (9, 10), (3, 3), (1, 1), (1, 1), (1, 1), 19),
    "depthwise, two features a channel": (9, 18, (9, 10), (5, 2), (2, 1), (2, 0), (1, 2), 9),
    # 3 x 3 of stride 1: tiles of 4 x 4 positions that are full, that are not, one position, padding beyond a tile, more
    # row groups than are live at once
    "full tiles": (16, 24, (8, 12), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "cut tiles": (9, 7, (7, 13), (3, 3), (1, 1), (0, 2), (1, 1), 1),
    "one position": (19, 5, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1), 1),
    "tiles of padding": (6, 10, (2, 3), (3, 3), (1, 1), (6, 5), (1, 1), 1),
    "many features": (20, 131, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1d": (10, 12, (301,), (5,), (2,), (2,), (1,), 1),
    "1d, two stripes": (4, 60, (1100,), (2,), (1,), (0,), (1,), 1),
    "2d, several stripes": (2, 60, (33, 32), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3d": (4, 6, (5, 6, 7), (3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 2), 1),
    "3d, one plane out": (4, 6, (3, 6, 7), (3, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 1),
    "3d, depthwise": (16, 16, (4, 5, 6), (3, 3, 2), (1, 1, 1), (1, 1, 0), (1, 1, 1), 16),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONV)
def test_conv(generator, case, dtype):
    channels, features, space, *options = CONV[case]
    arguments = conv_arguments(generator, 3, channels, features, space, *options, dtype)
    for weight, bias in ((True, True), (True, False), (False, True)):
        check_conv(*arguments, weight, bias)


@pytest.mark.parametrize("case", ["plain", "strided", "pointwise, strided", "cut tiles", "grouped", "depthwise", "3d"])
def test_conv_of_any_layout(generator, case):
    channels, features, space, *options = CONV[case]
    x, g, *rest = conv_arguments(generator, 3, channels, features, space, *options, torch.float32)
    for a, b in pairs(generator, x, g):
        check_conv(a, b, *rest, True, True)


def test_winograd_over_more_tiles_than_one_sum(generator):
    x, g, *rest = conv_arguments(generator, 1, 3, 5, (93, 90), (3, 3), (1, 1), (1, 1), (1, 1), 1, torch.float32)
    oracle = reference.conv_grad_sq_norms(x.double(), g.double(), *rest, True, False, "auto")
    check(C.conv_grad_sq_norms(x, g, *rest, True, False, "winograd"), oracle, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_transposed_convolution_by_swapped_roles(generator, form):
    layer = torch.nn.ConvTranspose2d(6, 9, 3, stride=2, padding=1, output_padding=1, groups=3, bias=False).double()
    x = randn(generator, 4, 6, 5, 7)
    out = layer(x)
    g = randn(generator, *out.shape)
    oracle = []
    for i in range(4):
        (found,) = torch.autograd.grad(layer(x[i : i + 1]), layer.weight, g[i : i + 1])
        oracle.append(found.square().sum())
    got = C.conv_grad_sq_norms(g, x, [3, 3], [2, 2], [1, 1], [1, 1], 3, True, False, form)
    check(got, torch.stack(oracle).detach(), torch.float64)


# ---- embedding and affine


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("padding_idx", [-1, 0, 3])
@pytest.mark.parametrize(("t", "d", "words"), [(1, 1, 4), (23, 37, 6), (70, 130, 5), (40, 8, 1000)])
def test_embedding(generator, t, d, words, padding_idx, ids_dtype, dtype):
    ids = torch.randint(words, (5, t), generator=generator, dtype=ids_dtype)
    g = randn(generator, 5, t, d, dtype=dtype)
    check_embedding(ids, g, padding_idx)
    for view in layouts(g).values():
        check_embedding(ids.mT.contiguous().mT, view, padding_idx)
    check_embedding(ids[:1].expand(5, t), g, padding_idx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 1, 9), (3, 50, 70), (2, 37, 1), (2, 9, 33), (2, 1030, 12)])
def test_affine(generator, shape, dtype):
    values, g = randn(generator, *shape, dtype=dtype), randn(generator, *shape, dtype=dtype)
    n, t, c = shape
    kinds = {  # whole, of a LayerNorm, of a GroupNorm, of a BatchNorm's constants, and every other element of a wider one
        "whole": randn(generator, n, t, c, dtype=compute(dtype)),
        "a position": randn(generator, n, t, 1, dtype=compute(dtype)).expand(shape),
        "a channel": randn(generator, n, 1, c, dtype=compute(dtype)).expand(shape),
        "shared": randn(generator, c, dtype=compute(dtype)).expand(shape),
        "spaced": randn(generator, n, t, 2 * c, dtype=compute(dtype))[..., ::2],
    }
    for statistic, (x, y) in itertools.product(kinds.values(), pairs(generator, values, g)):
        for mean, rstd in ((statistic, None), (None, statistic), (statistic, statistic.square()), (None, None)):
            for weight, bias in ((True, True), (True, False), (False, True)):
                check_affine(x, y, mean, rstd, weight, bias)


# ---- what every operator keeps


def every_call(generator, dtype=torch.float32, n=6):
    """name -> arguments, among them each form on shapes where it is the natural one."""
    sequences = randn(generator, n, 70, 40, dtype=dtype), randn(generator, n, 70, 36, dtype=dtype)
    short = randn(generator, n, 9, 90, dtype=dtype), randn(generator, n, 9, 110, dtype=dtype)
    conv = conv_arguments(generator, n, 12, 20, (9, 8), (3, 3), (2, 1), (1, 1), (1, 1), 2, dtype)
    depthwise = conv_arguments(generator, n, 20, 20, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1), 20, dtype)
    image = conv_arguments(generator, n, 12, 20, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1), 2, dtype)
    ids = torch.randint(7, (n, 70), generator=generator)
    ids[:, 0] = 3  # not the padding
    mean = randn(generator, n, 70, 1, dtype=compute(dtype)).expand(n, 70, 40)
    other = randn(generator, n, 70, 40, dtype=dtype)
    return [
        *(("linear_grad_sq_norms", (*pair, True, True, form)) for pair in (sequences, short) for form in FORMS),
        *(("linear_grads_and_sq_norms", (*pair, bias)) for pair in (sequences, short) for bias in (False, True)),
        *(("conv_grad_sq_norms", (*given, True, True, form)) for given in (conv, depthwise) for form in FORMS),
        ("conv_grad_sq_norms", (*image, True, True, "winograd")),
        ("embedding_grad_sq_norms", (ids, sequences[0], 2)),
        ("affine_grad_sq_norms", (sequences[0], other, mean, mean.square(), True, True)),
        ("affine_grad_sq_norms", (sequences[0].mT.contiguous().mT, other, None, None, True, False)),
    ]


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads_or_runs(generator, dtype):
    before = torch.get_num_threads()
    try:
        for name, arguments in every_call(generator, dtype, n=13):
            found = []
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                found.append(tensors(getattr(C, name)(*arguments)))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_and_the_dispatcher(generator, dtype):
    whole = set()
    for name, arguments in every_call(generator, dtype, n=2):
        operator = getattr(torch.ops.adaselect, name)
        # every test of opcheck once an operator; that the fake is right of every form and type
        some = {"test_utils": "test_faketensor"} if name in whole or dtype != torch.float32 else {}
        torch.library.opcheck(operator, arguments, **some)
        whole.add(name)
        for a, b in zip(tensors(operator(*arguments)), tensors(getattr(C, name)(*arguments)), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_nothing_to_sum_gives_zeros(generator, dtype):
    for n, t in ((0, 5), (3, 0), (0, 0)):
        a, g = randn(generator, n, t, 4, dtype=dtype), randn(generator, n, t, 6, dtype=dtype)
        x = randn(generator, n, 4, t + 2, dtype=dtype)
        zeros = torch.zeros(n, dtype=compute(dtype))
        for form in FORMS:
            assert torch.equal(C.linear_grad_sq_norms(a, g, True, True, form), zeros)
            if t == 0 or n == 0:
                conv = (x, g.mT, [3], [1], [0], [1], 1, True, True, form)
                assert torch.equal(C.conv_grad_sq_norms(*conv), zeros)
        norms, weight_grad, bias_grad = C.linear_grads_and_sq_norms(a, g, True)
        assert torch.equal(norms, zeros)
        assert norms.dtype == zeros.dtype
        assert torch.equal(weight_grad, torch.zeros(6, 4, dtype=dtype))
        assert torch.equal(bias_grad, torch.zeros(6, dtype=dtype))
        assert torch.equal(C.embedding_grad_sq_norms(torch.zeros(n, t, dtype=torch.long), g, -1), zeros)
        assert torch.equal(C.affine_grad_sq_norms(g, g, None, None, True, True), zeros)
    ones = torch.ones(2, 3, 0, dtype=dtype), torch.ones(2, 3, 5, dtype=dtype)  # no weight, a bias of 5
    for form in FORMS:
        assert C.linear_grad_sq_norms(*ones, True, True, form).tolist() == [45.0, 45.0]
    norms, weight_grad, bias_grad = C.linear_grads_and_sq_norms(*ones, True)
    assert norms.tolist() == [45.0, 45.0]
    assert weight_grad.shape == (5, 0)
    assert bias_grad.tolist() == [6.0] * 5


@pytest.mark.parametrize("form", [*FORMS, "winograd"])
@pytest.mark.parametrize("scale", [1e-1, 1e-3])
def test_gradients_that_cancel_over_positions(generator, form, scale):
    """g_t = h_t + scale * small_t, with sum_t h_t a_t^T nearly 0: as good as PyTorch's own gradient of each sample."""
    n, t, d, p = 6, 48, 40, 36
    half = randn(generator, n, t // 2, p)
    g = (torch.cat([half, -half], 1) + scale * randn(generator, n, t, p)).float()
    a = randn(generator, n, t // 2, d).repeat(1, 2, 1).float()
    oracle = reference.linear_grad_sq_norms(a.double(), g.double(), True, True, form)
    peer = torch.stack([g[i].mT @ a[i] for i in range(n)]).double().square().sum((1, 2))
    peer += g.sum(1).double().square().sum(1)
    allowed = 2 * ((peer - oracle) / oracle).abs().max() + 8 * EPS32
    for got in (
        *(C.linear_grad_sq_norms(a, g, True, True, form) for _ in range(form in FORMS)),
        C.linear_grads_and_sq_norms(a, g, True)[0],
    ):
        assert (((got - oracle) / oracle).abs() <= allowed).all()
    image = a.mT.reshape(n, d, 6, 8), g.mT.reshape(n, p, 6, 8)
    oracle = reference.conv_grad_sq_norms(
        image[0].double(), image[1].double(), [3, 3], [1, 1], [1, 1], [1, 1], 1, True, False, form
    )
    got = C.conv_grad_sq_norms(*image, [3, 3], [1, 1], [1, 1], [1, 1], 1, True, False, form)
    assert (((got - oracle) / oracle).abs() <= allowed + 2e-6).all()


def test_not_a_number_and_infinity_reach_the_norm_of_their_sample_only(generator):
    for name, arguments in every_call(generator):
        for bad in (math.nan, math.inf):
            for which in (0, 1):
                given = list(arguments)
                if not given[which].is_floating_point():
                    continue
                given[which] = given[which].clone()
                given[which][(2, *(0,) * (given[which].dim() - 1))] = bad
                right, got = tensors(getattr(C, name)(*arguments))[0], tensors(getattr(C, name)(*given))[0]
                assert not got[2].isfinite(), name
                others = torch.arange(len(got)) != 2
                assert torch.equal(got[others], right[others]), name


@pytest.mark.parametrize("form", ["direct", "gram", "winograd"])
def test_auto_takes_the_form_of_less_arithmetic(generator, form):
    """Few positions of many features are for Gram matrices, many of few for the gradient itself."""
    channels, kernel, size = {"direct": (16, 5, 32), "gram": (256, 3, 4), "winograd": (16, 3, 32)}[form]
    x = randn(generator, 2, channels, size, size, dtype=torch.float32)
    options = ([kernel, kernel], [1, 1], [kernel // 2, kernel // 2], [1, 1], 1)
    assert C.conv_grad_form(x, x, *options) == form
    got = C.conv_grad_sq_norms(x, x, *options, True, False, "auto")
    assert torch.equal(got, C.conv_grad_sq_norms(x, x, *options, True, False, form))
    if form == "winograd":
        return
    t, d = (16, 512) if form == "gram" else (512, 16)
    a, g = randn(generator, 2, t, d, dtype=torch.float32), randn(generator, 2, t, d, dtype=torch.float32)
    assert C.linear_grad_form(a, g) == form
    got = C.linear_grad_sq_norms(a, g, True, False, "auto")
    assert torch.equal(got, C.linear_grad_sq_norms(a, g, True, False, form))


MEMORY = """
import resource, torch
from adaselect_kernels import dispatch

torch.set_num_threads(1)  # one scratch
C = dispatch.EXTENSION
a, g = torch.randn(64, 40, 640), torch.randn(64, 40, 640)  # N p d is 105 MB, p d 1.6 MB, the inputs 6.5 MB each
x = torch.randn(1, 12_000, 8)  # T x T is 576 MB
for call in (
    lambda: C.linear_grad_sq_norms(a, g, True, True, "direct"),
    lambda: C.linear_grad_sq_norms(a, g, True, True, "gram"),
    lambda: C.linear_grads_and_sq_norms(a, g, True),
    lambda: C.linear_grad_sq_norms(x, x, True, False, "gram"),
):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_holds_no_gradient_of_a_sample_a_batch_and_no_square_of_a_length():
    """What each call, in the order of what they need, adds to the peak of a fresh process."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    direct, gram, fused, long = map(int, done.stdout.split())
    assert direct < 4 << 20
    assert gram < 4 << 20
    assert fused < 12 << 20
    assert long < 16 << 20


# ---- faults


def dropped_last_position(activations, grads, *rest):
    return C.linear_grad_sq_norms(activations[:, :-1], grads[:, :-1], *rest)


def half_precision_gram(activations, grads, weight, bias, form):
    a, g = activations.bfloat16() @ activations.bfloat16().mT, grads.bfloat16() @ grads.bfloat16().mT
    return (a.float() * g.float()).sum((1, 2))


def swapped_samples(*arguments):
    return C.linear_grad_sq_norms(*arguments).flip(0)


@pytest.mark.parametrize("fault", [dropped_last_position, half_precision_gram, swapped_samples])
def test_a_planted_fault_is_caught(generator, fault):
    a, g = randn(generator, 3, 61, 45, dtype=torch.float32), randn(generator, 3, 61, 33, dtype=torch.float32)
    oracle = reference.linear_grad_sq_norms(a.double(), g.double(), True, False, "auto")
    check(C.linear_grad_sq_norms(a, g, True, False, "auto"), oracle, torch.float32)
    with pytest.raises(AssertionError, match="sample"):
        check(fault(a, g, True, False, "auto"), oracle, torch.float32)


A, G, X, Y = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2, 4, 6, 6), torch.zeros(2, 8, 4, 4)
IDS = torch.zeros(2, 3, dtype=torch.long)
CONV_OPTIONS = ([3, 3], [1, 1], [0, 0], [1, 1], 1, True, True, "auto")


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("linear_grad_sq_norms", (A, G, True, True, "ghost"), ValueError, "'direct', .*, 'auto'; got 'ghost'"),
        ("linear_grad_sq_norms", (A, G, True, True, "winograd"), ValueError, "'winograd' is for 3 x 3 convolutions"),
        ("linear_grad_sq_norms", (A[0], G, True, True, "auto"), ValueError, r"\[N, T, d\].*\[3, 4\]"),
        ("linear_grad_sq_norms", (A, G[:1], True, True, "auto"), ValueError, r"\[1, 3, 5\]"),
        ("linear_grad_sq_norms", (A, G[:, :2], True, True, "auto"), ValueError, r"\[2, 2, 5\]"),
        ("linear_grad_sq_norms", (A.double(), G, True, True, "auto"), TypeError, "same dtype, got Double and Float"),
        ("linear_grad_sq_norms", (A.long(), G.long(), True, True, "auto"), TypeError, "float16, bfloat16, float32"),
        ("linear_grad_sq_norms", (A.to("meta"), G, True, True, "auto"), ValueError, "on the cpu, got meta"),
        ("linear_grads_and_sq_norms", (A, G[:, :2], True), ValueError, r"\[2, 2, 5\]"),
        ("linear_grads_and_sq_norms", (A.half(), G, True), TypeError, "same dtype"),
        (
            "conv_grad_sq_norms",
            (X[0], Y[0], *CONV_OPTIONS),
            ValueError,
            r"one to three spatial dimensions|input must be",
        ),
        ("conv_grad_sq_norms", (X, Y[:, :, 1:], *CONV_OPTIONS), ValueError, "4 positions along spatial dimension 0"),
        ("conv_grad_sq_norms", (X, Y, [3], *CONV_OPTIONS[1:]), ValueError, "kernel_size must be 2 integers >= 1"),
        ("conv_grad_sq_norms", (X, Y, [3, 3], [0, 1], *CONV_OPTIONS[2:]), ValueError, "stride must be 2 integers >= 1"),
        ("conv_grad_sq_norms", (X, Y, *CONV_OPTIONS[:2], [-1, 0], *CONV_OPTIONS[3:]), ValueError, "padding must be"),
        ("conv_grad_sq_norms", (X, Y, *CONV_OPTIONS[:3], [1, 0], *CONV_OPTIONS[4:]), ValueError, "dilation must be"),
        ("conv_grad_sq_norms", (X, Y, *CONV_OPTIONS[:4], 3, *CONV_OPTIONS[5:]), ValueError, "groups=3 must divide"),
        ("conv_grad_sq_norms", (X, Y[:1], *CONV_OPTIONS), ValueError, "got shapes"),
        ("conv_grad_sq_norms", (X, Y, *CONV_OPTIONS[:7], "best"), ValueError, "got 'best'"),
        (
            "conv_grad_sq_norms",
            (X, Y[:, :, ::2, ::2], [3, 3], [2, 2], *CONV_OPTIONS[2:7], "winograd"),
            ValueError,
            "stride 1",
        ),
        ("embedding_grad_sq_norms", (IDS.float(), G, -1), TypeError, "int64 or int32, got Float"),
        ("embedding_grad_sq_norms", (IDS[:, :2], G, -1), ValueError, r"ids must be \[N, T\]"),
        ("affine_grad_sq_norms", (A, G, None, None, True, True), ValueError, r"\[N, T, C\]"),
        ("affine_grad_sq_norms", (A, A, A[:, :1], None, True, True), ValueError, "mean must have the shape of grads"),
        ("affine_grad_sq_norms", (A, A, None, A.double(), True, True), TypeError, "rstd must be Float"),
        ("affine_grad_sq_norms", (A.half(), A.half(), A.half(), None, True, True), TypeError, "mean must be Float"),
    ],
)
def test_errors(name, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(C, name)(*arguments)
