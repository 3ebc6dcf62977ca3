import pytest
import torch

from maisi_diffusers.anatomy import label_bits


def naive_bits(labels: torch.Tensor) -> torch.Tensor:
    bits = torch.zeros(labels.shape[0], 8, *labels.shape[1:])
    for index in torch.cartesian_prod(*(torch.arange(n) for n in labels.shape)):
        n, *voxel = index.tolist()
        for place, digit in enumerate(reversed(format(int(labels[n, *voxel]), "08b"))):
            bits[n, place, *voxel] = float(digit)
    return bits


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_matches_binary_digits(dtype):
    labels = torch.randperm(256, generator=torch.Generator().manual_seed(0)).reshape(2, 4, 4, 8).to(dtype)
    expected = naive_bits(labels)
    assert torch.equal(label_bits(labels), expected)
    assert torch.equal(label_bits(labels.unsqueeze(1)), expected)
    assert torch.equal((label_bits(labels) * 2.0 ** torch.arange(8).view(1, 8, 1, 1, 1)).sum(1), labels.float())


def test_least_significant_bit_is_the_first_channel():
    assert label_bits(torch.tensor([1, 200]).view(2, 1, 1, 1)).flatten(1).tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 1, 1],
    ]


def test_data_type():
    assert label_bits(torch.ones(1, 1, 2, 2, 2, dtype=torch.uint8), torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 2, 2, dtype=torch.uint8), r"\(2, 2, 2\)"),
        (torch.zeros(1, 3, 2, 2, 2, dtype=torch.uint8), r"\(1, 3, 2, 2, 2\)"),
        (torch.zeros(1, 2, 2, 2), "float32.*to\\(torch.uint8\\)"),
        (torch.full((1, 2, 2, 2), 256), "256.*0..255"),
        (torch.full((1, 2, 2, 2), -1), "-1.*0..255"),
    ],
)
def test_bad_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        label_bits(labels)
