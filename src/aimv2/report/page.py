"""Sections to one self-contained page, and to PNGs beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from aimv2.errors import UsageError
from aimv2.io import write_aside
from aimv2.report.blocks import Section
from aimv2.report.charts import Panel, draw_png
from aimv2.report.images import to_png, to_uri
from aimv2.report.sheet import draw_sheet

LARGEST = 5_000_000  # bytes of a page
QUALITIES = ((256, 88), (224, 75), (160, 65), (112, 50), (64, 40))  # pixels a side and JPEG quality, tried in turn


@dataclass
class Page:
    """All of a report.

    Attributes:
        title: of the page.
        state: a line below it.
        tiles: (what, figure) at its head.
        sections: in order.
        panels: of the curves, for their PNG.
        reload: seconds after which the page loads itself anew; None: never.
    """

    title: str
    state: str
    tiles: list[tuple[str, str]]
    sections: list[Section]
    panels: Sequence[Panel] = ()
    reload: float | None = None
    made: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %Z").strip())


def render(page: Page) -> str:
    """The page as HTML of less than LARGEST bytes: pictures shrink until it fits.

    Raises:
        UsageError: it does not fit with the smallest pictures.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("aimv2.report", "template")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.get_template("report.html.j2")
    style = files("aimv2.report").joinpath("template/report.css").read_text(encoding="utf-8")
    for side, quality in QUALITIES:
        html = template.render(page=page, style=style, uri=lambda picture: to_uri(picture, side, quality))  # noqa: B023
        if len(html.encode()) < LARGEST:
            return html
    raise UsageError(f"the page would be larger than {LARGEST / 1e6:g} MB; --images asks for fewer pictures")


def write_page(page: Page, out: Path) -> int:
    """Writes the page to ``out`` and its pictures into ``report/`` beside it; returns the page's bytes.

    Raises:
        UsageError: can't be written.
    """
    html = render(page)
    folder = out.parent / out.stem
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for section in page.sections:
            picture = draw_sheet(section)
            if picture is not None:
                _write_bytes(folder / f"{section.name}.png", to_png(picture))
        if page.panels and page.reload is None:  # of a page that lives, at its end
            aside = folder / ".curves.png"
            draw_png(page.panels, aside)
            aside.replace(folder / "curves.png")
        write_aside(out, html)
    except OSError as error:
        raise UsageError(f"--out {out} can't be written: {error.strerror}") from None
    return len(html.encode())


def _write_bytes(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}")
    aside.write_bytes(content)
    aside.replace(path)
