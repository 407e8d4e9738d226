"""Class folders: their order, which is that of the labels, and the names of their classes. One rule for import and evaluation."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from aimv2.data.images.catalogue import is_hidden
from aimv2.data.images.names import NameFinder, folded, normal
from aimv2.data.images.text_tables import no_text
from aimv2.data.text.encoding import text_lines
from aimv2.errors import UsageError

NAMES_FILES = ("classes.txt", "classnames.txt")  # ours, CLIP_benchmark's
NAMELESS = re.compile(r"\d+|n\d{8}")  # numbers and WordNet ids say nothing to a text tower
WORD = re.compile(r"[^\s_,:-]+")
NUMBERED = re.compile(r"(\d+)[\s,:]+(.*\S)")
OF_CLASS = re.compile(r"(.*\S)\s*[:\t]\s*(\S.*)")  # FOLDER: NAME
log = logging.getLogger(__name__)


def subfolders(folder: Path) -> list[str]:
    """Names of the visible folders in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not is_hidden(entry.name) and entry.is_dir())


def names_beside(*folders: Path) -> tuple[str, ...] | None:
    """Class names, a line each in label order, of classes.txt or classnames.txt; None where there is neither."""
    for path in (folder / name for folder in folders for name in NAMES_FILES):
        if path.is_file():
            try:
                return by_number(tuple(map(normal, text_lines(path))))
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


def by_number(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names in the order of the numbers that all lines begin with (from 0 or 1, each once), without them; others as they are."""
    found = [NUMBERED.fullmatch(name) for name in names]
    numbered = {int(one[1]): one[2] for one in found if one}
    counted = names and sorted(numbered) in ([*range(len(names))], [*range(1, len(names) + 1)])
    if counted and len(set(numbered.values())) == len(names):
        return tuple(numbered[number] for number in sorted(numbered))
    return names


def join_names(
    classes: Sequence[str],
    names: Sequence[str],
    places: Sequence[int] | None,
    refuse: Callable[[str], UsageError],
) -> list[tuple[int, str]] | None:
    """(class, its name), in the order of the names, where each names or holds one class of its own; None: they go by position.

    Compared as they are, then without case, then with ``_`` and ``-`` as spaces; a name may hold a class among other words.

    Args:
        classes: as folders or data call them.
        names: that a person wrote for them, a line each.
        places: of each class the line that is its own by position; None: there is no such line.
        refuse: makes an error of what is wrong.

    Raises:
        UsageError: names of some classes only, or at the line of another class.
    """
    numbers = are_numbers(classes)

    def words(name: str) -> tuple[str, ...]:
        return tuple(str(int(word)) if numbers and are_numbers([word]) else word for word in WORD.findall(folded(name)))

    forms: tuple[Callable[[str], object], ...] = normal, folded, words
    known = [defaultdict[object, list[int]](list) for _ in forms]
    for row, one in enumerate(classes):
        for form, by_form in zip(forms, known):
            by_form[form(one)].append(row)

    def find(name: str) -> tuple[list[int], bool, str]:
        """Classes that a line may mean, whether it states no more than them, and the name in it."""
        if whole := next((rows for form, by_form in zip(forms, known) if (rows := by_form.get(form(name)))), None):
            return whole, True, name
        if (cut := OF_CLASS.fullmatch(name)) and (stated := known[-1].get(words(cut[1]))):
            return stated, True, cut[2]
        said = words(name)
        for size in range(len(said) - 1, 0, -1):
            starts = range(1 if numbers else len(said) - size + 1)
            if held := [row for start in starts for row in known[-1].get(said[start : start + size], ())]:
                rest = name[[*WORD.finditer(name)][size].start() :]
                bare = said[:size] == words(classes[held[0]]) and all(NAMELESS.fullmatch(classes[row]) for row in held)
                return held, False, rest if bare else name
        return [], False, name

    found = [find(name) for name in names]
    if sorted(row for rows, *_ in found for row in (rows if len(rows) == 1 else [-1])) == [*range(len(classes))]:
        own = [name for *_, name in found]
        own = own if len(set(own)) == len(own) else list(names)
        return [(rows[0], name) for (rows, *_), name in zip(found, own)]
    if places is None:
        return None
    at_home = {row for row, line in enumerate(places) if row in found[line][0]}
    for line, (rows, whole, _) in enumerate(found):
        away = [row for row in rows if whole or row not in at_home]
        if away and line not in [places[row] for row in rows]:
            raise refuse(f"{names[line]!r} at line {line + 1}, which is not the line of the class {classes[away[0]]}")
    if not numbers and len(at_home) < len(classes) and 2 * sum(whole for _, whole, _ in found) > len(names):
        lost = next(one for row, one in enumerate(classes) if row not in at_home)
        raise refuse(f"no name for the class {lost}, though other classes have theirs there")
    return None


def _places(ordered: Sequence[str], count: int) -> list[int] | None:
    """The line of each class folder among ``count`` names in the order of the labels; None: that order is not plain."""
    if are_numbers(ordered):
        numbers = list(map(int, ordered))
        if numbers[:1] == [0] and numbers[-1] < count:
            return numbers
        return [*range(count)] if numbers == [*range(1, count + 1)] else None
    natural = sorted(
        ordered, key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    )
    return [*range(count)] if len(ordered) == count and natural == list(ordered) else None


def class_folders(folders: Sequence[str], names: tuple[str, ...] | None, source: str) -> list[tuple[str, str]]:
    """(folder, name of its class) in the order of the labels; the folder of a class without images may not be there.

    ``names`` may be the folders' own names, or hold them (:func:`join_names`), and then order the labels; as many other names, which
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
        say_odd_classes(ordered, source)
        return [(folder, str(int(folder)) if are_numbers(folders) else normal(folder)) for folder in ordered]
    files, hint = " or ".join(NAMES_FILES), "one line FOLDER: NAME a class expected"
    places = _places(ordered, len(names))
    joined = join_names(ordered, names, places, lambda what: UsageError(f"{source}: {files} holds {what}; {hint}"))
    if joined is not None:
        stated = tuple(name for _, name in joined) != names and are_numbers(folders)  # numbers before names: the labels
        return [(ordered[row], name) for row, name in (sorted(joined) if stated else joined)]
    if places is not None:
        at = dict(zip(places, ordered))
        return [(at.get(line, str(line)), name) for line, name in enumerate(names)]
    why = "" if len(names) != len(folders) else f" ({', '.join(ordered[:3])}, ...), whose order is not plain"
    raise UsageError(f"{source}: {len(names)} class names in {files}, {len(folders)} class folders{why}; {hint}")


def say_odd_classes(names: Sequence[str], source: str) -> None:
    """A line for classes that may be no classes of their own: other classes joined, another case of another class."""
    known = set(names)
    for name in names:
        parts = [part for part in re.split(r"[\s,;|+&/]+", name) if part]
        if len(parts) > 1 and known.issuperset(parts):
            log.warning(
                "%s: the class '%s' is %s other classes in one; several labels of an image are not read",
                source,
                name,
                len(parts),
            )
            break
    by_case: dict[str, str] = {}
    if twice := next((name for name in names if by_case.setdefault(folded(name), name) != name), None):
        log.warning("%s: the classes '%s' and '%s' differ by case only", source, by_case[folded(twice)], twice)


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
