import os
import shutil

import pytest

from tests.parity.monai_reference import build_networks, network_config, save_checkpoint

from .checkpoints import TINY


@pytest.fixture(scope="session")
def networks():
    """MONAI's networks of the tiny checkpoint."""
    return build_networks("rflow-ct", TINY)


@pytest.fixture(scope="session")
def published(tmp_path_factory, networks):
    """A tiny `rflow-ct` checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("published") / "rflow-ct"
    return save_checkpoint(folder, "rflow-ct", networks, network_config("rflow-ct", TINY))


@pytest.fixture
def checkpoint(published, tmp_path):
    """A copy of it to change, by replacing files."""
    return shutil.copytree(published, tmp_path / "checkpoint", copy_function=os.link)
