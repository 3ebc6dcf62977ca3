"""From a volume and its segmentation to the label map it is trained with."""

import nibabel as nib
import numpy as np
import pytest

from maisi_diffusers.anatomy import (
    BODY,
    TOTALSEGMENTATOR_CLASSES,
    TOTALSEGMENTATOR_TO_MAISI,
    label_index,
    labels_present,
)
from maisi_diffusers.imaging import spacing_of
from maisi_diffusers.training.prepare import (
    NewClass,
    assign_folds,
    find_new_class,
    find_volumes,
    label_volumes,
    prepare_label_map,
)
from tests.tiny import SIZE

from .volumes import AFFINE, ct_array, in_lps, label_array, save, without_body

LIVER, TUMOR = 1, 26
BLADDER = TOTALSEGMENTATOR_CLASSES.index("urinary_bladder") + 1


def values(image):
    return np.asarray(image.dataobj)


@pytest.fixture
def ct(tmp_path):
    return save(tmp_path / "ct.nii.gz", ct_array())


@pytest.fixture
def segmentation(tmp_path):
    return save(tmp_path / "segmentation.nii.gz", without_body())


def test_the_body_is_added(ct, segmentation):
    made = prepare_label_map(ct, segmentation, "maisi")
    assert values(made).dtype == np.uint8
    assert (values(made) == label_array()).all()
    assert np.allclose(made.affine, AFFINE)


def test_oriented_as_ras(ct, segmentation):
    in_lps(ct)
    made = prepare_label_map(ct, segmentation, "maisi")
    assert (values(made) == label_array()).all()
    assert np.allclose(made.affine, AFFINE)


def test_a_segmentation_on_another_grid_is_resampled(ct, tmp_path):
    """Twice as fine along x, half the slices, flipped: the same world."""
    fine = np.repeat(without_body(), 2, axis=0)[:, :, ::-1]
    affine = AFFINE @ nib.affines.from_matvec(np.diag([0.5, 1, -1]), [-0.25, 0, SIZE[2] - 1])
    made = prepare_label_map(ct, save(tmp_path / "fine.nii.gz", fine, affine), "maisi")
    assert (values(made) == label_array()).all()


def test_a_label_becomes_a_new_class(ct, segmentation):
    made = prepare_label_map(ct, segmentation, "maisi", relabelled={TUMOR: 129})
    expected = label_array()
    assert (values(made) == np.where(expected == TUMOR, 129, expected)).all()


def test_labels_change_places(ct, tmp_path):
    labels = without_body()
    labels[labels == LIVER] = 129
    labels[labels == TUMOR] = 130
    made = prepare_label_map(ct, save(tmp_path / "a.nii", labels), "maisi", relabelled={129: 130, 130: 129})
    assert (values(made) == 130).sum() == (labels == 129).sum() > 0
    assert ((values(made) == 129) == (labels == 130)).all()


def test_masks_win_in_their_order(ct, segmentation, tmp_path):
    """Over whatever is there, and each over those before it; on any grid, in any type."""
    first, second = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.int16)
    first[4:12, 4:12, 8:16] = 0.5
    second[8:12, 4:8, 8:12] = 3
    made = prepare_label_map(
        ct,
        segmentation,
        "maisi",
        masks={131: in_lps(save(tmp_path / "1.nii.gz", first)), 130: save(tmp_path / "2.nii.gz", second)},
    )
    expected = label_array().copy()
    expected[first > 0] = 131
    expected[second > 0] = 130
    assert (values(made) == expected).all()


def test_an_empty_mask_is_a_case_without_the_class(ct, segmentation, tmp_path):
    empty = save(tmp_path / "mask.nii.gz", np.zeros(SIZE, np.uint8))
    assert (values(prepare_label_map(ct, segmentation, "maisi", masks={129: empty})) == label_array()).all()


def test_a_mask_outside_the_organs_is_body_too(segmentation, tmp_path):
    """A lesion that the CT shows as air is inside of the patient, not a hole in the body."""
    hu, mask = ct_array(), np.zeros(SIZE, np.uint8)
    mask[10:12, 3:5, 10:12] = 1
    hu[mask > 0] = -1000
    ct = save(tmp_path / "ct.nii.gz", hu)
    made = values(prepare_label_map(ct, segmentation, "maisi", masks={129: save(tmp_path / "mask.nii.gz", mask)}))
    assert (made[mask > 0] == 129).all() and ((made > 0) == (label_array() > 0)).all()


