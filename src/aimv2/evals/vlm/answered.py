"""Answers of a vision-language model to many questions: over several processes, and kept so that a later start continues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aimv2.distributed import World
from aimv2.io import parse_json, read_file
from aimv2.progress import progress_bar
from aimv2.vlm.answer import Picture, Question, answer_batches
from aimv2.vlm.model import VisionLanguage

FOLDER = "answers"


class AnswerStore:
    """Answers by the digest of their question: lines of JSON in ``FOLDER`` of a result's folder, a file for each rank.

    The digest covers text and images, the files' name the rest that decides an answer, so nothing is ever read that another model,
    prompt or image led to.
    """

    def __init__(self, home: Path | None, rank: int = 0, **decides: Any) -> None:
        """``home``: folder of the result, None: kept in memory only; ``decides``: weights, chat template, ..."""
        self.folder, self.rank = None if home is None else home / FOLDER, rank
        self.decides = decides
        self.known: dict[str, str] | None = None
        self.name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def read(self) -> dict[str, str]:
        """Everything that any rank had kept at the first call, and what was added since; a line that an interruption cut is left out."""
        if self.known is not None:
            return self.known
        found = self.known = {}
        for file in sorted(self.folder.glob(f"{self.name}-*.jsonl")) if self.folder is not None else ():
            for line in read_file(file).decode(errors="replace").splitlines():
                try:
                    found |= parse_json(line)
                except (ValueError, TypeError):
                    continue
        return found

    def add(self, answers: dict[str, str]) -> None:
        """Keeps answers by digest."""
        self.read().update(answers)
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
            with (self.folder / f"{self.name}-{self.rank}.jsonl").open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(answers) + "\n")  # first the end of a line that an interruption cut


@dataclass(frozen=True)
class Answerer:
    """A model that answers.

    Attributes:
        model: of :func:`aimv2.vlm.model.open_vlm`, on its device.
        processor: its processor.
        store: of earlier and of new answers.
        world: the processes that divide the questions.
        max_tokens: of an answer.
        batch_size: questions per forward pass.
    """

    model: VisionLanguage
    processor: Any
    store: AnswerStore
    world: World
    max_tokens: int = 16
    batch_size: int = 64

    def __call__(self, questions: Sequence[Question], title: str = "answers") -> list[str | None]:
        """Answers in the order of the questions, on every rank; equal questions are answered once. Without a title no progress is shown.

        None stands for the answer to a question that does not fit the context.

        Raises:
            UsageError: see :func:`aimv2.vlm.answer.answer_batches`.
        """
        names = [f"{one.digest()}-{self.max_tokens}" for one in questions]
        # of one rank: while another reads, a third may have begun to add
        known: dict[str, str] = self.world.broadcast(self.store.read() if self.world.main else None)
        missing = {name: one for name, one in zip(names, questions) if name not in known}
        unanswered, (rank, size) = list(missing), (self.world.rank, self.world.size)
        mine = unanswered[len(missing) * rank // size : len(missing) * (rank + 1) // size]
        fresh: dict[str, str | None] = {}
        with progress_bar(title, len(mine), shown=bool(title)) as advance:
            for rows in answer_batches(
                self.model, self.processor, [missing[name] for name in mine], self.max_tokens, self.batch_size
            ):
                written = {mine[row]: text for row, text in rows}
                self.store.add({name: text for name, text in written.items() if text is not None})
                fresh |= written
                advance(len(rows))
        for part in self.world.gather(fresh):
            fresh |= part
        return [fresh[name] if name in fresh else known[name] for name in names]


def shuffled(images: Sequence[tuple[Picture, ...]], seed: int) -> list[tuple[Picture, ...]]:
    """The images of the questions, exchanged among samples by a seed: no question keeps its own, those of one sample stay together.

    Equal images are one sample's. A sample exchanges with those of as many images; one without its like keeps its own.
    """
    names = [digests(own) for own in images]
    units = dict(zip(names, images))
    by_count: dict[int, list[tuple[str, ...]]] = {}
    for name in units:
        by_count.setdefault(len(name), []).append(name)
    rng, given = np.random.default_rng(seed), dict[tuple[str, ...], tuple[Picture, ...]]()
    for alike in by_count.values():
        order = [alike[at] for at in rng.permutation(len(alike))]
        given |= {name: units[other] for name, other in zip(order, order[1:] + order[:1])}
    return [given[name] for name in names]


def digests(images: Sequence[Picture]) -> tuple[str, ...]:
    """What tells images apart."""
    return tuple(image.digest for image in images)
