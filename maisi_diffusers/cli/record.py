"""The record of an image: how it was made and what is in it."""

import inspect
import platform
from importlib.metadata import version

import nibabel as nib
import numpy as np

from ..anatomy import label_name, labels_present
from ..imaging import is_ct, load_volume, modality_code, spacing_of, to_ras
from ..pipelines import MaisiCTPipeline, MaisiCTPipelineOutput
from ..pipelines.input_rules import fit_grid
from .models import Model
from .outputs import Outputs

FORMAT = 1
"""Of the record; higher where a reader has to know."""

# Arguments of the pipeline that are for programs, and what the seed stands for.
NOT_ASKED_FOR = (
    "num_images",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
)


def make_record(
    pipe: MaisiCTPipeline,
    model: Model,
    request: dict,
    outputs: Outputs,
    output: MaisiCTPipelineOutput,
    messages: list[str],
    tiling: str,
) -> dict:
    """How an image was made and what is in it, as JSON has it; nothing in it changes when it is made again."""
    image, labels = output.images[0], None if output.labels is None else output.labels[0]
    arguments = arguments_used(pipe, request, image)
    report = output.reports[0]
    return {
        "format": FORMAT,
        "synthetic": True,
        "model": model.description,
        "seed": outputs.seed,
        "request": request,
        "arguments": arguments,
        "device": pipe.device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "scheduler": type(pipe.scheduler).__name__,
        "tiling": tiling,
        "versions": {
            **{name: version(name) for name in ("maisi-diffusers", "torch", "diffusers")},
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "size": list(image.shape),
        "spacing": [round(mm, 6) for mm in spacing_of(image)],
        "files": {
            "ct": outputs.ct.name,
            "labels": None if labels is None else outputs.labels.name,
            "picture": outputs.picture.name,
        },
        "labels": None if labels is None else measure_labels(labels, pipe.vocabulary),
        "label_map": report["label_map"],
        "quality": report["quality"],
        "attempts": report["attempts"],
        "warnings": messages,
    }


def arguments_used(pipe: MaisiCTPipeline, request: dict, image: nib.Nifti1Image) -> dict:
    """Every argument of the pipeline that was asked for or has a default, and what the pipeline chose by itself."""
    parameters = inspect.signature(pipe.__call__).parameters.values()
    given = {parameter.name: request.get(parameter.name, parameter.default) for parameter in parameters}
    for name in NOT_ASKED_FOR:
        del given[name]
    for name in ("modality", "guidance_scale"):
        if given[name] is None:
            given[name] = getattr(pipe.config, name)
    given["num_inference_steps"] = given["num_inference_steps"] or pipe.own_num_inference_steps(given["image_only"])
    if is_ct(modality_code(given["modality"])):
        given["body_image"] = given["body_image"] or given["image"]
    size, spacing = image.shape, spacing_of(image)
    if given["restore_grid"] or given["image"]:  # the image is on the grid of the mask, and was made on another one
        mask = to_ras(load_volume(given["mask"]))
        grid = given["output_size"], given["spacing"]
        size, spacing = fit_grid(mask.shape, spacing_of(mask), *grid, pipe.size_multiple, pipe.config.input_rules)
    return {**given, "output_size": list(size), "spacing": [round(mm, 6) for mm in spacing]}


def measure_labels(labels: nib.Nifti1Image, vocabulary: dict[str, int]) -> dict[str, dict]:
    """Name -> index, voxels and ml of the labels that are there."""
    planes = np.asarray(labels.dataobj)
    counts = sum(np.bincount(plane.ravel(), minlength=256) for plane in planes)  # one plane: it makes 8-byte copies
    ml = np.prod(spacing_of(labels)) / 1000
    return {
        label_name(index, vocabulary): {
            "index": index,
            "voxels": int(counts[index]),
            "ml": round(float(counts[index] * ml), 3),
        }
        for index in labels_present(planes)
    }
