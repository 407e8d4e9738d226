"""Retrieval: the image of a caption and a caption of an image, among candidates; recall at k (Flickr and COCO style).

Legend: N candidate images, M captions of theirs, Q queries, K what they choose from.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from aimv2.data.ahead import ahead
from aimv2.data.images import ImageError, decode_image
from aimv2.data.shards import captions_of, find_shards, image_of, read_sample, read_samples, scan_shard, split_shards
from aimv2.data.sources import Columns, Item, Reject, Source, open_folder
from aimv2.data.text import clean_text
from aimv2.errors import UsageError
from aimv2.evals.result import check_out, make_result, write_result
from aimv2.evals.scorer import PRIOR_IMAGES, Matcher, by_cosine, by_likelihood, stacked
from aimv2.evals.scores import wilson
from aimv2.models.aimv2 import AIMv2
from aimv2.models.lit import LiT

CANDIDATES = 100  # by likelihood, where nothing else is asked for
USUAL_CAPTIONS = "captions.txt"  # of several captions files in a folder
SPLITS = ("test", "val", "train")


@dataclass(frozen=True)
class Asked:
    """What a user asked for beside the model; see :func:`aimv2.api.retrieve`."""

    data: str
    captions: str | None
    candidates: int | None
    k: tuple[int, ...]
    normalize: str
    seed: int
    batch_size: int
    out: str | None


@dataclass(frozen=True)
class Captioned:
    """An image with its captions; ``read`` gives its encoded bytes."""

    key: str
    read: Callable[[], bytes]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Candidates:
    """Images as the model sees them, [3, H, W] each, their captions, and other images for a prior."""

    images: list[Tensor]
    captions: list[tuple[str, ...]]
    others: list[Tensor]
    rejected: list[dict[str, str]]


def measure(matcher: Matcher, asked: Asked) -> dict[str, Any]:
    """Draws candidates, scores every caption of theirs on every image, ranks both ways, writes.

    Raises:
        UsageError: data without captions or with too few images, k that says nothing.
    """
    started = time.perf_counter()
    items, split = open_captioned(asked.data, asked.captions)
    usual = CANDIDATES if matcher.by == "likelihood" else len(items)
    count = usual if asked.candidates is None else asked.candidates
    if len(items) < count:
        raise UsageError(
            f"--data {asked.data}: {len(items)} images with captions, fewer than the {count} candidates; "
            f"--candidates {len(items)}"
        )
    if max(asked.k) >= count:
        raise UsageError(f"--k {max(asked.k)}: below the number of candidates, {count}, expected")
    out = check_out(asked.out, "retrieve")
    likely = matcher.by == "likelihood"
    prior = likely and asked.normalize == "prior"
    drawn = draw(matcher, items, count, PRIOR_IMAGES if prior else 0, asked)
    scores, prior_from = score_all(matcher, drawn, asked)
    own = relevant(drawn.captions)
    figures = {
        "text_to_image": recall(scores.T, own.T, asked.k),
        "image_to_text": recall(scores, own, asked.k),
    }
    protocol: dict[str, Any] = {
        "name": f"retrieval, {matcher.by}",
        "candidates": count,
        "view": "centred square" if matcher.model.encoder.config.image_size else "whole image",
        "captions": "every caption of a candidate; an image is found by any of its own",
        "equal_captions": "one caption of several images belongs to all of them",
        "ties": "count against the model",
    }
    if likely:
        protocol |= {"normalize": asked.normalize, "prior_from": prior_from}
    about = {
        "name": Path(asked.data).name,
        "source": asked.data,
        "split": split,
        "images": len(items),
        "captions": own.shape[1],
        "rejected": drawn.rejected,
    }
    seconds = time.perf_counter() - started
    return write_result(out, make_result("retrieve", protocol, matcher.about(), about, figures, seconds, asked.seed))


# ---- data ----


def open_captioned(source: str, captions: str | None) -> tuple[list[Captioned], str]:
    """Images with captions, and the name of their split: test, else val, else train (shards); "all" (a folder).

    Args:
        source: WebDataset shards (folder, pattern, one tar), or a folder of images with a captions file or sidecars.
        captions: the captions file, where a folder has several; None: ``captions.txt`` among them.

    Raises:
        UsageError: nothing there, no captions.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not any(path.glob("*.tar")):
        return _of_folder(path, source, captions), "all"
    if not path.exists() and not any(mark in source for mark in "*?[{"):
        raise UsageError(f"--data {source}: no such folder or file; images with captions, or shards, are expected")
    if captions is not None:
        raise UsageError(f"--captions {captions}: {source} is shards, which hold their captions; leave the option out")
    if path.is_dir():
        groups = split_shards(path, option="--data")
        split = next(name for name in SPLITS if groups[name])
        shards = groups[split]
    else:
        split, shards = "all", find_shards(source, "train", option="--data")
    found = [item for shard in shards for item in _of_shard(shard)]
    if not found:
        raise UsageError(
            f"--data {source}: no image with a caption in {shards[0].name}{' and others' * (len(shards) > 1)}"
        )
    return found, split


