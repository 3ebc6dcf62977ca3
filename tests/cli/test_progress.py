"""What the lines on a terminal say is so when they say it."""

import pytest

from maisi_diffusers.cli.generation import make_image
from maisi_diffusers.cli.progress import Stages
from tests.tiny import SIZE, SPACING, make_label_map, make_pipeline


class Told:
    """Stages that remember what they were told."""

    stage = ""

    def __init__(self):
        self.messages = []

    def begin(self, stage: str, total: int | None = None) -> None:
        self.stage = stage
        self.messages.append((stage, total))

    def step(self, completed: int, total: int) -> None:
        self.messages.append((completed, total))


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


SAMPLED = [("denoise", 2), (1, 2), (2, 2), ("decode", None)]
GRID = {"output_size": SIZE, "spacing": SPACING}


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"mask": make_label_map()}, [("label map", None), *SAMPLED]),
        ({"image_only": True, "body_region": ["chest"], **GRID}, SAMPLED),
        (
            {"controllable_anatomy_size": [("liver", 0.5)], **GRID},
            [("label map", None), (1, 3), (2, 3), (3, 3), *SAMPLED],
        ),
    ],
    ids=["mask", "image only", "generated label map"],
)
@pytest.mark.filterwarnings("ignore")
def test_stages_of_an_image(pipe, request_, told):
    """Sampling is said to begin before its first step is done."""
    stages = Told()
    make_image(pipe, request_, 0, stages)
    assert stages.messages == told
    assert not pipe.unet._forward_pre_hooks and not pipe.mask_unet._forward_hooks


def test_a_stage_of_unknown_length():
    """It is neither done, nor as long as the one before."""
    stages = Stages(1, quiet=True)
    stages.begin("denoise", 2)
    stages.step(2, 2)
    stages.begin("decode")
    (task,) = [one for one in stages._progress.tasks if one.visible]
    assert (task.description, task.total, task.completed, task.finished) == ("decode", None, 0, False)
