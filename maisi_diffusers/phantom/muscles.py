"""The muscles that have labels of their own: along the spine, in the loins, in the buttocks."""

import numpy as np

from .canvas import Canvas, union
from .frame import Frame, spine_y
from .skeleton import SIDES, iliac_base, iliac_crest


def draw_muscles(canvas: Canvas, frame: Frame) -> None:
    """Paint muscles on what bones, vessels and organs have left of the body."""
    muscle = frame.depth > 0
    muscle &= ~frame.thorax
    for word, side in SIDES.items():
        depths = {-60: 50, 0: 50, 60: 50, 120: 50, 200: 50, 300: 48, 380: 42, 450: 32}
        back = [(side * 34, spine_y(z) - depth, z) for z, depth in depths.items()]
        canvas.paint(
            f"{word} autochthon",
            canvas.tube(back, [16, 30, 32, 31, 29, 26, 22, 14], flat=0.72),
            muscle & ~frame.abdomen,
        )
        psoas = [
            *((side * 34, spine_y(150) + 6, 158), (side * 40, -22, 90), (side * 48, -16, 20), (side * 64, 12, -36)),
            *((side * 84, 42, -80), (side * 98, 36, -112), (side * 108, 8, -140)),
        ]
        # The iliacus lines the inside of the hip bone's wing.
        inwards = np.array([-side * 15, 12, 2])
        iliacus = canvas.fan(iliac_crest(side) + inwards, iliac_base(side) + inwards, 10.0)
        canvas.paint(f"{word} iliopsoas", union(canvas.tube(psoas, [9, 18, 23, 22, 18, 16, 12]), iliacus), muscle)
        # In the buttock the small one lies deepest and is painted first, the large one last.
        small = canvas.ellipsoid((side * 118, -2, -16), (16, 40, 46), (10, side * 18, side * 24))
        canvas.paint(f"{word} gluteus minimus", small, muscle & ~frame.abdomen)
        medius = canvas.ellipsoid((side * 122, -12, 4), (36, 56, 62), (10, side * 14, side * 26))
        canvas.paint(f"{word} gluteus medius", medius, muscle & ~frame.abdomen)
        large = canvas.ellipsoid((side * 74, -84, -66), (66, 44, 82), (-6, side * 12, side * 22))
        canvas.paint(f"{word} gluteus maximus", large, muscle & ~frame.abdomen)
