"""The explorer's API: validated query parameters in, JSON out; maps as rows of rounded numbers, images as data URIs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aimv2.explorer.album import KEPT, MAX_PIXELS, Entry, RequestError
from aimv2.explorer.search import LONGEST_TEXT, Search
from aimv2.explorer.stored import Stored
from aimv2.explorer.study import ShownModel, Study
from aimv2.io import parse_json
from aimv2.models.aimv2 import AIMv2
from aimv2.models.lit import LiT
from aimv2.report.images import data_uri, to_png
from aimv2.report.predictions import Word
from aimv2.vlm.language import IMAGE_TOKEN

CHAT_BYTES = 32_000  # of a conversation

Query = Mapping[str, str]
Answer = dict[str, Any]


class Answers:
    """All API calls by name, run by the server's one worker."""

    def __init__(self, study: Study, search: Search, upload_bytes: int, stored: Stored | None = None) -> None:
        self.study, self.search, self.upload_bytes, self.stored = study, search, upload_bytes, stored
        self.by_name: dict[str, Callable[[Query], Answer]] = {
            "about": self.about,
            "images": self.images,
            "entry": self.entry,
            "seen": self.pixels,
            "pca": self.pca,
            "similarity": self.similarity,
            "attention": self.attention,
            "caption": self.caption,
            "painting": self.painting,
            "search": self.find,
        }

    def about(self, query: Query) -> Answer:
        """Models, limits, and whether a folder is open."""
        names = page_names([shown.name for shown in self.study.models])
        return {
            "models": [self._about_model(shown, name) for shown, name in zip(self.study.models, names)],
            "upload_bytes": self.upload_bytes,
            "max_pixels": MAX_PIXELS,
            "longest_text": LONGEST_TEXT,
            "own_folder": bool(self.study.album.listed),
        }

    def _about_model(self, shown: ShownModel, name: str) -> Answer:
        config = shown.encoder.config
        stored = ""
        if self.stored is not None and shown.talker is None:  # which pads pictures, where embed crops them
            stored = self.stored.note(shown.encoder, isinstance(shown.model, LiT))
        return {
            "name": name,
            "architecture": config.name,
            "depth": shown.depth,
            "heads": config.heads,
            "width": config.width,
            "patch": config.patch_size,
            "image_size": config.image_size,
            "parameters": sum(p.numel() for p in shown.model.parameters()),
            "kind": "encoder and decoder"
            if isinstance(shown.model, AIMv2)
            else "image-text pair"
            if isinstance(shown.model, LiT)
            else "encoder"
            if shown.talker is None
            else "vision-language model",
            "cannot": shown.cannot,
            "stored": stored,
            "chat": shown.talker is not None,
        }

    def images(self, query: Query) -> Answer:
        """The images to choose from in a tab, and what the limits leave out."""
        album = self.study.album
        shown = [as_dict(entry) for entry in album.shown(tab_of(query))]
        return {"images": shown, "fixed": album.fixed, "total": album.total, "kept": KEPT, "left_out": album.left_out}

    def entry(self, query: Query) -> Answer:
        """One image, which may be one that another tab has added: an address that was copied shows it."""
        return as_dict(self.study.album.entry(whole(query, "image")))

    def remove(self, query: Query) -> Answer:
        """Forget an image that the tab has added."""
        self.study.album.remove(whole(query, "image"), tab_of(query))
        return {}

    def warm(self, index: int, what: str) -> None:
        """Compute one part of what the page shows first, so that its first visit need not wait for it."""
        last = self.study.model(index).depth - 1
        query = {"model": str(index), "image": "0", "layer": str(last), "share": "0.5"}
        with contextlib.suppress(RequestError):  # what the model can't do
            self.by_name[what](query)

    def pixels(self, query: Query) -> Answer:
        """An image after the model's transform, with its grid and its crop within the full image."""
        index, number = self._model_and_image(query)
        rows, columns = self.study.grid(index, number)
        picture = self.study.pixels(index, number).permute(1, 2, 0).numpy()
        return {
            "picture": data_uri(to_png(picture)),
            "rows": rows,
            "columns": columns,
            "height": picture.shape[0],
            "width": picture.shape[1],
            "box": self.study.box(index, number),
        }

    def pca(self, query: Query) -> Answer:
        """Principal components of the features as colours."""
        index, number = self._model_and_image(query)
        return {"picture": data_uri(to_png(self.study.pca(index, number, whole(query, "layer"))))}

    def similarity(self, query: Query) -> Answer:
        """Similarity of a patch to the others in its image and in the folder."""
        index, number = self._model_and_image(query)
        place = whole(query, "layer"), whole(query, "row"), whole(query, "column")
        found = self.study.similar(index, number, *place)
        others = [
            {"image": one["image"], "map": rows_of(one["map"]), "best": round(one["best"], 4)}
            for one in found["others"]
        ]
        return {**found, "own": rows_of(found["own"]), "others": others}

    def attention(self, query: Query) -> Answer:
        """Attention of a patch per head, and the mean over the heads."""
        index, number = self._model_and_image(query)
        heads = self.study.attention(index, number, whole(query, "layer"), whole(query, "row"), whole(query, "column"))
        return {"heads": [rows_of(head, 5) for head in heads], "mean": rows_of(heads.mean(0), 5)}

    def caption(self, query: Query) -> Answer:
        """The caption's tokens, with probabilities and the decoder's attention."""
        words = self.study.caption(*self._model_and_image(query))
        return {
            "words": [as_word(word, word.attention) for word in words],
            "limit": self.study.longest_caption(whole(query, "model")),
        }

    def chat(self, query: Query, content: bytes) -> Answer:
        """The answer to the last of ``content``, a JSON list of questions and answers in turn; its tokens with probabilities and
        attention in ``layer`` of the language model; ``all``: the mean over its layers.
        """
        reply = self.study.reply(*self._model_and_image(query), conversation(content))
        count, layer = len(reply.layers), None if query.get("layer", "all") == "all" else whole(query, "layer")
        if layer is not None and layer >= count:
            raise RequestError(400, f"There is no layer {layer}; attention of {count} layers is known.")
        maps = [word.attention for word in reply.words] if layer is None else reply.layers[layer]
        words = [as_word(word, map) for word, map in zip(reply.words, maps)]
        return {"answer": reply.text, "words": words, "limit": reply.limit, "layers": count}

    def painting(self, query: Query) -> Answer:
        """Predicted patches after a prefix."""
        index, number = self._model_and_image(query)
        predicted = self.study.painting(index, number, number_of(query, "share"), query.get("rolled") == "1")
        return {
            "picture": data_uri(to_png(predicted.image)),
            "prefix": predicted.prefix,
            "loss": round(predicted.loss, 4),
            "note": predicted.note,
        }

    def find(self, query: Query) -> Answer:
        """Text search in the folder."""
        found = self.search.find(whole(query, "model"), query.get("text", ""))
        ranked = [
            {**as_dict(self.study.album.entry(number)), "score": round(score, 4)} for number, score in found.ranked
        ]
        return {"by": found.by, "ranked": ranked, "compared": found.compared, "of": found.of, "tokens": found.tokens}

    def _model_and_image(self, query: Query) -> tuple[int, int]:
        index, number = whole(query, "model"), whole(query, "image")
        self.study.model(index)
        self.study.album.entry(number)
        return index, number


