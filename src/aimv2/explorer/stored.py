"""Features that ``aimv2 embed`` wrote, by the numbers that the album gives their pictures.

Legend: I patches, h x w patch grid, D width, P width of a pair's shared space.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.errors import UsageError
from aimv2.evals.scorer import eager
from aimv2.explorer.album import Album
from aimv2.explorer.foreign import ForeignEncoder
from aimv2.features.embed import ABOUT, one_line_key
from aimv2.features.fingerprint import weights_hash
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT


class Stored:
    """What a folder of ``aimv2 embed`` holds; opened without reading the features.

    Attributes:
        source: of the images, as it was embedded.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UsageError: its description can't be read, or its images are gone.
        """
        self.folder = folder
        try:
            self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            self.source = str(self.about["source"])
            self.layers, self.pool = [int(layer) for layer in self.about["layers"]], str(self.about["pool"])
            self.sha256, self.format = str(self.about["weights_sha256"]), str(self.about["format"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(f"--images {folder}: its {ABOUT} can't be read ({error!r})") from None
        if not any(mark in self.source for mark in "*?[{") and not Path(self.source).exists():
            raise UsageError(f"--images {folder}: holds features of the images in {self.source}, which are not there")
        self.numbers: dict[str, int] = {}
        self.same: dict[int, bool] = {}  # by the identity of an encoder

    def number(self, album: Album) -> None:
        """Learns which picture is which."""
        self.numbers = {one_line_key(name): at for at, (name, _) in enumerate(album.listed)}

    def of(self, encoder: VisionEncoder | ForeignEncoder) -> bool:
        """Whether the features are this encoder's."""
        if id(encoder) not in self.same:
            self.same[id(encoder)] = isinstance(encoder, VisionEncoder) and weights_hash(encoder) == self.sha256
        return self.same[id(encoder)]

    def note(self, encoder: VisionEncoder | ForeignEncoder, pair: bool) -> str:
        """A sentence for the page: what becomes of the features."""
        if not self.of(encoder):
            return "The folder holds features of another model, so its pictures themselves are read."
        if self._last(encoder) is None:
            return "The folder holds features of other blocks than the last, so its pictures themselves are read."
        if (self.pool == "attention" and pair) or (self.pool == "none" and encoder.config.image_size is not None):
            return "Features of the folder's pictures are those that `aimv2 embed` stored."
        return f"The folder holds features with pool={self.pool}, which text can't be compared with; its pictures are read."

    def vectors(self, model: LiT) -> dict[int, Tensor]:
        """Pictures in a pair's space, by number: [P] each, of unit length; {} where the features are of no use for it."""
        last = self._last(model.encoder)
        if self.pool != "attention" or last is None or not self.of(model.encoder):
            return {}
        numbers, rows = [], []
        for number, row in self._rows(last):
            numbers.append(number)
            rows.append(torch.from_numpy(row))
        if not rows:
            return {}
        with eager():
            weight = model.image_projection.weight
            return dict(zip(numbers, F.normalize(model.image_projection(torch.stack(rows).to(weight)).float(), dim=-1)))

    def maps(self, encoder: VisionEncoder | ForeignEncoder) -> dict[int, np.ndarray]:
        """Features of the last layer by number: views [h, w, D]; {} where the features are of no use for it."""
        last, config = self._last(encoder), encoder.config
        if self.pool != "none" or last is None or config.image_size is None or not self.of(encoder):
            return {}
        side = config.image_size // config.patch_size
        return {number: row.reshape(side, side, -1) for number, row in self._rows(last)}

    def _last(self, encoder: VisionEncoder | ForeignEncoder) -> int | None:
        """The place of the last layer among those that are stored."""
        depth = len(encoder.blocks)
        layers = [layer % depth for layer in self.layers] or [depth - 1]
        return layers.index(depth - 1) if depth - 1 in layers else None

    def _rows(self, place: int) -> Iterator[tuple[int, np.ndarray]]:
        """Number and features of the album's pictures."""
        read = self._parquet if self.format == "parquet" else self._arrays
        several = len(self.layers) > 1
        try:
            for key, row in read(place, several):
                if key in self.numbers:
                    yield self.numbers[key], row
        except (ValueError, KeyError, OSError) as error:
            raise UsageError(f"--images {self.folder}: its features can't be read ({error})") from None

    def _arrays(self, place: int, several: bool) -> Iterator[tuple[str, np.ndarray]]:
        for path in sorted(self.folder.glob("features-*.npy")):
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            keys = (
                (self.folder / f"keys-{path.stem.rpartition('-')[2]}.txt").read_text(encoding="utf-8").split("\n")[:-1]
            )
            for key, row in zip(keys, rows, strict=True):
                yield key, np.array(row[place] if several else row)

    def _parquet(self, place: int, several: bool) -> Iterator[tuple[str, np.ndarray]]:
        import pyarrow.parquet as pq

        column = f"layer_{self.layers[place]}" if several else "features"
        for path in sorted(self.folder.glob("features-*.parquet")):
            table = pq.read_table(path, columns=["key", column])
            for key, row in zip(table["key"].to_pylist(), table[column]):
                yield key, np.array(row.values)
