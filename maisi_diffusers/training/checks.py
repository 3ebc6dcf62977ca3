"""What is wrong with the files of a data list: all of it at once, before anything is trained."""

import json
import os
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path

import nibabel as nib
import numpy as np

from ..anatomy import (
    BODY,
    CONTROLLABLE_ANATOMY,
    LABELS,
    REGIONS,
    labels_present,
    new_vocabulary,
    one_hot,
    regions_from_labels,
)
from ..anatomy.size_conditions import ABSENT
from ..imaging import spacing_of, to_ras
from ..imaging.nifti import UNREADABLE
from .data_list import Case, DataList, read_case, read_data_list, read_head

SIZE_TOLERANCE = 0.01
"""Voxel sizes may differ by this share of a voxel, and axes point this many voxels apart."""

CENTRE_TOLERANCE = 0.5
"""Centres of a field of view may be this many voxels apart."""


def check_cases(data_list: DataList, in_full: bool = False) -> list[str]:
    """What is wrong with the cases of a data list, see [`check_case`].

    In full, an image that is listed twice is a problem as well.

    Returns:
        one line a problem, in the order of the entries: "entry 3: ...". One file at a time is in memory.
    """
    vocabulary = new_vocabulary(data_list.label_names)
    cases = dict(enumerate(data_list.cases))
    problems = repeated_images(cases) if in_full else []
    ratio, channels = data_list.spatial_compression_ratio, data_list.latent_channels
    for number, case in cases.items():
        problems += [(number, problem) for problem in check_case(case, vocabulary, in_full, ratio, channels)]
    return problem_lines(problems)


def check_case(
    case: Case,
    vocabulary: Mapping[str, int] = LABELS,
    in_full: bool = False,
    ratio: int = 4,
    latent_channels: int = 4,
) -> list[str]:
    """What is wrong with the files of a case.

    Image and label map are compared in RAS+. The label map must have the grid of the volume, or that of the latent
    with `ratio` times its voxels along each axis; size and spacing in the list must be those of the volume. A latent
    may also have the affine of its volume, as the published ones do.

    Args:
        case: its image is a volume (X, Y, Z) or a latent (X, Y, Z, C).
        vocabulary: name -> label, with the new classes.
        in_full: look at the voxels as well as at the headers. Images must be finite. Label maps must be integers of
            the vocabulary, with the body among them, and tell no other regions than the list, nor sizes of what is
            not there.
        ratio: downsampling of the VAE.
        latent_channels: C; a latent with twice as many has mean and log-variance.

    Returns:
        one line a problem, empty if there is none.
    """
    problems, grids = [], {}
    channels = (latent_channels, 2 * latent_channels)
    for kind, path, allowed in (("image", case.image, channels), ("label map", case.label, ())):
        try:
            if path is not None:
                grids[kind] = _read_grid(path, kind, allowed)
        except ValueError as error:
            problems.append(f"{error}")
    image, labels = grids.get("image"), grids.get("label map")

    if image is not None and labels is not None:
        problems += _compare_grids(case, image, labels, ratio)
    if image is not None and image.ndim == 3:
        problems += _compare_list(case, f"image '{case.image}'", image.shape, spacing_of(image))
    elif labels is not None:
        problems += _compare_list(case, f"label map '{case.label}'", labels.shape, spacing_of(labels))
    if in_full and image is not None:
        problems += _check_image(case.image)
    if in_full and labels is not None:
        problems += _check_labels(case, vocabulary)
    return problems


def repeated_images(cases: Mapping[int, Case]) -> list[tuple[int, str]]:
    """Problems of a list's entries, (number of the entry, problem): an image that an entry before has too."""
    entry_of: dict[Path, int] = {}
    problems = []
    for number, case in cases.items():
        before = entry_of.setdefault(case.image.resolve(), number)
        if before != number:
            problems.append((number, f"image '{case.image}' is entry {before}'s too: take one of the two out"))
    return problems