def conversation(content: bytes) -> tuple[str, ...]:
    """Questions and answers in turn, the last one a question.

    Raises:
        RequestError: anything else.
    """
    try:
        texts = parse_json(content)
        good = isinstance(texts, list) and len(texts) % 2 == 1 and "".join(texts).encode() is not None
    except (ValueError, TypeError):  # no JSON, no texts, half a character, lists in lists in lists
        good = False
    if not good or not all(text.strip() for text in texts[::2]):
        raise RequestError(400, "A list of texts is expected: questions and answers in turn, the last one a question.")
    if any(IMAGE_TOKEN in text for text in texts):
        raise RequestError(400, f"{IMAGE_TOKEN} can't be part of a question: the image comes first by itself.")
    return tuple(texts)


def page_names(sources: list[str]) -> list[str]:
    """Models' names on the page: no more of their paths than sets them apart."""
    parts = [source.rstrip("/").split("/") for source in sources]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{one[-1]} ({at})" for at, one in enumerate(parts, 1)]


def tab_of(query: Query) -> str:
    """The tab of the browser that makes a request: its own random name.

    Raises:
        RequestError: longer than 40 characters.
    """
    if len(tab := query.get("tab", "")) > 40:
        raise RequestError(400, "tab: up to 40 characters are expected.")
    return tab


def as_dict(entry: Entry) -> Answer:
    """JSON form of an entry."""
    return {"image": entry.number, "name": entry.name, "kind": entry.kind, "says": entry.says}


def as_word(word: Word, attention: np.ndarray) -> Answer:
    """JSON form of a token with its attention [h, w]."""
    return {
        "text": word.text,
        "probability": round(word.probability, 4),
        "alternatives": [[text, round(probability, 4)] for text, probability in word.alternatives],
        "attention": rows_of(attention, 7),
        "share": round(float(attention.sum()), 3),
    }


def rows_of(map: np.ndarray, digits: int = 4) -> list[list[float]]:
    """[h, w] as nested lists, rounded to ``digits`` decimals."""
    return np.round(map.astype(np.float64), digits).tolist()


def whole(query: Query, key: str) -> int:
    """A non-negative integer query parameter.

    Raises:
        RequestError: missing or anything else.
    """
    text = query.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 17):
        raise RequestError(400, f"{key}: a whole number from 0 is expected.")
    return int(text)


def number_of(query: Query, key: str) -> float:
    """A finite number as query parameter.

    Raises:
        RequestError: missing or anything else.
    """
    try:
        value = float(query.get(key, ""))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(400, f"{key}: a number is expected.")
    return value
