"""Names that someone wrote down, joined with the files that are there: one rule for captions, labels, tables, sidecars and maps.

A name is compared as it is, then in one normal form (NFC), then without case, then without extension; a tie is not decided:
several files that a name may mean, or several names that mean a file.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from aimv2.data.images.catalogue import is_image, stem
from aimv2.data.images.decode import ImageError
from aimv2.data.passed import KINDS
from aimv2.errors import UsageError


def normal(name: str) -> str:
    """A name in the normal form in which names are compared."""
    return unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """A name in its normal form, without case."""
    return normal(normal(name).casefold())


FORMS = (normal, folded)
Meant = TypeVar("Meant", bound=Hashable)


class NameFinder:
    """Finds which of the given names (POSIX paths) are meant by a name.

    Args:
        names: that are there.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = dict.fromkeys(names)
        self._keyed: dict[tuple[int, bool, bool], dict[str, str | list[str]]] = {}

    def find(self, name: str, stems: bool = True, anywhere: bool = False) -> list[str]:
        """One name if it is found, none if it is not, several if it may mean any of them.

        Args:
            name: backslashes and a leading ``./`` are allowed.
            stems: compare without extension, too.
            anywhere: compare without folders, too, where one of the paths has none or is the end of the other.
        """
        name = name.replace("\\", "/").removeprefix("./")
        if name in self.names:
            return [name]
        for last in (False, True)[: 1 + anywhere]:
            wanted = name.rpartition("/")[2] if last else name
            bare = [wanted, stem(wanted)] if is_image(wanted) else [wanted]
            for cut, wished in ((False, [wanted]), *([(True, bare)] if stems else [])):
                for level, form in enumerate(FORMS):
                    known = self._by(level, cut, last)
                    for key in map(form, wished):
                        found = known.get(key, [])
                        found = [found] if isinstance(found, str) else found
                        if found := [one for one in found if not last or _one_ends_the_other(one, name)]:
                            return found
        return []

    def _by(self, level: int, cut: bool, last: bool) -> dict[str, str | list[str]]:
        """The names by their compared form; made when it is first needed."""
        place = level, cut, last
        if place not in self._keyed:
            self._keyed[place] = found = dict[str, str | list[str]]()
            for name in self.names:
                part = name.rpartition("/")[2] if last else name
                key = FORMS[level](stem(part) if cut else part)
                others = found.setdefault(key, name)
                if isinstance(others, list):
                    others.append(name)
                elif others is not name:
                    found[key] = [others, name]  # a list only for a tie
        return self._keyed[place]


def _one_ends_the_other(one: str, other: str) -> bool:
    """Whether the folders of one path are the last ones of the other's."""
    here, there = ("/" + folded(name.rpartition("/")[0]).strip("/") for name in (one, other))
    return "/" in (here, there) or here.endswith(there) or there.endswith(here)


def tie(found: Iterable[str]) -> str:
    """Why a name that may mean several is not decided."""
    return f"several files of that name: {', '.join(sorted(found)[:3])}"


def shared(meant: Iterable[Meant]) -> set[Meant]:
    """The files that several names mean."""
    return {file for file, count in Counter(meant).items() if count > 1}


def taken(file: str) -> str:
    """Why a name that is not that of the file is not decided where another name means the file, too."""
    return f"no file of exactly that name, and another name means {file}, too"


def locate(root: Path, name: str) -> Path:
    """The file that a list in ``root`` means by a path: the path itself, else what is there under such a name.

    Raises:
        ImageError: several files may be meant.
    """
    path = here = root / name
    if os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        return path
    parts = Path(name).parts
    here = root
    for number, part in enumerate(parts, 1):
        if part != ".." and not os.path.exists(here / part):
            found = _listed(str(here)).find(part, stems=number == len(parts))
            if len(found) != 1:
                if found:
                    raise ImageError(tie(found))
                return path
            part = found[0]
        here /= part
    return here


def found_or_written(root: Path, name: str) -> Path:
    """As :func:`locate`; the path as it is written where several files may be meant."""
    try:
        return locate(root, name)
    except ImageError:
        return root / name


