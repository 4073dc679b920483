"""The compiled CPU kernels as a module: operators as PyTorch wants them, other instruction sets, direct calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adaselect_kernels.options import METHODS
from tests.cpu_kernels import (
    ALL_STATS,
    DTYPES,
    PLAIN,
    kernels,
    needs_kernels,
    stats_of,
    used_state,
)

pytestmark = needs_kernels

# the other operators: test_cpu_grad_norms.py, linear/
STORED = ["per_sample_stats", "batch_scores", "select_topk", "bank_select", "select_from_losses", "fused_select"]


def opcheck_inputs(generator, layout, with_state):
    logits = torch.randn(6, 5, 4, generator=generator)
    targets = torch.randint(4, (6, 5), generator=generator)
    losses, grad_norms = torch.rand(12, generator=generator), torch.rand(12, generator=generator)
    if layout == "permuted":
        logits = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        targets = targets.t().contiguous().t()
        losses, grad_norms = losses[::2], grad_norms[::2]
    state = used_state(generator) if with_state else None
    codes = list(range(len(METHODS)))
    options = list(PLAIN)
    return {
        "per_sample_stats": (logits, targets, ALL_STATS, "sample", -100, 0.1),
        "batch_scores": (losses, grad_norms, losses > 0.1, state, codes, 3, 5, options),
        "select_topk": (losses, 3, True, "score"),
        "bank_select": (logits[0], torch.tensor([3, 0, 4, 0])[::2], torch.rand(5, generator=generator), 1.5, 1, True),
        "select_from_losses": (losses, grad_norms, state, codes, 3, "index", 5, options),
        "fused_select": (logits, targets, state, codes, 2, "token", "index", -100, 0.0, 5, options),
    }


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("name", STORED)
def test_opcheck(generator, name, layout, with_state):
    arguments = opcheck_inputs(generator, layout, with_state)[name]
    torch.library.opcheck(getattr(torch.ops.adaselect, name).default, arguments)
    direct = getattr(kernels, name)(*opcheck_copy(arguments))
    registered = getattr(torch.ops.adaselect, name)(*opcheck_copy(arguments))
    for one, two in zip(*(x if isinstance(x, tuple) else (x,) for x in (direct, registered)), strict=True):
        assert torch.equal(one, two)


def opcheck_copy(arguments):
    """A fresh state for every call."""
    return [x.clone() if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x for x in arguments]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=250
    )


SET_NAMES = kernels.build_info()["instruction_sets"] if kernels is not None else []


BATCHES = [(129, 1, "float32"), (129, 4, "float64"), (129, 0, "bfloat16"), (9001, 4, "float32"), (2048, 1, "float64")]


# The set that runs in this process has all tests.
@pytest.mark.parametrize("capability", [name for name in SET_NAMES if name != kernels.build_info()["cpu_capability"]])
def test_every_other_instruction_set(capability):
    """Tests of the kernels, on the shapes that exercise each, with a lower instruction set."""
    if SET_NAMES.index(capability) < SET_NAMES.index(kernels.build_info()["cpu_capability"]):
        result = run_python("import adaselect_kernels._C", ADASELECT_CPU_CAPABILITY=capability)
        assert result.returncode != 0
        pytest.skip(f"this machine lacks {capability}; it was refused")
    rows = [f"test_stats[{classes}-{dtype}]" for classes in (3, 17, 129, 4097) for dtype in DTYPES]
    rows += [f"test_non_finite_rows[{classes}-torch.float32]" for classes in (4, 700)]
    rows += ["test_confident_rows_keep_their_digits", "test_strides_change_nothing"]
    selection = [f"test_batch_scores[{n}-{i}-torch.{name}]" for n, i, name in BATCHES]
    selection += [
        "test_chunks_far_from_each_other",
        "test_valid_rows_of_any_alignment",
        "test_baseline_selectors[adaboost-index]",
        "test_noise_is_exact",
    ]
    selection += [f"test_select_topk[4097-{kind}-{dtype}]" for kind in ("heavy ties", "special") for dtype in DTYPES]
    for layout in ("bracket of everything", "few values"):
        selection += [
            f"test_select_topk_of_misleading_orders[4000-{layout}-torch.{real}]" for real in ("float32", "float64")
        ]
    folder = Path(__file__).parent
    names = [f"{folder}/test_cpu_row_stats.py::{test}" for test in rows]
    names += [f"{folder}/test_cpu_selection.py::{test}" for test in selection]
    linear = folder / "linear" / "test_cpu_linear.py"
    names += [f"{linear}::test_{name}" for name in ("statistics", "softcap", "logits_that_are_not_finite")]
    names += [f"{linear}::test_uneven_shards_combine_to_the_statistics"]
    code = f"""
import sys, pytest
from adaselect_kernels.dispatch import EXTENSION
assert EXTENSION.build_info()["cpu_capability"] == {capability!r}
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *{names}]))
"""
    result = run_python(code, ADASELECT_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_unknown_instruction_set_is_refused():
    result = run_python("import torch, adaselect_kernels.ops, adaselect_kernels._C", ADASELECT_CPU_CAPABILITY="sse9")
    assert result.returncode != 0
    assert "ADASELECT_CPU_CAPABILITY=sse9 is not an instruction set of this machine and build; it has" in result.stderr


def test_direct_calls_are_checked():
    """The module's functions are called without functional.py's validation: a mistake must not read out of bounds."""
    logits, targets = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="targets must have the shape"):
        stats_of(logits, targets[:3])
    with pytest.raises(TypeError, match="logits must be float16"):
        stats_of(logits.int(), targets)
    with pytest.raises(TypeError, match="targets must be int64 or int32"):
        stats_of(logits, targets.float())
    with pytest.raises(ValueError, match="unknown statistic 8"):
        stats_of(logits, targets, [8])
    with pytest.raises(ValueError, match=r"k must be in \[1, N\]"):
        kernels.select_topk(torch.zeros(4), 5, True, "index")
    with pytest.raises(ValueError, match="order must be one of"):
        kernels.select_topk(torch.zeros(4), 1, True, "best")
    with pytest.raises(ValueError, match="methods must be distinct"):
        kernels.batch_scores(torch.zeros(4), None, None, None, [0, 0], 1, 0, PLAIN)
    with pytest.raises(ValueError, match="state must be"):
        kernels.batch_scores(torch.zeros(4), None, None, torch.zeros(3), [0], 1, 0, PLAIN)
    with pytest.raises(ValueError, match="needs grad_norms"):
        kernels.batch_scores(torch.zeros(4), None, None, None, [2], 1, 0, PLAIN)
