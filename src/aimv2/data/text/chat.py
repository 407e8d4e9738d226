"""Conversations as token ids through a chat template, and which of the tokens are answers.

An answer is what the model has to write after the generation prompt, up to and with the token that ends its turn. Templates are Jinja
and slow; what they write around the turns depends on the roles only, so it is rendered once for each sequence of roles and then reused.
A rendering of the whole conversation is compared for the first rows, for one in a thousand later, and wherever a turn holds what a
template might read or change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise, product, takewhile
from typing import Any

from aimv2.data.text.conversations import IMAGE, Conversation, flat_text
from aimv2.errors import UsageError, first_line
from aimv2.interop.rendering import render

CHECKED = 3  # first conversations of a sequence of roles that are rendered whole and compared
EVERY = 1_000  # later ones: each so-manyth
# text that a template may read or change: spaces at its ends or doubled, <marks> and [marks]
ODD = re.compile(r"\A\s|\s\Z|  |<|\[/?\w+\]")
# what a template leaves of the "\n " before a text and the " \n" after it -> what to strip there; None: all spaces and breaks
LEFT: dict[str, str | None] = {"": None, " ": "\n", "\n ": ""}
RIGHT: dict[str, str | None] = {"": None, " ": "\n", " \n": ""}
Span = tuple[int, int]


class ChatError(ValueError):
    """A conversation that the chat template does not show turn by turn."""


@dataclass
class Frame:
    """What a template writes around the turns of a sequence of roles.

    Attributes:
        order: the turns as the text shows them; a system prompt may stand in a later one.
        pieces: text before each of these, and after the last.
        trims: of each of these, what is stripped from its two ends.
        back: of each answer, characters before its text that the model writes too.
        tail: of each answer, characters after its text that the model writes: the end of its turn.
        used: conversations so far.
        holds: none of those that were compared with a whole rendering differed.
    """

    order: list[int]
    pieces: list[str]
    trims: list[tuple[str | None, str | None]]
    back: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    used: int = 0
    holds: bool = True


class Chat:
    """Chat template and tokenizer of a vision-language model.

    Attributes:
        image_id: the image token.
        lead: tokens that the tokenizer puts before any text, such as [BOS].
    """

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer``: of transformers, with a chat template and the image token.

        Raises:
            UsageError: a tokenizer without an offset table (slow).
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UsageError(
                f"init: its tokenizer ({type(tokenizer).__name__}) is none of the library tokenizers, which training needs",
                option="init",
                code="unsupported",
            )
        self.tokenizer, self.backend = tokenizer, type(backend).from_str(backend.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        probe = self.backend.encode("a", add_special_tokens=True)
        bare = self.backend.encode("a", add_special_tokens=False).ids
        self.lead = list(takewhile(lambda number: number not in bare, probe.ids))
        self.image_id = int(tokenizer.convert_tokens_to_ids(IMAGE))
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        marks = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self.marks = sorted(marks - {IMAGE, ""})
        self.frames: dict[tuple[str, ...], Frame | None] = {}

    def encode(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation, one image token for each image, and whether each is part of an answer.

        Raises:
            ChatError: the template can't be rendered, or does not show the turns in order.
        """
        messages = [{"role": turn.role, "content": flat_text(turn.text)} for turn in conversation.turns]
        text, spans = self.framed(messages) or self.analysed(messages)
        ids, scored = self.tokens(text, spans)
        if spans[-1][1] == len(text) and not self.ends(text) and self.tokenizer.eos_token_id is not None:
            ids, scored = [*ids, int(self.tokenizer.eos_token_id)], [*scored, True]  # a template without an end of turn
        return ids, scored

    def ends(self, text: str) -> bool:
        """Whether a text ends with a special token or a break."""
        return text[-1:].isspace() or any(text.endswith(mark) for mark in self.marks)

    def render(self, messages: Sequence[dict[str, str]], prompt: bool = False) -> str:
        """The template's text; ``prompt``: with the generation prompt at its end."""
        try:
            return render(self.tokenizer, messages, prompt=prompt)
        except Exception as error:  # of Jinja, or raised by the template
            raise ChatError(f"the chat template can't be rendered ({first_line(error)})") from None

    # ---- where the answers are ----

    def framed(self, messages: list[dict[str, str]]) -> tuple[str, list[Span]] | None:
        """Text and answers by the frame of these roles; None where it has none, or does not hold for this conversation."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self.frames:
            self.frames[roles] = self.frame_of(roles)
        frame = self.frames[roles]
        if frame is None or not frame.holds:
            return None
        parts, spans, at = [frame.pieces[0]], list[Span](), len(frame.pieces[0])
        for number, (left, right), piece in zip(frame.order, frame.trims, frame.pieces[1:]):
            content = messages[number]["content"].lstrip(left).rstrip(right)
            if roles[number] == "assistant":
                spans.append((at - frame.back[len(spans)], at + len(content) + frame.tail[len(spans)]))
            parts += content, piece
            at += len(content) + len(piece)
        text = "".join(parts)
        plain = not any(ODD.search(message["content"].replace(f"{IMAGE}\n", ".")) for message in messages)
        frame.used += 1
        if frame.used <= CHECKED or frame.used % EVERY == 0 or not plain:
            same = text == self.render(messages)
            frame.holds &= same or not plain
            return (text, spans) if same else None
        return text, spans

    def frame_of(self, roles: tuple[str, ...]) -> Frame | None:
        """The frame, of renderings whose turns are marks of their own; None where the template treats them differently."""
        marks = [f"\ue000{number}\n\n\ue001" for number in range(len(roles))]
        try:
            text, spans = self.analysed([{"role": role, "content": mark} for role, mark in zip(roles, marks)])
            spaced = self.render([{"role": role, "content": f"\n {mark} \n"} for role, mark in zip(roles, marks)])
        except ChatError:
            return None
        order = sorted(range(len(roles)), key=lambda number: text.find(marks[number]))
        shown = [marks[number] for number in order]
        pieces, wide = cut_at(text, shown), cut_at(spaced, shown)
        if pieces is None or wide is None:
            return None
        lefts: list[str | None] = []
        rights: list[str | None] = []
        for number, (piece, other) in enumerate(zip(pieces, wide)):
            ends = product(RIGHT if number else ("",), LEFT if number < len(roles) else ("",))
            found = next(((right, left) for right, left in ends if right + piece + left == other), None)
            if found is None:
                return None
            rights.append(RIGHT[found[0]])
            lefts.append(LEFT[found[1]])
        frame = Frame(order, pieces, list(zip(lefts, rights[1:])))
        answers = [mark for mark, role in zip(marks, roles) if role == "assistant"]
        for mark, (start, end) in zip(answers, spans):
            frame.back.append(text.index(mark) - start)
            frame.tail.append(end - text.index(mark) - len(mark))
        return frame

    def analysed(self, messages: list[dict[str, str]]) -> tuple[str, list[Span]]:
        """The rendered text, and from where to where each answer is to be written: renderings of the first turns are compared."""
        text, at, lead = self.render(messages), 0, ""
        found: list[tuple[int, int, bool]] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, past = self.render(messages[:number], prompt=True), self.render(messages[: number + 1])
            known = text.startswith(prompt)
            start = len(prompt) if known else at
            content = message["content"].strip()
            place = text.find(content, start)
            if place < 0 or not (known or text.count(content) == 1):
                raise ChatError(f"the chat template does not show answer {len(found) + 1} as it is")
            lead = text[start:place] if known else lead
            end = place + len(content)
            rest = (
                text[end : len(past)]
                if text.startswith(past)
                else text[end : self.next_turn(text, end, messages[number:])]
            )
            at = end + self.end_of_turn(rest, text.startswith(past))
            found.append((start if known else place, at, known))
        # where an earlier prompt is another than within the whole (a system prompt in the last turn), answers begin as a later one
        return text, [
            (start - len(lead) * (not known and text[:start].endswith(lead)), end) for start, end, known in found
        ]

    def next_turn(self, text: str, end: int, messages: list[dict[str, str]]) -> int:
        """Where the text of the turn after ``messages[0]`` begins."""
        found = text.find(messages[1]["content"].strip(), end) if len(messages) > 1 else -1
        return len(text) if found < 0 else found

    def end_of_turn(self, rest: str, whole: bool) -> int:
        """Characters of what follows an answer that end its turn: up to its first special token; without one all, if it is ``whole``."""
        found = [(rest.index(mark), -len(mark)) for mark in self.marks if mark in rest]
        if found:
            first, length = min(found)
            return first - length
        return len(rest) if whole else 0

    # ---- tokens ----

    def tokens(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        """Token ids of a text, and which of them are within the spans.

        A token that would reach across the beginning of an answer is split there, since the model has to continue a prompt that ends there.
        """
        bos = self.tokenizer.bos_token
        lead = [] if bos and text.startswith(bos) else self.lead  # as processors do
        cuts = sorted({0, len(text), *chain(*spans)})
        answers = {start for start, _ in spans}
        ids, scored = list(lead), [False] * len(lead)
        for start, end in pairwise(cuts):
            piece = self.backend.encode(text[start:end], add_special_tokens=False).ids
            ids += piece
            scored += [start in answers] * len(piece)
        whole = self.backend.encode(text, add_special_tokens=False)
        if whole.ids == ids[len(lead) :] or not self.continues(text, spans, whole.ids):
            return ids, scored
        within = [any(start <= one < other <= end for start, end in spans) for one, other in whole.offsets]
        return [*lead, *whole.ids], [False] * len(lead) + within

    def continues(self, text: str, spans: list[Span], ids: list[int]) -> bool:
        """Whether the tokens of each prompt are the first of the whole text's."""
        prompts = [self.backend.encode(text[:start], add_special_tokens=False).ids for start, _ in spans]
        return all(ids[: len(prompt)] == prompt for prompt in prompts)


def cut_at(text: str, marks: Sequence[str]) -> list[str] | None:
    """What stands before, between and after marks; None unless each stands there once, in order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        pieces.append(before)
    return [*pieces, text]
