"""Text search in the folder, by the two towers of a pair or by the decoder's likelihood; each call scores some more images.

Legend: N images, I patches, D width, P width of the joint embedding space.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from aimv2.evals.scorer import by_cosine, eager
from aimv2.explorer.album import RequestError
from aimv2.explorer.stored import Stored
from aimv2.explorer.study import BUDGET, Study
from aimv2.models.aimv2 import AIMv2
from aimv2.models.likelihood import ImageCache, log_likelihood, tokenize
from aimv2.models.lit import LiT

LONGEST_TEXT = 500  # characters
QUERIES = 16  # queries cached
RESULTS = 24


@dataclass(frozen=True)
class SearchResult:
    """Results of a search so far.

    Attributes:
        by: contrastive or likelihood.
        ranked: (image, score), best first: a cosine, or the log-likelihood of the text relative to the folder's average, in
            nats.
        compared, of: images scored so far, and in total.
        tokens: of a text that is longer than the decoder reads, the first ones that count; 0: all.
    """

    by: str
    ranked: list[tuple[int, float]]
    compared: int
    of: int
    tokens: int = 0


class Vectors:
    """A pair that looks up its image embeddings by number; texts are encoded by the real pair."""

    def __init__(self, pair: LiT, kept: dict[int, Tensor]) -> None:
        self.pair, self.kept = pair, kept

    def encode_image(self, images: Tensor) -> Tensor:
        """Numbers int64 [N] -> [N, P], of unit length."""
        return torch.stack([self.kept[number] for number in images.tolist()])

    def encode_text(self, texts: list[str]) -> Tensor:
        """See :class:`aimv2.evals.scorer.Pair`."""
        return self.pair.encode_text(texts)


class Search:
    """Text-to-image search with every model of a study."""

    def __init__(self, study: Study, stored: Stored | None = None) -> None:
        self.study, self.stored = study, stored
        self.vectors: dict[int, dict[int, Tensor]] = {}  # for pairs: model -> image -> [P]
        self.queries: OrderedDict[tuple[int, str], dict[int, float]] = OrderedDict()

    def find(self, index: int, text: str) -> SearchResult:
        """Continue a search within the time budget and return the results so far.

        Raises:
            RequestError: no text, too long a text, a model without text input.
        """
        model, text = self.study.able(index, "search").model, " ".join(text.split())
        if not text or len(text) > LONGEST_TEXT:
            raise RequestError(400, f"A text of 1 to {LONGEST_TEXT} characters is expected.")
        tokens = 0
        if isinstance(model, LiT):
            scores = self._by_pair(index, model, text)
        else:
            assert isinstance(model, AIMv2) and model.tokenizer is not None
            limit = model.decoder.config.max_text
            whole = model.tokenizer.encode(text, LONGEST_TEXT + 1)  # type: ignore[attr-defined]
            tokens = limit if len(whole) > limit else 0
            logs = self._by_decoder(index, model, text)
            average = torch.tensor(list(logs.values()), dtype=torch.float64).logsumexp(0).item() - math.log(
                len(logs) or 1
            )
            scores = {number: value - average for number, value in logs.items()}
        ranked = sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:RESULTS]
        by = "contrastive" if isinstance(model, LiT) else "likelihood"
        return SearchResult(by, ranked, len(scores), len(self.study.folder()), tokens)

    def _by_pair(self, index: int, model: LiT, text: str) -> dict[int, float]:
        kept, until = self.vectors.setdefault(index, {}), time.monotonic() + BUDGET
        if self.stored is not None and not kept:
            kept |= self.stored.vectors(model)
        for part in self.study.batches(index, [n for n in self.study.folder() if n not in kept], until):
            with eager():
                images = torch.stack([self.study.pixels(index, number) for number in part])
                kept |= zip(part, model.encode_image(images.to(model.log_scale.device)).float())
        there = [number for number in self.study.folder() if number in kept]
        if not there:
            return {}
        found = by_cosine(Vectors(model, kept), [[text]])(torch.tensor(there))
        return dict(zip(there, found[:, 0].tolist()))

    def _by_decoder(self, index: int, model: AIMv2, text: str) -> dict[int, float]:
        """log p(text | image) in nats, from cached encoder features."""
        scores, until = self._scores(index, text), time.monotonic() + BUDGET
        last, tokens = self.study.model(index).depth - 1, tokenize(model, [text])
        place = model.decoder.bos
        for part in self.study.batches(index, [n for n in self.study.folder() if n not in scores], until):
            maps = self.study.maps(index, part, last)
            with eager():
                features = torch.stack([torch.from_numpy(one) for one in maps]).flatten(1, 2)
                caches = model.decoder.new_caches()
                model.decoder.read_image(features.to(place), caches)
                scores |= zip(part, log_likelihood(model, ImageCache(caches), tokens)[:, 0].tolist())
        return {number: scores[number] for number in self.study.folder() if number in scores}

    def _scores(self, index: int, text: str) -> dict[int, float]:
        """Cached scores of a query; the newest QUERIES are kept."""
        found = self.queries.pop((index, text), {})
        self.queries[index, text] = found
        if len(self.queries) > QUERIES:
            self.queries.popitem(last=False)
        return found
