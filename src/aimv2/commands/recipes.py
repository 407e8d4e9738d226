"""``aimv2 recipes``: the recipes and chains that come with the package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from aimv2.errors import UsageError, nearest
from aimv2.io import read_file
from aimv2.tables import TextTable

EXAMPLES = "aimv2 recipes\naimv2 recipes flickr8k-tiny"
WIDE = 150  # columns of a terminal from which data and score are shown too


@dataclass(kw_only=True)
class RecipesOptions:
    """List the recipes of `pretrain --config` and the chains of `run`, or print files of theirs, for `> mine.yaml`.

    Args:
        names: of the files to print; none: the list
    """

    names: str | list[str] | None = None


def run(options: RecipesOptions) -> dict[str, Any]:
    """
    Returns:
        ``recipes``: of each ``name``, ``chain`` (whether it is one), ``path``, what its header says (``what``, ``command``, ``source``,
        ``data``, ``hardware``, ``hours``, ``score``), and with ``names`` its ``text``.

    Raises:
        UsageError: an unknown name.
    """
    from aimv2.config.recipes import header, is_chain, shipped

    known = shipped()
    names = [options.names] if isinstance(options.names, str) else options.names
    for name in names or ():
        if name not in known:
            raise UsageError(f"NAMES {name}: no such recipe or chain{nearest(name, known)}", code="unknown")
    rows = []
    for name in names or known:
        path = known[name]
        text = {"text": read_file(path).decode()} if names else {}
        rows.append({"name": name, "chain": is_chain(path), "path": str(path), **header(path), **text})
    return {"recipes": rows}


def render(result: dict[str, Any], console: Console) -> None:
    """The files as they are, or a row each with the first clauses of their headers."""
    rows = result["recipes"]
    if any("text" in row for row in rows):
        print("\n".join(row["text"] for row in rows), end="")
        return
    wide = console.is_terminal and console.width >= WIDE
    heads = ("name", "hours", "hardware", "what", *(("data", "score") if wide else ()))
    ratio = {"hardware": 2, "what": 4, "data": 4, "score": 4}
    for chains, title in ((False, "recipes, for aimv2 pretrain --config NAME"), (True, "chains, for aimv2 run NAME")):
        table = TextTable(heads, right=("hours",), whole=("name", "hours"), ratio=ratio)
        for row in rows:
            if row["chain"] == chains:
                hours = re.match(r"([\d.]+)( \(estimate\))?", row["hours"])
                time = f"{'~' if hours[2] else ''}{hours[1]}" if hours else "-"
                table.rows.append([row["name"], time, *(short(row[key]) for key in heads[2:])])
        console.print(f"{title}\n{table.to_text(console.width if wide else 80)}\n")
    console.print("~: an estimate. aimv2 recipes NAME > mine.yaml: a file to edit; with its score")


def short(text: str) -> str:
    """The first clause."""
    return re.split(r"[.:;] |[.:;]$| \(|, \d|\n", text)[0]
