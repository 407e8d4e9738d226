"""Pictures of runs: report. Heavy imports happen inside."""

from __future__ import annotations

from typing import Any


def report(
    runs: list[str],
    out: str | None = None,
    images: int = 6,
    device: str | None = None,
    watch: float | None = None,
) -> dict[str, Any]:
    """Draw a page of what a run has learnt; of several runs their curves, figures and differences.

    Args:
        runs: run folders, training or finished
        out: the page, NAME.html, or a folder for it; null: report.html in the run folder, of several runs in the working
            folder. Pictures go into a folder of its name beside it
        images: held-out images shown in each section
        device: of the model, such as cuda; null: the CPU
        watch: seconds after which the page is written again, until the runs end; the page reloads itself

    Returns:
        ``report``: its path; ``pictures``, ``bytes``, ``sections``, and ``left_out``: reasons by section.
    """
    from aimv2.report import write

    if watch is not None:
        return write.watch(runs, watch, out, images, device)
    return write.write_report(runs, out, images, device)
