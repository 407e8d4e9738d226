"""What tells that images are still those that were read before: sizes and times of their files, or a hash of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from aimv2.data.images.readers import contents_of_files as contents_of_files
from aimv2.data.images.readers import contents_of_rows

if TYPE_CHECKING:
    from aimv2.data.images.labelled import Labelled


def contents_of(data: Labelled) -> str:
    """A mark, the same as long as nothing under the images has been replaced; ``unknown`` where nothing can tell.

    Of files and shards their sizes and times of change, of arrays in memory their bytes, of tables the fingerprint that
    `datasets` keeps of them.
    """
    return contents_of_rows(data.image, np.arange(len(data.keys)))
