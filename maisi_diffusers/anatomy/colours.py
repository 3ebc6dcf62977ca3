"""Colours of the labels, the same in every picture, and their names in a legend."""

import colorsys
import re
from collections.abc import Mapping

import numpy as np

from .vocabulary import DUMMIES, LABELS, TUMORS

# By tissue, in the order of a legend: what sits in an organ stands out, arteries are red, veins blue, bones pale.
_COLOURS: dict[str, str] = {
    "lung tumor": "#ffee00",
    "pancreatic tumor": "#ff3df2",
    "hepatic tumor": "#fff04d",
    "colon cancer primaries": "#ff00a8",
    "bone lesion": "#ff5a00",
    "left kidney cyst": "#00ffd0",
    "right kidney cyst": "#5cffe1",
    "left lung upper lobe": "#3fa9f5",
    "left lung lower lobe": "#1f78c8",
    "right lung upper lobe": "#2fd0d8",
    "right lung middle lobe": "#7ee8c8",
    "right lung lower lobe": "#1597a5",
    "trachea": "#bdf0ff",
    "airway": "#d9f7ff",
    "heart": "#d7263d",
    "liver": "#b9583a",
    "gallbladder": "#4caf50",
    "spleen": "#9b59d0",
    "pancreas": "#f2c14e",
    "right kidney": "#e67e22",
    "left kidney": "#f39c4a",
    "right adrenal gland": "#a3d977",
    "left adrenal gland": "#c5e8a2",
    "stomach": "#ec87b3",
    "esophagus": "#c9789f",
    "duodenum": "#ff9f80",
    "small bowel": "#f7b98b",
    "colon": "#9cab45",
    "bladder": "#f6e58d",
    "prostate": "#b08d57",
    "brain": "#e3bcd0",
    "spinal cord": "#fff3a6",
    "thyroid gland": "#d98cff",
    "aorta": "#ff2d2d",
    "brachiocephalic trunk": "#ff6f61",
    "left common carotid artery": "#ff7f7f",
    "right common carotid artery": "#e05353",
    "left subclavian artery": "#ff9c8a",
    "right subclavian artery": "#d8453b",
    "left iliac artery": "#ff6666",
    "right iliac artery": "#cc3333",
    "left atrial appendage": "#f25c7a",
    "inferior vena cava": "#2f6bff",
    "superior vena cava": "#4f86ff",
    "portal vein and splenic vein": "#6f5bff",
    "hepatic vessel": "#8fa8ff",
    "pulmonary vein": "#7fb2ff",
    "left brachiocephalic vein": "#5b9bff",
    "right brachiocephalic vein": "#3d7be0",
    "left iliac vena": "#6c9dff",
    "right iliac vena": "#3a63cc",
    "skull": "#efe6d0",
    "sternum": "#d9c9a3",
    "costal cartilages": "#a8c4b8",
    "left clavicula": "#e3d5b0",
    "right clavicula": "#cbbb92",
    "left scapula": "#d4cda6",
    "right scapula": "#bdb489",
    "left humerus": "#e9dcb9",
    "right humerus": "#d2c299",
    "sacrum": "#cdb98b",
    "left hip": "#e0cda0",
    "right hip": "#c7b284",
    "left femur": "#eadfc0",
    "right femur": "#d3c5a0",
    "left autochthon": "#8f4b45",
    "right autochthon": "#7a3d38",
    "left iliopsoas": "#a85a6a",
    "right iliopsoas": "#8f4858",
    "left gluteus maximus": "#9c5a4a",
    "right gluteus maximus": "#854a3c",
    "left gluteus medius": "#b06f55",
    "right gluteus medius": "#995d45",
    "left gluteus minimus": "#c48566",
    "right gluteus minimus": "#ad7155",
    "body": "#6d7278",
}
# Bones that come in rows alternate between two tones, so that neighbours are told apart.
_ROWS = {"vertebrae": ("#f0e2b6", "#c9b06f"), "left rib": ("#dcd3e8", "#b3a4c9"), "right rib": ("#d3e3e8", "#a4c0c9")}
# Labels that a model may give a class of its own.
_NEW_CLASSES = {label: colorsys.hsv_to_rgb(0.28 + 0.09 * i, 0.9, 1.0) for i, label in enumerate(DUMMIES)}


def label_colours() -> np.ndarray:
    """RGB in 0..1 of every label, float (256, 3); those without a meaning are grey."""
    colours = np.full((256, 3), 0.5)
    for name, label in LABELS.items():
        if label in _NEW_CLASSES:
            colours[label] = _NEW_CLASSES[label]
        elif row := _row_of(name):
            colours[label] = _rgb(_ROWS[row][label % 2])
        else:
            colours[label] = _rgb(_COLOURS[name])
    return colours


def legend_names(vocabulary: Mapping[str, int] = LABELS) -> dict[int, str]:
    """Label -> name in a legend, in its order: tumors and new classes first, then organs, vessels, bones, muscles.

    Both sides of a pair have one name, and so have the vertebrae and the ribs.

    Args:
        vocabulary: name -> label; a fine-tuned model may have its own.
    """
    order = {LABELS[name]: i for i, name in enumerate(_COLOURS)}

    def place(name: str) -> float:
        if vocabulary[name] in DUMMIES:
            return len(TUMORS) - 0.5
        return order[LABELS["skull"]] + 0.5 if _row_of(name) else order[vocabulary[name]]

    return {
        vocabulary[name]: _without_side(_row_of(name) or name, vocabulary) for name in sorted(vocabulary, key=place)
    }


def _without_side(name: str, vocabulary: Mapping[str, int]) -> str:
    for side, other in (("left ", "right "), ("right ", "left ")):
        bare = name.removeprefix(side)
        if bare != name and (bare == "rib" or other + bare in vocabulary):
            return bare
    return name


def _row_of(name: str) -> str | None:
    match = re.fullmatch(r"(vertebrae|left rib|right rib) \w?\d+", name)
    return match and match[1]


def _rgb(text: str) -> tuple[float, ...]:
    return tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
