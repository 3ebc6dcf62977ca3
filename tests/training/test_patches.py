import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.transforms import DivisiblePad, ResizeWithPadOrCrop, ScaleIntensityRangePercentiles
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from maisi_diffusers.training.data_list import Case
from maisi_diffusers.training.patches import PLANES, Augmentation, LabelMap, LabelPatchDataset, PatchDataset, Volume
from tests.tiny import make_label_map, seeded

SHAPE = (24, 30, 21)


def save(path, voxels, affine=None):
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


@pytest.fixture
def cases(tmp_path):
    """Three CTs of different values, so that no two patches are the same."""
    generator = np.random.default_rng(0)
    return [
        Case(save(tmp_path / f"{i}.nii.gz", generator.integers(-1000, 1000, SHAPE, dtype=np.int16))) for i in range(3)
    ]


def ct(shape=SHAPE, seed=0):
    """A smooth volume of intensities 0..1, and the same as tensor (1, 1, X, Y, Z)."""
    noise = torch.rand((1, 1, *(n // 3 for n in shape)), generator=seeded(seed))
    intensities = F.interpolate(noise, size=shape, mode="trilinear")
    return Volume(intensities[0, 0].numpy() * 2000 - 1000, code=1), intensities


def unique():
    """A volume whose voxels all differ, and its intensities (X, Y, Z)."""
    voxels = torch.randperm(12 * 13 * 14, generator=seeded()).reshape(12, 13, 14) * 0.9 - 1000
    return Volume(voxels.numpy(), code=1), (voxels + 1000) / 2000


# Datasets


def test_items_are_patches_of_the_right_kind(cases):
    dataset = PatchDataset(cases, (12, 16, 8), augmentation="full", patches_per_case=2)
    assert len(dataset) == 6
    for index, item in enumerate(dataset[i] for i in range(6)):
        assert item["image"].shape == (1, 12, 16, 8) and item["image"].dtype == torch.float32
        assert item["index"].dtype == torch.int64 and item["index"] == index


def test_items_depend_on_seed_epoch_and_index_alone(cases):
    dataset = PatchDataset(cases, 12, augmentation="full", seed=5, patches_per_case=2)
    first = [dataset[i]["image"] for i in range(6)]
    cached = PatchDataset(cases, 12, augmentation="full", seed=5, patches_per_case=2, cached_cases=2)
    for i in (4, 0, 5, 1, 3, 2):
        assert torch.equal(cached[i]["image"], first[i])
    assert not torch.equal(first[0], first[1])
    dataset.set_epoch(1)
    assert not torch.equal(dataset[0]["image"], first[0])
    dataset.set_epoch(0)
    assert torch.equal(dataset[0]["image"], first[0])
    assert not torch.equal(PatchDataset(cases, 12, augmentation="full", seed=6)[0]["image"], first[0])


def test_workers_that_outlive_an_epoch_draw_anew(cases):
    dataset = PatchDataset(cases, 12, augmentation="full")
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        images = torch.cat([batch["image"] for batch in loader])
        assert torch.equal(images, torch.stack([dataset[i]["image"] for i in range(3)]))


def test_cached_volumes_are_not_read_again(cases):
    dataset = PatchDataset(cases, 12, augmentation="full", patches_per_case=2, cached_cases=2)
    for case in cases:
        case.image.unlink()
    for i in range(4):
        assert dataset[i]["image"].shape == (1, 12, 12, 12)
    with pytest.raises(FileNotFoundError, match="2.nii.gz"):
        dataset[4]


def test_volumes_come_to_ras_from_any_orientation_and_byte_order(tmp_path):
    voxels = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
    ras = save(tmp_path / "ras.nii", voxels)
    affine = np.array([[0, 0, -1, SHAPE[0] - 1], [0, -1, 0, SHAPE[1] - 1], [1, 0, 0, 0], [0, 0, 0, 1]])
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(voxels.transpose(2, 1, 0)[:, ::-1, ::-1], affine, header)
    nib.save(image, tmp_path / "spl.nii")
    assert nib.load(tmp_path / "spl.nii").dataobj.dtype == ">i2"
    items = [PatchDataset([Case(path)], 12, "full", seed=3)[0]["image"] for path in (ras, tmp_path / "spl.nii")]
    assert torch.equal(*items)


@pytest.mark.parametrize("modality", ["ct", "mri_t1"])
def test_intensities_as_published(tmp_path, modality):
    voxels = np.random.default_rng(0).gamma(2.0, 300.0, SHAPE).astype(np.float32) - 1200
    case = Case(save(tmp_path / "image.nii", voxels), modality=modality)
    image = PatchDataset([case], None, augmentation="none")[0]["image"]
    if modality == "ct":
        expected = torch.from_numpy(((voxels + 1000) / 2000).clip(0, 1))
        assert image.min() == 0 and image.max() == 1
    else:
        expected = ScaleIntensityRangePercentiles(0, 99.5, 0, 1)(voxels)
        assert image.max() > 1
    torch.testing.assert_close(image[0, :, 1:-1, 2:-1], torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


def test_mr_of_one_value_is_all_zero(tmp_path):
    case = Case(save(tmp_path / "image.nii", np.full((8, 8, 8), 7, np.int16)), modality="mri")
    assert not PatchDataset([case], 8, augmentation="none")[0]["image"].any()


@pytest.mark.parametrize("patch_size", [None, (12, 36, 12), 20])
def test_validation_takes_the_middle_or_the_whole_as_published(cases, patch_size):
    dataset = PatchDataset(cases, patch_size, augmentation="none", cached_cases=1)
    intensities = (nib.load(cases[0].image).get_fdata()[None] + 1000) / 2000
    published = DivisiblePad(4) if patch_size is None else ResizeWithPadOrCrop(dataset.patch_size)
    expected = torch.as_tensor(published(intensities), dtype=torch.float32)
    image = dataset[0]["image"]
    assert image.shape == expected.shape
    # Of an odd number of voxels, the odd one is on the other side.
    error = min((image.roll(shift, 3) - expected).abs().mean() for shift in (-1, 0, 1))
    assert error < 1e-6
    dataset.set_epoch(1)
    assert torch.equal(dataset[0]["image"], image)


@pytest.mark.parametrize(
    ("patch_size", "augmentation", "message"),
    [
        (30, "full", r"patch_size=\(30, 30, 30\) is not allowed: give multiples of 4"),
        ((32, 32), "full", r"patch_size=\(32, 32\) is not allowed"),
        (0, "none", r"patch_size=\(0, 0, 0\) is not allowed"),
        (None, "full", "patch_size=None takes whole volumes"),
    ],
)
def test_refused_patch_sizes(cases, patch_size, augmentation, message):
    with pytest.raises(ValueError, match=message):
        PatchDataset(cases, patch_size, augmentation)


def test_refused_files_are_named(cases, tmp_path):
    cases.append(Case(tmp_path / "none.nii.gz"))
    with pytest.raises(FileNotFoundError, match=r"1 of the 4 images do not exist, '.*none.nii.gz' first"):
        PatchDataset(cases, 12, augmentation="full")
    cases[3].image.write_bytes(cases[0].image.read_bytes()[:9000])
    dataset = PatchDataset(cases, 12, augmentation="full")
    with pytest.raises(ValueError, match="none.nii.gz.* is damaged or cut short"):
        dataset[3]
    with pytest.raises(ValueError, match="none.nii.gz"):
        PatchDataset(cases, 12, augmentation="full", cached_cases=4)


# Augmentation


def test_draws_are_as_likely_and_as_large_as_published():
    generator = seeded()
    draws = [Augmentation.draw(generator) for _ in range(3000)]

    def share(happened):
        return pytest.approx(np.mean([happened(draw) for draw in draws]), abs=0.03)

    for axis in range(3):
        assert share(lambda draw, axis=axis: axis in draw.flips) == 0.5
    for plane in PLANES:
        quarters = [turn[2] for draw in draws for turn in draw.turns if turn[:2] == plane]
        assert pytest.approx(len(quarters) / len(draws), abs=0.03) == 0.5
        assert np.bincount(quarters, minlength=4) / len(quarters) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.05)
    for name, low, high in [("zoom", 0.5, 1.5), ("scale", 0.9, 1.1), ("shift", -0.05, 0.05)]:
        neutral = getattr(Augmentation(), name)
        values = np.array([getattr(draw, name) for draw in draws])
        values = values[values != neutral]
        assert pytest.approx(len(values) / len(draws), abs=0.03) == 0.3
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high >= values.max() > high - 0.02 * (high - low)
    angles = np.array([draw.angles for draw in draws if any(draw.angles)])
    assert pytest.approx(len(angles) / len(draws), abs=0.03) == 0.3
    assert np.abs(angles).max() <= 0.1 and angles.std(0) == pytest.approx(0.2 / 12**0.5, rel=0.1)


def test_nothing_drawn_is_a_crop_and_every_place_can_be_had():
    volume, intensities = unique()
    seen = set()
    for fraction in np.linspace(0, 1, 20, endpoint=False):
        patch = Augmentation().patch(volume, (8, 12, 4), [fraction, 0.999, 0.5])
        x, y, z = (i.item() for i in (intensities == patch[0, 0, 0, 0]).nonzero()[0])
        assert torch.equal(patch[0], intensities[x : x + 8, y : y + 12, z : z + 4])
        assert (y, z) == (1, 5)
        seen.add(x)
    assert seen == {0, 1, 2, 3, 4}


def test_crops_are_voxels_of_the_volume(cases):
    """Without zoom, turn, flip or change of intensity: each is found in it."""
    volume = PatchDataset(cases, None, augmentation="none")[0]["image"][0]
    dataset = PatchDataset(cases[:1], 8, augmentation="crop", patches_per_case=6)
    windows = volume.unfold(0, 8, 1).unfold(1, 8, 1).unfold(2, 8, 1)
    for i in range(6):
        assert (windows == dataset[i]["image"][0]).flatten(3).all(-1).any()


def test_unknown_augmentation(cases):
    with pytest.raises(ValueError, match="augmentation='some' is unknown: use one of full, crop, none"):
        PatchDataset(cases, 8, augmentation="some")


def test_items_are_from_everywhere_alike(tmp_path, monkeypatch):
    ramp = np.broadcast_to(np.arange(16, dtype=np.int16), (4, 4, 16)).copy()
    dataset = PatchDataset([Case(save(tmp_path / "ramp.nii", ramp))], 4, "full", patches_per_case=600, cached_cases=1)
    monkeypatch.setattr(Augmentation, "draw", lambda generator: Augmentation())
    starts = [round(dataset[i]["image"][0, 0, 0, 0].item() * 2000 - 1000) for i in range(600)]
    assert np.bincount(starts) / 600 == pytest.approx([1 / 13] * 13, abs=0.04)


@pytest.mark.parametrize("flips", [(), (0,), (1, 2)])
@pytest.mark.parametrize("turns", [(), ((0, 1, 1),), ((0, 1, 2), (1, 2, 3), (0, 2, 1))])
def test_flips_and_turns_move_voxels_and_leave_the_size(flips, turns):
    volume, intensities = unique()
    size = (8, 12, 4)
    patch = Augmentation(flips=flips, turns=turns).patch(volume, size, [0.5, 0.5, 0.5])
    assert patch.shape == (1, *size)
    places = torch.stack([(intensities == value).nonzero()[0] for value in patch.flatten()])
    low, high = places.amin(0), places.amax(0)
    # All voxels of a box, each of them once.
    assert (high - low + 1).prod() == len(places.unique(dim=0)) == patch.numel()
    box = intensities[tuple(slice(a, b + 1) for a, b in zip(low, high))]
    assert torch.equal(box.flatten().sort().values, patch.flatten().sort().values)
    expected = box.flip(flips) if flips else box
    for first, second, quarters in turns:
        expected = torch.rot90(expected, quarters, (first, second))
    assert torch.equal(patch[0], expected)


@pytest.mark.parametrize("zoom", [0.5, 0.8, 1.25, 1.5])
def test_zoom_equals_zooming_the_volume_and_cropping(zoom):
    shape, size = (40, 60, 80), (16, 20, 24)
    volume, intensities = ct(shape)
    zoomed = F.interpolate(intensities, scale_factor=zoom, mode="trilinear", recompute_scale_factor=True)[0]
    for start in [(0, 0, 0), (3, 5, 7), [length - n for length, n in zip(zoomed.shape[1:], size)]]:
        place = [s / (length * zoom - n) if length * zoom > n else 0.0 for s, length, n in zip(start, shape, size)]
        patch = Augmentation(zoom=zoom).patch(volume, size, place)
        expected = zoomed[(slice(None), *(slice(s, s + n) for s, n in zip(start, size)))]
        torch.testing.assert_close(patch, expected, rtol=0, atol=2e-5)


def test_rotation_is_about_the_middle_of_the_patch_and_rigid():
    volume, intensities = ct((40, 44, 48))
    angles, zoom, size = (0.1, -0.07, 0.04), 1.2, np.array((20, 16, 24))
    patch = Augmentation(zoom=zoom, angles=angles).patch(volume, tuple(size.tolist()), [0.5, 0.5, 0.5])
    matrix = Rotation.from_euler("xyz", angles).as_matrix() / zoom
    offset = (np.array([40, 44, 48]) - 1) / 2 - matrix @ ((size - 1) / 2)
    expected = affine_transform(intensities[0, 0].numpy(), matrix, offset, tuple(size), order=1)
    torch.testing.assert_close(patch[0], torch.from_numpy(expected), rtol=0, atol=2e-5)
    unrotated = Augmentation(zoom=zoom).patch(volume, tuple(size.tolist()), [0.5, 0.5, 0.5])
    assert (patch - unrotated).abs().max() > 0.05


@pytest.mark.parametrize("place", [0.0, 0.999])
@pytest.mark.parametrize("zoom", [0.5, 1.0, 1.5])
def test_rim_of_the_volume_is_not_mixed_with_what_is_outside(zoom, place):
    volume = Volume(np.full((32, 32, 32), 400, np.int16), code=1)
    patch = Augmentation(zoom=zoom, angles=(0.1, 0.1, -0.1)).patch(volume, (16, 16, 16), [place] * 3)
    torch.testing.assert_close(patch, torch.full_like(patch, 0.7))


@pytest.mark.parametrize("zoom", [1.0, 0.5, 1.5])
def test_small_volumes_lie_in_the_middle_of_air(zoom):
    volume = Volume(np.full((8, 8, 64), 1000, np.int16), code=1)
    patch = Augmentation(zoom=zoom).patch(volume, (32, 32, 32), [0.9, 0.0, 0.5])
    inside = int(8 * zoom)
    assert patch.sum().item() == pytest.approx(inside**2 * 32, rel=0.05)
    begin = (32 - inside) // 2
    core = patch[0, begin + 1 : begin + inside - 1, begin + 1 : begin + inside - 1]
    torch.testing.assert_close(core, torch.ones_like(core))
    assert not patch[0, : begin - 1].any() and not patch[0, :, begin + inside + 1 :].any()


def test_intensities_are_scaled_then_shifted():
    volume, intensities = unique()
    patch = Augmentation(scale=1.1, shift=-0.05).patch(volume, (8, 12, 12), [0, 0, 0])
    torch.testing.assert_close(patch[0], intensities[:8, :12, :12] * 1.1 - 0.05)


# Label maps


@pytest.fixture
def labelled(tmp_path):
    """Three cases whose CTs do not exist, of label maps that differ in the place of the liver."""
    cases = []
    for i in range(3):
        label_map = make_label_map()
        labels = np.asarray(label_map.dataobj)
        labels[2 : 6 + i, 3:9, 20:24] = 1
        nib.save(label_map, tmp_path / f"{i}_label.nii.gz")
        cases.append(Case(tmp_path / f"{i}.nii.gz", tmp_path / f"{i}_label.nii.gz"))
    return cases


def test_patches_of_label_maps(labelled):
    dataset = LabelPatchDataset(labelled, (12, 16, 8), augmentation="full", patches_per_case=40, cached_cases=1)
    seen = set()
    for index in range(len(dataset)):
        item = dataset[index]
        assert item["labels"].shape == (1, 12, 16, 8) and item["labels"].dtype == torch.uint8
        assert item["index"] == index
        seen |= set(item["labels"].unique().tolist())
    assert seen == {0, 1, 26, 28, 93, 200}, "labels are never mixed"
    assert torch.equal(dataset[3]["labels"], LabelPatchDataset(labelled, (12, 16, 8), "full", 0, 40)[3]["labels"])


def test_label_maps_stay_upright():
    generator = seeded()
    draws = [Augmentation.draw_for_labels(generator) for _ in range(1000)]
    assert all((draw.flips, draw.turns, draw.scale, draw.shift) == ((), (), 1.0, 0.0) for draw in draws)
    assert np.mean([draw.zoom != 1 for draw in draws]) == pytest.approx(0.3, abs=0.05)
    assert np.mean([any(draw.angles) for draw in draws]) == pytest.approx(0.3, abs=0.05)


def test_middle_of_a_label_map(labelled):
    dataset = LabelPatchDataset(labelled, (12, 16, 8), augmentation="none")
    expected = np.asarray(nib.load(labelled[0].label).dataobj)[6:18, :, 12:20]
    assert np.array_equal(dataset[0]["labels"][0], expected)
    whole = LabelPatchDataset(labelled, None, augmentation="none")[0]["labels"]
    assert np.array_equal(whole[0], nib.load(labelled[0].label).dataobj)


def test_zoomed_labels_are_the_nearest():
    labels = torch.randint(0, 200, (10, 12, 14), generator=seeded(), dtype=torch.uint8)
    patch = Augmentation(zoom=2.0).patch(LabelMap(labels.numpy()), (20, 24, 28), [0.0, 0.0, 0.0])
    assert torch.equal(patch[0], labels.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_label_maps_that_are_none(labelled, tmp_path):
    with pytest.raises(ValueError, match=r"1 of the 4 cases have no label, that of '.*none.nii.gz' first"):
        LabelPatchDataset([*labelled, Case(tmp_path / "none.nii.gz")], 12, augmentation="full")
    labelled[2].label.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 labels do not exist, '.*2_label.nii.gz' first"):
        LabelPatchDataset(labelled, 12, augmentation="full")
