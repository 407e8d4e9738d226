"""Features that ``aimv2 embed`` wrote, by the numbers that the album gives their pictures.

Legend: I patches, h x w patch grid, D width, P width of a pair's shared space.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.errors import UsageError
from aimv2.evals.scorer import eager
from aimv2.explorer.album import Album
from aimv2.explorer.foreign import ForeignEncoder
from aimv2.features.embed import ABOUT, list_images, one_line_key, read_parts, view_of
from aimv2.features.fingerprint import VERSION, architecture, model_fingerprint, weights_hash
from aimv2.features.store import read_object
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT


class Stored:
    """A folder of ``aimv2 embed``, opened without reading the features.

    Attributes:
        source: the images, as they were given to ``aimv2 embed``.
        stale: why its features are of no use for any model; "" where they are.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UsageError: its description can't be read, or its images are gone.
        """
        self.folder, self.about = folder, read_object(folder / ABOUT, "--images")
        try:
            self.source, self.format = str(self.about["source"]), str(self.about["format"])
            self.layers, self.pool = [int(layer) for layer in self.about["layers"]], str(self.about["pool"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--images {folder}: its {ABOUT} can't be read ({error!r})", code="unreadable") from None
        if not any(mark in self.source for mark in "*?[{") and not Path(self.source).exists():
            raise UsageError(
                f"--images {folder}: holds features of the images in {self.source}, which are not there",
                code="not-found",
            )
        self.image_root = Path(root) if (root := self.about.get("image_root")) else None
        self.numbers: dict[str, int] = {}
        self.same: dict[int, bool] = {}  # by the identity of an encoder
        self.stale = self._stale()

    def _stale(self) -> str:
        if self.about.get("fingerprint") != VERSION:
            return (
                "The folder was written by an earlier version, so its pictures are read; embed them into a new folder."
            )
        if any(
            self.about.get(key) != value
            for key, value in list_images(self.source, self.image_root).fingerprint().items()
        ):
            return "Pictures were replaced or changed since the folder was written, so they are read; embed them into a new folder."
        return ""

    def number(self, album: Album) -> None:
        """Takes over the album's numbers."""
        self.numbers = {one_line_key(name): at for at, (name, _) in enumerate(album.listed)}

    def of(self, encoder: VisionEncoder | ForeignEncoder) -> bool:
        """Whether the features are this encoder's."""
        if id(encoder) not in self.same:
            self.same[id(encoder)] = not self.stale and isinstance(encoder, VisionEncoder) and self._fits(encoder)
        return self.same[id(encoder)]

    def _fits(self, encoder: VisionEncoder) -> bool:
        model = model_fingerprint(weights_hash(encoder), architecture(encoder), self.about["precision"])
        wanted = {**model, "view": view_of(encoder)}
        return all(self.about.get(key) == value for key, value in wanted.items())

    def note(self, encoder: VisionEncoder | ForeignEncoder, pair: bool) -> str:
        """A sentence for the page: whether the features are used."""
        if self.stale:
            return self.stale
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
            found = model.image_projection(torch.stack(rows).to(model.log_scale))
            return dict(zip(numbers, F.normalize(found.float(), dim=-1)))

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
        try:
            for key, row in read_parts(self.folder, self.layers, place, self.format):
                if key in self.numbers:
                    yield self.numbers[key], row
        except (ValueError, KeyError, OSError) as error:
            raise UsageError(
                f"--images {self.folder}: its features can't be read ({error})", code="unreadable"
            ) from None
