"""The gradients of the losses and the masks of the best scores in Triton's interpreter, against the float64 oracle.

As tests/test_triton_kernels.py, in a process of its own: TRITON_INTERPRET=1 python -m pytest tests/linear/test_triton_losses.py.
"""

import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime import interpreter

from adaselect_kernels import reference, selected_cross_entropy, selected_linear_cross_entropy
from adaselect_kernels.checks import selected_count
from adaselect_kernels.functional import select_mask
from adaselect_kernels.kernels import losses, runtime, select
from adaselect_kernels.kernels.losses import cross_entropy_backward, linear_loss_backward
from tests.oracle import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter: overflow, NaN

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PLAIN, EVERYTHING = (0.0, 0.0, 0.0), (0.1, 5.0, 0.02)  # label_smoothing, softcap, z_loss


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Tests change what launches are made of."""
    runtime.forget()
    yield
    runtime.forget()


@pytest.fixture(autouse=True)
def promises_of_alignment_are_kept(monkeypatch):
    """What a kernel says of an address is so: on a GPU a wide load or store of another one is a fault."""
    set_attr = interpreter.TensorHandle.set_attr

    def check(handle, name, values):
        if name == "tt.divisibility":
            assert not (handle.data % np.array(values)).any(), f"not a multiple of {values}"
        return set_attr(handle, name, values)

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", check)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched, in order, with their constants."""
    log = []
    dispatched = runtime.Launch._dispatch

    def record(launch, tensors, options):
        log.append((launch.kernel.fn.__name__.removesuffix("_kernel"), launch.constants))
        return dispatched(launch, tensors, options)

    monkeypatch.setattr(runtime.Launch, "_dispatch", record)
    return log


def names(launches):
    return [name for name, _ in launches]


def weights_and_targets(generator, n, classes, dtype):
    """Weights of both signs, from the third row on with a 0 and (n > 3) a NaN whose target is no class; and targets."""
    weight = torch.rand(n, generator=generator, dtype=reference.compute_dtype(dtype)) * 2 - 1
    targets = torch.randint(classes, (n,), generator=generator)
    if n > 2:
        weight[1] = 0
    if n > 3:
        weight[2], targets[2] = math.nan, 2**62
    return weight, targets


def total(z, targets, weight, label_smoothing, softcap, z_loss):
    """What the gradients are of, as PyTorch is asked for it; rows of weight NaN count 0."""
    z = softcap * (z / softcap).tanh() if softcap > 0 else z
    y = targets.long().clamp(0, z.shape[1] - 1)
    each = F.cross_entropy(z, y, reduction="none", label_smoothing=label_smoothing) + z_loss * z.logsumexp(1).square()
    return (weight.nan_to_num(nan=0.0).to(each.dtype) * each).sum()


def assert_right(got, oracle, peer, what):
    """Within PyTorch's own error; of float64, whose oracle is no more exact than it, within a few roundings."""
    if got.dtype == torch.float64:
        peer = oracle + 8 * torch.finfo(torch.float64).eps * oracle[oracle.isfinite()].abs().max()
    assert_within_budget(got, oracle, peer, what)


def check_gradient(logits, targets, weight, settings=PLAIN):
    """`logits` may be NaN in rows of weight 0."""
    before = logits.clone()
    capped = logits.double() if settings[1] == 0 else settings[1] * (logits.double() / settings[1]).tanh()
    lse = capped.logsumexp(1)
    got = cross_entropy_backward(weight, logits, targets, lse.to(weight.dtype), *settings)
    assert torch.equal(logits.nan_to_num(nan=7.5), before.nan_to_num(nan=7.5)), "logits were written"
    assert got.dtype == logits.dtype
    assert got.is_contiguous()
    assert (got[weight == 0] == 0).all()
    oracle = reference.cross_entropy_backward(weight.double(), logits.double(), targets, lse, *settings)
    peer = logits.nan_to_num(nan=0.0).contiguous().requires_grad_()
    total(peer, targets, weight, *settings).backward()
    assert_right(got, oracle, peer.grad, f"gradient of {tuple(logits.shape)} {logits.dtype}")


