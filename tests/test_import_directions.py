"""Imports point down only: integrations, cli -> training, samplers, policies ... -> functional -> ops ... -> kernels."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "adaselect_kernels"
LAYERS = (  # top first; a module may import only from layers below its own, or from its own folder
    {"integrations", "cli"},
    {"demo"},
    {"doctor"},
    {"samplers"},
    {"training"},
    {"policies", "distributed", "models"},
    {"grad_norms"},
    {"boundary", "draws"},
    {"losses"},
    {"linear"},
    {"functional"},
    {"dispatch", "checks"},
    {"ops", "reference", "state"},
    {"kernels", "_C"},
    {"options", "record", "_version"},
)
OPTIONAL = {"triton", "lightning", "transformers", "matplotlib", "rich", "sklearn"}


def imports(path: pathlib.Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(unit: str) -> int:
    return next((i for i, layer in enumerate(LAYERS) if unit in layer), -1)


def violations(unit: str, imported: set[str]) -> list[str]:
    """Modules of the package that `unit` imports although they are not below it."""
    wrong = []
    for name in imported:
        parts = name.split(".")
        if parts[0] == "adaselect_kernels" and len(parts) > 1 and layer_of(parts[1]) >= 0:
            same_folder = parts[1] == unit
            if not same_folder and layer_of(parts[1]) <= layer_of(unit):
                wrong.append(name)
    return wrong


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert layer_of(unit) >= 0, f"{unit} has no layer: add it to LAYERS"
    assert violations(unit, imports(path)) == []


def test_an_upward_import_is_caught():
    assert violations("ops", {"adaselect_kernels.functional"}) == ["adaselect_kernels.functional"]
    assert violations("kernels", {"adaselect_kernels.ops.rows_of"}) == ["adaselect_kernels.ops.rows_of"]
    assert violations("functional", {"adaselect_kernels.dispatch", "torch"}) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_optional_packages_are_not_imported_by_the_root(path):
    unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer_of(unit) <= layer_of("demo") or unit == "kernels":
        return  # the top layer and the Triton kernels are imported on demand
    roots = {name.split(".")[0] for name in imports(path, top_level_only=True)}
    assert roots & OPTIONAL == set()
