"""Text of users' files in the encodings that people have, found by one rule: UTF-8, UTF-16 and Windows-1252.

What is none of them is refused: text in a wrong encoding would train a model on letters that nobody wrote.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from aimv2.errors import UsageError
from aimv2.io import POINTER, is_pointer, open_file

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
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_HIGH = re.compile(r"[^\x00-\x7f]")
_UPPER, _LOWER = "À-ÖØ-ÞŠŒŽŸ", "ß-öø-ÿšœž"
_ANY = f"a-zA-Z{_UPPER}{_LOWER}"
_SMALL = f"a-z{_LOWER}"
# what no text of western Europe has, and other encodings read as it do: three such letters in a row or two by themselves, a capital or
# a sign in a word, signs next to such letters, quotation marks that turn the wrong way
_STRANGE = re.compile(
    rf"[{_UPPER}{_LOWER}]{{3}}|[{_SMALL}][{_UPPER}]|(?<=[{_SMALL}])[‚ƒ„†‡ˆ‰˜]|"
    rf"(?<=[{_ANY}])[¡-¶¸-¿×÷‚ƒ„†‡ˆ‰‹›˜€•“”](?=[{_ANY}])|[\x81\x8d\x8f\x90\x9d]|"
    rf"(?<![{_ANY}])[{_UPPER}{_LOWER}]{{2}}(?![{_ANY}])|[¢-¨ª¬¯-º][¢-ª¬-º¼-¾{_UPPER}{_LOWER}]|"
    rf"[{_UPPER}{_LOWER}][¢-¨ª¬¯-º¼-¾]|(?<![{_ANY}])[¤¦¨ª¬¯´¶¸¹](?=[a-z])|”(?=\w)|[¿¡](?=[À-ÿ])[^áéíóúñÁÉÍÓÚÑ]"
)
_TURNED = re.compile(r"(?<![^\s,])“(?=\s|$)")
# two words, or another encoding's letter in one; begins with a word, or a long one would be searched from each of its letters
_JOINED = re.compile(rf"(?<![{_SMALL}])([{_SMALL}]+)[–—…](?=([{_SMALL}]+))")
_SHORT = frozenset(
    ["a", "an", "as", "at", "be", "by", "he", "if", "in", "is", "it", "my", "no", "of", "on", "so", "to", "we"]
)
_SAFE = "äöüßéóå"  # they are the same in the encodings of the east
_PLAIN = "àâäáåçéèêëíîïñóôöúüß"
# languages that are written in it: their letters, and words that tell them from others with these bytes
_LANGUAGES = (
    ("àâæçéèêëîïôœùûüÿ", "le la les un une des du de et dans avec sur au aux est l d qu à où"),
    ("äöüßé", "der die das ein eine und mit auf"),
    ("áéíóúñü", "el la los las un una de del con en por que al"),
    ("áàâãçéêíóôõúü", "um uma com em os as ao dos das de que à é não"),
    ("àèéìíîòóù", "il la gli un una di del della con nel che per al c è più"),
    ("åäöéæø", "och ett en med og til på"),
    ("ëïéèöüáó", "de het een en van met op"),
    ("áðéíóúýþæö", "og með við"),
    ("àçèéíïòóúü", "el la els les un una de del amb"),
)
_ENGLISH = frozenset(
    [
        "two",
        "white",
        "black",
        "green",
        "blue",
        "red",
        "woman",
        "picture",
        "dog",
        "the",
        "of",
        "with",
        "and",
        "is",
        "at",
        "for",
        "this",
        "that",
        "his",
        "her",
        "from",
    ]
)
_BORROWED = [known for known, _ in _LANGUAGES if "þ" not in known]  # English has words of all of them


class NotText(UsageError, UnicodeError):
    """Bytes that are no text in an encoding known here: one line wherever nobody counts it."""


def decode_text(raw: bytes, name: str, said: str | None = None) -> str:
    """The text of a user's file, without a byte order mark.

    Args:
        raw: all of it.
        name: of the file, for messages.
        said: what shares the line that says an encoding other than UTF-8; None: the file has a line of its own.

    Raises:
        NotText: no encoding fits.
    """
    if is_pointer(raw):
        raise NotText(f"{name} is {POINTER}")
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
    with open_file(file) as stream:
        head = chunk = stream.read(CHUNK)
        if is_pointer(head):
            raise NotText(f"{file.name} is {POINTER}")
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
        while encoding == "cp1252" and (chunk := stream.read(CHUNK)):
            if _is_odd(chunk, chunk.decode("cp1252", "replace")):
                raise NotText(f"{file.name} {NOT_TEXT}")
        if encoding.startswith("utf-16"):
            stream.seek(0)
            whole, chunk = codecs.getincrementaldecoder(encoding)(), b"-"
            try:
                while chunk:
                    chunk = stream.read(CHUNK)
                    whole.decode(chunk, final=not chunk)
            except UnicodeDecodeError:
                raise NotText(f"{file.name} {NOT_TEXT}") from None
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
        if 20 * len(_CONTROLS.findall(head)) > len(head):  # UTF-16 of other alphabets
            raise NotText(f"{name} {NOT_TEXT}")
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
    if _is_odd(raw, text):
        return False
    words = Counter(re.findall(rf"[{_ANY}]+", text.lower()))
    spelt = {word: re.findall(rf"[{_LOWER}]", word) for word in words if not word.isascii()}
    letters = [letter for word, own in spelt.items() for letter in own * words[word]]
    unsafe = sum(letter not in _SAFE for letter in letters)
    english = sum(words[word] for word in _ENGLISH)
    counts = {known: sum(words[word] for word in own.split()) for known, own in _LANGUAGES}
    is_known = bool(english or any(counts.values()))
    pairs = (all(len(word) > 2 or word in _SHORT for word in pair) for pair in _JOINED.findall(text))
    if 20 * sum(not (is_known and parted) for parted in pairs) > len(_HIGH.findall(text)):
        return False
    for known, number in counts.items():
        if 10 * number >= unsafe and 20 * sum(letter in known for letter in letters) >= 19 * len(letters):
            return True
    borrowed = [any(known.issuperset(own) for known in map(set, _BORROWED)) for own in spelt.values()]
    if 4 * english >= len(letters) and 20 * sum(borrowed) >= 19 * len(borrowed):
        return True
    # a few names or words without any that tell their language: letters that other encodings seldom read so
    fits = any(set(letters) <= set(own) for own, _ in _LANGUAGES)
    return fits and set(letters) <= set(_PLAIN) and not re.search(rf"[èêâ](?![{_ANY}])", text.lower())


def _is_odd(raw: bytes, text: str) -> bool:
    """Whether more than a twentieth of what is not ASCII is UTF-8, or strange in Windows-1252."""
    turned = 0 if "„" in text else len(_TURNED.findall(text))  # German closes with this mark
    return 20 * (len(_UTF8.findall(raw)) + len(_STRANGE.findall(text)) + turned) > len(_HIGH.findall(text))


@lru_cache(maxsize=1000)
def say_once(line: str) -> None:
    """Logs a line, the first time in this process."""
    log.warning("%s", line)
