r"""
Encode CT or MR volumes to the latents that the UNet and the ControlNet are trained on, or label maps to those of the
mask UNet.

Example:

```bash
maisi-ct encode --data_list data/dataset.json --vae nvidia/NV-Generate-CT --version rflow-ct --output_dir latents
maisi-ct encode --data_list data/dataset.json --vae mask-vae --size 128 128 128 --output_dir mask-latents
```

The VAE decides what is encoded: the volumes of a data list, or, if it takes the bits of labels, their label maps. The
output has `<case>_emb.nii.gz` for every case, named by the path of its image in the list's folder,
`<case>_label.nii.gz` on the grid that it was resized to, and the data list of these, `latents.json`. Run it again to
go on where it was interrupted. `scripts/encode_latents.py` is the same command: under `torchrun --standalone
--nproc_per_node 8` or `accelerate launch --multi_gpu --num_processes 8` its processes share the cases, with GPUs or
without (accelerate's `--cpu` starts a single one).
"""

import argparse
from pathlib import Path

from ..loaders import VERSIONS
from ..models import TILINGS
from ..training.encode_dataset import DTYPES, POSTERIORS, encode
from .scripts import ScriptParser, of_cases, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, or a list of arguments instead."""
    parser = ScriptParser(
        prog="maisi-ct encode", description="Encode volumes or label maps to the latents of a data list."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_list", type=Path, help="data list of volumes, of label maps for a mask VAE")
    source.add_argument("--images", type=Path, help="folder instead: every .nii and .nii.gz below it")
    parser.add_argument("--data_root", type=Path, help="folder of the paths in --data_list, if not the list's own")
    parser.add_argument("--modality", default="ct", help="what the volumes in --images are, e.g. ct or mri_t1")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the latents and their list")

    parser.add_argument("--vae", required=True, help="VAE or pipeline in diffusers' layout: a folder or a Hub id")
    parser.add_argument("--version", help=f"--vae is a published checkpoint, of this model: {', '.join(VERSIONS)}")
    parser.add_argument(
        "--subfolder",
        help="where the VAE is in --vae: vae or mask_vae; if not given the first of vae, --vae, mask_vae",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a --vae on the Hub")
    parser.add_argument("--variant", help="variant of the weights in diffusers' layout, e.g. fp16")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="what to compute in")
    parser.add_argument(
        "--tiling",
        choices=TILINGS,
        default="auto",
        help="slabs, for the same latents: by the memory there is, off, on, or on with less kept and more time",
    )
    parser.add_argument("--memory", metavar="SIZE", help="of --tiling exact or lean, e.g. 4GiB; else what is free")

    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size_multiple", type=int, default=128, help="resize to the nearest multiple along each axis")
    size.add_argument("--size", type=int, nargs=3, metavar=("X", "Y", "Z"), help="resize to this many voxels instead")
    parser.add_argument(
        "--posterior",
        choices=POSTERIORS,
        default="moments",
        help="store mean and log-variance, for a new draw at every step; or one draw, as published; or the mean",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --posterior sample, whose draws also depend on names")
    parser.add_argument("--overwrite", action="store_true", help="encode again what is in --output_dir already")
    args = parser.parse_args(argv)
    if args.memory is not None and args.tiling not in ("exact", "lean"):
        parser.error(f"argument --memory {args.memory} bounds slabs: give it with --tiling exact or lean")
    return args


def main(argv: list[str] | None = None) -> None:
    """Encode, or say in one line on stderr what failed and exit with code 1."""
    args = parse_args(argv)
    run(lambda: of_cases(args.output_dir / "latents.json", *encode(args)), args.as_json)
