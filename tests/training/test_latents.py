"""Latents as the published recipe makes them, with MONAI as the yardstick, and as files."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    Resized,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentiles,
)

from maisi_diffusers.imaging import load_volume, modality_code, to_ras
from maisi_diffusers.loaders import load_maisi_checkpoint
from maisi_diffusers.training.latents import (
    draw_latent,
    encode_volume,
    load_latent,
    nearest_multiple,
    resize_volume,
    save_latent,
    to_intensities,
)
from tests.loaders.conftest import networks, published  # noqa: F401, fixtures
from tests.tiny import make_pipeline, seeded

CT = modality_code("ct")


@pytest.fixture(scope="module")
def vae():
    return make_pipeline(with_mask_networks=False).vae


@pytest.fixture(scope="module")
def ct_file(torso_ct, tmp_path_factory):
    """A part of the real CT, in LPS as scanners write it."""
    image = load_volume(torso_ct).slicer[20:81, 25:76, 30:82]
    path = tmp_path_factory.mktemp("ct") / "ct.nii.gz"
    image.as_reoriented(nib.orientations.axcodes2ornt(("L", "P", "S"))).to_filename(path)
    return path


@pytest.fixture
def volume():
    """A volume off the origin, with unequal voxels and a rotation."""
    affine = nib.affines.from_matvec(np.diag([2.0, 1.5, 3.0]), [-10.0, 20.0, -30.0])
    affine[:3, :3] = [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]] @ affine[:3, :3]
    return nib.Nifti1Image(np.zeros((16, 24, 8), np.float32), affine)


@pytest.fixture
def moments():
    return torch.randn(8, 4, 6, 2, generator=seeded())


def test_nearest_multiple():
    assert nearest_multiple((122, 101, 112), 128) == (128, 128, 128)
    assert nearest_multiple((512, 512, 300), 128) == (512, 512, 256)
    assert nearest_multiple((20, 33, 47), 32) == (32, 32, 32)
    assert nearest_multiple((192, 320, 448), 128) == (256, 256, 512)  # half-way


def test_equals_the_published_recipe(ct_file, published, networks):  # noqa: F811
    size = nearest_multiple(load_volume(ct_file).shape, 32)
    transforms = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            ScaleIntensityRanged("image", a_min=-1000, a_max=1000, b_min=0, b_max=1, clip=True),
            Resized("image", spatial_size=size, mode="trilinear"),
        ]
    )
    expected_volume = transforms({"image": ct_file})["image"].as_tensor()
    with torch.no_grad():
        mean, std = networks["vae"].encode(expected_volume[None])

    volume = resize_volume(to_intensities(to_ras(load_volume(ct_file)), CT), size)
    assert np.abs(volume.dataobj - expected_volume[0].numpy()).max() < 1e-5
    moments = encode_volume(load_maisi_checkpoint(published, "rflow-ct")["vae"], volume)
    assert moments.shape == (8, 16, 16, 16) and moments.dtype == torch.float32 and mean.std() > 0.1
    assert (moments[:4] - mean[0]).abs().max() < 1e-4 * mean.abs().max()
    assert (torch.exp(0.5 * moments[4:]) - std[0]).abs().max() < 1e-4 * std.abs().max()


def test_resizing_keeps_the_field_of_view(ct_file):
    image = to_ras(load_volume(ct_file))
    resized = resize_volume(image, (32, 64, 96))
    assert resized.shape == (32, 64, 96)
    for corner in ((0, 0, 0), (1, 1, 1)):
        before, after = (
            nib.affines.apply_affine(i.affine, np.multiply(corner, i.shape) - 0.5) for i in (image, resized)
        )
        np.testing.assert_allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.float32])
def test_ct_intensities(dtype):
    hu = np.array([0, 500, 1000, 3000], dtype).reshape(1, 2, 2)
    image = to_intensities(nib.Nifti1Image(hu, np.eye(4), dtype=dtype), CT)
    assert image.get_data_dtype() == np.float32
    assert np.asarray(image.dataobj).ravel().tolist() == [0.5, 0.75, 1.0, 1.0]


def test_mr_intensities_equal_the_published_ones():
    data = np.random.default_rng(0).gamma(2.0, 100.0, (20, 30, 10)).astype(np.float32)
    expected = ScaleIntensityRangePercentiles(lower=0, upper=99.5, b_min=0, b_max=1, clip=False)(data)
    image = to_intensities(nib.Nifti1Image(data, np.eye(4)), modality_code("mri_t1"))
    found = np.asarray(image.dataobj)
    assert found.dtype == np.float32 and found.min() == 0 and found.max() > 1.2
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_mr_without_contrast():
    data = np.zeros((10, 10, 10), np.float32)
    data[0, 0, 0] = 1000.0
    with pytest.raises(ValueError, match="The MR volume is 0 up to its 99.5th percentile"):
        to_intensities(nib.Nifti1Image(data, np.eye(4)), modality_code("mri"))


def test_draw_equals_the_models(vae):
    image = nib.Nifti1Image(np.random.default_rng(0).random((16, 8, 8), np.float32), np.eye(4))
    moments = encode_volume(vae, image)
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(image.get_fdata(dtype=np.float32))[None, None]).latent_dist
    assert torch.equal(draw_latent(moments, seeded(7)), posterior.sample(seeded(7))[0])
    assert torch.equal(draw_latent(moments), posterior.mode()[0])
    assert not torch.equal(draw_latent(moments, seeded(8)), draw_latent(moments, seeded(7)))


def test_half_precision_is_stored_as_float32(vae):
    image = nib.Nifti1Image(np.random.default_rng(0).random((8, 8, 8), np.float32), np.eye(4))
    half = make_pipeline(with_mask_networks=False).vae.to(torch.bfloat16)
    expected, found = encode_volume(vae, image), encode_volume(half, image)
    assert found.dtype == torch.float32 and 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_values_that_are_not_finite_are_refused():
    vae = make_pipeline(with_mask_networks=False).vae
    vae.quant_conv.bias.data[5] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite values in torch.float32"):
        encode_volume(vae, nib.Nifti1Image(np.zeros((8, 8, 8), np.float32), np.eye(4)))


@pytest.mark.parametrize("channels", [4, 8])
def test_file_in_the_published_layout(tmp_path, volume, moments, channels):
    path = tmp_path / "case" / "ct_emb.nii.gz"
    save_latent(path, moments[:channels], volume, "MAISI latent: test")
    image = nib.load(path)
    assert image.shape == (4, 6, 2, channels) and image.get_data_dtype() == np.float32
    assert np.array_equal(image.dataobj, moments[:channels].movedim(0, -1))
    assert image.header["descrip"].item() == b"MAISI latent: test"
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header["sform_code"] == image.header["qform_code"] == 1
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
    np.testing.assert_allclose(nib.affines.voxel_sizes(image.affine), (8.0, 6.0, 12.0), rtol=1e-6)
    for corner in ((0, 0, 0), (1, 1, 1), (1, 0, 0)):
        outer = [nib.affines.apply_affine(i.affine, np.multiply(corner, i.shape[:3]) - 0.5) for i in (volume, image)]
        np.testing.assert_allclose(outer[1], outer[0], atol=1e-4)
    assert [file.name for file in path.parent.iterdir()] == ["ct_emb.nii.gz"]


def test_latent_comes_back(tmp_path, volume, moments):
    save_latent(tmp_path / "a.nii.gz", moments[:4], volume)
    latent = load_latent(tmp_path / "a.nii.gz", generator=seeded())
    assert latent.dtype == torch.float32 and latent.is_contiguous() and torch.equal(latent, moments[:4])


def test_moments_are_drawn_from(tmp_path, volume, moments):
    moments[5] = 100.0
    save_latent(tmp_path / "a.nii.gz", moments, volume)
    assert torch.equal(load_latent(tmp_path / "a.nii.gz"), moments[:4])
    noise = torch.randn(moments[:4].shape, generator=seeded(3))
    drawn = load_latent(tmp_path / "a.nii.gz", generator=seeded(3))
    assert torch.equal(drawn[[0, 2, 3]], (moments[:4] + torch.exp(0.5 * moments[4:]) * noise)[[0, 2, 3]])
    assert torch.equal(drawn[1], moments[1] + torch.exp(torch.tensor(10.0)) * noise[1])  # as in the model, 20 at most


def test_other_number_of_channels(tmp_path, volume, moments):
    save_latent(tmp_path / "a.nii.gz", moments, volume)
    assert torch.equal(load_latent(tmp_path / "a.nii.gz", latent_channels=8), moments)


@pytest.mark.parametrize("axes", ["LPS", "SRP"])
def test_orientation(tmp_path, volume, moments, axes):
    save_latent(tmp_path / "a.nii.gz", moments, volume)
    image = nib.load(tmp_path / "a.nii.gz")
    ras, other = (nib.orientations.axcodes2ornt(tuple(codes)) for codes in ("RAS", axes))
    image.as_reoriented(nib.orientations.ornt_transform(ras, other)).to_filename(tmp_path / "b.nii.gz")
    assert nib.aff2axcodes(nib.load(tmp_path / "b.nii.gz").affine) == tuple(axes)
    assert torch.equal(load_latent(tmp_path / "b.nii.gz", generator=seeded()), draw_latent(moments, seeded()))


@pytest.mark.parametrize(
    ("shape", "says"),
    [((4, 4, 4), r"shape \(4, 4, 4\)"), ((4, 4, 4, 5), r"\(4, 4, 4, 5\).*\(X, Y, Z, 4\).*\(X, Y, Z, 8\)")],
)
def test_wrong_shape(tmp_path, shape, says):
    nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)).to_filename(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=rf"a\.nii\.gz' has.*{says}"):
        load_latent(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_in_a_file_that_are_not_finite(tmp_path, volume, moments, value):
    moments[6, 1, 2, 1] = value
    save_latent(tmp_path / "a.nii.gz", moments, volume)
    with pytest.raises(ValueError, match=r"a\.nii\.gz' has NaN or infinite values"):
        load_latent(tmp_path / "a.nii.gz")


def test_no_latent(tmp_path, volume, moments):
    with pytest.raises(FileNotFoundError, match=r"a\.nii\.gz'; encode the data list"):
        load_latent(tmp_path / "a.nii.gz")
    save_latent(tmp_path / "a.nii.gz", moments, volume)
    whole = (tmp_path / "a.nii.gz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no image"):
        (tmp_path / "a.nii.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.nii\.gz' is no latent or is cut short") as error:
            load_latent(tmp_path / "a.nii.gz")
        assert "\n" not in str(error.value)
