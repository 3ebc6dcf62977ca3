"""A database of label maps to choose from by region, anatomy, size and spacing.

The published layout: a JSON list beside a folder or a .zip of NIfTI label maps in MAISI's vocabulary.

```json
[{"pseudo_label_filename": "source/case.nii.gz", "dim": [512, 512, 128], "spacing": [0.78, 0.78, 2.98],
  "label_list": [1, 3, 4, 200], "top_region_index": [0, 1, 0, 0], "bottom_region_index": [0, 0, 1, 0]}]
```

`dim` and `spacing` are along X, Y, Z in RAS+, `label_list` says what labels the map has. The regions are of its first
and its last slice from the top; where an entry has none, they are told from its labels.
"""

import glob
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from ..imaging import load_volume, resample_to_grid, spacing_of, to_ras
from .json_list import read_json_list
from .label_map import load_label_map
from .mask_entry import MaskEntry, read_entry
from .mask_files import read_file
from .mask_index import whole_numbers, write_candidates, write_entries
from .regions import REGION_WORDS, region_of_word, regions_from_labels
from .vocabulary import LABELS, TUMORS, label_index, label_name, labels_present

CANDIDATES = "candidate_masks.json"
MASKS = "masks"

SPACING_TOLERANCE = 1e-3
"""Difference in mm up to which two spacings are the same: lists and users round them."""

MISSING_VOXELS = 128
"""How many voxels a label map may lack along an axis that is to be resampled and padded (published)."""

MAX_LOADED = 100
"""How many label maps that lose what was asked for are read before the search is given up: each is a volume."""

MAX_HEADER = 2**20


@dataclass(frozen=True)
class FoundMask:
    """A label map of a database, on the wanted grid.

    Args:
        image: uint8 (X, Y, Z) in RAS+.
        entry: what the database says of it; its size and spacing may have been others.
        regions: region (0..3) of its first and of its last slice; `None` where nothing tells.
        labels: that it has, other than background.
    """

    image: nib.Nifti1Image
    entry: MaskEntry
    regions: tuple[int, int] | None
    labels: set[int]


