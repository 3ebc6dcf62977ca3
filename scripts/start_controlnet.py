r"""
Make a ControlNet that sees from its first step on what the latents of its labels are in the mean, for
`train_controlnet.py` to go on with.

Example:

```bash
python scripts/start_controlnet.py --pretrained_model_name_or_path unet --data_list latents/latents.json \
    --output_dir linear-controlnet
python scripts/train_controlnet.py --pretrained_model_name_or_path unet --data_list latents/latents.json \
    --controlnet_model_name_or_path linear-controlnet --output_dir controlnet
```

A new ControlNet learns slowly what the bits of a label mean; here least squares say it at once.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from maisi_diffusers import MaisiCTPipeline
from maisi_diffusers.anatomy import load_label_map
from maisi_diffusers.files import write_atomically
from maisi_diffusers.imaging import modality_code, to_ras
from maisi_diffusers.training.base_model import add_model_arguments, load_base_model, new_controlnet
from maisi_diffusers.training.data_list import Case, read_data_list, split_fold
from maisi_diffusers.training.latents import load_latent
from maisi_diffusers.training.linear_condition import LabelledLatent, make_linear_condition
from maisi_diffusers.training.preflight import check_training_cases


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """The command line, or a list of arguments instead."""
    parser = argparse.ArgumentParser(description="Make a ControlNet that begins as the best linear one.")
    add_model_arguments(parser)
    parser.add_argument("--data_list", type=Path, required=True, help="latents with their label maps")
    parser.add_argument("--data_root", type=Path, help="folder that paths in the list are relative to; the list's own")
    parser.add_argument("--fold", type=int, default=0, help="that is left out")
    parser.add_argument("--num_cases", type=int, default=32, help="to learn from at most, evenly from the list")
    parser.add_argument(
        "--first_channels", type=int, default=8, help="of the embedding of label maps; more hold more kinds of labels"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the fit, and of weights that have no part in it yet")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(input_args)


def load_case(pipe: MaisiCTPipeline, case: Case) -> LabelledLatent:
    """A latent with its label map."""
    latent = load_latent(case.image, pipe.vae.config.latent_channels)
    labels = np.ascontiguousarray(to_ras(load_label_map(case.label)).dataobj)
    return LabelledLatent(
        torch.from_numpy(labels)[None], latent * pipe.vae.config.scaling_factor, modality_code(case.modality)
    )


def main(input_args: list[str] | None = None) -> None:
    """Write the ControlNet."""
    args = parse_args(input_args)
    set_seed(args.seed)
    data_list = read_data_list(args.data_list, args.data_root)
    pipe = load_base_model(args)
    check_training_cases(data_list, pipe.unet, pipe.vae.spatial_compression_ratio, 1, with_labels=True)
    cases, _ = split_fold(data_list.cases, args.fold)
    cases = cases[:: math.ceil(len(cases) / args.num_cases)]
    controlnet = new_controlnet(pipe, args.first_channels)
    controlnet.add_classes(data_list.label_names, data_list.tumor_organs)
    cases = [load_case(pipe, case) for case in tqdm(cases, desc="Cases")]
    for name, error, deviation in zip(
        ("Values", "Differences between modalities"), *make_linear_condition(controlnet, cases, args.seed)
    ):
        print(f"{name} of the labels are missed by {error:.4f} at most; their standard deviation is {deviation:.4f}.")
    with write_atomically(args.output_dir) as folder:
        controlnet.save_pretrained(folder)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