def test_the_body_in_another_modality_is_a_guess(ct, segmentation):
    with pytest.warns(UserWarning, match="no CT was given"):
        made = prepare_label_map(ct, segmentation, "maisi", modality="mri_t1")
    assert (values(made) == BODY).any()


FAR = AFFINE @ nib.affines.from_matvec(np.eye(3), [1000, 0, 0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"segmentation": lambda: (without_body(), FAR)}, "no label where the image is"),
        ({"mask": lambda: (np.ones(SIZE, np.uint8), FAR)}, "mask of class 129 has no voxel where the image is"),
        (
            {
                "segmentation": lambda: (
                    np.where(without_body() == TUMOR, 129, without_body()).astype(np.uint8),
                    AFFINE,
                )
            },
            r"labels \[129\] already.*another index",
        ),
        ({"segmentation": lambda: (without_body()[:, :, 0], AFFINE)}, r"shape \(24, 16\), must be one volume"),
        ({"segmentation": lambda: (without_body() * np.float32(1), AFFINE)}, "floating-point labels"),
        ({"segmentation": lambda: (np.full(SIZE, 140, np.uint8), AFFINE)}, r"labels \[140\]"),
        ({"ct": lambda: (np.full(SIZE, -1000, np.int16), AFFINE)}, "no voxel of at least -800 HU"),
        ({"ct": lambda: (np.full(SIZE, np.nan, np.float32), AFFINE)}, "NaN or infinite voxels"),
    ],
)
@pytest.mark.filterwarnings("ignore:100% of the labelled voxels")
def test_bad_files_are_refused(tmp_path, change, says):
    arrays = {
        "ct": (ct_array(), AFFINE),
        "segmentation": (without_body(), AFFINE),
        "mask": (np.ones(SIZE, np.uint8), AFFINE),
    } | {name: make() for name, make in change.items()}
    files = {name: save(tmp_path / f"{name}.nii.gz", *array) for name, array in arrays.items()}
    with pytest.raises(ValueError, match=says) as error:
        prepare_label_map(files["ct"], files["segmentation"], "maisi", masks={129: files["mask"]})
    assert "\n" not in str(error.value)


def test_the_real_bladder(torso_ct, torso_labels):
    source = find_new_class("bladder lesion", 129, "urinary_bladder", "totalsegmentator").source
    made = prepare_label_map(torso_ct, torso_labels, "totalsegmentator", relabelled={source: 129})
    raw = np.asarray(nib.load(torso_labels).dataobj)
    assert ((values(made) == 129) == (raw == BLADDER)).all() and (raw == BLADDER).sum() > 10_000
    assert label_index("bladder") not in labels_present(values(made))
    others = (raw > 0) & (raw != BLADDER)
    assert (values(made)[others] == TOTALSEGMENTATOR_TO_MAISI[raw[others]]).all()
    body = values(made)[raw == 0] == BODY
    assert 0.2 < body.mean() < 0.8
    assert made.shape == raw.shape and np.allclose(made.affine, nib.load(torso_ct).affine)


def test_volumes_of_labels():
    labels = label_array()
    found = label_volumes(nib.Nifti1Image(labels, AFFINE))
    assert list(found) == [1, 26, 28, 93, 200]
    voxel = np.prod(spacing_of(nib.Nifti1Image(labels, AFFINE))) / 1000
    assert found == pytest.approx({label: (labels == label).sum() * voxel for label in found})


@pytest.mark.parametrize(
    ("source", "vocabulary", "label"),
    [
        ("urinary_bladder", "totalsegmentator", "bladder"),
        ("21", "totalsegmentator", "bladder"),
        ("117", "totalsegmentator", "costal cartilages"),
        ("1", "totalsegmentator", "spleen"),
        ("bladder", "maisi", "bladder"),
        ("15", "maisi", "bladder"),
        ("129", "maisi", "dummy6"),
    ],
)
def test_sources_that_are_labels(source, vocabulary, label):
    assert find_new_class("a", 129, source, vocabulary) == NewClass("a", 129, label_index(label))


