"""``aimv2 data browse``: a page of the first samples of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from aimv2.config.types import Bounds, PathText
from aimv2.errors import UsageError

EXAMPLES = """\
aimv2 data browse --data.train shards/mine --out browse.html
aimv2 data browse --config recipe.yaml --data.train shards/mine --open"""
FIRST = "config data.train seed out count open"


@dataclass(kw_only=True)
class DataBrowseOptions:
    """Write a page of the first samples of a run, as its model will see them: crop, prefix, caption tokens, mixture.

    Values are those of ``pretrain``; the samples are those that a run with the same values trains on first. Of conversations (shards
    without captions, or objective.name=instruct) the page shows questions and answers with all their images; of boxes (shards without
    captions, or objective.name=detect) the pictures with their boxes, classes and phrases.

    Args:
        config: YAML recipe, by path or by a name of `aimv2 recipes`; without one and without data: the demo's captioned scenes
        options: values by dotted key, which override the recipe's (``{"data.train": "shards", "seed": 1}``)
        out: the page, NAME.html
        count: number of samples on the page
        open: open the page in the browser
    """

    config: PathText | None = None
    options: dict[str, Any] | None = None
    out: PathText = "browse.html"
    count: Annotated[int, Bounds(1, 1000)] = 32
    open: bool = False


def run(options: DataBrowseOptions) -> dict[str, Any]:
    """
    Returns:
        ``page``: its path; ``samples``, ``sources`` (weight, share, drawn), ``caption_tokens``, ``learning_rate``, ...; of
        conversations ``samples``, ``images``, ``text_only``, ``bad``; of boxes ``samples``, ``objects``, ``phrases``, ``classes``, ``bad``.

    Raises:
        UsageError: what ``pretrain`` would refuse, or a page that can't be written.
    """
    page = Path(options.out).expanduser()
    if page.suffix.lower() not in (".html", ".htm") or page.is_dir():
        raise UsageError(f"--out {options.out}: a file NAME.html is expected")
    import tempfile
    import webbrowser

    from aimv2.report.browse.drawn import draw
    from aimv2.report.browse.page import write_page
    from aimv2.report.browse.regions import region_sources, write_boxes
    from aimv2.report.browse.talks import conversation_sources, run_sources, write_talks

    given = dict(options.options or {})
    opened = run_sources(options.config, given)
    if sources := conversation_sources(opened):
        result = write_talks(sources, options.count, page)
    elif sources := region_sources(opened):
        result = write_boxes(sources, options.count, page)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            result = write_page(draw(options.config, given, options.count, Path(scratch)), page)
    if options.open:
        webbrowser.open(page.absolute().as_uri())
    return result
