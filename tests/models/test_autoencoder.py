"""Slicing and tiling of the VAE."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .networks import VAES, build, deviation, inputs

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=VAES)
def vae(request):
    return build(request.param)


def image(vae, size, batch=1, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, vae.config.in_channels, *size, generator=generator)


def latent(vae, size, batch=1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, *(length // 4 for length in size), generator=generator)


def encode(vae, x):
    return vae.encode(x).latent_dist.parameters


def decode(vae, z):
    return vae.decode(z).sample


def test_sizes(vae):
    size = (12, 8, 20)
    posterior = vae.encode(image(vae, size, batch=2)).latent_dist
    assert posterior.mean.shape == posterior.std.shape == (2, 4, 3, 2, 5)
    assert decode(vae, posterior.mode()).shape == (2, vae.config.out_channels, *size)
    assert isinstance(vae.encode(image(vae, size), return_dict=False), tuple)
    assert isinstance(vae.decode(latent(vae, size), return_dict=False), tuple)


@pytest.mark.parametrize("size", [(18, 8, 8), (8, 6, 8), (8, 8, 9)])
@pytest.mark.parametrize("tiling", [False, True])
def test_indivisible_size(vae, size, tiling):
    if tiling:
        vae.enable_tiling(8)
    with pytest.raises(ValueError, match=r"the size \(.*\) does not divide by 4"):
        vae.encode(image(vae, size))


def test_forward_is_encode_and_decode():
    vae, x = build("image vae"), inputs("image vae")["sample"]
    posterior = vae.encode(x).latent_dist
    assert torch.equal(vae(x).sample, decode(vae, posterior.mode()))
    seeded = [torch.Generator().manual_seed(4) for _ in range(2)]
    sampled = decode(vae, posterior.sample(seeded[0]))
    assert torch.equal(vae(x, sample_posterior=True, generator=seeded[1]).sample, sampled)
    assert deviation(sampled, vae(x).sample) > 1e-2


def test_scaling_factor_is_left_to_the_pipeline():
    x = inputs("image vae")["sample"]
    assert torch.equal(build("image vae", scaling_factor=2.0)(x).sample, build("image vae")(x).sample)


def spy_on(module, seen):
    module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))


def test_slicing(vae):
    x, z = image(vae, (8, 4, 12), batch=3), latent(vae, (8, 4, 12), batch=3)
    expected = encode(vae, x), decode(vae, z)
    seen = []
    spy_on(vae.encoder, seen), spy_on(vae.decoder, seen)

    vae.enable_slicing()
    assert deviation(encode(vae, x), expected[0]) < 1e-5
    assert deviation(decode(vae, z), expected[1]) < 1e-5
    assert [shape[0] for shape in seen] == [1] * 6

    vae.disable_slicing()
    assert torch.equal(encode(vae, x), expected[0]) and torch.equal(decode(vae, z), expected[1])
    assert [shape[0] for shape in seen[6:]] == [3, 3]


# Tiling

SIZE = (36, 20, 28)
TILES = [4, 8, 12, 16, 20, 28, 32, (12, 20, 8), (36, 4, 16), (40, 8, 28), (8, 24, 100)]
OVERLAPS = [0.0, 0.1, 0.25, 0.5, 0.9]


def pool(x):
    """Stands in for the encoder: exact in tiles, different in every voxel."""
    return F.avg_pool3d(x, 4).repeat(1, 8, 1, 1, 1)


def stretch(z):
    """Stands in for the decoder."""
    return F.interpolate(z, scale_factor=4.0, mode="nearest")


@pytest.fixture
def local_vae(monkeypatch):
    """A VAE whose voxels do not depend on their neighbourhood."""
    vae = build("image vae")
    monkeypatch.setattr(vae, "_encode_tile", pool)
    monkeypatch.setattr(vae, "_decode_tile", stretch)
    return vae


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_lands_in_its_place(local_vae, tile, overlap):
    x, z = image(local_vae, SIZE, batch=2), latent(local_vae, SIZE, batch=2)
    local_vae.enable_tiling(tile, overlap)
    assert deviation(encode(local_vae, x), pool(x)) < 1e-6
    assert deviation(decode(local_vae, z), stretch(z)) < 1e-6


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_no_tile_is_too_large(local_vae, tile, overlap, monkeypatch):
    """All tiles have the full size, and no more of them than needed."""
    x, z, seen = image(local_vae, SIZE), latent(local_vae, SIZE), {"x": [], "z": []}
    monkeypatch.setattr(local_vae, "_encode_tile", lambda tile: seen["x"].append(tuple(tile.shape[2:])) or pool(tile))
    monkeypatch.setattr(
        local_vae, "_decode_tile", lambda tile: seen["z"].append(tuple(tile.shape[2:])) or stretch(tile)
    )
    local_vae.enable_tiling(tile, overlap)
    encode(local_vae, x), decode(local_vae, z)
    tiles = (tile,) * 3 if isinstance(tile, int) else tile
    full = tuple(min(one, size) for one, size in zip(tiles, SIZE))
    assert set(seen["x"]) == {full}
    assert set(seen["z"]) == {tuple(length // 4 for length in full)}
    if overlap == 0:
        assert len(seen["x"]) == len(seen["z"]) == torch.tensor([-(-n // t) for n, t in zip(SIZE, full)]).prod()


@pytest.mark.parametrize("axis", range(3))
def test_tiles_fade_linearly_into_each_other(local_vae, axis, monkeypatch):
    count = itertools.count()
    monkeypatch.setattr(local_vae, "_decode_tile", lambda tile: torch.full_like(stretch(tile), next(count)))
    size = [8, 8, 8]
    size[axis] = 24
    local_vae.enable_tiling(16, 0.5)
    profile = decode(local_vae, latent(local_vae, size)).movedim(2 + axis, -1)[0, 0, 3, 5]
    expected = torch.cat([torch.zeros(8), torch.arange(1, 9) / 9, torch.ones(8)])
    assert (profile - expected).abs().max() < 1e-6


@pytest.mark.parametrize("tile", [36, 64, SIZE, (36, 20, 32)], ids=str)
def test_volume_in_one_tile_is_exact(vae, tile):
    x, z = image(vae, SIZE), latent(vae, SIZE)
    expected = encode(vae, x), decode(vae, z)
    vae.enable_tiling(tile)
    assert torch.equal(encode(vae, x), expected[0])
    assert torch.equal(decode(vae, z), expected[1])


def test_tiled_is_near_untiled(vae):
    """Not equal: every tile has statistics of its own, and sees an edge where the volume goes on."""
    x, z = image(vae, SIZE), latent(vae, SIZE)
    expected = encode(vae, x), decode(vae, z)
    vae.enable_tiling((32, 20, 24), 0.5)
    for tiled, whole in ((encode(vae, x), expected[0]), (decode(vae, z), expected[1])):
        assert tiled.shape == whole.shape and tiled.dtype == whole.dtype
        assert 0 < (tiled - whole).std() < 0.4 * whole.std()

    vae.disable_tiling()
    assert torch.equal(encode(vae, x), expected[0]) and torch.equal(decode(vae, z), expected[1])


def test_tiles_are_exact_away_from_their_edges(vae):
    """Without norms, a voxel that only one tile covers, far from that tile's edge, is what it would be untiled."""
    for parent in list(vae.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, nn.Identity())
    size = (96, 8, 8)
    x, z = image(vae, size), latent(vae, size)
    expected = encode(vae, x), decode(vae, z)
    vae.enable_tiling((64, 8, 8), 0.5)  # from 0 to 64 and from 32 to 96; by one alone up to 32 and from 64
    moments, sample = encode(vae, x), decode(vae, z)
    for part in (slice(None, 8), slice(-8, None)):
        assert deviation(moments[:, :, part], expected[0][:, :, part]) < 1e-5
    for part in (slice(None, 32), slice(-32, None)):
        assert deviation(sample[:, :, part], expected[1][:, :, part]) < 1e-5
    assert deviation(sample, expected[1]) > 1e-4


