"""Modality names and the class codes that the `rflow` models are conditioned on."""

MODALITIES: dict[str, int] = {
    "unknown": 0,
    "ct": 1,
    "ct_wo_contrast": 2,
    "ct_contrast": 3,
    "mri": 8,
    "mri_t1": 9,
    "mri_t2": 10,
    "mri_flair": 11,
    "mri_pd": 12,
    "mri_dwi": 13,
    "mri_adc": 14,
    "mri_ssfp": 15,
    "mri_mra": 16,
    "mri_t1c": 17,
    "mri_swi": 20,
    "mri_t1_skull_stripped": 29,
    "mri_t2_skull_stripped": 30,
    "mri_flair_skull_stripped": 31,
    "mri_swi_skull_stripped": 32,
    "mri_mra_skull_stripped": 33,
}
"""Published modality names -> codes (`modality_mapping.json` of NVIDIA's MAISI release)."""

NUM_MODALITY_CODES = 128
"""Class embeddings of the published models. Codes without a name are free for fine-tuned models."""

_FIRST_MR_CODE = MODALITIES["mri"]


def modality_code(modality: str | int) -> int:
    """Code of a modality given by name or by code.

    Args:
        modality: a name of `MODALITIES`, with or without its "mri_" ("t1" is "mri_t1"), or a code 0..127.

    Raises:
        ValueError: for an unknown name, listing the known ones, or a code out of range.
    """
    if isinstance(modality, str):
        name = modality.lower()
        code = MODALITIES.get(name, MODALITIES.get(f"mri_{name}"))
        if code is None:
            raise ValueError(f"Modality {modality!r} is unknown; use one of {', '.join(MODALITIES)}.")
        return code
    if not 0 <= modality < NUM_MODALITY_CODES:
        raise ValueError(
            f"Modality code {modality} is out of range; use 0 to {NUM_MODALITY_CODES - 1} or one of "
            f"{', '.join(MODALITIES)}."
        )
    return int(modality)


def modality_names(code: int) -> set[str]:
    """Names of a code that says a contrast, with and without `"_skull_stripped"`; none for MR as such and unknown."""
    names = {name for name, other in MODALITIES.items() if other == code and code not in (0, _FIRST_MR_CODE)}
    return names | {name.removesuffix("_skull_stripped") for name in names}


def is_ct(code: int) -> bool:
    """Whether intensities of this modality are in HU: codes below 8, with 0 (unknown) among them, as published."""
    return code < _FIRST_MR_CODE
