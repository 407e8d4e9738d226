"""Questions of shards, scored by exact match: accuracy of each kind next to what needs no image.

The scenes of ``aimv2 data shapes --questions`` state the kind of each question; other conversations are one kind, ``all``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aimv2.data.images.decode import ImageError, image_size
from aimv2.data.scene_questions import KINDS
from aimv2.data.shards.format import Parts, find_shards, json_of, read_samples
from aimv2.data.text.conversations import IMAGE, ConversationError, Turn, images_of, read_conversation
from aimv2.errors import UsageError
from aimv2.evals.scores import wilson
from aimv2.evals.vlm.answered import Answerer, digests, shuffled
from aimv2.progress import tracked
from aimv2.tables import TextTable, percent
from aimv2.vlm.answer import Picture, Question, question, too_long

ALL = "all"
ROLES = ("user", "assistant")  # in turn
TWO = ("exists", "relation", "larger", "more")  # kinds of scenes whose question leaves two answers
CHANCE = "of kinds with two answers 1/2, of others 1 / the number of different answers"
COLUMNS = {
    "accuracy": "accuracy", "text_only_accuracy": "text only", "shuffled_accuracy": "shuffled", "majority_accuracy": "majority",
    "chance": "chance",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A question with its only right answer; ``sample`` is the key of its sample."""

    sample: str
    question: Question
    answer: str
    kind: str = ALL


@dataclass
class QuestionSet:
    """The questions of a source.

    Attributes:
        name: of the source.
        source: as given.
        documents: its questions.
        unreadable: samples whose image can't be read.
        bad: samples without questions, by reason.
    """

    name: str
    source: str
    documents: list[Document]
    unreadable: int
    bad: dict[str, int]


def read_documents(
    source: str,
    split: Literal["train", "val", "test"] = "val",
    limit: int = 0,
    option: str = "--data",
    earlier_turns: bool = True,
) -> QuestionSet:
    """The questions of a split of shards, sample by sample.

    Args:
        source: folder, glob, brace pattern or one tar.
        split: train, val or test.
        limit: the first so many samples with questions; 0: all.
        option: that an error names.
        earlier_turns: whether a question comes after the earlier ones of its conversation and their right answers, as in training.

    Raises:
        UsageError: no shards, no such split, no question.
    """
    tars = find_shards(source, split, option=option)
    if not tars:
        raise UsageError(f"{option} {source}: no {split}-*.tar in it; --split train is what it has", code="missing")
    name = Path(source).name
    found = QuestionSet(name, source, [], 0, {})
    samples = 0
    for key, parts in tracked((pair for tar in tars for pair in read_samples(tar)), f"reading {name}, samples", None):
        try:
            documents = list(of_sample(key, parts, earlier_turns))
        except ImageError:
            found.unreadable += 1
            continue
        except ConversationError as error:
            found.bad[error.code] = found.bad.get(error.code, 0) + 1
            continue
        found.documents += documents
        samples += bool(documents)
        if samples == limit > 0:
            break
    if not found.documents:
        why = ", ".join(f"{count:,} {code}" for code, count in found.bad.items())
        why += f"{', ' * bool(why)}{found.unreadable:,} unreadable images" if found.unreadable else ""
        raise UsageError(
            f"{option} {source}: no question in its {split} split ({why or 'no samples'}); shards of `aimv2 data shapes OUT "
            "--questions N`, or with conversations, are expected",
            code="missing",
        )
    return found


def of_sample(key: str, parts: Parts, earlier_turns: bool = True) -> Iterator[Document]:
    """The questions of a sample, each after the earlier ones and their right answers, or as a conversation of its own.

    A question of its own has the images of its turn, where that shows none those of the turns before it.

    Raises:
        ImageError: an image can't be read.
        ConversationError: neither questions nor a conversation.
    """
    listed = json_of(parts).get("questions")
    if isinstance(listed, list) and all(
        isinstance(one, dict) and {"question", "answer"} <= one.keys() for one in listed
    ):
        images = images_of(parts)
        texts = [text for one in listed for text in (str(one["question"]), str(one["answer"]))]
        places = f"{IMAGE}\n" * len(images)
        turns = [Turn(ROLES[n % 2], text if n else places + text) for n, text in enumerate(texts)]
        kinds = [str(one.get("kind", ALL)) for one in listed]
    else:
        conversation, images = read_conversation(parts)
        turns, kinds = list(conversation.turns), [ALL] * conversation.answers
    pictures, messages = readable(images), [{"role": turn.role, "content": turn.text} for turn in turns]
    first, shown = len(turns) % 2, 0  # after a system prompt; images so far
    for at, kind in zip(range(first, len(turns), 2), kinds):
        before, shown = shown, shown + turns[at].text.count(IMAGE)
        if earlier_turns:
            posed = Question(tuple(messages[: at + 1]), tuple(pictures[:shown]))
        else:
            single = question(turns[at].text, *pictures[before if shown > before else 0 : shown])
            posed = Question((*messages[:first], *single.messages), single.images)
        yield Document(key, posed, turns[at + 1].text, kind)


