"""What a user can cause, and how it is said."""

import difflib
import re
from collections.abc import Iterable

PLAIN = {
    "int": "a whole number (int)",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a list such as [0.9, 0.95]",
    "str": "text",
}


class UsageError(ValueError):
    """A mistake of input: the message says what was given, what was expected and which option to change.

    The command line prints the message as one line and exits with 2.
    """


class RankError(UsageError):
    """A mistake that one rank alone met: that rank says it, whichever it is."""


def one_line(message: str) -> str:
    """jsonargparse's report of a wrong value as one line."""
    text = " ".join(message.split())
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", text)
    text = re.sub(r"Expected a <class '(\w+)'>", lambda found: f"Expected {PLAIN.get(found[1], found[1])}", text)
    return text.removeprefix("Validation failed: ").replace("Parser key", "key")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error line: ``"; did you mean 'x'?"`` for the closest of ``known``, or ``""``."""
    names = list(known)
    found = [name for name in names if name.rpartition(".")[2] == word] or difflib.get_close_matches(
        word, names, 1, 0.5
    )
    return f"; did you mean '{found[0]}'?" if found else ""
