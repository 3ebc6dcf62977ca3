"""The CT of a painted canvas: tissues, texture, the scanner's blur and noise."""

import numpy as np
from scipy import ndimage

from ..anatomy import BODY, BONES, LABELS, LUNG_LOBES
from .canvas import Canvas
from .frame import Frame
from .tissues import CODES, OF_LABEL, TISSUES, mean_hu

CORTEX = 0.8  # mm of the hard shell of a bone
SHAFT = 4.0  # mm, of that of long bones
BLUR = 1.5  # mm, standard deviation of a soft kernel's point spread
TEXTURE = 2.6  # mm, half the size of the grains of tissue
NOISE = (9.0, 15.0)  # HU, standard deviation in voxels of 3 mm, from patient to patient


def tissue_map(canvas: Canvas, frame: Frame) -> np.ndarray:
    """Which tissue every voxel is of, a position in [`TISSUES`]; uint8 of the canvas's size."""
    labels = canvas.labels
    table = np.full(256, CODES["muscle"], dtype=np.uint8)
    table[0] = CODES["air"]
    table[list(LUNG_LOBES)] = CODES["lung"]
    table[list(BONES)] = CODES["trabecular bone"]
    for tissue, names in OF_LABEL.items():
        table[[LABELS[name] for name in names]] = CODES[tissue]
    tissues = table[labels]

    # 1. What has no label: skin, fat, muscle
    rest = labels == BODY
    # Fat lies between muscles, too: along the zeros of a random field.
    tissues[rest & frame.wall & (np.abs(canvas.smooth_field("muscles", 38.0)) < 0.11)] = CODES["fat"]
    tissues[rest & frame.fat] = CODES["fat"]
    tissues[rest & frame.skin] = CODES["skin"]
    tissues[rest & (frame.thorax | frame.abdomen)] = CODES["visceral fat"]

    # 2. What is in organs and between bones, as it was drawn
    drawn = canvas.content > 0
    tissues[drawn] = canvas.content[drawn]

    # 3. Bones have a shell; in coarse voxels it is mixed with what is inside, by `shell_share`
    bone = np.isin(labels, BONES)
    thick = [max(round(SHAFT / mm), 1) for mm in canvas.spacing]
    core = ndimage.minimum_filter(bone, size=[2 * n + 1 for n in thick])
    long = np.isin(labels, [LABELS[f"{side} {name}"] for side in ("left", "right") for name in ("femur", "humerus")])
    long &= (canvas.z < -140) | (canvas.z > 480)
    tissues[core & long] = CODES["fatty marrow"]
    tissues[long & ~core] = CODES["dense bone"]
    tissues[labels == LABELS["skull"]] = CODES["dense bone"]
    return tissues


def render(canvas: Canvas, frame: Frame, table: bool) -> np.ndarray:
    """
    The CT of what is on a canvas.

    Args:
        canvas: a finished label map.
        frame: its compartments.
        table: whether the patient lies on one.

    Returns:
        HU, int16, of the canvas's size.
    """
    subject = canvas.subject
    tissues = tissue_map(canvas, frame)
    if table:
        tissues[table_top(canvas) & (tissues == CODES["air"])] = CODES["table"]

    # 1. Mean and texture of every tissue; vessels in the lungs; shells of bones
    hu = mean_hu(subject)
    image = hu[tissues]
    vessels = lung_vessels(canvas) * (tissues == CODES["lung"])
    image += vessels * (hu[CODES["lung vessel"]] - hu[CODES["lung"]])
    bone = tissues == CODES["trabecular bone"]
    shell = bone & ~ndimage.minimum_filter(np.isin(canvas.labels, BONES), size=3)
    share = min(1.0, CORTEX / float(np.mean(canvas.spacing)))
    image[shell] += share * (hu[CODES["cortical bone"]] - hu[CODES["trabecular bone"]])
    spread = np.array([row[4] for row in TISSUES.values()], dtype=np.float32)
    rng = subject.rng("noise")
    grains = _grains(rng, canvas, TEXTURE)
    image += grains * spread[tissues]

    # 2. The scanner: blur over a voxel and the kernel, noise that the kernel has made coarse
    blur = [np.hypot(BLUR, 0.35 * mm) / mm for mm in canvas.spacing]
    image = ndimage.gaussian_filter(image, blur, truncate=2.5)
    volume = float(np.prod(canvas.spacing)) / 27
    noise = rng.uniform(*NOISE) / volume**0.35
    image += np.float32(noise) * _grains(rng, canvas, 1.3)
    return np.clip(np.rint(image), -1024, 3071).astype(np.int16)


def lung_vessels(canvas: Canvas) -> np.ndarray:
    """How much of every voxel is a vessel of the lung, were it lung: float32, 0..1."""
    # Two random fields are both 0 along curves; the farther from the hila, the thinner these are.
    first, second = (canvas.smooth_field(f"lung vessels {i}", 17.0) for i in range(2))
    hila = np.minimum(
        *(
            np.sqrt(np.square(canvas.x - side * 35) + np.square(canvas.y + 20) + np.square(canvas.z - 335))
            for side in (1, -1)
        )
    )
    radius = np.clip(0.42 - hila * np.float32(0.0028), 0.1, 0.4)
    return np.clip(1.6 * (1.2 - (np.square(first) + np.square(second)) / np.square(radius)), 0, 1)


def table_top(canvas: Canvas) -> np.ndarray:
    """Voxels of the table under the patient's back."""
    mm = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(canvas.size, canvas.spacing)]
    occupied = np.flatnonzero((canvas.labels > 0).any(axis=(0, 2)))
    lowest = mm[1][occupied[0]] if len(occupied) else 0.0
    x, y = np.meshgrid(mm[0], mm[1], indexing="ij")
    height = lowest - 6 + np.square(x / 230) * 45
    return np.broadcast_to(((y < height) & (y > height - 22) & (np.abs(x) < 215))[..., None], canvas.size)


def _grains(rng: np.random.Generator, canvas: Canvas, size: float) -> np.ndarray:
    """Random field of standard deviation 1 with grains of this size in mm; float32."""
    white = rng.standard_normal(canvas.size, dtype=np.float32)
    grains = ndimage.gaussian_filter(white, [size / mm for mm in canvas.spacing], truncate=2.5)
    return grains / grains.std()
