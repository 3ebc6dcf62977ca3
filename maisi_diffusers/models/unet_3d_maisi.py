"""The denoising UNet of MAISI, for image latents and for mask latents."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import nn

from .conv_maisi import MaisiConv3d
from .embeddings_maisi import embed_time_and_class
from .modeling_maisi import MaisiModelMixin
from .unet_3d_blocks_maisi import (
    MaisiDownBlock3D,
    MaisiMidBlock3D,
    MaisiUpBlock3D,
    expand_to_levels,
    level_attention,
)


@dataclass
class MaisiUNet3DConditionOutput(BaseOutput):
    """
    Args:
        sample (`torch.Tensor` of shape (N, C, X, Y, Z)): the prediction: the noise for a DDPM model, the velocity
            (data minus noise) for a rectified-flow model.
    """

    sample: torch.Tensor


class MaisiUNet3DConditionModel(MaisiModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    3D UNet of MAISI ([Guo et al., 2024](https://arxiv.org/abs/2409.11169)). One class covers the image UNets of the
    published `ddpm-ct` and `rflow-*` models and the mask UNet.

    Args:
        in_channels: channels of the latent.
        out_channels: channels of the prediction.
        block_out_channels: channels of every level; the latent must divide by 2 to the number of levels less one.
        layers_per_block: resnet blocks of every level, one number or one a level.
        attention_levels: whether a level has attention.
        attention_head_dim: channels of an attention head, one number or one a level; not read where a level has none.
        attention_out_proj: whether self-attention ends with an output layer.
        norm_num_groups: groups of every group norm.
        norm_eps: epsilon of every group norm.
        resnet_updown: down- and upsample by resnet blocks instead of convolutions.
        num_class_embeds: number of class embeddings (modality codes); `None` for a model without.
        use_spacing: whether the model takes the voxel spacing.
        use_region_index: whether the model takes the topmost and the bottommost body region.
        cross_attention_dim: size of the context vector of the spatial transformers; `None` for plain self-attention.
        transformer_layers_per_block: transformer blocks of every spatial transformer.
        upcast_attention: compute the attention of the spatial transformers in float32.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MaisiDownBlock3D", "MaisiMidBlock3D", "MaisiUpBlock3D"]
    _repeated_blocks = ["MaisiAttentionBlock3D", "MaisiTransformer3D"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "class_embedding", "spacing_embedding", "region"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
        layers_per_block: int | tuple[int, ...] = 2,
        attention_levels: tuple[bool, ...] = (False, False, True, True),
        attention_head_dim: int | tuple[int, ...] = 32,
        attention_out_proj: bool = True,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        resnet_updown: bool = True,
        num_class_embeds: int | None = 128,
        use_spacing: bool = True,
        use_region_index: bool = False,
        cross_attention_dim: int | None = None,
        transformer_layers_per_block: int = 1,
        upcast_attention: bool = False,
    ):
        super().__init__()
        levels = len(block_out_channels)
        layers_per_block = expand_to_levels(layers_per_block, levels, "layers_per_block")
        attention_head_dim = expand_to_levels(attention_head_dim, levels, "attention_head_dim")
        attention_levels = expand_to_levels(attention_levels, levels, "attention_levels")
        attention = {
            "norm_num_groups": norm_num_groups,
            "norm_eps": norm_eps,
            "cross_attention_dim": cross_attention_dim,
            "num_layers": transformer_layers_per_block,
            "out_proj": attention_out_proj,
            "upcast_attention": upcast_attention,
        }
        attentions = level_attention(attention_levels, attention_head_dim, **attention)

        # 1. embeddings
        time_embed_dim = block_out_channels[0] * 4
        self.time_proj = Timesteps(block_out_channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], time_embed_dim)
        self.class_embedding = nn.Embedding(num_class_embeds, time_embed_dim) if num_class_embeds is not None else None
        self.top_region_embedding = TimestepEmbedding(4, time_embed_dim) if use_region_index else None
        self.bottom_region_embedding = TimestepEmbedding(4, time_embed_dim) if use_region_index else None
        self.spacing_embedding = TimestepEmbedding(3, time_embed_dim) if use_spacing else None
        temb_channels = time_embed_dim * (1 + 2 * use_region_index + use_spacing)

        # 2. down
        self.conv_in = MaisiConv3d(in_channels, block_out_channels[0], kernel_size=3, padding=1)
        block = {
            "temb_channels": temb_channels,
            "norm_num_groups": norm_num_groups,
            "norm_eps": norm_eps,
            "resnet_updown": resnet_updown,
        }
        self.down_blocks = nn.ModuleList(
            MaisiDownBlock3D(
                in_channels=block_out_channels[max(i - 1, 0)],
                out_channels=block_out_channels[i],
                num_layers=layers_per_block[i],
                add_downsample=i < levels - 1,
                attention=attentions[i],
                **block,
            )
            for i in range(levels)
        )

        # 3. mid
        self.mid_block = MaisiMidBlock3D(
            block_out_channels[-1],
            temb_channels,
            norm_num_groups,
            norm_eps,
            attention={"head_dim": attention_head_dim[-1], **attention},
        )

        # 4. up
        self.up_blocks = nn.ModuleList(
            MaisiUpBlock3D(
                in_channels=block_out_channels[max(i - 1, 0)],
                prev_output_channels=block_out_channels[min(i + 1, levels - 1)],
                out_channels=block_out_channels[i],
                num_layers=layers_per_block[i] + 1,
                add_upsample=i > 0,
                attention=attentions[i],
                **block,
            )
            for i in reversed(range(levels))
        )

        # 5. out
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], eps=norm_eps)
        self.conv_out = MaisiConv3d(block_out_channels[0], out_channels, kernel_size=3, padding=1)

    def get_embedding(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        spacing: torch.Tensor | None,
        top_region_index: torch.Tensor | None,
        bottom_region_index: torch.Tensor | None,
    ) -> torch.Tensor:
        """[time + class, top region, bottom region, spacing], concatenated: (N, temb_channels)."""
        emb = embed_time_and_class(self, sample, timestep, class_labels)
        parts = [emb]
        for name, embedding, condition in (
            ("top_region_index", self.top_region_embedding, top_region_index),
            ("bottom_region_index", self.bottom_region_embedding, bottom_region_index),
            ("spacing", self.spacing_embedding, spacing),
        ):
            if embedding is None:
                continue
            if condition is None:
                raise ValueError(f"this model takes `{name}`, which was not given")
            parts.append(embedding(condition.to(sample.dtype)))
        return torch.cat(parts, dim=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        spacing: torch.Tensor | None = None,
        top_region_index: torch.Tensor | None = None,
        bottom_region_index: torch.Tensor | None = None,
        down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> MaisiUNet3DConditionOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (N, C, X, Y, Z): the noisy latent.
            timestep (N,) or a number: 0 is data, 1000 is noise.
            encoder_hidden_states (N, S, cross_attention_dim): context; for the mask UNet the vector of 10 anatomy
                sizes as (N, 1, 10).
            class_labels (N,): modality codes.
            spacing (N, 3): spacing in mm times 100.
            top_region_index (N, 4), bottom_region_index (N, 4): one-hot region times 100.
            down_block_additional_residuals, mid_block_additional_residual: what a ControlNet gives.
            return_dict: return a [`MaisiUNet3DConditionOutput`] instead of a tuple.
        """
        # 1. embeddings
        emb = self.get_embedding(sample, timestep, class_labels, spacing, top_region_index, bottom_region_index)

        # 2. down
        sample = self.conv_in(sample)
        skips = (sample,)
        for block in self.down_blocks:
            sample, res_samples = block(sample, emb, encoder_hidden_states)
            skips += res_samples

        if down_block_additional_residuals is not None:
            skips = tuple(
                skip + residual for skip, residual in zip(skips, down_block_additional_residuals, strict=True)
            )
            if self.config.cross_attention_dim is None:
                # The published image UNet adds in place, and its last skip is the very tensor that goes on to the
                # middle block; the mask UNet does not.
                sample = skips[-1]

        # 3. mid
        sample = self.mid_block(sample, emb, encoder_hidden_states)
        if mid_block_additional_residual is not None:
            sample = sample + mid_block_additional_residual

        # 4. up
        for block in self.up_blocks:
            layers = len(block.resnets)
            sample = block(sample, skips[-layers:], emb, encoder_hidden_states)
            skips = skips[:-layers]

        # 5. out
        sample = self.conv_out(F.silu(self.conv_norm_out(sample)))

        if not return_dict:
            return (sample,)
        return MaisiUNet3DConditionOutput(sample=sample)
