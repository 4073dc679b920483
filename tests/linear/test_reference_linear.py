"""The oracle of the linear classifier: sets of classes make up the whole, and the approximations are what they say."""

import math

import pytest
import torch
from torch import Tensor

from adaselect_kernels import (
    AdaSelectionState,
    fused_linear_select,
    linear_per_sample_stats,
    reference,
    select_from_losses,
)
from adaselect_kernels.linear import SCORE_DTYPES, partial_stats, to_float8
from adaselect_kernels.options import PARTIALS, STATS

IGNORED = -7
ALL = list(range(len(STATS)))
HUGE = 1e200  # its square is infinite in float64


def logits_of(hidden, weight, bias=None, softcap=0.0, logit_scale=1.0) -> Tensor:
    u = logit_scale * (hidden @ weight.T + (0.0 if bias is None else bias))
    return softcap * torch.tanh(u / softcap) if softcap else u


def problem(generator, rows: int, classes: int, width: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        3 * draw(rows, width),
        draw(classes, width),
        torch.randint(classes, (rows,), generator=generator),
        draw(classes),
    )


def combined(hidden, weight, targets, bias, sizes, smoothing, softcap, logit_scale) -> Tensor:
    """All statistics, from the partials of shards of these sizes."""
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    partials = [
        reference.linear_partials(
            hidden, shard, targets, shard_bias, None, None, first, 1, ALL, IGNORED, smoothing, softcap, logit_scale
        )
        for first, shard, shard_bias in zip(firsts, weight.split(sizes), bias.split(sizes), strict=True)
    ]
    return reference.combine_partials(torch.stack(partials), targets, len(weight), ALL, IGNORED, smoothing)


def close(got: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11, equal_nan=True, msg=lambda m: f"{what}: {m}")


# one shard, uneven ones, one class a shard; smoothing, cap and scale each off and on
@pytest.mark.parametrize("sizes", [[11], [4, 1, 6], [1] * 11])
@pytest.mark.parametrize(("smoothing", "softcap", "scale"), [(0.0, 0.0, 1.0), (0.1, 0.0, 0.5), (0.2, 4.0, -1.5)])
def test_shards_combine_to_the_statistics_of_the_stored_logits(generator, sizes, smoothing, softcap, scale):
    hidden, weight, targets, bias = problem(generator, 44, 11)
    targets[:11] = torch.arange(11)  # a target in every shard
    targets[11:14] = IGNORED
    # columns that make logits infinite: +-inf at classes 2 and 8 of rows 20 to 31, -inf at all classes of rows 32 to 35
    hidden[:, :2], weight[:, :2] = 0.0, 0.0
    weight[2, 0], weight[8, 0], weight[:, 1] = HUGE, -HUGE, -HUGE
    hidden[20:26, 0], hidden[26:32, 0], hidden[32:36, 1] = HUGE, -HUGE, HUGE
    targets[20:32] = torch.tensor([2, 8, 0, 5, 10, 2] * 2)
    targets[32:34] = torch.tensor([0, 3])
    hidden[36:38, 3] = math.nan
    hidden[38:42] = 0.0  # with the bias below, rows whose classes 3, 4 and 10 tie
    bias[[3, 4, 10]] = bias.max() + 1
    targets[38:42] = torch.tensor([3, 4, 10, 2])
    bias[5] = -math.inf
    got = combined(hidden, weight, targets, bias, sizes, smoothing, softcap, scale)
    z = logits_of(hidden, weight, bias, softcap, scale)
    expected = reference.per_sample_stats(z, targets, ALL, "token", IGNORED, smoothing)
    for name, row, right in zip(STATS, got, expected, strict=True):
        close(row, right, name)


@pytest.mark.parametrize("nan_class", [0, 3, 6])
def test_one_nan_logit_spoils_its_row_in_whichever_shard_it_is(generator, nan_class):
    hidden, weight, targets, bias = problem(generator, 7, 7)
    targets = torch.arange(7)
    bias[nan_class] = math.nan
    got = combined(hidden, weight, targets, bias, [3, 4], 0.1, 0.0, 1.0)
    z = logits_of(hidden, weight, bias)
    close(got, reference.per_sample_stats(z, targets, ALL, "token", IGNORED, 0.1))


