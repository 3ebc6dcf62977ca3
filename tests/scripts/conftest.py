from tests.loaders.conftest import checkpoint, networks, published  # noqa: F401, fixtures
from tests.training.conftest import (  # noqa: F401, fixtures
    label_maps,
    latents,
    mask_latents,
    train_controlnet,
    train_unet,
    train_vae,
    volumes,
)

from .training_data import SCRIPTS, load_script  # noqa: F401, SCRIPTS for the tests