class MaisiMaskDatabase:
    r"""
    Label maps to choose from, in the published layout.

    Args:
        candidates: the JSON list, or the folder that has it as `candidate_masks.json`.
        masks: the folder or .zip with the label maps; what is called `masks` or `masks.zip` beside the list, or the
            folder that it is in, if not given. Or a function that is given a pattern (a file's name, or `*`),
            downloads the label maps whose name matches it, and returns the folder or .zip that has them.

    Attributes:
        entries: a [`MaskEntry`] for every label map.

    Raises:
        FileNotFoundError: if the list or the label maps are not there.
        ValueError: if it is no such list; everything that is wrong in it is named.

    Example:

    ```py
    >>> import torch
    >>> from maisi_diffusers import MaisiMaskDatabase

    >>> database = MaisiMaskDatabase("mask_database")
    >>> grid = {"output_size": (512, 512, 128), "spacing": (0.684, 0.684, 2.422)}
    >>> found = database.find(2, torch.Generator().manual_seed(0), body_region=["chest"], **grid)
    >>> found[0].image.to_filename("mask.nii.gz")
    ```
    """

    def __init__(self, candidates: str | os.PathLike, masks: str | os.PathLike | Callable[[str], Path] | None = None):
        candidates = Path(os.path.abspath(candidates))
        self.candidates = candidates / CANDIDATES if candidates.is_dir() else candidates
        if candidates.is_dir() and not self.candidates.is_file():
            raise FileNotFoundError(
                f"{str(candidates)!r} has no {CANDIDATES!r}; MaisiMaskDatabase.from_folder writes one for label maps; "
                "of a list with another name, as the published one, give the path, and masks= with its .zip."
            )
        self.entries = read_json_list(self.candidates, read_entry)
        if masks is None:
            beside = [self.candidates.parent / name for name in (MASKS, f"{MASKS}.zip")]
            if (self.candidates.parent / self.entries[0].pseudo_label_filename).is_file():
                beside.append(self.candidates.parent)
            masks = next((path for path in beside if path.exists()), None)
            if masks is None:
                raise FileNotFoundError(
                    f"{str(self.candidates)!r} has neither a folder 'masks' nor a 'masks.zip' nor the label maps "
                    "beside it; download them, or give masks= with the folder or .zip of the label maps."
                )
        place = None if callable(masks) else Path(os.path.abspath(masks))
        self._fetch = masks if callable(masks) else lambda pattern: place

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, num_processes: int = 1) -> Self:
        """
        Make a database of a folder of label maps: read every .nii and .nii.gz below it, and write the list as its
        `candidate_masks.json`. Label maps in its folder `masks`, if it has one, are the only ones that count.

        Every now and then the list is written as far as it is. What it says of files that are older than it is not
        read again, so that an interrupted run goes on and a later one adds what is new.

        Args:
            folder: with label maps in MAISI's vocabulary, any orientation and affine.
            num_processes: that read them; if more than 1, call this below `if __name__ == "__main__":`.

        Raises:
            FileNotFoundError: if there is no such folder, or no label map in it.
            ValueError: for files that are no label maps in MAISI's vocabulary, or have no label; all of them are
                named, and the others are in the list.
        """
        folder = Path(folder)
        masks = folder / MASKS if (folder / MASKS).is_dir() else folder
        write_candidates(folder / CANDIDATES, masks, num_processes)
        return cls(folder)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.candidates)!r}, {len(self)} label maps)"

    def search(
        self,
        body_region: Iterable[str] | None = None,
        anatomy_list: Iterable[str | int] | None = None,
        output_size: tuple[int, int, int] | None = None,
        spacing: tuple[float, float, float] | None = None,
        vocabulary: Mapping[str, int] = LABELS,
        tumors: Iterable[int] = TUMORS,
        exact: bool = True,
    ) -> list[MaskEntry]:
        """The label maps that have all of the requested labels and regions, no tumor besides, and exactly the size and
        spacing (published rule).

        Args:
            body_region: words (head, chest, thorax, abdomen, pelvis, lower) for regions that must lie between the
                first and the last slice's.
            anatomy_list: names or numbers of labels.
            output_size: voxels along X, Y, Z; any if not given.
            spacing: mm along X, Y, Z, up to 0.001 mm; any if not given.
            vocabulary: name -> label; a fine-tuned model has its own.
            tumors: labels that a map has only where they are requested.
            exact: or else all whose size and spacing can be changed to the wanted ones: along every axis they have
                more voxels than wanted less 128 (published rule). The nearest by [`grid_distance`] come first.

        Raises:
            ValueError: for unknown names, and if there is no such label map: the message says which requirement none
                meets, and what is nearest.
        """
        for name, words in (("body_region", body_region), ("anatomy_list", anatomy_list)):
            if isinstance(words, str):
                raise ValueError(f"{name}={words!r} is not allowed: give a list of names")
        labels = {label_index(anatomy, vocabulary) for anatomy in anatomy_list or ()}
        regions = {region_of_word(word) for word in body_region or ()}
        sought = "no label map"
        if labels:
            sought += f" with {_names(labels, vocabulary, ' and ')}"

        found = [entry for entry in self.entries if labels <= set(entry.label_list)]
        if not found:
            counts = Counter(label for entry in self.entries for label in labels & set(entry.label_list))
            alone = _counts({label_name(label, vocabulary): count for label, count in counts.items()})
            raise ValueError(
                f"{sought} is among the {len(self)} of the mask database; each for itself: {alone or 'none'}; "
                "change anatomy_list"
            )

        words = " and ".join(REGION_WORDS[region] for region in sorted(regions))
        in_regions = [entry for entry in found if regions <= _shown(entry.regions)]
        if not in_regions:
            spans = Counter(_span(entry.regions) for entry in found)
            raise ValueError(
                f"{sought} shows {words}; there are some of {_counts(spans)}; change body_region or anatomy_list"
            )
        if regions:
            sought += f" in {words}"

        others = set(tumors) - labels
        without = [entry for entry in in_regions if not others & set(entry.label_list)]
        if not without:
            counts = Counter(label for entry in in_regions for label in others & set(entry.label_list))
            have = _counts({label_name(label, vocabulary): count for label, count in counts.items()})
            raise ValueError(
                f"{sought} is without further tumors; there are some with {have}; add it to anatomy_list to get those"
            )

        nearest = sorted(without, key=lambda entry: grid_distance(entry, output_size, spacing))
        fitting = [
            entry for entry in nearest if (_has_grid if exact else _is_large_enough)(entry, output_size, spacing)
        ]
        if not fitting:
            grids = Counter(_grid(entry.dim, entry.spacing) for entry in nearest)  # in this order
            has = "has" if exact else "is large enough for"
            raise ValueError(
                f"{sought} {has} {_grid(output_size, spacing)}; the nearest have "
                f"{_counts(dict(list(grids.items())[:3]))}; give one of these"
            )
        return fitting

    def find(
        self,
        num: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        output_size: tuple[int, int, int],
        spacing: tuple[float, float, float],
        **request,
    ) -> list["FoundMask"]:
        """Label maps on the wanted grid: those that have it, chosen at random, and if they are too few the nearest
        others, resampled, and cropped or padded about their centre (published rule). Of equally near ones it is
        chosen at random, and one generator chooses none twice while there are others.

        Args:
            num: how many.
            generator: one, or one for each of them, which finds what it finds alone; the same ones find the same.
            output_size: voxels along X, Y, Z.
            spacing: mm along X, Y, Z.
            request: the other arguments of [`search`].

        Raises:
            FileNotFoundError: for a label map that is not there.
            ValueError: if there is none that fits, see [`search`], or a requested label or region would be lost of all
                that could be resampled, or of the nearest hundred; for one that is damaged.
        """
        if num < 1 or isinstance(generator, list) and len(generator) != num:
            count = f" with {len(generator)} generators" if isinstance(generator, list) else ""
            raise ValueError(f"num={num}{count} is not allowed: give 1 or more, and one generator or one for each")
        for name in ("body_region", "anatomy_list"):
            if request.get(name) is not None and not isinstance(request[name], str):
                request[name] = list(request[name])  # it may be read but once
        entries = self.search(output_size=output_size, spacing=spacing, exact=False, **request)
        vocabulary = request.get("vocabulary", LABELS)
        wanted = {label_index(anatomy, vocabulary) for anatomy in request.get("anatomy_list") or ()}
        unwanted = set(request.get("tumors", TUMORS)) - wanted
        regions = {region_of_word(word) for word in request.get("body_region") or ()}
        distances = {
            entry: 0.0 if _has_grid(entry, output_size, spacing) else grid_distance(entry, output_size, spacing)
            for entry in entries
        }

        @cache  # of those that are passed over no more than the reasons: each is a volume
        def read(entry: MaskEntry) -> FoundMask | list[str]:
            mask = self._load_on_grid(entry, output_size, spacing)
            return _shortcomings(mask, wanted, unwanted, regions, vocabulary) or mask

        found: list[FoundMask] = []
        is_shared = not isinstance(generator, list)
        for one in [generator] * num if is_shared else generator:
            taken = [mask.entry for mask in found] if is_shared else []
            left, reasons = distances.copy(), Counter()
            for _ in range(min(len(distances), MAX_LOADED)):
                (entry,) = self.select(list(left), 1, one, list(left.values()), taken)
                mask = read(entry)
                if isinstance(mask, FoundMask):
                    found.append(mask)
                    break
                reasons.update(mask)
                del left[entry]
            else:
                raise ValueError(
                    f"none of {len(distances) - len(left)} label maps has what was asked for on "
                    f"{_grid(output_size, spacing)}: they are {_counts(reasons)}; give a larger field of view or a "
                    "finer spacing"
                )
        return found

    def _load_on_grid(
        self, entry: MaskEntry, size: tuple[int, int, int], spacing: tuple[float, float, float]
    ) -> "FoundMask":
        image = self.load(entry)
        if _has_grid(entry, size, spacing):
            return FoundMask(image, entry, entry.regions, set(labels_present(np.asarray(image.dataobj))))
        image = resample_to_grid(image, size, spacing, order=0, fill=0)
        labels = set(labels_present(np.asarray(image.dataobj)))
        try:
            regions = regions_from_labels(labels)
        except ValueError:  # no label that is left tells
            regions = entry.regions
        return FoundMask(image, entry, regions, labels)

    @staticmethod
    def select(
        entries: list[MaskEntry],
        num: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        distances: Sequence[float] | None = None,
        taken: Iterable[MaskEntry] = (),
    ) -> list[MaskEntry]:
        """Choose at random. One generator chooses each label map once before any twice; of several each chooses
        whatever the others choose.

        Args:
            entries: what to choose from, one at least.
            num: how many.
            generator: one, or one for each of them; the same ones choose the same.
            distances: of the entries, the nearer of which come first; without, they are all alike.
            taken: what was chosen before.
        """
        is_shared = not isinstance(generator, list)
        counts = Counter(taken)
        times = [counts[entry] for entry in entries]
        distances = distances or [0.0] * len(entries)
        chosen = []
        for one in [generator] * num if is_shared else generator:
            device = "cpu" if one is None else one.device
            order = torch.randperm(len(entries), generator=one, device=device).tolist()
            # Of those chosen least and of them the nearest the first; what rounding makes of spacings is no distance.
            choice = min(order, key=lambda i: (times[i], round(distances[i], 2)))
            if is_shared:
                times[choice] += 1
            chosen.append(entries[choice])
        return chosen

    def load(self, entry: MaskEntry) -> nib.Nifti1Image:
        """The label map of an entry.

        Returns:
            uint8 (X, Y, Z) in RAS+.

        Raises:
            FileNotFoundError: if its file is not there.
            ValueError: if it is damaged, no label map, or has another size or spacing than the entry says.
        """
        name = entry.pseudo_label_filename
        source = self._fetch(glob.escape(name))
        data = read_file(source, name, limit=MAX_HEADER + 8 * math.prod(entry.dim))
        try:
            # The size before the voxels: a header can ask for any amount of memory.
            image = nib.Nifti1Image.from_bytes(data)
            if sorted(n for n in image.shape if n > 1) != sorted(n for n in entry.dim if n > 1):
                raise ValueError(f"it has size {image.shape}, but its entry says {entry.dim}")
            image = to_ras(load_label_map(whole_numbers(load_volume(image))))
            check_entry(image, entry)
        except (ValueError, OSError, ImageFileError, HeaderDataError, WrapStructError) as error:
            line = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"Label map {name!r} of {str(source)!r} is not usable: {line}; download the database again, or take "
                "its entry out of the list; for label maps of your own remove the list and make it anew."
            ) from error
        return image

    def save(self, folder: str | os.PathLike) -> None:
        """Copy the list and its label maps into a folder, where `MaisiMaskDatabase(folder)` reads them.

        Raises:
            FileNotFoundError: if a label map is not there.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        source = self._fetch("*")
        if source.is_dir():
            for name in {entry.pseudo_label_filename for entry in self.entries}:
                if not (source / name).is_file():
                    raise FileNotFoundError(f"{str(source)!r} has no file {name!r}; download it again.")
                path = folder / MASKS / name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, path)
        else:
            shutil.copyfile(source, folder / f"{MASKS}.zip")
        write_entries(folder / CANDIDATES, self.entries)


def grid_distance(
    entry: MaskEntry, size: tuple[int, int, int] | None, spacing: tuple[float, float, float] | None
) -> float:
    """How far the grid of a label map is from the wanted one (published rule): the sum over axes of the differences in
    the field of view / 10 mm, in size / 100 voxels, and in spacing / 1 mm."""
    size, spacing = np.array(size or entry.dim), np.array(spacing or entry.spacing)
    own_size, own_spacing = np.array(entry.dim), np.array(entry.spacing)
    difference = (
        abs(own_size * own_spacing - size * spacing) / 10 + abs(own_size - size) / 100 + abs(own_spacing - spacing)
    )
    return float(difference.sum())


def check_entry(image: nib.Nifti1Image, entry: MaskEntry) -> None:
    """Refuse a label map (X, Y, Z) in RAS+ that is not what its entry says; raises a `ValueError`."""
    if image.shape != entry.dim:
        raise ValueError(f"it has size {image.shape} in RAS+, but its entry says {entry.dim}")
    if not np.allclose(spacing_of(image), entry.spacing, rtol=0.01):
        spacing = tuple(round(mm, 4) for mm in spacing_of(image))
        raise ValueError(f"it has spacing {spacing} in RAS+, but its entry says {entry.spacing}")


def _shortcomings(
    mask: FoundMask, wanted: set[int], unwanted: set[int], regions: set[int], vocabulary: Mapping[str, int]
) -> list[str]:
    """What a label map does not have, or has, against what was asked for: lost when it was resampled, or because its
    entry says what is not so."""
    reasons = [f"without {label_name(label, vocabulary)}" for label in sorted(wanted - mask.labels)]
    unlisted = sorted(unwanted & mask.labels)
    reasons += [f"with {label_name(label, vocabulary)} that is not in the list" for label in unlisted]
    if not reasons and not regions <= _shown(mask.regions):
        reasons = ["without the region"]
    return reasons


def _shown(regions: tuple[int, int] | None) -> set[int]:
    return set() if regions is None else set(range(regions[0], regions[1] + 1))


def _span(regions: tuple[int, int] | None) -> str:
    if regions is None:
        return "no known region"
    top, bottom = (REGION_WORDS[region] for region in regions)
    return top if top == bottom else f"{top} to {bottom}"


def _has_grid(entry: MaskEntry, size: tuple[int, int, int] | None, spacing: tuple[float, float, float] | None) -> bool:
    same_size = size is None or entry.dim == tuple(size)
    return same_size and (
        spacing is None or all(abs(own - mm) <= SPACING_TOLERANCE for own, mm in zip(entry.spacing, spacing))
    )


def _is_large_enough(
    entry: MaskEntry, size: tuple[int, int, int] | None, spacing: tuple[float, float, float] | None
) -> bool:
    return size is None or all(own > wanted - MISSING_VOXELS for own, wanted in zip(entry.dim, size))


def _grid(size: tuple[int, int, int] | None, spacing: tuple[float, float, float] | None) -> str:
    texts = []
    if size is not None:
        texts.append(f"output_size={tuple(size)}")
    if spacing is not None:
        texts.append(f"spacing=({', '.join(f'{mm:g}' for mm in spacing)})")
    return " with ".join(texts)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _names(labels: Iterable[int], vocabulary: Mapping[str, int], joint: str) -> str:
    return joint.join(label_name(label, vocabulary) for label in sorted(labels))
