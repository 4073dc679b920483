"""Without the compiled extension, and without Triton, the package imports, works, and says what is missing."""

import subprocess
import sys
import textwrap

import pytest

BLOCK = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked or name in blocked:
            raise ImportError(f"{name} is blocked")

blocked = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
"""

PROGRAM = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in blocked else real(name, *rest)
import torch
import adaselect_kernels as ours
logits, targets = torch.randn(50, 6), torch.randint(6, (50,))
state = ours.AdaSelectionState.create(("big_loss", "uniform"))
chosen = ours.fused_select(logits, targets, 0.2, methods=state.methods, state=state)
right = ours.fused_select(logits, targets, 0.2, methods=state.methods, impl="reference", seed=0)
assert torch.equal(chosen.indices, right.indices)
assert ours.per_sample_stats(logits, targets).loss.shape == (50,)
compiled = torch.compile(lambda z: ours.select_topk(z, 5), fullgraph=True, backend="eager")
assert torch.equal(compiled(logits[:, 0]), ours.select_topk(logits[:, 0], 5))
print("triton" in sys.modules, "adaselect_kernels._C" in sys.modules)
for impl in ("cpu", "triton"):
    try:
        ours.select_topk(logits[:, 0], 5, impl=impl)
        print(impl, "works")
    except RuntimeError as error:
        print(impl, error)
"""


def run(blocked: str) -> str:
    program = textwrap.dedent(BLOCK + PROGRAM)
    done = subprocess.run([sys.executable, "-c", program, blocked], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("blocked", ["adaselect_kernels._C", "adaselect_kernels._C,triton"])
def test_a_package_without_its_extension_works_and_says_why(blocked):
    out = run(blocked)
    assert "impl='cpu' is not available for cpu: the compiled extension is missing or does not load" in out
    assert "adaselect_kernels._C is blocked" in out
    assert "reference: available" in out


def test_a_package_without_triton_works_and_says_why():
    assert "impl='triton' is not available for cpu: the package triton is not installed" in run("triton")


def test_importing_the_package_imports_neither_triton_nor_a_plotting_library():
    program = "import sys, adaselect_kernels; print([m for m in ('triton', 'matplotlib', 'rich', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
