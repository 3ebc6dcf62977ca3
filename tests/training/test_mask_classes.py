"""Labels and outputs of the mask VAE."""

import nibabel as nib
import numpy as np
import pytest
import torch

from maisi_diffusers.anatomy import MASK_VAE_LABELS
from maisi_diffusers.training.mask_classes import check_mask_labels, load_mask_labels, mask_classes


def test_outputs_stand_for_their_labels():
    labels = torch.tensor(MASK_VAE_LABELS, dtype=torch.uint8).reshape(1, 1, 5, 5, 5)
    assert torch.equal(mask_classes(labels).flatten(), torch.arange(125))
    assert mask_classes(labels).shape == labels.shape


def test_cysts_are_kidney_and_ras(tmp_path):
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[0], labels[1], labels[2], labels[3] = 116, 117, 14, 200
    nib.save(nib.Nifti1Image(labels, np.diag([-2.0, 2, 2, 1])), tmp_path / "labels.nii.gz")
    image = load_mask_labels(tmp_path / "labels.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S") and image.get_data_dtype() == np.uint8
    assert np.asarray(image.dataobj)[:, 0, 0].tolist() == [200, 14, 5, 14]


def test_labels_without_output(tmp_path):
    labels = np.full((4, 4, 4), 200, np.uint8)
    labels[0, 0], labels[1, 1] = 130, 2
    path = tmp_path / "labels.nii.gz"
    nib.save(nib.Nifti1Image(labels, np.eye(4)), path)
    with pytest.raises(ValueError, match=r"labels.nii.gz' has labels \[2, 130\].* new class index 129"):
        load_mask_labels(path)
    check_mask_labels([116, 129, 200], "it")
