"""The blocks that the MAISI UNets and the ControlNet are made of."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .attention_maisi import MaisiAttentionBlock3D, MaisiTransformer3D
from .conv_maisi import MaisiConv3d
from .upsample_conv_maisi import MaisiUpsampleConv3d, upsample_and_convolve


class MaisiBlock3D(nn.Module):
    """A part of a network, whose steps can be recomputed in the backward pass instead of kept."""

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = False

    def run(self, step: Callable[..., torch.Tensor], *args) -> torch.Tensor:
        """Call a layer or a function, under gradient checkpointing where the model has it enabled."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(step, *args)
        return step(*args)


def average_pool(hidden_states: torch.Tensor) -> torch.Tensor:
    """(N, C, X, Y, Z) -> (N, C, X/2, Y/2, Z/2)."""
    if hidden_states.device.type == "cpu":  # has no kernel for half precision, and none that keeps a memory format
        is_last = hidden_states.is_contiguous(memory_format=torch.channels_last_3d)
        memory_format = torch.channels_last_3d if is_last else torch.contiguous_format
        pooled = F.avg_pool3d(hidden_states.float(), kernel_size=2)
        return pooled.to(hidden_states.dtype, memory_format=memory_format)
    return F.avg_pool3d(hidden_states, kernel_size=2)


def resample(hidden_states: torch.Tensor, direction: str | None) -> torch.Tensor:
    """Halve every axis (`"down"`), double it (`"up"`), or neither (`None`)."""
    if direction == "down":
        return average_pool(hidden_states)
    if direction == "up":
        return F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
    return hidden_states


def convolve(
    hidden_states: torch.Tensor, conv: nn.Conv3d, norm: nn.GroupNorm | None = None, direction: str | None = None
) -> torch.Tensor:
    """
    Norm and SiLU where there is a norm, resampling, convolution: a step to checkpoint.

    It ends with the convolution because checkpointing recomputes no further than the backward pass needs: up to the
    input of the convolution, which takes little time, and not the convolution, which takes nearly all of it.
    """
    if norm is not None:
        hidden_states = F.silu(norm(hidden_states))
    if direction == "up":
        return upsample_and_convolve(hidden_states, conv)
    return conv(resample(hidden_states, direction))


class MaisiResnetBlock3D(MaisiBlock3D):
    """
    Residual block with the time embedding added between its two convolutions.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        temb_channels: channels of the embedding.
        norm_num_groups: groups of both norms.
        norm_eps: epsilon of both norms.
        resample: `"down"` halves every axis by average pooling, `"up"` doubles it by nearest neighbour; both branches
            are resampled, the residual one after norm and activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        norm_num_groups: int,
        norm_eps: float,
        resample: str | None = None,
    ):
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps=norm_eps)
        convolution = MaisiUpsampleConv3d if resample == "up" else MaisiConv3d
        self.conv1 = convolution(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps=norm_eps)
        self.conv2 = MaisiConv3d(out_channels, out_channels, kernel_size=3, padding=1)
        self.conv_shortcut = (
            nn.Conv3d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None
        )

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """`hidden_states` is (N, C, X, Y, Z), `temb` (N, temb_channels)."""
        residual = hidden_states
        hidden_states = self.run(convolve, hidden_states, self.conv1, self.norm1, self.resample)
        hidden_states = hidden_states + self.time_emb_proj(F.silu(temb))[:, :, None, None, None]
        hidden_states = self.run(convolve, hidden_states, self.conv2, self.norm2)

        residual = resample(residual, self.resample)
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(residual)
        return residual + hidden_states


class MaisiDownsample3D(nn.Module):
    """Strided convolution, padded by 1 on both sides of every axis."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """(N, C, X, Y, Z) -> (N, C, X/2, Y/2, Z/2)."""
        return self.conv(hidden_states)


class MaisiUpsample3D(MaisiBlock3D):
    """Nearest-neighbour doubling of every axis, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = MaisiUpsampleConv3d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """(N, C, X, Y, Z) -> (N, C, 2X, 2Y, 2Z)."""
        return self.run(convolve, hidden_states, self.conv, None, "up")


def get_attention(
    dim: int,
    head_dim: int,
    norm_num_groups: int,
    norm_eps: float,
    cross_attention_dim: int | None,
    num_layers: int,
    out_proj: bool,
    upcast_attention: bool,
) -> nn.Module:
    """Attention after a resnet block: a spatial transformer where there is a context, else plain self-attention."""
    heads, rest = divmod(dim, head_dim)
    if rest:
        raise ValueError(
            f"attention_head_dim={head_dim} does not divide the {dim} channels of its level: use one that does"
        )
    if cross_attention_dim is None:
        return MaisiAttentionBlock3D(dim, heads, norm_num_groups, norm_eps, out_proj)
    return MaisiTransformer3D(
        dim, heads, norm_num_groups, norm_eps, num_layers, cross_attention_dim, out_proj, upcast_attention
    )


