"""The VAE in slabs gives what it gives in one piece."""

import tempfile

import pytest
import torch

from maisi_diffusers import AutoencoderKLMaisi
from maisi_diffusers.models import exact_tiling
from maisi_diffusers.models.activations import Activations
from maisi_diffusers.models.group_statistics import GroupStatistics

SIZE = (7, 6, 5)
# Everything in a file and one plane at a time; some planes; all that is kept in memory; the whole in one slab.
MEMORIES = ["1KB", "200KB", "3MB", "1GiB"]


def make_vae(seed=0, **kwargs) -> AutoencoderKLMaisi:
    torch.manual_seed(seed)
    config = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "latent_channels": 4} | kwargs
    vae = AutoencoderKLMaisi(**config).eval()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, 0.02, 0.15)
    return vae


def draw(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


@torch.no_grad()
def assert_same_in_slabs(vae: AutoencoderKLMaisi, memory: str, batch: int = 1) -> None:
    """Decode and encode in one piece and in slabs."""
    z = draw(batch, 4, *SIZE)
    x = draw(batch, vae.config.in_channels, *(vae.spatial_compression_ratio * n for n in SIZE))
    image, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
    vae.enable_exact_tiling(memory)
    assert_equal(vae.decode(z).sample, image)
    assert_equal(vae.encode(x).latent_dist.parameters, moments)
    vae.disable_tiling()
    assert torch.equal(vae.decode(z).sample, image)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    "config",
    [{}, {"use_conv_transpose": True}, {"block_out_channels": (8, 8, 16, 32), "layers_per_block": (1, 2, 1, 2)}],
    ids=["trilinear", "transposed", "four levels"],
)
def test_equal(config, memory):
    assert_same_in_slabs(make_vae(**config), memory)


def test_batch():
    assert_same_in_slabs(make_vae(), "200KB", batch=2)


@pytest.mark.parametrize("memory", MEMORIES)
@torch.no_grad()
def test_classes(memory):
    vae = make_vae(out_channels=11)
    classes = vae.decode_classes(draw(1, 4, *SIZE))
    vae.enable_exact_tiling(memory)
    found = vae.decode_classes(draw(1, 4, *SIZE))
    assert found.dtype == torch.int16 and classes.unique().numel() > 3 and torch.equal(found, classes)


@pytest.mark.parametrize("memory", ["200KB", "1GiB"])
@torch.no_grad()
def test_half_precision(memory):
    """As near to float32 as in one piece."""
    vae = make_vae()
    expected = vae.decode(draw(1, 4, *SIZE)).sample
    vae.bfloat16()
    whole = vae.decode(draw(1, 4, *SIZE).bfloat16()).sample
    vae.enable_exact_tiling(memory)
    found = vae.decode(draw(1, 4, *SIZE).bfloat16()).sample
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().mean() <= 1.2 * (whole - expected).abs().mean()


@pytest.mark.parametrize("is_hooked", [False, True])
def test_adapters_and_hooks(is_hooked):
    """Convolutions that are more than themselves are called, not imitated."""
    vae = make_vae()
    if is_hooked:
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.register_forward_hook(lambda module, args, output: output * 1.1)
    else:
        peft = pytest.importorskip("peft")
        vae.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1", "conv2", "conv"], init_lora_weights=False))
    assert_same_in_slabs(vae, "200KB")


@torch.no_grad()
def test_statistics_of_slabs():
    """Also where the mean is large beside the deviation."""
    x = 1000 + draw(1, 8, 9, 6, 5)
    norm = torch.nn.GroupNorm(4, 8)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    statistics = GroupStatistics(norm)
    for slab in x.split([1, 4, 3, 1], dim=2):
        statistics.add(slab)
    expected = torch.nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double())
    assert (statistics.normalize(x.clone()) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("is_file", [False, True])
def test_activations(is_file, tmp_path):
    x = draw(1, 3, 5, 4, 2)
    kept = Activations(3, (5, 4, 2), torch.float32, x.device, tmp_path if is_file else None)
    kept.write(0, x[:, :, :2])
    kept.write(2, x[:, :, 2:])
    assert torch.equal(kept.read(1, 4), x[:, :, 1:4])
    kept.read(1, 4).zero_()  # a copy
    assert torch.equal(kept.read(0, 5), x)
    assert not list(tmp_path.iterdir())  # nothing that could be left behind


def test_where_features_are_kept(monkeypatch, tmp_path):
    made = []
    original = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **kwargs: made.append(kwargs["dir"]) or original(**kwargs))
    vae = make_vae()
    vae.enable_exact_tiling("1GiB", tmp_path)
    vae.decode(draw(1, 4, *SIZE))
    assert not made
    vae.enable_exact_tiling("1KB", tmp_path)
    vae.decode(draw(1, 4, *SIZE))
    assert made and set(made) == {tmp_path}


def test_slabs_are_as_thick_as_the_memory_lets():
    tiling = exact_tiling.ExactTiling(10**6)
    tiling.for_slabs = 4000 * exact_tiling.SLABS_AT_ONCE
    assert [(s.start, s.stop) for s in tiling.slabs((9, 1, 1), 160)] == [(0, 4), (4, 8), (8, 9)]
    assert [(s.start, s.stop) for s in tiling.slabs((10, 1, 1), 140, multiple=2)] == [(0, 4), (4, 8), (8, 10)]
    assert [s.start for s in tiling.slabs((4, 1, 1), 10**6, multiple=2)] == [0, 2]


def test_ways_to_tile():
    vae = make_vae()
    vae.enable_exact_tiling()
    assert not vae.use_tiling and vae.exact_tiling.memory == 4 * 2**30
    vae.enable_tiling()
    assert vae.use_tiling and vae.exact_tiling is None
    vae.enable_exact_tiling(10**9)
    vae.disable_tiling()
    assert not vae.use_tiling and vae.exact_tiling is None


@pytest.mark.parametrize("memory", [0, -1, "4 apples"])
def test_memory_that_is_none(memory):
    with pytest.raises(ValueError, match="memory='?-?[04]|is not in a valid format"):
        make_vae().enable_exact_tiling(memory)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere' for a scratch file: make it"):
        make_vae().enable_exact_tiling(folder=tmp_path / "nowhere")
