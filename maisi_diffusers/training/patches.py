"""Patches of CT and MR volumes and of label maps, for the training of the VAEs."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from ..imaging import from_hu, is_ct, load_volume, modality_code, to_ras
from .data_list import Case
from .mask_classes import load_mask_labels
from .randomness import case_generator

# The VAE halves the grid twice.
MULTIPLE = 4

# As published, but for the scale: its published range, 0.9 to 1.1, went to a function that adds 1 to it, which made
# three in ten patches twice as bright. Here it is what it was meant to be.
FLIP_CHANCE = 0.5  # for every axis
TURN_CHANCE = 0.5  # for every pair of axes
CHANCE = 0.3  # for each of the others
PLANES = ((0, 1), (1, 2), (0, 2))
ZOOM = (0.5, 1.5)
ANGLE = (-0.1, 0.1)  # radians
SCALE = (0.9, 1.1)
SHIFT = (-0.05, 0.05)
MR_HIGH_PERCENTILE = 99.5

AUGMENTATIONS = ("full", "crop", "none")


class PatchDataset(torch.utils.data.Dataset):
    """
    Patches of the volumes of a data list. An item is the same whichever process or worker makes it.

    Args:
        cases: entries whose `image` is a CT or MR volume.
        patch_size: voxels along X, Y, Z, one number or three, multiples of 4; None for whole volumes, padded to them.
        augmentation: `"full"`, as published: take patches at random places, zoom, turn and flip them and change their
            intensities; `"crop"`: take them at random places, and leave them as they are; `"none"`: the patch is the
            middle of the volume, and always the same.
        seed: of all draws; `set_epoch` changes them.
        patches_per_case: items that each case gives to an epoch.
        cached_cases: how many cases are read once, now, and kept in memory, the first ones of the list. Each process
            has a copy; workers of a data loader share it where they are forked.

    Items, tensors that collate to a batch:
        image (1, X, Y, Z) float32: in RAS+. A CT is in 0..1 for -1000..1000 HU, an MR volume is 0 at its minimum and 1
            at its 99.5th percentile; changes of intensity may lead out of 0..1, as does bright MR. Outside of the
            volume it is 0, air.
        index () int64: which item it is.

    Raises:
        FileNotFoundError: for a volume that does not exist.
        ValueError: for a patch size that is no multiple of 4; for an augmentation that is none; for a size of None
            with any but `"none"`; for a volume that cannot be read (see [`load_volume`]), once it is its turn.
    """

    source = "image"  # of a case
    item_name = "image"

    def __init__(
        self,
        cases: list[Case],
        patch_size: int | tuple[int, int, int] | None,
        augmentation: str,
        seed: int = 0,
        patches_per_case: int = 1,
        cached_cases: int = 0,
    ):
        if augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation={augmentation!r} is unknown: use one of {', '.join(AUGMENTATIONS)}")
        if patch_size is not None:
            patch_size = (patch_size,) * 3 if isinstance(patch_size, int) else tuple(patch_size)
            if len(patch_size) != 3 or any(size <= 0 or size % MULTIPLE for size in patch_size):
                raise ValueError(
                    f"patch_size={patch_size} is not allowed: give multiples of {MULTIPLE} voxels, one number or three"
                )
        elif augmentation != "none":
            raise ValueError(
                f"patch_size=None takes whole volumes, which are not augmented: give multiples of {MULTIPLE}"
            )
        bare = [str(case.image) for case in cases if getattr(case, self.source) is None]
        if bare:
            raise ValueError(
                f"{len(bare)} of the {len(cases)} cases have no {self.source}, that of {bare[0]!r} first: correct the "
                "data list"
            )
        missing = [str(path) for case in cases if not (path := getattr(case, self.source)).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(cases)} {self.source}s do not exist, {missing[0]!r} first: correct the "
                "data list"
            )
        self.cases = cases
        self.patch_size = patch_size
        self.augmentation = augmentation
        self.seed = seed
        self.patches_per_case = patches_per_case
        with ThreadPoolExecutor() as pool:
            self._cache = dict(enumerate(pool.map(self.load, cases[:cached_cases])))
        # In shared memory, for workers that outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw anew."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.cases) * self.patches_per_case

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number = index // self.patches_per_case
        volume = self._cache[number] if number in self._cache else self.load(self.cases[number])
        if self.augmentation != "none":
            generator = case_generator(self.seed, int(self._epoch), index, "patch")
            place = torch.rand(3, generator=generator).tolist()
            done = self.draw_augmentation(generator) if self.augmentation == "full" else Augmentation()
            patch = done.patch(volume, self.patch_size, place)
        else:
            shape = volume.voxels.shape
            size = self.patch_size or tuple(-(-length // MULTIPLE) * MULTIPLE for length in shape)
            patch = volume.crop([(length - n) // 2 for length, n in zip(shape, size)], size)
        return {self.item_name: patch, "index": torch.tensor(index)}

    def load(self, case: Case) -> "Voxels":
        """What the patches of a case are taken from."""
        return Volume.load(case)

    def draw_augmentation(self, generator: torch.Generator) -> "Augmentation":
        """What is done to a patch."""
        return Augmentation.draw(generator)


class LabelPatchDataset(PatchDataset):
    """
    Patches of the label maps of a data list, as [`PatchDataset`] takes them of its volumes.

    Args:
        cases: entries with a `label`.
        augmentation: as [`PatchDataset`], but `"full"` takes patches at random places, and zooms and turns them a
            little. They are not mirrored nor turned by quarters: that what is left is left and what is above is above
            helps to tell 125 labels by 4 channels.

    Items, tensors that collate to a batch:
        labels (1, X, Y, Z) uint8: in RAS+, of [`MASK_VAE_LABELS`], kidney cysts as their kidney. Outside of the map
            it is 0, background.
        index () int64: which item it is.

    Raises:
        FileNotFoundError: for a label map that does not exist.
        ValueError: as [`PatchDataset`]; for a case without label map; for a label map that [`load_mask_labels`]
            refuses, once it is its turn.
    """

    source = "label"
    item_name = "labels"

    def load(self, case: Case) -> "Voxels":
        """What the patches of a case are taken from."""
        return LabelMap.load(case)

    def draw_augmentation(self, generator: torch.Generator) -> "Augmentation":
        """What is done to a patch."""
        return Augmentation.draw_for_labels(generator)


@dataclass(frozen=True)
class Voxels:
    """
    What patches are taken from, in memory, in its file's data type; `values` are computed for what is cropped.

    Args:
        voxels (X, Y, Z): in RAS+, as stored.
    """

    voxels: np.ndarray

    interpolation: ClassVar[str]

    def values(self, voxels: np.ndarray) -> torch.Tensor:
        """What a patch holds where its voxels are stored as these."""
        raise NotImplementedError

    def crop(self, start: list[int], size: tuple[int, int, int]) -> torch.Tensor:
        """Values (1, X, Y, Z) of this size from this voxel on, either of which may lie outside: 0 there."""
        window, pad = [], []
        for begin, n, length in zip(start, size, self.voxels.shape):
            first, end = min(max(begin, 0), length), min(max(begin + n, 0), length)
            window.append(slice(first, end))
            pad = [first - begin, begin + n - end, *pad]  # torch pads the last axis first
        return F.pad(self.values(self.voxels[tuple(window)]), pad)[None]


@dataclass(frozen=True)
class LabelMap(Voxels):
    """A label map in memory; its values are its labels."""

    interpolation: ClassVar[str] = "nearest"

    @classmethod
    def load(cls, case: Case) -> Self:
        """Read the label map of a case; raises what [`load_mask_labels`] raises."""
        return cls(np.asarray(load_mask_labels(case.label).dataobj))

    def values(self, voxels: np.ndarray) -> torch.Tensor:
        """Labels, uint8."""
        return torch.from_numpy(np.ascontiguousarray(voxels))


@dataclass(frozen=True)
class Volume(Voxels):
    """
    A volume in memory; its values are VAE intensities.

    Args:
        code: of the modality.
        low, high: intensities of an MR volume that become 0 and 1.
    """

    code: int
    low: float = 0.0
    high: float = 1.0

    interpolation: ClassVar[str] = "bilinear"

    @classmethod
    def load(cls, case: Case) -> Self:
        """Read the volume of a case; raises what [`load_volume`] raises."""
        voxels, code = np.asanyarray(to_ras(load_volume(case.image)).dataobj), modality_code(case.modality)
        if is_ct(code):
            return cls(voxels, code)
        return cls(voxels, code, *np.percentile(voxels, (0, MR_HIGH_PERCENTILE)).tolist())

    def values(self, voxels: np.ndarray) -> torch.Tensor:
        """VAE intensities, float32."""
        voxels = torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.float32))
        if is_ct(self.code):
            return from_hu(voxels, self.code)
        return (voxels - self.low) / ((self.high - self.low) or 1.0)  # a volume of one value becomes 0


@dataclass(frozen=True)
class Augmentation:
    """
    What is done to a patch, in this order; the defaults change nothing.

    Args:
        zoom: how many times larger things become.
        angles: of the rotation about X, Y and Z, in radians.
        flips: axes that are mirrored.
        turns: two axes and how many quarter turns from the first to the second.
        scale: factor of the intensities.
        shift: summand of the intensities.
    """

    zoom: float = 1.0
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0)
    flips: tuple[int, ...] = ()
    turns: tuple[tuple[int, int, int], ...] = ()
    scale: float = 1.0
    shift: float = 0.0

    @classmethod
    def draw(cls, generator: torch.Generator) -> Self:
        """As likely as published."""
        return replace(
            cls.draw_for_labels(generator),
            flips=tuple(axis for axis in range(3) if _happens(FLIP_CHANCE, generator)),
            turns=tuple(
                (*plane, int(torch.randint(1, 4, (), generator=generator)))
                for plane in PLANES
                if _happens(TURN_CHANCE, generator)
            ),
            scale=_uniform(SCALE, generator) if _happens(CHANCE, generator) else 1.0,
            shift=_uniform(SHIFT, generator) if _happens(CHANCE, generator) else 0.0,
        )

    @classmethod
    def draw_for_labels(cls, generator: torch.Generator) -> Self:
        """Zoom and rotation alone, as likely as published for images."""
        return cls(
            zoom=_uniform(ZOOM, generator) if _happens(CHANCE, generator) else 1.0,
            angles=tuple(_uniform(ANGLE, generator) for _ in range(3))
            if _happens(CHANCE, generator)
            else (0.0, 0.0, 0.0),
        )

    def patch(self, volume: Voxels, size: tuple[int, int, int], place: list[float]) -> torch.Tensor:
        """
        Take a patch.

        Args:
            volume: what it is taken from.
            size: voxels of the patch, when all is done.
            place: where along X, Y, Z, 0 for the first place there is, up to 1 for the last. Where the volume is
                smaller than what the patch shows, it is put in the middle.

        Returns:
            the patch (1, X, Y, Z).
        """
        for first, second, quarters in self.turns[::-1]:
            if quarters % 2:
                size = _swapped(size, first, second)
        if self.zoom == 1 and not any(self.angles):
            # Whole voxels: nothing is interpolated.
            room = [length - n for length, n in zip(volume.voxels.shape, size)]
            patch = volume.crop([int(p * (r + 1)) if r > 0 else r // 2 for p, r in zip(place, room)], size)
        else:
            patch = self._resample(volume, size, place)
        patch = patch.flip([axis + 1 for axis in self.flips])
        for first, second, quarters in self.turns:
            patch = patch.rot90(quarters, (first + 1, second + 1))
        if (self.scale, self.shift) == (1.0, 0.0):
            return patch
        return patch * self.scale + self.shift

    def _resample(self, volume: Voxels, size: tuple[int, int, int], place: list[float]) -> torch.Tensor:
        """
        Zoom and rotate what the patch shows of the volume, and nothing else.

        Zooming the whole volume by `zoom` and cropping `size` at random, as published, shows `size / zoom` voxels at a
        random place. To take those and zoom them alone has the same distribution and is far less work.
        """
        shape, size = np.array(volume.voxels.shape), np.array(size)
        # Positions are in voxels from the corner of the volume: voxel i reaches from i to i + 1.
        field = size / self.zoom
        room = shape - field
        start = np.where(room > 0, room * place, room / 2)
        centre = start + field / 2
        rotation = Rotation.from_euler("xyz", self.angles).as_matrix()

        # All voxels that the patch is interpolated from. The corners of a rotated one may stick out; of the volume, or
        # of the padding of one that is too small, they see the outermost voxels.
        reach = np.abs(rotation) @ (field / 2) + 0.5
        first = np.maximum(np.floor(centre - reach), np.floor(np.minimum(start, 0)))
        end = np.minimum(np.ceil(centre + reach), np.ceil(np.maximum(start + field, shape)))
        region = end - first
        crop = volume.crop(first.astype(int).tolist(), tuple(region.astype(int).tolist()))

        # torch has both grids from -1 to 1, and their axes the other way round.
        theta = np.empty((3, 4))
        theta[:, :3] = rotation * field / region[:, None]
        theta[:, 3] = 2 * (centre - first) / region - 1
        theta = torch.tensor(theta[::-1, [2, 1, 0, 3]].copy(), dtype=torch.float32)
        grid = F.affine_grid(theta[None], [1, 1, *size.tolist()], align_corners=False)
        mode = volume.interpolation
        patch = F.grid_sample(crop[None].float(), grid, mode, padding_mode="border", align_corners=False)[0]
        return patch.to(crop.dtype)


def _happens(chance: float, generator: torch.Generator) -> bool:
    return torch.rand((), generator=generator).item() < chance


def _uniform(limits: tuple[float, float], generator: torch.Generator) -> float:
    low, high = limits
    return low + (high - low) * torch.rand((), generator=generator).item()


def _swapped(size: tuple[int, int, int], first: int, second: int) -> tuple[int, int, int]:
    size = list(size)
    size[first], size[second] = size[second], size[first]
    return tuple(size)
