"""The model that a training starts from."""

import argparse

from diffusers import DiffusionPipeline

from ..models import MaisiControlNetModel
from ..pipelines import MaisiCTPipeline, MaisiMaskPipeline


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Which model a training starts from."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=required,
        help="diffusers repository, or with --version published checkpoints: a folder or a Hub id",
    )
    group.add_argument("--version", help="which published model: rflow-ct, ddpm-ct, rflow-mr, rflow-mr-brain")
    group.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    group.add_argument("--variant", help="name of the weights' variant, e.g. fp16")
    group.add_argument("--cache_dir", help="folder for models from the Hub")


def load_base_model(args: argparse.Namespace) -> MaisiCTPipeline:
    """
    The pipeline to train a part of, without mask networks, in float32.

    Raises:
        OSError: a source that is not there.
        ValueError: a source that is no such model.
    """
    hub_kwargs = {"revision": args.revision, "cache_dir": args.cache_dir}
    without = dict.fromkeys(("mask_vae", "mask_unet", "mask_scheduler"))
    if args.version is None:
        return MaisiCTPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            variant=args.variant,
            modalities=None,  # those of the data come in
            **hub_kwargs,
            **without,
        )
    pipe = MaisiCTPipeline.from_maisi_checkpoint(
        args.pretrained_model_name_or_path, version=args.version, **hub_kwargs
    )
    pipe.register_modules(**without)
    return pipe


def load_any_base_model(args: argparse.Namespace) -> MaisiCTPipeline | MaisiMaskPipeline:
    """[`load_base_model`], or if the source is a mask pipeline, that, in float32."""
    hub_kwargs = {"revision": args.revision, "cache_dir": args.cache_dir}
    if args.version is None:
        config = DiffusionPipeline.load_config(args.pretrained_model_name_or_path, **hub_kwargs)
        if config["_class_name"] == MaisiMaskPipeline.__name__:
            return MaisiMaskPipeline.from_pretrained(
                args.pretrained_model_name_or_path, variant=args.variant, **hub_kwargs
            )
    return load_base_model(args)


def new_controlnet(pipe: MaisiCTPipeline, first_channels: int = 8) -> MaisiControlNetModel:
    """
    A ControlNet to train for the pipeline's UNet and VAE, as published for a VAE that halves the axes twice; its
    embedding of label maps can have other `first_channels`.
    """
    # And the same as far as another VAE's goes.
    times, channels = pipe.vae.spatial_compression_ratio.bit_length(), (first_channels, 32, 64)
    channels = channels[:times] + channels[-1:] * (times - len(channels))
    return MaisiControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=channels)
