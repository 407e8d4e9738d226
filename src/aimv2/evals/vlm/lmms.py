"""Our model class for lmms-eval: batched greedy answers, examples before a question, text only, exchanged images."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms
from PIL import Image

from aimv2.data.text.conversations import PLACE
from aimv2.errors import UsageError
from aimv2.evals.vlm.answered import Answerer, digests
from aimv2.io import say
from aimv2.progress import progress_bar
from aimv2.vlm.answer import AHEAD, Picture, Question, question, too_long

MAX_TOKENS = 64  # where a task states none
BATCH_SIZE = 64
TRIES = 50  # documents that are looked at for other images than a document's own
CONDITIONS = ("images", "text only", "shuffled images")
# columns of an answer, in the order in which they are looked for; of several answers the most frequent is shown, of captions the first
ANSWERS = ("multiple_choice_answer", "answers", "caption_str", "annotations_captions", "answer", "caption")


class Aimv2Vlm(lmms):
    """A vision-language model of ``aimv2 vlm build`` or ``aimv2 vlm train``.

    Attributes:
        shots: examples before each question, of the task's training split, as earlier turns of the conversation.
        condition: one of :data:`CONDITIONS`.
        too_long: by task the documents that do not fit the context; their answers are empty.
        kept: by task the documents that kept their images where those were to be exchanged.
        why: what the first of the too long needs.
    """

    is_simple = True

    def __init__(
        self,
        vlm: str = "",
        batch_size: int | str = BATCH_SIZE,
        device: str | None = None,
        max_batch_size: int | None = None,
        shots: int = 0,
        seed: int = 0,
        answerer: Answerer | None = None,
    ) -> None:
        """
        Args:
            vlm: a folder, RUN or RUN@STEP.
            batch_size: questions per forward pass; auto: 64.
            device: cpu, cuda, ...; None: this process's GPU where there is one.
            max_batch_size: not used; lmms-eval gives it.
            shots: see the class.
            seed: of examples and of exchanged images.
            answerer: an opened model instead of ``vlm``.

        Raises:
            UsageError: no vision-language model.
        """
        super().__init__()
        guard_filelocks()
        if answerer is None:
            from aimv2.evals.vlm.score import opened

            answerer = opened(vlm, device, BATCH_SIZE if batch_size == "auto" else int(batch_size))
        self.answerer, self.shots, self.seed, self.condition = answerer, int(shots), int(seed), CONDITIONS[0]
        self.others: dict[str, np.ndarray] = {}
        self.too_long: dict[str, set[int]] = {}
        self.kept: dict[str, set[int]] = {}
        self.why = ""
        self.device = next(answerer.model.parameters()).device
        self._rank, self._world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers of lmms-eval's requests, a window of a few batches in memory at a time; "" to questions that are too long."""
        found = [""] * len(requests)
        self.too_long, self.kept = {}, {}
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(settings_of(request.args[1]), []).append(row)
        names = ", ".join(sorted({str(request.args[4]).removeprefix("aimv2_") for request in requests}))
        with progress_bar(f"{names}, {self.condition}", len(requests)) as advance:
            for (max_tokens, until), rows in groups.items():
                answerer, step = replace(self.answerer, max_tokens=max_tokens), AHEAD * self.answerer.batch_size
                for start in range(0, len(rows), step):
                    part = rows[start : start + step]
                    posed = [self.question_of(requests[row].args) for row in part]
                    for row, one, text in zip(part, posed, answerer(posed, "")):
                        found[row] = cut(text or "", until)
                        if text is None:
                            self.passed_over(requests[row].args, one, max_tokens)
                    advance(len(part))
        for name, documents in self.too_long.items():
            say(f"{name}, {self.condition}: {len(documents):,} too long for the context, counted as wrong")
        return found

    def passed_over(self, args: Sequence[Any], one: Question, max_tokens: int) -> None:
        """Notes a question that does not fit the context."""
        self.too_long.setdefault(args[4], set()).add(args[3])
        if not self.why:
            advice = "--shots, max_new_tokens of the task file (--include)"
            self.why = too_long(self.answerer.model, self.answerer.processor, one, max_tokens, advice)

    def question_of(self, args: Sequence[Any]) -> Question:
        """A request (text, settings, doc_to_visual, number, task, split) as a conversation."""
        text, _, see, number, _, split = args
        task = see.__self__
        own = posed(str(text), self.pictures(task.doc_to_visual(task.dataset[split][number])))
        turns, images = list[dict[str, str]](), list[Picture]()
        for example in self.examples(task, split, number, own):
            one = posed(task.doc_to_text(example), self.pictures(task.doc_to_visual(example)))
            turns += [*one.messages, {"role": "assistant", "content": shown_answer(task, example)}]
            images += one.images
        if self.condition == CONDITIONS[2] and own.images:
            own = posed(str(text), self.other_images(task, split, number, own.images))
        whole = Question((*turns, *own.messages), (*images, *own.images))
        return whole.without_images() if self.condition == CONDITIONS[1] else whole

    def other_images(self, task: Any, split: str, number: int, own: Sequence[Picture]) -> list[Picture]:
        """As many images of another document, none of them equal to its own; its own where few documents have such."""
        other = number
        for _ in range(min(TRIES, len(task.dataset[split]))):
            other = self.another(task, split, other)
            images = self.pictures(task.doc_to_visual(task.dataset[split][other]))
            if len(images) == len(own) and not set(digests(images)) & set(digests(own)):
                return images
        self.kept.setdefault(task.config.task, set()).add(number)
        return list(own)

    def another(self, task: Any, split: str, number: int) -> int:
        """The document after a document in a ring of all by the seed, the same in every process; never its own."""
        name = f"{task.config.task} {split}"
        if name not in self.others:
            order = np.random.default_rng(self.seed).permutation(len(task.dataset[split]))
            self.others[name] = np.empty_like(order)
            self.others[name][order] = np.roll(order, -1)
        return int(self.others[name][number])

    def pictures(self, visuals: Any) -> list[Picture]:
        """
        Raises:
            UsageError: videos or sounds.
        """
        given = list(visuals or [])
        if other := [each for each in given if not isinstance(each, Image.Image)]:
            why = f"a task with {type(other[0]).__name__} where an image is expected"
            raise UsageError(f"--tasks: {why}", option="--tasks", code="unsupported")
        return [Picture(image) for image in given]

    def examples(self, task: Any, split: str, number: int, own: Question) -> list[Any]:
        """Documents of the training split, drawn by the seed and the number of the document, which is never among them.

        More shots add examples to those of fewer.

        Raises:
            UsageError: a task without a training split, or with too small a one.
        """
        if not self.shots:
            return []
        train = check_shots(task, self.shots)
        docs, rng, chosen, tried = (
            task.dataset[train],
            np.random.default_rng([self.seed, number]),
            list[Any](),
            set[int](),
        )
        while len(chosen) < self.shots:
            if len(tried) == len(docs):
                why = f"the task {task.config.task} has {len(docs)} training documents"
                raise UsageError(f"--shots {self.shots}: {why}", option="--shots", code="limit")
            row = int(rng.integers(len(docs)))
            if row in tried:
                continue
            tried.add(row)
            doc = docs[row]
            one = posed(task.doc_to_text(doc), self.pictures(task.doc_to_visual(doc)))
            if one.digest() != own.digest():
                chosen.append(doc)
        return chosen

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """
        Raises:
            UsageError: always: no benchmark of the paper needs it.
        """
        raise UsageError(
            "--tasks: a task by likelihood; one that generates is expected", option="--tasks", code="unsupported"
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """
        Raises:
            UsageError: always.
        """
        raise UsageError(
            "--tasks: a task of several rounds; one of one is expected", option="--tasks", code="unsupported"
        )


def check_shots(task: Any, shots: int) -> str:
    """The training split of a task.

    Raises:
        UsageError: it has none.
    """
    train = task.config.training_split
    if train is None or train not in task.dataset:
        raise UsageError(
            f"--shots {shots}: the task {task.config.task} has no training split, of which examples would be taken; 0, or a task file "
            "with training_split (--include)",
            option="--shots",
            code="unsupported",
        )
    return str(train)


def posed(text: str, images: list[Picture]) -> Question:
    """A question with its images in the places that its text names, else before the text."""
    if text.count("<image>") not in (0, len(images)):
        text = PLACE.sub("", text)
    return question(text, *images) if images else Question(({"role": "user", "content": PLACE.sub("", text)},))


def shown_answer(task: Any, doc: Any) -> str:
    """The answer of an example."""
    value = next((doc[name] for name in ANSWERS if name in doc), None)
    value = task.doc_to_target(doc) if value is None or isinstance(value, int) else value
    if isinstance(value, list):
        texts = [str(each["answer"] if isinstance(each, dict) else each) for each in value]
        value = max(texts, key=texts.count) if texts else ""
    return str(value)


def settings_of(given: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Length of an answer, and the texts that end it."""
    until = given.get("until") or ()
    return int(given.get("max_new_tokens", MAX_TOKENS)), (until,) if isinstance(until, str) else tuple(until)


def cut(text: str, until: Sequence[str]) -> str:
    for mark in until:
        text = text.split(mark)[0] if mark else text
    return text.strip()


def guard_filelocks() -> None:
    """Leaves out lmms-eval's change of filelock where it is written for another version: it only matters for nested locks."""
    from lmms_eval import evaluator

    change = getattr(evaluator, "_enable_reentrant_filelocks", None)
    if change is not None and inspect.isfunction(change):
        try:
            change()
        except (AttributeError, ImportError, TypeError):
            change._patched = True  # type: ignore[attr-defined]
