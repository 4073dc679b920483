"""Launches of the public calls, recorded without a GPU: how many, in which order, with which grids; and their Python cost."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has no driver to stand in for", allow_module_level=True)

from adaselect_kernels import dispatch, fused_select, per_sample_stats, reference, select_topk
from benchmarks.launches import cpu_batch, host_cost, record

RADIX_SELECT = ["digit_kernel"] * 4 + ["compact_kernel"]  # float32: four digits of 8 bits
LARGE_BATCH = ["moments_kernel", "sums_kernel", "scores_kernel"]


def names(launches):
    return [launch.kernel for launch in launches]


@pytest.mark.parametrize(
    ("n", "classes", "expected"),
    [
        (128, 10, ["fused_kernel"]),  # the paper's setting
        (4096, 10, ["fused_kernel"]),  # the largest single launch
        (4097, 10, ["tile_kernel", *LARGE_BATCH, *RADIX_SELECT]),  # one more row
        (8192, 100, ["tile_kernel", *LARGE_BATCH, *RADIX_SELECT]),
        (128, 128256, ["stream_kernel", "batch_kernel"]),  # long rows
    ],
)
def test_launches_of_a_selection(n, classes, expected):
    logits, targets = cpu_batch(n, classes, torch.bfloat16)
    assert names(record(lambda: fused_select(logits, targets, 0.3, impl="triton"))) == expected


def test_launches_of_statistics_and_top_k():
    logits, targets = cpu_batch(300, 1000)
    (launch,) = record(lambda: per_sample_stats(logits, targets, impl="triton"))
    assert launch.kernel == "tile_kernel"
    assert launch.grid == (75, 1, 1)  # four warps a program, a warp a row
    assert launch.num_warps == 4
    assert launch.source.signature["logits_ptr"] == "*fp32"
    scores = torch.zeros(1 << 20)
    launches = record(lambda: select_topk(scores, 1000, order="index", impl="triton"))
    assert names(launches) == RADIX_SELECT
    assert all(launch.grid == (512, 1, 1) for launch in launches)


def test_few_long_rows_are_split_over_a_whole_gpu():
    logits, targets = cpu_batch(8, 128256)
    (launch,) = record(lambda: per_sample_stats(logits, targets, impl="triton"))
    assert launch.grid == (8 * 31, 1, 1)  # at least 4096 columns each


def test_a_recording_leaves_nothing_behind(generator):
    logits, targets = torch.randn(8, 5, generator=generator), torch.randint(5, (8,), generator=generator)

    def losses():
        return fused_select(logits, targets, 0.5).losses

    right = losses()
    with pytest.raises(ZeroDivisionError):
        record(lambda: (losses(), 1 / 0))
    assert torch.equal(losses(), right)
    expected = reference.per_sample_stats(logits, targets, [0], "sample", -100, 0.0)[0]
    torch.testing.assert_close(right, expected)
    reason = dispatch.unavailable("triton", logits.device)
    assert reason is not None
    with pytest.raises(RuntimeError, match="cuda tensors"):
        fused_select(logits, targets, 0.5, impl="triton")


def test_host_cost_counts_the_work_of_the_call():
    logits, targets = cpu_batch(128, 10)

    def once():
        fused_select(logits, targets, 0.3, impl="triton")

    one = host_cost(once, calls=50, rounds=5)
    two = host_cost(lambda: (once(), once()), calls=50, rounds=5)
    assert 1.0 < one < 10_000.0
    assert 1.3 < two / one < 3.0
