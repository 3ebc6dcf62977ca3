"""What a photograph's network sees in the slices of a volume: the perceptual loss of VAE training.

The network's weights are not part of this package, and nothing here downloads them.
"""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..loaders.safe_torch import load_torch_file

# Mean and standard deviation of ImageNet for intensities in -1..1, as LPIPS has them. The published training passes
# intensities in 0..1 through them all the same.
IMAGENET_MEAN = (-0.030, -0.088, -0.188)
IMAGENET_STD = (0.458, 0.448, 0.450)


class Backbone(NamedTuple):
    """A network of torchvision, the file of its weights, and the layers of its features that LPIPS compares."""

    name: str
    file: str
    layers: tuple[int, ...]


BACKBONES = {
    "squeeze": Backbone("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth", (1, 4, 7, 9, 10, 11, 12)),
    "alex": Backbone("alexnet", "alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11)),
    "vgg": Backbone("vgg16", "vgg16-397923af.pth", (3, 8, 15, 22, 29)),
}


class FeatureDistance(nn.Module):
    """
    Distance of two pictures in the features of a network ([Zhang et al., 2018](https://arxiv.org/abs/1801.03924)).

    In each of some layers the features of a pixel are brought to length 1 and compared by their squared difference,
    weighted by channel and averaged over pixels. The distance is the sum over layers. All weights are frozen.

    Args:
        features: layers of a network for pictures of three channels.
        layers: indices of those whose outputs are compared.
        weights (1, C, 1, 1), one a layer: weights of the channels; 1 if not given.
    """

    def __init__(self, features: nn.Sequential, layers: Sequence[int], weights: Sequence[torch.Tensor] | None = None):
        super().__init__()
        self.features = features[: layers[-1] + 1]
        self.layers = tuple(layers)
        self.weights = nn.ParameterList([torch.ones(1, 1, 1, 1)] * len(layers) if weights is None else weights)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Two times (N, 3, H, W) -> (N,)."""
        distance = 0.0
        for ours, theirs, weight in zip(self._compared(input), self._compared(target), self.weights):
            distance = distance + ((ours - theirs).square() * weight).sum(1).mean((1, 2))
        return distance

    def _compared(self, picture: torch.Tensor) -> list[torch.Tensor]:
        hidden_states, compared = (picture - self.mean) / self.std, []
        for i, layer in enumerate(self.features):
            hidden_states = layer(hidden_states)
            if i in self.layers:
                features = hidden_states.float()
                # Inside of the root, so that pixels without any feature have a gradient too.
                compared.append(features / (features.square().sum(1, keepdim=True) + 1e-10).sqrt())
        return compared


class PerceptualLoss(nn.Module):
    """
    Perceptual loss of volumes by their slices: the sum over the three axes of the mean distance of some of the slices
    across each.

    Args:
        distance: maps two times (N, 3, H, W) to N distances of any shape.
        ratio: part of the slices that is compared, at least one an axis; 0.2 as published.
    """

    def __init__(self, distance: nn.Module, ratio: float = 0.2):
        super().__init__()
        self.distance = distance
        self.ratio = ratio

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            input (N, 1, X, Y, Z): the reconstruction, in 0..1.
            target (N, 1, X, Y, Z): what it should be.
            generator: on the CPU, draws the slices among those of the whole batch; of a list, each among those of its
                own volume, so that the draw does not depend on the batch.

        Returns:
            the loss, without axes.
        """
        if isinstance(generator, list):
            volumes = zip(input.split(1), target.split(1), generator)
            return torch.stack([self(*volume) for volume in volumes]).mean()
        loss = 0.0
        for axis in (2, 3, 4):
            slices = [volume.float().movedim(axis, 1).flatten(0, 1) for volume in (input, target)]
            number = len(slices[0])
            chosen = torch.randperm(number, generator=generator)[: max(1, int(number * self.ratio))]
            chosen = chosen.to(input.device)
            loss = loss + self.distance(*(s[chosen].expand(-1, 3, -1, -1) for s in slices)).mean()
        return loss


def load_perceptual_loss(network: str = "squeeze", ratio: float = 0.2) -> PerceptualLoss:
    """
    The published perceptual loss: LPIPS on slices.

    The network comes from torchvision, its weights from the file where torchvision keeps downloads, and the weights of
    its channels from the package lpips. Without lpips all channels weigh 1, which is another loss, and warned of.

    Args:
        network: "squeeze" as published, "alex" or "vgg".
        ratio: part of the slices that is compared.

    Raises:
        FileNotFoundError: if torchvision or the file of the network's weights is not there; names them.
        ValueError: for another network, or a file that is damaged or not the network's.
    """
    if network not in BACKBONES:
        raise ValueError(f"perceptual network {network!r} is unknown: use one of {', '.join(BACKBONES)}")
    backbone = BACKBONES[network]
    file = Path(torch.hub.get_dir()) / "checkpoints" / backbone.file
    missing = [] if find_spec("torchvision") else ["the package torchvision"]
    if not file.is_file():
        missing.append(f"the file {str(file)!r}")
    if missing:
        raise FileNotFoundError(
            f"the perceptual loss {network!r} needs {' and '.join(missing)}: install torchvision and lpips and run "
            f"torchvision.models.{backbone.name}(weights='DEFAULT') once, or train without by --perceptual_weight 0"
        )

    from torchvision import models

    model = getattr(models, backbone.name)(weights=None)
    try:
        model.load_state_dict(load_torch_file(file))
    except RuntimeError as error:
        raise ValueError(f"{str(file)!r} does not hold the weights of {backbone.name}: download it again") from error
    weights, lpips = None, find_spec("lpips")
    if lpips is None:
        warnings.warn(
            f"the package lpips is not installed: the perceptual loss {network!r} weighs all channels alike and is "
            "not the published one, nor of its size; install lpips",
            stacklevel=2,
        )
    else:
        heads = load_torch_file(Path(lpips.origin).parent / "weights" / "v0.1" / f"{network}.pth")
        weights = [heads[f"lin{i}.model.1.weight"] for i in range(len(backbone.layers))]
    return PerceptualLoss(FeatureDistance(model.features, backbone.layers, weights), ratio)