def batch(generator, n, classes, dtype, scale=3.0, offset=0.0):
    logits = (torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale + offset).to(dtype)
    weight, targets = weights_and_targets(generator, n, classes, dtype)
    logits[weight == 0] = math.nan
    return logits, targets, weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "classes", "kernel", "settings"),
    [
        (5, 1, "short", PLAIN),  # one class: the gradient is 0
        (131, 10, "short", EVERYTHING),  # more rows than a program, vectors narrower than 16 bytes
        (4, 1000, "short", PLAIN),  # whole vectors
        (4, 1003, "long", EVERYTHING),  # every row aligned differently: head and tail
        (3, 5000, "long", PLAIN),  # two parts
    ],
)
def test_gradients_of_logits(generator, launches, dtype, n, classes, kernel, settings):
    check_gradient(*batch(generator, n, classes, dtype), settings)
    assert names(launches)[-1] == f"{kernel}_gradient"


@pytest.mark.parametrize("settings", [(0.1, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 5.0, 0.0), (0.0, 0.0, 0.5)], ids=str)
def test_each_option_alone(generator, settings):
    check_gradient(*batch(generator, 9, 33, torch.float32), settings)


@pytest.mark.parametrize("classes", [24, 268])  # short rows, and long ones where out cuts vectors where logits do
@pytest.mark.parametrize("layout", ["transposed", "sliced", "broadcast", "offset"])
def test_strides(generator, launches, monkeypatch, classes, layout):
    monkeypatch.setattr(losses, "SHORT_MAX_COLUMNS", 256)
    logits, targets, weight = batch(generator, 6, classes, torch.bfloat16)
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    elif layout == "sliced":
        wide = torch.full((12, classes + 10), math.nan, dtype=logits.dtype)
        wide[::2, 8:-2] = logits
        logits = wide[::2, 8:-2]
    elif layout == "broadcast":
        logits = logits[:1].expand(6, classes)
    else:  # a base that is not 16-byte aligned
        flat = torch.full((6 * classes + 1,), math.nan, dtype=logits.dtype)
        flat[1:] = logits.flatten()
        logits = flat[1:].view(6, classes)
    check_gradient(logits, torch.stack([targets.clamp(max=2**31 - 1), targets], 1).to(torch.int32)[:, 0], weight)
    check_gradient(logits, targets, torch.stack([weight, weight + 1], 1)[:, 0])
    long = classes == 268 and layout == "sliced"
    assert names(launches) == ["long_gradient" if long else "short_gradient"] * 2


@pytest.mark.parametrize(
    ("classes", "transposed", "kernels"),
    [
        (24, False, ["short_gradient"]),  # the sum is in the program
        (1003, False, ["exact_lse", "long_gradient"]),
        (40, True, ["exact_lse", "short_gradient"]),  # a row in two programs
    ],
)
@pytest.mark.parametrize("softcap", [0.0, 2e4])
def test_large_offsets_keep_their_digits(generator, launches, classes, transposed, kernels, softcap):
    # so many rows that the largest error of PyTorch's is no chance
    logits, targets, weight = batch(generator, 160, classes, torch.float32, offset=1e4)
    if transposed:
        logits = logits.t().contiguous().t()
    check_gradient(logits, targets, weight, (0.0, softcap, 0.0))
    assert names(launches) == kernels


def test_large_offsets_of_half_types(generator):
    check_gradient(*batch(generator, 6, 24, torch.bfloat16, scale=100.0, offset=1e4))


def test_an_exact_lse_is_used(generator):
    """float64 lse of float32 logits, where the caller has it: no sum is made again."""
    logits, targets, weight = batch(generator, 6, 24, torch.float32, offset=1e4)
    targets[0] = 5 - 2**32  # no class, though its low half is one
    lse = logits.double().logsumexp(1)
    got = cross_entropy_backward(weight, logits, targets, lse, *PLAIN)
    oracle = reference.cross_entropy_backward(weight.double(), logits.double(), targets, lse, *PLAIN)
    assert_within_budget(got, oracle, oracle.float(), "gradient")


def test_too_many_programs_are_refused():
    row = torch.zeros(1, 1).expand(2**31, 2**13)  # of no memory
    with pytest.raises(ValueError, match="programs"):
        losses.write_gradient(row, row[:, 0], row, row[:, 0], row[:, 0], None, 0, losses.Settings(0, 0, 1, 0, 1))


# --- a classifier -----------------------------------------------------------------------------------------------------


def classifier(generator, n, features, classes, dtype):
    hidden = torch.randn(n, features, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(classes, features, generator=generator, dtype=torch.float64) / 2).to(dtype)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, bias