def test_tiling_and_slicing(vae):
    x, z = image(vae, (24, 8, 8), batch=2), latent(vae, (24, 8, 8), batch=2)
    vae.enable_tiling(8)
    expected = encode(vae, x), decode(vae, z)
    vae.enable_slicing()
    assert deviation(encode(vae, x), expected[0]) < 1e-5
    assert deviation(decode(vae, z), expected[1]) < 1e-5


def test_tiled_dtype(vae):
    vae = vae.bfloat16()
    vae.enable_tiling(8)
    assert encode(vae, image(vae, (16, 8, 8)).bfloat16()).dtype == torch.bfloat16
    assert decode(vae, latent(vae, (16, 8, 8)).bfloat16()).dtype == torch.bfloat16


# Classes


def classes_of(vae, z):
    return decode(vae, z).argmax(dim=1, keepdim=True)


@pytest.mark.parametrize("size", [(8, 12, 16), (16, 8, 8), (20, 8, 12), (40, 8, 8)], ids=str)
def test_classes_are_the_largest_outputs(size):
    """Whatever the slabs: less than one, one, several, and a last one of few planes."""
    vae = build("mask vae")
    z = latent(vae, size, batch=2)
    classes = vae.decode_classes(z)
    assert classes.shape == (2, 1, *size) and classes.dtype == torch.int16
    assert torch.equal(classes, classes_of(vae, z).short()) and len(classes.unique()) > 10


