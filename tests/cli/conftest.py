from pathlib import Path

import pytest

from maisi_diffusers import MaisiMaskDatabase
from tests.loaders.conftest import checkpoint, networks, published  # noqa: F401, fixtures
from tests.mask_databases import make_database
from tests.tiny import SIZE, SPACING, make_label_map, make_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The repository of a tiny pipeline with a mask database; not to be changed."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipe = make_pipeline()
    anything = dict.fromkeys(("liver", "lung", "bone"), [-2000, 5000])  # of random weights nothing else would pass
    pipe.register_to_config(default_output_size=SIZE, default_spacing=SPACING, quality_thresholds=anything)
    pipe.mask_database = MaisiMaskDatabase(make_database(tmp_path_factory.mktemp("database")))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mask(tmp_path_factory) -> Path:
    """A label map on a grid of the tiny pipeline."""
    path = tmp_path_factory.mktemp("mask") / "mask.nii.gz"
    make_label_map().to_filename(path)
    return path
