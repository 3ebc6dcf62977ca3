"""The frame that organs are placed in: outline of the body, course of the spine, rib cage, diaphragm, cavities.

Heights are in mm above the top of the sacrum, the other lengths in mm from the middle of the body, of a man of 175 cm.
They are round figures of an anatomy atlas, checked on real CTs by eye.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ..anatomy import BODY
from .canvas import Canvas, profile, union

# Height -> Y of the middle of the vertebral bodies: lordosis of loins and neck, kyphosis of chest and sacrum.
SPINE = [
    *((-160, -62), (-110, -70), (-60, -64), (-20, -44), (20, -31), (60, -25), (100, -26), (160, -36), (230, -50)),
    *((300, -58), (380, -55), (450, -42), (500, -30), (560, -20), (600, -18), (640, -18)),
]
# Height -> half width, half depth and middle in Y of the trunk without skin and the fat under it.
TRUNK_WIDTH = [
    *((-460, 72), (-190, 158), (-130, 166), (-60, 160), (0, 150), (60, 138), (120, 138), (200, 146), (300, 152)),
    *((370, 152), (420, 148), (452, 120), (472, 78), (490, 58), (540, 56), (600, 60)),
]
TRUNK_DEPTH = [
    *((-460, 80), (-190, 96), (-130, 100), (-60, 96), (0, 90), (60, 88), (120, 92), (200, 100), (300, 102)),
    *((370, 97), (420, 89), (452, 77), (480, 60), (540, 58), (600, 60)),
]
TRUNK_MIDDLE = [
    *((-460, -5), (-130, -18), (-60, -22), (0, -16), (60, -12), (120, -10), (200, -8), (300, -10), (370, -18)),
    *((420, -26), (480, -14), (540, -8), (600, -2)),
]
# Height -> half width, half depth and middle in Y of the outer side of the rib cage.
CAGE_WIDTH = [(120, 122), (200, 134), (250, 139), (300, 138), (350, 126), (400, 104), (440, 78), (470, 54), (490, 30)]
CAGE_DEPTH = [(120, 84), (200, 90), (280, 90), (340, 82), (400, 66), (440, 54), (470, 44), (490, 26)]
CAGE_MIDDLE = [(120, 4), (200, 2), (280, -2), (340, -6), (400, -14), (440, -16), (490, -18)]
# Fat under the skin relative to the flank's, by height.
FAT = [(-400, 0.6), (-130, 1.15), (-50, 1.3), (60, 1.2), (150, 0.85), (300, 0.55), (420, 0.5), (470, 0.3), (700, 0.12)]
SKIN = 2.0
RIB_THICKNESS = 8.0


@dataclass
class Frame:
    """
    Compartments of a canvas: boolean arrays of its size.

    Args:
        depth: mm below the surface of muscle and bone; negative in the fat under the skin. float32.
        skin: the outermost layer.
        fat: the layer under it.
        thorax: inside of the rib cage, above the diaphragm.
        abdomen: below the diaphragm, inside of the muscles, down to the pelvic floor.
        wall: muscle around the cavities and in limbs and neck.
    """

    depth: np.ndarray
    skin: np.ndarray
    fat: np.ndarray
    thorax: np.ndarray
    abdomen: np.ndarray
    wall: np.ndarray


def spine_y(z: float | np.ndarray) -> float | np.ndarray:
    """Y of the middle of the vertebral bodies at a height, in mm."""
    heights, values = zip(*SPINE)
    return np.interp(z, heights, values)


def cage_radius(z: float | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Half width, half depth and middle in Y of the outer side of the rib cage at a height, in mm."""
    return tuple(np.interp(z, *zip(*table)) for table in (CAGE_WIDTH, CAGE_DEPTH, CAGE_MIDDLE))


def arm_axis(side: int, arms: str) -> list[tuple[float, float, float]]:
    """Points from the shoulder along the humerus; `side` is 1 for the right arm, -1 for the left."""
    if arms == "up":
        return [(side * 148, -22, 430), (side * 168, -8, 500), (side * 176, 5, 720)]
    return [(side * 152, -26, 430), (side * 190, -28, 340), (side * 205, -20, 120), (side * 200, 0, -140)]


