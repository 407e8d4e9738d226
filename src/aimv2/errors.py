"""What a user can cause, and how it is said."""

import difflib
import re
from collections.abc import Iterable

PLAIN = {
    "int": "a whole number (int)",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a list such as [0.9, 0.95]",
    "list": "a list",
    "dict": "names with values",
    "str": "text",
    "NoneType": "null",
}


class UsageError(ValueError):
    """A mistake of input: the message says what was given, what was expected and which option to change.

    The command line prints the message as one line and exits with 2.
    """


class RankError(UsageError):
    """A mistake that one rank alone met: that rank says it, whichever it is."""


def one_line(message: str, options: bool = False) -> str:
    """jsonargparse's report of a wrong value as one line: what was given, and what is expected.

    ``options``: keys are said as options of the command line (``max_tokens``: ``--max-tokens``).
    """
    text = " ".join(message.split()).removeprefix("Validation failed: ")
    found = re.fullmatch(
        r'Parser key "([\w.]+)": (?:.*?)(Expected an? .*?)\.? (?:Got value|Given value type: .*? Given value): (.*)',
        text,
    )
    if found is None:
        return text.replace("Parser key", "key")
    key, wanted, given = found.groups()
    kinds = [plain(kind) for kind in re.findall(r"Expected an? (.*?)(?:\.? - |\.? Got value: |\.?$)", wanted)]
    name = "--" + key.replace("_", "-") if options else key
    kinds = [kind for kind in kinds if not (options and kind == "null")] or kinds
    return f"{name} {given}: {' or '.join(dict.fromkeys(kinds))} expected"


def plain(kind: str) -> str:
    """A Python type, as jsonargparse writes it, in words."""
    if found := re.fullmatch(r"<class '(\w+)'>", kind):
        return PLAIN.get(found[1], found[1])
    if found := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {found[1]}".replace("'", "")
    if found := re.fullmatch(r"tuple with (\d+) elements", kind):
        return f"a list of {found[1]}"
    return kind if kind.startswith(("a ", "an ")) else f"a {kind}"


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error line: ``"; did you mean 'x'?"`` for the closest of ``known``, or ``""``."""
    names = list(known)
    found = [name for name in names if name.rpartition(".")[2] == word] or difflib.get_close_matches(
        word, names, 1, 0.5
    )
    return f"; did you mean '{found[0]}'?" if found else ""
