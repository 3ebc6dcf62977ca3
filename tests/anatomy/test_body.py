import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from maisi_diffusers.anatomy import add_body_label, load_label_map
from maisi_diffusers.imaging import load_volume

SIZE, SPACING = (120, 100, 24), (2.0, 2.5, 5.0)
AFFINE = np.diag([*SPACING, 1.0])


def grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxel centres in mm, (0, 0) in the middle of the axial plane."""
    x, y, z = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(SIZE, SPACING)), indexing="ij")
    return x, y, z


def phantom() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU, labels (liver only) and the true body: a trunk with lungs and bowel gas."""
    x, y, z = grid()
    body = (x / 90) ** 2 + (y / 70) ** 2 <= 1
    hu = np.where(body, -80.0, -1000.0)
    hu[((np.abs(x) - 40) / 30) ** 2 + (y / 40) ** 2 <= 1] = -900  # lungs, open at both ends of the scan
    hu[(x**2 + (y - 50) ** 2 + z**2) <= 10**2] = -1000  # gas
    labels = np.zeros(SIZE, np.uint8)
    labels[x**2 + (y / 2) ** 2 <= 5**2] = 1
    hu[labels > 0] = 60
    return hu, labels, body


def body_of(hu: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asanyarray(add_body_label(nib.Nifti1Image(labels, AFFINE), nib.Nifti1Image(hu, AFFINE)).dataobj)


def test_body_is_the_phantom():
    hu, labels, body = phantom()
    out = body_of(hu, labels)
    assert out.dtype == np.uint8
    assert ((out > 0) == body).all()
    assert (out[labels > 0] == labels[labels > 0]).all()
    assert set(np.unique(out)) == {0, 1, 200}


@pytest.mark.parametrize("thickness", [2.5, 5.0])
def test_table_is_not_body(thickness):
    hu, labels, body = phantom()
    x, y, z = grid()
    # A curved shell that the back lies on, and a flat one below it: together they close off air in the plane.
    shell = np.abs(np.hypot(x, y - 60) - 132) < thickness / 2
    flat = (np.abs(y + 100) < thickness / 2) & (np.abs(x) < 100)
    hu[(shell | flat) & (y < -40) & ~body] = -300
    out = body_of(hu, labels) > 0
    assert out[body].all()
    too_much = ndimage.distance_transform_edt(~body, sampling=SPACING)[out]
    assert too_much.max() < 8, "only where it touches the skin"
    assert np.count_nonzero(too_much) < 0.03 * body.sum()


def test_second_leg_is_kept_if_labelled():
    x, y, z = grid()
    left, right = (np.hypot(x - side * 50, y) <= radius for side, radius in ((1, 35), (-1, 30)))
    hu = np.where(left | right, 0.0, -1000.0)
    labels = np.zeros(SIZE, np.uint8)
    labels[np.hypot(x - 50, y) <= 8] = 94
    labels[np.hypot(x + 50, y) <= 8] = 93
    assert ((body_of(hu, labels) > 0) == (left | right)).all()
    labels[labels == 93] = 0
    assert ((body_of(hu, labels) > 0) == left).all()


def test_half_air_skin_is_body():
    hu, labels, body = phantom()
    x, y, _ = grid()
    rim = ((x / 91.9) ** 2 + (y / 72.4) ** 2 <= 1) & ~body
    hu[rim] = -700
    assert ((body_of(hu, labels) > 0) == (body | rim)).all()


def test_airway_open_to_the_outside_is_body():
    hu, labels, body = phantom()
    x, y, z = grid()
    windpipe = np.hypot(x, y - 20) < 6
    bronchi = (np.abs(x) < 20) & (np.abs(y - 20) < 5) & (np.abs(z) < 5)
    hu[windpipe | bronchi] = -1000
    hu[..., -1][((np.abs(x) < 6) & (y > 20))[..., -1]] = -1000  # the nose: in 3D, the lungs are outside air now
    out = body_of(hu, labels)
    assert ((out > 0) == body)[..., :-1].all()


def test_trapped_air_is_dropped_only_where_lungs_are_labelled():
    hu, labels, body = phantom()
    x, y, _ = grid()
    pocket = (np.abs(x) < 20) & (np.abs(y + 25) < 15)
    hu[pocket] = -1000
    labels[pocket] = 0
    assert ((body_of(hu, labels) > 0) == body).all()
    lungs = hu == -900
    labels[lungs] = 28
    assert ((body_of(hu, labels) > 0) == body & ~pocket).all(), "small pockets of gas stay"


def test_unlabelled_airways_stay_next_to_labelled_lungs():
    hu, labels, body = phantom()
    x, y, _ = grid()
    labels[hu == -900] = 28
    hu[(np.abs(x) < 20) & (np.abs(y - 20) < 5) & (labels == 0)] = -1000  # bronchi, a few ml, open into 1 l of lung
    assert ((body_of(hu, labels) > 0) == body).all()


def test_thin_wall_over_a_labelled_lung_is_body():
    hu, labels, body = phantom()
    x, y, _ = grid()
    lungs = (x / 86) ** 2 + (y / 66) ** 2 <= 1
    hu[lungs], labels[lungs] = -900, 28
    assert ((body_of(hu, labels) > 0) == body).all()


def test_largest_piece_is_body_even_if_the_labels_miss_it():
    hu, labels, body = phantom()
    labels[:] = 0
    labels[0, 0, 0] = 63
    found = body_of(hu, labels) > 0
    found[0, 0, 0] = False
    assert (found == body).all()


def test_labels_outside_the_tissue_stay():
    hu, labels, _ = phantom()
    labels[2, 2, 2] = 63
    assert body_of(hu, labels)[2, 2, 2] == 63


def test_map_with_body_comes_back_as_it_is():
    image = nib.Nifti1Image(np.array([[[0, 1, 200]]], np.uint8), AFFINE)
    assert add_body_label(image) is image


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1)])
@pytest.mark.parametrize("with_ct", [True, False])
def test_orientation_does_not_matter(axes, flips, with_ct):
    hu, labels, _ = phantom()
    hu[:, :20], labels[:, :, :2] = -1000, 0  # no symmetry to hide behind
    orientation = np.array([*zip(np.argsort(axes), flips)])

    def envelope(reorient):
        images = [nib.Nifti1Image(data, AFFINE) for data in (labels, hu)]
        if reorient:
            images = [image.as_reoriented(orientation) for image in images]
        if with_ct:
            return add_body_label(*images)
        with pytest.warns(UserWarning, match="guess"):
            return add_body_label(images[0])

    there = envelope(reorient=True)
    assert not np.allclose(there.affine, AFFINE) or (axes == (0, 1, 2) and flips == (1, 1, 1))
    back = nib.as_closest_canonical(there)
    assert np.allclose(back.affine, AFFINE)
    assert (np.asanyarray(back.dataobj) == np.asanyarray(envelope(reorient=False).dataobj)).all()