def test_one_class(generator):
    hidden, weight, targets, bias = problem(generator, 4, 1)
    got = combined(hidden, weight, targets, bias, [1], 0.1, 0.0, 1.0)
    close(got, reference.per_sample_stats(logits_of(hidden, weight, bias), targets, ALL, "token", IGNORED, 0.1))
    assert got[STATS.index("margin")].isposinf().all()


def test_a_target_outside_the_classes_is_nan_in_its_row_alone(generator):
    hidden, weight, targets, bias = problem(generator, 6, 5)
    right = combined(hidden, weight, targets, bias, [2, 3], 0.0, 0.0, 1.0)
    wrong = targets.clone()
    wrong[1], wrong[4] = 5, -1
    got = combined(hidden, weight, wrong, bias, [2, 3], 0.0, 0.0, 1.0)
    assert got[:, [1, 4]].isnan().all()
    assert torch.equal(got[:, [0, 2, 3, 5]], right[:, [0, 2, 3, 5]])


def test_partials_are_what_their_table_says(generator):
    hidden, weight, _, bias = problem(generator, 1, 9)
    z = logits_of(hidden, weight, bias)[0]
    seen = torch.arange(1, 9, 3)  # classes 1, 4, 7 of nine; the target is the middle one
    got = reference.linear_partials(
        hidden, weight[seen], torch.tensor([4]), bias[seen], None, None, 1, 3, ALL, IGNORED, 0.1, 0.0, 1.0
    )
    others = z[[1, 7]]
    x = others - others.max()
    expected = {
        "max": others.max(), "sum": x.exp().sum(), "sum_sq": (2 * x).exp().sum(), "sum_ex": (x.exp() * x).sum(),
        "second": others.min(), "before": z[1], "sum_x": x.sum(), "target": z[4], "count": 2.0, "nan": 0.0,
    }  # fmt: skip
    close(got[:, 0], torch.tensor([float(expected[name]) for name in PARTIALS], dtype=torch.float64))


def test_gradients_of_shards_are_those_of_the_whole(generator):
    hidden, weight, targets, bias = problem(generator, 8, 9)
    targets[2] = IGNORED
    row_weight = torch.randn(8, generator=generator, dtype=torch.float64).where(targets != IGNORED, 0.0)
    smoothing, softcap, scale, z_loss = 0.1, 5.0, 0.7, 0.01
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    z = logits_of(leaves[0], leaves[1], leaves[2], softcap, scale)
    lse = z.logsumexp(1)
    target = z.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    losses = (1 - smoothing) * (lse - target) + smoothing * (lse - z.mean(1)) + z_loss * lse.square()
    expected = torch.autograd.grad((row_weight * losses).sum(), leaves)
    shards = [
        reference.linear_loss_backward(
            row_weight, hidden, weight[a:b], targets, lse.detach(), bias[a:b], a, 9, smoothing, softcap, scale, z_loss,
            [True] * 3,
        )
        for a, b in ((0, 2), (2, 9))
    ]  # fmt: skip
    close(shards[0][0] + shards[1][0], expected[0], "hidden")
    close(torch.cat([shards[0][1], shards[1][1]]), expected[1], "weight")
    close(torch.cat([shards[0][2], shards[1][2]]), expected[2], "bias")


APPROXIMATED = ("loss", "lse", "grad_norm", "entropy", "confidence")


@pytest.mark.parametrize("stride", [2, 5])
def test_equal_logits_lose_nothing_to_a_stride(stride):
    hidden, weight, bias = torch.zeros(13, 3), torch.zeros(13, 3), torch.full((13,), 1.5)
    keywords = {"bias": bias, "stats": APPROXIMATED, "label_smoothing": 0.1, "impl": "reference"}
    exact = linear_per_sample_stats(hidden, weight, torch.arange(13), **keywords)
    strided = linear_per_sample_stats(hidden, weight, torch.arange(13), vocab_stride=stride, **keywords)
    for name in APPROXIMATED:
        torch.testing.assert_close(getattr(strided, name), getattr(exact, name), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("stride", "softcap"), [(2, None), (3, 4.0)])
