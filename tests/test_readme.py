"""The README: its code runs, its names exist, its commands are targets of the Makefile."""

import pathlib
import re

import pytest
import torch

import adaselect_kernels

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_example_and_its_naive_equivalent_run():
    assert len(BLOCKS) == 2
    namespace = {}
    exec(BLOCKS[0], namespace)
    assert len(namespace["chosen"]) == 38
    assert namespace["state"].step.item() == 2
    assert namespace["model"].weight.grad is not None
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 8
    namespace |= {
        "logits": torch.randn(128, 10),
        "weights": torch.full((3,), 1 / 3),
        "previous_losses": torch.ones(3),
    }
    exec(BLOCKS[1], namespace)
    assert len(namespace["chosen"]) == 38


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize("name", sorted(set(re.findall(r"^\| `(\w+)\(", README, re.M))))
def test_functions_of_the_table_are_public(name):
    assert hasattr(adaselect_kernels, name)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