def test_ct_on_another_grid():
    hu, labels, body = phantom()
    shifted = AFFINE.copy()
    shifted[:3, 3] = 10 * np.array(SPACING) * (1, 0, 0)
    cropped = nib.Nifti1Image(hu[10:], shifted).as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
    out = np.asanyarray(add_body_label(nib.Nifti1Image(labels, AFFINE), cropped).dataobj)
    assert ((out > 0) == body).all()


def test_ct_elsewhere_is_refused():
    hu, labels, _ = phantom()
    far = AFFINE.copy()
    far[0, 3] = 1e4
    with pytest.raises(ValueError, match="-800 HU.*label map"):
        add_body_label(nib.Nifti1Image(labels, AFFINE), nib.Nifti1Image(hu, far))


def test_guess_without_ct():
    labels = np.zeros(SIZE, np.uint8)
    x, y, z = grid()
    labels[(np.abs(x) < 50) & (np.abs(y) < 40) & (np.abs(z) < 40)] = 1
    labels[:, :, 12] = 0  # a gap along the patient closes
    labels[60, 50, 12] = 1
    with pytest.warns(UserWarning, match="guess.*Pass the CT"):
        out = np.asanyarray(add_body_label(nib.Nifti1Image(labels, AFFINE)).dataobj) > 0
    assert out[labels > 0].all()
    planes = out[:, :, 7:17]
    width = planes[:, 50].sum(0) * SPACING[0]
    depth = planes[60].sum(0) * SPACING[1]
    assert np.abs(width - 2 * (50 + 15)).max() <= 2 * SPACING[0]
    assert np.abs(depth - 2 * (40 + 15)).max() <= 2 * SPACING[1]
    assert not out[..., 0].any() and not out[..., -1].any()
    assert (out == out[::-1, ::-1]).mean() > 0.99


def test_real_torso(torso_ct, torso_labels):
    labels, ct = load_label_map(torso_labels, "totalsegmentator"), load_volume(torso_ct)
    before, hu = np.asanyarray(labels.dataobj), np.asanyarray(ct.dataobj)
    image = add_body_label(labels, ct)
    out = np.asanyarray(image.dataobj)
    assert (image.affine == labels.affine).all()
    assert (out[before > 0] == before[before > 0]).all()

    body = out == 200
    assert -100 < hu[body].mean() < -60, "mostly fat and muscle"
    assert (hu[body] < -800).mean() < 0.001
    # The table's shells lie in front of the first rows; the mattress between them and the back is no fat either.
    assert not body[:20, :10].any() and not body[-20:, :10].any()
    posterior = body & (np.arange(body.shape[1]) < 10)[:, None]
    assert (hu[posterior] < -200).mean() < 0.35
    # Fat and muscle that are left out would be generated as air. Below row 20 it is the table that is left out.
    assert ((out == 0) & (hu > -200))[:, 20:].sum() < 10
    with pytest.warns(UserWarning):
        guess = np.asanyarray(add_body_label(labels).dataobj) > 0
    assert 2 * (guess & (out > 0)).sum() / (guess.sum() + (out > 0).sum()) > 0.85
