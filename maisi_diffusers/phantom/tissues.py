"""HU of every tissue that a phantom is made of."""

import numpy as np

from .subject import PHASES, Subject

# Mean HU without contrast, in the arterial and in the portal venous phase; standard deviation between patients;
# standard deviation of the texture within one. Without contrast they are those of a real CT of the torso (median of
# every organ, away from its edge, and the spread that the noise does not explain), but for organs that it does not
# show, which are textbook values; so is what contrast adds.
TISSUES: dict[str, tuple[float, float, float, float, float]] = {
    "air": (-1000, -1000, -1000, 0, 0),
    "gas": (-930, -930, -930, 20, 15),
    "lung": (-840, -835, -830, 20, 38),
    "lung vessel": (20, 120, 90, 10, 10),
    "fat": (-103, -103, -102, 5, 9),
    "visceral fat": (-98, -97, -95, 6, 14),
    "skin": (5, 8, 10, 8, 10),
    "muscle": (34, 39, 48, 8, 17),
    "liver": (50, 62, 105, 7, 5),
    "spleen": (42, 112, 115, 5, 5),
    "pancreas": (16, 80, 76, 8, 19),
    "kidney": (22, 126, 156, 5, 12),
    "adrenal gland": (20, 60, 65, 5, 8),
    "gallbladder": (6, 6, 8, 5, 4),
    "bowel wall": (32, 48, 62, 6, 14),
    "bowel content": (18, 20, 22, 10, 14),
    "stool": (-20, -20, -20, 45, 105),
    "urine": (10, 10, 16, 4, 4),
    "artery": (42, 285, 145, 8, 4),
    "vein": (42, 60, 140, 6, 4),
    "portal vein": (42, 75, 155, 6, 4),
    "heart": (42, 190, 130, 7, 9),
    "brain": (36, 37, 40, 2, 5),
    "cerebrospinal fluid": (8, 8, 8, 2, 3),
    "spinal cord": (12, 14, 18, 4, 14),
    "thyroid": (90, 150, 140, 12, 8),
    "prostate": (28, 40, 60, 5, 8),
    "cartilage": (105, 105, 108, 12, 12),
    "disc": (78, 80, 84, 8, 9),
    "trabecular bone": (160, 163, 167, 18, 46),
    "cortical bone": (1150, 1150, 1150, 90, 60),
    "dense bone": (850, 850, 850, 70, 80),
    "fatty marrow": (-25, -25, -25, 25, 20),
    "soft tumor": (34, 60, 68, 7, 13),
    "dark tumor": (26, 40, 52, 7, 11),
    "lytic lesion": (48, 58, 66, 12, 18),
    "table": (-820, -820, -820, 10, 6),
}
CODES = {name: code for code, name in enumerate(TISSUES)}
# Tissue of labels; those not named here are drawn in parts below.
OF_LABEL = {
    "liver": ["liver"],
    "spleen": ["spleen"],
    "pancreas": ["pancreas"],
    "kidney": ["left kidney", "right kidney"],
    "adrenal gland": ["left adrenal gland", "right adrenal gland"],
    "gallbladder": ["gallbladder"],
    "bowel wall": ["esophagus", "duodenum", "stomach", "small bowel", "colon"],
    "urine": ["bladder"],
    "artery": [
        *("aorta", "left iliac artery", "right iliac artery", "brachiocephalic trunk", "left common carotid artery"),
        *("right common carotid artery", "left subclavian artery", "right subclavian artery"),
    ],
    "vein": [
        *("inferior vena cava", "superior vena cava", "left iliac vena", "right iliac vena"),
        *("left brachiocephalic vein", "right brachiocephalic vein"),
    ],
    "portal vein": ["portal vein and splenic vein", "hepatic vessel"],
    "heart": ["heart", "left atrial appendage", "pulmonary vein"],
    "brain": ["brain"],
    "spinal cord": ["spinal cord"],
    "thyroid": ["thyroid gland"],
    "prostate": ["prostate"],
    "cartilage": ["costal cartilages"],
    "gas": ["trachea", "airway"],
    "muscle": [
        f"{side} {muscle}"
        for side in ("left", "right")
        for muscle in ("gluteus maximus", "gluteus medius", "gluteus minimus", "autochthon", "iliopsoas")
    ],
    "dark tumor": ["hepatic tumor", "pancreatic tumor"],
    "soft tumor": ["lung tumor", "colon cancer primaries"],
    "lytic lesion": ["bone lesion"],
}


def mean_hu(subject: Subject) -> np.ndarray:
    """HU of every tissue in this patient, float32, in the order of [`TISSUES`]."""
    column = PHASES.index(subject.phase)
    draws = np.clip(subject.rng("tissues").standard_normal(len(TISSUES)), -2, 2)
    return np.array([row[column] + row[3] * draw for row, draw in zip(TISSUES.values(), draws)], dtype=np.float32)
