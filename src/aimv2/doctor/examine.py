"""Run all checks and render their table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aimv2.doctor import kernels, machine, selftest
from aimv2.doctor.check import Check

STYLES = {"ok": "green", "off": "dim", "warn": "yellow", "fail": "bold red"}


def examine(
    quick: bool, say: Callable[[str], None], others: Sequence[tuple[str, Callable[[], list[Check]]]] = ()
) -> dict[str, Any]:
    """Run every check; ``quick`` skips the self-test, ``others`` (description, function) take the place of all.

    Returns:
        ``checks`` (group, name, status, found, advice, seconds), ``failed``, ``warned``, ``seconds``.
    """
    began = time.perf_counter()
    checks: list[Check] = []
    for what, found in others or parts(quick):
        say(f"checking {what}")
        checks += found()
    return {
        "failed": sum(check.status == "fail" for check in checks),
        "warned": sum(check.status == "warn" for check in checks),
        "seconds": round(time.perf_counter() - began, 2),
        "checks": [asdict(check) for check in checks],
    }


def parts(quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Groups of checks: description and function."""
    yield "versions", machine.versions
    yield "devices", machine.devices
    yield "attention", kernels.attention
    yield "torch.compile", lambda: [kernels.compiled()]
    yield "the hub", machine.hub
    yield "disks", machine.disk
    yield "process groups", machine.distributed
    if not quick:
        yield "a tiny training run", selftest.self_test


def render(result: dict[str, Any]) -> RenderableType:
    """Render the result of :func:`examine` for a terminal of 80 columns."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    group = ""
    for check in result["checks"]:
        if check["group"] != group:
            group = check["group"]
            table.add_row("", Text(group, style="bold"), "")
        found = check["found"] + (f" ({check['seconds']:.1f} s)" if check["seconds"] is not None else "")
        status = Text(check["status"], style=STYLES[check["status"]])
        table.add_row(status, Text(check["name"]), Text(found))
    lines: list[RenderableType] = [table, Text()]
    for check in result["checks"]:
        if check["advice"]:
            head = Text(f"{check['status']}: ", style=STYLES[check["status"]])
            lines.append(head + Text(f"{check['name']}: {check['advice']}"))
    failed, warned = result["failed"], result["warned"]
    verdict = f"{failed or 'none'} failed, {warned} with a warning"
    lines.append(Text(f"{verdict if failed or warned else 'all ok'}; {result['seconds']:.1f} s", style="bold"))
    return Group(*lines)