def small_blocks(monkeypatch, dtype, rows, classes):
    """Blocks of at most `rows` by `classes`."""
    monkeypatch.setattr(losses, "LEAST_CLASSES", classes)
    monkeypatch.setattr(losses, "CLASS_MULTIPLE", 1)
    monkeypatch.setattr(losses, "BLOCK_BYTES", rows * classes * reference.compute_dtype(dtype).itemsize)


def check_linear(row_weight, hidden, weight, targets, bias, scale=1.0, settings=PLAIN, wanted=(True, True, True)):
    """All that is wanted against the oracle; hidden may be NaN in rows of weight 0, no weight may be NaN."""
    z = reference.linear_logits(
        hidden.double(), weight.double(), None if bias is None else bias.double(), settings[1], scale
    )
    lse = z.logsumexp(1)
    label_smoothing, softcap, z_loss = settings
    rest = (0, len(weight), label_smoothing, softcap, scale, z_loss, list(wanted))
    got = linear_loss_backward(row_weight, hidden, weight, targets, lse.to(row_weight.dtype), bias, *rest)
    doubled = [None if t is None else t.double() for t in (row_weight, hidden, weight, bias)]
    oracle = reference.linear_loss_backward(*doubled[:3], targets, lse, doubled[3], *rest)
    peers = [None if t is None else t.nan_to_num(nan=0.0).requires_grad_() for t in (hidden, weight, bias)]
    total(scale * F.linear(*peers), targets, row_weight, *settings).backward()
    dtypes = (reference.compute_dtype(hidden.dtype), weight.dtype, weight.dtype)
    for name, mine, right, peer, want, dtype in zip(
        ("rows", "weight", "bias"), got, oracle, peers, wanted, dtypes, strict=True
    ):
        assert mine.dtype == dtype
        if want:
            assert mine.is_contiguous()
            assert_right(mine, right, peer.grad, name)
        else:
            assert mine.shape == (0,)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "block", "settings"),
    [
        (40, 64, PLAIN),  # one block of classes, all rows: as most calls are
        (9, 16, EVERYTHING),  # several blocks both ways: sums of blocks, the last block cut
    ],
)
def test_gradients_of_a_classifier(generator, launches, monkeypatch, dtype, rows, block, settings):
    small_blocks(monkeypatch, dtype, rows, block)
    hidden, weight, bias = classifier(generator, 20, 16, 37, dtype)
    row_weight, targets = weights_and_targets(generator, 20, 37, dtype)
    row_weight[2] = 0.0  # a NaN would be all there is to see: see below
    hidden[row_weight == 0] = math.nan
    check_linear(row_weight, hidden, weight, targets, bias, 0.5, settings)
    blocks = math.ceil(20 / min(rows, 20)) * math.ceil(37 / min(block, 37))
    assert names(launches) == ["short_gradient"] * blocks


def test_sums_over_blocks_of_rows_are_rounded_once(generator, monkeypatch):
    hidden, weight, bias = classifier(generator, 12, 16, 37, torch.bfloat16)
    row_weight, targets = weights_and_targets(generator, 2, 37, torch.bfloat16)
    row_weight, targets = row_weight.repeat(6), targets.repeat(6)

    def gradients(rows):
        small_blocks(monkeypatch, torch.bfloat16, rows, 40)
        return check_linear(row_weight, hidden, weight, targets, bias)[1:]

    for blocks, whole in zip(gradients(1), gradients(12), strict=True):
        assert (blocks != whole).double().mean() < 0.05, "float32 sums in another order seldom round differently"


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_only_what_is_wanted(generator, monkeypatch, wanted):
    small_blocks(monkeypatch, torch.bfloat16, 16, 16)
    # of few numbers, all of PyTorch's may be lucky
    hidden, weight, bias = classifier(generator, 90, 33, 19, torch.bfloat16)
    row_weight, targets = weights_and_targets(generator, 90, 19, torch.bfloat16)
    row_weight[2], targets[2] = row_weight[0], targets[0]  # no weight is NaN
    check_linear(row_weight, hidden, weight.t().contiguous().t(), targets, bias if wanted[2] else None, wanted=wanted)


