"""Conversations in both forms, and what makes a row bad."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aimv2.data.text.conversations import (
    BAD,
    Conversation,
    ConversationError,
    Turn,
    conversation_of,
    images_of,
    read_conversation,
)

QUESTION, ANSWER = "What is this?", "A ring."


def llava(*values: str) -> dict[str, Any]:
    return {"conversations": [{"from": ("human", "gpt")[at % 2], "value": value} for at, value in enumerate(values)]}


def chat(*contents: Any, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": ("user", "assistant")[at % 2], "content": value} for at, value in enumerate(contents)],
        **more,
    }


def part(text: str | None = None, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": text, "index": None}  # as tables write parts that lack a key


IMAGE_PART = part(kind="image")
GOOD: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "llava": (llava(f"<image>\n{QUESTION}", ANSWER), 1, (f"<image>\n{QUESTION}", ANSWER)),
    "llava, image last": (llava(f"{QUESTION}\n<image>", ANSWER), 1, (f"{QUESTION}\n<image>", ANSWER)),
    "llava without a token": (llava(QUESTION, ANSWER), 1, (f"<image>\n{QUESTION}", ANSWER)),
    "text only": (llava(QUESTION, ANSWER), 0, (QUESTION, ANSWER)),
    "no image named": ({**llava(QUESTION, ANSWER), "image": ""}, 0, (QUESTION, ANSWER)),
    "several turns": (
        llava("<image>", "a", "b", "c", "<image>\nd", "e"),
        2,
        ("<image>", "a", "b", "c", "<image>\nd", "e"),
    ),
    "messages": (chat(QUESTION, ANSWER), 0, (QUESTION, ANSWER)),
    "messages without tokens": (
        chat(QUESTION, ANSWER, images=["a", "b"]),
        2,
        (f"<image>\n<image>\n{QUESTION}", ANSWER),
    ),
    "parts": (chat([IMAGE_PART, part(QUESTION)], [part(ANSWER)]), 1, (f"<image>\n{QUESTION}", ANSWER)),
    "parts, image last": (chat([part("a"), IMAGE_PART], "b"), 1, ("a<image>\n", "b")),
    "image_url": (chat([{"type": "image_url", "image_url": {"url": "x"}}, part("a")], "b"), 1, ("<image>\na", "b")),
    "images as cells": (chat(QUESTION, ANSWER, images=[{"bytes": b"", "path": None}]), 0, (QUESTION, ANSWER)),
    "a null form before": ({"conversations": None, **chat(QUESTION, ANSWER)}, 0, (QUESTION, ANSWER)),
}
ROWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "nothing": ("empty", {}, 0),
    "no turns": ("empty", {"conversations": []}, 1),
    "a caption": ("empty", {"caption": "a ring"}, 1),
    "a system prompt only": ("empty", {"messages": [{"role": "system", "content": "Be brief."}]}, 0),
    "an empty question": ("empty", llava(" ", ANSWER), 0),
    "no list": ("not-text", {"conversations": "What?"}, 0),
    "a text for a turn": ("not-text", {"conversations": ["What?"]}, 0),
    "no value": ("not-text", {"conversations": [{"from": "human"}]}, 0),
    "a number": ("not-text", chat(7, ANSWER), 0),
    "a video": ("not-text", chat([part(kind="video")], ANSWER), 0),
    "a part without text": ("not-text", chat([part()], ANSWER), 0),
    "a part that is text": ("not-text", chat(["What?"], ANSWER), 0),
    "an unknown role": ("roles", {"messages": [{"role": "tool", "content": "x"}]}, 0),
    "no role": ("roles", {"messages": [{"content": "x"}]}, 0),
    "answer first": ("roles", {"conversations": llava("a", "b")["conversations"][1:]}, 0),
    "two questions": ("roles", {"conversations": llava("a", "b")["conversations"][:1] * 2}, 0),
    "system later": ("roles", {"messages": [*chat("a", "b")["messages"], {"role": "system", "content": "c"}]}, 0),
    "no answer": ("no-answer", llava(QUESTION), 0),
    "an empty answer": ("no-answer", llava(QUESTION, "\n"), 0),
    "no last answer": ("no-answer", llava("a", "b", "c"), 0),
    "named and missing": ("image-missing", {**llava(f"<image>\n{QUESTION}", ANSWER), "image": "a.jpg"}, 0),
    "one of two missing": ("image-missing", {**llava("<image><image>", "b"), "image": ["a.jpg", "b.jpg"]}, 1),
    "token without image": ("token-without-image", llava(f"<image>\n{QUESTION}", ANSWER), 0),
    "two tokens": ("two-tokens", llava("<image>\n<image>\na", ANSWER), 1),
    "token in both forms": ("two-tokens", chat([IMAGE_PART, part("<image> a")], "b"), 1),
    "one token, two images": ("image-without-token", llava("<image>\na", ANSWER), 2),
    "in an answer": ("image-in-answer", llava("a", "<image>"), 1),
    "also in an answer": ("image-in-answer", llava("<image>\na", "b <image>"), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_turns_of_both_forms(name: str) -> None:
    row, images, texts = GOOD[name]
    found = conversation_of(row, images)
    assert tuple(turn.text for turn in found.turns) == texts
    assert [turn.role for turn in found.turns] == ["user", "assistant"] * (len(texts) // 2)
    assert found.answers == len(texts) // 2
    assert conversation_of({"conversations": found.record()}, images) == found
    assert conversation_of({"messages": found.messages()}, images).messages() == found.messages()


@pytest.mark.parametrize("name", ROWS)
def test_bad_rows_have_a_code_and_a_reason(name: str) -> None:
    code, row, images = ROWS[name]
    with pytest.raises(ConversationError) as caught:
        conversation_of(row, images)
    assert caught.value.code == code and str(caught.value)


def test_every_code_has_a_row() -> None:
    assert {code for code, _, _ in ROWS.values()} == set(BAD) - {
        "not-json",
        "image-unreadable",
        "template",
    }  # of the import, of rows


def test_a_system_prompt_comes_first() -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, *chat(QUESTION, ANSWER)["messages"]]}
    turns = Turn("system", "Be brief."), Turn("user", f"<image>\n{QUESTION}"), Turn("assistant", ANSWER)
    assert conversation_of(row, 1) == Conversation(turns)


def test_parts_of_messages() -> None:
    first, second = conversation_of(llava("a\n<image>\n\nb<image>", "c"), 2).messages()
    texts = [piece.get("text") for piece in first["content"]]
    assert texts == ["a\n", None, "\nb", None] and first["content"][1] == {"type": "image"}
    assert second == {"role": "assistant", "content": [{"type": "text", "text": "c"}]}


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        (["jpg"], ["jpg"]),
        (["10.jpg", "2.png", "jpg", "1.jpg"], ["jpg", "1.jpg", "2.png", "10.jpg"]),
        (["1.jpg", "0.jpg"], ["0.jpg", "1.jpg"]),
        (["jpg", "mask.png"], ["jpg"]),  # named images next to the plain one are others' business
        (["left.jpg", "right.jpg"], ["left.jpg", "right.jpg"]),
        (["txt"], []),
    ],
)
def test_images_of_a_sample_in_order(members: list[str], wanted: list[str]) -> None:
    assert images_of({name: name.encode() for name in members}) == [name.encode() for name in wanted]


def test_a_sample_of_a_shard() -> None:
    parts = {"json": json.dumps(llava("<image>\na<image>", "b")).encode(), "1.png": b"2", "png": b"1"}
    talk, images = read_conversation(parts)
    assert images == [b"1", b"2"] and talk.answers == 1
    with pytest.raises(ConversationError) as caught:
        read_conversation({"json": b"{broken", "png": b"1"})
    assert caught.value.code == "empty"
