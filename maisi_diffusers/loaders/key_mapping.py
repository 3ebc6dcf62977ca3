"""Where a weight of ours lies in a published checkpoint."""

import re

# Read from our side, so that a weight without a source cannot be overlooked. Applied in turn; the last group drops in
# the ".conv" of MONAI's convolution wrapper.
UNET_RULES = [
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^(top|bottom)_region_embedding\.linear_1\.", r"\1_region_index_layer.0."),
    (r"^(top|bottom)_region_embedding\.linear_2\.", r"\1_region_index_layer.2."),
    (r"^spacing_embedding\.linear_1\.", "spacing_layer.0."),
    (r"^spacing_embedding\.linear_2\.", "spacing_layer.2."),
    (r"^mid_block\.resnets\.0\.", "middle_block.resnet_1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.resnet_2."),
    (r"^mid_block\.attentions\.0\.", "middle_block.attention."),
    (r"\.downsamplers\.0\.conv\.", ".downsampler.op.conv."),
    (r"\.upsamplers\.0\.conv\.", ".upsampler.postconv.conv."),
    (r"\.(down|up)samplers\.0\.", r".\1sampler."),
    (r"\.conv_shortcut\.", ".skip_connection."),
    (r"\.to_out\.", ".out_proj."),
    (r"\.ff\.net\.0\.proj\.", ".ff.linear1."),
    (r"\.ff\.net\.2\.", ".ff.linear2."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (
        r"((?:^|\.)(?:conv_in|conv_out|conv1|conv2|skip_connection|proj_in|proj_out|out\.2|controlnet_mid_block"
        r"|controlnet_cond_embedding\.blocks\.\d+|controlnet_down_blocks\.[1-9]\d*))\.(weight|bias)$",
        r"\1.conv.\2",
    ),
]

VAE_RULES = [
    (r"\.(conv1|conv2)\.", r".\1.conv.conv."),
    (r"\.conv_shortcut\.", ".nin_shortcut.conv.conv."),
    (r"\.resampler\.conv\.", ".conv.conv.conv."),
    (r"\.(?:conv_in|conv_out)\.", ".conv.conv."),
    (r"\.conv_norm_out\.", "."),
    (r"^post_quant_conv\.", "post_quant_conv.conv."),
]


def unet_source_keys(name: str) -> tuple[str, ...]:
    """The key of a weight of the UNet or the ControlNet in a published checkpoint."""
    return (_rewrite(name, UNET_RULES),)


def vae_source_keys(name: str, layers_per_block: tuple[int, ...]) -> tuple[str, ...]:
    """
    The keys of a weight of the VAE in a published checkpoint, which numbers the layers of encoder and decoder through.

    The two convolutions for mean and log-variance are one here: its weight has two sources, joined along axis 0.
    """
    if name.startswith("quant_conv."):
        part = name.removeprefix("quant_conv.")
        return (f"quant_conv_mu.conv.{part}", f"quant_conv_log_sigma.conv.{part}")
    coder, _, rest = name.partition(".")
    if coder in ("encoder", "decoder"):
        layers = layers_per_block if coder == "encoder" else layers_per_block[::-1]
        last = len(layers) - 1
        # conv_in is number 0; a level has its resnets and, but for the last, a resampler.
        firsts = [1 + sum(n + 1 for n in layers[:level]) for level in range(len(layers))]
        norm_out = firsts[last] + layers[last]
        rest = re.sub(
            r"^(?:down|up)_blocks\.(\d+)\.resnets\.(\d+)\.",
            lambda match: f"blocks.{firsts[int(match[1])] + int(match[2])}.",
            rest,
        )
        rest = re.sub(
            r"^(?:down|up)_blocks\.(\d+)\.resampler\.",
            lambda match: f"blocks.{firsts[int(match[1])] + layers[int(match[1])]}.resampler.",
            rest,
        )
        rest = re.sub(r"^conv_in\.", "blocks.0.conv_in.", rest)
        rest = re.sub(r"^conv_norm_out\.", f"blocks.{norm_out}.conv_norm_out.", rest)
        rest = re.sub(r"^conv_out\.", f"blocks.{norm_out + 1}.conv_out.", rest)
        name = f"{coder}.{rest}"
    return (_rewrite(name, VAE_RULES),)


def _rewrite(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
