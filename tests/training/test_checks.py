"""Every kind of broken entry of a data list is found, and good ones pass."""

import gzip
import json
import tracemalloc
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from maisi_diffusers.anatomy import LABELS, new_vocabulary
from maisi_diffusers.training.checks import check_case, check_cases, read_entries
from maisi_diffusers.training.data_list import Case, DataList
from tests.tiny import SIZE, SPACING

from .volumes import AFFINE, ct_array, in_lps, label_array, save, save_latent

THORAX, ABDOMEN, PELVIS = (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)


def turned(degrees):
    """The affine, turned about the z axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return nib.affines.from_matvec(np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])) @ AFFINE


def moved(voxels, affine=AFFINE):
    return affine @ nib.affines.from_matvec(np.eye(3), voxels)


def scaled(factor):
    """Larger voxels around the same centre."""
    centre = (np.array(SIZE) - 1) / 2
    return AFFINE @ nib.affines.from_matvec(np.diag(factor), centre * (1 - np.array(factor)))


@pytest.fixture
def volume(tmp_path):
    """A case of a CT."""
    return Case(
        save(tmp_path / "ct.nii.gz", ct_array()),
        save(tmp_path / "labels.nii.gz", label_array()),
        SIZE,
        SPACING,
        THORAX,
        PELVIS,
    )


@pytest.fixture
def latent(tmp_path, volume):
    """The same case, encoded."""
    return replace(volume, image=save_latent(tmp_path / "latent.nii.gz"))


@pytest.fixture(params=["volume", "latent"])
def case(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("in_full", [False, True])
def test_good_cases(case, in_full):
    assert check_case(case, in_full=in_full) == []
    bare = Case(case.image)
    assert check_case(bare, in_full=in_full) == []


def test_orientations_may_differ(case):
    """Size and spacing in the list are those in RAS+."""
    in_lps(case.label)
    assert check_case(case, in_full=True) == []
    in_lps(case.image)
    assert check_case(case, in_full=True) == []
    swapped = nib.load(case.label).as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
    assert swapped.shape != SIZE
    nib.save(swapped, case.label)
    assert check_case(case, in_full=True) == []


def test_latents_with_mean_and_log_variance(latent):
    save_latent(latent.image, channels=8)
    assert check_case(latent, in_full=True) == []
    assert "(X, Y, Z, 8 or 16)" not in str(check_case(latent, latent_channels=8))
    assert "(X, Y, Z, 3 or 6)" in str(check_case(latent, latent_channels=3))


def test_trailing_axes_of_one(volume, latent):
    save(volume.image, ct_array()[..., None])
    save(volume.label, label_array()[..., None, None])
    assert check_case(volume, in_full=True) == []
    image = nib.load(latent.image)
    save(latent.image, np.asarray(image.dataobj)[..., None], image.affine)
    assert check_case(latent, in_full=True) == []


def test_other_downsampling(latent):
    assert "must have (12, 8, 16), 2 times" in str(check_case(latent, ratio=2))


def test_published_latents_have_the_volumes_affine(latent):
    save_latent(latent.image, affine=AFFINE)
    assert check_case(latent, in_full=True) == []


def test_no_region_that_labels_tell(volume):
    save(volume.label, np.full(SIZE, 200, np.uint8))
    assert check_case(replace(volume, top_region_index=ABDOMEN), in_full=True) == []


def test_new_classes_tell_no_region(volume):
    """2 has been a liver; as a new class it can be anywhere."""
    labels = np.where(label_array() == 1, 2, label_array())
    labels[labels == 93] = 200
    save(volume.label, labels.astype(np.uint8))
    case = replace(volume, bottom_region_index=THORAX)
    assert check_case(case, new_vocabulary({"lung cyst": 2}), in_full=True) == []
    assert "bottom_region_index" in str(check_case(case, LABELS, in_full=True))


HEADERS = {
    "image missing": (lambda c: c.image.unlink(), "image '{image}' does not exist: correct its path"),
    "label missing": (lambda c: c.label.unlink(), "label map '{label}' does not exist: correct its path"),
    "image a folder": (lambda c: (c.image.unlink(), c.image.mkdir()), "image '{image}' does not exist"),
    "image empty": (lambda c: c.image.write_bytes(b""), "image '{image}' cannot be read as NIfTI"),
    "image text": (lambda c: c.image.write_text("x" * 999), "image '{image}' cannot be read as NIfTI"),
    "label text": (lambda c: c.label.write_text("x" * 999), "label map '{label}' cannot be read as NIfTI"),
    "image of two axes": (
        lambda c: save(c.image, np.zeros(SIZE[:2], np.int16)),
        "image '{image}' has shape (24, 16), must be a volume (X, Y, Z) or a latent (X, Y, Z, 4 or 8)",
    ),
    "image of five channels": (
        lambda c: save_latent(c.image, channels=5),
        "image '{image}' has shape (6, 4, 8, 5), must be a volume (X, Y, Z) or a latent (X, Y, Z, 4 or 8)",
    ),
    "label with channels": (
        lambda c: save_latent(c.label),
        "label map '{label}' has shape (6, 4, 8, 4), must be a volume (X, Y, Z): make it again",
    ),
    "label smaller": (
        lambda c: save(c.label, label_array()[:20]),
        "label map '{label}' has (20, 16, 32) voxels in RAS+, must have (24, 16, 32), ",
    ),
    "label elsewhere": (
        lambda c: save(c.label, label_array(), moved([0, 0, 2.5])),
        "label map '{label}' has another field of view than '{image}'",
    ),
    "label with larger voxels": (
        lambda c: save(c.label, label_array(), scaled([1, 1, 1.02])),
        "label map '{label}' has another field of view than '{image}'",
    ),
    "label turned": (
        lambda c: save(c.label, label_array(), turned(3)),
        "label map '{label}' has another field of view than '{image}'",
    ),
    "label mirrored": (
        lambda c: save(c.label, label_array(), AFFINE * [-1, 1, 1, 1]),
        "label map '{label}' has another field of view than '{image}'",
    ),
}


def set_first_axis(path, length):
    """Write another length of the first axis into the header."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[42:44] = np.array(length, "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))