def test_a_stride_scales_the_sums_of_what_it_sees_and_keeps_the_target(generator, stride, softcap):
    hidden, weight, targets, bias = problem(generator, 26, 13)
    targets[:13], targets[20] = torch.arange(13), IGNORED
    keywords = {"bias": bias, "softcap": softcap, "logit_scale": 0.5, "ignore_index": IGNORED, "impl": "reference"}
    keywords["label_smoothing"] = 0.1
    got = linear_per_sample_stats(hidden, weight, targets, stats=APPROXIMATED, vocab_stride=stride, **keywords)
    z = logits_of(hidden, weight, bias, softcap or 0.0, 0.5)
    seen = torch.zeros(13, dtype=torch.bool)
    seen[::stride] = True
    for i in range(26):
        y = int(targets[i])
        if y == IGNORED:
            assert all(getattr(got, name)[i] == 0 for name in APPROXIMATED)
            continue
        others = z[i, seen & (torch.arange(13) != y)]
        scale, e_y, e = 12 / len(others), z[i, y].exp(), others.exp()
        s1, s2 = scale * e.sum(), scale * e.square().sum()
        d = s1 + e_y
        right = {
            "loss": d.log() - 0.9 * z[i, y] - 0.1 * (scale * others.sum() + z[i, y]) / 13,
            "lse": d.log(),
            "grad_norm": (s1.square() + s2).sqrt() / d,
            "entropy": d.log() - (scale * (e * others).sum() + e_y * z[i, y]) / d,
            "confidence": e_y / d,
        }
        for name, value in right.items():
            close(getattr(got, name)[i], value, f"{name} of row {i}")


def test_a_nan_in_the_target_is_seen_through_a_stride(generator):
    hidden, weight, _, bias = problem(generator, 3, 9)
    bias[3] = math.nan  # not among the classes 0, 4 and 8 that are seen
    got = linear_per_sample_stats(
        hidden, weight, torch.tensor([3, 4, 5]), bias=bias, vocab_stride=4, stats=("loss",), impl="reference"
    )
    assert got.loss.isnan().tolist() == [True, False, False]
    partials = partial_stats(
        reference, hidden, weight, torch.tensor([3, 4, 5]), bias, 0, [0], IGNORED, 0.0, 0.0, 1.0, vocab_stride=4
    )
    assert partials[PARTIALS.index("nan")].tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", SCORE_DTYPES)
def test_score_dtype_gives_the_statistics_of_the_rounded_tensors(generator, dtype):
    hidden, weight, targets, bias = (t.float() if t.is_floating_point() else t for t in problem(generator, 20, 9))
    keywords = {"stats": STATS, "label_smoothing": 0.1, "impl": "reference"}
    got = linear_per_sample_stats(hidden, weight, targets, bias=bias, score_dtype=dtype, **keywords)
    if dtype == torch.float8_e4m3fn:
        (h, h_scale), (w, w_scale) = to_float8(hidden), to_float8(weight)
        rounded, classifier = h.float() * h_scale[:, None], w.float() * w_scale[:, None]
    else:
        rounded, classifier, bias = hidden.to(dtype).float(), weight.to(dtype).float(), bias.to(dtype).float()
    expected = linear_per_sample_stats(rounded, classifier, targets, bias=bias, **keywords)
    exact = linear_per_sample_stats(hidden, weight, targets, bias=bias, **keywords)
    for name in STATS:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got.loss, exact.loss, rtol=1e-4)  # it was rounded
    twice = linear_per_sample_stats(hidden.double(), weight.double(), targets, score_dtype=dtype, impl="reference")
    assert twice.loss.dtype == torch.float64