def test_a_weight_of_nan_is_seen_everywhere(generator):
    hidden, weight, bias = classifier(generator, 5, 4, 6, torch.float32)
    row_weight, targets = weights_and_targets(generator, 5, 6, torch.float32)
    lse = F.linear(hidden, weight, bias).logsumexp(1)
    rows, by_class, by_bias = linear_loss_backward(
        row_weight, hidden, weight, targets, lse, bias, 0, 6, *PLAIN[:2], 1.0, 0.0, [True] * 3
    )
    assert torch.equal(rows.isnan().any(1), row_weight.isnan())
    assert by_class.isnan().all()
    assert by_bias.isnan().all()


def test_shards_of_the_classes_add_up_to_the_whole(generator):
    """The gradient of the rows is the sum over shards; a target outside a shard is nobody's there."""
    hidden, weight, bias = classifier(generator, 8, 5, 30, torch.float64)
    row_weight, targets = weights_and_targets(generator, 3, 30, torch.float64)
    row_weight, targets = row_weight.repeat(3)[:8], torch.arange(8) * 4
    lse = F.linear(hidden, weight, bias).logsumexp(1)

    def run(first, last):
        here = slice(first, last)
        return linear_loss_backward(
            row_weight, hidden, weight[here], targets, lse, bias[here], first, 30, 0.1, 0.0, 1.0, 0.02, [True] * 3
        )

    whole, parts = run(0, 30), [run(0, 11), run(11, 12), run(12, 30)]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0])
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), whole[i])


@pytest.mark.parametrize("n", [1, 3000, 8192, 1_000_000, 2_000_000_000])
@pytest.mark.parametrize("classes", [1, 4095, 44_738, 128_256, 1_000_000])
@pytest.mark.parametrize("itemsize", [4, 8])
def test_blocks_are_of_bounded_size(n, classes, itemsize):
    rows, block = losses.block_shape(n, classes, itemsize)
    assert 1 <= rows <= n
    assert block * rows * itemsize <= losses.BLOCK_BYTES
    assert block >= min(classes, losses.LEAST_CLASSES * 3 // 4), "blocks of equal size, not one small one at the end"
    if n <= 8192:
        assert rows == n, "the rows of a usual batch stay together"


def test_products_on_cuda_keep_float32_sums_of_half_types(generator, monkeypatch):
    """What a CPU's torch cannot do, in stand-ins that accept what CUDA's products accept, and no more."""

    def mm(a, b, out_dtype=None, *, out):
        assert a.dtype == b.dtype
        assert (out_dtype or a.dtype) == out.dtype
        assert out_dtype in (None, torch.float32)
        return out.copy_(a.float() @ b.float())

    def addmm(added, a, b, out_dtype=None, *, beta=1, out):
        assert a.dtype == b.dtype
        assert added.dtype == out.dtype == (out_dtype or a.dtype)
        return out.copy_(beta * added + a.float() @ b.float())

    monkeypatch.setattr(losses, "_mixes_types", lambda device: True)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    small_blocks(monkeypatch, torch.bfloat16, 9, 16)
    hidden, weight, bias = classifier(generator, 20, 16, 37, torch.bfloat16)
    row_weight, targets = weights_and_targets(generator, 3, 37, torch.bfloat16)
    check_linear(row_weight.repeat(7)[:20], hidden, weight, targets.repeat(7)[:20], bias)


# --- through the public function --------------------------------------------------------------------------------------


def test_a_selected_loss_asked_for_twice(generator):
    logits = torch.randn(9, 21, generator=generator, requires_grad=True)
    targets = torch.randint(21, (9,), generator=generator)
    targets[4] = -100
    indices = torch.tensor([7, 2, 4, -1])
    loss = selected_cross_entropy(logits, targets, indices, label_smoothing=0.1, impl="triton")
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, logits)
    right = F.cross_entropy(logits[[7, 2]], targets[[7, 2]], label_smoothing=0.1)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(once, torch.autograd.grad(right, logits)[0])
    torch.testing.assert_close(twice, 2 * once)
    assert (once[[0, 1, 3, 4, 5, 6, 8]] == 0).all()


def test_empty_places_read_other_rows_and_leave_no_trace(generator):
    """Also where an empty place reads the row of another, or one of NaN."""
    logits = torch.full((5, 21), math.nan)
    logits[[1, 3]] = torch.randn(2, 21, generator=generator)
    targets = torch.randint(21, (5,), generator=generator)
    mine, right = logits.clone().requires_grad_(), logits[[1, 3]].requires_grad_()
    indices = torch.tensor([-1, -1, 3, -1, 1, -1, -1])  # place 1 reads row 1, place 6 too
    selected_cross_entropy(mine, targets, indices, reduction="sum", impl="triton").backward()
    F.cross_entropy(right, targets[[1, 3]], reduction="sum").backward()
    torch.testing.assert_close(mine.grad[[1, 3]], right.grad)
    assert (mine.grad[[0, 2, 4]] == 0).all()


