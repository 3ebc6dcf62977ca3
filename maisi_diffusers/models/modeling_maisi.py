"""What our models do differently from other diffusers models when they are loaded."""

from typing import Self

import torch
from diffusers.models.modeling_utils import ModelMixin

ALIGNMENT = 64


class MaisiModelMixin(ModelMixin):
    """A diffusers model whose loaded weights lie in memory as those of a new model do."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> Self:
        """
        [`~diffusers.ModelMixin.from_pretrained`], giving bit for bit the results of the model that was saved.

        Weights mapped from a safetensors file start wherever they do in the file, and matrix products on the CPU round
        differently by the alignment of their operands.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone(memory_format=torch.preserve_format)
        return loaded
