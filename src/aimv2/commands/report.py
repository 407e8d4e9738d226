"""``aimv2 report``: a page of runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aimv2.config.types import PathText

EXAMPLES = """\
aimv2 report runs/mine
aimv2 report runs/a runs/b --out compared.html"""


@dataclass(kw_only=True)
class ReportOptions:
    """Write a page of what a run has learned; for several runs their curves, figures and differences.

    Args:
        runs: run folders, training or finished
        out: the page, NAME.html, or a folder for it; null: report.html in the run folder, for several runs in the working
            folder. Pictures go into a folder of the same name next to it
        images: held-out images per section
        device: of the model, such as cuda; null: the CPU
        watch: seconds until the page is written again, until the runs end; the page reloads itself
    """

    runs: list[PathText]
    out: PathText | None = None
    images: int = 6
    device: str | None = None
    watch: float | None = None


def run(options: ReportOptions) -> dict[str, Any]:
    """
    Returns:
        ``report``: its path; ``pictures``, ``bytes``, ``sections``, and ``left_out``: reasons by section.
    """
    from aimv2.report import write

    if options.watch is not None:
        return write.watch(options.runs, options.watch, options.out, options.images, options.device)
    return write.write_report(options.runs, options.out, options.images, options.device)
