"""The first conversations of training data as one self-contained page: questions and answers with all their images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aimv2.config.load import check_keys, parse, read_recipe
from aimv2.config.schema import Source
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.passed import PassedOver
from aimv2.data.shards.format import Parts, captions_of, json_of, read_samples
from aimv2.data.stream.samples import training_shards, training_sources
from aimv2.data.text.conversations import ConversationError, Turn, bad_lines, holds_conversation, read_conversation
from aimv2.errors import UsageError
from aimv2.io import write_aside
from aimv2.report.browse.page import COLOURS, QUALITIES, title_of
from aimv2.report.page import render_template
from aimv2.report.runs import date_of
from aimv2.train import prepare

SIDE = 512  # pixels of the longer side of an image on the page, at most
Sources = list[tuple[Source, list[Path]]]


@dataclass(frozen=True)
class ShownTalk:
    """A conversation on the page: images uint8 [H, W, 3]; ``source`` is the index of its source."""

    key: str
    source: int
    images: list[NDArray[np.uint8]]
    turns: tuple[Turn, ...]


def run_sources(recipe: str | None, given: dict[str, Any]) -> tuple[str, Sources, Parts] | None:
    """(``objective.name``, the sources of a run, each with its tars, members of the first sample); None for what can't be read.

    Args:
        recipe, given: as in :func:`aimv2.api.pretrain`.
    """
    try:
        base = read_recipe(recipe) if recipe else {}
        check_keys(given, "on the command line", base)
        config = parse({**base, **given})
        prepare.locate_data(config)
        found = list(zip(training_sources(config.data), training_shards(config.data)))
    except UsageError:  # the run's own error comes of the run's own check
        return None
    first = next((parts for _, tars in found for tar in tars for _, parts in read_samples(tar)), {})
    return config.objective.name, found, first


def conversation_sources(opened: tuple[str, Sources, Parts] | None) -> Sources | None:
    """The sources of a run on conversations, of :func:`run_sources`; None for other runs."""
    if opened is None:
        return None
    objective, found, first = opened
    return found if objective == "instruct" or (holds_conversation(json_of(first)) and not captions_of(first)) else None


def first_samples(sources: Sources, count: int) -> Iterator[tuple[int, str, Parts]]:
    """(number of the source, key, members) of the first samples of each source, ``count`` in all."""
    for number, (_, tars) in enumerate(sources):
        wanted = count // len(sources) + (number < count % len(sources))
        for key, parts in islice((sample for tar in tars for sample in read_samples(tar)), wanted):
            yield number, key, parts


def save_page(template: str, context: dict[str, Any], sources: Sources, out: Path) -> dict[str, Any]:
    """Fill a template on samples of ``sources`` and write the page.

    Returns:
        ``page``: its path; ``bytes``.

    Raises:
        UsageError: it can't be written.
    """
    names = [source.name or Path(source.path).name for source, _ in sources]
    context |= {
        "title": title_of([source for source, _ in sources]),
        "names": names,
        "colours": COLOURS,
        "made": date_of(),
    }
    html = render_template("aimv2.report.browse/templates", template, context, QUALITIES)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_aside(out, html)
    except OSError as error:
        raise UsageError(f"--out {out} can't be written: {error.strerror}") from None
    return {"page": str(out), "bytes": len(html.encode())}


def write_talks(sources: Sources, count: int, out: Path) -> dict[str, Any]:
    """Write a page of the first conversations of each source, ``count`` in all, and return its figures.

    Raises:
        UsageError: no conversation, or a page that can't be written.
    """
    bad, talks = PassedOver(), list[ShownTalk]()
    for number, key, parts in first_samples(sources, count):
        try:
            talk, images = read_conversation(parts)
            talks.append(ShownTalk(key, number, list(map(small, images)), talk.turns))
        except ConversationError as error:
            bad.add(error.code, f"{key}: {error}")
        except ImageError as error:
            bad.add("image-unreadable", f"{key}: {error}")
    if not talks:
        why = "; ".join(bad_lines(bad.result()))
        raise UsageError(f"data.train: no conversation among its first {count} samples; {why}", code="missing")
    page = save_page("talks.html", {"talks": talks, "bad": bad_lines(bad.result())}, sources, out)
    return {
        **page,
        "samples": len(talks),
        "images": sum(len(talk.images) for talk in talks),
        "text_only": sum(not talk.images for talk in talks),
        "bad": bad.result(),
    }


def small(data: bytes) -> NDArray[np.uint8]:
    """An encoded image for a page, uint8 [H, W, 3], its longer side :data:`SIDE` at most."""
    image = decode_image(data)
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)
