"""How much memory a volume takes, stage by stage, before it is tried."""

import math
import weakref

import torch
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..models.slab_tiling import slab_memory
from .pipeline_maisi_ct import MaisiCTPipeline


class LivingTensors(TorchDispatchMode):
    """
    The highest sum of bytes of the tensors that were alive at once in a block.

    A convolution takes more while it runs: on the CPU oneDNN orders the values of input and weight anew, unless the
    channels of a voxel lie side by side, and on a GPU cuDNN those of the result as well.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.is_on_cpu = device.type == "cpu"

    def __enter__(self):
        self.now = self.highest = 0
        self.counted = weakref.WeakSet()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(storage) for storage in storages((args, kwargs))}  # of which a result may be a view
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_group_norm.default:  # without values it forgets the memory format
            result = (result[0].contiguous(memory_format=suggest_memory_format(args[0])), *result[1:])
        for storage in storages(result):
            if id(storage) not in given and storage not in self.counted:
                self.counted.add(storage)
                self.change(storage.nbytes())
                weakref.finalize(storage, self.change, -storage.nbytes())
        if func is torch.ops.aten.convolution.default:
            taken = args[:2] if self.is_on_cpu else [*args[:2], result]
            ordered = [x for x in taken if not x.is_contiguous(memory_format=torch.channels_last_3d)]
            self.highest = max(self.highest, self.now + sum(x.nbytes for x in ordered))
        return result

    def change(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.highest = max(self.highest, self.now)


def storages(tree) -> list[torch.UntypedStorage]:
    """Of the tensors in nested tuples, lists and dictionaries."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def with_dtype(network: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """A network like it, all of whose weights have a dtype, laid out for a device."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Without what diffusers notes beside it: it takes arguments that were given by position for left out.
        same = type(network).from_config({name: v for name, v in network.config.items() if not name.startswith("_")})
        same.lay_out(device)
        return same
    finally:
        torch.set_default_dtype(previous)


def plan_memory(
    pipe: MaisiCTPipeline, size: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, int]:
    """
    Bytes that each stage of making one image takes at its highest, besides the weights, which stay.

    The networks run on tensors without values, and those that are alive at once are added up.

    Args:
        pipe: with or without its weights.
        size: of the image, in voxels, which the model can make.
        dtype: of the networks.
        device: that they are to run on, which need not be there; what slabs take is told for the CPU.

    Returns:
        stage -> bytes: `weights`; `mask step` and `mask decode`, in slabs, of a label map that is made, if the model
        can; `embedding` of the label map, with a ControlNet; `step`; `decode off`, in one piece, `decode exact` and
        `decode lean`, in slabs; and `kept exact` and `kept lean`, what of these can be on the host or in a scratch
        file instead.
    """
    latent_size = tuple(n // pipe.vae.spatial_compression_ratio for n in size)
    # Networks ask on which device they are: a GPU's part is played by the one without values.
    with FakeTensorMode() if device.type == "cpu" else torch.device("meta"), torch.no_grad():
        networks = {
            name: with_dtype(network, dtype, device)
            for name, network in pipe.components.items()
            if isinstance(network, torch.nn.Module)
        }
        stages = {"weights": sum(p.nbytes for one in networks.values() for p in one.parameters())}
        if "mask_unet" in networks:
            mask_unet = networks["mask_unet"]
            mask_latents = torch.empty(1, mask_unet.config.in_channels, *pipe.config.mask_latent_size, dtype=dtype)
            sizes = torch.empty(1, 1, mask_unet.config.cross_attention_dim, dtype=dtype)
            with LivingTensors(device) as living:
                mask_unet(mask_latents, torch.empty(1), encoder_hidden_states=sizes)
            stages["mask step"] = living.highest
            decode = sum(slab_memory(pipe.mask_vae.decoder, pipe.config.mask_latent_size, True, dtype))
            voxels = math.prod(pipe.mask_vae.spatial_compression_ratio * n for n in pipe.config.mask_latent_size)
            stages["mask decode"] = decode + voxels * torch.int16.itemsize
        vae, unet, controlnet = networks["vae"], networks["unet"], networks.get("controlnet")
        latents = torch.empty(1, unet.config.in_channels, *latent_size, dtype=dtype)
        conditions = {"timestep": torch.empty(1)}
        if unet.config.num_class_embeds is not None:
            conditions["class_labels"] = torch.ones(1, dtype=torch.long)
        if controlnet is not None:
            bits = torch.empty(1, 8, *size, dtype=torch.uint8)
            with LivingTensors(device) as living:
                embedding = controlnet.embed_condition(bits)
            stages["embedding"] = bits.nbytes + living.highest
        with LivingTensors(device) as living:
            residuals = {}
            if controlnet is not None:
                down, mid = controlnet(latents, **conditions, controlnet_cond_embedding=embedding, return_dict=False)
                residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            if unet.config.use_spacing:
                conditions["spacing"] = torch.ones(1, 3, dtype=dtype)
            if unet.config.use_region_index:
                conditions |= dict.fromkeys(("top_region_index", "bottom_region_index"), torch.ones(1, 4, dtype=dtype))
            unet(latents, **conditions, **residuals)
        stages["step"] = living.highest
        vae.disable_tiling()
        with LivingTensors(device) as living:
            vae.decode(latents)
        stages["decode off"] = living.highest
    for name, keeps_finest in (("exact", True), ("lean", False)):
        kept, slabs = slab_memory(pipe.vae.decoder, latent_size, keeps_finest, dtype)
        stages[f"kept {name}"] = kept
        stages[f"decode {name}"] = kept + slabs + math.prod(size) * dtype.itemsize
    return stages
