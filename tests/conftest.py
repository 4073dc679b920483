"""Shared fixtures: uninitialised memory is poisoned, random streams are fresh and printed, debug switches are off."""

import os
import random

# Threads of OpenMP that wait by spinning take the cores from the other worker processes of pytest-xdist; torch reads it once.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# What cannot run in this process is not collected, instead of being reported as skipped: the GPU tests without a GPU, and
# the interpreted Triton tests without TRITON_INTERPRET=1 (`make test` runs them in a process of their own).
collect_ignore = [] if torch.cuda.is_available() else ["gpu"]
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore += [
        "test_triton_kernels.py",
        "test_triton_grad_norms.py",
        "linear/test_triton_losses.py",
        "linear/test_triton_linear.py",
    ]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN (or the largest integer), so that an output nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for variable in ("ADASELECT_IMPL", "ADASELECT_DEBUG"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def one_thread():
    """Of tiny tensors: threads that wait for each other would be most of the time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator(request) -> torch.Generator:
    """Fresh random inputs every run; ADASELECT_TEST_SEED repeats one. The seed is shown when the test fails."""
    seed = int(os.environ.get("ADASELECT_TEST_SEED", random.SystemRandom().getrandbits(32)))
    request.node.add_report_section("setup", "seed", f"ADASELECT_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)
