"""A picture of a volume: three planes as radiologists look at them, and again with the labels laid over and named."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from ..files import write_atomically
from .resample import spacing_of, to_ras

WINDOWS: dict[str, tuple[float, float]] = {
    "soft": (-160.0, 240.0),
    "lung": (-1350.0, 150.0),
    "bone": (-500.0, 1300.0),
    "wide": (-400.0, 600.0),  # of soft tissue, but with lung and bone apart
}
"""Name -> the HU that are black and white."""
WINDOW = WINDOWS["wide"]


@dataclass(frozen=True)
class Plane:
    """How a plane of a RAS+ volume is shown: the patient's right, or the front, on the left of the picture."""

    name: str
    axis: int
    left: str
    right: str
    top: str
    bottom: str


PLANES = (
    Plane("axial", 2, "R", "L", "A", "P"),
    Plane("coronal", 1, "R", "L", "S", "I"),
    Plane("sagittal", 0, "A", "P", "S", "I"),
)

# In inches.
PLANES_WIDTH, MAX_PANEL_HEIGHT, MIN_WIDTH = 10.5, 5.0, 6.0
GAP, HEADER = 0.12, 0.52
LEGEND_WIDTH, LEGEND_LINE, LEGEND_PATCH = 1.95, 0.18, 0.26
DPI = 110
TEXT, FAINT, TICK = "#e8e8e8", "#a8a8a8", "#ffd54a"
FILL, OUTLINE = 0.38, 0.9  # opacity of a label inside and at its border


