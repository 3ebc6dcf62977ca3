"""
Generate a CT from a label map with a small model whose weights are random.

It shows that everything is installed and what goes in and out; what comes out is noise in the shape of a body. For
images that look like CTs, take a trained model (see README.md).

    python scripts/quickstart.py --output quickstart
"""

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from diffusers import DDPMScheduler

from maisi_diffusers import (
    AutoencoderKLMaisi,
    MaisiControlNetModel,
    MaisiCTPipeline,
    MaisiRFlowScheduler,
    MaisiUNet3DConditionModel,
)
from maisi_diffusers.anatomy import BODY, label_index
from maisi_diffusers.imaging import labels_to_nifti, save_preview

# The noise schedule of MAISI's first models.
DDPM = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "clip_sample": False}
SIZE, SPACING = (96, 96, 96), (4.0, 4.0, 4.0)
# Ellipsoids in a torso: name, centre and half axes in mm from its middle; X to the right, Y forwards, Z upwards.
TORSO = [
    ("body", (0, 0, 0), (160, 105, 1000)),
    ("right lung lower lobe", (75, 0, 110), (55, 75, 95)),
    ("left lung lower lobe", (-75, 0, 110), (55, 75, 95)),
    ("heart", (-15, 35, 95), (50, 45, 50)),
    ("liver", (65, 10, -30), (80, 75, 65)),
    ("hepatic tumor", (80, 25, -40), (18, 18, 18)),
    ("stomach", (-55, 30, -30), (50, 40, 50)),
    ("spleen", (-105, -40, -20), (30, 35, 50)),
    ("right kidney", (60, -50, -100), (28, 25, 55)),
    ("left kidney", (-60, -50, -95), (28, 25, 55)),
    ("aorta", (-12, -30, 0), (12, 12, 1000)),
    ("vertebrae L1", (0, -65, 0), (25, 25, 1000)),
]


def make_label_map() -> nib.Nifti1Image:
    """A coarse torso of ellipsoids in MAISI's vocabulary, uint8 on a grid of 4 mm."""
    grid = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(SIZE, SPACING)), indexing="ij")
    labels = np.zeros(SIZE, dtype=np.uint8)
    for name, centre, half_axes in TORSO:
        inside = sum(((x - c) / half) ** 2 for x, c, half in zip(grid, centre, half_axes)) <= 1
        labels[inside] = label_index(name)
    return labels_to_nifti(labels, np.diag([*SPACING, 1.0]))


def make_random_model(folder: Path, kind: str, seed: int) -> None:
    """Save a pipeline of small networks with random weights as a diffusers repository; `kind` is rflow or ddpm."""
    torch.manual_seed(seed)
    unet = MaisiUNet3DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, attention_levels=(False, True), norm_num_groups=16
    )
    controlnet = MaisiControlNetModel.from_unet(unet)
    vae = AutoencoderKLMaisi(block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8)
    # Like a trained encoder, have it be sure of its latents: the last half of what it gives is their log-variance.
    log_variance = vae.quant_conv.weight.shape[0] // 2
    torch.nn.init.zeros_(vae.quant_conv.weight.data[log_variance:])
    torch.nn.init.constant_(vae.quant_conv.bias.data[log_variance:], -8.0)
    # Bring the untrained decoder's output into its range, 0..1 for -1000..1000 HU.
    vae.decoder.conv_out.weight.data *= 0.2
    torch.nn.init.constant_(vae.decoder.conv_out.bias, 0.55)
    scheduler = MaisiRFlowScheduler() if kind == "rflow" else DDPMScheduler(**DDPM)
    # No organ of it has the HU that it should have, so none is checked.
    pipe = MaisiCTPipeline(vae, unet, scheduler, controlnet, num_inference_steps=4, quality_thresholds={})
    pipe.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for model, label map and CT")
    parser.add_argument("--mask", type=Path, help="a label map of your own, in MAISI's vocabulary")
    parser.add_argument("--kind", choices=["rflow", "ddpm"], default="rflow", help="what the model's UNet predicts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.mask is not None and not args.mask.is_file():
        sys.exit(f"there is no file {args.mask}: give a label map as .nii or .nii.gz with --mask")
    if args.output.is_file():
        sys.exit(f"{args.output} is a file: name a folder with --output")
    if args.output.exists() and any(args.output.iterdir()):
        sys.exit(f"{args.output} exists and is not empty: name another folder with --output")
    args.output.mkdir(parents=True, exist_ok=True)

    mask = args.mask
    if mask is None:
        mask = args.output / "mask.nii.gz"
        make_label_map().to_filename(mask)
    make_random_model(args.output / "model", args.kind, args.seed)

    pipe = MaisiCTPipeline.from_pretrained(args.output / "model")
    out = pipe(mask=mask, generator=torch.Generator().manual_seed(args.seed))
    out.images[0].to_filename(args.output / "ct.nii.gz")
    out.labels[0].to_filename(args.output / "labels.nii.gz")
    title = "random weights: noise in the shape of a body, no CT"
    save_preview(args.output / "preview.png", out.images[0], out.labels[0], hidden_labels=(BODY,), title=title)
    print(f"The model's weights are random, so this is noise in the shape of a body: {args.output / 'preview.png'}")


if __name__ == "__main__":
    main()
