"""Image files below a folder, by one rule for every command: in order of names, links followed, nothing hidden."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from aimv2.data.shards.format import IMAGE_EXTENSIONS


def is_image(name: str) -> bool:
    """Whether a file is an image by its extension."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def stem(name: str) -> str:
    """A path without its extension."""
    return name.rpartition(".")[0]


def walk(folder: Path, inner: str = "") -> Iterator[str]:
    """Paths of the images below ``folder``, relative to it, folder by folder in order of names.

    Args:
        folder: where paths start.
        inner: the part of it to list, "" or ending in a slash.

    Raises:
        OSError: a folder that can't be read.
    """
    for name, error in walk_files(folder, inner):
        if error is not None:
            raise error
        if is_image(name):
            yield name


def walk_files(
    folder: Path, inner: str = "", skip: Path | None = None, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[str, OSError | None]]:
    """As :func:`walk`, for files of every kind; a folder that can't be read is named, with the reason.

    Args:
        folder, inner: see :func:`walk`.
        skip: a folder (resolved) that is left out.
        above: device and inode of the folders on the way there: a link back to one of them is not followed.
    """
    try:
        here = os.stat(folder / inner)
        with os.scandir(folder / inner) as entries:
            listed = sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        yield inner.rstrip("/"), error
        return
    if (here.st_dev, here.st_ino) in above:
        return
    for name, is_folder in listed:
        if name.startswith("."):
            continue
        if not is_folder:
            yield inner + name, None
        elif not name.startswith("__MACOSX") and (skip is None or (folder / inner / name).resolve() != skip):
            yield from walk_files(folder, f"{inner}{name}/", skip, (*above, (here.st_dev, here.st_ino)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
