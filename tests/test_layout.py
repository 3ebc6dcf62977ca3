"""Imports point one way, and MONAI is never one of them."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "maisi_diffusers"
# Modules of the package that import none of its folders, for all of them to use.
BASE = {"files", "memory", "workers"}
MAY_IMPORT = {
    "models": BASE,
    "schedulers": BASE,
    "imaging": BASE,
    "anatomy": {*BASE, "imaging"},
    "phantom": {*BASE, "imaging", "anatomy"},
    "loaders": {*BASE, "models", "schedulers"},
    "pipelines": {*BASE, "models", "schedulers", "imaging", "anatomy", "loaders"},
    "training": {*BASE, "models", "schedulers", "imaging", "anatomy", "phantom", "loaders", "pipelines"},
}
# The command line may use them all, and what the package itself says, such as its version.
MAY_IMPORT["cli"] = {"", *BASE, *MAY_IMPORT}


def imports(path: Path) -> list[tuple[int, str]]:
    """Level and module of every import of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
        elif isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
    return found


def test_every_folder_is_listed():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        for level, module in imports(path):
            top = module.split(".")[0]
            assert top not in ("monai", "maisi_diffusers") or level, f"{path}: {module}"
            if level == 2:
                assert top in MAY_IMPORT[folder], f"{path} imports {top}"
            assert level <= 2, path


@pytest.mark.parametrize("module", sorted(BASE))
def test_base_imports_no_folder(module):
    found = imports(PACKAGE / f"{module}.py")
    assert all(level == 0 and name.split(".")[0] not in ("monai", "maisi_diffusers") for level, name in found)
