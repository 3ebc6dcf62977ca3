"""From volumes and their segmentations to label maps to train on: new classes, the body, folds."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from ..anatomy import (
    LABELS,
    TOTALSEGMENTATOR_CLASSES,
    TOTALSEGMENTATOR_TO_MAISI,
    add_body_label,
    labels_present,
    load_label_map,
)
from ..imaging import is_ct, labels_to_nifti, load_volume, modality_code, resample_like, spacing_of, to_ras


@dataclass(frozen=True)
class NewClass:
    """A class that MAISI's vocabulary does not have, and where its voxels come from.

    Args:
        name: of the class.
        index: its label, one of the vocabulary's free ones.
        source: the label of MAISI's vocabulary whose voxels it takes, or name of a case -> file of a mask.
    """

    name: str
    index: int
    source: int | dict[str, Path]


def find_new_class(name: str, index: int, source: str, vocabulary: str) -> NewClass:
    """Tell what the source of a new class is.

    Args:
        name, index: of the class; [`check_new_labels`] tells whether they are free.
        source: a folder of masks, or the name or number of a label of the segmentations.
        vocabulary: of the segmentations, "maisi" or "totalsegmentator".

    Raises:
        ValueError: if the source is neither a folder nor a label, or both; for what [`find_volumes`] refuses.
    """
    label = _label_texts(vocabulary).get(source)
    is_folder = Path(source).is_dir()
    if is_folder and label is not None:
        raise ValueError(
            f"Source {source!r} of new class {name!r} is a folder and a label of {vocabulary}; write './{source}' for "
            "the folder, or elsewhere."
        )
    if label is None and not is_folder:
        raise ValueError(
            f"Source {source!r} of new class {name!r} is neither a folder nor a label of {vocabulary}; give a folder "
            "of masks, or the name or number of a label of the segmentations."
        )
    return NewClass(name, index, find_volumes(source, in_subfolders=True) if is_folder else label)


def find_volumes(folder: str | os.PathLike, in_subfolders: bool = False) -> dict[str, Path]:
    """Name of a case -> its NIfTI file in a folder, sorted.

    A case has its file's name without .nii or .nii.gz and without the _0000 that nnU-Net adds.

    Args:
        folder: where to look.
        in_subfolders: take subfolders with a single file too, under their own name.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no such file, or two of the same case.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder '{folder}'; give one that has .nii or .nii.gz files.")
    found = [(_case_name(path), path) for path in _nifti_files(folder)]
    if in_subfolders:
        for subfolder in filter(Path.is_dir, folder.glob("[!.]*")):
            files = _nifti_files(subfolder)
            found += [(subfolder.name, path) for path in files if len(files) == 1]
    if not found:
        raise ValueError(f"'{folder}' has no .nii or .nii.gz file; give a folder that has.")
    volumes: dict[str, Path] = {}
    for name, path in sorted(found):
        if name in volumes:
            raise ValueError(f"'{volumes[name]}' and '{path}' are both of case {name!r}; leave one of them there.")
        volumes[name] = path
    return volumes


def prepare_label_map(
    image: str | os.PathLike | nib.Nifti1Image,
    segmentation: str | os.PathLike | nib.Nifti1Image,
    vocabulary: str,
    modality: str = "ct",
    relabelled: Mapping[int, int] | None = None,
    masks: Mapping[int, str | os.PathLike | nib.Nifti1Image] | None = None,
) -> nib.Nifti1Image:
    """The label map of a volume to train with: its segmentation, the new classes and the body.

    Args:
        image: volume (X, Y, Z) in HU or in MR units, in any orientation.
        segmentation: its label map, on any grid.
        vocabulary: what the labels of the segmentation mean, "maisi" or "totalsegmentator".
        modality: of the volume. The body is seen in a CT; in another modality it is guessed from the organs.
        relabelled: label of MAISI's vocabulary -> label of the new class that takes all its voxels.
        masks: label of a new class -> mask, on any grid; its voxels above 0 are of the class, whatever they were.

    Returns:
        uint8 label map (X, Y, Z) in MAISI's vocabulary on the grid of the volume in RAS+.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for files that [`load_volume`] or [`load_label_map`] refuse; if the segmentation or a mask lies
            beside the volume; if the segmentation has the label of a new class already.

    Warns:
        UserWarning: what [`add_body_label`] and [`load_label_map`] warn of.
    """
    relabelled, masks = relabelled or {}, masks or {}
    volume = to_ras(load_volume(image))
    before = _on_grid(load_label_map(segmentation, vocabulary), volume)
    present = set(labels_present(before))
    if not present:
        raise ValueError("The segmentation has no label where the image is; check that they are of the same scan.")
    taken = present & ({*relabelled.values(), *masks} - relabelled.keys())
    if taken:
        raise ValueError(
            f"The segmentation has labels {sorted(taken)} already, which new classes are to have; give each as the "
            "source of its class, or choose another index."
        )

    labels = before.copy()
    for label, index in relabelled.items():
        labels[before == label] = index
    for index, source in masks.items():
        mask = load_volume(source)
        inside = _on_grid(mask, volume) > 0
        if not inside.any() and (np.asanyarray(mask.dataobj) > 0).any():
            raise ValueError(
                f"The mask of class {index} has no voxel where the image is; check that it is this one's."
            )
        labels[inside] = index
    ct = volume if is_ct(modality_code(modality)) else None
    return add_body_label(labels_to_nifti(labels, volume.affine), ct)


def label_volumes(labels: nib.Nifti1Image) -> dict[int, float]:
    """Label -> volume in ml, ascending, of the labels other than background in a uint8 label map."""
    planes = np.asanyarray(labels.dataobj)
    counts = sum(np.bincount(plane.ravel(), minlength=256) for plane in planes)  # one plane: it makes 8-byte copies
    millilitres = counts * (np.prod(spacing_of(labels)) / 1000)
    return {label: float(millilitres[label]) for label in labels_present(planes)}


def assign_folds(cases: Iterable[str], num_folds: int, seed: int) -> dict[str, int]:
    """Name of a case -> its fold: as many cases in each as in any other, or one more.

    The order of the names does not matter. Fewer cases than folds are a fold each.

    Raises:
        ValueError: if `num_folds` is below 1.
    """
    if num_folds < 1:
        raise ValueError(f"num_folds is {num_folds}, must be 1 or more.")
    shuffled = sorted(cases, key=lambda case: hashlib.sha256(f"{seed} {case}".encode()).digest())
    return {case: i % num_folds for i, case in enumerate(shuffled)}


def _label_texts(vocabulary: str) -> dict[str, int]:
    """Names and numbers of the labels of a vocabulary, both as text -> label of MAISI's."""
    if vocabulary == "maisi":
        return LABELS | {str(label): label for label in LABELS.values()}
    labels = TOTALSEGMENTATOR_TO_MAISI[1:].tolist()
    return {**dict(zip(TOTALSEGMENTATOR_CLASSES, labels)), **{str(i): label for i, label in enumerate(labels, 1)}}


def _nifti_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("[!.]*") if path.name.endswith((".nii", ".nii.gz")) and not path.is_dir()]


def _case_name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")


def _on_grid(image: nib.Nifti1Image, reference: nib.Nifti1Image) -> np.ndarray:
    return np.asarray(resample_like(image, reference, order=0, fill=0).dataobj)
