"""What a model makes of cases it was not trained on: pictures, HU of every organ, loss."""

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.image import imread

from ..anatomy import (
    BODY,
    CONTROLLABLE_ANATOMY,
    LABELS,
    REGION_WORDS,
    TUMORS,
    label_colours,
    label_name,
    labels_present,
    legend_names,
    load_label_map,
)
from ..anatomy.size_conditions import ABSENT
from ..files import write_atomically
from ..imaging import save_preview, spacing_of, to_ras
from ..pipelines import MaisiCTPipeline, MaisiMaskPipeline
from .data_list import Case
from .dataset import LatentDataset

IS_TUMOR = np.array([LABELS[name] in TUMORS for name in CONTROLLABLE_ANATOMY])

# What a label map is shown on: soft tissue in air.
INSIDE, OUTSIDE = 40, -1000


def median_hu(image: nib.Nifti1Image, labels: nib.Nifti1Image, vocabulary: dict[str, int]) -> dict[str, float]:
    """Median intensity of every label but the body, by name; image and label map on the same grid."""
    intensities, label_map = np.asarray(image.dataobj), np.asarray(labels.dataobj)
    present = [label for label in labels_present(label_map) if label != BODY]
    return {label_name(label, vocabulary): float(np.median(intensities[label_map == label])) for label in present}


def sample_cases(
    pipe: MaisiCTPipeline, cases: list[Case], folder: Path, num_inference_steps: int | None, seed: int
) -> dict[str, dict[str, float]]:
    """
    Make an image for the label map of every case, on its own grid.

    Args:
        pipe: the model as it is now.
        cases: entries with label maps.
        folder: gets `<number>-<case>.png` of each and `median_hu.json`.
        num_inference_steps: as many as the model was released with if not given.
        seed: of the noise, the same for every case and every time.

    Returns:
        `<number>-<case>` -> organ -> median HU (MR: intensity).
    """
    medians = {}
    for i, case in enumerate(cases):
        name = f"{i}-{case.label.name.split('.')[0]}"  # files in different folders may have one name
        labels = to_ras(load_label_map(case.label))
        output = pipe(
            mask=labels,
            output_size=labels.shape,
            spacing=spacing_of(labels),
            modality=case.modality if pipe.unet.config.num_class_embeds is not None else None,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(seed),
        )
        image, label_map = output.images[0], output.labels[0]
        medians[name] = median_hu(image, label_map, pipe.vocabulary)
        path = folder / f"{name}.png"
        save_preview(path, image, label_map, hidden_labels=(BODY,), title=f"{name}: synthetic")
    with write_atomically(folder / "median_hu.json") as temporary:
        temporary.write_text(json.dumps(medians, indent=2) + "\n")
    return medians


def sample_unconditioned(
    pipe: MaisiCTPipeline, cases: list[Case], folder: Path, num_inference_steps: int | None, seed: int
) -> None:
    """Make an image of the size, spacing, modality and region of every case, without its label map.

    Args:
        pipe: the model as it is now.
        cases: entries with latents; they say how large an image is.
        folder: gets `<number>-<case>.png` of each.
        num_inference_steps: as many as the model was released with if not given.
        seed: of the noise, the same for every case and every time.
    """
    for i, case in enumerate(cases):
        name = f"{i}-{case.image.name.split('.')[0]}"
        latent = to_ras(nib.load(case.image))
        words = None
        if pipe.unet.config.use_region_index:
            words = [REGION_WORDS[index.index(1)] for index in (case.top_region_index, case.bottom_region_index)]
        output = pipe(
            body_region=words,
            image_only=True,
            output_size=tuple(n * pipe.vae.spatial_compression_ratio for n in latent.shape[:3]),
            spacing=case.spacing,
            modality=case.modality if pipe.unet.config.num_class_embeds is not None else None,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(seed),
        )
        save_preview(folder / f"{name}.png", output.images[0], title=f"{name}: synthetic")


def sample_masks(
    pipe: MaisiMaskPipeline, cases: list[Case], folder: Path, num_inference_steps: int | None, seed: int
) -> None:
    """Make a label map of the anatomy sizes of every case; of several tumors, the largest, for there can be one.

    Args:
        pipe: the model as it is now.
        cases: entries with anatomy sizes.
        folder: gets `<number>-<case>.png` of each.
        num_inference_steps: the model's own number if not given.
        seed: of the noise, the same for every case and every time.
    """
    for i, case in enumerate(cases):
        name = f"{i}-{case.image.name.split('.')[0]}"
        sizes = np.array(case.organ_size)
        largest = np.argmax(np.where(IS_TUMOR, sizes, ABSENT))
        sizes[IS_TUMOR & (np.arange(len(sizes)) != largest)] = ABSENT
        output = pipe(
            anatomy_size=sizes.tolist(),
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(seed),
        )
        label_map = output.masks[0]
        body = np.where(np.asarray(label_map.dataobj), INSIDE, OUTSIDE).astype(np.int16)
        save_preview(
            folder / f"{name}.png",
            nib.Nifti1Image(body, label_map.affine),
            label_map,
            hidden_labels=(BODY,),
            title=f"{name}: synthetic",
            names=legend_names(),
            colours=label_colours(),
        )


def mean_loss(
    objective: Callable[[dict], dict[str, torch.Tensor]], dataset: LatentDataset, device: torch.device
) -> float:
    """Mean loss over a dataset, with the same noise and timesteps each time, one case after the other."""
    losses = []
    for i in range(len(dataset)):
        batch = {name: value[None].to(device) for name, value in dataset[i].items()}
        with torch.no_grad():
            losses.append(objective(batch)["loss"].item())
    return float(np.mean(losses))


def log_pictures(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Hand the PNGs of a folder to the trackers that take pictures."""
    # Those whose name begins with a dot are being written, by another process.
    paths = sorted(folder.glob("[!.]*.png"))
    pictures = {path.stem: (imread(path)[None, ..., :3] * 255).astype(np.uint8) for path in paths}
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            tracker.log_images({f"validation/{name}": picture for name, picture in pictures.items()}, step=step)
