"""What a model can do, as JSON has it, without reading its weights."""

import json
from collections import Counter
from pathlib import Path

import diffusers
import torch
import yaml
from accelerate import init_empty_weights

from .. import models, schedulers
from ..anatomy import CONTROLLABLE_ANATOMY, DUMMIES, LABELS, REGION_WORDS, MaisiMaskDatabase
from ..loaders import Repository
from ..pipelines import MaisiCTPipeline
from ..pipelines.anatomy_files import AnatomyFiles
from ..pipelines.input_rules import CT_RULES
from ..pipelines.pipeline_maisi_ct import DEFAULT_SIZE, DEFAULT_SPACING
from ..pipelines.recommended_grids import RECOMMENDED_CT_GRIDS
from .memory import describe_memory
from .models import INDEX, Model
from .weights import weight_dtypes

# Where a component's class is, by the library that `model_index.json` says.
HOMES = {"maisi_diffusers": (models, schedulers), "diffusers": (diffusers,)}


def describe(model: Model, plan: tuple[int, int, int] | None) -> dict:
    """
    What there is to know of a model before it is used.

    Args:
        model: to describe.
        plan: size of an image in voxels that the memory is to be told for; the model's default if not given.

    Raises:
        FileNotFoundError: a file of its that cannot be read from here.
        ValueError: if it is no such model, or makes no image of this size.
    """
    repository = Repository(model.folder if model.revision is None else model.source, model.revision)
    repository.fetch("*.json", "README.md")
    pipe = without_weights(model.folder)
    database = AnatomyFiles(repository).mask_database
    rules = pipe.config.input_rules
    size = tuple(plan or pipe.config.default_output_size or DEFAULT_SIZE)
    if any(n < 1 or n % pipe.size_multiple for n in size):
        raise ValueError(f"--plan {size} is not allowed: this model needs multiples of {pipe.size_multiple}")
    new_classes = {name: index for name, index in pipe.vocabulary.items() if name not in LABELS}
    known = {name: index for name, index in pipe.vocabulary.items() if index not in DUMMIES or name in new_classes}
    return {
        "model": model.description,
        "licence": read_licence(model.folder),
        "components": describe_components(pipe, weight_dtypes(model)),
        "modality": pipe.config.modality,
        "modalities": pipe.config.modalities,
        "prediction_type": pipe.config.prediction_type,
        "num_inference_steps": pipe.own_num_inference_steps(image_only=False),
        "image_only_num_inference_steps": pipe.own_num_inference_steps(image_only=True),
        "label_map_from": ways(pipe, database),
        "labels": known if pipe.controlnet is not None else {},
        "new_classes": new_classes,
        "controllable_sizes": list(CONTROLLABLE_ANATOMY) if pipe.mask_unet is not None else [],
        "mask_database": None if database is None else describe_database(database, pipe),
        "size_multiple": pipe.size_multiple,
        "input_rules": rules,
        "default_output_size": list(pipe.config.default_output_size or DEFAULT_SIZE),
        "default_spacing": list(pipe.config.default_spacing or DEFAULT_SPACING),
        "recommended_grids": [
            {"body_region": list(words), "output_size": list(grid), "spacing": list(spacing)}
            for words, (grid, spacing) in RECOMMENDED_CT_GRIDS.items()
            if rules == CT_RULES
        ],
        "guidance_scale": pipe.config.guidance_scale,
        "recommended_fovs": pipe.config.recommended_fovs or {},
        "memory": describe_memory(pipe, size),
    }


def without_weights(folder: Path) -> MaisiCTPipeline:
    """
    The pipeline of a folder with its configuration, its networks without their weights.

    Raises:
        ValueError: if the folder is of another pipeline, or a file is damaged.
    """
    try:
        config = json.loads((folder / INDEX).read_text())
        if config.pop("_class_name") != MaisiCTPipeline.__name__:
            raise ValueError(f"it is not of a {MaisiCTPipeline.__name__}")
        arguments = {}
        for name, value in config.items():
            if isinstance(value, list) and len(value) == 2 and value[0] in (*HOMES, None):
                arguments[name] = None if value[0] is None else empty_component(folder / name, *value)
            elif not name.startswith("_"):
                arguments[name] = value
        return MaisiCTPipeline(**arguments)
    except Exception as error:  # whatever is said of damaged files
        raise ValueError(f"{folder} cannot be read: {' '.join(str(error).split())}") from error


def empty_component(folder: Path, library: str, class_name: str) -> torch.nn.Module | diffusers.SchedulerMixin:
    """A component with its configuration, its weights on no device."""
    of_class = next(getattr(home, class_name) for home in HOMES[library] if hasattr(home, class_name))
    with init_empty_weights():
        return of_class.from_config(of_class.load_config(folder))


def describe_components(pipe: MaisiCTPipeline, dtypes: dict[str, str]) -> dict[str, dict]:
    """Name -> class, and of networks the number of parameters and the dtype in their files."""
    described = {}
    for name, component in pipe.components.items():
        if component is not None:
            described[name] = {"class": type(component).__name__}
            if isinstance(component, torch.nn.Module):
                described[name] |= {"parameters": component.num_parameters(), "dtype": dtypes.get(name)}
    return described


def ways(pipe: MaisiCTPipeline, database: MaisiMaskDatabase | None) -> list[str]:
    """The options of `maisi-ct generate` by which a label map comes about."""
    options = []
    if pipe.controlnet is not None:
        options += ["--body-region", "--anatomy"] if database is not None else []
        options += ["--size"] if pipe.mask_unet is not None else []
        options += ["--mask"]
    return [*options, "--image-only"]


def describe_database(database: MaisiMaskDatabase, pipe: MaisiCTPipeline) -> dict:
    """How many label maps a database has, by region, label, tumor and grid."""
    regions, labels, grids = Counter(), Counter(), Counter()
    names = {index: name for name, index in pipe.vocabulary.items()}
    for entry in database.entries:
        if entry.regions is not None:
            regions.update(REGION_WORDS[entry.regions[0] : entry.regions[1] + 1])
        grids[entry.dim, entry.spacing] += 1
        labels.update(entry.label_list)
    return {
        "label_maps": len(database),
        "regions": {word: regions[word] for word in REGION_WORDS if regions[word]},
        "labels": {names[label]: labels[label] for label in sorted(labels)},
        "tumors": {names[label]: labels[label] for label in pipe.tumors if labels[label]},
        "grids": [
            {"output_size": list(size), "spacing": list(spacing), "label_maps": count}
            for (size, spacing), count in grids.most_common()
        ],
    }


def read_licence(folder: Path) -> str | None:
    """What the model card says of the licence, in the lines of YAML that it begins with."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(errors="replace").split("---\n")
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        fields = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    if not isinstance(fields, dict):
        return None
    name = fields.get("license_name") or fields.get("license")
    return None if name is None else " ".join([str(name), *map(str, filter(None, [fields.get("license_link")]))])
