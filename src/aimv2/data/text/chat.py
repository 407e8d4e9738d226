"""Conversations as token ids through a chat template, and which of the tokens are answers.

An answer is what the model has to write after the generation prompt, up to and with the token that ends its turn. Templates are Jinja
and slow; what they write around the turns depends on the roles only, so it is rendered once for each sequence of roles and then reused.
A rendering of the whole conversation is compared for the first rows, and wherever a turn holds markup that a template might read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise, product, takewhile
from typing import Any

from aimv2.data.text.conversations import IMAGE, Conversation
from aimv2.errors import UsageError, first_line

CHECKED = 3  # conversations of a sequence of roles that are rendered whole and compared
Span = tuple[int, int]


class ChatError(ValueError):
    """A conversation that the chat template does not show turn by turn."""


@dataclass
class Frame:
    """What a template writes around the turns of a sequence of roles.

    Attributes:
        pieces: text before each turn, and after the last.
        trims: of each turn, whether the spaces at its two ends are left out.
        back: of each answer, characters before its text that the model writes too.
        tail: of each answer, characters after its text that the model writes: the end of its turn.
        checked: conversations that were compared with a whole rendering.
        holds: none of them differed.
    """

    pieces: list[str]
    trims: list[bool]
    back: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    checked: int = 0
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
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
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
        parts, spans, at, answers = [frame.pieces[0]], list[Span](), len(frame.pieces[0]), 0
        for message, trims, piece in zip(messages, frame.trims, frame.pieces[1:]):
            content = message["content"].strip() if trims else message["content"]
            if message["role"] == "assistant":
                spans.append((at - frame.back[answers], at + len(content) + frame.tail[answers]))
                answers += 1
            parts += content, piece
            at += len(content) + len(piece)
        text = "".join(parts)
        plain = not any("<" in message["content"].replace(IMAGE, "") for message in messages)
        if frame.checked < CHECKED or not plain:
            same = text == self.render(messages)
            frame.checked += 1
            frame.holds &= same or not plain
            return (text, spans) if same else None
        return text, spans

    def frame_of(self, roles: tuple[str, ...]) -> Frame | None:
        """The frame, of renderings whose turns are marks of their own; None where the template treats them differently."""
        marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
        text, spans = self.analysed([{"role": role, "content": mark} for role, mark in zip(roles, marks)])
        pieces = cut_at(text, marks)
        if pieces is None:
            return None
        spaced = self.render([{"role": role, "content": f" {mark} "} for role, mark in zip(roles, marks)])
        for trimmed in product((True, False), repeat=3):
            trims = [dict(zip(("system", "user", "assistant"), trimmed))[role] for role in roles]
            turns = [mark if trim else f" {mark} " for mark, trim in zip(marks, trims)]
            if spaced == "".join(chain(*zip(pieces, [*turns, ""]))):
                break
        else:
            return None
        frame = Frame(pieces, trims)
        answers = [mark for mark, role in zip(marks, roles) if role == "assistant"]
        for mark, (start, end) in zip(answers, spans):
            frame.back.append(text.index(mark) - start)
            frame.tail.append(end - text.index(mark) - len(mark))
        return frame

    def analysed(self, messages: list[dict[str, str]]) -> tuple[str, list[Span]]:
        """The rendered text, and from where to where each answer is to be written: renderings of the first turns are compared."""
        text, at, spans = self.render(messages), 0, list[Span]()
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, past = self.render(messages[:number], prompt=True), self.render(messages[: number + 1])
            known = text.startswith(prompt)
            start = len(prompt) if known else at
            content = message["content"].strip()
            place = text.find(content, start)
            if place < 0 or not (known or text.count(content) == 1):
                raise ChatError(f"the chat template does not show answer {len(spans) + 1} as it is")
            end = place + len(content)
            rest = (
                text[end : len(past)]
                if text.startswith(past)
                else text[end : self.next_turn(text, end, messages[number:])]
            )
            spans.append((start if known else place, end + self.end_of_turn(rest, text.startswith(past))))
            at = spans[-1][1]
        return text, spans

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


def flat_text(text: str) -> str:
    """The text of a turn as the templates of ``aimv2 vlm build`` show it: a line break after each image."""
    first, *others = text.split(IMAGE)
    return first + "".join(f"{IMAGE}\n{piece.removeprefix(chr(10))}" for piece in others)


def cut_at(text: str, marks: Sequence[str]) -> list[str] | None:
    """What stands before, between and after marks; None unless each stands there once, in order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        pieces.append(before)
    return [*pieces, text]
