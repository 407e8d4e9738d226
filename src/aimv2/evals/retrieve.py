"""Retrieval: the image of a caption and a caption of an image, among candidates; recall at k (Flickr and COCO style).

Legend: N candidate images, M captions of theirs, Q queries, K what they choose from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimv2.data.images.captioned import open_captioned, read_captioned
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.images.entries import SourceEntry
from aimv2.data.prefetch import prefetch_map
from aimv2.data.text.tokenizer import clean_text
from aimv2.errors import UsageError
from aimv2.evals.harness import Evaluation
from aimv2.evals.options import MatchOptions
from aimv2.evals.scorer import PRIOR_IMAGES, Matcher, open_matcher, stacked
from aimv2.evals.scores import wilson
from aimv2.evals.untrained import BASELINE
from aimv2.progress import tracked

CANDIDATES = 100  # by likelihood, by default


@dataclass(frozen=True)
class Candidates:
    """Images as the model sees them, [3, H, W] each, their captions, and other images for a prior."""

    images: list[Tensor]
    captions: list[tuple[str, ...]]
    others: list[Tensor]
    rejected: list[dict[str, str]]


def evaluate_retrieval(
    options: MatchOptions, data: str, captions: str | None, candidates: int | None, ks: Sequence[int]
) -> dict[str, Any]:
    """The command ``retrieve``: samples candidates, scores every caption of theirs on every image, ranks both ways, writes.

    Raises:
        UsageError: data without captions or with too few images, k that says nothing.
    """
    with Evaluation("retrieve", options.out) as evaluation:
        matcher = open_matcher(options.model, options.by, options.where, options.stats)
        items, split = open_captioned(data, captions)
        likely = matcher.by == "likelihood"
        exactly = candidates or (CANDIDATES if likely else None)
        if exactly and len(items) < exactly:
            raise too_few(data, f"{len(items)} images", exactly)
        evaluation.open_folder()
        prior = likely and options.normalize == "prior"
        drawn = draw(matcher, items, exactly or len(items), PRIOR_IMAGES if prior else 0, options.seed)
        count = len(drawn.images)
        if count < (exactly or 2):
            raise too_few(data, f"{count} images with captions could be read", exactly or 2, drawn.rejected)
        if max(ks) >= count:
            raise UsageError(f"--k {max(ks)}: below the number of candidates, {count}, expected")
        own = relevant(drawn.captions)

        def figures_of(matcher: Matcher) -> tuple[dict[str, Any], str | None]:
            scores, prior_from = score_all(matcher, drawn, options)
            ways = {"text_to_image": recall(scores.T, own.T, ks), "image_to_text": recall(scores, own, ks)}
            return ways, prior_from

        figures, prior_from = figures_of(matcher)
        if options.baselines:
            figures["baselines"] = {BASELINE: figures_of(matcher.untrained(options.seed))[0]}
        protocol: dict[str, Any] = {
            "name": f"retrieval, {matcher.by}",
            "candidates": count,
            "view": matcher.view,
            "captions": "every caption of a candidate; an image is found by any of its own",
            "equal_captions": "one caption of several images belongs to all of them",
            "ties": "count against the model",
        }
        if likely:
            protocol |= {"normalize": options.normalize, "prior_from": prior_from}
        about = {
            "name": Path(data).name,
            "source": data,
            "split": split,
            "images": len(items),
            "captions": own.shape[1],
            "rejected": drawn.rejected,
        }
        return evaluation.result(protocol, matcher.about(), about, figures, options.seed)


def too_few(data: str, there: str, wanted: int, rejected: Sequence[dict[str, str]] = ()) -> UsageError:
    """The error if there are not enough candidates; names the first image that was left out."""
    why = "".join(f"; {row['key']}: {row['reason']}" for row in rejected[:1])
    return UsageError(f"--data {data}: {there}, fewer than the {wanted} candidates (--candidates){why}", code="limit")


def draw(matcher: Matcher, items: Sequence[SourceEntry], count: int, others: int, seed: int) -> Candidates:
    """Up to ``count`` images that can be read and have captions and up to ``others`` further ones, drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    found = Candidates([], [], [], [])

    def read(row: int) -> tuple[int, Tensor | str, tuple[str, ...]]:
        try:
            encoded, captions = read_captioned(items[row])
            return row, matcher.see(decode_image(encoded)) if captions else "no caption", captions
        except ImageError as error:
            return row, str(error), ()

    for row, image, captions in tracked(prefetch_map(read, order), "reading images", min(count + others, len(order))):
        if isinstance(image, str):
            found.rejected.append({"key": items[row].image, "reason": image})
        elif len(found.images) < count:
            found.images.append(image)
            found.captions.append(captions)
        elif len(found.others) < others:
            found.others.append(image)
        else:
            break
    return found


