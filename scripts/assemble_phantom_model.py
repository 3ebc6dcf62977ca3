r"""
Put the trained parts of the embedded model, its label maps and its anatomy sizes together.

Example:

```bash
python scripts/assemble_phantom_model.py --image_model work/images --mask_model work/masks --label_maps work/database \
    --anatomy_sizes work/mask-phantoms/dataset.json --output_dir maisi-phantom-tiny
```

`scripts/train_phantom_model.sh` trains the parts and calls this.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from maisi_diffusers import (
    PHANTOM_TINY,
    MaisiControlNetModel,
    MaisiCTPipeline,
    MaisiMaskDatabase,
    MaisiMaskPipeline,
)
from maisi_diffusers.files import write_atomically
from maisi_diffusers.phantom import SIZE_RANGES
from maisi_diffusers.training.data_list import read_data_list
from maisi_diffusers.training.phantom_dataset import MODALITIES

MODEL_CARD = Path(__file__).resolve().parents[1] / "model_cards" / f"{PHANTOM_TINY.name}.md"
SIZE, SPACING = (128, 128, 128), (3.0, 3.0, 3.0)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """The command line, or a list of arguments instead."""
    parser = argparse.ArgumentParser(description="Put the trained parts of the embedded model together.")
    parser.add_argument("--image_model", type=Path, required=True, help="pipeline of VAE, UNet and ControlNet")
    parser.add_argument("--controlnet", type=Path, help="instead of that of --image_model")
    parser.add_argument("--mask_model", type=Path, required=True, help="pipeline of mask VAE and mask UNet")
    parser.add_argument("--label_maps", type=Path, required=True, help="data set whose label maps are the database")
    parser.add_argument("--anatomy_sizes", type=Path, required=True, help="data list whose sizes are to go with it")
    parser.add_argument("--num_inference_steps", type=int, default=30, help="of images for a label map")
    parser.add_argument("--image_only_num_inference_steps", type=int, default=30, help="of images without one")
    parser.add_argument("--mask_num_inference_steps", type=int, default=30, help="of label maps")
    parser.add_argument("--output_dir", type=Path, default=PHANTOM_TINY)
    return parser.parse_args(input_args)


def main(input_args: list[str] | None = None) -> None:
    """Write the model's folder."""
    args = parse_args(input_args)
    is_model = (args.output_dir / "model_index.json").is_file()
    if args.output_dir.exists() and not is_model and (args.output_dir.is_file() or any(args.output_dir.iterdir())):
        raise ValueError(f"{args.output_dir} is there and holds no model: choose another --output_dir, or remove it")
    images = MaisiCTPipeline.from_pretrained(args.image_model)
    if args.controlnet is not None:
        images.register_modules(controlnet=MaisiControlNetModel.from_pretrained(args.controlnet))
    masks = MaisiMaskPipeline.from_pretrained(args.mask_model)
    pipe = MaisiCTPipeline(
        vae=images.vae,
        unet=images.unet,
        scheduler=images.scheduler,
        controlnet=images.controlnet,
        mask_vae=masks.mask_vae,
        mask_unet=masks.mask_unet,
        mask_scheduler=masks.mask_scheduler,
        num_inference_steps=args.num_inference_steps,
        image_only_num_inference_steps=args.image_only_num_inference_steps,
        modality=images.config.modality,
        modalities=["unknown", "ct", *dict.fromkeys(MODALITIES.values())],  # with --modality_dropout
        prediction_type=images.config.prediction_type,
        mask_latent_size=masks.config.mask_latent_size,
        mask_spacing=masks.config.mask_spacing,
        mask_prediction_type=masks.config.mask_prediction_type,
        mask_num_inference_steps=args.mask_num_inference_steps,
        mask_size_ranges={name: list(ml) for name, ml in SIZE_RANGES.items()},
        default_output_size=SIZE,
        default_spacing=SPACING,
    )
    for part in (pipe.vae, pipe.unet, pipe.controlnet, pipe.mask_vae, pipe.mask_unet):
        part.register_to_config(_name_or_path=PHANTOM_TINY.name)  # not the folder that it happened to be read from
    with write_atomically(args.output_dir) as folder, tempfile.TemporaryDirectory() as database:
        label_maps = Path(database, "masks")
        label_maps.mkdir()
        for case in read_data_list(args.label_maps / "dataset.json").cases:
            shutil.copyfile(case.label, label_maps / case.label.name)
        pipe.mask_database = MaisiMaskDatabase.from_folder(database)
        cases = read_data_list(args.anatomy_sizes).cases
        pipe.anatomy_size_conditions = [[round(size, 3) for size in case.organ_size] for case in cases]
        pipe.to(torch.float16).save_pretrained(folder)
        shutil.copyfile(MODEL_CARD, folder / "README.md")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
