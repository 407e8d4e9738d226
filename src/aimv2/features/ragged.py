"""Patch features of images with different numbers of patches, on disk: the rows of each image after those of the last.

Legend: N images, I patches of one image, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aimv2.features.store import open_array, unreadable
from aimv2.io import regular

LENGTHS, OPTION = "lengths.npy", "--cache or --out"
KIND = np.dtype(np.float16)


class Ragged:
    """Features of one layer, memory-mapped: ``len`` is N, an index gives one image's float16 [I, D]."""

    def __init__(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """``rows`` [sum of lengths, D]; ``lengths`` int64 [N]."""
        self.rows, self.starts = rows, np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, image: int) -> np.ndarray:
        if not 0 <= image < len(self):
            raise IndexError(image)
        return self.rows[self.starts[image] : self.starts[image + 1]]


class RaggedWriter:
    """Appends features of several layers; what an interrupted pass wrote after its last note is cut off first."""

    def __init__(self, folder: Path, layers: Sequence[str], width: int, count: int, written: int) -> None:
        """
        Args:
            folder: of the files.
            layers: their names.
            width: D.
            count: images at most.
            written: images that are there already.
        """
        self.files, self.written = [_file(folder, name) for name in layers], written
        if written:
            self.lengths = open_array(folder / LENGTHS, OPTION, (count,), "r+")
        else:
            self.lengths = np.lib.format.open_memmap(folder / LENGTHS, mode="w+", dtype=np.int64, shape=(count,))
        for file in self.files:
            with file.open("ab") as stream:
                stream.truncate(KIND.itemsize * width * int(self.lengths[:written].sum()))

    def append(self, found: Sequence[Sequence[np.ndarray]]) -> None:
        """``found``: for each layer the float16 [I, D] of the next images."""
        for file, images in zip(self.files, found):
            with file.open("ab") as stream:
                for rows in images:
                    stream.write(np.ascontiguousarray(rows, KIND).data)
        lengths = [len(rows) for rows in found[0]]
        self.lengths[self.written : self.written + len(lengths)] = lengths
        self.written += len(lengths)

    def flush(self) -> None:
        """Brings the lengths to disk; the rows are there."""
        self.lengths.flush()


def open_ragged(folder: Path, layers: Sequence[str], width: int, count: int) -> list[Ragged]:
    """The first ``count`` images that a :class:`RaggedWriter` left."""
    every = open_array(folder / LENGTHS, OPTION, ())
    lengths = every[:count]
    if every.ndim != 1 or every.dtype != np.int64 or len(lengths) != count or (lengths < 0).any():
        raise unreadable(folder / LENGTHS, OPTION, f"{every.dtype} {list(every.shape)}")
    shape, arrays = (int(lengths.sum()), width), []
    for file in (_file(folder, name) for name in layers):
        try:
            arrays.append(Ragged(np.memmap(regular(file), KIND, "r", shape=shape), lengths))
        except (OSError, ValueError) as error:
            raise unreadable(file, OPTION, error) from None
    return arrays


def _file(folder: Path, layer: str) -> Path:
    return folder / f"{layer}.f16"
