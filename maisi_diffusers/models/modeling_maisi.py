"""What our models do differently from other diffusers models: how their weights lie in memory."""

from typing import Self

import torch
from diffusers.models.modeling_utils import ModelMixin

ALIGNMENT = 64


class MaisiModelMixin(ModelMixin):
    """A diffusers model whose weights lie in memory as is best."""

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

    def state_dict(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """As `nn.Module` has it, in torch's usual memory format: safetensors writes no other."""
        state = super().state_dict(*args, **kwargs)
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() == 5:
                state[name] = value.contiguous()
        return state

    def lay_out(self, device: torch.device) -> None:
        """
        Put the weights in the memory format in which inference on a device is fastest; what is saved is the same.

        On the CPU in 16 bits that is `torch.channels_last_3d`, and so for the features, which follow the weights:
        oneDNN then orders no values anew, and a step takes 0.6 to 0.9 of the time, by the CPU. In float32 some
        convolutions gain by it as others lose. On a GPU (H200) decoding took 1.5 times as long by it, for its group
        norms, and a step the same: there nothing is done.
        """
        if device.type == "cpu" and self.dtype.itemsize == 2:
            for parameter in self.parameters():
                if parameter.dim() == 5:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