# ---- scores ----


def score_all(matcher: Matcher, drawn: Candidates, options: MatchOptions) -> tuple[np.ndarray, str | None]:
    """Every caption on every image, [N, M] float64, and in words what a prior was estimated from."""
    groups = [(text,) for texts in drawn.captions for text in texts]
    others, prior_from = drawn.others, None
    if matcher.by == "likelihood" and options.normalize == "prior":
        prior_from = f"{len(others)} images that are no candidates"
        if len(others) < min(PRIOR_IMAGES, len(drawn.images)):
            others, prior_from = drawn.images, "the candidates themselves, too few others being there"
    scorer = matcher.scorer(
        groups, options.normalize, stacked(tracked(others, "images of the prior", len(others)), options.batch_size)
    )
    images = tracked(drawn.images, "images", len(drawn.images))
    parts = [scorer(batch) for batch in stacked(images, options.batch_size)]
    return torch.cat(parts).double().numpy(), prior_from


def relevant(captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Which captions are an image's own: bool [N, M]; equal captions (cleaned) belong to each other's images.

    Two scenes that look the same in words have the same caption, and neither answer is wrong.
    """
    texts = np.array([clean_text(text) for texts in captions for text in texts])
    owner = np.repeat(np.arange(len(captions)), [len(each) for each in captions])
    _, number = np.unique(texts, return_inverse=True)
    has = np.zeros((len(captions), number.max() + 1), dtype=bool)
    has[owner, number] = True
    return has[:, number]


def best_ranks(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many wrong answers rank before the best right one, equal scores counted as before it: int64 [Q].

    Args:
        scores: [Q, K]; own: bool [Q, K], at least one a row.
    """
    best = np.where(own, scores, -np.inf).max(1)
    return ((scores >= best[:, None]) & ~own).sum(1)


def chance(own: np.ndarray, k: int) -> float:
    """Mean probability that a random order has a right answer in its first k: 1 - C(K - r, k) / C(K, k), r right ones."""
    right, among = own.sum(1), own.shape[1]
    missed = np.ones(len(own))
    for place in range(k):
        missed *= np.maximum(among - right - place, 0) / (among - place)
    return float((1 - missed).mean())


def recall(scores: np.ndarray, own: np.ndarray, ks: Sequence[int]) -> dict[str, Any]:
    """Recall at each k, 0..1, with Wilson's interval, with chance and the interval in which 95% of random orders fall.

    Both intervals take the queries as independent; captions of one image are less than that.

    Args:
        scores: [Q, K]; own: bool [Q, K]; ks: each in 1..K.
    """
    from scipy.stats import binom

    ranks, queries = best_ranks(scores, own), len(scores)
    found: dict[str, Any] = {"queries": queries, "among": scores.shape[1]}
    for k in ks:
        right, guess = int((ranks < k).sum()), chance(own, k)
        found[f"R@{k}"] = right / queries
        found[f"R@{k}_interval"] = list(wilson(right, queries))
        found[f"R@{k}_chance"] = guess
        found[f"R@{k}_chance_interval"] = [float(binom.ppf(edge, queries, guess)) / queries for edge in (0.025, 0.975)]
    return found | {"median_rank": float(np.median(ranks)) + 1}
