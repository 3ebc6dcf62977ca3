"""A phantom: draws a subject, paints its anatomy, renders its CT."""

from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from ..anatomy import regions_from_words
from ..imaging import ct_to_nifti, labels_to_nifti, spacing_affine
from .abdomen import draw_abdomen
from .canvas import Canvas
from .chest import draw_heart_and_vessels, draw_lungs
from .frame import make_frame
from .muscles import draw_muscles
from .render import render
from .skeleton import draw_skeleton
from .subject import Subject
from .tumors import draw_tumor

# Bottom and top of each region in mm of the standard body: head-neck, thorax, abdomen, pelvis-lower.
REGION_SPANS = [(480, 745), (205, 480), (10, 270), (-190, 40)]


@dataclass(frozen=True)
class Phantom:
    """
    Args:
        image: the CT, int16 HU, (X, Y, Z) in RAS+.
        labels: its label map, uint8, in MAISI's vocabulary, on the same grid.
        subject: whose it is.
    """

    image: nib.Nifti1Image
    labels: nib.Nifti1Image
    subject: Subject


def make_phantom(
    seed: int,
    body_region: Sequence[str] = ("chest", "abdomen"),
    size: tuple[int, int, int] = (128, 128, 128),
    spacing: tuple[float, float, float] = (3.0, 3.0, 3.0),
    tumor: str | None = None,
    tumor_diameter: float = 30.0,
    table: bool = False,
    subject: Subject | None = None,
) -> Phantom:
    """
    A CT and its label map, made from geometry and statistics alone.

    The same seed gives the same anatomy on any grid and for any region, but for the place of a tumor.

    Args:
        seed: of everything that is random.
        body_region: words for what is in the middle of the field of view: head, chest, abdomen, pelvis; several for
            the middle of all from the first to the last.
        size: voxels along X, Y, Z.
        spacing: mm along X, Y, Z.
        tumor: name of one of the five tumors of MAISI's vocabulary, e.g. `"hepatic tumor"`.
        tumor_diameter: in mm; a tumor that does not fit into its organ is smaller.
        table: whether the patient lies on one.
        subject: whose body it is, for control of sex, fat, organ sizes, contrast; drawn from the seed if not given,
            which is its seed if it is.

    Raises:
        ValueError: for an unknown region or tumor, for a size or spacing that is not positive, for a subject of
            another seed.
        OrganOutOfViewError: for a tumor whose organ is not in the field of view.

    Example:

    ```py
    >>> from maisi_diffusers.phantom import make_phantom

    >>> phantom = make_phantom(seed=0, body_region=["abdomen"], tumor="hepatic tumor")
    >>> phantom.image.to_filename("ct.nii.gz")
    >>> phantom.labels.to_filename("labels.nii.gz")
    ```
    """
    top, bottom = regions_from_words(body_region)
    for name, values in (("size", size), ("spacing", spacing)):
        if len(values) != 3 or any(not value > 0 for value in values):
            raise ValueError(f"{name}={values} is not allowed: give three numbers above 0, along X, Y, Z")
    if not 0 < tumor_diameter < np.inf:
        raise ValueError(f"tumor_diameter={tumor_diameter} is not allowed: give mm above 0")
    subject = subject or Subject.draw(seed)
    if subject.seed != seed:
        raise ValueError(f"seed={seed} is not that of the subject, {subject.seed}: everything is drawn by one seed")
    centre = (REGION_SPANS[top][1] + REGION_SPANS[bottom][0]) / 2
    canvas = Canvas(subject, tuple(size), tuple(spacing), centre)

    # What is painted first stays.
    frame = make_frame(canvas)
    draw_skeleton(canvas)
    draw_heart_and_vessels(canvas, frame)
    draw_abdomen(canvas, frame)
    draw_lungs(canvas, frame)
    draw_muscles(canvas, frame)
    if tumor is not None:
        draw_tumor(canvas, tumor, tumor_diameter)

    affine = spacing_affine(spacing)
    return Phantom(ct_to_nifti(render(canvas, frame, table), affine), labels_to_nifti(canvas.labels, affine), subject)
