"""Types of options: ranges and lists that help, completion and errors know. No torch, no parser.

A type says what a value may be: ``PositiveInt`` is ``Annotated[int, Bounds(1)]``. :func:`convert` holds a value to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args

from aimv2.errors import UsageError, nearest
from aimv2.places import from_home


@dataclass(frozen=True)
class Bounds:
    """Numbers from ``low`` (``above``: without it) to ``high``."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __call__(self, value: Any, option: str) -> Any:
        """
        Raises:
            UsageError: a value outside of the range.
        """
        if value is None or isinstance(value, str):
            return value
        inside = (self.low < value if self.above else self.low <= value) and value <= self.high
        if not inside:
            given = f"{value:g}" if isinstance(value, float) else value
            raise UsageError(f"{option} {given}: {self.words()} expected", option=option)
        return value

    def words(self) -> str:
        if self.high < math.inf:
            return f"{'above ' if self.above else ''}{self.low:g} {'and at most' if self.above else 'to'} {self.high:g}"
        return f"above {self.low:g}" if self.above else f"at least {self.low:g}"


@dataclass(frozen=True)
class Numbers:
    """A list of numbers, as ``"1,5"`` or ``[1, 5]``: a tuple of ``kind``; ``distinct``: none of them twice."""

    kind: type = int
    low: float = 0
    high: float = math.inf
    above: bool = False
    distinct: bool = False

    def words(self) -> str:
        kind = "whole numbers" if self.kind is int else "numbers"
        return f"{kind}, {Bounds(self.low, self.high, self.above).words()}, separated by commas,"

    def __call__(self, value: Any, option: str) -> tuple[Any, ...] | None:
        """
        Raises:
            UsageError: no numbers, one outside of the range, the same one twice.
        """
        if value is None:
            return None
        given = value if isinstance(value, str | int | float) else ",".join(map(str, value))
        try:
            found = tuple(self.kind(word) for word in split_words(str(given).strip("[]()")))
        except ValueError:
            found = ()
        inside = (self.low < n if self.above else self.low <= n for n in found)
        if not found or not all(inside) or not all(n <= self.high and math.isfinite(n) for n in found):
            raise UsageError(f"{option} {given}: {self.words()} expected", option=option)
        if self.distinct and len(set(found)) < len(found):
            raise UsageError(f"{option} {given}: the same number twice; different ones expected", option=option)
        return found


@dataclass(frozen=True)
class Words:
    """A list of words among ``known``, as ``"a,b"`` or ``["a", "b"]``: a tuple; None is none of them."""

    known: tuple[str, ...]
    why: tuple[tuple[str, str], ...] = ()  # of words that belong to another command

    def __call__(self, value: Any, option: str) -> tuple[str, ...]:
        """
        Raises:
            UsageError: another word.
        """
        found = tuple(split_words(value)) if isinstance(value, str) else tuple(value or ())
        for word in found:
            if word not in self.known:
                because = dict(self.why).get(word, "")
                among = f"{'one of ' if len(self.known) > 1 else ''}{', '.join(self.known)} is"
                raise UsageError(
                    f"{option} {word}: {because}{among} expected{nearest(word, self.known)}",
                    option=option,
                    code="unknown",
                )
        return found


@dataclass(frozen=True)
class Home:
    """Paths, and what may be one: ``~`` and ``~user`` at the start are that home folder; ``several``: with commas."""

    several: bool = False

    def __call__(self, value: Any, option: str) -> Any:
        """
        Raises:
            UsageError: a user without a home folder.
        """
        if self.several and isinstance(value, str):
            return ",".join(from_home(one, option) for one in value.split(","))
        return from_home(value, option)


def split_words(text: str) -> list[str]:
    """``"a, b"`` -> ["a", "b"]."""
    return [word.strip() for word in text.split(",") if word.strip()]


def text(value: str | None) -> Any:
    """A default in the form in which a user would write it; it is converted as a given value is."""
    return value


PathText = Annotated[str, Home()]
PathTexts = Annotated[str, Home(several=True)]
PositiveInt = Annotated[int, Bounds(1)]
Count = Annotated[int, Bounds(0)]
AboveZero = Annotated[float, Bounds(0, above=True)]
Fraction = Annotated[float, Bounds(0, 1)]
if TYPE_CHECKING:  # what convert() makes of the text
    IntList = tuple[int, ...]
    SeedList = tuple[int, ...]
    ShotList = tuple[int, ...]
    RateList = tuple[float, ...]
    FloatList = tuple[float, ...]
    AutoRateList = tuple[float, ...] | None
    AutoFloatList = tuple[float, ...] | None
    UnitRateList = tuple[float, ...] | None
    BaselineList = tuple[str, ...]
    UntrainedOnly = tuple[str, ...]
    ValueList = tuple[int, ...] | None
    SideRange = tuple[float, ...] | None
else:
    IntList = Annotated[str, Numbers(int, 1)]
    SeedList = Annotated[str, Numbers(int, 0, distinct=True)]
    ShotList = Annotated[str, Numbers(int, 0, 1000, distinct=True)]
    RateList = Annotated[str, Numbers(float, 0, above=True)]
    UnitRateList = Annotated[str | None, Numbers(float, 0, 1, above=True)]
    FloatList = Annotated[str, Numbers(float, 0)]
    AutoRateList = Annotated[str | None, Numbers(float, 0, above=True)]
    AutoFloatList = Annotated[str | None, Numbers(float, 0)]
    ValueList = Annotated[str | None, Numbers(int, 0, distinct=True)]
    SideRange = Annotated[str | None, Numbers(float, 3)]
    BaselineList = Annotated[str | None, Words(("random", "pixels"))]
    UntrainedOnly = Annotated[
        str | None,
        Words(("random",), (("pixels", "raw pixels can't replace an encoder that texts were trained with; "),)),
    ]


def rules(hint: Any) -> Iterator[Any]:
    """The ranges and lists that a type names."""
    yield from getattr(hint, "__metadata__", ())
    for part in get_args(hint):
        yield from rules(part)


def allowed(hint: Any) -> str:
    """The ranges of a type, in words; "" where it has none."""
    return "; ".join(rule.words().rstrip(",") for rule in rules(hint) if isinstance(rule, Bounds | Numbers))


def convert(value: Any, hint: Any, option: str) -> Any:
    """A value of the right type, held to the ranges and lists of ``hint``.

    Raises:
        UsageError: a value outside of them; ``option`` is how the user calls it.
    """
    for rule in rules(hint):
        value = rule(value, option)
    return value
