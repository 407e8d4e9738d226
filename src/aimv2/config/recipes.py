"""The recipes and chains that come with the package: by name, and what their headers say. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from aimv2.errors import UsageError, nearest
from aimv2.io import read_file

HEADER = ("command", "source", "data", "hardware", "hours", "score")  # entries of every header
PACKAGE = Path(__file__).resolve().parents[1]


def shipped() -> dict[str, Path]:
    """The files by name, recipes before chains: of the installed package, or of the checkout that it is imported from."""
    folders = (folder for folder in (PACKAGE / "recipes", PACKAGE.parents[1] / "recipes") if folder.is_dir())
    folder = next(folders, PACKAGE / "recipes")
    return {path.stem: path for pattern in ("*.yaml", "chains/*.yaml") for path in sorted(folder.glob(pattern))}


def is_chain(path: Path) -> bool:
    """Whether a shipped file is a chain."""
    return path.parent.name == "chains"


def recipe_file(given: str | Path, option: str) -> Path:
    """The file of a path, or of a shipped name; a file of that path wins.

    Args:
        given: by the user.
        option: that took it: ``--config`` for a recipe, ``CHAIN`` for a chain.

    Raises:
        UsageError: neither, or a chain where a recipe is expected, or the other way round.
    """
    path, known, chain = Path(given).expanduser(), shipped(), option == "CHAIN"
    if path.is_file():
        return path
    if (found := known.get(str(given))) is not None:
        if is_chain(found) != chain:
            use = f"aimv2 run {given}" if chain is False else f"aimv2 pretrain --config {given}"
            kinds = ("a recipe", "a chain") if chain else ("a chain", "a recipe")
            raise UsageError(f"{option} {given}: {kinds[0]}, {kinds[1]} expected; use: {use}", code="mismatch")
        return found
    kind = "chain" if chain else "recipe"
    if path.is_dir():
        inner = f"; did you mean {path / 'config.yaml'}?" if not chain and (path / "config.yaml").is_file() else ""
        raise UsageError(f"{option} {given}: is a directory, the YAML file of a {kind} expected{inner}")
    among = nearest(path.stem, [name for name, file in known.items() if is_chain(file) == chain])
    raise UsageError(
        f"{option} {given}: no such file or {kind}{among} (`aimv2 recipes` lists the names)", code="not-found"
    )


def head_lines(path: Path) -> list[str]:
    """The comment that a file starts with."""
    lines = []
    for line in read_file(path).decode().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def header(path: Path) -> dict[str, str]:
    """``what``, the first paragraph of the head, and its entries by name."""
    lines = head_lines(path)
    entries, key = {"what": ""}, "what"
    for line in lines:
        if found := re.match(rf"  ({'|'.join(HEADER)})\s+(\S.*)", line):
            key = found[1]
            entries[key] = found[2]
        elif not line.strip():
            key = ""
        elif key:
            entries[key] += ("\n" if key in ("command", "data") else " ") * bool(entries[key]) + line.strip()
    return entries
