"""The examples in the docstrings and in docs/ are right."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest
import torch

import adaselect_kernels

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(adaselect_kernels.__path__, "adaselect_kernels.")
    if ".kernels" not in name and not name.endswith("._C")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch, "nn": torch.nn})
    assert failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    examples = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) >= 5


DOCS = pathlib.Path(__file__).parents[1] / "docs"
BLOCKS = [
    (page.name, i, block)
    for page in sorted(DOCS.glob("*.md"))
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S))
]


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS, ids=[f"{page}-{i}" for page, i, _ in BLOCKS])
def test_code_in_the_documentation_runs(page, number, block):
    exec(compile(block, f"{page}, block {number}", "exec"), {})
