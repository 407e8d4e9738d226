"""Data of a report page: sections of blocks, drawn by the template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from aimv2.report.images import Picture


@dataclass
class Shot:
    """A picture with its caption.

    Attributes:
        picture: uint8 [H, W, 3], unscaled; the page enlarges it.
        under: caption below it.
        pixels: enlarge with sharp pixels (maps, small images) instead of smoothly.
    """

    picture: Picture
    under: str = ""
    pixels: bool = True


@dataclass
class Tinted:
    """A token on a coloured background.

    Attributes:
        text: text of the token.
        figure: figure below it.
        share: strength of the colour, 0..1.
        tip: tooltip.
    """

    text: str
    figure: str
    share: float
    tip: str = ""


@dataclass
class Strip:
    """A row of pictures, with tokens below."""

    kind: ClassVar[str] = "strip"
    title: str
    shots: list[Shot]
    tokens: list[Tinted] = field(default_factory=list)
    note: str = ""
    size: int = 112  # CSS pixels a side


@dataclass
class Chart:
    """A chart as inline SVG."""

    kind: ClassVar[str] = "chart"
    title: str
    svg: str


@dataclass
class Table:
    """Rows of text; ``marked`` rows are highlighted, ``folded`` is the summary line of a collapsed table."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    folded: str = ""


@dataclass
class Section:
    """A section of a page, or the reason why it is missing.

    Attributes:
        name: short name, for the link and the PNG file.
        title: heading.
        lead: what the section shows and how to read it.
        blocks: its content.
        missing: reason, if the section can't be drawn.
    """

    name: str
    title: str
    lead: str = ""
    blocks: list[Any] = field(default_factory=list)
    missing: str = ""
