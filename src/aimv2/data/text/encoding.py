"""Text of users' files in the encodings that people have, found by one rule: UTF-8, UTF-16 and Windows-1252.

What is none of them is refused: text in a wrong encoding would train a model on letters that nobody wrote.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TextIO

log = logging.getLogger(__name__)

NOT_TEXT = "is not UTF-8, and neither UTF-16 nor Windows-1252; convert it to UTF-8 first"
CHUNK = 1 << 20
_WORDS = {
    "cp1252": "Windows-1252",
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16",
    "utf-16-be": "UTF-16",
    "utf-32": "UTF-32",
}
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_HIGH = re.compile(r"[^\x00-\x7f]")
_UPPER, _LOWER = "À-ÖØ-ÞŠŒŽŸ", "ß-öø-ÿšœž"
# what no text of western Europe has, and other encodings read as it do: three such letters in a row, a capital or a sign in a word
_STRANGE = re.compile(
    rf"[{_UPPER}{_LOWER}]{{3}}|[a-z{_LOWER}][{_UPPER}]|(?<=[a-z{_LOWER}])[‚ƒ„†‡ˆ‰˜]|"
    rf"(?<=[a-zA-Z{_UPPER}{_LOWER}])[¡-¶¸-¿×÷‚ƒ„†‡ˆ‰‹›˜€](?=[a-zA-Z{_UPPER}{_LOWER}])|[\x81\x8d\x8f\x90\x9d]"
)
# letters of languages that are written in it; French, German, Spanish, Portuguese, Italian, Nordic ones, Dutch, Icelandic, Catalan
_LETTERS = (
    *("àâæçéèêëîïôœùûüÿ", "äöüßé", "áéíñóúü", "áàâãçéêíóôõúü", "àèéìíîòóùú", "åäöéæø", "ëïéèöüáó", "áðéíóúýþæö", "àçèéíïòóúü"),
)  # fmt: skip


class NotText(UnicodeError):
    """Bytes that are no text in an encoding known here."""


def decode_text(raw: bytes, name: str, said: str | None = None) -> str:
    """The text of a user's file, without a byte order mark.

    Args:
        raw: all of it.
        name: of the file, for messages.
        said: what shares the line that says an encoding other than UTF-8; None: the file has a line of its own.

    Raises:
        NotText: no encoding fits.
    """
    encoding = _encoding_of(raw, raw, said or name, name)
    try:
        return raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise NotText(f"{name} {NOT_TEXT}") from None


def open_text(file: Path, newline: str | None = None) -> TextIO:
    """A user's text file, open, without a byte order mark; ``newline`` as of :func:`open`.

    Raises:
        NotText: no encoding fits.
        OSError: it can't be read.
    """
    with file.open("rb") as stream:
        head = chunk = stream.read(CHUNK)
        before, decoder = b"", codecs.getincrementaldecoder("utf-8")()
        try:
            while chunk:
                decoder.decode(chunk)
                following = stream.read(CHUNK)
                decoder.decode(b"", final=not following)
                before, chunk = before if chunk.isascii() else chunk, following
        except UnicodeDecodeError:
            pass
    encoding = _encoding_of(head, before + chunk, str(file), file.name)
    return file.open(encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline=newline)


def text_lines(file: Path) -> Iterator[str]:
    """The lines of a user's text file that are not blank, stripped.

    Raises:
        NotText, OSError: see :func:`open_text`.
    """
    with open_text(file) as lines:
        yield from (line for text in lines if (line := text.strip()))


def _encoding_of(head: bytes, odd: bytes, where: str, name: str) -> str:
    """The encoding by a file's beginning, and by the part of it that is not UTF-8."""
    found = next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), None)
    even, uneven = head[::2].count(0), head[1::2].count(0)
    if found is None and 4 * (even + uneven) > len(head):
        if 4 * min(even, uneven) > max(even, uneven):
            raise NotText(f"{name} {NOT_TEXT}")
        found = "utf-16-le" if uneven > even else "utf-16-be"
    if found is None:
        try:
            odd.decode("utf-8")
            return "utf-8"
        except UnicodeDecodeError:
            if not _is_western(odd):
                raise NotText(f"{name} {NOT_TEXT}") from None
        found = "cp1252"
    say_once(f"{where}: read as {_WORDS[found]}, not UTF-8")
    return found


def _is_western(raw: bytes) -> bool:
    """Whether bytes that are not UTF-8 read as text in Windows-1252, and not as that of another encoding or of two."""
    try:
        text = raw.decode("cp1252")
    except UnicodeDecodeError:
        return False
    if "\0" in text:
        return False
    high = len(_HIGH.findall(text))
    if 20 * (len(_UTF8.findall(raw)) + len(_STRANGE.findall(text))) > high:
        return False
    letters = re.findall(rf"[{_UPPER}{_LOWER}]", text)
    if 16 * len(letters) < len(text):  # names and loan words, of any language
        return True
    return any(20 * sum(letter.lower() in known for letter in letters) >= 19 * len(letters) for known in _LETTERS)


@lru_cache(maxsize=1000)
def say_once(line: str) -> None:
    """Logs a line, the first time in this process."""
    log.warning("%s", line)
