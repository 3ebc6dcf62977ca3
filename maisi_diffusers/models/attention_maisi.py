"""Attention of the MAISI UNets: plain self-attention blocks (image) and spatial transformers (mask)."""

import torch
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn


class MaisiAttnProcessor:
    """Scaled dot-product attention through the backend that is active for the model."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "MaisiAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        key = attn.to_k(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
        value = attn.to_v(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
        dtype = query.dtype
        if attn.upcast_attention:
            query, key, value = query.float(), key.float(), value.float()

        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out(hidden_states.flatten(-2).to(dtype))


class MaisiAttention(nn.Module, AttentionModuleMixin):
    """
    Multi-head attention over (N, tokens, channels); every head is a contiguous block of channels.

    Args:
        dim: channels of the tokens.
        heads: number of heads.
        cross_attention_dim: channels of the context tokens; `None` attends to the tokens themselves.
        bias: whether q, k and v have a bias.
        out_proj: whether the heads are mixed by an output layer.
        upcast_attention: compute the attention itself in float32.
    """

    _default_processor_cls = MaisiAttnProcessor
    _available_processors = [MaisiAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(
        self,
        dim: int,
        heads: int,
        cross_attention_dim: int | None = None,
        bias: bool = True,
        out_proj: bool = True,
        upcast_attention: bool = False,
    ):
        super().__init__()
        self.heads = heads
        self.upcast_attention = upcast_attention
        self.is_cross_attention = cross_attention_dim is not None
        context_dim = cross_attention_dim or dim
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim, dim, bias=bias)
        self.to_out = nn.Linear(dim, dim) if out_proj else nn.Identity()
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """Attend from `hidden_states` (N, T, C) to `encoder_hidden_states` (N, S, D), or to itself."""
        return self.processor(self, hidden_states, encoder_hidden_states)


class MaisiAttentionBlock3D(nn.Module):
    """Group norm, self-attention over all voxels, residual: the attention of the image UNet and the ControlNet."""

    def __init__(self, dim: int, heads: int, norm_num_groups: int, norm_eps: float, out_proj: bool):
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, dim, eps=norm_eps)
        self.attn = MaisiAttention(dim, heads, out_proj=out_proj)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """`hidden_states` is (N, C, X, Y, Z); `encoder_hidden_states` is not used by plain self-attention."""
        tokens = self.norm(hidden_states).flatten(2).transpose(1, 2)
        tokens = self.attn(tokens)
        # The first summand gives the result its memory layout: that of the input, not that of the tokens.
        return hidden_states + tokens.transpose(1, 2).reshape(hidden_states.shape)


class MaisiTransformerBlock(nn.Module):
    """Self-attention, cross-attention and a GEGLU feed-forward, each after a layer norm and with a residual."""

    def __init__(self, dim: int, heads: int, cross_attention_dim: int, out_proj: bool, upcast_attention: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = MaisiAttention(dim, heads, bias=False, out_proj=out_proj, upcast_attention=upcast_attention)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = MaisiAttention(
            dim, heads, cross_attention_dim=cross_attention_dim, bias=False, upcast_attention=upcast_attention
        )
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, activation_fn="geglu")

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` is (N, T, C), `encoder_hidden_states` (N, S, cross_attention_dim)."""
        hidden_states = self.attn1(self.norm1(hidden_states)) + hidden_states
        hidden_states = self.attn2(self.norm2(hidden_states), encoder_hidden_states) + hidden_states
        return self.ff(self.norm3(hidden_states)) + hidden_states


class MaisiTransformer3D(nn.Module):
    """Spatial transformer over all voxels, conditioned on context tokens: the attention of the mask UNet."""

    def __init__(
        self,
        dim: int,
        heads: int,
        norm_num_groups: int,
        norm_eps: float,
        num_layers: int,
        cross_attention_dim: int,
        out_proj: bool,
        upcast_attention: bool,
    ):
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, dim, eps=norm_eps)
        self.proj_in = nn.Conv3d(dim, dim, kernel_size=1)
        self.transformer_blocks = nn.ModuleList(
            MaisiTransformerBlock(dim, heads, cross_attention_dim, out_proj, upcast_attention)
            for _ in range(num_layers)
        )
        self.proj_out = nn.Conv3d(dim, dim, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states` is (N, C, X, Y, Z), `encoder_hidden_states` (N, S, cross_attention_dim)."""
        tokens = self.proj_in(self.norm(hidden_states))
        shape = tokens.shape
        tokens = tokens.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states)
        tokens = tokens.transpose(1, 2).reshape(shape)
        return hidden_states + self.proj_out(tokens)
