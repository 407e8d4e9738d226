"""Model outputs for the explorer's images, cached between requests.

Legend: h x w patch grid, D width, H heads. Everything here runs in one thread, the server's worker.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from threadpoolctl import threadpool_limits
from torch import Tensor

from aimv2.data.stream.transforms import image_transform, resized_crop_box
from aimv2.explorer.album import Album, RequestError
from aimv2.explorer.foreign import CANNOT, ForeignEncoder
from aimv2.explorer.stored import Stored
from aimv2.features.pixels import Stats
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT
from aimv2.report.features import LAST, Map, attention_maps, patch_maps, pca_rgb, similarity
from aimv2.report.predictions import PredictedImage, Word, caption_words, next_patches, rollout

if TYPE_CHECKING:  # it opens transformers
    from aimv2.explorer.chat import Reply, Talker
    from aimv2.vlm.model import VisionLanguage

BUDGET = 0.4  # seconds per request for images of the folder that are not in the cache
AT_ONCE = 4  # images per batch
CACHE_BYTES = 512 * 2**20  # features and answers
HALF = CACHE_BYTES // 2  # limit for the folder's features of one layer, and for all layers of one image
WORDS = 40  # tokens per caption at most
SIMILAR = 6  # images of the folder shown with a similarity map

TALKS = {
    "caption": "This is a vision-language model: it answers questions, see above.",
    "paint": "This is a vision-language model, without the decoder that predicts patches.",
    "search": "This is a vision-language model, which answers questions on one image; it does not search.",
}

T = TypeVar("T")


@dataclass(frozen=True)
class ShownModel:
    """A model on the page.

    Attributes:
        name: the user's argument.
        model: the whole model, in evaluation mode.
        encoder: its encoder.
        transform: PIL image -> uint8 [3, H, W].
        cannot: unsupported function (attention, caption, paint, search) -> the reason, as a sentence.
        talker: of a vision-language model, which answers questions.
    """

    name: str
    model: VisionEncoder | LiT | AIMv2 | ForeignEncoder | VisionLanguage
    encoder: VisionEncoder | ForeignEncoder
    transform: Callable[[Image.Image], Tensor]
    cannot: dict[str, str]
    talker: Talker | None = None

    @property
    def depth(self) -> int:
        """Number of blocks in the encoder."""
        return len(self.encoder.blocks)


def open_shown(source: str, device: str, stats: Stats | None = None) -> ShownModel:
    """Load a model for the page.

    Args:
        source: anything that :func:`aimv2.load_model` takes; a vision-language model of ``aimv2 vlm build`` or ``train``; for
            features only, a folder or hub id of a ``transformers`` vision model, or ``timm:NAME`` if timm is installed.
        device: the model's device.
        stats: mean and std for a transformers or timm model; None: those of its image processor.

    Raises:
        UsageError: nothing to load.
    """
    from aimv2.data.text.models import load_model
    from aimv2.features.foreign import is_foreign
    from aimv2.features.frozen import open_frozen
    from aimv2.interop import load
    from aimv2.vlm.model import holds_vlm

    if not source.startswith("timm:") and holds_vlm(load.locate(source).folder):
        return open_talker(source, device)
    if source.startswith("timm:") or is_foreign(load.locate(source).folder):
        other = ForeignEncoder(open_frozen(source, device, stats=stats))
        return ShownModel(source, other, other, image_transform(other), CANNOT)
    at = load.locate(source)
    model = load_model(source, decoder=load.has_decoder(at), device=device)
    encoder = model if isinstance(model, VisionEncoder) else model.encoder
    return ShownModel(source, model, encoder, image_transform(encoder), cannot(model))


def open_talker(source: str, device: str) -> ShownModel:
    """A vision-language model for the page; the arguments are those of :func:`open_shown`."""
    from aimv2.explorer.chat import Talker
    from aimv2.vlm.model import open_vlm

    model, processor = open_vlm(source, "MODEL")
    talker = Talker(model.to(device), processor)
    return ShownModel(source, model, model.encoder, talker.pixels, TALKS, talker)


def cannot(model: VisionEncoder | LiT | AIMv2) -> dict[str, str]:
    """Unsupported functions of a model, with reasons for the page."""
    if isinstance(model, VisionEncoder):
        return {
            "caption": "This model is only an encoder, without the decoder that generates captions.",
            "paint": "This model is only an encoder, without the decoder that predicts patches.",
            "search": "This model is only an encoder, without text input; use a run that kept its decoder, or a LiT pair.",
        }
    if isinstance(model, LiT):
        out = {
            "caption": "This model is an image-text pair: it compares texts with images and generates none.",
            "paint": "This model is an image-text pair, without the decoder that predicts patches.",
        }
        if model.tokenizer is None:
            out["search"] = "This model has no tokenizer next to its weights, so it can't read text."
        return out
    out = {}
    if not model.decoder.config.pixels:
        out["paint"] = "This model's decoder was trained only on captions and predicts no patches."
    text = ("caption", "search")
    if not model.decoder.config.text:
        out |= dict.fromkeys(text, "This model's decoder was trained only on images and has no text head.")
    elif model.tokenizer is None:
        out |= dict.fromkeys(text, "This model has no tokenizer next to its weights, so it can't read or write text.")
    return out


class AnswerCache:
    """Least-recently-used cache with a limit in bytes."""

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self.limit, self.used = limit, 0
        self.entries: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any) -> Any:
        """The value of a key, or None."""
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key][0]

    def put(self, key: Any, value: T, size: int) -> T:
        """Store a value of ``size`` bytes and return it."""
        if key in self.entries:
            self.used -= self.entries.pop(key)[1]
        self.entries[key] = value, size
        self.used += size
        while self.used > self.limit and len(self.entries) > 1:
            self.used -= self.entries.popitem(last=False)[1][1]
        return value


class Study:
    """Models and images of the page, and all outputs that it requests. Models and layers are given by index."""

    def __init__(self, models: list[ShownModel], album: Album, stored: Stored | None = None) -> None:
        """``stored``: features of the album's folder on disk, if any."""
        self.models, self.album = models, album
        self.cache = AnswerCache()
        self.stored = [stored.maps(shown.encoder) if stored and not shown.talker else {} for shown in models]
        self.unreadable: set[int] = set()  # images of the folder

    def model(self, index: int) -> ShownModel:
        """
        Raises:
            RequestError: no such model.
        """
        if not 0 <= index < len(self.models):
            raise RequestError(404, f"There is no model {index}.")
        return self.models[index]

    def able(self, index: int, what: str) -> ShownModel:
        """The model, if it supports the function ``what``.

        Raises:
            RequestError: it does not; says why.
        """
        shown = self.model(index)
        if what in shown.cannot:
            raise RequestError(409, shown.cannot[what])
        return shown

    def _cached(self, key: Any, compute: Callable[[], T], size: Callable[[T], int]) -> T:
        found = self.cache.get(key)
        if found is None:
            found = compute()
            self.cache.put(key, found, size(found))
        return found

    # ---- one image ----

    def pixels(self, index: int, number: int) -> Tensor:
        """An image after the model's transform, uint8 [3, H, W]."""
        shown = self.model(index)
        key = ("pixels", index, number)
        return self._cached(key, lambda: shown.transform(self.album.image(number)), lambda x: x.numel())

    def box(self, index: int, number: int) -> list[float]:
        """The crop that a model uses: left, top, right, bottom as fractions of width and height."""
        shown, (width, height) = self.model(index), self.album.size(number)
        if shown.talker is not None:
            return shown.talker.box(width, height)
        size = shown.encoder.config.image_size
        left, top, right, bottom = (0, 0, width, height) if size is None else resized_crop_box(width, height, size)
        return [left / width, top / height, right / width, bottom / height]

    def grid(self, index: int, number: int) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        patch = self.model(index).encoder.config.patch_size
        _, height, width = self.pixels(index, number).shape
        return height // patch, width // patch

    def layer(self, index: int, layer: int) -> str:
        """The name of a layer in :func:`aimv2.report.features.patch_maps`.

        Raises:
            RequestError: no such layer.
        """
        depth = self.model(index).depth
        if not 0 <= layer < depth:
            raise RequestError(400, f"There is no layer {layer}; this model has layers 0 to {depth - 1}.")
        return LAST if layer == depth - 1 else str(layer)

    def patch(self, index: int, number: int, row: int, column: int) -> tuple[int, int]:
        """
        Raises:
            RequestError: a patch outside the image.
        """
        rows, columns = self.grid(index, number)
        if not (0 <= row < rows and 0 <= column < columns):
            raise RequestError(
                400, f"There is no patch {row}, {column}; this picture has {rows} rows and {columns} columns."
            )
        return row, column

    def features(self, index: int, number: int, layer: int) -> Map:
        """Features [h, w, D] of the selected image; all layers are computed at once, since the slider requests them next."""
        name, shown = self.layer(index, layer), self.model(index)
        found = self.cache.get(("features", index, number, name))
        if found is not None:
            return found
        rows, columns = self.grid(index, number)
        size = 4 * rows * columns * shown.encoder.config.width * shown.depth
        maps = patch_maps(shown.encoder, self.pixels(index, number)[None], None if size <= HALF else [layer])
        for other, kept in maps.items():
            self.cache.put(("features", index, number, other), kept[0], kept.nbytes)
        return maps[name][0]

    def pca(self, index: int, number: int, layer: int) -> np.ndarray:
        """uint8 [h, w, 3]: the first three principal components of an image's features."""
        key = ("pca", index, number, self.layer(index, layer))

        def colours() -> np.ndarray:
            # numpy's threads busy-wait: with torch's threads running too, two take a hundred times as long as one
            with threadpool_limits(1, user_api="blas"):
                return pca_rgb([self.features(index, number, layer)])[0]

        return self._cached(key, colours, lambda x: x.nbytes)

    def attention(self, index: int, number: int, layer: int, row: int, column: int) -> Map:
        """Attention of a patch, [H, h, w]."""
        self.layer(index, layer)
        patch = self.patch(index, number, row, column)
        encoder = self.able(index, "attention").encoder
        assert isinstance(encoder, VisionEncoder)
        key = ("attention", index, number, layer, patch)
        compute = partial(attention_maps, encoder, self.pixels(index, number), layer, patch)
        return self._cached(key, compute, lambda x: x.nbytes)

    def caption(self, index: int, number: int) -> list[Word]:
        """The greedy caption, token by token."""
        model = self.able(index, "caption").model
        assert isinstance(model, AIMv2)
        compute = partial(caption_words, model, self.pixels(index, number), self.longest_caption(index))
        return self._cached(("caption", index, number), compute, lambda words: sum(w.attention.nbytes for w in words))

    def longest_caption(self, index: int) -> int:
        """Tokens at which a caption is cut."""
        model = self.able(index, "caption").model
        assert isinstance(model, AIMv2)
        return min(WORDS, model.decoder.config.max_text)

    def reply(self, index: int, number: int, texts: tuple[str, ...]) -> Reply:
        """The answer to the last of ``texts`` on an image, see :meth:`aimv2.explorer.chat.Talker.reply`.

        Raises:
            RequestError: a model without a language model.
        """
        talker = self.model(index).talker
        if talker is None:
            raise RequestError(409, "This model has no language model that could answer.")
        compute = partial(talker.reply, self.album.image(number), texts)
        return self._cached(("reply", index, number, texts), compute, lambda reply: reply.layers.nbytes + 1000)

    def painting(self, index: int, number: int, fraction: float, rolled: bool) -> PredictedImage:
        """Predictions after a prefix, each from the true patches before it, or (``rolled``) from the generated ones."""
        model = self.able(index, "paint").model
        assert isinstance(model, AIMv2)
        if not 0 <= fraction <= 1:  # also rejects NaN
            raise RequestError(400, "share: a number from 0 to 1 is expected.")
        rows, columns = self.grid(index, number)
        if rows * columns < 2:
            raise RequestError(409, "An image of one patch has no next patch.")
        compute = partial(rollout if rolled else next_patches, model, self.pixels(index, number), fraction)
        key = ("painting", index, number, round(fraction * rows * columns), rolled)
        return self._cached(key, compute, lambda predicted: 2 * predicted.image.nbytes)

    # ---- the folder ----

    def folder(self) -> list[int]:
        """Numbers of the folder's images, except unreadable ones."""
        return [number for number in self.album.readable() if number not in self.unreadable]

    def known(self, index: int, number: int, layer: int) -> bool:
        """Whether an image's features are in the cache or on disk."""
        name = self.layer(index, layer)
        return ("features", index, number, name) in self.cache.entries or (
            name == LAST and number in self.stored[index]
        )

    def maps(self, index: int, numbers: list[int], layer: int) -> list[Map]:
        """Features [h, w, D] of images of one size."""
        name = self.layer(index, layer)
        found = {n: self.cache.get(("features", index, n, name)) for n in numbers}
        if name == LAST:
            found |= {n: np.array(self.stored[index][n], np.float32) for n in numbers if n in self.stored[index]}
        missing = [n for n in numbers if found[n] is None]
        if missing:
            images = torch.stack([self.pixels(index, n) for n in missing])
            for other, maps in patch_maps(self.model(index).encoder, images, self._computed(index, layer)).items():
                kept = [
                    self.cache.put(("features", index, n, other), x.copy(), x.nbytes) for n, x in zip(missing, maps)
                ]
                if other == name:
                    found |= zip(missing, kept)
        return [found[n] for n in numbers]

    def _computed(self, index: int, layer: int) -> list[int] | None:
        """Layers that are computed for the folder's images: all (None), which the slider requests next, if they fit."""
        return None if len(self.folder()) <= HALF // (self._bytes(index) * self.model(index).depth) else [layer]

    def _bytes(self, index: int) -> int:
        """Features of one image and layer."""
        config = self.model(index).encoder.config
        return 4 * (config.patches if config.image_size is not None else config.max_patches) * config.width

    def batches(self, index: int, numbers: Iterable[int], until: float) -> Iterator[list[int]]:
        """Batches of up to AT_ONCE consecutive readable images of one size; at least one image, then until the time is over."""
        waiting: list[int] = []
        for at, number in enumerate(numbers):
            if at and time.monotonic() > until:
                break
            try:
                shape = self.pixels(index, number).shape
            except RequestError:
                self.unreadable.add(number)
                continue
            if waiting and (len(waiting) == AT_ONCE or shape != self.pixels(index, waiting[-1]).shape):
                yield waiting
                waiting = []
            waiting.append(number)
        if waiting:
            yield waiting

    def compared(self, index: int) -> list[int]:
        """Images of the folder that a patch is compared with: the first ones whose features fit the cache."""
        return self.folder()[: max(1, HALF // self._bytes(index))]

    def similar(self, index: int, number: int, layer: int, row: int, column: int) -> dict[str, Any]:
        """Similarity of a patch to all patches of its image and of the folder.

        Returns:
            ``own`` [h, w] cosines; ``others``: the SIMILAR best images by their best patch, {image, map, best};
            ``compared`` and ``of``: images of the folder processed so far, and in total; ``folder``: of which so many are
            compared as fit the cache.
        """
        patch, until = self.patch(index, number, row, column), time.monotonic() + BUDGET
        query, wanted = self.features(index, number, layer), self.compared(index)
        there = [n for n in wanted if self.known(index, n, layer)]
        read = dict(zip(there, self.maps(index, there, layer)))
        for part in self.batches(index, [n for n in wanted if n not in read], until):
            read |= zip(part, self.maps(index, part, layer))
        others = [n for n in read if n != number]
        own, *maps = similarity(query, patch, [query, *(read[n] for n in others)])
        ranked = sorted(zip(others, maps), key=lambda pair: -float(pair[1].max()))[:SIMILAR]
        shown = [{"image": n, "map": map, "best": float(map.max())} for n, map in ranked]
        return {
            "own": own,
            "others": shown,
            "compared": len(read),
            "of": len(self.compared(index)),
            "folder": len(self.folder()),
        }