def _listed(folder: str) -> NameFinder:
    try:
        return _listing(folder, os.stat(folder).st_mtime_ns)
    except (OSError, ValueError):
        return NameFinder(())


@lru_cache(maxsize=1024)
def _listing(folder: str, _changed: int) -> NameFinder:
    return NameFinder(sorted(os.listdir(folder)))


def inside(root: Path, name: str, image_root: Path | None = None, file: str = "") -> str:
    """The name, once it is sure that it leads to a file below ``root``, or below the folder that the user allows.

    A link counts where it lies: one inside the folder may lead out of it.

    Args:
        root: folder where the paths of a list or a table start.
        name: path as it is written there.
        image_root: of ``--image-root``; None: ``root`` only.
        file: of the list, for messages.

    Returns:
        the path from ``root``, or an absolute one, without ``..``.

    Raises:
        UsageError: an absolute or ``..`` path that leads elsewhere; a URL.
    """
    name = name.replace("\\", "/") if "\\" in name and not os.path.exists(root / name) else name
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        raise UsageError(
            f"{name} is a URL; a path is expected: download the images first (img2dataset makes shards of such a list)",
            option="",
        )
    if not (name.startswith(("/", "~")) or ".." in name.split("/")):
        return name
    path = os.path.normpath(root.absolute() / os.path.expanduser(name))
    for folder in (root, *((image_root,) if image_root else ())):
        for top in {os.path.normpath(folder.expanduser().absolute()), str(folder.expanduser().resolve())}:
            if path.startswith(top.rstrip("/") + "/"):
                return path
    where = f"{name} in {file}" if file else name
    raise UsageError(
        f"--image-root: {where} leads out of {root if image_root is None else image_root}; give --image-root DIR, the folder"
        " of the images, if they may be read from there",
        option="--image-root",
        code="missing" if image_root is None else "mismatch",
    )


def locate_inside(root: Path, name: str, image_root: Path | None = None) -> Path:
    """The file that a list or a table in ``root`` means: see :func:`inside` and :func:`locate`; else the one below ``image_root``.

    Raises:
        UsageError: a path that leads elsewhere; a URL.
        ImageError: several files may be meant.
    """
    path = locate(root, inside(root, name, image_root))
    return path if image_root is None or os.path.exists(path) else locate(image_root, name)


def image_root_of(given: str | None) -> Path | None:
    """The folder of ``--image-root``.

    Raises:
        UsageError: it is no folder.
    """
    if given is None:
        return None
    if not (folder := Path(given).expanduser()).is_dir():
        raise UsageError(f"--image-root {given}: no such folder", code="not-found")
    return folder


class ImageFinder:
    """Finds the files that a captions file means by its names."""

    def __init__(self, root: Path, file: Path, images: list[str], image_root: Path | None) -> None:
        self.root, self.file, self.image_root, self.names = root, file, image_root, NameFinder(images)

    def find_all(self, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        """{name: (path, "") or ("", reason)}; a file under another name than its own only where no other name means it.

        Raises:
            UsageError: a path that leads out of the folder and of ``image_root``; a URL.
        """
        found = {name: self._find(name) for name in names}
        several = shared(path for path, _, _ in found.values() if path)
        return {
            name: (path, reason) if exact or path not in several else ("", taken(os.path.relpath(path, self.root)))
            for name, (path, reason, exact) in found.items()
        }

    def _find(self, name: str) -> tuple[str, str, bool]:
        """Path, or reason; whether it is the path as it is written."""
        name = name.replace("\\", "/").removeprefix("./")
        found = self.names.find(name) or self.names.find(f"images/{name}")
        if not found and ("/" in name or is_image(name)):
            for home in (self.root, self.file.parent, *([self.image_root] if self.image_root else [])):
                path = home / inside(home, name, self.image_root, self.file.name)
                if os.path.isfile(path):
                    return str(path), "", True
        found = found or self.names.find(name, anywhere=True)
        if len(found) > 1:
            return "", f"several images of that name: {', '.join(found[:3])}", False
        unread = KINDS.get(name.rpartition(".")[2].lower())
        if not found:
            return "", unread or "no such image", True
        return str(self.root / found[0]), "", found == [name]
