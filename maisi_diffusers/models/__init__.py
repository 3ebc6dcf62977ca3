"""The networks. They know nothing of files or labels."""

from .autoencoder_kl_maisi import TILINGS, AutoencoderKLMaisi
from .controlnet_maisi import MaisiControlNetModel
from .unet_3d_maisi import MaisiUNet3DConditionModel, MaisiUNet3DConditionOutput

__all__ = [
    "TILINGS",
    "AutoencoderKLMaisi",
    "MaisiControlNetModel",
    "MaisiUNet3DConditionModel",
    "MaisiUNet3DConditionOutput",
]
