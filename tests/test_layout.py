"""Imports point one way, and MONAI is never one of them."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "maisi_diffusers"
MAY_IMPORT = {
    "models": set(),
    "schedulers": set(),
    "imaging": set(),
    "anatomy": {"files", "imaging"},
    "phantom": {"imaging", "anatomy"},
    "loaders": {"models", "schedulers"},
    "pipelines": {"files", "models", "schedulers", "imaging", "anatomy", "loaders"},
    "training": {"files", "models", "schedulers", "imaging", "anatomy", "phantom", "loaders", "pipelines"},
}
# The command line may use them all, and what the package itself says, such as its version.
MAY_IMPORT["cli"] = {"", "files", *MAY_IMPORT}


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
