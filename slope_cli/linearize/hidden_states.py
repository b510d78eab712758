"""The hidden states between two ranges of layers, on disk: those of each step of attention transfer, in order.

Each step's have a checksum: they may lie on a disk for days, and nothing else would notice that they changed.
"""

import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slope_cli.errors import SlopeError
from slope_cli.utils import files

CHECKSUM = 4
"""Bytes of a step's CRC-32, which come before its hidden states."""


def states_bytes(steps: int, tokens: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of the file of so many steps of `tokens` tokens each, whose hidden states have `width` numbers."""
    return steps * (CHECKSUM + tokens * width * dtype.itemsize)


def states_on_disk(steps: int, tokens: int, width: int, ranges: int, dtype: torch.dtype) -> int:
    """Bytes of hidden states on the disk at once: those that come to a range of layers, and those that leave it."""
    return min(2, ranges - 1) * states_bytes(steps, tokens, width, dtype)


def require_room(folder: Path, need: int) -> None:
    """SlopeError if a folder's disk, of which the folder may use `need` bytes in all, has less free."""
    present = sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if (free := shutil.disk_usage(existing).free) < need - present:
        raise SlopeError(
            f"{folder}: {free / 1e9:.2f} GB free, {(need - present) / 1e9:.2f} GB needed for hidden states; set "
            "linearize.scratch to a folder with more room, or lower train.steps or linearize.transfer"
        )


class HiddenStates:
    """A file of hidden states, to which steps are appended and from which they are read."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """
        Args:
            shape: of a step's hidden states.
            dtype: that they are stored in.
        """
        self.path, self._shape, self._dtype = path, shape, dtype
        self._size = states_bytes(1, int(np.prod(shape)), 1, dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = files.open_own(path)

    def require(self, steps: int) -> None:
        """SlopeError if there are fewer steps."""
        if os.fstat(self._file).st_size < steps * self._size:
            raise SlopeError(
                f"{self.path}: has not the hidden states of {steps} steps that were written there; bring the file "
                "back, or start the run anew with --overwrite"
            )

    def cut(self, steps: int) -> None:
        """Keep the first steps alone, to go on after them; SlopeError if there are fewer."""
        self.require(steps)
        os.ftruncate(self._file, steps * self._size)

    def append(self, states: Tensor) -> None:
        """Write the next step's, of the shape, in any precision; SlopeError if the disk is full."""
        content = states.to(self._dtype).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        content = zlib.crc32(content).to_bytes(CHECKSUM, "little") + content
        try:
            while content:
                content = content[os.write(self._file, content) :]
        except OSError as error:
            raise files.write_error(self.path, error) from error

    def read(self, step: int) -> Tensor:
        """Those of a step, counted from 0, as they are stored; SlopeError if they are damaged."""
        content = bytearray(os.pread(self._file, self._size, step * self._size))
        states = content[CHECKSUM:]
        if len(content) != self._size or zlib.crc32(states).to_bytes(CHECKSUM, "little") != content[:CHECKSUM]:
            raise SlopeError(f"{self.path}: the hidden states of step {step + 1} are damaged")
        return torch.frombuffer(states, dtype=self._dtype).view(self._shape)

    def sync(self) -> None:
        """Have all that was appended on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
