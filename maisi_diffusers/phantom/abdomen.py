"""Organs of belly and pelvis, and their vessels."""

import numpy as np
from scipy.interpolate import PchipInterpolator

from .canvas import Canvas, Solid, difference, union
from .frame import Frame
from .skeleton import SIDES

COLON_RADIUS = 21.0
# From the cecum up, across and down to the rectum; (X, Y, Z) in mm.
COLON = [
    *((92, 22, -28), (98, 10, 10), (100, -2, 60), (96, 0, 105), (84, 22, 128), (54, 52, 112), (20, 60, 92)),
    *((-16, 60, 96), (-52, 52, 122), (-88, 16, 168), (-100, -14, 172), (-106, -22, 130), (-108, -18, 70)),
    *((-104, 0, 10), (-88, 18, -30), (-56, 16, -52), (-30, -4, -40), (-6, -28, -50), (0, -46, -80), (0, -44, -122)),
]


def draw_abdomen(canvas: Canvas, frame: Frame) -> None:
    """Paint the organs of the abdomen and the pelvis; those that others make room for first."""
    cavity = frame.abdomen
    draw_vessels(canvas)
    draw_kidneys(canvas)
    draw_pelvic_organs(canvas, cavity)
    draw_upper_abdomen(canvas, cavity)
    draw_bowel(canvas, cavity)


def draw_vessels(canvas: Canvas) -> None:
    """Iliac vessels, portal and splenic vein."""
    for word, side in SIDES.items():
        artery = [
            *((side * 5 - 4, 2, 48), (side * 30, -6, 0), (side * 50, -4, -40)),
            *((side * 60, 36, -82), (side * 70, 58, -112)),
        ]
        canvas.paint(f"{word} iliac artery", canvas.tube(artery, [7, 6, 5.5, 5, 5]))
        vein = [
            *((side * 6 + 14, -2, 42), (side * 30 + 6, -16, 0), (side * 44, -18, -40)),
            *((side * 50, 32, -82), (side * 58, 58, -112)),
        ]
        canvas.paint(f"{word} iliac vena", canvas.tube(vein, [8.5, 7.5, 7, 6.5, 6.5]))
    portal = [(38, 22, 202), (24, 18, 178), (8, 16, 162), (-24, 4, 172), (-62, -20, 188), (-84, -28, 196)]
    canvas.paint("portal vein and splenic vein", canvas.tube(portal, [8, 7.5, 7, 5.5, 5, 4.5]))


def draw_kidneys(canvas: Canvas) -> None:
    """Kidneys around the fat of their sinus, adrenal glands above."""
    subject = canvas.subject
    for word, side, height in (("right", 1, 118), ("left", -1, 130)):
        name = f"{word} kidney"
        centre = np.array([side * 60, -44, height]) + subject.shift(name, 5)
        size = subject.size(name, 0.07)
        tilt = (8, side * 12, side * -28) + subject.tilt(name, 4)
        kidney = canvas.ellipsoid(centre, np.array([27, 23, 54]) * size, tilt, 0.04)
        sinus = canvas.ellipsoid(centre - (side * 17, -5, 0), np.array([18, 9, 25]) * size, tilt)
        canvas.paint(name, difference(kidney, sinus))
        top = centre + (-side * 14, 2, 50 * size)
        gland = union(
            canvas.tube([top, top + (side * 10, -14, -14)], [4, 3]),
            canvas.tube([top, top + (-side * 4, -16, -12)], [4, 3]),
        )
        canvas.paint(f"{word} adrenal gland", gland)


def draw_pelvic_organs(canvas: Canvas, cavity: np.ndarray) -> None:
    """Bladder and prostate; a uterus has no label and is left to the body."""
    subject = canvas.subject
    fill = 1.15 * subject.size("bladder", 0.2)
    bladder = canvas.ellipsoid((0, 24, -104 + 26 * fill), np.array([36, 28, 27]) * fill, roughness=0.05)
    canvas.paint("bladder", bladder, cavity)
    if subject.sex == "male":
        canvas.paint(
            "prostate", canvas.ellipsoid((0, 8, -126), np.array([22, 17, 18]) * subject.size("prostate", 0.12))
        )