@pytest.mark.parametrize(
    ("source", "vocabulary"),
    [
        ("bladder", "totalsegmentator"),
        ("urinary_bladder", "maisi"),
        ("118", "totalsegmentator"),
        ("0", "totalsegmentator"),
        ("140", "maisi"),
        ("missing/folder", "maisi"),
        ("-1", "maisi"),
    ],
)
def test_sources_that_are_nothing(source, vocabulary):
    with pytest.raises(ValueError, match=f"Source '{source}' of new class 'a' is neither a folder nor a label"):
        find_new_class("a", 129, source, vocabulary)


def test_sources_that_are_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask = save(tmp_path / "bladder" / "case.nii.gz", ct_array())
    assert find_new_class("a", 129, "bladder", "totalsegmentator").source == {"case": mask.relative_to(tmp_path)}
    with pytest.raises(
        ValueError, match=r"'bladder' of new class 'a' is a folder and a label of maisi; write './bladder'"
    ):
        find_new_class("a", 129, "bladder", "maisi")
    assert find_new_class("a", 129, "./bladder", "maisi").source == {"case": mask.relative_to(tmp_path)}


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_names_of_cases(tmp_path):
    touch(tmp_path, "c.nii", "b_0000.nii.gz", "a.b.nii.gz", ".hidden.nii.gz", "notes.txt", "sub/d.nii.gz")
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nowhere")
    assert find_volumes(tmp_path) == {
        "a.b": tmp_path / "a.b.nii.gz",
        "b": tmp_path / "b_0000.nii.gz",
        "c": tmp_path / "c.nii",
        "gone": tmp_path / "gone.nii.gz",  # to be named as a case that fails
    }
    assert list(find_volumes(tmp_path)) == ["a.b", "b", "c", "gone"]


def test_cases_that_are_subfolders(tmp_path):
    touch(tmp_path, "a/any.nii.gz", "b/1.nii.gz", "b/2.nii.gz", ".c/c.nii.gz", "d.nii.gz", "e/readme.txt")
    assert find_volumes(tmp_path, in_subfolders=True) == {
        "a": tmp_path / "a" / "any.nii.gz",
        "d": tmp_path / "d.nii.gz",
    }


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        (["a.nii", "a.nii.gz"], ValueError, "a.nii' and '.*a.nii.gz' are both of case 'a'"),
        (["a_0000.nii.gz", "a.nii.gz"], ValueError, "are both of case 'a'"),
        (["a/any.nii.gz", "a.nii.gz"], ValueError, "are both of case 'a'"),
        (["notes.txt"], ValueError, "has no .nii or .nii.gz file"),
        ([], FileNotFoundError, "No folder '.*files'"),
    ],
)
def test_folders_that_are_refused(tmp_path, names, error, says):
    touch(tmp_path / "files", *names)
    with pytest.raises(error, match=says):
        find_volumes(tmp_path / "files", in_subfolders=True)


@pytest.mark.parametrize(("cases", "num_folds"), [(10, 5), (11, 5), (3, 5), (1, 1), (7, 2)])
def test_folds_are_balanced(cases, num_folds):
    names = [f"case-{i}" for i in range(cases)]
    folds = assign_folds(names, num_folds, seed=0)
    assert folds.keys() == set(names)
    counts = np.bincount(list(folds.values()), minlength=min(cases, num_folds))
    assert len(counts) == min(cases, num_folds) and counts.max() - counts.min() <= 1


def test_folds_depend_on_names_and_seed_alone():
    names = [f"case-{i}" for i in range(20)]
    folds = assign_folds(names, 5, seed=0)
    assert assign_folds(reversed(names), 5, seed=0) == folds
    assert assign_folds(names, 5, seed=1) != folds
    assert [folds[f"case-{i}"] for i in range(5)] == [4, 3, 0, 1, 0], "the same on every machine, for ever"


@pytest.mark.parametrize("num_folds", [0, -1])
def test_folds_that_are_none(num_folds):
    with pytest.raises(ValueError, match=f"num_folds is {num_folds}, must be 1 or more"):
        assign_folds(["a"], num_folds, seed=0)
