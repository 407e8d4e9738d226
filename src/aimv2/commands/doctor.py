"""``aimv2 doctor``: what works on this machine, and whether a run's checkpoints are whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from aimv2.config.types import PathText

EXAMPLES = """\
aimv2 doctor --quick
aimv2 doctor runs/mine"""


@dataclass(kw_only=True)
class DoctorOptions:
    """Check this machine: versions, devices, kernels, hub, disk, process groups, and a tiny run with timing.

    With run folders check these instead: every file of every checkpoint against its list of sizes and hashes; nothing is changed.
    The command ends with exit code 0 if nothing failed, else with 1.

    Args:
        quick: leave out the tiny run, which trains, saves and loads a model
        runs: run folders whose checkpoints are verified; none: this machine
    """

    quick: bool = False
    runs: list[PathText] | None = None


def run(options: DoctorOptions) -> dict[str, Any]:
    """
    Returns:
        ``checks``: a list of group, name, status (ok, off = not here and not needed, warn, fail), found, advice, seconds;
        ``failed`` and ``warned``: how many.
    """
    from aimv2.doctor.examine import examine
    from aimv2.doctor.run_folder import checkpoints_of
    from aimv2.train.log import say

    runs = [options.runs] if isinstance(options.runs, str) else options.runs
    return examine(options.quick, say, [(f"the checkpoints of {run}", checkpoints_of(run)) for run in runs or ()])


def render(result: dict[str, Any], console: Console) -> None:
    from aimv2.commands.render import WIDTH
    from aimv2.doctor.examine import render as table

    console.print(table(result), soft_wrap=False, width=min(console.width, WIDTH))


def exit_code(result: dict[str, Any]) -> int:
    return int(result["failed"] > 0)
