"""The examples in the docstrings are right."""

import doctest
import importlib
import pkgutil

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
