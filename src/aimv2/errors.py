"""What a user can cause, and how it is said."""

import importlib.util
import re
from collections.abc import Iterable

CODES = (
    "invalid",  # a value that is not allowed there
    "missing",  # an option, file or package that is needed
    "unknown",  # an option, key, name or column that does not exist
    "not-found",  # a path, model or data set that is not there
    "unreadable",  # a file that can't be read as what it should be
    "mismatch",  # two things that do not fit each other
    "exists",  # something in the way
    "conflict",  # options that exclude each other
    "unsupported",  # a model, form or machine that can't do it
    "limit",  # too large, too many, no room
    "non-finite",  # NaN or infinity
    "lost",  # a process that the command needs has ended, or hangs
)
PLAIN = {
    "int": "a whole number (int)",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a list such as [0.9, 0.95]",
    "Source": "a source, such as {path: shards, weight: 1.0},",
    "str": "text",
    "NoneType": "null",
}


OPTION = re.compile(r"--[a-z][\w-]*|[a-z]+\.[a-z][a-z_]*(?=[\s:=,])|[A-Z]{2,}(?=[\s:])")


MOST, WORD = 1200, 400  # characters of a message, and of a word in it (a path, a value)


def shown(text: object, most: int = MOST) -> str:
    """Any text as one printable line of at most ``most`` characters: controls escaped, what is long cut in its middle."""
    line = visible(re.sub(r"\s*[\n\r]\s*", " ", str(text)).strip()).replace("\t", "\\t")
    line = re.sub(rf"\S{{{WORD + 1},}}", lambda word: _cut(word[0], WORD), line)
    return _cut(line, most)


def visible(text: str) -> str:
    """A text whose controls are shown, not sent to a terminal; lines and tabs stay."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode() for char in text
    )


def _cut(text: str, most: int) -> str:
    """``text`` without its middle: the beginning says what it is, the end what to do."""
    return text if len(text) <= most else f"{text[: most * 2 // 3 - 3]} ... {text[-(most // 3 - 2) :]}"


LOST = 75  # EX_TEMPFAIL: exit code where a process that the command needs was lost


class UsageError(ValueError):
    """A mistake of input: the message says what was given, what was expected and which option to change.

    The command line prints the message as one line and exits with 2; it is printable and bounded whatever the values in it
    (:func:`shown`).

    Attributes:
        option: the option, configuration key or positional argument to change (``--k``, ``optim.lr``, ``MODEL``); where it is not
            given, the one that the message begins with; "" where it begins with none.
        code: the kind of mistake, one of :data:`CODES`.
    """

    def __init__(self, message: str, *, option: str | None = None, code: str = "invalid") -> None:
        message = shown(message)
        super().__init__(message)
        assert code in CODES, code
        head = OPTION.match(message)
        self.option = option if option is not None else head[0] if head else ""
        self.code = code
        self.exit_code = 2


def first_line(error: BaseException, limit: int = 200) -> str:
    """First line of another library's error message, its type where there is none, cut to ``limit`` characters."""
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0].strip(), limit)


class RankError(UsageError):
    """A mistake that only one rank met: that rank reports it, whichever it is."""


class WorkerLost(RankError):
    """A data worker ended or hangs; started again, the command may go on."""

    def __init__(self, message: str) -> None:
        super().__init__(message, option="data.workers", code="lost")
        self.exit_code = LOST


def need(package: str, extra: str, given: str) -> None:
    """Raises UsageError where an optional package is missing: what needs it, and which extra to install."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{given} needs the package {package}: pip install 'aimv2[{extra}]'", code="missing")


def one_line(message: str, options: bool = False) -> str:
    """jsonargparse's report of a wrong value as one line: what was given, and what is expected.

    ``options``: keys are said as options of the command line (``max_tokens``: ``--max-tokens``).
    """
    message = message.removeprefix("Validation failed: ")
    key = re.match(r'Parser key "([\w.]+)":\s*', message)
    if key is None:
        return " ".join(message.split())
    name = "--" + key[1].replace("_", "-") if options else key[1]
    body = message[key.end() :]
    tried = re.findall(r"^    - (.*)", body, re.MULTILINE)  # of a union: why each of its types does not fit
    inner = [reason for reason in tried if not re.fullmatch(r"Expected an? .*", reason) or ". Got value: " in reason]
    if inner:  # a part of the value is wrong
        return f"{name}: {expected(inner[0])}"
    if not tried:
        return f"{name} {expected(' '.join(body.split()))}"
    kinds = [plain(re.sub("Expected an? ", "", reason)) for reason in tried]
    kinds = [kind for kind in kinds if not (options and kind == PLAIN["NoneType"])]
    return f"{name} {body.rpartition('Given value: ')[2]}: {' or '.join(kinds)} expected"


def expected(reason: str) -> str:
    """``Expected a KIND. Got value: V`` as ``V: KIND expected``; another reason as it is."""
    found = re.fullmatch(r"(?:Expected an? |Not a valid subclass of )(.*?)\. Got value: (.*)", reason)
    return f"{found[2]}: {plain(found[1])} expected" if found else reason


def plain(kind: str) -> str:
    """A Python type, as jsonargparse writes it, in words."""
    if found := re.fullmatch(r"<class '(\w+)'>", kind):
        return PLAIN.get(found[1], found[1])
    if found := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {found[1]}".replace("'", "")
    if found := re.fullmatch(r"tuple with (\d+) elements", kind):
        return f"a list of {found[1]}"
    return PLAIN.get(kind, kind)


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error line: ``"; did you mean 'x'?"`` for the closest of ``known``, or ``""``."""
    import difflib

    names = list(known)
    found = [name for name in names if name.rpartition(".")[2] == word] or difflib.get_close_matches(
        word, names, 1, 0.5
    )
    return f"; did you mean '{found[0]}'?" if found else ""
