"""Activations of a whole volume, kept where there is room for them and read and written in slabs along X."""

import copy
import errno
import math
import os
import tempfile
from collections.abc import Callable
from typing import Self

import torch


class Given:
    """Features (1, C, X, Y, Z) that are there already, read as [`Activations`] are."""

    remembered_channels = 0  # of planes beside a slab, while it is made

    def __init__(self, x: torch.Tensor):
        self.x, self.channels, self.size = x, x.shape[1], tuple(x.shape[2:])

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Planes start to stop, (1, C, stop - start, Y, Z), a view."""
        return self.x[:, :, start:stop]


class Activations:
    """
    Features (1, C, X, Y, Z) of which only a slab at a time is on the device that computes.

    A slab lies in one piece, with the channels of a voxel side by side, as convolutions on the CPU want them.

    Args:
        channels, size: C and (X, Y, Z).
        dtype: of the features.
        device: where slabs are given to.
        where: a device whose memory they are kept in, or a folder where a scratch file is made for them.
        planes: those along X that are kept; all if not given.
    """

    remembered_channels = 0  # of planes beside a slab, while it is made

    def __init__(
        self,
        channels: int,
        size: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        where: torch.device | str | os.PathLike,
        planes: slice | None = None,
    ):
        self.channels, self.size, self.dtype, self.device = channels, tuple(size), dtype, device
        self.planes = slice(0, size[0]) if planes is None else planes
        self.first_value, self.stride = 0, channels * math.prod(size[1:])
        self.spare: Self | None = None  # room for as much that belongs to these
        self.file = self.memory = None
        if isinstance(where, torch.device):
            self.memory = torch.empty((self.planes.stop - self.planes.start, self.stride), dtype=dtype, device=where)
        else:
            # Without a name: it is gone with this object or the process, however that ends.
            self.file = tempfile.TemporaryFile(dir=where, buffering=0)
            size = (self.planes.stop - self.planes.start) * self.stride * dtype.itemsize
            if hasattr(os, "posix_fallocate"):  # a disk that is too full says so now
                try:
                    os.posix_fallocate(self.file.fileno(), 0, size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:  # not all file systems can
                        return
                    raise OSError(
                        error.errno,
                        f"no room for {size / 1e9:.1f} GB of features, choose another folder= or call enable_tiling, "
                        "which keeps a quarter of them",
                        str(where),
                    ) from None

    def like(self, channels: int, where: torch.device | str | os.PathLike) -> Self:
        """Room for others of the same size."""
        return type(self)(channels, self.size, self.dtype, self.device, where, self.planes)

    def split(self, channels: int) -> tuple[Self, Self]:
        """Room for two with so many channels each, in place of these: a plane of either takes that of a plane here."""
        parts = copy.copy(self), copy.copy(self)
        for i, part in enumerate(parts):
            part.channels = channels
            part.first_value = self.first_value + i * channels * math.prod(self.size[1:])
        return parts

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Planes start to stop, (1, C, stop - start, Y, Z); a view where they are kept on the device."""
        shape = (*self.size[1:], self.channels)
        start, stop = start - self.planes.start, stop - self.planes.start
        if self.file is None:
            planes = self.memory[start:stop, self.first_value : self.first_value + math.prod(shape)]
            slab = planes.unflatten(1, shape).to(self.device)
        else:
            slab = torch.empty((stop - start, *shape), dtype=self.dtype)
            self.transfer(os.preadv, slab, start)
            slab = slab.to(self.device)
        return slab[None].permute(0, 4, 1, 2, 3)  # in this order torch knows the memory format

    def write(self, start: int, slab: torch.Tensor) -> None:
        """Planes from start on, (1, C, x, Y, Z)."""
        planes, start = slab[0].permute(1, 2, 3, 0), start - self.planes.start
        if self.file is None:
            shape = planes.shape[1:]
            kept = self.memory[start : start + len(planes), self.first_value : self.first_value + math.prod(shape)]
            kept.unflatten(1, shape).copy_(planes)
        else:
            self.transfer(os.pwritev, planes.cpu().contiguous(), start)

    def transfer(
        self, function: Callable[[int, list[memoryview], int], int], planes: torch.Tensor, start: int
    ) -> None:
        """Read planes from the file, or write them there, from one of those kept on; the system may do it in parts."""
        itemsize = self.dtype.itemsize
        for i, plane in enumerate(planes):
            buffer = memoryview(plane.view(torch.uint8).numpy()).cast("B")
            offset = ((start + i) * self.stride + self.first_value) * itemsize
            while buffer:
                done = function(self.file.fileno(), [buffer], offset)
                if done == 0:
                    raise OSError("the scratch file of the activations has ended early: it was changed from outside")
                buffer, offset = buffer[done:], offset + done
