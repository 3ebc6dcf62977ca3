"""The JSON data list, in the published layout: which files make a case, and what is known of it.

```json
{"training": [{"image": "case-1/ct_emb.nii.gz", "label": "case-1/labels.nii.gz", "dim": [512, 512, 512],
               "spacing": [1.0, 1.0, 1.0], "top_region_index": [0, 1, 0, 0], "bottom_region_index": [0, 0, 0, 1],
               "modality": "ct", "fold": 0, "organ_size": [0.4, 0.6, 0.5, 0.5, 0.7, -1, -1, 0.3, -1, -1]}],
 "label_names": {"kidney tumor": 129},
 "tumor_organs": {"kidney tumor": ["left kidney", "right kidney"]}}
```

`image` is a CT, or once that is encoded its latent, or that of its label map. Paths are relative to the list's folder.
`organ_size` has the sizes of `CONTROLLABLE_ANATOMY`, 0 to 1 or -1 for absent, that the mask UNet is trained with; the
published list of such sizes calls it so. `label_names` and `tumor_organs` are ours: new classes on free indices of
MAISI's vocabulary, and for those that are tumors the organs they sit in. So are `latent_channels` and
`spatial_compression_ratio`, which a list of latents has if its VAE is not like the published ones. Readers of the
published layout pass over them.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path

from ..anatomy import REGIONS, check_sizes, label_index, new_vocabulary
from ..files import write_atomically
from ..imaging import modality_code


@dataclass(frozen=True)
class Case:
    """One entry of a data list.

    Args:
        image: CT or MR volume, or its latent, or the latent of its label map.
        label: label map on the grid of the volume (four times the latent's, along each axis).
        dim: voxels of the volume along X, Y, Z.
        spacing: voxel size of the volume in mm.
        top_region_index, bottom_region_index: one-hot region of the first and the last slice, as four indicators.
        modality: name of a modality.
        fold: which fold the case belongs to.
        organ_size: sizes of the controllable anatomy in the label map, 0 to 1 or -1 for absent.
    """

    image: Path
    label: Path | None = None
    dim: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    top_region_index: tuple[int, int, int, int] | None = None
    bottom_region_index: tuple[int, int, int, int] | None = None
    modality: str = "ct"
    fold: int = 0
    organ_size: tuple[float, ...] | None = None


@dataclass(frozen=True)
class DataList:
    """Cases, and the classes they have beyond MAISI's.

    Args:
        cases: the entries in the order of the file.
        label_names: name -> index of every new class.
        tumor_organs: name of a new class that is a tumor -> names of the organs it sits in.
        latent_channels: of the VAE that the images are latents of.
        spatial_compression_ratio: voxels of a volume to a voxel of its latent, along each axis.
    """

    cases: list[Case]
    label_names: dict[str, int] = field(default_factory=dict)
    tumor_organs: dict[str, list[str]] = field(default_factory=dict)
    latent_channels: int = 4
    spatial_compression_ratio: int = 4


def read_data_list(path: str | os.PathLike, root: str | os.PathLike | None = None) -> DataList:
    """Read a data list; files it names are not opened.

    Args:
        path: the JSON file.
        root: the folder that paths in it are relative to; the list's own if not given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no data list; every broken entry is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data list {str(path)!r} does not exist: make one with scripts/prepare_dataset.py")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # JSON's and Unicode's are both among them
        raise ValueError(f"data list {str(path)!r} is no JSON file ({error}): make it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("training"), list) or not content["training"]:
        raise ValueError(f'data list {str(path)!r} has no cases: it needs a list called "training"')

    root = path.parent if root is None else Path(root)
    cases, problems = [], []
    for i, entry in enumerate(content["training"]):
        try:
            cases.append(read_case(entry, root))
        except ValueError as error:
            problems.append(f"entry {i}: {error}")
    if problems:
        raise ValueError(f"data list {str(path)!r}: {'; '.join(problems)}")
    try:
        return replace(read_head(content), cases=cases)
    except ValueError as error:
        raise ValueError(f"data list {str(path)!r}: {error}") from error


def read_head(content: dict) -> DataList:
    """What a list says beside its cases, as one without any; raises a `ValueError` that says what is wrong."""
    names = ("label_names", "tumor_organs", "latent_channels", "spatial_compression_ratio")
    head = DataList([], **{name: content[name] for name in names if name in content})
    check_new_labels(head.label_names, head.tumor_organs)
    for name in names[2:]:
        value = getattr(head, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, must be a whole number of 1 or more")
    return head


def write_data_list(path: str | os.PathLike, data_list: DataList) -> None:
    """Write a data list, whole or not at all; paths below its folder become relative to it."""
    folder = Path(os.path.abspath(path)).parent
    entries = []
    for case in data_list.cases:
        entry = {name: value for name, value in vars(case).items() if value is not None}
        for name in ("image", "label"):
            if name in entry:
                file = Path(os.path.abspath(entry[name]))
                entry[name] = str(file.relative_to(folder) if file.is_relative_to(folder) else file)
        entries.append(entry)
    content = {"training": entries}
    if data_list.label_names:
        content |= {"label_names": data_list.label_names, "tumor_organs": data_list.tumor_organs}
    published = DataList([])
    for name in ("latent_channels", "spatial_compression_ratio"):
        if getattr(data_list, name) != getattr(published, name):
            content[name] = getattr(data_list, name)
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def split_fold(cases: Iterable[Case], fold: int) -> tuple[list[Case], list[Case]]:
    """Training and validation cases: those of the fold are for validation, the rest for training, as in the code of
    the published model (its documentation says the opposite). Where all cases are of one fold, all are for training.

    Raises:
        ValueError: if no case has that fold.
    """
    cases = list(cases)
    folds = sorted({case.fold for case in cases})
    if len(folds) == 1:
        return cases, []
    if fold not in folds:
        raise ValueError(f"fold {fold} has no case in the data list, which has folds {folds}: choose one of them")
    return [case for case in cases if case.fold != fold], [case for case in cases if case.fold == fold]


def check_new_labels(label_names: dict[str, int], tumor_organs: dict[str, list[str]]) -> None:
    """Refuse names and indices of new classes that the vocabulary has no room for; raises a `ValueError`."""
    for field_name, given in (("label_names", label_names), ("tumor_organs", tumor_organs)):
        if not isinstance(given, dict):
            raise ValueError(f"{field_name} is {given!r}, must hold names and values")
    vocabulary = new_vocabulary(label_names)
    for name, organs in tumor_organs.items():
        if name not in label_names:
            raise ValueError(f"tumor_organs names {name!r}, which is not among the new classes {list(label_names)}")
        for organ in organs:
            label_index(organ, vocabulary)


def read_case(entry: dict, root: Path) -> Case:
    """One entry of a list's "training", paths relative to `root`; raises a `ValueError` that says what is wrong."""
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise ValueError('no path called "image"')
    values = {"image": root / entry["image"]}
    if entry.get("label") is not None:
        if not isinstance(entry["label"], str):
            raise ValueError(f'"label" is {entry["label"]!r}, must be a path')
        values["label"] = root / entry["label"]
    if "dim" in entry:
        values["dim"] = _numbers(entry, "dim", 3, Integral)
    if "spacing" in entry:
        values["spacing"] = tuple(float(size) for size in _numbers(entry, "spacing", 3, Real))
    for name in ("dim", "spacing"):
        if any(not 0 < value < math.inf for value in values.get(name, ())):
            raise ValueError(f'"{name}" is {entry[name]}, must be above 0 and finite')
    for name in ("top_region_index", "bottom_region_index"):
        if name in entry:
            indicators = _numbers(entry, name, len(REGIONS), Real)
            if sorted(indicators) != [0, 0, 0, 1]:
                raise ValueError(f'"{name}" is {entry[name]}, must be three zeros and a 1, for one of {REGIONS}')
            values[name] = tuple(int(value) for value in indicators)
    values["modality"] = entry.get("modality", "ct")
    if not isinstance(values["modality"], (str, int)):
        raise ValueError(f'"modality" is {values["modality"]!r}, must be a name such as "ct"')
    modality_code(values["modality"])
    values["fold"] = entry.get("fold", 0)
    if not isinstance(values["fold"], int):
        raise ValueError(f'"fold" is {values["fold"]!r}, must be a whole number')
    if "organ_size" in entry:
        values["organ_size"] = tuple(check_sizes(entry["organ_size"]))
    return Case(**values)


def _numbers(entry: dict, name: str, length: int, kind: type) -> tuple:
    values = entry[name]
    if not isinstance(values, list) or len(values) != length or any(not isinstance(v, kind) for v in values):
        raise ValueError(f'"{name}" is {values!r}, must be {length} numbers')
    return tuple(values)
