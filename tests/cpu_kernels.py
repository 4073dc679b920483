"""What the tests of the compiled CPU kernels share: the module itself, its direct calls and drawn inputs."""

import pytest
import torch

from adaselect_kernels import AdaSelectionOptions, dispatch, fused_select
from adaselect_kernels.options import METHODS, STATS
from tests.oracle import drawn_targets

kernels = dispatch.EXTENSION
needs_kernels = pytest.mark.skipif(kernels is None, reason=dispatch.EXTENSION_ERROR)

ALL_STATS = list(range(len(STATS)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = AdaSelectionOptions().packed
M = len(METHODS)


def cpu_select(*args, **kwargs):
    return fused_select(*args, impl="cpu", **kwargs)


def stats_of(logits, targets, stats=ALL_STATS, unit="sample", ignore_index=-100, label_smoothing=0.0):
    return kernels.per_sample_stats(logits, targets, stats, unit, ignore_index, label_smoothing)


def draw(generator, rows, classes, dtype=torch.float32, scale=3.0, offset=0.0):
    logits = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale + offset).to(dtype)
    return logits, drawn_targets(logits, generator)


def used_state(generator, m=M):
    weights = torch.randn(m, generator=generator).double().log_softmax(0)
    return torch.cat([weights, torch.rand(m, generator=generator).double() + 0.5, torch.tensor([9.0]).double()])
