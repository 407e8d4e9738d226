"""Looking at the machine: doctor. Heavy imports happen inside."""

from __future__ import annotations

from typing import Any


def doctor(quick: bool = False) -> dict[str, Any]:
    """Look over this machine: versions, devices, kernels, hub, disk, process groups, and a tiny run with timing.

    The command ends with exit code 0 where nothing failed, else with 1.

    Args:
        quick: leave out the tiny run, which trains, saves and loads a model

    Returns:
        ``checks``: a list of group, name, status (ok, off = not here and not needed, warn, fail), found, advice, seconds;
        ``failed`` and ``warned``: how many.
    """
    from aimv2.doctor.examine import examine
    from aimv2.train.log import say

    return examine(quick, say)
