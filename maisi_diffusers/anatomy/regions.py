"""The four body regions the `ddpm-ct` model is told: which one a volume starts in and which one it ends in."""

from collections.abc import Iterable

REGIONS: tuple[str, ...] = ("head-neck", "thorax", "abdomen", "pelvis-lower")
"""Regions from top to bottom; a region index is a position in this tuple."""

REGION_LABELS: tuple[frozenset[int], ...] = (
    frozenset({22, 120}),  # brain, skull
    frozenset({28, 29, 30, 31, 32}),  # lung lobes
    frozenset({1, 2, 3, 4, 5, 14}),  # liver, the label published as dummy1, spleen, pancreas, kidneys
    frozenset({93, 94}),  # femurs
)
"""Labels that place a mask in each region, as the published models were trained."""

REGION_WORDS: tuple[str, ...] = ("head", "chest", "abdomen", "pelvis")
"""The word for each of them in `body_region`."""

REGION_OF_WORD: dict[str, int] = {"head": 0, "chest": 1, "thorax": 1, "abdomen": 2, "pelvis": 3, "lower": 3}


def region_of_word(word: str) -> int:
    """Region index 0..3 of a `body_region` word, in upper or lower case.

    Raises:
        ValueError: for any other word.
    """
    region = REGION_OF_WORD.get(str(word).lower())
    if region is None:
        raise ValueError(f"body_region {word!r} is unknown; use one of {', '.join(REGION_OF_WORD)}.")
    return region


def regions_from_words(words: str | Iterable[str]) -> tuple[int, int]:
    """Top and bottom region index (0..3) of one or several `body_region` words.

    Raises:
        ValueError: for an unknown word, and for an empty list.
    """
    return _top_and_bottom(
        [region_of_word(word) for word in ([words] if isinstance(words, str) else words)],
        f"body_region is empty; name at least one of {', '.join(REGION_OF_WORD)}.",
    )


def regions_from_labels(labels_present: Iterable[int]) -> tuple[int, int]:
    """Top and bottom region index (0..3) of a mask, from the labels in it.

    Raises:
        ValueError: if no label of the mask places it in a region.
    """
    labels = set(labels_present)
    return _top_and_bottom(
        [region for region, markers in enumerate(REGION_LABELS) if markers & labels],
        f"None of the labels {sorted(labels)} tells the body region (brain, skull, lungs, liver, spleen, pancreas, "
        "kidneys and femurs do); pass body_region.",
    )


def one_hot(region: int) -> tuple[int, int, int, int]:
    """A region index as the four indicators the data lists hold and the UNet takes (before its factor of 100)."""
    return tuple(int(i == region) for i in range(len(REGIONS)))


def _top_and_bottom(regions: list[int], error: str) -> tuple[int, int]:
    if not regions:
        raise ValueError(error)
    return min(regions), max(regions)
