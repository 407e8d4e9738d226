"""``aimv2 doctor``: what works on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

EXAMPLES = "aimv2 doctor --quick"


@dataclass(kw_only=True)
class DoctorOptions:
    """Check this machine: versions, devices, kernels, hub, disk, process groups, and a tiny run with timing.

    The command ends with exit code 0 if nothing failed, else with 1.

    Args:
        quick: leave out the tiny run, which trains, saves and loads a model
    """

    quick: bool = False


def run(options: DoctorOptions) -> dict[str, Any]:
    """
    Returns:
        ``checks``: a list of group, name, status (ok, off = not here and not needed, warn, fail), found, advice, seconds;
        ``failed`` and ``warned``: how many.
    """
    from aimv2.doctor.examine import examine
    from aimv2.train.log import say

    return examine(options.quick, say)


def render(result: dict[str, Any], console: Console) -> None:
    from aimv2.commands.render import WIDTH
    from aimv2.doctor.examine import render as table

    console.print(table(result), soft_wrap=False, width=min(console.width, WIDTH))


def exit_code(result: dict[str, Any]) -> int:
    return int(result["failed"] > 0)
