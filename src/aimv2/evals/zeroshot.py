"""Zero-shot classification: the class whose texts fit the image best, by a pair's cosine or a decoder's likelihood.

Legend: N images, C classes, t templates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from aimv2.data.images.class_names import NAMELESS, by_number, join_names
from aimv2.data.images.decode import ImageError
from aimv2.data.images.labelled import Labelled, Split, subset
from aimv2.data.images.opening import EXPECTED, open_labelled
from aimv2.data.prefetch import prefetch_map
from aimv2.errors import UsageError
from aimv2.evals.harness import Evaluation
from aimv2.evals.options import ZeroshotData
from aimv2.evals.scorer import PRIOR_IMAGES, Matcher, Scorer, open_matcher, stacked
from aimv2.evals.scores import per_class, top1, wilson
from aimv2.evals.templates import fill, find_templates, read_lines
from aimv2.evals.untrained import BASELINE
from aimv2.progress import tracked

BEST = 5  # guesses kept an image


@dataclass(frozen=True)
class ZeroshotImages:
    """Images that are measured, images that a text's prior is estimated from (None: none), and in words where from."""

    test: Labelled
    others: Labelled | None
    others_are: str | None


def evaluate_zeroshot(options: ZeroshotData, templates: str, classes: str | None, limit: int) -> dict[str, Any]:
    """The command ``zeroshot``: scores every class on every image, counts, writes.

    Raises:
        UsageError: data, class names or templates that do not fit.
    """
    source, dataset = options.source, options.dataset
    with Evaluation("zeroshot", options.out) as evaluation:
        matcher = open_matcher(options.model, options.by, options.where, options.stats)
        # a decoder reads every text before every image: eighty per class are for pairs
        texts = find_templates(templates, dataset, matcher.by == "contrastive")
        prior = matcher.by == "likelihood" and options.normalize == "prior"
        images = choose(source, dataset, limit, options.seed, prior, options.image_root)
        names = class_names(images.test, classes, dataset)
        evaluation.open_folder()
        groups = [fill(texts, name) for name in names]
        rejected: list[dict[str, str]] = []

        def figures_of(matcher: Matcher, rejected: list[dict[str, str]]) -> dict[str, Any]:
            others = image_batches(matcher, images.others, options.batch_size, []) if images.others else ()
            scorer = matcher.scorer(groups, options.normalize, (batch for batch, _ in others))
            return figures(*guess(matcher, scorer, images.test, options.batch_size, rejected), names)

        found = figures_of(matcher, rejected)
        if options.baselines:
            found["baselines"] = {BASELINE: figures_of(matcher.untrained(options.seed), [])}
        protocol: dict[str, Any] = {
            "name": f"zero-shot, {matcher.by}",
            "templates": list(texts),
            "class_names": classes or "of the data set",
            "view": matcher.view,
        }
        if matcher.by == "likelihood":
            protocol |= {"normalize": options.normalize, "prior_from": images.others_are}
        about = {
            "name": images.test.name,
            "dataset": dataset,
            "source": images.test.source,
            "split": images.test.split,
            "test_images": len(images.test.labels) - len(rejected),
            "classes": len(names),
            "rejected": rejected,
        }
        return evaluation.result(protocol, matcher.about(), about, found, options.seed)


def choose(
    source: str, dataset: str | None, limit: int, seed: int, prior: bool, image_root: str | None = None
) -> ZeroshotImages:
    """The split to evaluate, cut to ``limit`` images, and other images if a prior is wanted.

    Raises:
        UsageError: see :func:`aimv2.data.images.opening.open_labelled`.
    """
    order: tuple[Split, ...] = ("test", "val", "train")
    data = next((found for split in order if (found := open_labelled(source, split, dataset, image_root))), None)
    if data is None:
        raise UsageError(f"--data {source}: no labelled images there; expected {EXPECTED}", code="missing")
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(data.labels))
    cut = limit or len(rows)
    test, rest = subset(data, np.sort(rows[:cut])), rows[cut:]
    if not prior:
        return ZeroshotImages(test, None, None)
    if len(rest) >= PRIOR_IMAGES:
        return ZeroshotImages(
            test, subset(data, rest[:PRIOR_IMAGES]), f"{PRIOR_IMAGES} images of the split, not measured"
        )
    for split in order[1:] if data.split == "test" else ("train",) if data.split == "val" else ():
        if (other := _unlabelled(source, split, image_root)) is not None:
            count = min(PRIOR_IMAGES, len(other.labels))
            drawn = rng.choice(len(other.labels), count, replace=False)
            return ZeroshotImages(
                test, subset(other, drawn), f"{count} images of the {split} split, without their labels"
            )
    count = min(PRIOR_IMAGES, len(test.labels))
    drawn = rng.choice(len(test.labels), count, replace=False)
    return ZeroshotImages(test, subset(test, drawn), f"{count} of the measured images, without their labels")


