import pytest

from maisi_diffusers.anatomy import REGIONS, one_hot, region_of_word, regions_from_labels, regions_from_words


@pytest.mark.parametrize(
    ("word", "region"),
    [("head", 0), ("chest", 1), ("thorax", 1), ("abdomen", 2), ("pelvis", 3), ("lower", 3), ("Chest", 1)],
)
def test_words(word, region):
    assert region_of_word(word) == region


def test_unknown_word_lists_the_known_ones():
    with pytest.raises(ValueError, match="'leg'.*head, chest, thorax, abdomen, pelvis, lower"):
        region_of_word("leg")


@pytest.mark.parametrize(
    ("words", "regions"), [(["abdomen", "chest"], (1, 2)), (["lower", "head"], (0, 3)), ("chest", (1, 1))]
)
def test_regions_from_words(words, regions):
    assert regions_from_words(words) == regions


@pytest.mark.parametrize(
    ("labels", "regions"),
    [
        *[([label], (0, 0)) for label in (22, 120)],
        *[([label], (1, 1)) for label in range(28, 33)],
        *[([label], (2, 2)) for label in (1, 2, 3, 4, 5, 14)],
        *[([label], (3, 3)) for label in (93, 94)],
        ([200, 94, 1, 62], (2, 3)),
        ([22, 94], (0, 3)),
        ([6, 32, 5], (1, 2)),
    ],
)
def test_regions_from_labels(labels, regions):
    assert regions_from_labels(labels) == regions


def test_undetermined_regions_say_what_to_pass():
    with pytest.raises(ValueError, match=r"\[6, 200\].*pass body_region"):
        regions_from_labels([200, 6])
    with pytest.raises(ValueError, match="empty"):
        regions_from_words([])


def test_one_hot():
    assert [one_hot(region) for region in range(4)] == [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len(REGIONS) == 4
