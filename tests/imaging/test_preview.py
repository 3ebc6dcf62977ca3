"""The picture of a volume: which side is where, which planes, which colours and names."""

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest

from maisi_diffusers.imaging import save_preview
from maisi_diffusers.imaging.preview import PLANES, centre_of_labels, cut, legend_entries, paint
from tests.tiny import SIZE, SPACING, make_label_map

CENTRE = tuple(n // 2 for n in SIZE)


def image_of(labels: nib.Nifti1Image) -> nib.Nifti1Image:
    return nib.Nifti1Image((np.asarray(labels.dataobj) * 10).astype(np.int16), labels.affine)


@pytest.mark.parametrize(
    ("corner", "sides"),
    [
        # In RAS+ the last index is the right, the front, the top.
        ((-1, -1, -1), {"R", "A", "S"}),
        ((0, 0, 0), {"L", "P", "I"}),
        ((-1, 0, -1), {"R", "P", "S"}),
    ],
)
def test_sides(corner, sides):
    for plane in PLANES:
        volume = np.zeros(SIZE)
        place = list(corner)
        place[plane.axis] = CENTRE[plane.axis]
        volume[tuple(place)] = 1
        picture = cut(volume, plane, CENTRE)
        (row,), (column,) = np.nonzero(picture)
        horizontal = plane.left if column == 0 else plane.right
        vertical = plane.bottom if row == 0 else plane.top
        assert {horizontal, vertical} == sides & {plane.left, plane.right, plane.top, plane.bottom}
        assert row in (0, picture.shape[0] - 1) and column in (0, picture.shape[1] - 1)


def test_planes_go_through_what_matters():
    labels = np.asarray(make_label_map().dataobj)
    tumor = np.argwhere(labels == 26).mean(axis=0)
    assert np.allclose(centre_of_labels(labels, {0, 200}, {26}, SIZE), tumor, atol=0.5)
    organs = np.argwhere(~np.isin(labels, (0, 200))).mean(axis=0)
    for focus in ((), (23,)):  # no lung tumor is there
        assert np.allclose(centre_of_labels(labels, {0, 200}, focus, SIZE), organs, atol=0.5)
    assert centre_of_labels(None, {0}, (), SIZE) == CENTRE
    assert centre_of_labels(np.zeros(SIZE, np.uint8), {0}, (), SIZE) == CENTRE


def test_paint():
    labels = np.zeros((6, 7), np.uint8)
    labels[1:6, 1:6] = 1
    labels[0, 0] = 200
    colours = np.zeros((256, 3))
    colours[1] = (1, 0.5, 0)
    rgba = paint(labels, colours, {1})
    assert (rgba[labels != 1, 3] == 0).all() and (rgba[labels == 1, :3] == (1, 0.5, 0)).all()
    assert 0 < rgba[3, 3, 3] < rgba[1, 1, 3] <= 1


def test_legend_names_what_is_shown_once():
    colours = np.zeros((256, 3))
    colours[5], colours[14] = (1, 0, 0), (0, 1, 0)
    names = {3: "spleen", 5: "kidney", 14: "kidney", 1: "liver"}
    assert legend_entries({1, 14, 5, 99}, names, colours) == {
        "kidney": [(1, 0, 0), (0, 1, 0)],
        "liver": [(0, 0, 0)],
    }


def test_the_same_bytes_whatever_the_orientation(tmp_path):
    labels = make_label_map()
    image = image_of(labels)
    flipped = [volume.as_reoriented([[2, 1], [0, -1], [1, 1]]) for volume in (image, labels)]
    for name, volumes in {"a": (image, labels), "b": (image, labels), "flipped": flipped}.items():
        save_preview(tmp_path / f"{name}.png", *volumes, (200,), title="a title", names={1: "liver", 26: "tumor"})
    first, again, flipped = ((tmp_path / f"{name}.png").read_bytes() for name in ("a", "b", "flipped"))
    assert first == again == flipped and b"Software" not in first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "flipped.png"]


def test_what_is_drawn(tmp_path):
    labels = make_label_map()
    image, colours = image_of(labels), np.zeros((256, 3))
    colours[1] = (0, 1, 0)

    def picture(*args, **kwargs):
        save_preview(tmp_path / "picture.png", image, *args, window=(0, 2000), **kwargs)
        return matplotlib.image.imread(tmp_path / "picture.png")[..., :3]

    def greens(picture):
        return ((picture[..., 1] > picture[..., 0] + 0.2) & (picture[..., 1] > picture[..., 2] + 0.2)).sum()

    grey = picture()
    with_labels = picture(labels, {200}, colours=colours)
    with_legend = picture(labels, {200}, colours=colours, names={1: "liver"})
    assert (grey[0, 0] == 0).all()
    assert greens(grey) == 0 < greens(with_labels) < greens(with_legend)
    assert with_labels.shape[0] > 1.5 * grey.shape[0] and with_legend.shape[1] > with_labels.shape[1]
    assert greens(picture(labels, {1, 200}, colours=colours, names={1: "liver"})) == 0


@pytest.mark.parametrize("size", [(400, 4, 4), (1, 1, 1)])
def test_any_shape_without_labels(tmp_path, size):
    save_preview(tmp_path / "picture.png", nib.Nifti1Image(np.ones(size, np.int16), np.diag([*SPACING, 1.0])))
    assert matplotlib.image.imread(tmp_path / "picture.png").shape[1] > 400


@pytest.mark.parametrize("size", [(4, 4, 400), (400, 300, 4), (1, 1, 1)])
def test_any_shape(tmp_path, size):
    labels = nib.Nifti1Image(np.ones(size, np.uint8), np.diag([*SPACING, 1.0]))
    save_preview(tmp_path / "picture.png", image_of(labels), labels, names={1: "liver"}, title="a title")
    height, width, _ = matplotlib.image.imread(tmp_path / "picture.png").shape
    assert 60 < height < 1500 and 400 < width < 1600
