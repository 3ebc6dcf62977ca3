"""A picture of a volume: its three middle planes, with the labels laid over."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from .resample import spacing_of, to_ras

PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}
# A soft-tissue window that still shows lung and bone apart.
WINDOW = (-400.0, 600.0)


def save_preview(
    path: str | os.PathLike,
    image: nib.Nifti1Image,
    labels: nib.Nifti1Image | None = None,
    hidden_labels: tuple[int, ...] = (),
    window: tuple[float, float] = WINDOW,
    title: str | None = None,
) -> None:
    """
    Write a PNG with the sagittal, coronal and axial middle plane of an image, and again with its labels.

    Args:
        path: of the PNG; written under a temporary name and renamed.
        image: (X, Y, Z), HU or any intensity; shown in RAS+, the patient's right on the left.
        labels: label map on the same grid; every label gets a colour of its own, 0 none.
        hidden_labels: labels that get none either, such as the body.
        window: intensities that are black and white.
        title: a line above the planes.
    """
    image = to_ras(image)
    volumes = [(np.asarray(image.dataobj), None)]
    if labels is not None:
        volumes.append((volumes[0][0], np.asarray(to_ras(labels).dataobj)))

    figure = Figure(figsize=(9, 3.2 * len(volumes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(volumes), 3, squeeze=False)
    colours = ListedColormap(np.random.default_rng(0).uniform(0.2, 1.0, (256, 3)))
    for row, (intensities, overlay) in zip(axes, volumes):
        for panel, (plane, axis) in zip(row, PLANES.items()):
            spacing = [mm for i, mm in enumerate(spacing_of(image)) if i != axis]
            show = {"origin": "lower", "aspect": spacing[1] / spacing[0], "interpolation": "nearest"}
            panel.imshow(_middle(intensities, axis), cmap="gray", vmin=window[0], vmax=window[1], **show)
            if overlay is not None:
                cut = _middle(overlay, axis)
                shown = np.ma.masked_where(np.isin(cut, (0, *hidden_labels)), cut)
                panel.imshow(shown, cmap=colours, vmin=0, vmax=255, alpha=0.5, **show)
            panel.set_title(plane, fontsize=9)
            panel.set_axis_off()
    if title is not None:
        figure.suptitle(title, fontsize=10)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)


def _middle(volume: np.ndarray, axis: int) -> np.ndarray:
    """The middle plane, its second axis upwards; axial and coronal as the viewer faces the patient."""
    plane = np.take(volume, volume.shape[axis] // 2, axis).T
    return plane if axis == 0 else plane[:, ::-1]
