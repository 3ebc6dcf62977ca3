"""Cases of a data set of phantoms, each from its seed alone."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from ..anatomy import anatomy_sizes, labels_present, one_hot, regions_from_labels, regions_from_words
from ..files import write_atomically
from ..imaging.nifti import DESCRIPTION, is_up_to_date
from ..phantom import SIZE_RANGES, OrganOutOfViewError, Subject, make_phantom, names_of_tumors
from .data_list import Case

# Where the fields of view are, and how often.
REGIONS = [
    (("chest",), 0.22),
    (("abdomen",), 0.30),
    (("chest", "abdomen"), 0.26),
    (("pelvis",), 0.14),
    (("head",), 0.08),
]
# Tumors whose organ is in the field of view, of the regions from head to pelvis.
TUMORS_OF = (
    (),
    ("lung tumor", "hepatic tumor", "bone lesion"),
    ("hepatic tumor", "pancreatic tumor", "colon cancer primaries", "bone lesion"),
    ("colon cancer primaries", "bone lesion"),
)
DIAMETERS = (10.0, 60.0)  # mm
OTHER_SPACINGS = (2.0, 4.0)  # mm
TABLES = 0.3  # share of patients that a table is seen under
MODALITIES = {"none": "ct_wo_contrast", "arterial": "ct_contrast", "venous": "ct_contrast"}


@dataclass(frozen=True)
class PhantomDataset:
    """
    What the cases of a data set have in common.

    Args:
        folder: of its files.
        size: voxels along X, Y, Z.
        spacing: voxel size in mm.
        other_spacings: share of cases with voxels of [`OTHER_SPACINGS`] instead.
        body_region: words for the region of all cases; one of [`REGIONS`] for each if not given.
        tumors: share of cases with a tumor.
        num_folds: parts that the cases are dealt to in turn.
    """

    folder: Path
    size: tuple[int, int, int]
    spacing: float
    other_spacings: float
    body_region: tuple[str, ...] | None
    tumors: float
    num_folds: int

    def draw(self, seed: int) -> dict:
        """Arguments of [`make_phantom`] for a case: region, spacing, tumor, table."""
        rng = np.random.default_rng([seed, 1])
        words, shares = zip(*REGIONS)
        region = self.body_region or words[rng.choice(len(words), p=shares)]
        spacing = rng.uniform(*OTHER_SPACINGS) if rng.random() < self.other_spacings else self.spacing
        drawn = {"seed": seed, "body_region": region, "size": self.size, "spacing": (round(float(spacing), 2),) * 3}
        tumors = tumors_of(region)
        if tumors and rng.random() < self.tumors:
            drawn["tumor"] = tumors[rng.integers(len(tumors))]
            drawn["tumor_diameter"] = float(rng.uniform(*DIAMETERS))
        return drawn | {"table": bool(rng.random() < TABLES)}

    def make(self, seed: int) -> Case:
        """Write the CT and the label map of a case, where they are not there yet as drawn, and describe them."""
        image_path, label_path = (self.folder / f"phantom{seed:06d}_{kind}.nii.gz" for kind in ("ct", "labels"))
        drawn = self.draw(seed)
        tag = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:8]
        description = f"{DESCRIPTION}, phantom {tag}"
        if not all(is_up_to_date(path, description, []) for path in (image_path, label_path)):
            try:
                phantom = make_phantom(**drawn)
            except OrganOutOfViewError:  # the field of view is smaller than its region
                phantom = make_phantom(**drawn | {"tumor": None})
            for path, image in ((image_path, phantom.image), (label_path, phantom.labels)):
                image.header["descrip"] = description
                with write_atomically(path) as temporary:
                    image.to_filename(temporary)
        labels = np.asarray(nib.load(label_path).dataobj)
        top, bottom = regions_from_labels(labels_present(labels))
        return Case(
            image=image_path,
            label=label_path,
            dim=labels.shape,
            spacing=drawn["spacing"],
            top_region_index=one_hot(top),
            bottom_region_index=one_hot(bottom),
            modality=MODALITIES[Subject.draw(seed).phase],
            fold=seed % self.num_folds,
            organ_size=tuple(anatomy_sizes(labels, drawn["spacing"], SIZE_RANGES)),
        )


def tumors_of(body_region: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the tumors whose organ is in the field of view of words for a region."""
    top, bottom = regions_from_words(body_region)
    if top == bottom:
        return TUMORS_OF[top]
    there = set().union(*TUMORS_OF[top : bottom + 1])
    return tuple(name for name in names_of_tumors() if name in there)
