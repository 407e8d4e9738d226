"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "off", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        group: heading in the table.
        name: name of the check.
        status: ok; off = unavailable and not needed; warn = something is slower or unavailable; fail = aimv2 can't work.
        found: the finding, in words.
        advice: what to do, in one line; required with warn and fail.
        seconds: duration, if informative.
    """

    group: str
    name: str
    status: Status
    found: str
    advice: str = ""
    seconds: float | None = None

    def __post_init__(self) -> None:
        assert self.advice or self.status in ("ok", "off"), f"{self.name}: {self.status} without advice"
