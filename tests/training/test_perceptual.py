import sys

import pytest
import torch
from monai.losses import perceptual as monai_perceptual
from torch import nn

from maisi_diffusers.training.perceptual import BACKBONES, FeatureDistance, PerceptualLoss, load_perceptual_loss
from tests.tiny import seeded

# A package of that name, with a network whose features are as many as squeezenet's.
TORCHVISION = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(13)))
def squeezenet1_1(weights):
    assert weights is None, "nothing is to be downloaded"
    return Net()
"""


class Distance(nn.Module):
    """A network of one convolution that keeps what it was given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3)
        self.given = []

    def forward(self, input, target):
        self.given.append((input, target))
        # LPIPS takes slices of one channel for three.
        ours, theirs = (self.conv(slices.expand(-1, 3, -1, -1)) for slices in (input, target))
        return (ours - theirs).square().mean((1, 2, 3), keepdim=True)


def volumes(*shape, seed=0):
    generator = seeded(seed)
    return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)


def features():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.ReLU())


def test_slices_are_pairs_of_one_place_along_each_axis():
    distance = Distance()
    input, target = volumes(2, 1, 10, 15, 7)
    PerceptualLoss(distance, ratio=0.2)(input, target, seeded())
    assert [tuple(given[0].shape) for given in distance.given] == [(4, 3, 15, 7), (6, 3, 10, 7), (2, 3, 10, 15)]
    for axis, (ours, theirs) in zip((2, 3, 4), distance.given):
        places = {
            (n, i): (input[n, 0].select(axis - 2, i), target[n, 0].select(axis - 2, i))
            for n in range(2)
            for i in range(input.shape[axis])
        }
        found = []
        for picture, other in zip(ours, theirs):
            assert torch.equal(picture[0], picture[1]) and torch.equal(picture[0], picture[2])
            found += [p for p, (x, y) in places.items() if torch.equal(picture[0], x) and torch.equal(other[1], y)]
        assert len(set(found)) == len(ours)


def test_loss_is_the_sum_over_axes_of_the_mean_over_slices():
    distance = Distance()
    input, target = volumes(1, 1, 5, 6, 7)
    expected = 0
    for axis in range(3):
        pairs = zip(input[0, 0].unbind(axis), target[0, 0].unbind(axis))
        slices = [distance(x.expand(1, 3, -1, -1), y.expand(1, 3, -1, -1)) for x, y in pairs]
        expected += torch.stack(slices).mean()
    torch.testing.assert_close(PerceptualLoss(distance, ratio=1.0)(input, target), expected)


@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_equals_monais_around_the_same_network(monkeypatch, ratio):
    distance = Distance()
    monkeypatch.setattr(monai_perceptual, "LPIPS", lambda **kwargs: distance)
    monai = monai_perceptual.PerceptualLoss(
        spatial_dims=3, network_type="squeeze", is_fake_3d=True, fake_3d_ratio=ratio
    )
    input, target = volumes(2, 1, 6, 8, 10)
    input.requires_grad_()
    # MONAI draws with the global generator, from the sagittal slices to the axial ones, as we do.
    torch.manual_seed(3)
    theirs = monai(input, target)
    ours = PerceptualLoss(distance, ratio)(input, target, seeded(3))
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, input)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_generator_decides_and_thin_volumes_have_a_slice_too():
    loss = PerceptualLoss(Distance(), ratio=0.2)
    input, target = volumes(1, 1, 10, 10, 10)
    assert loss(input, target, seeded(1)) == loss(input, target, seeded(1)) != loss(input, target, seeded(2))
    input, target = volumes(1, 1, 4, 4, 4)
    assert loss(input, target, seeded()).isfinite()


def test_with_a_generator_each_a_volume_does_not_depend_on_its_batch():
    loss = PerceptualLoss(Distance(), ratio=0.3)
    input, target = volumes(2, 1, 10, 8, 9)
    alone = [loss(input[i : i + 1], target[i : i + 1], seeded(i)) for i in range(2)]
    torch.testing.assert_close(loss(input, target, [seeded(0), seeded(1)]), (alone[0] + alone[1]) / 2)


