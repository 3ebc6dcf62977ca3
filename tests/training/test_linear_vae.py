"""A VAE that begins as the best linear one."""

import pytest
import torch
from scipy import ndimage

from maisi_diffusers import AutoencoderKLMaisi
from maisi_diffusers.anatomy import MASK_VAE_LABELS, label_bits
from maisi_diffusers.training.linear_vae import make_linear
from maisi_diffusers.training.mask_classes import mask_classes


@pytest.fixture(scope="module")
def volumes():
    """Smooth, with noise, (1, 16, 8, 12) in 0..1."""
    noise = torch.rand(3, 16, 8, 12, generator=torch.Generator().manual_seed(0)).numpy()
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2, 2))
    return [torch.from_numpy(0.4 + 2 * (one - one.mean()) + 0.02 * rough)[None] for one, rough in zip(smooth, noise)]


def make_vae(channels, latent_channels, **config):
    torch.manual_seed(0)
    settings = {"norm_num_groups": 2, "norm_eps": 1.0, "layers_per_block": 1, "use_conv_transpose": True} | config
    return AutoencoderKLMaisi(block_out_channels=channels, latent_channels=latent_channels, **settings).eval()


def blocks_of(volume, edge):
    shape = [side for n in volume.shape[1:] for side in (n // edge, edge)]
    return volume[0].reshape(shape).permute(0, 2, 4, 1, 3, 5).flatten(3)


def components_of(volumes, edge):
    """Mean; components, a row each; their standard deviations."""
    blocks = torch.cat([blocks_of(volume, edge).flatten(0, 2) for volume in volumes]).double()
    mean = blocks.mean()
    variances, vectors = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
    return mean.float(), vectors.flip(1).T.float(), variances.flip(0).clamp(min=0).sqrt().float()


@pytest.mark.parametrize(
    ("channels", "number"), [((8, 16), 8), ((8, 16), 3), ((8, 10, 20), 10)], ids=["all of 8", "3 of 8", "10 of 64"]
)
@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_principal_components(volumes, channels, number, whitening):
    vae = make_vae(channels, number)
    make_linear(vae, volumes, whitening)
    edge = vae.spatial_compression_ratio
    mean, components, deviations = components_of(volumes, edge)
    for volume in volumes:
        expected = (blocks_of(volume, edge) - mean) @ components[:number].T
        posterior = vae.encode(volume[None]).latent_dist
        scaled = expected * deviations[:number] ** -whitening
        found = posterior.mode()[0].permute(1, 2, 3, 0)
        scaled *= (found * scaled).sum((0, 1, 2)).sign()  # a component may point either way
        assert (found - scaled).abs().max() < 0.02 * scaled.abs().max()
        assert posterior.std.max() < 0.01
        rest = blocks_of(vae.decode(posterior.mode()).sample[0], edge) - mean - expected @ components[:number]
        assert rest.abs().max() < 0.02


@pytest.mark.parametrize("channels", [(8, 16), (16, 24, 32)], ids=str)
@torch.no_grad()
def test_window(volumes, channels):
    """Differences of the window are so much larger in the latents than others, and come back as they were."""
    flat = [torch.full((1, 16, 16, 16), value) for value in (0.1, 0.15, 0.5, 0.55, 0.9, 0.95)]
    vae = make_vae(channels, 8)
    make_linear(vae, [*volumes, *flat], 0.0, window=(0.4, 0.6), window_gain=5)
    encoded = torch.stack([vae.encode(one[None]).latent_dist.mode()[0, 0, 2, 2, 2] for one in flat])
    below, inside, above = encoded.view(3, 2).diff(dim=1).flatten().tolist()
    assert 4 < inside / below < 6.5 and 4 < inside / above < 6.5
    for one in flat:
        decoded = vae.decode(vae.encode(one[None]).latent_dist.mode()).sample
        assert (decoded - one).abs().max() < 0.02


@torch.no_grad()
def test_air(volumes):
    """Noise of air around a body is gone, what is in it stays; the latents are those without."""
    torch.manual_seed(0)
    body = torch.zeros(1, 16, 16, 16)
    body[:, 4:12, 4:12, 4:12] = 0.5
    noisy = (body + 0.015 * torch.randn(1, 16, 16, 16)).clamp(min=0)
    plain, clean = make_vae((16, 24, 48), 24), make_vae((16, 24, 48), 24)
    make_linear(plain, [*volumes, noisy, body], 0.0, window=(0.4, 0.6))
    make_linear(clean, [*volumes, noisy, body], 0.0, window=(0.4, 0.6), air=0.05)
    assert torch.equal(plain.encode(noisy[None]).latent_dist.mode(), clean.encode(noisy[None]).latent_dist.mode())
    images = [vae.decode(vae.encode(noisy[None]).latent_dist.mode()).sample[0] for vae in (plain, clean)]
    outside = torch.ones(1, 16, 16, 16, dtype=torch.bool)
    outside[:, 3:13, 3:13, 3:13] = False
    assert images[0][outside].clamp(min=0).std() > 5 * images[1][outside].clamp(min=0).std()
    assert (images[1] - images[0])[:, 5:11, 5:11, 5:11].abs().max() < 0.03


@pytest.mark.parametrize(("window", "air"), [(None, 0.05), ((0.4, 0.6), 0.5), ((0.4, 0.6), 0.0)], ids=str)
def test_air_that_is_none(volumes, window, air):
    with pytest.raises(ValueError, match="it goes with a window, and is below it and above 0"):
        make_linear(make_vae((8, 16), 8), volumes, 0.5, window, air=air)


@pytest.mark.parametrize("window", [(0.6, 0.4), (-0.1, 0.5), (0.5, 1.2)], ids=str)
def test_windows_that_are_none(volumes, window):
    vae = make_vae((8, 16), 8)
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    with pytest.raises(ValueError, match=r"a window is of images, from low to high in 0\.\.1"):
        make_linear(vae, volumes, 0.5, window)
    assert all(torch.equal(weight, before[name]) for name, weight in vae.state_dict().items())


@pytest.mark.parametrize(("number", "agree"), [(24, 0.99), (3, 0.8)])
@torch.no_grad()
def test_label_maps(number, agree):
    """A mask VAE says the labels, the more of them the more channels its latent has."""
    labels = torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    labels[:, 2:14, 3:13] = 200
    labels[:, 4:9, 4:12, 2:9], labels[:, 5:12, 5:11, 10:14], labels[:, 5:7, 5:8, 4:6] = 1, 28, 26
    vae = make_vae((16, 32, 64), number, in_channels=8, out_channels=len(MASK_VAE_LABELS))
    bits = label_bits(labels[None], torch.uint8)
    make_linear(vae, [bits[0], bits[0].flip(1)], 0.5)
    logits = vae.decode(vae.encode(bits.float()).latent_dist.mode()).sample
    agrees = (logits.argmax(1) == mask_classes(labels)).float().mean()
    assert agrees >= agree
    # Where the bits come back, the label is as good as certain.
    assert logits.softmax(1).amax(1).median() > 0.9


def test_not_of_zeros(volumes):
    """All of it learns: no gradient is lost in what does nothing yet."""
    vae = make_vae((8, 10, 20), 10)
    make_linear(vae, volumes, 0.5)
    out = vae.decode(vae.encode(volumes[0][None]).latent_dist.mode()).sample
    (out - volumes[1][None]).square().sum().backward()
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("channels", "number", "config"),
    [
        ((8, 16), 8, {"use_conv_transpose": False}),
        ((8, 14), 8, {}),
        ((8, 8, 20), 10, {}),
        ((8, 16), 4, {"in_channels": 8, "out_channels": 125}),
        ((16, 16), 4, {}),
    ],
)
def test_vaes_that_cannot_be(volumes, channels, number, config):
    with pytest.raises(ValueError, match="cannot be linear|must differ"):
        make_linear(make_vae(channels, number, **config), volumes, 0.5)
