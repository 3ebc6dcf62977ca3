"""The model inside the package."""

from itertools import chain

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from maisi_diffusers import PHANTOM_TINY, MaisiCTPipeline
from maisi_diffusers.anatomy import TUMORS, label_name
from tests.tiny import seeded


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffusionPipeline.from_pretrained(PHANTOM_TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_in_half_precision():
    paths = list(PHANTOM_TINY.rglob("*.safetensors"))
    assert len(paths) == 5
    assert sum(path.stat().st_size for path in paths) <= 25e6
    for path in paths:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}, path
    assert not [path for path in PHANTOM_TINY.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_its_card_is_the_one_in_the_repository():
    card = PHANTOM_TINY.parents[2] / "model_cards" / f"{PHANTOM_TINY.name}.md"
    assert (PHANTOM_TINY / "README.md").read_text() == card.read_text()


def test_it_is_a_maisi_pipeline_in_float32(pipe):
    assert isinstance(pipe, MaisiCTPipeline)
    assert pipe.dtype == torch.float32 and None not in pipe.components.values()


def test_its_label_maps_show_all_regions_and_tumors(pipe):
    database = pipe.mask_database
    grid = {"output_size": tuple(pipe.config.default_output_size), "spacing": tuple(pipe.config.default_spacing)}
    assert len(database) >= 24
    for region in ("head", "chest", "abdomen", "pelvis"):
        assert database.search(body_region=[region], **grid)
    for tumor in TUMORS:
        assert database.search(anatomy_list=[label_name(tumor)], **grid)
    assert database.search(["chest"], ["lung tumor"], **grid)
    for entry in database.entries:
        database.load(entry)


def test_its_anatomy_sizes(pipe):
    sizes = list(chain(*pipe.anatomy_size_conditions))
    assert len(pipe.anatomy_size_conditions) >= 100
    assert min(sizes) == -1 and 0.9 < max(sizes) <= 1


@pytest.mark.slow
def test_a_ct_that_passes_the_quality_check(pipe):
    out = pipe(body_region=["abdomen"], num_inference_steps=8, generator=seeded())
    image, labels = (np.asarray(nifti.dataobj) for nifti in (out.images[0], out.labels[0]))
    assert image.shape == (128, 128, 128) and out.images[0].header.get_zooms() == (3, 3, 3)
    report = pipe.check_quality(image, labels)
    assert report["passed"] and {"liver", "kidney", "bone"} <= set(report["organs"]), report


@pytest.mark.slow
def test_a_label_map_of_asked_sizes(pipe):
    small, large = (
        pipe.generate_masks([("liver", size)], None, 1, seeded(), (128, 128, 128), (3.0, 3.0, 3.0))[0][0]
        for size in (0.1, 0.9)
    )
    voxels = [np.count_nonzero(np.asarray(label_map.dataobj) == 1) for label_map in (small, large)]
    assert voxels[0] < 0.85 * voxels[1]
