"""The body label: every voxel of the patient that no organ claims.

Segmentations of organs don't come with it, and the released ControlNets were trained with it: without it, fat, skin
and muscle are generated as air.
"""

import warnings

import cc3d
import nibabel as nib
import numpy as np
from nibabel.orientations import io_orientation
from scipy import ndimage
from scipy.spatial import ConvexHull

from ..imaging.resample import resample_like, spacing_of
from .vocabulary import BODY, LABELS, LUNG_LOBES

AIR_HU = -800.0
"""Voxels below this are air, as in the published envelope."""

SKIN_HU = -500.0
"""Half-way from air to water: where skin ends, and above most mattresses and clothes."""

TABLE_MM = 5.0
"""Parts thinner than this in the axial plane, unless within reach of thicker ones, are bed, table or tubes."""

AIR_SHARE = 0.05
"""Share of the body above which one pocket of unlabelled air is not the patient's, as in the published envelope."""

AIRY = (*LUNG_LOBES, LABELS["lung tumor"], LABELS["trachea"], LABELS["airway"], LABELS["colon"], LABELS["stomach"])
"""Labels that air is expected in."""

LABELLED_AIR_SHARE = 0.05
"""Share of the other labelled voxels that may be air in a CT that belongs to the label map."""

MARGIN_MM = 15.0
"""Guessed thickness of fat and skin over the outermost organs, where there is no CT to see it in."""


def add_body_label(labels: nib.Nifti1Image, ct: nib.Nifti1Image | None = None) -> nib.Nifti1Image:
    """Label the rest of the body with 200.

    With a CT, the body is what is not outside air: tissue is everything from -800 HU up and everything labelled; what
    is thin or apart from the patient (bed, table, mattress) is dropped; air that the tissue encloses in an axial plane
    (lungs, airways, gas in the bowel) is inside. Without a CT, the body is guessed: the convex hull of the organs
    in each axial plane, 15 mm wider. Published method: `add_body_envelope` of NVIDIA's MAISI release; here sizes are
    in mm and the table comes off without the skin.

    Args:
        labels: label map (X, Y, Z) in MAISI's vocabulary, uint8, in any orientation.
        ct: CT in HU of the same patient; it is resampled linearly where its grid is another one.

    Returns:
        The label map on its own grid. Labelled voxels keep their label; a map that has label 200 comes back as it is.

    Raises:
        ValueError: if the CT shows no tissue on the label map's grid.

    Warns:
        UserWarning: without a CT, that the outline is a guess; with one, that it has no air or shows air where organs
            are labelled, and so is another one or not in HU.

    Example:

    ```py
    >>> from maisi_diffusers.anatomy import add_body_label, load_label_map
    >>> from maisi_diffusers.imaging import load_volume

    >>> labels = load_label_map("segmentation.nii.gz", vocabulary="totalsegmentator")
    >>> labels = add_body_label(labels, ct=load_volume("ct.nii.gz"))
    ```
    """
    data = np.asanyarray(labels.dataobj)
    if (data == BODY).any():
        return labels

    # Only which array axis runs along the patient matters here, not which way the axes point.
    axial = int(np.flatnonzero(io_orientation(labels.affine)[:, 0] == 2)[0])
    planes = np.moveaxis(data, axial, 2)
    spacing = list(spacing_of(labels))
    spacing.append(spacing.pop(axial))

    if ct is None:
        warnings.warn(
            "The label map has no body label (200) and no CT was given: the body outline is a guess from the hull of "
            "the organs. Pass the CT to get the real one.",
            UserWarning,
            stacklevel=2,
        )
        body = _hull(planes > 0, spacing)
    else:
        if ct.shape != labels.shape or not np.allclose(ct.affine, labels.affine, atol=1e-3):
            ct = resample_like(ct, labels, order=1, fill=-1000.0)
        hu = np.moveaxis(np.asanyarray(ct.dataobj), axial, 2)
        _warn_of_another_ct(planes, hu)
        body = _envelope(planes, hu, spacing)

    out = data.copy()
    np.moveaxis(out, axial, 2)[body & (planes == 0)] = BODY
    return type(labels)(out, labels.affine, labels.header)


def _warn_of_another_ct(labels: np.ndarray, hu: np.ndarray) -> None:
    if not (hu < AIR_HU).any():
        warnings.warn(
            f"The CT has no air, no voxel below {AIR_HU:g} HU, so that all of it is body: check that it is in HU.",
            UserWarning,
            stacklevel=3,
        )
    solid = (labels > 0) & ~np.isin(labels, AIRY)
    share = np.count_nonzero(hu[solid] < AIR_HU) / max(np.count_nonzero(solid), 1)
    if share > LABELLED_AIR_SHARE:
        warnings.warn(
            f"{share:.0%} of the labelled voxels outside the lungs are air in the CT: check that it is the one the "
            "label map was drawn on, and covers it.",
            UserWarning,
            stacklevel=3,
        )


