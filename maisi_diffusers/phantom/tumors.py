"""The five tumors of MAISI, of a given size, in the organ they belong to."""

import numpy as np

from ..anatomy import BONES, LABELS, TUMORS
from .canvas import Canvas

# Bones that are large enough for a lesion to be seen in.
LESION_SITES = tuple(i for i in BONES if i < 57 or i in (LABELS["left hip"], LABELS["right hip"], LABELS["sacrum"]))
CANDIDATES = 40


class OrganOutOfViewError(ValueError):
    """A tumor's organ is not in the field of view."""


def draw_tumor(canvas: Canvas, name: str, diameter: float) -> None:
    """
    Paint a tumor where most of it fits into its organ; what does not fit is left out.

    Args:
        canvas: with all organs on it.
        name: of the tumor's label.
        diameter: in mm.

    Raises:
        ValueError: for another name.
        OrganOutOfViewError: if its organ is not on the canvas.
    """
    if LABELS.get(name) not in TUMORS:
        raise ValueError(f"tumor={name!r} is unknown: use one of {', '.join(names_of_tumors())}")
    organs = LESION_SITES if name == "bone lesion" else TUMORS[LABELS[name]]
    is_organ = np.isin(canvas.labels, organs)
    places = np.argwhere(is_organ)
    if not len(places):
        raise OrganOutOfViewError(
            f"there is no organ for a {name} in this field of view: choose another region or size"
        )
    rng = canvas.subject.rng(name)
    elongation = np.exp(rng.normal(0, 0.15, 3))
    half_axes = diameter / 2 * elongation / np.prod(elongation) ** (1 / 3)
    tilt = rng.uniform(0, 180, 3)
    tumors = []
    for place in places[rng.integers(len(places), size=CANDIDATES)]:
        centre = [float(coordinate[tuple(place)]) for coordinate in (canvas.x, canvas.y, canvas.z)]
        tumor = canvas.ellipsoid(centre, half_axes, tilt, roughness=0.06)
        tumors.append(((tumor.inside & is_organ[tumor.window]).sum() / max(tumor.inside.sum(), 1), tumor))
    tumor = max(tumors, key=lambda pair: pair[0])[1]
    painted = canvas.paint(name, tumor, over=organs)
    canvas.content[tumor.window][painted] = 0  # no gas or stool in it


def names_of_tumors() -> list[str]:
    """The tumors that can be drawn."""
    return [name for name, label in LABELS.items() if label in TUMORS]