@pytest.mark.parametrize("length", [0, -5])
def test_axes_without_voxels(volume, length):
    set_first_axis(volume.image, length)
    (problem,) = check_case(Case(volume.image), in_full=True)
    assert problem.startswith(f"image '{volume.image}' has shape ({length}, 16, 32), must be a volume (X, Y, Z) or")


@pytest.mark.parametrize("in_full", [False, True])
@pytest.mark.parametrize(("change", "says"), HEADERS.values(), ids=HEADERS)
def test_broken_headers(case, change, says, in_full):
    change(case)
    bare = Case(case.image, case.label)
    problems = check_case(bare, in_full=in_full)
    assert len(problems) == 1 and "\n" not in problems[0]
    assert problems[0].startswith(says.format(image=case.image, label=case.label))


@pytest.mark.parametrize("axis", range(3))
def test_half_a_voxel_of_the_image_is_the_limit(volume, latent, axis):
    for case, limit in ((volume, 0.5), (latent, 2.0)):
        for share, is_wrong in ((0.9, False), (1.1, True)):
            shift = np.zeros(3)
            shift[axis] = share * limit
            save(case.label, label_array(), moved(shift))
            assert bool(check_case(case)) is is_wrong
    # Of one with its volume's affine, half a voxel of the volume.
    save_latent(latent.image, affine=AFFINE)
    for share, is_wrong in ((0.9, False), (1.1, True)):
        shift = np.zeros(3)
        shift[axis] = share * 0.5
        save(latent.label, label_array(), moved(shift))
        assert bool(check_case(latent)) is is_wrong


def test_a_latent_whose_affine_is_neither(latent):
    save_latent(latent.image, affine=AFFINE @ np.diag([4, 4, 4, 1]))  # first voxel's origin, and larger voxels
    assert check_case(latent) == [], "1.5 voxels of the volume off, where half a voxel of the latent is 2"
    save_latent(latent.image, affine=AFFINE @ np.diag([2, 2, 2, 1]))
    assert "another field of view" in check_case(latent)[0]


