import importlib.util
from pathlib import Path

import pytest

from tests.loaders.conftest import checkpoint, networks, published  # noqa: F401, fixtures

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="session")
def convert_script():
    """`scripts/convert_maisi_checkpoint.py` as a module."""
    spec = importlib.util.spec_from_file_location("convert_maisi_checkpoint", SCRIPTS / "convert_maisi_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
