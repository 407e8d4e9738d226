"""A conversation about images, read from a row of JSON, and why a row is none.

Two forms are read: LLaVA's ``conversations`` ({"from": "human", "value": ...}) and ``messages`` ({"role": "user", "content": text or
parts}). In the text of a turn each image is :data:`IMAGE`, in order. A row whose text names no image at all has its images before the
first question, as TRL places them; a row that names some of them is bad.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from aimv2.data.passed import passed_lines
from aimv2.data.shards.format import IMAGE_EXTENSIONS, NUMBERED, Parts, json_of

IMAGE = "<image>"
PLACE = re.compile(f"{IMAGE}\n?")  # of an image, with the line break that belongs to it
T = TypeVar("T")
FORMS = ("conversations", "messages")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# what makes a row bad, by the code that it is counted under
BAD = {
    "empty": "no turns, or an empty question",
    "not-text": "turns that are not text",
    "roles": "roles out of order",
    "no-answer": "no answer",
    "image-missing": "an image missing",
    "token-without-image": f"{IMAGE} without an image",
    "two-tokens": f"more {IMAGE} than images",
    "image-without-token": f"fewer {IMAGE} than images",
    "image-in-answer": f"{IMAGE} outside a question",
    # found by those who read rows and images
    "template": "turns that the chat template can't show",
    "not-json": "rows that are no JSON object",
    "image-unreadable": "an image that can't be read",
}


def bad_lines(bad: Mapping[str, dict[str, Any]]) -> list[str]:
    """A line for each kind of bad rows, of {code: {number, examples}}."""
    return passed_lines({BAD.get(code, code): about for code, about in bad.items()}, "bad rows")


class ConversationError(ValueError):
    """A row that is no conversation.

    Attributes:
        code: the kind of fault, a key of :data:`BAD`.
    """

    def __init__(self, code: str, reason: str) -> None:
        assert code in BAD, code
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Turn:
    """What one side says; ``role`` is system, user or assistant, ``text`` holds :data:`IMAGE` for each of its images."""

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Questions and answers in turn, at most one system prompt before them; the last turn is an answer."""

    turns: tuple[Turn, ...]

    @property
    def answers(self) -> int:
        """Number of answers."""
        return sum(turn.role == "assistant" for turn in self.turns)

    def messages(self) -> list[dict[str, Any]]:
        """As chat templates take them: {"role", "content"}, content a list of {"type": "image"} and {"type": "text", "text"}.

        A line break after :data:`IMAGE` belongs to the image: the templates of ``aimv2 vlm build`` write it there.
        """
        return [{"role": turn.role, "content": _parts(turn.text)} for turn in self.turns]

    def record(self) -> list[dict[str, str]]:
        """As LLaVA's ``conversations``, the form that shards hold."""
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        return [{"from": names[turn.role], "value": turn.text} for turn in self.turns]


def conversation_of(about: Mapping[str, Any], images: int) -> Conversation:
    """The conversation of a row.

    Args:
        about: the row: ``conversations`` or ``messages``; ``image`` or ``images`` may name its images.
        images: number of images that there are.

    Raises:
        ConversationError: it has none, or one that can't be trained on; ``code`` is the kind of fault.
    """
    turns = _turns(about)
    _check_order(turns)
    tokens = sum(turn.text.count(IMAGE) for turn in turns)
    if (named := _named(about)) > images:
        raise ConversationError("image-missing", f"{named} images named, {images} there")
    if outside := next((turn.role for turn in turns if IMAGE in turn.text and turn.role != "user"), None):
        raise ConversationError("image-in-answer", f"{IMAGE} in a turn of {outside}; questions only may show images")
    if tokens > images:
        code = "two-tokens" if images else "token-without-image"
        raise ConversationError(code, f"{tokens} {IMAGE} for {images or 'no'} image{'s' * (images != 1)}")
    if not tokens and images:
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", f"{IMAGE}\n" * images + turns[first].text)
    elif tokens < images:
        raise ConversationError("image-without-token", f"{tokens} {IMAGE} for {images} images")
    return Conversation(tuple(turns))


def read_conversation(parts: Parts) -> tuple[Conversation, list[bytes]]:
    """The conversation of a sample in shards, and its encoded images in order.

    Raises:
        ConversationError: see :func:`conversation_of`.
    """
    images = images_of(parts)
    return conversation_of(json_of(parts), len(images)), images


def holds_conversation(about: Mapping[str, Any]) -> bool:
    """Whether a row has turns, good or bad."""
    return any(isinstance(about.get(form), list) for form in FORMS)


