"""Chat templates of others, rendered within limits: a template is a program, and Jinja's sandbox limits a single ``range`` only."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

LINES = 3_000_000  # of Python in one rendering; a conversation of 1,000 turns takes some 120,000
MEMORY = 1 << 30  # bytes that a rendering may add
SIZE = 2_000_000  # characters of a template
T = TypeVar("T")
_LOCK = threading.RLock()


class TemplateError(ValueError):
    """A template that computes beyond the limits."""


def render(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    template: str | dict[str, str] | None = None,
    prompt: bool = False,
) -> str:
    """The text of a conversation by a chat template.

    Args:
        tokenizer: of transformers.
        messages: {"role", "content"} in turn.
        template: Jinja, several by name, or the name of one of the tokenizer's; None: its default.
        prompt: with the generation prompt at the end.

    Raises:
        TemplateError, MemoryError: it computes too much.
        Exception: of Jinja, or raised by the template.
    """
    if isinstance(template, dict):  # of a processor that has several
        template = template["default"]
    jinja: str = tokenizer.get_chat_template(template)  # so may a tokenizer
    _check(jinja)
    return str(
        limited(
            lambda: tokenizer.apply_chat_template(
                messages, chat_template=jinja, tokenize=False, add_generation_prompt=prompt
            )
        )
    )


@lru_cache(maxsize=8)
def _check(template: str) -> None:
    """Numbers of any length come of powers and of products of variables, and Python computes with them without a pause."""
    from jinja2 import Environment, TemplateSyntaxError

    if len(template) > SIZE:
        raise TemplateError(f"{len(template):,} characters, of {SIZE:,} at most")
    try:
        tokens = [(kind, value) for _, kind, value in Environment().lex(template) if kind not in ("whitespace", "data")]
    except TemplateSyntaxError:
        return  # transformers says it
    for number, (kind, value) in enumerate(tokens):
        if kind == "operator" and value == "**":
            raise TemplateError("it computes powers (**)")
        around = [*tokens[max(number - 1, 0) : number], *tokens[number + 1 : number + 2]]
        plain = any(one == "string" or (one == "integer" and len(text) < 7) for one, text in around)
        if kind == "operator" and value == "*" and not plain:
            raise TemplateError("it multiplies (*) without a text or a small number")


def limited(function: Callable[[], T], lines: int = LINES, memory: int = MEMORY) -> T:
    """Calls a function, and ends it after so many lines of Python, or where it needs more memory.

    Raises:
        TemplateError: it took too many lines.
        MemoryError: it needed too much memory (Linux only).
    """
    left, before = lines, sys.gettrace()

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise TemplateError(f"it does not end within {lines:,} lines of Python")
        return count

    with _LOCK, _memory(memory):
        sys.settrace(count)  # of frames that begin from here on: what follows in this one always runs
        try:
            return function()
        finally:
            sys.settrace(before)


@contextmanager
def _memory(more: int) -> Iterator[None]:
    about = Path("/proc/self/statm")
    if not sys.platform.startswith("linux") or not about.exists():
        yield
        return
    import resource

    held = int(about.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = min(limit for limit in (held + more, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
