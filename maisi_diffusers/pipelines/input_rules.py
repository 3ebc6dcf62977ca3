"""Which sizes and spacings a model was trained for."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np

# Published for CT (MAISI's input check): x = y, and a field of view that holds a body.
CT_RULES = {
    "sizes": [[xy, xy, z] for xy in (256, 384, 512) for z in (128, 256, 384, 512, 640, 768)],
    "min_spacing": [0.5, 0.5, 0.5],
    "max_spacing": [3.0, 3.0, 5.0],
    "equal_xy_spacing": True,
    "min_fov_xy": 256.0,
}
# Published for MR: two axes equal.
MR_RULES = {
    "sizes": [[xy, xy, 128] for xy in (128, 256, 384, 512)] + [[x, y, 256] for x in (128, 256) for y in (128, 256)],
    "min_spacing": [0.4, 0.4, 0.4],
    "max_spacing": [5.0, 5.0, 5.0],
    "equal_xy_spacing": False,
    "min_fov_xy": 0.0,
}


def round_to_multiple(value: float, multiple: int) -> int:
    """The multiple nearest to a value, one at least."""
    return max(round(value / multiple), 1) * multiple


def check_size_and_spacing(size: Sequence[int] | None, spacing: Sequence[float] | None) -> None:
    """Refuse what is not a size in voxels or a spacing in mm along X, Y, Z; raises a `ValueError`."""
    if size is not None and not _is_triple(size, Integral):
        raise ValueError(f"output_size={size} is not allowed: give three positive whole numbers of voxels (X, Y, Z)")
    if spacing is not None and not _is_triple(spacing, Real):
        raise ValueError(f"spacing={spacing} is not allowed: give three positive numbers of mm (X, Y, Z)")


def _is_triple(values: Sequence, kind: type) -> bool:
    return (
        isinstance(values, (Sequence, np.ndarray))
        and len(values) == 3
        and all(isinstance(value, kind) and math.isfinite(value) and value > 0 for value in values)
    )


def check_grid(
    size: tuple[int, int, int], spacing: tuple[float, float, float], multiple: int, rules: dict | None
) -> None:
    """
    Refuse a grid that the model cannot make, or was not trained for.

    Args:
        size: voxels along X, Y, Z.
        spacing: mm along X, Y, Z.
        multiple: what VAE and UNet downsample by: the hard limit on the size.
        rules: the model's own rules (see `CT_RULES`); `None` for a model with the hard limit alone.

    Raises:
        ValueError: names the value, the rule and the remedy.
    """
    if any(s % multiple for s in size):
        nearest = tuple(round_to_multiple(s, multiple) for s in size)
        raise ValueError(
            f"output_size={size} does not divide by {multiple}, the downsampling of VAE and UNet: "
            f"use multiples of it, the nearest is {nearest}"
        )
    if rules is None:
        return
    if list(size) not in rules["sizes"]:
        allowed = ", ".join("x".join(map(str, s)) for s in rules["sizes"])
        raise ValueError(f"output_size={size} is not one that this model was trained for: use one of {allowed}")
    limits = list(zip("XYZ", spacing, rules["min_spacing"], rules["max_spacing"]))
    for axis, value, low, high in limits:
        if not low <= value <= high:
            raise ValueError(
                f"spacing={spacing} is outside what this model was trained for: use {low} to {high} mm along {axis}"
            )
    if rules["equal_xy_spacing"] and spacing[0] != spacing[1]:
        raise ValueError(
            f"spacing={spacing} differs in X and Y, but this model was trained with equal ones: use one value"
        )
    fov = tuple(s * mm for s, mm in zip(size, spacing))
    if min(fov[:2]) < rules["min_fov_xy"]:
        raise ValueError(
            f"the field of view {fov[0]:g} x {fov[1]:g} mm of output_size={size} and spacing={spacing} is smaller "
            f"than the {rules['min_fov_xy']:g} mm this model was trained for: use a larger size or spacing"
        )


def nearest_grid(
    size: tuple[int, int, int], spacing: tuple[float, float, float], multiple: int, rules: dict | None
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """
    The allowed grid for a volume: the same field of view, and voxels as near to its own as the rules let.

    Args:
        size: voxels of the volume along X, Y, Z.
        spacing: its spacing in mm.
        multiple: what VAE and UNet downsample by.
        rules: the model's own rules, or `None`.

    Returns:
        size and spacing. Where the rules want X and Y equal, the larger field of view serves both.
    """
    fov = _needed_fov(size, spacing, rules)
    if rules is None:
        grid = tuple(round_to_multiple(s, multiple) for s in size)
        return grid, tuple(mm / s for mm, s in zip(fov, grid))

    candidates = []
    for grid in rules["sizes"]:
        mm = [
            min(max(extent / s, low), high)
            for extent, s, low, high in zip(fov, grid, rules["min_spacing"], rules["max_spacing"])
        ]
        # Cropping weighs more than any change of the voxel size.
        cropped = sum(max(math.log(extent / (s * m)), 0.0) for extent, s, m in zip(fov, grid, mm))
        changed = sum(abs(math.log(m / own)) for m, own in zip(mm, spacing))
        candidates.append((100 * cropped + changed, tuple(grid), tuple(mm)))
    _, grid, mm = min(candidates)
    return grid, mm


def fit_grid(
    size: tuple[int, int, int],
    spacing: tuple[float, float, float],
    output_size: tuple[int, int, int] | None,
    output_spacing: tuple[float, float, float] | None,
    multiple: int,
    rules: dict | None,
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """
    The grid for a volume, of which the user gave size, spacing, both or neither: what is left keeps the
    field of view, or enlarges it.

    Args:
        size: voxels of the volume along X, Y, Z.
        spacing: its spacing in mm.
        output_size: the size asked for, or `None`.
        output_spacing: the spacing asked for, or `None`.
        multiple: what VAE and UNet downsample by.
        rules: the model's own rules, or `None`.
    """
    if output_size is None and output_spacing is None:
        return nearest_grid(size, spacing, multiple, rules)
    fov = _needed_fov(size, spacing, rules)
    if output_spacing is None:
        output_spacing = [mm / s for mm, s in zip(fov, output_size)]
    elif output_size is None:
        needed = [mm / s for mm, s in zip(fov, output_spacing)]
        output_size = [math.ceil(s / multiple - 1e-6) * multiple for s in needed]
        if rules is not None:
            # Of the sizes that hold it the smallest, or else the largest there is.
            fits = [grid for grid in rules["sizes"] if all(a >= b - 1e-6 for a, b in zip(grid, needed))]
            output_size = min(fits, key=math.prod) if fits else max(rules["sizes"], key=math.prod)
    return tuple(int(s) for s in output_size), tuple(float(mm) for mm in output_spacing)


def _needed_fov(size: tuple[int, int, int], spacing: tuple[float, float, float], rules: dict | None) -> list[float]:
    """Field of view in mm along X, Y, Z that holds a volume; X and Y equal, and large enough, where rules want it."""
    fov = [s * mm for s, mm in zip(size, spacing)]
    if rules is not None and rules["equal_xy_spacing"]:
        fov[0] = fov[1] = max(fov[0], fov[1], rules["min_fov_xy"])
    return fov
