"""What a model makes of pictures, and what of it is remembered between clicks.

Legend: h x w patch grid, D width, H heads. Everything here runs in one thread: the server's worker.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from threadpoolctl import threadpool_limits
from torch import Tensor

from aimv2.data.stream.transforms import image_transform, resized_crop_box
from aimv2.explorer.album import Album, Refusal
from aimv2.explorer.foreign import CANNOT, ForeignEncoder
from aimv2.explorer.stored import Stored
from aimv2.features.pixels import Stats
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT
from aimv2.report.features import LAST, Map, attention_maps, patch_maps, pca_rgb, similarity
from aimv2.report.predictions import PredictedImage, Word, caption_words, next_patches, rollout

BUDGET = 0.4  # seconds an answer may spend on pictures of the folder that were not read yet
AT_ONCE = 4  # of them in the encoder
REMEMBERED = 512 * 2**20  # bytes of features and answers
HALF = REMEMBERED // 2  # so much the folder's features of a layer may take, and all layers of one picture
WORDS = 40  # of a caption, at most
LIKEST = 6  # pictures of the folder shown beside a similarity map

T = TypeVar("T")


@dataclass(frozen=True)
class Shown:
    """A model on the page.

    Attributes:
        name: as the user gave it.
        model: the whole of it, in evaluation mode.
        encoder: its encoder.
        see: PIL image -> uint8 [3, H, W].
        cannot: what it can't do (attention, caption, paint, search) -> a sentence that says why.
    """

    name: str
    model: VisionEncoder | LiT | AIMv2 | ForeignEncoder
    encoder: VisionEncoder | ForeignEncoder
    see: Callable[[Image.Image], Tensor]
    cannot: dict[str, str]

    @property
    def depth(self) -> int:
        """Blocks of the encoder."""
        return len(self.encoder.blocks)


def open_shown(source: str, device: str, stats: Stats | None = None) -> Shown:
    """A model to look at.

    Args:
        source: anything of ours or released (:func:`aimv2.load_model`); for its features alone a folder or hub id of a
            ``transformers`` vision model, or ``timm:NAME`` where timm imports.
        device: where it runs.
        stats: mean and std of one of another origin; None: as its own image processor has it. One of ours has its own.

    Raises:
        UsageError: nothing to load.
    """
    from aimv2.api.models import load_model
    from aimv2.features.foreign import is_foreign
    from aimv2.features.frozen import open_frozen
    from aimv2.interop import load

    if source.startswith("timm:") or is_foreign(load.locate(source).folder):
        other = ForeignEncoder(open_frozen(source, device, stats=stats))
        return Shown(source, other, other, image_transform(other), CANNOT)
    at = load.locate(source)
    model = load_model(source, decoder=load.has_decoder(at), device=device)
    encoder = model if isinstance(model, VisionEncoder) else model.encoder
    return Shown(source, model, encoder, image_transform(encoder), cannot(model))


def cannot(model: VisionEncoder | LiT | AIMv2) -> dict[str, str]:
    """What a model can't do, and why, in sentences for the page."""
    if isinstance(model, VisionEncoder):
        return {
            "caption": "This model is an encoder alone: it came without the decoder that writes captions.",
            "paint": "This model is an encoder alone: it came without the decoder that predicts patches.",
            "search": "This model is an encoder alone and reads no text; a run that kept its decoder does, and so does a "
            "LiT pair.",
        }
    if isinstance(model, LiT):
        out = {
            "caption": "This model is an image-text pair: it compares texts with pictures and writes none.",
            "paint": "This model is an image-text pair: it came without the decoder that predicts patches.",
        }
        if model.tokenizer is None:
            out["search"] = "There was no tokenizer beside this model's weights, so it can read no text."
        return out
    out = {}
    if not model.decoder.config.pixels:
        out["paint"] = "This model's decoder was trained on captions alone and predicts no patches."
    if not model.decoder.config.text:
        out |= dict.fromkeys(
            ("caption", "search"), "This model's decoder was trained on pictures alone and knows no text."
        )
    elif model.tokenizer is None:
        out |= dict.fromkeys(
            ("caption", "search"), "There was no tokenizer beside this model's weights, so it knows no words."
        )
    return out