def _unlabelled(source: str, split: Split, image_root: str | None) -> Labelled | None:
    """A further split, for its images only: one whose labels are refused counts as absent."""
    try:
        return open_labelled(source, split, image_root=image_root)
    except UsageError:
        return None


def class_names(data: Labelled, file: str | None, dataset: str | None = None) -> tuple[str, ...]:
    """What the templates are filled with: the names of ``--classes``, else the data set's, underscores as spaces.

    Where a file holds the data set's own names, each belongs to its class, in whatever order.

    Raises:
        UsageError: not as many names as classes, or names that are numbers.
    """
    if file is None:
        names = tuple(" ".join(name.replace("_", " ").split()) for name in data.classes)
        if all(NAMELESS.fullmatch(name) for name in names):
            raise UsageError(
                f"--data {data.source}: its classes are called {names[0]}, {names[1]}, ...; give their names with "
                f"--classes FILE, one a line in the order of the labels ({len(names)} of them)"
            )
        return names
    found = by_number(tuple(read_lines(Path(file).expanduser(), "--classes", dataset)))
    if len(found) != len(data.classes):
        raise UsageError(f"--classes {file}: {len(found)} names, but {data.source} has {len(data.classes)} classes")

    def refuse(what: str) -> UsageError:
        wanted = "each class's own name, a line CLASS: NAME for each, or new names in the order of the labels"
        return UsageError(f"--classes {file}: holds {what}; {wanted} expected", code="mismatch")

    joined = join_names(data.classes, found, range(len(found)), refuse)
    return found if joined is None else tuple(name for _, name in sorted(joined))


def image_batches(
    matcher: Matcher, data: Labelled, size: int, rejected: list[dict[str, str]]
) -> Iterator[tuple[Tensor, list[int]]]:
    """Batches of images as the model sees them, with their rows; what can't be read is appended to ``rejected``."""
    rows: list[int] = []

    def read(row: int) -> Tensor | str:
        try:
            return matcher.see(data.image(row))
        except ImageError as error:
            return str(error)

    def good() -> Iterator[Tensor]:
        count = len(data.labels)
        for row, found in enumerate(tracked(prefetch_map(read, range(count)), f"images, {data.split}", count)):
            if isinstance(found, str):
                rejected.append({"key": data.keys[row], "reason": found})
            else:
                rows.append(row)
                yield found

    for batch in stacked(good(), size):
        yield batch, [rows.pop(0) for _ in range(len(batch))]


def guess(
    matcher: Matcher, scorer: Scorer, data: Labelled, size: int, rejected: list[dict[str, str]]
) -> tuple[np.ndarray, np.ndarray]:
    """The best classes of every readable image, best first, and its label: int64 [N, up to 5] and [N].

    Raises:
        UsageError: no image could be read.
    """
    best, labels = list[np.ndarray](), list[np.ndarray]()
    for images, rows in image_batches(matcher, data, size, rejected):
        order = np.argsort(-scorer(images).numpy(), axis=1, kind="stable")  # of equals the first class
        best.append(order[:, :BEST])
        labels.append(data.labels[rows])
    if not best:
        raise UsageError(f"--data: no image could be read; {rejected[0]['key']}: {rejected[0]['reason']}")
    return np.concatenate(best), np.concatenate(labels)


def figures(best: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Top-1 with Wilson's interval, top-5 (None with five classes or fewer), by class, chance; fractions 0..1."""
    right = int((best[:, 0] == labels).sum())
    low, high = wilson(right, len(labels))
    return {
        "top1": top1(best[:, 0], labels),
        "top1_interval": [low, high],
        "top5": float((best == labels[:, None]).any(1).mean()) if len(names) > BEST else None,
        "chance": 1 / len(names),
        "per_class": [
            {"class": name, "top1": found} for name, found in zip(names, per_class(best[:, 0], labels, len(names)))
        ],
    }