class MaisiDownBlock3D(MaisiBlock3D):
    """
    One level of the encoder: resnet blocks, each followed by attention where the level has it, then a downsampler.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the level.
        temb_channels: channels of the embedding.
        num_layers: number of resnet blocks.
        norm_num_groups: groups of every group norm.
        norm_eps: epsilon of every group norm.
        add_downsample: whether the level ends by halving every axis.
        resnet_updown: downsample by a resnet block with average pooling instead of a strided convolution.
        attention: arguments of [`get_attention`] but for `dim`; `None` for a level without attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        num_layers: int,
        norm_num_groups: int,
        norm_eps: float,
        add_downsample: bool,
        resnet_updown: bool,
        attention: dict | None,
    ):
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for i in range(num_layers):
            self.resnets.append(
                MaisiResnetBlock3D(
                    in_channels if i == 0 else out_channels, out_channels, temb_channels, norm_num_groups, norm_eps
                )
            )
            if attention is not None:
                self.attentions.append(get_attention(out_channels, **attention))

        self.downsamplers = nn.ModuleList()
        if add_downsample and resnet_updown:
            self.downsamplers.append(
                MaisiResnetBlock3D(
                    out_channels, out_channels, temb_channels, norm_num_groups, norm_eps, resample="down"
                )
            )
        elif add_downsample:
            self.downsamplers.append(MaisiDownsample3D(out_channels))

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns the output and, for the skips, what every resnet (or attention) and the downsampler gave."""
        output_states = ()
        for i, resnet in enumerate(self.resnets):
            hidden_states = resnet(hidden_states, temb)
            if self.attentions:
                hidden_states = self.run(self.attentions[i], hidden_states, encoder_hidden_states)
            output_states += (hidden_states,)
        for downsampler in self.downsamplers:
            hidden_states = downsampler(hidden_states, temb)
            output_states += (hidden_states,)
        return hidden_states, output_states


class MaisiMidBlock3D(MaisiBlock3D):
    """The bottom of the UNet: resnet block, attention, resnet block."""

    def __init__(self, channels: int, temb_channels: int, norm_num_groups: int, norm_eps: float, attention: dict):
        super().__init__()
        self.resnets = nn.ModuleList(
            MaisiResnetBlock3D(channels, channels, temb_channels, norm_num_groups, norm_eps) for _ in range(2)
        )
        self.attentions = nn.ModuleList([get_attention(channels, **attention)])

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`hidden_states` is (N, C, X, Y, Z) and keeps its shape."""
        hidden_states = self.resnets[0](hidden_states, temb)
        hidden_states = self.run(self.attentions[0], hidden_states, encoder_hidden_states)
        return self.resnets[1](hidden_states, temb)


class MaisiUpBlock3D(MaisiBlock3D):
    """
    One level of the decoder: resnet blocks on the concatenated skips, attention where the level has it, an upsampler.

    Args:
        in_channels: channels of the next level, which the last skip of this one comes with.
        prev_output_channels: channels of what the previous level gave.
        out_channels: channels of the level.
        temb_channels: channels of the embedding.
        num_layers: number of resnet blocks, one more than in the encoder.
        norm_num_groups: groups of every group norm.
        norm_eps: epsilon of every group norm.
        add_upsample: whether the level ends by doubling every axis.
        resnet_updown: upsample by a resnet block instead of a plain convolution.
        attention: arguments of [`get_attention`] but for `dim`; `None` for a level without attention.
    """

    def __init__(
        self,
        in_channels: int,
        prev_output_channels: int,
        out_channels: int,
        temb_channels: int,
        num_layers: int,
        norm_num_groups: int,
        norm_eps: float,
        add_upsample: bool,
        resnet_updown: bool,
        attention: dict | None,
    ):
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for i in range(num_layers):
            hidden_channels = prev_output_channels if i == 0 else out_channels
            skip_channels = in_channels if i == num_layers - 1 else out_channels
            self.resnets.append(
                MaisiResnetBlock3D(
                    hidden_channels + skip_channels, out_channels, temb_channels, norm_num_groups, norm_eps
                )
            )
            if attention is not None:
                self.attentions.append(get_attention(out_channels, **attention))

        self.upsamplers = nn.ModuleList()
        if add_upsample and resnet_updown:
            self.upsamplers.append(
                MaisiResnetBlock3D(out_channels, out_channels, temb_channels, norm_num_groups, norm_eps, resample="up")
            )
        elif add_upsample:
            self.upsamplers.append(MaisiUpsample3D(out_channels))

    def forward(
        self,
        hidden_states: torch.Tensor,
        res_hidden_states: tuple[torch.Tensor, ...],
        temb: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`res_hidden_states` are the skips of this level, one for each resnet block, used from the last on."""
        for i, resnet in enumerate(self.resnets):
            hidden_states = torch.cat([hidden_states, res_hidden_states[-1 - i]], dim=1)
            hidden_states = resnet(hidden_states, temb)
            if self.attentions:
                hidden_states = self.run(self.attentions[i], hidden_states, encoder_hidden_states)
        for upsampler in self.upsamplers:
            hidden_states = upsampler(hidden_states, temb)
        return hidden_states


def expand_to_levels(value: int | list[int] | tuple[int, ...], levels: int, name: str) -> tuple[int, ...]:
    """One value for every level from a single one or a list; a list of another length raises a `ValueError`."""
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels:
        raise ValueError(
            f"`{name}` {values} has {len(values)} entries, but `block_out_channels` has {levels} levels: "
            "give one value, or one a level"
        )
    return values


def level_attention(
    attention_levels: tuple[bool, ...], attention_head_dim: tuple[int, ...], **attention
) -> tuple[dict | None, ...]:
    """The arguments of [`get_attention`] of every level, `None` where a level has none."""
    return tuple(
        {"head_dim": head_dim, **attention} if has_attention else None
        for has_attention, head_dim in zip(attention_levels, attention_head_dim)
    )
