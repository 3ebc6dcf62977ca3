"""A grid in the standard body's space, and the solids that anatomy is drawn with on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.spatial.transform import Rotation

from ..anatomy import BODY, LABELS
from .subject import Subject
from .tissues import CODES

# Control points of the deformation and of the roughness of surfaces are this far apart, in mm of the standard body.
WARP_SPACING = 90.0
ROUGHNESS_SPACING = 28.0
# No point is moved further than this many standard deviations of the deformation.
WARP_LIMIT = 2.0
# Level of what is not in a solid's reach.
FAR = 9.0


@dataclass
class Solid:
    """
    Part of a canvas and how deep every voxel of it is inside something.

    Args:
        window: slices of the canvas along X, Y, Z.
        level: float32, below 1 inside, 1 on the surface, growing about linearly outwards.
        up: float32, for tubes: how far in front of the axis a voxel is, in radii; where gas collects in a patient on
            the back.
    """

    window: tuple[slice, slice, slice]
    level: np.ndarray
    up: np.ndarray | None = None

    @classmethod
    def of(cls, window: tuple[slice, slice, slice], inside: np.ndarray) -> Self:
        """A solid of some voxels of a window."""
        return cls(window, np.where(inside, np.float32(0), np.float32(FAR)))

    def without(self, where: np.ndarray) -> Self:
        """The solid with some voxels of its window cut off."""
        return Solid(self.window, np.where(where, np.float32(FAR), self.level), self.up)

    @property
    def inside(self) -> np.ndarray:
        """Voxels of the window that are in the solid."""
        return self.level < 1


class Canvas:
    """
    The label map of a phantom while it is drawn, and in `content` what the CT shows in spite of the label.

    Solids are placed in the space of a standard body, in mm: X to the right, Y to the front, Z upwards, 0 at the top
    of the sacrum. Every voxel knows where in that space it is, after the subject's size, posture and a smooth random
    deformation, so that the anatomy is the same on any grid. What is painted first stays: later organs take only what
    is left of the body, so that they touch and never overlap.

    Args:
        subject: whose body it is.
        size: voxels along X, Y, Z.
        spacing: mm along X, Y, Z.
        centre: height of the grid's centre in the standard body, in mm.
    """

    def __init__(
        self, subject: Subject, size: tuple[int, int, int], spacing: tuple[float, float, float], centre: float
    ):
        self.subject = subject
        self.size = size
        self.spacing = spacing
        self.margin = WARP_LIMIT * subject.warp
        # The patient is never laid quite in the middle of the field of view.
        middle = subject.shift("field of view", 7.0) + (0.0, 0.0, centre)
        self.axes = [
            (np.arange(n, dtype=np.float32) - (n - 1) / 2) * mm / scale + c
            for n, mm, scale, c in zip(size, spacing, subject.scale, middle)
        ]
        limit = self.margin
        self.x, self.y, self.z = (
            axis.reshape([-1 if i == j else 1 for j in range(3)])
            + np.clip(subject.warp * self.smooth_field(f"warp {i}", WARP_SPACING), -limit, limit)
            for i, axis in enumerate(self.axes)
        )
        self.roughness = self.smooth_field("roughness", ROUGHNESS_SPACING)
        self.labels = np.zeros(size, dtype=np.uint8)
        self.content = np.zeros(size, dtype=np.uint8)
        self.under_skin = np.ones(size, dtype=bool)

    def smooth_field(self, name: str, spacing: float) -> np.ndarray:
        """Gaussian random field of standard deviation 1 that varies over `spacing` mm, the same on any grid."""
        # Cubic B-splines on control points of the whole body.
        control = self.subject.rng(name).standard_normal(
            [int(np.ceil(extent / spacing)) + 4 for extent in (700.0, 500.0, 1400.0)], dtype=np.float32
        )
        field = control
        for axis, start in zip(self.axes, (-350.0, -250.0, -500.0)):
            position = np.clip((axis - start) / spacing, 0, None) + 1
            cell = np.minimum(np.floor(position).astype(int), field.shape[0] - 3)
            t = (position - cell).astype(np.float32)
            weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
            basis = np.zeros((len(axis), field.shape[0]), dtype=np.float32)
            for offset, weight in zip((-1, 0, 1, 2), weights):
                basis[np.arange(len(axis)), cell + offset] = weight / 6
            field = np.tensordot(field, basis, axes=(0, 1))  # to the back: three times round is in order again
        return field * 3.0  # about what averaging by the splines takes from a standard deviation of 1

    def window(self, low: Sequence[float], high: Sequence[float]) -> tuple[slice, slice, slice]:
        """Slices that hold all voxels between two corners of the standard space, deformed or not."""
        slices = []
        for axis, a, b in zip(self.axes, low, high):
            first, last = np.searchsorted(axis, (a - self.margin, b + self.margin))
            slices.append(slice(int(first), int(last)))
        return tuple(slices)

    def ellipsoid(
        self,
        centre: Sequence[float],
        half_axes: Sequence[float],
        tilt: Sequence[float] = (0.0, 0.0, 0.0),
        roughness: float = 0.0,
        power: float = 2.0,
    ) -> Solid:
        """
        An ellipsoid, or with a higher `power` one that is nearer to a box.

        Args:
            centre: X, Y, Z in mm.
            half_axes: half its length along its own axes, in mm.
            tilt: degrees it is turned about X, Y and Z.
            roughness: how much its surface is dented, as a share of its radius.
            power: of the norm.
        """
        rotation = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix()
        reach = np.abs(rotation) @ half_axes * (1 + 2.5 * roughness)
        window = self.window(np.subtract(centre, reach), np.add(centre, reach))
        offset = [coordinate[window] - c for coordinate, c in zip((self.x, self.y, self.z), centre)]
        total = 0.0
        for axis, half in zip(rotation.T, half_axes):
            along = sum(np.float32(a / half) * o for a, o in zip(axis, offset) if abs(a) > 1e-9)
            total = total + (np.square(along) if power == 2 else np.abs(along) ** np.float32(power))
        level = np.sqrt(total) if power == 2 else total ** np.float32(1 / power)
        if roughness:
            level = level + np.float32(roughness) * self.roughness[window]
        return Solid(window, level)

    def tube(self, points: Sequence[Sequence[float]], radii: float | Sequence[float], flat: float = 1.0) -> Solid:
        """
        A tube along a polyline.

        Args:
            points: (X, Y, Z) in mm.
            radii: in mm, one or one a point.
            flat: how much thinner it is from front to back than across.
        """
        points = np.asarray(points, dtype=np.float32)
        radii = np.broadcast_to(np.asarray(radii, dtype=np.float32), len(points))
        window = self.window(points.min(0) - radii.max(), points.max(0) + radii.max())
        shape = [s.stop - s.start for s in window]
        whole = Solid(window, np.full(shape, np.inf, dtype=np.float32), np.zeros(shape, dtype=np.float32))
        for start, end, r0, r1 in zip(points[:-1], points[1:], radii[:-1], radii[1:]):
            r = max(r0, r1)
            part = self.window(np.minimum(start, end) - r, np.maximum(start, end) + r)
            if any(s.stop <= s.start for s in part):
                continue
            along = end - start
            x, y, z = (c[part] - o for c, o in zip((self.x, self.y, self.z), start))
            t = np.clip((x * along[0] + y * along[1] + z * along[2]) / max(float(along @ along), 1e-6), 0, 1)
            x, y, z = x - t * along[0], (y - t * along[1]) * np.float32(1 / flat), z - t * along[2]
            radius = r0 + t * (r1 - r0)
            level = np.sqrt(x * x + y * y + z * z) / radius
            local = tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(part, window))
            nearer = level < whole.level[local]
            whole.level[local][nearer] = level[nearer]
            whole.up[local][nearer] = (y / radius)[nearer]
        return whole

    def fan(self, edge: Sequence[Sequence[float]], other: Sequence[Sequence[float]], radius: float) -> Solid:
        """
        A bent plate between two polylines.

        Args:
            edge, other: (X, Y, Z) in mm.
            radius: half its thickness in mm.
        """
        ribs = round(np.linalg.norm(np.diff(edge, axis=0), axis=1).sum() / (1.5 * radius))
        ends = []
        for line in (edge, other):
            t = np.linspace(0, len(line) - 1, ribs)
            ends.append(
                np.stack([np.interp(t, np.arange(len(line)), values) for values in np.transpose(line)], axis=1)
            )
        return union(*(self.tube(pair, radius) for pair in zip(*ends)), blend=0.5)

    def paint(
        self, name: str, solid: Solid, within: np.ndarray | None = None, over: Sequence[int] = (BODY,)
    ) -> np.ndarray:
        """
        Give the free voxels of a solid a label.

        Args:
            name: of the label, in MAISI's vocabulary.
            solid: what is painted.
            within: voxels of the whole canvas that may be painted; all if not given.
            over: labels whose voxels are free.

        Returns:
            which voxels of the solid's window were painted.
        """
        free = solid.inside & np.isin(self.labels[solid.window], over) & self.under_skin[solid.window]
        if within is not None:
            free &= within[solid.window]
        self.labels[solid.window][free] = LABELS[name]
        return free

    def fill(self, tissue: str, window: tuple[slice, slice, slice], where: np.ndarray) -> None:
        """Have the CT show a tissue, by its name in [`TISSUES`], in some voxels of a window, whatever their label."""
        self.content[window][where] = CODES[tissue]

    def is_body(self) -> np.ndarray:
        """Voxels of the body that nothing has been painted on."""
        return self.labels == BODY


def union(*solids: Solid, blend: float = 0.0) -> Solid:
    """One solid of several; where they meet, `blend` (in levels) rounds the notch between them."""
    window = tuple(
        slice(min(s.window[i].start for s in solids), max(s.window[i].stop for s in solids)) for i in range(3)
    )
    level = np.full([s.stop - s.start for s in window], FAR, dtype=np.float32)
    for solid in solids:
        part = _within(window, solid.window)
        here, other = level[part], np.minimum(solid.level, FAR)
        level[part] = np.minimum(here, other)
        if blend:
            gap = np.maximum(blend - np.abs(here - other), 0)
            level[part] -= gap * gap / (4 * blend)
    return Solid(window, level)


def difference(solid: Solid, *cavities: Solid) -> Solid:
    """A solid without the inside of others."""
    level = solid.level.copy()
    for cavity in cavities:
        overlap = tuple(
            slice(max(a.start, b.start), max(min(a.stop, b.stop), a.start, b.start))
            for a, b in zip(solid.window, cavity.window)
        )
        level[_within(solid.window, overlap)][cavity.inside[_within(cavity.window, overlap)]] = FAR
    return Solid(solid.window, level)


def _within(window: tuple[slice, ...], part: tuple[slice, ...]) -> tuple[slice, ...]:
    """Slices of a part of the canvas in a window's own array."""
    return tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, window))


def profile(z: np.ndarray, table: Sequence[tuple[float, float]]) -> np.ndarray:
    """A quantity that depends on height, looked up in (height, value) pairs in mm."""
    heights, values = np.asarray(table, dtype=np.float64).T
    low, high = heights[0], heights[-1]
    lookup = np.interp(np.arange(low, high + 1), heights, values).astype(np.float32)
    index = np.clip(z - np.float32(low), 0, len(lookup) - 1).astype(np.intp)
    return lookup[index]
