"""One line of the doctor's table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "off", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What was looked at and found.

    Attributes:
        group: heading of the table.
        name: what was looked at.
        status: ok; off = not here and not needed; warn = something will be slower or not work; fail = aimv2 can't do its work.
        found: in words.
        advice: what to do, in one line; never empty with warn or fail.
        seconds: that it took, where that says something.
    """

    group: str
    name: str
    status: Status
    found: str
    advice: str = ""
    seconds: float | None = None

    def __post_init__(self) -> None:
        assert self.advice or self.status in ("ok", "off"), f"{self.name}: {self.status} without advice"


def reason(error: BaseException, most: int = 160) -> str:
    """The first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:most]