def problem_lines(problems: list[tuple[int, str]]) -> list[str]:
    """Problems (number of the entry, problem) as lines, in the order of the entries."""
    return [f"entry {number}: {problem}" for number, problem in sorted(problems, key=itemgetter(0))]


def read_entries(path: str | os.PathLike) -> tuple[dict[int, Case], DataList, list[tuple[int, str]]]:
    """Read a data list that [`read_data_list`] may refuse for some of its entries.

    Returns:
        The cases that can be read by the number of their entry, what the list says beside them, and what is wrong with
        the other entries, (number of the entry, problem).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no data list.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        entries = enumerate(content["training"])
    except (OSError, ValueError, TypeError, KeyError):
        entries = ()  # read_data_list says what is wrong
    cases, problems = {}, []
    for number, entry in entries:
        try:
            cases[number] = read_case(entry, path.parent)
        except ValueError as error:
            problems.append((number, f"{error}"))
    return cases, read_head(content) if problems else read_data_list(path), problems


def _read_grid(path: Path, kind: str, channels: tuple[int, ...]) -> nib.Nifti1Image:
    """The grid of a file in RAS+ from its header, as an image without voxels of its own.

    Raises:
        ValueError: if the file is missing or no NIfTI, or has the shape of neither a volume nor a latent.
    """
    if not path.is_file():
        raise ValueError(f"{kind} '{path}' does not exist: correct its path, or make it again")
    try:
        image = nib.load(path)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{kind} '{path}' cannot be read as NIfTI ({reason}): make it again") from error
    if not isinstance(image, nib.Nifti1Image):
        raise ValueError(f"{kind} '{path}' is {type(image).__name__}, must be NIfTI: save it as .nii.gz")
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    is_latent = len(shape) == 4 and shape[3] in channels
    if not (len(shape) == 3 or is_latent) or min(shape) < 1:
        latent = f" or a latent (X, Y, Z, {' or '.join(map(str, channels))})" if channels else ""
        raise ValueError(f"{kind} '{path}' has shape {image.shape}, must be a volume (X, Y, Z){latent}: make it again")
    if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine[:3, :3]) < 3:
        raise ValueError(
            f"{kind} '{path}' has affine {image.affine[:3].tolist()}, must be finite and invertible: make it again"
        )
    return to_ras(nib.Nifti1Image(np.broadcast_to(np.uint8(0), shape), image.affine))


def _compare_grids(case: Case, image: nib.Nifti1Image, labels: nib.Nifti1Image, ratio: int) -> list[str]:
    """What is wrong between the grids of a volume or latent and of its label map."""
    is_latent = image.ndim == 4
    factor = ratio if is_latent else 1
    expected = tuple(factor * n for n in image.shape[:3])
    remedy = "resample it onto the volume that was encoded" if is_latent else "resample it onto the image"
    if labels.shape != expected:
        why = f"{ratio} times those of the latent" if is_latent else "as the image"
        return [
            f"label map '{case.label}' has {labels.shape} voxels in RAS+, must have {expected}, {why} '{case.image}': "
            f"{remedy}"
        ]
    image_to_labels = np.linalg.inv(labels.affine) @ image.affine  # voxels
    affines = [(factor, (np.array(image.shape[:3]) - 1) / 2, (np.array(labels.shape) - 1) / 2)]
    if is_latent:
        affines.append((1, np.zeros(3), np.zeros(3)))  # the volume's: the first voxels are at the same place
    for size, voxel, label_voxel in affines:
        off = np.abs(nib.affines.apply_affine(image_to_labels, voxel) - label_voxel)
        axes_agree = np.allclose(image_to_labels[:3, :3] / size, np.eye(3), atol=SIZE_TOLERANCE)
        if axes_agree and (off <= CENTRE_TOLERANCE * size).all():
            return []
    return [
        f"label map '{case.label}' has another field of view than '{case.image}': affines "
        f"{_rounded(labels.affine)} and {_rounded(image.affine)} in RAS+: {remedy}"
    ]


def _compare_list(case: Case, name: str, size: tuple[int, ...], spacing: tuple[float, ...]) -> list[str]:
    """What the list says of a volume that its file does not."""
    problems = []
    if case.dim is not None and case.dim != size:
        problems.append(f'"dim" is {case.dim}, but {name} has {size} voxels in RAS+: correct it in the list')
    if case.spacing is not None and not np.allclose(case.spacing, spacing, rtol=SIZE_TOLERANCE, atol=0):
        spacing = tuple(round(mm, 4) for mm in spacing)
        problems.append(f'"spacing" is {case.spacing}, but {name} has {spacing} mm in RAS+: correct it in the list')
    return problems


def _read_voxels(path: Path, kind: str) -> np.ndarray:
    """The voxels of a file; raises a `ValueError` if they cannot be read or are not finite."""
    try:
        voxels = np.asanyarray(nib.load(path).dataobj)
    except (*UNREADABLE, MemoryError) as error:  # a damaged header may promise more than fits in memory
        reason = " ".join(str(error).split()) or "larger than memory"
        raise ValueError(f"{kind} '{path}' is damaged or cut short ({reason}): make it again") from error
    if voxels.dtype.kind not in "uif":
        raise ValueError(f"{kind} '{path}' has data type {voxels.dtype}, must be real numbers: make it again")
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ValueError(f"{kind} '{path}' has NaN or infinite voxels: make it again")
    return voxels


def _check_image(path: Path) -> list[str]:
    """What is wrong with the voxels of a volume or latent."""
    try:
        _read_voxels(path, "image")
    except ValueError as error:
        return [f"{error}"]
    return []


def _check_labels(case: Case, vocabulary: Mapping[str, int]) -> list[str]:
    """What is wrong with the labels of a case, and with the regions and sizes that the list gives it."""
    name = f"label map '{case.label}'"
    try:
        labels = _read_voxels(case.label, "label map")
    except ValueError as error:
        return [f"{error}"]
    if labels.dtype.kind == "f":
        return [f"{name} holds floating-point labels, must hold integers: make it again as uint8"]
    low, high = labels.min(), labels.max()
    if low < 0 or high > 255:
        return [f"{name} holds labels from {low} to {high}, must be 0..255: make it again"]

    present = set(labels_present(labels.astype(np.uint8, copy=False)))
    problems = []
    unknown = sorted(present - set(vocabulary.values()))
    if unknown:
        problems.append(
            f"{name} holds labels {unknown}, must be of MAISI's vocabulary, 1..132 and 200: prepare it again"
        )
    if BODY not in present:
        problems.append(
            f"{name} has no body label ({BODY}), which the released ControlNets need: prepare it with "
            "scripts/prepare_dataset.py"
        )
    for anatomy, size in zip(CONTROLLABLE_ANATOMY, case.organ_size or ()):
        if (size == ABSENT) == (LABELS[anatomy] in present):
            found = "has none" if LABELS[anatomy] not in present else "has one"
            problems.append(f'"organ_size" is {size:g} for {anatomy!r}, but {name} {found}: correct it in the list')
    try:
        # A new class may have a label that the published models took for a region.
        regions = regions_from_labels(present - {vocabulary[new] for new in vocabulary.keys() - LABELS.keys()})
    except ValueError:  # no label tells them
        return problems
    for key, region in zip(("top_region_index", "bottom_region_index"), regions):
        listed = getattr(case, key)
        if listed is not None and listed != one_hot(region):
            problems.append(
                f'"{key}" is {listed} ({REGIONS[listed.index(1)]}), but the labels of {name} say {one_hot(region)} '
                f"({REGIONS[region]}): correct it in the list"
            )
    return problems


def _rounded(affine: np.ndarray) -> list[list[float]]:
    return affine[:3].round(3).tolist()
