"""What counts as too little memory."""

import pytest
import torch

from maisi_diffusers.memory import free_memory, is_out_of_memory, usable_memory


def test_free_memory():
    free = free_memory(torch.device("cpu"))
    assert 0 < usable_memory(torch.device("cpu")) < free < 2**50


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1.5 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_what_says_so(error, expected):
    assert is_out_of_memory(error) == expected


def test_what_the_cpu_says():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
