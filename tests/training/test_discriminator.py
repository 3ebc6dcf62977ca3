import pytest
import torch
from monai.networks.nets import PatchDiscriminator

from maisi_diffusers.training.discriminator import MaisiPatchDiscriminator
from tests.tiny import randomize, seeded


def pair(channels=32, num_layers=3):
    """Ours and MONAI's with the same weights."""
    torch.manual_seed(0)
    monai = PatchDiscriminator(
        spatial_dims=3, num_layers_d=num_layers, channels=channels, in_channels=1, out_channels=1, norm="INSTANCE"
    )
    randomize(monai)
    ours = MaisiPatchDiscriminator(base_channels=channels, num_layers=num_layers)
    weights = {}
    for name, weight in monai.state_dict().items():
        layer, _, kind = name.split(".")[0], *name.rsplit(".", 1)
        place = {"initial_conv": "conv_in", "final_conv": "conv_out"}.get(layer, f"blocks.{layer}.conv")
        weights[f"{place}.{kind}"] = weight
    ours.load_state_dict(weights)
    return ours, monai


@pytest.mark.parametrize(("channels", "num_layers", "size"), [(32, 3, (24, 32, 28)), (4, 2, (13, 16, 12))])
def test_equals_monais_with_its_gradients(channels, num_layers, size):
    ours, monai = pair(channels, num_layers)
    sample = torch.rand((2, 1, *size), generator=seeded(), requires_grad=True)
    outputs = []
    for layer in ours.blocks:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = ours(sample)
    theirs = monai(sample)

    assert logits.shape == theirs[-1].shape == (2, 1, *(n // 2**num_layers - 2 for n in size))
    assert len(outputs) == num_layers
    for output, expected in zip([*outputs, logits], theirs[1:]):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(logits.shape, generator=seeded(1))
    names = ["conv_in.weight", "conv_in.bias", "blocks.0.conv.weight", "conv_out.weight", "conv_out.bias"]
    wrt = [sample, *(ours.get_parameter(name) for name in names)]
    gradients = torch.autograd.grad((logits * weight).sum(), wrt)
    wrt = [sample, *(p for n, p in monai.named_parameters() if n.split(".")[0] in ("initial_conv", "0", "final_conv"))]
    expected = torch.autograd.grad((theirs[-1] * weight).sum(), wrt)
    for gradient, other in zip(gradients, expected):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_defaults_have_monais_size_and_spread_of_weights():
    torch.manual_seed(0)
    ours = MaisiPatchDiscriminator()
    monai = PatchDiscriminator(spatial_dims=3, num_layers_d=3, channels=32, in_channels=1, norm="INSTANCE")
    assert ours.num_parameters() == sum(p.numel() for p in monai.parameters())
    for name, parameter in ours.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_saved_and_loaded_it_gives_the_same(tmp_path):
    torch.manual_seed(0)
    ours = randomize(MaisiPatchDiscriminator(base_channels=4, num_layers=2))
    ours.save_pretrained(tmp_path)
    loaded = MaisiPatchDiscriminator.from_pretrained(tmp_path)
    sample = torch.rand(1, 1, 16, 16, 16, generator=seeded())
    assert loaded.config.base_channels == 4
    assert torch.equal(loaded(sample), ours(sample))


def test_too_small_a_patch_is_refused_and_the_smallest_is_not():
    ours = MaisiPatchDiscriminator(base_channels=4)
    assert ours(torch.rand(1, 1, 24, 24, 24)).shape == (1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"patches of \(24, 20, 24\) voxels are too small.*at least 24"):
        ours(torch.rand(1, 1, 24, 20, 24))
