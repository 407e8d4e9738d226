"""What a user can cause, and how it is said."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake of input: the message says what was given, what was expected and which option to change.

    The command line prints the message as one line and exits with 2.
    """


class RankError(UsageError):
    """A mistake that one rank alone met: that rank says it, whichever it is."""


def one_line(message: str) -> str:
    """jsonargparse's report of a wrong value as one line."""
    text = " ".join(message.split())
    return text.removeprefix("Validation failed: ").replace("Parser key", "key")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error line: ``"; did you mean 'x'?"`` for the closest of ``known``, or ``""``."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""