def test_broken_affines(case):
    for path, name in ((case.image, "image"), (case.label, "label map")):
        good = path.read_bytes()
        image = nib.load(path)
        image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
        image.header.set_sform(np.diag([1.0, 0, 1, 1]), code=1)
        raw = bytearray(image.to_bytes())
        raw[280:328] = np.diag([1.0, 0, 1, 1])[:3].astype("<f4").tobytes()
        path.write_bytes(gzip.compress(bytes(raw)))
        (problem,) = check_case(Case(case.image, case.label))
        assert problem.startswith(f"{name} '{path}' has affine [[1.0, 0.0, 0.0, 0.0]") and "invertible" in problem
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        ({"dim": (16, 24, 32)}, '"dim" is (16, 24, 32), but {of} has (24, 16, 32) voxels in RAS+: correct it'),
        (
            {"spacing": (2.0, 2.0, 3.04)},
            '"spacing" is (2.0, 2.0, 3.04), but {of} has (2.0, 2.0, 3.0) mm in RAS+: correct it',
        ),
    ],
)
def test_what_the_list_says(case, listed, says):
    (problem,) = check_case(replace(case, **listed))
    of = f"image '{case.image}'" if case.image.name == "ct.nii.gz" else f"label map '{case.label}'"
    assert problem.startswith(says.format(of=of))
    assert check_case(replace(case, spacing=(2.0, 2.0, 3.02))) == [], "within 1 %"


def with_nan(path):
    data = np.asarray(nib.load(path).dataobj).astype(np.float32)
    data.flat[7] = np.nan
    save(path, data, nib.load(path).affine)


def cut(path):
    image = nib.load(path)
    rng = np.random.default_rng(0)
    save(path, rng.integers(0, 120, image.shape).astype(image.get_data_dtype()), image.affine)
    path.write_bytes(path.read_bytes()[:-500])


def with_labels(change):
    def save_changed(case):
        labels = label_array().astype(np.int16)
        change(labels)
        save(case.label, labels)

    return save_changed


def set_label(old, new):
    def change(labels):
        labels[labels == old] = new

    return with_labels(change)


VOXELS = {
    "image not finite": (lambda c: with_nan(c.image), "image '{image}' has NaN or infinite voxels: make it again"),
    "image cut short": (lambda c: cut(c.image), "image '{image}' is damaged or cut short ("),
    "image complex": (
        lambda c: save(c.image, nib.load(c.image).get_fdata().astype(np.complex64), nib.load(c.image).affine),
        "image '{image}' has data type complex64, must be real numbers",
    ),
    "label cut short": (lambda c: cut(c.label), "label map '{label}' is damaged or cut short ("),
    "label floating": (
        lambda c: save(c.label, label_array().astype(np.float32)),
        "label map '{label}' holds floating-point labels, must hold integers: make it again as uint8",
    ),
    "label negative": (set_label(26, -1), "label map '{label}' holds labels from -1 to 200, must be 0..255"),
    "label too large": (set_label(26, 300), "label map '{label}' holds labels from 0 to 300, must be 0..255"),
    "label unknown": (set_label(26, 133), "label map '{label}' holds labels [133], must be of MAISI's vocabulary"),
    "no body": (set_label(200, 0), "label map '{label}' has no body label (200), which the released ControlNets need"),
    "another top": (
        set_label(28, 22),
        "\"top_region_index\" is (0, 1, 0, 0) (thorax), but the labels of label map '{label}' say (1, 0, 0, 0) "
        "(head-neck): correct it",
    ),
    "another bottom": (
        set_label(93, 200),
        "\"bottom_region_index\" is (0, 0, 0, 1) (pelvis-lower), but the labels of label map '{label}' say "
        "(0, 0, 1, 0) (abdomen): correct it",
    ),
}


@pytest.mark.parametrize(("change", "says"), VOXELS.values(), ids=VOXELS)
def test_broken_voxels(case, change, says):
    change(case)
    assert check_case(case) == [], "headers alone do not tell"
    problems = check_case(case, in_full=True)
    assert len(problems) == 1 and "\n" not in problems[0]
    assert problems[0].startswith(says.format(image=case.image, label=case.label))