def _envelope(labels: np.ndarray, hu: np.ndarray, spacing: list[float]) -> np.ndarray:
    labelled = labels > 0
    tissue = hu >= AIR_HU
    if not tissue.any():
        raise ValueError(
            f"The CT has no voxel of at least {AIR_HU:g} HU on the label map's grid; check that it is in HU and that "
            "it lies where the label map does."
        )
    body = _without_table((hu >= SKIN_HU) | labelled, labelled, spacing)
    # Skin voxels that are half air. One voxel deep, or the mattress would come along.
    body = ndimage.maximum_filter(body, (3, 3, 1)) & tissue | labelled
    body |= _enclosed(body)
    if np.isin(labels, LUNG_LOBES).any():
        # The lungs being labelled, a large pocket of air is none of the patient's: it is under the back or an arm.
        pockets = cc3d.connected_components(body & ~tissue & ~labelled)
        too_large = np.bincount(pockets.ravel()) >= AIR_SHARE * np.count_nonzero(body)
        too_large[0] = False
        body[too_large[pockets]] = False
    return body


def _without_table(dense: np.ndarray, labelled: np.ndarray, spacing: list[float]) -> np.ndarray:
    """The patient alone: dense voxels eroded until bed and table come off, then grown back within the dense ones.

    Tables run along the patient, so eroding in the axial plane is enough, whatever the slice thickness.
    """
    width = [2 * max(1, round(TABLE_MM / 2 / mm)) + 1 for mm in spacing[:2]] + [1]
    pieces = cc3d.connected_components(ndimage.minimum_filter(dense, width, mode="nearest"))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    # A leg or an arm can be apart from the largest piece; a label in it tells it from the table.
    is_patient = np.zeros(len(sizes), dtype=bool)
    is_patient[pieces[labelled]] = True
    is_patient[sizes.argmax()] = True
    is_patient[0] = False
    return ndimage.maximum_filter(is_patient[pieces], width) & dense


def _enclosed(body: np.ndarray) -> np.ndarray:
    """Voxels that the body surrounds in their axial plane.

    In the plane, because a scan that ends inside the lungs opens them at its first or last slice, and the nose opens
    the airways to the outside; whatever is surrounded in 3D is surrounded in each plane.
    """
    in_plane = ndimage.generate_binary_structure(3, 1)
    in_plane[1, 1, [0, 2]] = False
    regions, count = ndimage.label(~body, in_plane)
    outside = np.zeros(count + 1, dtype=bool)
    outside[0] = True
    for border in (regions[0], regions[-1], regions[:, 0], regions[:, -1]):
        outside[border] = True
    return ~outside[regions]


def _hull(labelled: np.ndarray, spacing: list[float]) -> np.ndarray:
    """Convex hull of the labels in each axial plane, widened by the margin, closed and smoothed along the patient."""
    body = np.zeros(labelled.shape, dtype=bool)
    x, y = (np.arange(n) * mm for n, mm in zip(labelled.shape, spacing[:2]))
    for z in np.flatnonzero(labelled.any(axis=(0, 1))):
        rows = np.flatnonzero(labelled[:, :, z].any(axis=1))
        in_rows = labelled[rows, :, z]
        low = in_rows.argmax(axis=1) - 0.5
        high = in_rows.shape[1] - in_rows[:, ::-1].argmax(axis=1) - 0.5
        # Corners of the voxels, not their centres: they have a hull even where a plane holds a single voxel.
        corners = [(rows + side, edge) for side in (-0.5, 0.5) for edge in (low, high)]
        hull = ConvexHull(np.concatenate([np.stack(corner, axis=1) for corner in corners]) * spacing[:2])
        beyond = [nx * x[:, None] + ny * y + offset for nx, ny, offset in hull.equations]
        body[:, :, z] = np.max(beyond, axis=0) <= MARGIN_MM

    width = 2 * round(MARGIN_MM / spacing[2]) + 1
    closed = ndimage.maximum_filter1d(body, width, axis=2, mode="constant", cval=0)
    closed = ndimage.minimum_filter1d(closed, width, axis=2, mode="constant", cval=1)
    return ndimage.uniform_filter1d(closed.astype(np.float32), width, axis=2, mode="nearest") > 0.5
