"""What a source of pictures is, which files are below a folder, and what columns hold: one rule for every command.

Each command has a table of the forms that it reads, by kind of source and by extension: a new form is one row there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aimv2.data.passed import CLOSED, LOOPS, SYSTEM, PassedOver, is_system_folder, kind_of_file
from aimv2.data.shards.format import IMAGE_EXTENSIONS
from aimv2.data.shards.tars import is_tar
from aimv2.errors import UsageError

Kind = Literal["folder", "tars", "file", "hub", "missing"]


def kind_of(source: str) -> tuple[Kind, Path]:
    """What a source is, and its path.

    ``tars`` is one tar, or a pattern (glob, braces) of them that is no path itself; ``hub`` may be a data set OWNER/NAME.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return "folder", path
    if is_tar(path.name) or (any(mark in source for mark in "*?[{") and not path.exists()):
        return "tars", path
    if path.is_file():
        return "file", path
    is_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) and not path.exists() and not path.parent.exists()
    return "hub" if is_hub else "missing", path


# ---- folders ----


def is_image(name: str) -> bool:
    """Whether a file is an image by its extension."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def stem(name: str) -> str:
    """A path without its extension."""
    head, dot, extension = name.rpartition(".")
    return head if dot and "/" not in extension else name


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of the data."""
    return name.startswith(".") or is_system_folder(name)


def walk(folder: Path, inner: str = "", passed: PassedOver | None = None) -> Iterator[str]:
    """Paths of the images below ``folder``, relative to it, folder by folder in order of names.

    Args:
        folder: where paths start.
        inner: the part of it to list, "" or ending in a slash.
        passed: counts the other files.

    Raises:
        OSError: a folder that can't be read.
    """
    for name, error in walk_files(folder, inner):
        if error is not None:
            raise error
        if is_image(name):
            yield name
        elif passed is not None:
            passed.add_files([name])


def walk_files(
    folder: Path,
    inner: str = "",
    skip: Path | None = None,
    above: tuple[tuple[int, int], ...] = (),
    passed: PassedOver | None = None,
) -> Iterator[tuple[str, OSError | None]]:
    """As :func:`walk`, for files of every kind; a folder that can't be read is named, with the reason.

    Hidden files, links back and what systems keep for themselves are left out.

    Args:
        folder, inner: see :func:`walk`.
        skip: a folder (resolved) that is left out.
        passed: counts what is left out.
        above: device and inode of the folders on the way there: a link back to one of them is not followed.
    """
    passed = PassedOver() if passed is None else passed
    try:
        here = os.stat(folder / inner)
        with os.scandir(folder / inner) as entries:
            listed = sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        yield inner.rstrip("/"), error
        return
    if (here.st_dev, here.st_ino) in above:
        passed.add(LOOPS, inner)
        return
    for name, is_folder in listed:
        if is_folder and is_system_folder(name):
            passed.add(SYSTEM, f"{inner}{name}/")
        elif name.startswith("."):
            passed.add(kind_of_file(name), inner + name)
        elif not is_folder:
            yield inner + name, None
        elif skip is None or (folder / inner / name).resolve() != skip:
            yield from walk_files(folder, f"{inner}{name}/", skip, (*above, (here.st_dev, here.st_ino)), passed)


def list_files(folder: Path, passed: PassedOver, skip: Path | None = None) -> list[str]:
    """Files of every kind below ``folder`` (see :func:`walk_files`), sorted; ``passed`` counts what is left out."""
    found = list(walk_files(folder, skip=skip, passed=passed))
    passed.add(CLOSED, *(name or str(folder) for name, error in found if error is not None))
    return sorted(name for name, error in found if error is None)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


# ---- columns ----

TURNS = ("conversations", "messages")  # a dialogue, whose first answer is the caption
DIALOGUES = "dialogues but for their first answer; --conversations true keeps them whole"
# a table may have several of them: the first one counts
COLUMNS = {
    "image": (
        *("image", "file", "filename", "file_name", "path", "filepath", "image_path", "image_name"),
        *("image_file", "img", "jpg", "jpeg", "png", "webp", "images", "image_id"),
    ),
    "label": ("label", "labels", "fine_label", "class", "target", "cls", "category"),
    "caption": (
        *("caption", "captions", "text", "alt", "alt_text", "title", "description", "comment", "sentence"),
        *("sentences", *TURNS, "prompt"),
    ),
}
FEATURES = {"image": "Image", "label": "ClassLabel"}  # types of the library `datasets`


def named_columns(names: Iterable[str], kind: str) -> list[str]:
    """The columns of a kind (image, label, caption) among ``names``, the first choice first; case does not matter."""
    known = {name.strip().lower(): name for name in names}
    return [known[word] for word in COLUMNS[kind] if word in known]


def find_column(names: Iterable[str], kind: str, types: Mapping[str, str] | None = None) -> str | None:
    """The column of a kind: by its type where the table states types, else by its name; None where there is none.

    Args:
        names: of all columns.
        kind: image, label or caption.
        types: {column: type}, types as in ``datasets.Features``.
    """
    typed = [name for name in names if types and types.get(name) == FEATURES.get(kind)]
    named = named_columns(names, kind)
    return next((name for name in named if name in typed or not typed), typed[0] if len(typed) == 1 else None)


@dataclass(frozen=True)
class Columns:
    """Columns that the user named; None: found by their types and names."""

    image: str | None = None
    captions: tuple[str, ...] | None = None

    def find(
        self, names: Iterable[str], source: str, types: Mapping[str, str] | None = None
    ) -> tuple[str, dict[str, str]]:
        """(image column, {caption column: field}) among ``names``.

        A single caption column is field ``caption``; several are fields of their own names.

        Raises:
            UsageError: a column is missing.
        """
        names = list(names)
        lower = [name.strip().lower() for name in names]
        known = dict(zip(lower, names))
        listed = ", ".join(known.values())
        image = known.get(self.image.lower()) if self.image else find_column(known.values(), "image", types)
        if image is None:
            wanted = f"{self.image!r}" if self.image else "of the known names (image, file_name, path, ...)"
            raise UsageError(
                f"{source}: no image column {wanted} among {listed}; give --image-column",
                option="--image-column",
                code="missing",
            )
        found = [name for name in named_columns(known.values(), "caption") if name != image]
        if len(found) > 1:
            plain = [name for name in found if name.strip().lower() not in (*TURNS, "prompt")]  # questions, too
            found = plain or [name for name in found if name.strip().lower() in TURNS][:1]
        captions = self.captions or [name.strip().lower() for name in found]
        if lost := next((name for name in captions if name.lower() not in known), None):
            raise UsageError(
                f"{source}: no column {lost!r} among {listed}; change --caption-column",
                option="--caption-column",
                code="missing",
            )
        if not captions:
            raise UsageError(
                f"{source}: captions missing: no caption column among {listed}; give --caption-column",
                option="--caption-column",
                code="missing",
            )
        used = [known[name.lower()] for name in (image.strip(), *captions)]
        if twice := next((name for name in used if lower.count(name.strip().lower()) > 1), None):
            raise UsageError(
                f"{source}: several columns {twice!r} among {', '.join(names)}; rename one", code="conflict"
            )
        return image, {known[name.lower()]: name if len(captions) > 1 else "caption" for name in captions}