def _of_shard(shard: Path) -> Iterator[Captioned]:
    offsets = scan_shard(shard, keep_keys=False).offsets
    for (key, parts), begin, end in zip(read_samples(shard), offsets, offsets[1:]):
        texts = tuple(text for field in captions_of(parts).values() for text in field)
        if texts and image_of(parts) is not None:
            yield Captioned(key, partial(_read_from_shard, shard, begin, end), texts)


def _read_from_shard(shard: Path, begin: int, end: int) -> bytes:
    found = image_of(read_sample(shard, begin, end))
    return found[1] if found else b""


def _of_folder(root: Path, source: str, captions: str | None) -> list[Captioned]:
    if captions is None and (root / USUAL_CAPTIONS).is_file():
        captions = USUAL_CAPTIONS
    planned: Source = open_folder(root, captions, Columns(), "{}")
    if planned.classes:
        raise UsageError(
            f"--data {source}: class folders without captions; a captions file (--captions FILE) or sidecars expected"
        )
    found = []
    for item in planned.items:
        if isinstance(item, Reject):
            continue
        texts = item.captions
        if not texts:  # in a file beside the image
            loaded = next(iter(planned.reader.load([item])))
            texts = {} if isinstance(loaded, Reject) else loaded.captions
        if listed := tuple(text for field in texts.values() for text in field):
            found.append(Captioned(item.image, partial(_read_file, item), listed))
    if not found:
        raise UsageError(f"--data {source}: no image with a caption there")
    return found


def _read_file(item: Item) -> bytes:
    try:
        return Path(item.where[0]).read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from None


def draw(matcher: Matcher, items: Sequence[Captioned], count: int, others: int, asked: Asked) -> Candidates:
    """``count`` readable images and up to ``others`` further ones, in an order drawn by the seed.

    Raises:
        UsageError: fewer readable images than candidates.
    """
    order = np.random.default_rng(asked.seed).permutation(len(items)).tolist()
    found = Candidates([], [], [], [])

    def read(row: int) -> tuple[Captioned, Tensor | str]:
        try:
            return items[row], matcher.see(decode_image(items[row].read()))
        except ImageError as error:
            return items[row], str(error)

    for item, image in ahead(read, order):
        if isinstance(image, str):
            found.rejected.append({"key": item.key, "reason": image})
        elif len(found.images) < count:
            found.images.append(image)
            found.captions.append(item.captions)
        elif len(found.others) < others:
            found.others.append(image)
        else:
            break
    if len(found.images) < count:
        raise UsageError(
            f"--data {asked.data}: {len(found.images)} images could be read, fewer than the {count} candidates; "
            f"{found.rejected[0]['key']}: {found.rejected[0]['reason']}"
        )
    return found


# ---- scores ----


def score_all(matcher: Matcher, drawn: Candidates, asked: Asked) -> tuple[np.ndarray, str | None]:
    """Every caption on every image, [N, M] float64, and in words what a prior was estimated from."""
    groups = [(text,) for texts in drawn.captions for text in texts]
    prior_from = None
    if matcher.by == "contrastive":
        scorer = by_cosine(cast(LiT, matcher.model), groups)
    else:
        others = drawn.others
        if asked.normalize == "prior":
            prior_from = f"{len(others)} images that are no candidates"
        if asked.normalize == "prior" and len(others) < min(PRIOR_IMAGES, len(drawn.images)):
            others, prior_from = drawn.images, "the candidates themselves, too few others being there"
        batches = stacked(others, asked.batch_size)
        scorer = by_likelihood(cast(AIMv2, matcher.model), groups, asked.normalize, batches)
    console = Console(file=sys.stderr)
    total = -(-len(drawn.images) // asked.batch_size)
    batches = stacked(drawn.images, asked.batch_size)
    parts = [scorer(images) for images in track(batches, "images", total, console=console, transient=True)]
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
    """How many wrong answers stand before the best right one, equal scores counted as before it: int64 [Q].

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
    """Recall at each k, 0..1, with Wilson's interval, beside chance and the interval in which 95% of random orders fall.

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
