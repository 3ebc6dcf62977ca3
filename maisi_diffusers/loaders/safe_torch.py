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
        # In the unpickler's words for a refused name.
        raise pickle.UnpicklingError(f"GLOBAL numpy.dtype[{dtype.code}] is not of a number")
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

    What else the process has allowed `torch.load` to make, which importing MONAI does, is refused all the same.

    Args:
        path: a `.pt` file.

    Returns:
        what the file holds, on the CPU.

    Raises:
        OSError: for a file that cannot be opened.
        ValueError: for a truncated or foreign file, and for one that wants any other Python object; names it.
    """
    allowed_elsewhere = torch.serialization.get_safe_globals()
    with open(path, "rb") as file:
        torch.serialization.clear_safe_globals()
        try:
            with torch.serialization.safe_globals(STAND_INS):
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that are no checkpoint fail anywhere in the reader, in any way
            refused = re.search(r"GLOBAL (\S+)", str(error))
            if refused is None:
                raise ValueError(
                    f"{path} is not a PyTorch checkpoint, or is truncated or a Git LFS pointer: download it again, "
                    "in a clone by `git lfs pull`"
                ) from error
            raise ValueError(
                f"{path} wants the Python object {refused.group(1)}, which could run code, and is refused: only "
                "tensors and plain values are read; ask its author for a file that holds nothing else"
            ) from error
        finally:
            torch.serialization.add_safe_globals(allowed_elsewhere)
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}, not a dictionary of weights: give a MAISI checkpoint"
        )
    return checkpoint
