"""The training scripts, and what they are tried on."""

import pytest

from tests.scripts.training_data import (
    load_script,
    make_label_maps,
    make_latents,
    make_mask_latents,
    make_volumes,
)


@pytest.fixture(scope="session")
def train_controlnet():
    """`scripts/train_controlnet.py` as a module."""
    return load_script("train_controlnet")


@pytest.fixture(scope="session")
def train_unet():
    """`scripts/train_unet.py` as a module."""
    return load_script("train_unet")


@pytest.fixture(scope="session")
def train_vae():
    """`scripts/train_vae.py` as a module."""
    return load_script("train_vae")


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """A folder with latents, label maps and a model, see [`make_latents`]; not to be changed."""
    return make_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="session")
def volumes(tmp_path_factory):
    """A folder with CTs and a VAE, see [`make_volumes`]; not to be changed."""
    return make_volumes(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="session")
def label_maps(tmp_path_factory):
    """A folder with label maps and a mask VAE, see [`make_label_maps`]; not to be changed."""
    return make_label_maps(tmp_path_factory.mktemp("label maps"))


@pytest.fixture(scope="session")
def mask_latents(tmp_path_factory):
    """A folder with latents of label maps and a model, see [`make_mask_latents`]; not to be changed."""
    return make_mask_latents(tmp_path_factory.mktemp("mask latents"))
