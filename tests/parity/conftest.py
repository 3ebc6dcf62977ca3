import functools

import pytest
import torch

from maisi_diffusers import MaisiCTPipeline

from .monai_reference import SIZES, VERSIONS, build_networks, network_config, save_checkpoint


class Pair:
    """MONAI's networks and the pipeline that was read from their checkpoint."""

    def __init__(self, version, size, folder):
        self.version, self.size = version, size
        self.monai = build_networks(version, size)
        self.folder = save_checkpoint(folder, version, self.monai, network_config(version, size))
        self.pipe = MaisiCTPipeline.from_maisi_checkpoint(self.folder, version=version)
        self.pipe.set_progress_bar_config(disable=True)
        # The published rules want volumes too large for a test.
        self.pipe.register_to_config(input_rules=None, mask_latent_size=list(size.latent))


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory):
    """Pairs by version and size, each made once."""
    return functools.cache(lambda version, name: Pair(version, SIZES[name], tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(params=[(version, name) for version in VERSIONS for name in SIZES], ids="-".join)
def pair(request, make_pair):
    return make_pair(*request.param)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