def test_a_weight_kept_in_score_dtype_is_taken_as_it_is(generator):
    hidden, weight, targets, bias = (t.float() if t.is_floating_point() else t for t in problem(generator, 20, 9))
    keywords = {"score_dtype": torch.bfloat16, "impl": "reference", "stats": STATS}
    expected = linear_per_sample_stats(hidden, weight, targets, bias=bias, **keywords)
    kept = weight.bfloat16()
    for b in (bias, bias.bfloat16()):
        got = linear_per_sample_stats(hidden, kept, targets, bias=b, **keywords)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(TypeError, match="dtype of hidden"):
        linear_per_sample_stats(hidden, kept, targets, impl="reference")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_float8_rounds_within_half_a_step(generator, dtype):
    rows = (torch.randn(40, 33, generator=generator) * torch.logspace(-6, 4, 40)[:, None]).to(dtype)
    rows[0], rows[1, 1:] = 0.0, 0.0
    rows[2] *= torch.logspace(-5, 0, 33).to(dtype)  # a row that reaches below float8's normal numbers
    values, scale = to_float8(rows)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    back = values.double() * scale.double()[:, None]
    # three bits of mantissa: 2^-4 of a normal number, 2^-10 of the unit below; one rounding of the division
    allowed = torch.maximum(rows.double().abs() * 2**-4, scale.double()[:, None] * 2**-10) * (1 + 1e-6)
    assert ((back - rows.double()).abs() <= allowed).all()
    assert torch.equal(values.double().abs().amax(1)[1:], torch.full((39,), 448.0, dtype=torch.float64))


def test_selection_and_positions_under_approximations(generator):
    hidden, weight, targets, _ = (t.float() if t.is_floating_point() else t for t in problem(generator, 24, 9))
    hidden, targets = hidden.view(8, 3, -1), targets.view(8, 3)
    targets[1, 1], targets[5] = IGNORED, IGNORED
    common = {"ignore_index": IGNORED, "vocab_stride": 3, "score_dtype": torch.bfloat16, "impl": "reference"}
    tokens = linear_per_sample_stats(hidden, weight, targets, unit="token", **common)
    kept = (targets != IGNORED).sum(1).clamp(min=1)
    samples = linear_per_sample_stats(hidden, weight, targets, **common)
    torch.testing.assert_close(samples.loss, tokens.loss.view(8, 3).sum(1) / kept)
    torch.testing.assert_close(samples.grad_norm, tokens.grad_norm.view(8, 3).square().sum(1).sqrt() / kept)
    methods = ("big_loss", "grad_norm", "uniform")
    ours, theirs = AdaSelectionState.create(methods, seed=3), AdaSelectionState.create(methods, seed=3)
    got = fused_linear_select(hidden, weight, targets, 0.5, methods=methods, state=ours, **common)
    losses = samples.loss.clone()
    losses[5] = math.nan  # an ignored row, for a function that knows no targets
    expected = select_from_losses(
        losses, 0.5, grad_norms=samples.grad_norm, methods=methods, state=theirs, impl="reference"
    )
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.scores, expected.scores)
    assert torch.equal(ours.buffer, theirs.buffer)
    assert int(got.n_valid) == 7


@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        ({"vocab_stride": 0}, ValueError, "vocab_stride must be 1 or below the 6 classes"),
        ({"vocab_stride": 6}, ValueError, "below the 6 classes, got 6"),
        ({"vocab_stride": 2.0}, TypeError, "vocab_stride must be an int"),
        ({"vocab_stride": 2, "stats": ("margin", "loss", "correct")}, ValueError, "margin, correct need the largest"),
        ({"score_dtype": torch.float32}, ValueError, "score_dtype must be None or one of"),
    ],
)
def test_refused_approximations(keywords, error, match):
    with pytest.raises(error, match=match):
        linear_per_sample_stats(torch.ones(2, 3), torch.ones(6, 3), torch.tensor([0, 1]), impl="reference", **keywords)
