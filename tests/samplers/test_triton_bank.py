"""bank_select in Triton's interpreter; in a process of its own: TRITON_INTERPRET=1 python -m pytest <this file>."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1", allow_module_level=True)

from adaselect_kernels.functional import bank_select
from adaselect_kernels.kernels import bank, runtime
from tests.samplers.bank import DTYPES, LAYOUTS, check, check_ties, draw

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_picks(dtype, generator):
    # one column; more than a piece of columns; more rows than are compared in pairs
    for i, shape in enumerate([(30, 1, 9), (40, 513, 10), (50, 20, 140)]):
        for layout in LAYOUTS[: 3 if i == 1 else 1]:
            features, rows, theta = draw(generator, *shape, dtype, layout)
            for k, largest in ((max(1, shape[2] // 6), True), (1, False)):
                check(features, rows, theta, 2.5, k, largest, "triton")


def test_ties_go_to_the_earlier_place_and_nan_comes_last(generator):
    check_ties("triton", generator)


@pytest.mark.parametrize("row", [-1, 5])
def test_rows_outside_are_not_read(row):
    rows = torch.tensor([0, row, 4])
    picked, predictions = bank_select(torch.zeros(5, 2), rows, torch.zeros(3), 2, impl="triton")
    assert predictions.isnan().tolist() == [False, True, False]
    assert picked.tolist() == [0, 4]


def test_one_launch_up_to_a_program_of_rows(monkeypatch, generator):
    assert bank.ONE_PROGRAM_ROWS == 4096
    monkeypatch.setattr(bank, "ONE_PROGRAM_ROWS", 64)
    runtime.forget()
    log = []
    dispatched = runtime.Launch._dispatch

    def record(launch, tensors, options):
        log.append(launch.kernel.fn.__name__)
        return dispatched(launch, tensors, options)

    monkeypatch.setattr(runtime.Launch, "_dispatch", record)
    for n, expected in ((64, ["bank_kernel"]), (65, ["bank_kernel", "block_kernel"])):
        log.clear()
        check(*draw(generator, 300, 3, n, torch.float32), 1.0, 5, True, "triton")
        assert log == expected
    runtime.forget()