def test_a_selected_loss_of_a_classifier_equals_pytorch(generator):
    hidden, weight, bias = (t.requires_grad_() for t in classifier(generator, 9, 16, 33, torch.float32))
    targets = torch.randint(33, (9,), generator=generator)
    targets[4] = -100
    loss = selected_linear_cross_entropy(
        hidden, weight, targets, torch.tensor([7, -1, 2, 4]), bias=bias, softcap=5.0, label_smoothing=0.1, impl="triton"
    )
    z = 5 * (F.linear(hidden[[7, 2]], weight, bias) / 5).tanh()
    right = F.cross_entropy(z, targets[[7, 2]], label_smoothing=0.1)
    torch.testing.assert_close(loss, right)
    for mine, peer in zip(*(torch.autograd.grad(each, (hidden, weight, bias)) for each in (loss, right)), strict=True):
        torch.testing.assert_close(mine, peer)


# --- masks ------------------------------------------------------------------------------------------------------------


def check_mask(scores, gamma):
    got = select_mask(scores, gamma, per_sequence=True, impl="triton")
    assert got.dtype == torch.bool
    assert got.is_contiguous()
    assert torch.equal(got, reference.select_mask(scores, gamma))
    assert not runtime.counters(torch.device("cpu"), runtime.COUNTERS).any(), "a counter was left behind"


def spoiled(generator, rows, n, dtype, ties=True):
    """Scores with infinities and NaN among them, some with many ties; of more than two rows one without a finite score."""
    scores = torch.randn(rows, n, generator=generator) * 3
    scores = (scores.round() if ties else scores).to(dtype)
    scores[:, ::5], scores[:, 1::7], scores[0, -1] = -math.inf, math.nan, math.inf
    scores[:, 2:4] = torch.tensor([0.0, -0.0])[: max(0, n - 2)]
    if rows > 2:
        scores[1] = math.nan
    return scores


@pytest.mark.parametrize(
    ("dtype", "ties"), [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True), (torch.float64, False)]
)
def test_masks_of_many_rows(generator, launches, dtype, ties):
    check_mask(spoiled(generator, 3, 77, dtype, ties), 0.3)
    assert names(launches) == ["mask_rows"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_several_blocks(generator, launches, monkeypatch, dtype):
    monkeypatch.setattr(select, "MASK_BLOCK", 64)
    check_mask(spoiled(generator, 2, 301, dtype).t().contiguous().t(), 0.3)
    assert names(launches) == ["mask_rows"]


@pytest.mark.parametrize(("dtype", "ties"), [(torch.float32, True), (torch.bfloat16, False), (torch.float64, True)])
def test_a_long_row(generator, launches, monkeypatch, dtype, ties):
    monkeypatch.setattr(select, "LONE_ROW", 300)
    monkeypatch.setitem(select.RADIX, 2**31, select.RADIX[2**31]._replace(block=64, programs=4))
    check_mask(spoiled(generator, 1, 599, dtype, ties), 0.3)  # three programs of several blocks, the last one cut
    assert names(launches) == ["mask_steps"]


def test_long_rows_one_after_another(generator, launches, monkeypatch):
    monkeypatch.setattr(select, "LONG_ROW", 100)
    monkeypatch.setitem(select.RADIX, 2**31, select.RADIX[2**31]._replace(block=64, programs=4))
    check_mask(spoiled(generator, 3, 120, torch.float32).t().contiguous().t(), 0.5)
    assert names(launches) == ["mask_steps"] * 3


@pytest.mark.parametrize("gamma", [0.05, 0.7, 1.0])  # 0.5 and less, halves as they round in float64 (5 * 0.7), all
def test_the_count_of_a_mask_is_rounded_as_on_the_host(generator, gamma):
    scores = torch.randn(10, 10, generator=generator)
    scores[torch.arange(10)[:, None] < torch.arange(10)] = -math.inf  # row i has i + 1 finite scores
    counts = select_mask(scores, gamma, per_sequence=True, impl="triton").sum(1).tolist()
    assert counts == [selected_count(gamma, n) for n in range(1, 11)]
