"""Sizes, slicing and classes of the VAE."""

import pytest
import torch

from maisi_diffusers.models import TILINGS

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
        vae.enable_tiling()
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


# Classes


def classes_of(vae, z):
    return decode(vae, z).argmax(dim=1, keepdim=True)


@pytest.mark.parametrize("tiling", ["off", "auto"])
@pytest.mark.parametrize("size", [(8, 12, 16), (16, 8, 8), (20, 8, 12), (40, 8, 8)], ids=str)
def test_classes_are_the_largest_outputs(size, tiling):
    """Whatever the slabs: less than one, one, several, and a last one of few planes."""
    vae = build("mask vae")
    TILINGS[tiling](vae)
    z = latent(vae, size, batch=2)
    classes = vae.decode_classes(z)
    assert classes.shape == (2, 1, *size) and classes.dtype == torch.int16
    assert torch.equal(classes, classes_of(vae, z).short()) and len(classes.unique()) > 10


def test_outputs_of_few_planes_are_in_memory():
    vae, seen = build("mask vae"), []
    vae.disable_tiling()
    vae.decoder.conv_out.register_forward_hook(lambda module, args, output: seen.append(output.shape[2]))
    vae.decode_classes(latent(vae, (64, 8, 8)))
    assert sum(seen) == 64 + 2 * 3 and max(seen) == 18


def test_two_levels():
    vae = build("image vae", block_out_channels=(64, 64))
    x = image(vae, (10, 6, 14))
    assert vae(x).sample.shape == x.shape
    with pytest.raises(ValueError, match="does not divide by 2"):
        vae.encode(image(vae, (8, 8, 9)))
