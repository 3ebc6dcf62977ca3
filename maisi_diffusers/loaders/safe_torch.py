"""Read a published `.pt` file as data: tensors and plain values, never code."""

import os
import pickle
import re

import numpy as np
import torch


class NumpyDtype:
    """Stands in for `numpy.dtype` while a file is read: only the code and the byte order of a number are kept."""

    def __init__(self, code: str, *flags: bool):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = state[1]


def numpy_scalar(dtype: NumpyDtype, data: bytes) -> bool | int | float:
    """Stands in for numpy's scalar constructor: a number becomes a Python number, anything else is refused."""
    number_type = np.dtype(dtype.code)
    if number_type.kind not in "biuf":
        raise pickle.UnpicklingError(f"numpy scalar of type {dtype.code!r} is not a number")
    return np.frombuffer(data, number_type.newbyteorder(dtype.byte_order), count=1)[0].item()


# What MONAI's training scripts leave in a checkpoint besides tensors, by the name in the pickle. The metadata of its
# tensor class ends up as attributes of a plain tensor, which nothing reads.
STAND_INS = [
    (torch.Tensor, "monai.data.meta_tensor.MetaTensor"),
    (str, "monai.utils.enums.MetaKeys"),
    (str, "monai.utils.enums.SpaceKeys"),
    (NumpyDtype, "numpy.dtype"),
    (numpy_scalar, "numpy.core.multiarray.scalar"),
    (numpy_scalar, "numpy._core.multiarray.scalar"),
]


def load_torch_file(path: str | os.PathLike) -> dict:
    """
    `torch.load(weights_only=True)`, with harmless stand-ins for MONAI's tensor class and numpy's scalars, so that it
    reads files that were saved with them and needs neither MONAI nor trust.

    Args:
        path: a `.pt` file.

    Returns:
        what the file holds, on the CPU.

    Raises:
        ValueError: for a truncated or foreign file, and for one that wants any other Python object; names it.
    """
    try:
        with torch.serialization.safe_globals(STAND_INS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise ValueError(f"{path} is not a PyTorch checkpoint or is damaged: download it again") from error
        raise ValueError(
            f"{path} wants the Python object {refused.group(1)}, which could run code, and is refused: only tensors "
            "and plain values are read; ask its author for a file that holds nothing else"
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is truncated or not a PyTorch checkpoint: download it again") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}, not a dictionary of weights: give a MAISI checkpoint"
        )
    return checkpoint
