"""Render a report as one self-contained HTML page, and its images as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from aimv2.errors import UsageError
from aimv2.io import write_aside
from aimv2.report.blocks import Section
from aimv2.report.charts import Panel, draw_png
from aimv2.report.images import to_png, to_uri
from aimv2.report.runs import date_of
from aimv2.report.sheet import draw_sheet

LARGEST = 5_000_000  # bytes per page
QUALITIES = ((256, 88), (224, 75), (160, 65), (112, 50), (64, 40))  # pixels per side and JPEG quality, tried in turn


@dataclass
class Page:
    """Content of a report.

    Attributes:
        title: title of the page.
        state: a line below the title.
        tiles: (label, figure) pairs at the top.
        sections: sections in order.
        panels: curves for the PNG.
        reload: seconds between reloads in the browser; None: never.
    """

    title: str
    state: str
    tiles: list[tuple[str, str]]
    sections: list[Section]
    panels: Sequence[Panel] = ()
    reload: float | None = None
    made: str = field(default_factory=date_of)


def render_template(
    package: str, file: str, context: dict[str, Any], qualities: Sequence[tuple[int, int]] = QUALITIES
) -> str:
    """Fill an HTML template, with smaller images until the page has fewer than LARGEST bytes or ``qualities`` end.

    Args:
        package: package and folder of the template, such as ``aimv2.report/template``.
        file: name of the template.
        context: its variables; ``style`` and ``uri`` (a picture as data URI) are added.
        qualities: pixels per side and JPEG quality, tried in turn.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader(*package.split("/"))
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.get_template(file)
    style = files("aimv2.report").joinpath("template/report.css").read_text(encoding="utf-8")
    html = ""
    for side, quality in qualities:
        html = template.render(**context, style=style, uri=partial(to_uri, side=side, quality=quality))
        if len(html.encode()) < LARGEST:
            break
    return html


def render(page: Page) -> str:
    """Render the page as HTML of less than LARGEST bytes.

    Raises:
        UsageError: it does not fit with the smallest images.
    """
    html = render_template("aimv2.report/template", "report.html.j2", {"page": page})
    if len(html.encode()) >= LARGEST:
        raise UsageError(
            f"the page would be larger than {LARGEST / 1e6:g} MB; reduce --images", option="--images", code="limit"
        )
    return html


def write_page(page: Page, out: Path) -> int:
    """Write the page to ``out`` and its images into a folder of the same name next to it; returns the page's bytes.

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
        if page.panels and page.reload is None:  # with --watch only once, at the end
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
