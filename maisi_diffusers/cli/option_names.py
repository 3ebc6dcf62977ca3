"""The options of `maisi-ct generate` and the arguments of the pipeline that they are."""

import re
from collections.abc import Iterable

OPTIONS = {
    "body_region": "--body-region",
    "anatomy_list": "--anatomy",
    "controllable_anatomy_size": "--size",
    "anatomy_size": "--anatomy-size",
    "mask": "--mask",
    "mask_vocabulary": "--mask-vocabulary",
    "body_image": "--body-image",
    "image_only": "--image-only",
    "output_size": "--output-size",
    "spacing": "--spacing",
    "modality": "--modality",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "controlnet_conditioning_scale": "--controlnet-conditioning-scale",
    "restore_grid": "--restore-grid",
    "augment_mask": "--as-is",
    "quality_retries": "--quality-retries",
    "quality_check": "--no-quality-check",
    "keep_only_anatomy_list": "--keep-only-anatomy",
    "image": "--image",
    "strength": "--strength",
    "repaint_labels": "--repaint",
    "feather": "--feather",
}
"""Argument -> option."""


def name_options(message: str) -> str:
    """A message of the pipeline, with the options that its reader has in the place of arguments.

    Example:

    ```py
    >>> name_options("output_size=(9, 9, 9) does not divide by 8; give mask= or image_only=True")
    '--output-size (9, 9, 9) does not divide by 8; give --mask or --image-only'
    ```
    """

    # With a "=" after it any of them is an argument, without one only those that are no words. Paths are left alone.
    for pattern, space in (
        (rf"(?<![\w/.-])({_any_of(OPTIONS)})=(?:True\b|(?=[\s,:;.]|$))", ""),
        (rf"(?<![\w/.-])({_any_of(OPTIONS)})=", " "),
        (rf"(?<![\w/.-])({_any_of(name for name in OPTIONS if '_' in name)})(?![\w/-]|\.\w)", ""),
    ):
        message = re.sub(pattern, lambda match, space=space: OPTIONS[match[1]] + space, message)
    return message


def _any_of(names: Iterable[str]) -> str:
    return "|".join(sorted(names, key=len, reverse=True))
