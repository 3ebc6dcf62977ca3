"""Heart and great vessels, airways, esophagus, lungs by lobe, thyroid."""

import numpy as np

from .canvas import Canvas, Solid, profile, union
from .frame import SPINE, Frame, spine_y
from .skeleton import SIDES

AORTA = 12.5  # mm, radius of its arch
# Ascending aorta, arch, then down along the spine to where it divides; (X, Y, Z) in mm.
ASCENDING = [(2, 22, 312), (14, 24, 345), (14, 18, 374), (4, 4, 394), (-10, -14, 396), (-20, -32, 380)]


def draw_heart_and_vessels(canvas: Canvas, frame: Frame) -> None:
    """Everything between the lungs, painted before them."""
    subject = canvas.subject
    shift = subject.shift("heart")
    size = subject.size("heart", 0.07)

    windpipe = [(0, 6, 548), (0, 4, 500), (0, -6, 440), (2, -18, 392), (3, -22, 372)]
    canvas.paint("trachea", canvas.tube(windpipe, 9.0))
    for side in SIDES.values():
        bronchus = [(3, -22, 374), (side * 22, -24, 352), (side * 40, -26, 336)]
        canvas.paint("airway", canvas.tube(bronchus, [8, 7.5, 6]))
    gullet = [(0, spine_y(z) + (21 if z > 300 else 30), z) for z in (530, 480, 420, 360, 310)]
    gullet += [(-8, spine_y(280) + 34, 280), (-24, -6, 250), (-32, -4, 238)]
    canvas.paint("esophagus", canvas.tube(gullet, [8, 7, 7, 7.5, 7.5, 8, 9, 9]))

    # Arteries
    aorta_radius = AORTA * subject.size("aorta", 0.08)
    descending = [(-22, spine_y(z) + 20, z) for z in (350, 300, 250)]
    belly = [(-12, spine_y(z) + 30, z) for z in (210, 170)] + [(-6, spine_y(z) + 31, z) for z in (130, 90, 46)]
    radii = [1.15, 1.2, 1.1, 1.05, 1.0, 1.0, 0.98, 0.95, 0.9, 0.8, 0.74, 0.7, 0.66, 0.64]
    canvas.paint("aorta", canvas.tube(ASCENDING + descending + belly, [r * aorta_radius for r in radii]))
    canvas.paint("brachiocephalic trunk", canvas.tube([(8, 6, 398), (18, 8, 422), (24, 6, 442)], 7))
    canvas.paint(
        "left common carotid artery", canvas.tube([(-6, -4, 402), (-20, 4, 450), (-27, 4, 500), (-30, 0, 580)], 4.6)
    )
    canvas.paint("right common carotid artery", canvas.tube([(24, 6, 442), (26, 4, 500), (30, 0, 580)], 4.6))
    canvas.paint(
        "left subclavian artery",
        canvas.tube([(-16, -18, 402), (-28, -14, 446), (-62, -8, 462), (-110, -18, 450)], 5.2),
    )
    canvas.paint("right subclavian artery", canvas.tube([(26, 4, 444), (60, -8, 462), (110, -18, 450)], 5.2))

    # Veins
    cava = [(20, spine_y(z) + 30, z) for z in (38, 80, 130, 170)] + [(26, -4, 210), (28, 4, 250), (27, 8, 282)]
    canvas.paint("inferior vena cava", canvas.tube(cava, [10, 10, 11, 11.5, 12, 12.5, 12]))
    canvas.paint("superior vena cava", canvas.tube([(30, 12, 318), (30, 14, 360), (28, 16, 400)], 9.5))
    canvas.paint("right brachiocephalic vein", canvas.tube([(28, 16, 398), (34, 18, 420), (42, 14, 440)], 7.5))
    canvas.paint(
        "left brachiocephalic vein", canvas.tube([(27, 18, 400), (4, 28, 408), (-22, 28, 420), (-42, 18, 440)], 7)
    )

    # Heart, tilted to the left and down, on the diaphragm
    low = 268 + subject.breath
    middle = np.array([-22, 24, low + 30]) + shift * (1, 1, 0)
    ventricles = canvas.ellipsoid(middle, np.array([52, 44, 46]) * size, (0, 28, -32), 0.05)
    atria = canvas.ellipsoid((14 + shift[0], 0 + shift[1], low + 42), np.array([40, 34, 36]) * size, roughness=0.05)
    canvas.paint("left atrial appendage", canvas.ellipsoid((-44 + shift[0], 18, low + 74), (13, 16, 10), (0, 30, 0)))
    for side in SIDES.values():
        for height in (8, -14):
            vein = [
                (side * 12, -16, low + 42),
                (side * 34, -22, low + 44 + height),
                (side * 56, -26, low + 46 + 2 * height),
            ]
            canvas.paint("pulmonary vein", canvas.tube(vein, [9, 7.5, 5.5]))
    canvas.paint("heart", union(ventricles, atria, blend=0.25), frame.thorax)

    for side in SIDES.values():
        lobe = canvas.ellipsoid((side * 17, 14, 484), np.array([9, 10, 24]) * subject.size(f"thyroid {side}", 0.12))
        canvas.paint("thyroid gland", lobe)


def draw_lungs(canvas: Canvas, frame: Frame) -> None:
    """What the mediastinum leaves of the chest, cut into lobes by the fissures."""
    x, y, z = canvas.x, canvas.y, canvas.z
    subject = canvas.subject
    # Half width of the mediastinum: wide in front of the spine and at the vessels, narrow behind the sternum.
    heights = np.clip((z - 300) / 100, 0, 1)
    behind_sternum = np.clip((y - 10) / 60, 0, 1)
    half_width = 27 - 15 * behind_sternum + 8 * heights * (1 - behind_sternum)
    mediastinum = np.abs(x - 2) < half_width
    mediastinum |= np.hypot(x, y - profile(z, SPINE)) < 25  # the spine
    mediastinum |= (z > 440) & (np.hypot(np.abs(x) - 52, y + 18) > 38)  # the lungs' tops are round
    lung = frame.thorax & ~mediastinum & canvas.is_body()
    # Their edges do not reach into the lowest corners of the chest.
    lung &= z > 196 + subject.breath * 0.5 + 22 * np.clip(y / 60, 0, 1)

    rng = subject.rng("fissures")
    tilt, height, flat = rng.normal(1.05, 0.08), rng.normal(312, 8), rng.normal(314, 8)
    bend = 5 * canvas.roughness
    oblique = z > height - tilt * y + bend  # the oblique fissure comes down from the back to the front
    right = x > 0
    horizontal = z > flat + bend
    everywhere = tuple(slice(0, n) for n in canvas.size)
    for name, where in {
        "right lung upper lobe": right & oblique & horizontal,
        "right lung middle lobe": right & oblique & ~horizontal,
        "right lung lower lobe": right & ~oblique,
        "left lung upper lobe": ~right & oblique,
        "left lung lower lobe": ~right & ~oblique,
    }.items():
        canvas.paint(name, Solid.of(everywhere, where), lung)
