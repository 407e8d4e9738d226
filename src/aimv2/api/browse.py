"""Looking at data before training: data browse. Heavy imports happen inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aimv2.errors import UsageError

MOST = 1000  # samples of a page


def data_browse(
    config: str | None = None,
    options: dict[str, Any] | None = None,
    out: str = "browse.html",
    count: int = 32,
    open: bool = False,
) -> dict[str, Any]:
    """Write a page of the first samples of a run, as its model will see them: crop, prefix, caption tokens, mixture.

    Values are those of :func:`aimv2.api.pretrain`; the samples are those that a run of the same values trains on first.

    Args:
        config: a YAML recipe. Without one and without data: the demo's captioned scenes.
        options: values by dotted key, over the recipe's (``{"data.train": "shards", "seed": 1}``).
        out: the page, NAME.html
        count: samples on the page
        open: the page in the browser of this machine

    Returns:
        ``page``: its path; ``samples``, ``sources`` (weight, share, drawn), ``caption_tokens``, ``learning_rate``, ...

    Raises:
        UsageError: what ``pretrain`` would refuse, or a page that can't be written.
    """
    page = Path(out).expanduser()
    if page.suffix.lower() not in (".html", ".htm") or page.is_dir():
        raise UsageError(f"--out {out}: a file NAME.html is expected")
    if not 1 <= count <= MOST:
        raise UsageError(f"--count {count}: 1 to {MOST} expected")
    import tempfile
    import webbrowser

    from aimv2.report.browse.drawn import draw
    from aimv2.report.browse.page import write_page

    with tempfile.TemporaryDirectory() as scratch:
        result = write_page(draw(config, dict(options or {}), count, Path(scratch)), page)
    if open:
        webbrowser.open(page.absolute().as_uri())
    return result