def make_frame(canvas: Canvas) -> Frame:
    """Lay out the body, paint it with the label body, and return its compartments."""
    subject = canvas.subject
    x, y, z = canvas.x, canvas.y, canvas.z
    hip = 1.05 if subject.sex == "female" else 1.0

    # 1. Trunk: a superellipse at every height, about a distance to its surface from the radius along the same ray
    width, depth, middle = (profile(z, table) for table in (TRUNK_WIDTH, TRUNK_DEPTH, TRUNK_MIDDLE))
    if hip != 1:
        width = width * np.where(z < 60, np.float32(hip), 1)
    distance = _ray_distance(x, y - middle, width, depth, 2.4)
    legs = z < -165
    if legs.any():
        leg = np.minimum(
            *(np.hypot(x - side * 88, y + 8) - np.float32(84) - (z + 165) * np.float32(0.06) for side in (1, -1))
        )
        distance = np.where(legs, np.maximum(distance, leg), distance)
    outside_head = distance
    if z.max() > 480:
        head = union(
            canvas.ellipsoid((0, 8, 662), (76, 96, 82)),
            canvas.ellipsoid((0, 48, 604), (54, 56, 66), power=2.5),
            blend=0.3,
        )
        head_distance = np.full(canvas.size, 50, dtype=np.float32)
        head_distance[head.window] = (head.level - 1) * 75
        neck = np.where(z > 620, np.float32(50), distance)  # the trunk's profile ends in the head
        outside_head = np.minimum(neck, head_distance)

    # 2. Arms, which end outside of most fields of view
    arms = union(
        *(
            canvas.tube(arm_axis(side, subject.arms), [46, 38, 34, 32][: len(arm_axis(side, subject.arms))])
            for side in (1, -1)
        )
    )
    muscle_distance = outside_head
    if arms.level.size:
        muscle_distance = muscle_distance.copy()
        muscle_distance[arms.window] = np.minimum(muscle_distance[arms.window], (arms.level - 1) * 38)

    # 3. Fat: thicker on flanks and buttocks, thinner on the back; breasts
    fat = profile(z, FAT) * np.float32(subject.fat)
    side_factor = 0.75 + 0.45 * np.clip(y / np.float32(100), -0.4, 1)
    fat = fat * side_factor + np.float32(SKIN)
    if subject.sex == "female":
        size = 0.7 + 0.022 * subject.fat
        for side in (1, -1):
            breast = canvas.ellipsoid((side * 72, 84, 300), (52 * size, 34 * size, 52 * size))
            fat[breast.window] = np.maximum(fat[breast.window], 32 * size * (1.15 - breast.level))
    surface = muscle_distance - fat  # negative inside the skin
    body = surface < 0
    canvas.labels[body] = BODY
    skin = body & (surface > -SKIN)
    # At least one voxel of skin is around whatever is painted.
    canvas.under_skin = ndimage.binary_erosion(body, border_value=1) & ~skin

    # 4. Cavities
    inner = [profile(z, table) for table in (CAGE_WIDTH, CAGE_DEPTH, CAGE_MIDDLE)]
    cage = _ray_distance(x, y - inner[2], inner[0], inner[1], 2.2)
    in_cage = (cage < -RIB_THICKNESS) & (z < 486)
    diaphragm = diaphragm_height(x, y, subject.breath)
    thorax = in_cage & (z > diaphragm) & body
    # Below the ribs the wall of the belly; in the pelvis the cavity narrows to the floor.
    wall = profile(z, [(-200, 60), (-130, 42), (-60, 22), (0, 16), (60, 13), (120, 13), (180, 12), (300, 12)])
    back = profile(z, [(heights, value - 42) for heights, value in SPINE])
    floor = 0.011 * np.square(x) + 0.008 * np.square(y + 5) - 134
    abdomen = (muscle_distance < -wall) & (z < diaphragm) & (z > floor) & (y > back) & body
    abdomen &= in_cage | (z < 165)
    return Frame(
        depth=-muscle_distance,
        skin=skin,
        fat=body & ~skin & (muscle_distance > 0),
        thorax=thorax,
        abdomen=abdomen,
        wall=body & (muscle_distance <= 0) & ~thorax & ~abdomen,
    )


def diaphragm_height(x: np.ndarray, y: np.ndarray, breath: float) -> np.ndarray:
    """Height of the diaphragm over every X and Y: two domes, the right one higher, lowest at the back."""
    right = 264 - 0.0058 * np.square(x - 68) - 0.0072 * np.square(y - 12)
    left = 250 - 0.0058 * np.square(x + 66) - 0.0072 * np.square(y - 10)
    gap = np.maximum(14 - np.abs(right - left), 0)
    return np.maximum(right, left) + gap * gap / 56 + np.float32(breath)


def _ray_distance(x: np.ndarray, y: np.ndarray, width: np.ndarray, depth: np.ndarray, power: float) -> np.ndarray:
    """About the distance in mm to a superellipse around Z, negative inside, along the ray from its middle."""
    rho = ((np.abs(x) / width) ** np.float32(power) + (np.abs(y) / depth) ** np.float32(power)) ** np.float32(
        1 / power
    )
    radius = np.sqrt(x * x + y * y)
    # Near the middle the ray says nothing; the smaller half axis does.
    return np.where(rho > 0.3, radius * (1 - 1 / np.maximum(rho, 0.3)), (rho - 1) * np.minimum(width, depth))
