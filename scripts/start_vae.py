r"""
Make a VAE that is the best linear one for the CTs of a data list, or for its label maps, for `train_vae.py` to go on
with.

Example:

```bash
python scripts/start_vae.py --vae_config_name_or_path configs/phantom_tiny/vae.json --data_list phantoms/dataset.json \
    --output_dir linear-vae
python scripts/train_vae.py --vae_model_name_or_path linear-vae --data_list phantoms/dataset.json --output_dir vae
```

A small VAE learns slowly what principal components give at once.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from maisi_diffusers import AutoencoderKLMaisi
from maisi_diffusers.anatomy import label_bits
from maisi_diffusers.files import write_atomically
from maisi_diffusers.imaging import from_hu, modality_code
from maisi_diffusers.training.data_list import read_data_list, split_fold
from maisi_diffusers.training.latents import encodes_labels
from maisi_diffusers.training.linear_vae import make_linear
from maisi_diffusers.training.patches import LabelPatchDataset, PatchDataset


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """The command line, or a list of arguments instead."""
    parser = argparse.ArgumentParser(description="Make a VAE that is the best linear one for a data list.")
    parser.add_argument("--vae_config_name_or_path", required=True, help="config of the VAE, a file or a folder")
    parser.add_argument("--data_list", type=Path, required=True)
    parser.add_argument("--fold", type=int, default=0, help="that is left out")
    parser.add_argument("--num_cases", type=int, default=32, help="to learn from at most, evenly from the list")
    parser.add_argument(
        "--whitening", type=float, default=0.5, help="0 leaves latents the variances of components, 1 makes them equal"
    )
    parser.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="HU that get more room in the latents than others; train such a VAE no further",
    )
    parser.add_argument("--window_gain", type=float, default=4.0, help="times as much")
    parser.add_argument("--air", type=float, metavar="HU", help="with --window: below it noise of images is cleaned")
    parser.add_argument("--seed", type=int, default=0, help="of the weights that have no part in it yet")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(input_args)


def main(input_args: list[str] | None = None) -> None:
    """Write the VAE."""
    args = parse_args(input_args)
    set_seed(args.seed)
    vae = AutoencoderKLMaisi.from_config(AutoencoderKLMaisi.load_config(args.vae_config_name_or_path))
    cases, _ = split_fold(read_data_list(args.data_list).cases, args.fold)
    cases = cases[:: math.ceil(len(cases) / args.num_cases)]
    dataset_class = LabelPatchDataset if encodes_labels(vae) else PatchDataset
    dataset = dataset_class(cases, patch_size=None, augmentation="none")
    volumes = [dataset[i][dataset.item_name] for i in tqdm(range(len(dataset)), desc="Volumes")]
    if encodes_labels(vae):
        volumes = [label_bits(labels[None], torch.uint8)[0] for labels in volumes]
    window, air = (
        None if hu is None else from_hu(np.array(hu), modality_code("ct")).tolist() for hu in (args.window, args.air)
    )
    make_linear(vae, volumes, args.whitening, None if window is None else tuple(window), args.window_gain, air)
    with write_atomically(args.output_dir) as folder:
        vae.save_pretrained(folder)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