def test_feature_distance_by_hand():
    net = features()
    weights = [torch.rand(1, 4, 1, 1, generator=seeded()), torch.rand(1, 6, 1, 1, generator=seeded(1))]
    input, target = volumes(2, 3, 12, 10)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    expected = torch.zeros(2)
    for depth, weight in zip((2, 5), weights):
        units = []
        for picture in (input, target):
            # ImageNet's mean and deviation are of 0..1, the network's input is taken for -1..1.
            found = net[:depth]((picture - (2 * mean - 1)) / (2 * std))
            units.append(found / found.norm(dim=1, keepdim=True).clamp(min=1e-5))
        expected += (weight * (units[0] - units[1]) ** 2).sum(1).mean((1, 2))
    torch.testing.assert_close(FeatureDistance(net, (1, 4), weights)(input, target), expected, rtol=1e-4, atol=1e-5)
    plain = FeatureDistance(net, (1, 4))(input, target)
    assert (plain > expected).all()
    torch.testing.assert_close(FeatureDistance(net, (1, 4), [torch.ones(1, 1, 1, 1)] * 2)(input, target), plain)


def test_equal_volumes_have_no_loss_and_others_pull_the_reconstruction():
    loss = PerceptualLoss(FeatureDistance(features(), (1, 4)), ratio=0.5)
    input, target = volumes(1, 1, 12, 12, 12)
    assert loss(target, target, seeded()) == 0
    input.requires_grad_()
    before = loss(input, target, seeded())
    (gradient,) = torch.autograd.grad(before, input)
    assert before > 0 and gradient.isfinite().all() and gradient.any()
    assert loss(input - 0.1 * gradient / gradient.norm(), target, seeded()) < before
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_gradient_is_finite_where_no_feature_is_seen():
    net = features()
    with torch.no_grad():
        net[0].bias.fill_(-100)
    loss = PerceptualLoss(FeatureDistance(net, (1, 4)))
    input = torch.zeros(1, 1, 12, 12, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(input, torch.ones_like(input), seeded()), input)
    assert gradient.isfinite().all()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder that packages are found in, and the hub's folder; nothing of either name is imported yet."""
    for name in ("torchvision", "torchvision.models", "lpips"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").touch()
    (tmp_path / "torchvision" / "models.py").write_text(TORCHVISION)
    yield tmp_path
    for name in ("torchvision", "torchvision.models"):
        sys.modules.pop(name, None)


def save_backbone(folder):
    namespace = {}
    exec(TORCHVISION, namespace)
    torch.manual_seed(0)
    net = namespace["Net"]()
    torch.save(net.state_dict(), folder / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    return net


def save_heads(folder):
    heads = {f"lin{i}.model.1.weight": torch.rand(1, 3, 1, 1, generator=seeded(i)) for i in range(7)}
    (folder / "lpips" / "weights" / "v0.1").mkdir(parents=True)
    (folder / "lpips" / "__init__.py").write_text("raise ImportError('it needs what is not installed')")
    torch.save(heads, folder / "lpips" / "weights" / "v0.1" / "squeeze.pth")
    return list(heads.values())


def test_load_takes_the_network_of_torchvision_and_the_weights_of_lpips(packages):
    net, heads = save_backbone(packages), save_heads(packages)
    loss = load_perceptual_loss(ratio=0.3)
    assert loss.ratio == 0.3
    input, target = volumes(2, 3, 16, 16)
    expected = FeatureDistance(net.features, BACKBONES["squeeze"].layers, heads)
    assert torch.equal(loss.distance(input, target), expected(input, target))


def test_load_without_lpips_warns_and_weighs_alike(packages, monkeypatch):
    net = save_backbone(packages)
    monkeypatch.setattr("maisi_diffusers.training.perceptual.find_spec", lambda name: name == "torchvision" or None)
    with pytest.warns(UserWarning, match="lpips is not installed"):
        loss = load_perceptual_loss()
    input, target = volumes(2, 3, 16, 16)
    expected = FeatureDistance(net.features, BACKBONES["squeeze"].layers)
    assert torch.equal(loss.distance(input, target), expected(input, target))


def test_load_says_what_is_missing_and_where(packages, monkeypatch):
    file = packages / "hub" / "checkpoints" / "vgg16-397923af.pth"
    with pytest.raises(FileNotFoundError) as error:
        load_perceptual_loss("vgg")
    assert f"needs the file {str(file)!r}" in str(error.value)
    monkeypatch.setattr("maisi_diffusers.training.perceptual.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as error:
        load_perceptual_loss("vgg")
    message = str(error.value)
    assert f"needs the package torchvision and the file {str(file)!r}" in message
    assert "--perceptual_weight 0" in message and "\n" not in message


def test_load_refuses_other_weights_and_networks(packages):
    file = packages / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="does not hold the weights of squeezenet1_1"):
        load_perceptual_loss()
    file.write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="squeezenet1_1-b8a52dc0.pth is not a PyTorch checkpoint"):
        load_perceptual_loss()
    with pytest.raises(ValueError, match="'resnet' is unknown: use one of squeeze, alex, vgg"):
        load_perceptual_loss("resnet")
