"""What tells that images are still those that were read before: sizes and times of their files, or a hash of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from aimv2.data.images.labelled import Labelled


def contents_of(data: Labelled) -> str:
    """A mark, the same as long as nothing under the images has been replaced; ``unknown`` where nothing can tell.

    Of files and shards their sizes and times of change, of arrays in memory their bytes, of tables the fingerprint that
    `datasets` keeps of them.
    """
    from aimv2.data.datasets.archives import TableOfImages
    from aimv2.data.datasets.registry import ImageArrays
    from aimv2.data.images.forms import ImageFiles, ShardImages
    from aimv2.data.images.hub import TableImages
    from aimv2.data.images.labelled import _Chosen, _Joined

    image: Any = data.image
    rows = np.arange(len(data.keys))
    while isinstance(image, _Chosen):
        image, rows = image.image, image.rows[rows]
    if isinstance(image, _Joined):
        return hashlib.sha256(f"{contents_of(image.first)} {contents_of(image.second)}".encode()).hexdigest()
    if isinstance(image, ImageFiles):
        return contents_of_files(image.root / image.names[row] for row in rows.tolist())
    if isinstance(image, ShardImages):
        spans = np.stack([image.which[rows], image.starts[rows], image.ends[rows]]).astype(np.int64)
        tars = contents_of_files(image.tars[number] for number in np.unique(spans[0]).tolist())
        return hashlib.sha256(tars.encode() + spans.tobytes()).hexdigest()
    if isinstance(image, ImageArrays):
        return hashlib.sha256(np.ascontiguousarray(image.pixels).data).hexdigest()
    if isinstance(image, TableOfImages):
        return contents_of_files([image.path])
    if isinstance(image, TableImages):
        return str(getattr(image.rows, "_fingerprint", "unknown"))
    return "unknown"


def contents_of_files(files: Iterable[Path]) -> str:
    """A mark of the sizes and times of change of files; one that is not there counts too."""
    digest = hashlib.sha256()
    for file in files:
        try:
            about = file.stat()
            digest.update(f"{about.st_size} {about.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(b"none\n")
    return digest.hexdigest()