def save_preview(
    path: str | os.PathLike,
    image: nib.Nifti1Image,
    labels: nib.Nifti1Image | None = None,
    hidden_labels: Collection[int] = (),
    window: tuple[float, float] = WINDOW,
    title: str | None = None,
    names: Mapping[int, str] | None = None,
    colours: np.ndarray | None = None,
    focus: Collection[int] = (),
) -> None:
    """
    Write a PNG with an axial, a coronal and a sagittal plane of an image, and again with its labels.

    The planes have one scale, with a bar of it, and cross where the labels have their centre of mass: that of `focus`
    where the map has it, else of all that is not hidden; without labels, in the middle. The same input gives the same
    bytes.

    Args:
        path: of the PNG; written under a temporary name and renamed.
        image: (X, Y, Z), HU or any intensity.
        labels: label map on the same grid.
        hidden_labels: labels without a colour, such as the body; 0 has none anyway.
        window: intensities that are black and white.
        title: a line above the planes.
        names: label -> name in the legend, which lists those that the planes show in this order, equal names once. No
            legend without.
        colours: (256, 3) in 0..1, the colour of each label.
        focus: labels that the planes are to show, such as tumors.
    """
    image = to_ras(image)
    spacing = spacing_of(image)
    intensities = np.asarray(image.dataobj)
    overlay = None if labels is None else np.asarray(to_ras(labels).dataobj)
    colours = np.random.default_rng(0).uniform(0.2, 1.0, (256, 3)) if colours is None else colours
    centre = centre_of_labels(overlay, {0, *hidden_labels}, focus, intensities.shape)
    cuts = [] if overlay is None else [cut(overlay, plane, centre) for plane in PLANES]
    shown = set().union(*(np.unique(each).tolist() for each in cuts)) - {0, *hidden_labels}
    entries = legend_entries(shown, names or {}, colours)

    extents = [[n * mm for i, (n, mm) in enumerate(zip(image.shape, spacing)) if i != plane.axis] for plane in PLANES]
    widths, heights = zip(*extents)
    scale = min((PLANES_WIDTH - 4 * GAP) / sum(widths), MAX_PANEL_HEIGHT / max(heights))  # inches a mm
    planes_width = max(scale * sum(widths) + 4 * GAP, MIN_WIDTH)
    row_height = scale * max(heights) + GAP
    rows = 1 if overlay is None else 2
    figure_height = HEADER + rows * row_height
    columns = -(-len(entries) // max(int((rows * row_height - GAP) / LEGEND_LINE), 1))
    legend_width = LEGEND_WIDTH * columns
    figure = Figure(figsize=(planes_width + legend_width, figure_height), facecolor="black", dpi=DPI)
    FigureCanvasAgg(figure)

    for row in range(rows):
        left = GAP
        for i, plane in enumerate(PLANES):
            width, height = scale * widths[i], scale * heights[i]
            bottom = figure_height - HEADER - row * row_height - (row_height - GAP + height) / 2
            panel = add_panel(figure, left, bottom, width, height)
            place = {"extent": (0, widths[i], 0, heights[i]), "origin": "lower", "aspect": "auto"}
            grey = cut(intensities, plane, centre)
            panel.imshow(grey, cmap="gray", vmin=window[0], vmax=window[1], interpolation="bilinear", **place)
            if row == 1:
                coloured = paint(cuts[i], colours, shown)
                panel.imshow(coloured, interpolation="nearest", **place)
            annotate(panel, plane, f"{plane.name} {centre[plane.axis] + 1}/{image.shape[plane.axis]}")
            mark_other_planes(panel, plane, centre, image.shape)
            if row == 0 and plane.name == "axial":
                add_scale_bar(panel, widths[i])
            left += width + GAP

    add_header(figure, title, image.shape, spacing, window)
    add_legend(figure, entries, planes_width, columns)
    with write_atomically(path) as temporary:
        # matplotlib would name its version.
        figure.savefig(temporary, format="png", facecolor="black", metadata={"Software": None})


def centre_of_labels(
    labels: np.ndarray | None, hidden: Collection[int], focus: Collection[int], shape: Sequence[int]
) -> tuple[int, int, int]:
    """The voxel that the planes go through."""
    if labels is not None:
        for wanted in (set(focus), set(range(256)) - set(hidden)):
            table = np.zeros(256, dtype=bool)
            table[list(wanted)] = True
            # A plane at a time: indexing with the whole volume would make an 8-byte copy of it.
            counts = [np.zeros(n) for n in shape]
            for x, plane in enumerate(labels):
                inside = table[plane]
                counts[0][x] = np.count_nonzero(inside)
                counts[1] += inside.sum(axis=1)
                counts[2] += inside.sum(axis=0)
            if counts[0].any():
                return tuple(round(np.average(np.arange(n), weights=count)) for n, count in zip(shape, counts))
    return tuple(n // 2 for n in shape)


def cut(volume: np.ndarray, plane: Plane, centre: tuple[int, int, int]) -> np.ndarray:
    """A plane of a RAS+ volume (X, Y, Z) as (rows from below, columns from the left) of the picture."""
    return np.take(volume, centre[plane.axis], plane.axis).T[:, ::-1]


def paint(labels: np.ndarray, colours: np.ndarray, shown: Collection[int]) -> np.ndarray:
    """RGBA of a plane of labels: see-through inside, nearly solid at their borders."""
    border = np.zeros(labels.shape, dtype=bool)
    differs = labels[1:] != labels[:-1]
    border[1:] |= differs
    border[:-1] |= differs
    differs = labels[:, 1:] != labels[:, :-1]
    border[:, 1:] |= differs
    border[:, :-1] |= differs
    alpha = np.where(border, OUTLINE, FILL) * np.isin(labels, list(shown))
    return np.dstack([colours[labels], alpha])


def legend_entries(
    shown: Collection[int], names: Mapping[int, str], colours: np.ndarray
) -> dict[str, list[tuple[float, ...]]]:
    """Name -> the colours of its labels that are shown, in the order of the names."""
    entries: dict[str, list[tuple[float, ...]]] = {}
    for label, name in names.items():
        colour = tuple(colours[label])
        if label in shown and colour not in entries.setdefault(name, []):
            entries[name].append(colour)
    return {name: of_name for name, of_name in entries.items() if of_name}


def add_panel(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches."""
    total_width, total_height = figure.get_size_inches()
    panel = figure.add_axes(
        (left / total_width, bottom / total_height, width / total_width, height / total_height), facecolor="black"
    )
    panel.set_axis_off()
    return panel


def annotate(panel: Axes, plane: Plane, text: str) -> None:
    """The plane's name and number in a corner, and which side is which."""
    style = {"transform": panel.transAxes, "path_effects": [withStroke(linewidth=2, foreground="black")]}
    panel.text(0.015, 0.985, text, ha="left", va="top", color=TEXT, fontsize=8, **style)
    sides = {(0.015, 0.5): plane.left, (0.985, 0.5): plane.right, (0.5, 0.985): plane.top, (0.5, 0.015): plane.bottom}
    for (x, y), side in sides.items():
        horizontal = {0.015: "left", 0.985: "right"}.get(x, "center")
        vertical = {0.015: "bottom", 0.985: "top"}.get(y, "center")
        panel.text(x, y, side, ha=horizontal, va=vertical, color=TEXT, fontsize=9, weight="bold", **style)


def mark_other_planes(panel: Axes, plane: Plane, centre: tuple[int, int, int], shape: Sequence[int]) -> None:
    """Ticks at the edges where the other two planes cut this one."""
    across, up = (axis for axis in range(3) if axis != plane.axis)
    x, y = 1 - (centre[across] + 0.5) / shape[across], (centre[up] + 0.5) / shape[up]
    for low, high in ((0.0, 0.03), (0.97, 1.0)):
        style = {"transform": panel.transAxes, "color": TICK, "linewidth": 0.8, "solid_capstyle": "butt"}
        panel.plot((x, x), (low, high), **style)
        panel.plot((low, high), (y, y), **style)


def add_scale_bar(panel: Axes, width: float) -> None:
    """A bar of the largest of 1, 2, 5, 10, ... mm that a quarter of the panel holds."""
    length = max(step * 10.0**power for step in (1, 2, 5) for power in range(-1, 4) if step * 10.0**power <= width / 4)
    panel.add_patch(
        Rectangle((0.97 - length / width, 0.03), length / width, 0.008, transform=panel.transAxes, color=TEXT)
    )
    panel.text(
        0.97, 0.045, f"{length:g} mm", transform=panel.transAxes, color=TEXT, fontsize=7, ha="right", va="bottom"
    )


def add_header(
    figure: Figure,
    title: str | None,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    window: tuple[float, float],
) -> None:
    """The title, and below it size, spacing and window."""
    top = figure.get_size_inches()[1]
    left = GAP / figure.get_size_inches()[0]
    size, mm = (" × ".join(f"{value:.4g}" for value in values) for values in (shape, spacing))
    fov = " × ".join(f"{n * step:.0f}" for n, step in zip(shape, spacing))
    facts = f"{size} voxels of {mm} mm, {fov} mm     window {window[0]:g} to {window[1]:g}"
    if title is not None:
        figure.text(left, 1 - 0.08 / top, title, color=TEXT, fontsize=11, weight="bold", va="top")
    figure.text(left, 1 - 0.3 / top, facts, color=FAINT, fontsize=8, va="top")


def add_legend(figure: Figure, entries: Mapping[str, list[tuple[float, ...]]], left: float, columns: int) -> None:
    """Colours and names, in equal columns on the right."""
    total_width, total_height = figure.get_size_inches()
    lines = -(-len(entries) // max(columns, 1))
    for i, (name, of_name) in enumerate(entries.items()):
        x = left + (i // lines) * LEGEND_WIDTH
        y = total_height - HEADER - (i % lines + 0.5) * LEGEND_LINE
        width = LEGEND_PATCH / len(of_name)
        for j, colour in enumerate(of_name):
            corner = ((x + j * width) / total_width, (y - 0.055) / total_height)
            size = (width / total_width, 0.11 / total_height)
            figure.add_artist(Rectangle(corner, *size, transform=figure.transFigure, facecolor=colour))
        x += LEGEND_PATCH + 0.08
        figure.text(x / total_width, y / total_height, name, color=TEXT, fontsize=8, va="center_baseline")
