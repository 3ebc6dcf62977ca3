"""The ControlNet of MAISI: a label map steers the image UNet."""

import math
from typing import Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .conv_maisi import MaisiConv3d
from .embeddings_maisi import embed_time_and_class
from .modeling_maisi import MaisiModelMixin
from .unet_3d_blocks_maisi import MaisiBlock3D, MaisiDownBlock3D, MaisiMidBlock3D, expand_to_levels, level_attention
from .unet_3d_maisi import MaisiUNet3DConditionModel

# Planes along X that the condition is embedded for at a time, under gradient checkpointing; and at least.
SLAB = 32
# Values of a slab otherwise: more than most volumes have.
SLAB_VALUES = 2**26
# How far three convolutions, the last of them strided, reach beyond its two ends; even, for the stride.
SLAB_MARGINS = (4, 2)

# Devices on which so few channels are convolved in less time when they lie side by side.
SIDE_BY_SIDE_ON = ("cpu",)


class MaisiControlNetConditioningEmbedding(MaisiBlock3D):
    """
    Convolutions from the label map's bits at full resolution down to the latent grid.

    Args:
        conditioning_channels: channels of the condition, 8 bits.
        block_out_channels: channels on the way down; every one after the first halves each axis.
        out_channels: channels of the ControlNet's first level.
    """

    def __init__(self, conditioning_channels: int, block_out_channels: tuple[int, ...], out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv3d(conditioning_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.blocks = nn.ModuleList()
        for channels, next_channels in zip(block_out_channels[:-1], block_out_channels[1:]):
            self.blocks.append(nn.Conv3d(channels, channels, kernel_size=3, padding=1))
            self.blocks.append(nn.Conv3d(channels, next_channels, kernel_size=3, stride=2, padding=1))
        self.conv_out = zero_init(nn.Conv3d(block_out_channels[-1], out_channels, kernel_size=3, padding=1))

    def forward(self, conditioning: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """
        (N, 8, X, Y, Z) of any dtype -> (N, C, X/4, Y/4, Z/4), computed in `dtype`.

        Of large volumes, convolutions up to one that halves the axes run in slabs along X, and the activations of one
        slab at a time are in memory. Under gradient checkpointing those at full resolution do of all volumes: they are
        what most memory goes to. A slab comes with the voxels beyond its ends that its result depends on.
        """
        # Parts that are checkpointed: the first convolutions together, the others each.
        first = [[self.conv_in, *self.blocks[:2]]]
        embedding = conditioning
        for parts in [first, *([[one], [other]] for one, other in zip(self.blocks[2::2], self.blocks[3::2]))]:
            length = max(SLAB_VALUES // math.prod(embedding.shape[1:2] + embedding.shape[3:]) // 2 * 2, SLAB)
            if self.gradient_checkpointing and parts is first:
                length = SLAB
            embedding = self.in_slabs(embedding, parts, dtype, length)
        return self.run(self.embed, embedding, [self.conv_out], dtype).contiguous()

    def in_slabs(
        self, embedding: torch.Tensor, parts: list[list[nn.Conv3d]], dtype: torch.dtype, length: int
    ) -> torch.Tensor:
        """Parts of the convolutions, the last of which halves the axes, in slabs of so many planes along X."""
        size, slabs = embedding.shape[2], []
        for start in range(0, size, length):
            stop = min(start + length, size)
            begin, end = max(start - SLAB_MARGINS[0], 0), min(stop + SLAB_MARGINS[1], size)
            slab = embedding[:, :, begin:end]
            for part in parts:
                slab = self.run(self.embed, slab, part, dtype)
            slabs.append(slab[:, :, (start - begin) // 2 : (stop - begin) // 2])
        return slabs[0] if len(slabs) == 1 else torch.cat(slabs, dim=2)

    def embed(self, embedding: torch.Tensor, convs: list[nn.Conv3d], dtype: torch.dtype) -> torch.Tensor:
        """Some of the convolutions, each of which comes after SiLU but for the very first."""
        if convs[0] is self.conv_in:
            side_by_side = embedding.device.type in SIDE_BY_SIDE_ON
            embedding = embedding.to(
                dtype, memory_format=torch.channels_last_3d if side_by_side else torch.preserve_format
            )
        for conv in convs:
            embedding = conv(embedding if conv is self.conv_in else F.silu(embedding))
        return embedding


class MaisiControlNetModel(MaisiModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    ControlNet of MAISI ([Guo et al., 2024](https://arxiv.org/abs/2409.11169)): the encoder of
    [`MaisiUNet3DConditionModel`] without spacing and regions, fed with the noisy latent plus the embedded label map.

    Args:
        in_channels: channels of the latent.
        block_out_channels: channels of every level.
        layers_per_block: resnet blocks of every level, one number or one a level.
        attention_levels: whether a level has attention.
        attention_head_dim: channels of an attention head, one number or one a level; not read where a level has none.
        attention_out_proj: whether self-attention ends with an output layer.
        norm_num_groups: groups of every group norm.
        norm_eps: epsilon of every group norm.
        resnet_updown: downsample by resnet blocks instead of convolutions.
        num_class_embeds: number of class embeddings (modality codes); `None` for a model without.
        conditioning_channels: channels of the condition: the bits of the label map.
        conditioning_embedding_out_channels: channels of the condition's embedding; each after the first halves it.
        label_names: classes this model was trained for beyond MAISI's, name -> label. Carried, not read, like
            `id2label` of transformers' models.
        tumor_organs: those of them that are tumors, name -> names of the organs they sit in. Carried, not read.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MaisiDownBlock3D", "MaisiMidBlock3D"]
    _repeated_blocks = ["MaisiAttentionBlock3D"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "class_embedding"]
    # `embed_condition` runs it without `forward`.
    _group_offload_block_modules = ["controlnet_cond_embedding"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
        layers_per_block: int | tuple[int, ...] = 2,
        attention_levels: tuple[bool, ...] = (False, False, True, True),
        attention_head_dim: int | tuple[int, ...] = 32,
        attention_out_proj: bool = True,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        resnet_updown: bool = True,
        num_class_embeds: int | None = 128,
        conditioning_channels: int = 8,
        conditioning_embedding_out_channels: tuple[int, ...] = (8, 32, 64),
        label_names: dict[str, int] | None = None,
        tumor_organs: dict[str, list[str]] | None = None,
    ):
        super().__init__()
        levels = len(block_out_channels)
        layers_per_block = expand_to_levels(layers_per_block, levels, "layers_per_block")
        attention_head_dim = expand_to_levels(attention_head_dim, levels, "attention_head_dim")
        attention_levels = expand_to_levels(attention_levels, levels, "attention_levels")
        attention = {
            "norm_num_groups": norm_num_groups,
            "norm_eps": norm_eps,
            "cross_attention_dim": None,
            "num_layers": 0,
            "out_proj": attention_out_proj,
            "upcast_attention": False,
        }
        attentions = level_attention(attention_levels, attention_head_dim, **attention)

        # 1. embeddings
        time_embed_dim = block_out_channels[0] * 4
        self.time_proj = Timesteps(block_out_channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(block_out_channels[0], time_embed_dim)
        self.class_embedding = nn.Embedding(num_class_embeds, time_embed_dim) if num_class_embeds is not None else None
        self.controlnet_cond_embedding = MaisiControlNetConditioningEmbedding(
            conditioning_channels, conditioning_embedding_out_channels, block_out_channels[0]
        )

        # 2. down
        self.conv_in = MaisiConv3d(in_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(
            MaisiDownBlock3D(
                in_channels=block_out_channels[max(i - 1, 0)],
                out_channels=block_out_channels[i],
                temb_channels=time_embed_dim,
                num_layers=layers_per_block[i],
                norm_num_groups=norm_num_groups,
                norm_eps=norm_eps,
                add_downsample=i < levels - 1,
                resnet_updown=resnet_updown,
                attention=attentions[i],
            )
            for i in range(levels)
        )

        # 3. mid
        self.mid_block = MaisiMidBlock3D(
            block_out_channels[-1],
            time_embed_dim,
            norm_num_groups,
            norm_eps,
            attention={"head_dim": attention_head_dim[-1], **attention},
        )

        # 4. one zero-initialised convolution a skip, and one for the middle
        skip_channels = [block_out_channels[0]]
        for i, channels in enumerate(block_out_channels):
            skip_channels += [channels] * (layers_per_block[i] + (i < levels - 1))
        self.controlnet_down_blocks = nn.ModuleList(
            zero_init(nn.Conv3d(channels, channels, kernel_size=1)) for channels in skip_channels
        )
        self.controlnet_mid_block = zero_init(nn.Conv3d(block_out_channels[-1], block_out_channels[-1], kernel_size=1))

    @classmethod
    def from_unet(
        cls,
        unet: MaisiUNet3DConditionModel,
        conditioning_channels: int = 8,
        conditioning_embedding_out_channels: tuple[int, ...] = (8, 32, 64),
        load_weights_from_unet: bool = True,
    ) -> Self:
        r"""
        A ControlNet to train for a UNet, as published: encoder and middle copied, the rest new.

        The UNet's blocks read [time + class, regions, spacing]; the ControlNet's read [time + class] alone, so of
        `time_emb_proj.weight` the columns for time + class are taken.

        Args:
            unet: an image UNet (a mask UNet, which has cross-attention, raises a `ValueError`).
            conditioning_channels: channels of the condition.
            conditioning_embedding_out_channels: channels of the condition's embedding.
            load_weights_from_unet: copy the weights, or the architecture alone.
        """
        if unet.config.cross_attention_dim is not None:
            raise ValueError(
                f"a ControlNet steers an image UNet, but this UNet has cross_attention_dim="
                f"{unet.config.cross_attention_dim}: give the image UNet"
            )
        shared = (
            "in_channels",
            "block_out_channels",
            "layers_per_block",
            "attention_levels",
            "attention_head_dim",
            "attention_out_proj",
            "norm_num_groups",
            "norm_eps",
            "resnet_updown",
            "num_class_embeds",
        )
        controlnet = cls(
            **{name: unet.config[name] for name in shared},
            conditioning_channels=conditioning_channels,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
        )
        if load_weights_from_unet:
            source, weights = unet.state_dict(), controlnet.state_dict()
            for name, own in weights.items():
                if name.endswith("time_emb_proj.weight"):
                    weights[name] = source[name][:, : own.shape[1]]
                elif not name.startswith("controlnet_"):
                    weights[name] = source[name]
            controlnet.load_state_dict(weights)
        return controlnet.to(device=unet.device, dtype=unet.dtype)

    def add_classes(self, label_names: dict[str, int] | None, tumor_organs: dict[str, list[str]] | None) -> None:
        """Carry new classes besides those that the config has (`label_names`, `tumor_organs`)."""
        self.register_to_config(
            label_names={**(self.config.label_names or {}), **(label_names or {})},
            tumor_organs={**(self.config.tumor_organs or {}), **(tumor_organs or {})},
        )

    @apply_forward_hook
    def embed_condition(self, controlnet_cond: torch.Tensor) -> torch.Tensor:
        """
        Embed the condition on the latent grid: the part of the ControlNet that does not change from step to step.

        Args:
            controlnet_cond (N, 8, X, Y, Z): the bits of the label map, least significant first.

        Returns:
            (N, C, X/4, Y/4, Z/4), for `controlnet_cond_embedding`.
        """
        return self.controlnet_cond_embedding(controlnet_cond, self.dtype)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        controlnet_cond: torch.Tensor | None = None,
        controlnet_cond_embedding: torch.Tensor | None = None,
        conditioning_scale: float = 1.0,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        r"""
        Args:
            sample (N, C, X, Y, Z): the noisy latent.
            timestep (N,) or a number: 0 is data, 1000 is noise.
            controlnet_cond (N, 8, 4X, 4Y, 4Z): the condition, of any dtype (uint8 takes the least memory), or
            controlnet_cond_embedding: what [`embed_condition`] made of it; exactly one of the two.
            conditioning_scale: factor on every residual.
            class_labels (N,): modality codes.
            return_dict: return a [`~diffusers.models.controlnets.controlnet.ControlNetOutput`] instead of a tuple
                `(down_block_res_samples, mid_block_res_sample)`.
        """
        if (controlnet_cond is None) == (controlnet_cond_embedding is None):
            raise ValueError("give exactly one of `controlnet_cond` and `controlnet_cond_embedding`")

        # 1. embeddings
        emb = embed_time_and_class(self, sample, timestep, class_labels)
        if controlnet_cond_embedding is None:
            controlnet_cond_embedding = self.controlnet_cond_embedding(controlnet_cond, sample.dtype)

        # 2. down
        sample = self.conv_in(sample) + controlnet_cond_embedding
        down_block_res_samples = (sample,)
        for block in self.down_blocks:
            sample, res_samples = block(sample, emb)
            down_block_res_samples += res_samples

        # 3. mid
        sample = self.mid_block(sample, emb)

        # 4. residuals
        down_block_res_samples = tuple(
            conv(res_sample) * conditioning_scale
            for conv, res_sample in zip(self.controlnet_down_blocks, down_block_res_samples, strict=True)
        )
        mid_block_res_sample = self.controlnet_mid_block(sample) * conditioning_scale

        if not return_dict:
            return down_block_res_samples, mid_block_res_sample
        return ControlNetOutput(
            down_block_res_samples=down_block_res_samples, mid_block_res_sample=mid_block_res_sample
        )


def zero_init(module: nn.Module) -> nn.Module:
    """Set every parameter to zero: an untrained ControlNet changes nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
