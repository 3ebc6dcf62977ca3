"""What a diffusion training needs of its cases, looked at before its first step."""

from dataclasses import replace

import nibabel as nib

from ..imaging.nifti import UNREADABLE
from ..models import MaisiUNet3DConditionModel
from .checks import check_cases
from .data_list import DataList


def check_training_cases(
    data_list: DataList, unet: MaisiUNet3DConditionModel, ratio: int, batch_size: int, with_labels: bool
) -> None:
    """Refuse a data list that a training would trip over later. Only headers are read.

    Args:
        data_list: its images are latents.
        unet: says what the cases must have.
        ratio: voxels of a volume to a latent voxel, along each axis.
        batch_size: cases a batch; more than one must have one grid.
        with_labels: whether the cases need label maps.

    Raises:
        ValueError: naming the first problems and how many there are.
    """
    channels = unet.config.in_channels
    multiple = 2 ** (len(unet.config.block_out_channels) - 1)
    needed = {
        "label": with_labels,
        "spacing": unet.config.use_spacing,
        "top_region_index": unet.config.use_region_index,
        "bottom_region_index": unet.config.use_region_index,
        "organ_size": unet.config.cross_attention_dim is not None,
    }
    problems = check_cases(replace(data_list, latent_channels=channels, spatial_compression_ratio=ratio))
    first_grid = None
    for i, case in enumerate(data_list.cases):
        missing = [name for name, is_needed in needed.items() if is_needed and getattr(case, name) is None]
        if missing:
            problems.append(
                f"entry {i}: no {', '.join(missing)}, which this model is trained with: add it to the data list "
                "(docs/finetune.md), or prepare it again"
            )
        try:
            shape = nib.load(case.image).shape
        except UNREADABLE:
            continue  # said already
        if len(shape) != 4:
            problems.append(
                f"entry {i}: {case.image} is a volume, not a latent: encode it with scripts/encode_latents.py"
            )
            continue
        if any(n % multiple for n in shape[:3]):
            problems.append(
                f"entry {i}: {case.image} is a latent of {shape[:3]} voxels, which the UNet cannot halve as often as "
                f"it must: encode to a size that divides by {ratio * multiple}"
            )
        first_grid = first_grid or (shape[:3], case.image)
        if batch_size > 1 and shape[:3] != first_grid[0]:
            problems.append(
                f"entry {i}: {case.image} has {shape[:3]} voxels and {first_grid[1]} has {first_grid[0]}, which "
                "cannot be in one batch: train with --train_batch_size 1 and --gradient_accumulation_steps, or encode "
                "to one --size"
            )
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"{len(problems)} problem(s) in the data list: {' | '.join(problems[:3])}{more}; "
            "scripts/prepare_dataset.py --check looks at its files more closely"
        )
