"""The operator bank_select: values, ties, layouts and errors; its Triton kernel is in test_triton_bank.py."""

import pytest
import torch

from adaselect_kernels import dispatch
from adaselect_kernels.functional import bank_select
from tests.samplers.bank import DTYPES, LAYOUTS, check, check_ties, draw

IMPLS = ["reference", *(["cpu"] if dispatch.EXTENSION is not None else [])]
# columns around the vector and unrolling widths, and around a program's piece; banks around one block and one program
SHAPES = [(30, 1, 9), (30, 15, 30), (40, 64, 1), (50, 131, 20), (300, 513, 200), (150, 1100, 130)]
SHAPES += [(5000, 3, 4500)]  # more than one program chooses from


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_picks(impl, dtype, generator):
    for i, shape in enumerate(SHAPES):
        n = shape[2]
        for layout in LAYOUTS if n < 1000 else LAYOUTS[:1]:
            features, rows, theta = draw(generator, *shape, dtype, layout)
            for k, largest in ((max(1, n // 6), True), (n, True), (1, False)):
                check(features, rows, theta, 2.5 if i % 2 else 0.0, k, largest, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_earlier_place_and_nan_comes_last(impl, generator):
    check_ties(impl, generator)


@pytest.mark.skipif("cpu" not in IMPLS, reason="needs the compiled extension")
def test_threads_change_no_bit(generator):
    features, rows, theta = draw(generator, 3000, 999, 2000, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(bank_select(features, rows, theta, 300, impl="cpu"))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck_and_the_dispatcher(generator, layout):
    for dtype in (torch.float64, torch.uint8):
        features, rows, theta = draw(generator, 20, 6, 9, dtype, layout)
        arguments = (features, rows if layout == "transposed" else rows.contiguous(), theta, 1.5, 4, True)
        torch.library.opcheck(torch.ops.adaselect.bank_select.default, arguments)
        direct = bank_select(features, rows, theta, 4, norm=1.5)
        registered = torch.ops.adaselect.bank_select(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(direct, registered, strict=True))


def test_compiled_as_one_graph(generator):
    features, rows, theta = draw(generator, 20, 6, 9, torch.float32)
    compiled = torch.compile(
        lambda f, r, t: bank_select(f, r, t, 4, norm=1.5), fullgraph=True, backend="aot_eager", dynamic=False
    )
    expected = bank_select(features, rows, theta, 4, norm=1.5)
    assert all(torch.equal(a, b) for a, b in zip(compiled(features, rows, theta), expected, strict=True))


F, R, T = torch.zeros(5, 2), torch.tensor([0, 1, 4]), torch.zeros(3)
WRONG = {
    "no tensor": (([[0.0]], R, T, 1), {}, TypeError, "features must be a tensor, got list"),
    "ints": ((F.int(), R, T, 1), {}, TypeError, "or uint8, got torch.int32"),
    "images": ((F[None], R, T, 1), {}, ValueError, r"features must be \[N, D\], got shape \(1, 5, 2\)"),
    "rows int32": ((F, R.int(), T, 1), {}, TypeError, "rows must be int64"),
    "rows 2d": ((F, R[None], T, 1), {}, ValueError, r"rows must be \[n\] with n >= 1"),
    "no rows": ((F, R[:0], T, 1), {}, ValueError, r"rows must be \[n\] with n >= 1"),
    "theta": ((F, R, T[:2], 1), {}, ValueError, r"theta must be \[D \+ 1\] = \[3\]"),
    "theta dtype": ((F, R, T.double(), 1), {}, TypeError, "theta must be torch.float32 for features of torch.float32"),
    "k 0": ((F, R, T, 0), {}, ValueError, r"k must be in \[1, n\] = \[1, 3\], got 0"),
    "k 4": ((F, R, T, 4), {}, ValueError, r"k must be in"),
    "k 1.5": ((F, R, T, 1.5), {}, TypeError, "k must be an int"),
    "norm": ((F, R, T, 1), {"norm": "1"}, TypeError, "norm must be a number"),
    "largest": ((F, R, T, 1), {"largest": 1}, TypeError, "largest must be a bool"),
    "device": ((F, R.to("meta"), T, 1), {}, ValueError, "rows must be on the device of features, cpu, got meta"),
    "impl": ((F, R, T, 1), {"impl": "best"}, ValueError, "impl must be one of"),
}


@pytest.mark.parametrize(("arguments", "settings", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        bank_select(*arguments, **settings)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("row", [-1, 5])
def test_rows_outside(impl, row):
    rows = torch.tensor([0, row, 4])
    with pytest.raises(IndexError, match=rf"row {row} at place 1 of the bank is outside \[0, 5\)"):
        bank_select(F, rows, T, 1, impl=impl)


@pytest.mark.skipif("cpu" not in IMPLS, reason="needs the compiled extension")
def test_direct_calls_are_checked():
    """The operator is called without functional.py's validation: a mistake must not read out of bounds."""
    operator = dispatch.EXTENSION.bank_select
    for arguments, error, message in (
        ((F[0], R, T, 1.0, 1, True), ValueError, "features must be"),
        ((F.int(), R, T, 1.0, 1, True), TypeError, "features must be float16"),
        ((F, R.int(), T, 1.0, 1, True), TypeError, "rows must be int64"),
        ((F, R[:0], T, 1.0, 1, True), ValueError, "rows must be"),
        ((F, R, T[:2], 1.0, 1, True), ValueError, "theta must be"),
        ((F, R, T.double(), 1.0, 1, True), TypeError, "theta must be"),
        ((F, R, T, 1.0, 4, True), ValueError, "k must be in"),
    ):
        with pytest.raises(error, match=message):
            operator(*arguments)
