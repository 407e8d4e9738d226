"""Class folders: their order, which is that of the labels, and the names of their classes. One rule for import and evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from aimv2.data.images.catalogue import is_hidden
from aimv2.data.images.names import NameFinder, normal
from aimv2.data.images.text_tables import no_text
from aimv2.data.text.encoding import text_lines
from aimv2.errors import UsageError

NAMES_FILES = ("classes.txt", "classnames.txt")  # ours, CLIP_benchmark's


def subfolders(folder: Path) -> list[str]:
    """Names of the visible folders in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir())


def names_beside(*folders: Path) -> tuple[str, ...] | None:
    """Class names, a line each in label order, of classes.txt or classnames.txt; None where there is neither."""
    for path in (folder / name for folder in folders for name in NAMES_FILES):
        if path.is_file():
            try:
                return tuple(map(normal, text_lines(path)))
            except UnicodeError:
                raise no_text(path, "--data") from None
    return None


def are_numbers(names: Iterable[str]) -> bool:
    """Whether all names are whole numbers."""
    return all(name.isascii() and name.isdecimal() for name in names)


def class_order(folders: Sequence[str], source: str) -> list[str]:
    """Class folders in the order of their labels: as numbers where all of their names are whole numbers, else as words.

    Raises:
        UsageError: two names of one number, or of one word.
    """
    numbers = are_numbers(folders)
    kinds: dict[int | str, str] = {}
    for name in folders:
        other = kinds.setdefault(int(name) if numbers else normal(name), name)
        if other != name:
            raise UsageError(
                f"{source}: the folders {other} and {name} are one class by their names; merge or rename them"
            )
    return sorted(folders, key=int) if numbers else sorted(folders)


def class_folders(folders: Sequence[str], names: tuple[str, ...] | None, source: str) -> list[tuple[str, str]]:
    """(folder, name of its class) in the order of the labels; the folder of a class without images may not be there.

    ``names`` may be the folders' own names (in any case and normal form), which then order the labels; as many other names, which
    fit the folders in their order; or, for folders that are numbers from 0, the names of these numbers.

    Args:
        folders: of the training images.
        names: of :func:`names_beside`.
        source: what an error begins with.

    Raises:
        UsageError: names that fit the folders in none of these ways.
    """
    ordered = class_order(folders, source)
    if names is None:
        return [(folder, str(int(folder)) if are_numbers(folders) else normal(folder)) for folder in ordered]
    finder, files = NameFinder(folders), " or ".join(NAMES_FILES)
    found = [finder.find(name, stems=False) for name in names]
    if any(found):
        meant = [one[0] for one in found if len(one) == 1]
        lost = next((name for name, one in zip(names, found) if len(one) != 1), None)
        more = next((folder for folder in ordered if folder not in meant), None)
        if lost is None and more is None and len(set(meant)) == len(names):
            return list(zip(meant, names))
        if len(meant) * 2 > len(names) and not are_numbers(folders):
            what = f"{lost!r}, which names no class folder (or several)" if lost else f"no name of the folder {more}"
            raise UsageError(f"{source}: {files} holds {what}, though other names there do; one name a folder expected")
    if len(names) == len(folders):
        return list(zip(ordered, names))
    if are_numbers(folders) and ordered and int(ordered[0]) == 0 and int(ordered[-1]) < len(names):
        numbered = {int(folder): folder for folder in ordered}
        return [(numbered.get(number, str(number)), name) for number, name in enumerate(names)]
    raise UsageError(f"{source}: {len(names)} class names in {files}, {len(folders)} class folders")


def same_class(folders: Sequence[str], there: Sequence[str], source: str) -> dict[str, str]:
    """{class folder of training: folder of the same class in another split}, as numbers, else as names in any case.

    Raises:
        UsageError: a folder of a class that training does not have, or that may be one of several.
    """
    if are_numbers([*folders, *there]):
        known = {int(name): [name] for name in folders}
        found = {name: known.get(int(name), []) for name in there}
    else:
        finder = NameFinder(folders)
        found = {name: finder.find(name, stems=False) for name in there}
    for name, meant in found.items():
        if len(meant) != 1:
            what = f"may be of any of the classes {', '.join(meant)}" if meant else "is a class that train lacks"
            raise UsageError(f"{source}/{name} {what} ({len(folders)} classes there)")
    return {meant[0]: name for name, meant in found.items()}