def test_sizes_of_what_is_not_there(volume):
    """Of the controllable anatomy, the label map has a liver and a hepatic tumor."""
    sizes = [-1.0, 0.5, *[-1.0] * 5, 0.0, -1.0, -1.0]
    assert check_case(replace(volume, organ_size=tuple(sizes)), in_full=True) == []
    wrong = replace(volume, organ_size=(-1.0, -1.0, 0.3, *sizes[3:]))
    assert check_case(wrong) == []
    liver, stomach = check_case(wrong, in_full=True)
    assert liver.startswith(f"\"organ_size\" is -1 for 'liver', but label map '{volume.label}' has one: correct it")
    assert stomach.startswith(f"\"organ_size\" is 0.3 for 'stomach', but label map '{volume.label}' has none: correct")


def test_a_header_that_promises_more_than_fits_in_memory(volume):
    raw = bytearray(gzip.decompress(volume.image.read_bytes()))
    raw[42:48] = np.full(3, 30_000, "<i2").tobytes()  # voxels along each axis
    volume.image.write_bytes(gzip.compress(bytes(raw)))
    (problem,) = check_case(Case(volume.image), in_full=True)
    assert problem.startswith(f"image '{volume.image}' is damaged or cut short (")


def test_several_problems_of_a_case(volume):
    set_label(200, 0)(volume)
    with_nan(volume.image)
    problems = check_case(replace(volume, dim=(1, 1, 1), spacing=(9.0, 9.0, 9.0)), in_full=True)
    assert ["dim" in problems[0], "spacing" in problems[1], "NaN" in problems[2], "body" in problems[3]] == [True] * 4


def test_new_classes_are_in_the_vocabulary(volume):
    set_label(26, 129)(volume)
    data_list = DataList([volume], {"kidney tumor": 129}, {"kidney tumor": ["left kidney"]})
    assert check_cases(data_list, in_full=True) == []


def test_entries_are_numbered(volume, latent):
    data_list = DataList([volume, replace(latent, dim=(1, 1, 1)), Case(volume.image.with_name("gone.nii"))])
    problems = check_cases(data_list)
    assert [problem.split(": ")[0] for problem in problems] == ["entry 1", "entry 2"]
    assert problems[0].startswith('entry 1: "dim" is') and "gone.nii' does not exist" in problems[1]


def test_images_listed_twice(volume, latent, tmp_path):
    link = tmp_path / "link.nii.gz"
    link.symlink_to(volume.image)
    data_list = DataList([volume, latent, volume, replace(volume, image=link)])
    assert check_cases(data_list) == [], "a training may repeat them"
    assert check_cases(data_list, in_full=True) == [
        f"entry 2: image '{volume.image}' is entry 0's too: take one of the two out",
        f"entry 3: image '{link}' is entry 0's too: take one of the two out",
    ]


def test_quick_reads_headers_alone(tmp_path):
    shape = (256, 256, 128)
    case = Case(save(tmp_path / "ct.nii.gz", np.zeros(shape, np.int16)))
    tracemalloc.start()
    assert check_case(replace(case, label=case.image)) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6, "the voxels would be 16.8 MB"


def test_entries_that_cannot_be_read_are_apart(tmp_path):
    path = tmp_path / "list.json"
    entries = [{"image": "a.nii.gz"}, {"image": "b.nii.gz", "dim": 3}, {"image": "c.nii.gz"}, "d"]
    path.write_text(json.dumps({"training": entries, "label_names": {"kidney tumor": 129}}))
    cases, head, problems = read_entries(path)
    assert cases == {0: Case(tmp_path / "a.nii.gz"), 2: Case(tmp_path / "c.nii.gz")}
    assert head == DataList([], {"kidney tumor": 129})
    assert [number for number, _ in problems] == [1, 3] and '"dim" is 3' in problems[0][1]


def test_new_classes_that_are_none_beside_broken_entries(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps({"training": [3], "label_names": ["kidney tumor"]}))
    with pytest.raises(ValueError, match="label_names is .* must hold names and values"):
        read_entries(tmp_path / "list.json")


@pytest.mark.parametrize("content", ["{", "[]", '"a"', '{"training": 3}', '{"training": []}', "{}"])
def test_lists_that_are_none(tmp_path, content):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match="is no JSON file|has no cases"):
        read_entries(tmp_path / "list.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_entries(tmp_path / "missing.json")
