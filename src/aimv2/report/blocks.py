"""What a page of pictures is made of: sections of blocks. Data alone; the template draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from aimv2.report.images import Picture


@dataclass
class Shot:
    """A picture.

    Attributes:
        picture: uint8 [H, W, 3], one value a pixel; the page enlarges it.
        under: what stands below it.
        pixels: sharp squares when enlarged (maps, small images) rather than smooth.
    """

    picture: Picture
    under: str = ""
    pixels: bool = True


@dataclass
class Tinted:
    """A token on a tint.

    Attributes:
        text: of the token.
        figure: below it.
        share: 0..1, how strong the tint is.
        tip: what a pointer over it says.
    """

    text: str
    figure: str
    share: float
    tip: str = ""


@dataclass
class Strip:
    """Pictures that belong together, in a row, with tokens below."""

    kind: ClassVar[str] = "strip"
    title: str
    shots: list[Shot]
    tokens: list[Tinted] = field(default_factory=list)
    note: str = ""
    size: int = 112  # CSS pixels a side


@dataclass
class Chart:
    """A drawn curve: ``svg`` is ready to stand in the page."""

    kind: ClassVar[str] = "chart"
    title: str
    svg: str


@dataclass
class Table:
    """Rows of text; marked rows stand out, ``folded`` hides all behind a line that opens it."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    folded: str = ""


@dataclass
class Section:
    """A heading, how to read what follows, and the blocks; or why there are none.

    Attributes:
        name: short, of the link and of the file of its pictures.
        title: of the heading.
        lead: what one sees and how to read it.
        blocks: what is drawn.
        missing: one line where the section can't be.
    """

    name: str
    title: str
    lead: str = ""
    blocks: list[Any] = field(default_factory=list)
    missing: str = ""