def test_outputs_of_few_planes_are_in_memory():
    vae, seen = build("mask vae"), []
    vae.decoder.conv_out.register_forward_hook(lambda module, args, output: seen.append(output.shape[2]))
    vae.decode_classes(latent(vae, (64, 8, 8)))
    assert sum(seen) == 64 + 2 * 3 and max(seen) == 18


@pytest.mark.parametrize("tile", [36, SIZE], ids=str)
def test_classes_in_one_tile(tile):
    vae = build("mask vae")
    z = latent(vae, SIZE)
    expected = classes_of(vae, z)
    vae.enable_tiling(tile)
    assert torch.equal(vae.decode_classes(z).long(), expected)


@pytest.mark.parametrize("axis", range(3))
def test_classes_are_those_of_the_nearest_tile(axis, monkeypatch):
    vae, count = build("mask vae"), itertools.count(1)

    def number(z, return_classes):
        return torch.full((1, 1, *(4 * length for length in z.shape[2:])), next(count), dtype=torch.int16)

    monkeypatch.setattr(vae.decoder, "forward", number)
    size = [8, 8, 8]
    size[axis] = 24
    vae.enable_tiling(16, 0.5)
    profile = vae.decode_classes(latent(vae, size)).movedim(2 + axis, -1)[0, 0, 3, 5]
    assert profile.tolist() == [1] * 12 + [2] * 12


def test_two_levels():
    vae = build("image vae", block_out_channels=(64, 64))
    x = image(vae, (10, 6, 14))
    vae.enable_tiling(6)
    assert vae(x).sample.shape == x.shape
    with pytest.raises(ValueError, match="does not divide by 2"):
        vae.encode(image(vae, (8, 8, 9)))


@pytest.mark.parametrize("tile", [0, -4, 2, 6, 30, (8, 8), (8, 8, 8, 8), (8, 8, 6), (8, 0, 8)], ids=str)
def test_wrong_tile_size(vae, tile):
    with pytest.raises(ValueError, match=r"tile_sample_size=.* is not allowed: give positive multiples of 4"):
        vae.enable_tiling(tile)
    assert not vae.use_tiling and vae.tile_sample_size == (256, 256, 256)


@pytest.mark.parametrize("overlap", [-0.1, 1, 1.5, float("nan")])
def test_wrong_overlap(vae, overlap):
    with pytest.raises(ValueError, match=r"tile_overlap=.* is not allowed: give a part from 0 to less than 1"):
        vae.enable_tiling(tile_overlap=overlap)
    assert not vae.use_tiling and vae.tile_overlap == 0.25


def test_tiling_remembers(vae):
    vae.enable_tiling([16, 8, 12], 0.5)
    vae.disable_tiling()
    vae.enable_tiling()
    assert vae.use_tiling and vae.tile_sample_size == (16, 8, 12) and vae.tile_overlap == 0.5
    vae.enable_tiling(tile_overlap=0.0)
    assert vae.tile_sample_size == (16, 8, 12) and vae.tile_overlap == 0.0