class Memory:
    """The newest answers, up to a number of bytes; what was not asked for longest goes first."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self.limit, self.used = limit, 0
        self.kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any) -> Any:
        """What was kept under a key, or None."""
        if key not in self.kept:
            return None
        self.kept.move_to_end(key)
        return self.kept[key][0]

    def put(self, key: Any, value: T, size: int) -> T:
        """Keeps a value of ``size`` bytes."""
        if key in self.kept:
            self.used -= self.kept.pop(key)[1]
        self.kept[key] = value, size
        self.used += size
        while self.used > self.limit and len(self.kept) > 1:
            self.used -= self.kept.popitem(last=False)[1][1]
        return value


class Study:
    """Models and pictures, and all that the page asks about them. Model and layer are indices."""

    def __init__(self, models: list[Shown], album: Album, stored: Stored | None = None) -> None:
        """``stored``: features of the album's folder, where some are on disk."""
        self.models, self.album = models, album
        self.memory = Memory()
        self.stored = [stored.maps(shown.encoder) if stored else {} for shown in models]
        self.unreadable: set[int] = set()  # of the folder

    def model(self, index: int) -> Shown:
        """
        Raises:
            Refusal: no such model.
        """
        if not 0 <= index < len(self.models):
            raise Refusal(404, f"There is no model {index}.")
        return self.models[index]

    def able(self, index: int, what: str) -> Shown:
        """A model that can do it.

        Raises:
            Refusal: it can't; says why.
        """
        shown = self.model(index)
        if what in shown.cannot:
            raise Refusal(409, shown.cannot[what])
        return shown

    def _remember(self, key: Any, make: Callable[[], T], size: Callable[[T], int]) -> T:
        found = self.memory.get(key)
        if found is None:
            found = make()
            self.memory.put(key, found, size(found))
        return found

    # ---- one picture ----

    def seen(self, index: int, number: int) -> Tensor:
        """A picture as a model sees it, uint8 [3, H, W]."""
        shown = self.model(index)
        key = ("seen", index, number)
        return self._remember(key, lambda: shown.see(self.album.image(number)), lambda x: x.numel())

    def box(self, index: int, number: int) -> list[float]:
        """What of a picture a model sees: left, top, right, bottom as shares of width and height."""
        size = self.model(index).encoder.config.image_size
        width, height = self.album.image(number).size
        left, top, right, bottom = (0, 0, width, height) if size is None else resized_crop_box(width, height, size)
        return [left / width, top / height, right / width, bottom / height]

    def grid(self, index: int, number: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture."""
        patch = self.model(index).encoder.config.patch_size
        _, height, width = self.seen(index, number).shape
        return height // patch, width // patch

    def layer(self, index: int, layer: int) -> str:
        """The name of a layer in maps of features.

        Raises:
            Refusal: no such layer.
        """
        depth = self.model(index).depth
        if not 0 <= layer < depth:
            raise Refusal(400, f"There is no block {layer + 1}; this model has {depth}.")
        return LAST if layer == depth - 1 else str(layer)

    def patch(self, index: int, number: int, row: int, column: int) -> tuple[int, int]:
        """
        Raises:
            Refusal: a patch outside the picture.
        """
        rows, columns = self.grid(index, number)
        if not (0 <= row < rows and 0 <= column < columns):
            raise Refusal(
                400, f"There is no patch {row}, {column}; this picture has {rows} rows and {columns} columns."
            )
        return row, column

    def features(self, index: int, number: int, layer: int) -> Map:
        """[h, w, D] of the picture being looked at; all layers at once, since the slider will ask for them."""
        name, shown = self.layer(index, layer), self.model(index)
        found = self.memory.get(("features", index, number, name))
        if found is not None:
            return found
        rows, columns = self.grid(index, number)
        whole = 4 * rows * columns * shown.encoder.config.width * shown.depth
        maps = patch_maps(shown.encoder, self.seen(index, number)[None], None if whole <= HALF else [layer])
        for other, kept in maps.items():
            self.memory.put(("features", index, number, other), kept[0], kept.nbytes)
        return maps[name][0]

    def pca(self, index: int, number: int, layer: int) -> np.ndarray:
        """uint8 [h, w, 3]: the three main directions of a picture's features."""
        key = ("pca", index, number, self.layer(index, layer))

        def colours() -> np.ndarray:
            # numpy's threads spin for each other: where torch's are busy too, two take a hundred times as long as one
            with threadpool_limits(1, user_api="blas"):
                return pca_rgb([self.features(index, number, layer)])[0]

        return self._remember(key, colours, lambda x: x.nbytes)

    def attention(self, index: int, number: int, layer: int, row: int, column: int) -> Map:
        """[H, h, w]: where a patch looks."""
        self.layer(index, layer)
        patch = self.patch(index, number, row, column)
        encoder = self.able(index, "attention").encoder
        assert isinstance(encoder, VisionEncoder)
        key = ("attention", index, number, layer, patch)
        ask = partial(attention_maps, encoder, self.seen(index, number), layer, patch)
        return self._remember(key, ask, lambda x: x.nbytes)

    def caption(self, index: int, number: int) -> list[Word]:
        """The greedy caption, word by word."""
        model = self.able(index, "caption").model
        assert isinstance(model, AIMv2)
        limit = min(WORDS, model.decoder.config.max_text)
        ask = partial(caption_words, model, self.seen(index, number), limit)
        return self._remember(("caption", index, number), ask, lambda words: sum(w.attention.nbytes for w in words))

    def painting(self, index: int, number: int, share: float, rolled: bool) -> PredictedImage:
        """Predictions behind a prefix: each from the true patches before it, or (``rolled``) from what was painted."""
        model = self.able(index, "paint").model
        assert isinstance(model, AIMv2)
        if not 0 <= share <= 1:  # also refuses what is no number
            raise Refusal(400, "The part that is given lies between 0 and 1.")
        rows, columns = self.grid(index, number)
        if rows * columns < 2:
            raise Refusal(409, "A picture of one patch has no next patch.")
        ask = partial(rollout if rolled else next_patches, model, self.seen(index, number), share)
        key = ("painting", index, number, round(share * rows * columns), rolled)
        return self._remember(key, ask, lambda painted: 2 * painted.image.nbytes)

    # ---- the folder ----

    def folder(self) -> list[int]:
        """Its pictures, less those that turned out to be unreadable."""
        return [number for number in self.album.readable() if number not in self.unreadable]

    def known(self, index: int, number: int, layer: int) -> bool:
        """Whether a picture's features are there without the encoder."""
        name = self.layer(index, layer)
        return ("features", index, number, name) in self.memory.kept or (name == LAST and number in self.stored[index])

    def maps(self, index: int, numbers: list[int], layer: int) -> list[Map]:
        """Features [h, w, D] of pictures of one size."""
        name = self.layer(index, layer)
        found = {n: self.memory.get(("features", index, n, name)) for n in numbers}
        if name == LAST:
            found |= {n: np.array(self.stored[index][n], np.float32) for n in numbers if n in self.stored[index]}
        missing = [n for n in numbers if found[n] is None]
        if missing:
            images = torch.stack([self.seen(index, n) for n in missing])
            for n, one in zip(missing, patch_maps(self.model(index).encoder, images, [layer])[name]):
                found[n] = self.memory.put(("features", index, n, name), one.copy(), one.nbytes)
        return [found[n] for n in numbers]

    def stacks(self, index: int, numbers: Iterable[int]) -> Iterator[list[int]]:
        """Up to AT_ONCE readable pictures of one size that follow each other."""
        waiting: list[int] = []
        for number in numbers:
            try:
                shape = self.seen(index, number).shape
            except Refusal:
                self.unreadable.add(number)
                continue
            if waiting and (len(waiting) == AT_ONCE or shape != self.seen(index, waiting[-1]).shape):
                yield waiting
                waiting = []
            waiting.append(number)
        if waiting:
            yield waiting

    def compared(self, index: int) -> list[int]:
        """Pictures of the folder that a patch is compared with: the first ones whose features fit the memory."""
        config = self.model(index).encoder.config
        patches = config.patches if config.image_size is not None else config.max_patches
        return self.folder()[: max(1, HALF // (4 * patches * config.width))]

    def similar(self, index: int, number: int, layer: int, row: int, column: int) -> dict[str, Any]:
        """How like a patch all patches of its picture and of the folder are.

        Returns:
            ``own`` [h, w] cosines; ``others``: the LIKEST pictures by their best patch, {number, map, best};
            ``compared`` and ``of``: pictures of the folder read so far, and all that will be.
        """
        patch, until = self.patch(index, number, row, column), time.monotonic() + BUDGET
        asked, read, went_on = self.features(index, number, layer), dict[int, Map](), False
        for part in self.stacks(index, self.compared(index)):
            new = [n for n in part if not self.known(index, n, layer)]
            if new and went_on and time.monotonic() > until:
                part = [n for n in part if n not in new]
            went_on = went_on or bool(new)
            read |= zip(part, self.maps(index, part, layer))
        others = [n for n in read if n != number]
        own, *maps = similarity(asked, patch, [asked, *(read[n] for n in others)])
        ranked = sorted(zip(others, maps), key=lambda pair: -float(pair[1].max()))[:LIKEST]
        shown = [{"image": n, "map": map, "best": float(map.max())} for n, map in ranked]
        return {"own": own, "others": shown, "compared": len(read), "of": len(self.compared(index))}
