"""Features that may not fit into main memory: in a file, of which the system keeps in memory what it has room for."""

import os
import tempfile
from math import prod

import torch
from torch import Tensor

from triptych.cache import cache_folder
from triptych.errors import UserError


def on_disk(*shape: int) -> Tensor:
    """Zeros, float32.  The file has no name and is gone with the tensor.  Raises UserError where there is no room."""
    folder, size = cache_folder("features"), prod(shape)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # or a full disk ends the process at the first write to the tensor
                os.posix_fallocate(file.fileno(), 0, 4 * size)
            return torch.from_file(file.name, shared=True, size=size).view(shape)
    except OSError as error:
        raise UserError(
            f"cannot keep {4 * size / 2**30:.1f} GiB of features in {folder}: {error.strerror or error}; make room "
            "there, or set TRIPTYCH_CACHE to another folder"
        ) from error


class Rows:
    """Tensors (..., at most `count`, width) on disk, filled batch by batch."""

    def __init__(self, count: int) -> None:
        self.count, self.filled = count, 0
        self._parts: dict[str, Tensor] = {}

    def add(self, **parts: Tensor) -> None:
        """The next rows, the same number of each (..., rows, width)."""
        rows = 0
        for name, x in parts.items():
            rows = x.shape[-2]
            if name not in self._parts:
                self._parts[name] = on_disk(*x.shape[:-2], self.count, x.shape[-1])
            self._parts[name][..., self.filled : self.filled + rows, :] = x
        self.filled += rows

    def __getitem__(self, name: str) -> Tensor:
        """What was filled."""
        return self._parts[name][..., : self.filled, :]
