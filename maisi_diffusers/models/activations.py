"""Activations of a whole volume, kept where there is room for them and read and written in slabs along X."""

import math
import os
import tempfile

import torch


class Activations:
    """
    Features (1, C, X, Y, Z) of which only a slab at a time is on the device that computes.

    A slab lies in one piece, with the channels of a voxel side by side, as convolutions on the CPU want them.

    Args:
        channels, size: C and (X, Y, Z).
        dtype: of the features.
        device: where slabs are given to.
        folder: where a scratch file is made for them; in the memory of the host if not given.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        folder: str | os.PathLike | None = None,
    ):
        self.channels, self.size, self.dtype, self.device = channels, tuple(size), dtype, device
        self.plane_values = channels * math.prod(size[1:])
        self.plane_bytes = self.plane_values * dtype.itemsize
        self.file = self.memory = None
        if folder is None:
            self.memory = torch.empty((*self.size, channels), dtype=dtype)
        else:
            # Without a name: it is gone with this object or the process, however that ends.
            self.file = tempfile.TemporaryFile(dir=folder, buffering=0)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Planes start to stop, (1, C, stop - start, Y, Z); a copy."""
        if self.file is None:
            slab = self.memory[start:stop].to(self.device, copy=True)
        else:
            slab = torch.empty((stop - start, *self.size[1:], self.channels), dtype=self.dtype)
            _transfer(os.preadv, self.file.fileno(), slab, start * self.plane_bytes)
            slab = slab.to(self.device)
        return slab[None].permute(0, 4, 1, 2, 3)  # in this order torch knows the memory format

    def write(self, start: int, slab: torch.Tensor) -> None:
        """Planes from start on, (1, C, x, Y, Z)."""
        planes = slab[0].permute(1, 2, 3, 0)
        if self.file is None:
            self.memory[start : start + len(planes)] = planes
        else:
            _transfer(os.pwritev, self.file.fileno(), planes.cpu().contiguous(), start * self.plane_bytes)


def _transfer(function, file: int, planes: torch.Tensor, offset: int) -> None:
    """Read into planes from an offset of a file, or write them there; the system may do it in parts."""
    buffer = memoryview(planes.view(torch.uint8).numpy()).cast("B")
    while buffer:
        done = function(file, [buffer], offset)
        if done == 0:
            raise OSError("the scratch file of the activations has ended early: it was changed from outside")
        buffer, offset = buffer[done:], offset + done