def draw_upper_abdomen(canvas: Canvas, cavity: np.ndarray) -> None:
    """Gallbladder, pancreas, duodenum, spleen, stomach, liver."""
    subject = canvas.subject
    under = subject.breath * 0.8  # what hangs from the diaphragm moves with it
    if subject.rng("gallbladder").random() > 0.1 or "gallbladder" in subject.sizes:
        place = np.array([52, 52, 142 + under]) + subject.shift("gallbladder", 4)
        size = subject.size("gallbladder", 0.2)
        canvas.paint("gallbladder", canvas.ellipsoid(place, np.array([14, 15, 28]) * size, (-28, 12, 0)), cavity)

    size, shift = subject.size("pancreas", 0.13), subject.shift("pancreas", 3)
    gland = (
        np.array([(36, 14, 124), (32, 18, 142), (12, 26, 156), (-14, 22, 166), (-44, 2, 176), (-76, -20, 188)]) + shift
    )
    canvas.paint("pancreas", canvas.tube(gland, np.array([12, 15, 10, 10.5, 10.5, 8.5]) * size), cavity)
    gut = [(26, 40, 150), (46, 26, 148), (56, 8, 136), (56, 2, 104), (40, 2, 86), (8, 16, 82), (-22, 12, 98)]
    canvas.paint("duodenum", canvas.tube(np.array(gut) + shift, [12, 13, 12.5, 12, 12, 11, 11]), cavity)

    size = subject.size("spleen", 0.13)
    place = np.array([-100, -34, 204 + under]) + subject.shift("spleen", 3)
    canvas.paint("spleen", canvas.ellipsoid(place, np.array([27, 44, 56]) * size, (24, -12, 18), 0.05), cavity)

    fill = subject.size("stomach", 0.18)
    stomach = [(-50, -10, 232), (-62, 10, 208), (-58, 34, 178), (-34, 50, 152), (-2, 52, 142), (24, 42, 150)]
    stomach = np.array(stomach) + (0, 0, under) * np.linspace(1, 0.3, 6)[:, None]
    bag = canvas.tube(stomach, np.array([32, 33, 28, 22, 17, 11]) * fill)
    painted = canvas.paint("stomach", bag, cavity)
    level = subject.rng("gas in the stomach").uniform(0.2, 0.9)
    fill_gut(canvas, bag, painted, "bowel content", gas_above=level)

    size = subject.size("liver", 0.11)
    right = canvas.ellipsoid((76, -4, 196 + under), np.array([80, 94, 84]) * size, (0, 14, 0), 0.05, power=2.4)
    left = canvas.ellipsoid((2, 46, 212 + under), np.array([74, 44, 36]) * size, (0, -14, 12), 0.06)
    tip = canvas.ellipsoid((100, -2, 136 + under), np.array([34, 58, 48]) * size)
    # Its lower side slopes up to the left, over kidney, bowel and stomach.
    liver = union(right, left, tip, blend=0.25)
    x, y, z = (c[liver.window] for c in (canvas.x, canvas.y, canvas.z))
    below = z < 178 + under - (size - 1) * 130 - 0.62 * np.clip(x - 10, -60, 95) - 0.12 * (y - 20)
    canvas.paint("liver", liver.without(below), cavity)


def draw_bowel(canvas: Canvas, cavity: np.ndarray) -> None:
    """Colon as a frame, the small bowel's loops within."""
    subject = canvas.subject
    rng = subject.rng("colon")
    points = np.array(COLON) + np.clip(rng.normal(0, 5, (len(COLON), 3)), -9, 9)
    points = _smooth(points, 4)
    # Haustra: the radius swells and narrows along the way; the left half is narrower.
    along = np.linspace(0, 1, len(points))
    radii = COLON_RADIUS * subject.size("colon", 0.12) * (1.15 - 0.38 * np.clip(along * 1.6 - 0.4, 0, 1))
    radii = radii * (1 + 0.13 * np.sin(np.arange(len(points)) * 2.2) + rng.normal(0, 0.06, len(points)))
    colon = canvas.tube(points, radii)
    painted = canvas.paint("colon", colon, cavity)
    # Stool here, gas there, in stretches of a few cm.
    level = 0.35 + 0.75 * canvas.smooth_field("gas in the colon", 70.0)[colon.window]
    fill_gut(canvas, colon, painted, "stool", gas_above=level)

    # Loops: a curve of random waves through the middle of the belly, close enough to itself that loops touch.
    rng = subject.rng("small bowel")
    t = np.linspace(0, 1, 150)
    curve = np.stack(
        [
            62 * np.sin(2 * np.pi * (6.5 * t + rng.random())) + 8 * np.sin(2 * np.pi * (17 * t + rng.random())),
            24 + 26 * np.sin(2 * np.pi * (10.3 * t + rng.random())),
            86 - 165 * t + 16 * np.sin(2 * np.pi * (13.7 * t + rng.random())),
        ],
        axis=1,
    )
    radius = 13.5 / subject.visceral_fat**0.25
    loops = canvas.tube(curve, radius * np.exp(rng.normal(0, 0.08, len(t))))
    painted = canvas.paint("small bowel", loops, cavity)
    level = 1.4 + 0.6 * canvas.smooth_field("gas in the small bowel", 60.0)[loops.window]
    fill_gut(canvas, loops, painted, "bowel content", gas_above=level)


def fill_gut(
    canvas: Canvas, tube: Solid, painted: np.ndarray, content: str, gas_above: float | np.ndarray, wall: float = 0.8
) -> None:
    """
    What is within the wall of a hollow organ: gas in front, in a patient on the back, something else behind.

    Args:
        canvas: has the organ.
        tube: the organ.
        painted: voxels of its window that it got.
        content: tissue of what is not gas.
        gas_above: how far in front of the axis the gas begins, in radii.
        wall: level at which the wall begins.
    """
    inside = painted & (tube.level < wall)
    canvas.fill(content, tube.window, inside)
    canvas.fill("gas", tube.window, inside & (tube.up > gas_above))


def _smooth(points: np.ndarray, factor: int) -> np.ndarray:
    """More points on a smooth curve through these."""
    t = np.arange(len(points))
    return PchipInterpolator(t, points)(np.linspace(0, len(points) - 1, (len(points) - 1) * factor + 1))