def readable(images: Sequence[bytes]) -> list[Picture]:
    """
    Raises:
        ImageError: one of them can't be read.
    """
    for data in images:
        image_size(data)
    return [Picture(data) for data in images]


# ---- scores ----


def plain(text: str) -> str:
    """What exact match compares: lower case, single spaces, no full stop at the end."""
    return re.sub(r"\s+", " ", text.strip().lower()).removesuffix(".")


def answered(
    answerer: Answerer, documents: Sequence[Document], seed: int = 0, controls: bool = True
) -> tuple[dict[str, list[str | None]], int]:
    """Answers under each condition, and how many questions kept their images where those were to be exchanged.

    The conditions are ``accuracy`` with the images, and as controls ``text_only_accuracy`` without any, and ``shuffled_accuracy``
    with those of other samples. None stands for the answer to a question that does not fit the context.

    Args:
        answerer: the model.
        documents: questions.
        seed: of the exchange of images.
        controls: False: with the images only.

    Raises:
        UsageError: not one question fits the context.
    """
    plainly, kept = [one.question for one in documents], 0
    found = {"accuracy": answerer(plainly, "answers")}
    if all(text is None for text in found["accuracy"]):
        why = too_long(answerer.model, answerer.processor, plainly[0], answerer.max_tokens)
        why = f"not one of {len(plainly):,} questions fits; {why}"
        raise UsageError(f"--max-tokens {answerer.max_tokens}: {why}", code="limit")
    if controls:
        found["text_only_accuracy"] = answerer([one.without_images() for one in plainly], "answers, text only")
        others = shuffled([one.images for one in plainly], seed)
        mixed = [Question(one.messages, images) for one, images in zip(plainly, others)]
        found["shuffled_accuracy"] = answerer(mixed, "answers, shuffled images")
        kept = sum(
            bool(own.images) and digests(own.images) == digests(other.images) for own, other in zip(plainly, mixed)
        )
    return found, kept


def figures_of(documents: Sequence[Document], answers: Mapping[str, Sequence[str | None]]) -> dict[str, Any]:
    """Accuracy of all questions and of each kind.

    Args:
        documents: questions with right answers.
        answers: by condition, as :func:`answered` gives them; None is wrong.

    Returns:
        of all, and in ``kinds`` of each kind: ``questions``, fractions right by condition, ``accuracy_interval`` (95%, Wilson),
        ``majority_accuracy`` (the most frequent answer of the kind, here), ``chance`` (:data:`CHANCE`); of all ``too_long``, the
        number of questions without an answer.
    """
    right = {
        name: [text is not None and plain(text) == plain(one.answer) for text, one in zip(texts, documents)]
        for name, texts in answers.items()
    }
    by_kind: dict[str, list[int]] = {}
    for row, one in enumerate(documents):
        by_kind.setdefault(one.kind, []).append(row)
    kinds = {}
    for kind in sorted(by_kind, key=lambda kind: ([*KINDS, kind].index(kind), kind)):
        rows = by_kind[kind]
        counts = Counter(plain(documents[row].answer) for row in rows)
        kinds[kind] = {
            "questions": len(rows),
            **_fractions({name: [marks[row] for row in rows] for name, marks in right.items()}),
            "majority_accuracy": max(counts.values()) / len(rows),
            "chance": 1 / (2 if kind in TWO else len(counts)),
        }
    whole = {"questions": len(documents), **_fractions(right)}
    for name in ("majority_accuracy", "chance"):
        whole[name] = sum(found[name] * found["questions"] for found in kinds.values()) / len(documents)
    unanswered = sum(text is None for text in answers["accuracy"])
    return {**whole, "too_long": unanswered, "kinds": kinds}


def _fractions(right: dict[str, list[bool]]) -> dict[str, Any]:
    found: dict[str, Any] = {name: sum(marks) / len(marks) for name, marks in right.items()}
    marks = right["accuracy"]
    return {**found, "accuracy_interval": list(wilson(sum(marks), len(marks)))}


def table_of(figures: dict[str, Any]) -> TextTable:
    """A row for each kind and one for all."""
    names = [name for name in COLUMNS if name in figures]
    heads = ["kind", "questions", *(COLUMNS[name] for name in names)]
    rows = {**figures["kinds"], ALL: figures}
    cells = [[kind, f"{row['questions']:,}", *(percent(row[name]) for name in names)] for kind, row in rows.items()]
    return TextTable(heads, cells, right=heads[1:])