def images_of(parts: Parts) -> list[bytes]:
    """The encoded images of a sample: KEY.jpg, KEY.1.jpg, KEY.2.jpg, ...; without such names all of them, in the order of numbers."""
    plain = [extension for extension in IMAGE_EXTENSIONS if extension in parts][:1]
    others = [name for name in parts if name.rpartition(".")[2] in IMAGE_EXTENSIONS and name not in IMAGE_EXTENSIONS]
    numbered = [name for name in others if NUMBERED.match(name)]
    if not plain and not numbered:
        return [parts[name] for name in others]
    return [parts[name] for name in (*plain, *sorted(numbered, key=lambda name: int(name.partition(".")[0])))]


def flat_text(text: str) -> str:
    """The text of a turn as the templates of ``aimv2 vlm build`` show it: a line break after each image."""
    return PLACE.sub(f"{IMAGE}\n", text)


def spread(values: Iterable[T], ids: Iterable[int], image_id: int, counts: Iterable[int]) -> list[T]:
    """A value of each token, that of an image token as often as its image has features.

    Args:
        values: of the tokens: their ids, or what belongs to each.
        ids: of the tokens.
        image_id: the image token.
        counts: features of each image.
    """
    left, more = iter(counts), list[T]()
    for value, number in zip(values, ids, strict=True):
        more += [value] * (next(left) if number == image_id else 1)
    return more


# ---- turns ----


def _turns(about: Mapping[str, Any]) -> list[Turn]:
    given = next((about[form] for form in FORMS if about.get(form) is not None), None)
    if not given:
        raise ConversationError("empty", f"no turns in {' or '.join(FORMS)}")
    if not isinstance(given, list | tuple):
        raise ConversationError("not-text", f"a list of turns expected, got {type(given).__name__}")
    turns = [_turn(each, number) for number, each in enumerate(given, 1)]
    return [turn for turn in turns if turn.role != "system" or turn.text.strip()]


def _turn(given: Any, number: int) -> Turn:
    if not isinstance(given, Mapping):
        raise ConversationError("not-text", f"turn {number} is no object, but {type(given).__name__}")
    word = given.get("from") or given.get("role")
    role = ROLES.get(word.strip().lower()) if isinstance(word, str) else None
    if role is None:
        raise ConversationError("roles", f"turn {number} is of {str(word)[:40]!r}; user, assistant or system expected")
    value = given.get("value")
    return Turn(role, _text(given.get("content") if value is None else value, number))


def _text(value: Any, number: int) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise ConversationError("not-text", f"turn {number} holds {type(value).__name__}; text expected")
    found = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("image", "image_url"):
            found.append(f"{IMAGE}\n")
        elif kind == "text" and isinstance(part.get("text"), str):
            found.append(part["text"])
        else:
            raise ConversationError(
                "not-text", f"turn {number} has a part of type {str(kind)[:40]!r}; text or image expected"
            )
    return "".join(found)


def _check_order(turns: list[Turn]) -> None:
    """Raise ConversationError but for: one system prompt or none, then questions and answers in turn, none of them empty."""
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    if not spoken:
        raise ConversationError("empty", "no question and no answer")
    for number, turn in enumerate(spoken):
        wanted = ("user", "assistant")[number % 2]
        if turn.role != wanted:
            where = f"turn {number + 1 + len(turns) - len(spoken)} is of {turn.role}"
            raise ConversationError("roles", f"{where}; {wanted} expected")
        if not turn.text.strip():
            if wanted == "assistant":
                raise ConversationError("no-answer", f"answer {number // 2 + 1} is empty")
            raise ConversationError("empty", f"question {number // 2 + 1} is empty")
    if len(spoken) % 2:
        raise ConversationError("no-answer", f"question {len(spoken) // 2 + 1} has no answer")


def image_cells(about: Mapping[str, Any]) -> list[Any]:
    """What a row has for its images, in order: of ``image`` or ``images``, else what the parts of its messages name."""
    given = about.get("image") or about.get("images") or _in_parts(about.get("messages"))
    cells = given if isinstance(given, list | tuple) else [given]
    return [
        cell for cell in cells if not (isinstance(cell, Mapping) and not any(cell.values())) and cell not in (None, "")
    ]


def _in_parts(messages: Any) -> list[Any]:
    found = []
    for turn in messages if isinstance(messages, list | tuple) else ():
        content = turn.get("content") if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
                cell = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key)), None)
                cell = cell.get("url") if isinstance(cell, Mapping) and "url" in cell else cell
                found.append(cell.removeprefix("file://") if isinstance(cell, str) else cell)
    return found


def _named(about: Mapping[str, Any]) -> int:
    """How many images a row names, where it names them as text."""
    return sum(isinstance(cell, str) and bool(cell.strip()) for cell in image_cells(about))


def _parts(text: str) -> list[dict[str, str]]:
    found = []
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            found.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if piece:
            found.append({"type": "text", "text": piece})
    return found
