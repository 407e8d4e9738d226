"""Tars, compressed or not: found by name, read at any place. A link stands for the file of the tar that it leads to.

Nothing outside the tar is read for a member, and nothing is written by its name.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from aimv2.errors import UsageError
from aimv2.io import POINTER, is_pointer, open_file

# by their first bytes: a compressed tar may be called .tar
_PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
HEAD = 256  # bytes that tell a compressed tar, and a pointer in the place of one
_NAME = re.compile(r"\.(?:tar(?:\.(?:gz|bz2|xz))?|tgz)$", re.IGNORECASE)


def is_tar(name: str) -> bool:
    """Whether a file is a tar by its name, compressed or not."""
    return _NAME.search(name) is not None


def tars_in(folder: Path) -> list[Path]:
    """The tars of a folder itself, sorted; a dead link is one too, which cannot be read. Hidden ones (``._x.tar``) are none."""
    found = (path for path in folder.iterdir() if is_tar(path.name) and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file() or (path.is_symlink() and not path.exists()))


def why_unreadable(tar: Path, error: OSError) -> str:
    """Why a tar can't be opened; a dead link is called that."""
    dead = tar.is_symlink() and not tar.exists()
    return f"cannot be read: {f'a dead link to {os.readlink(tar)}' if dead else error.strerror or error}"


def without_dead_links(tars: list[Path], option: str) -> list[Path]:
    """The same tars, where none of them is a dead link.

    Raises:
        UsageError: one is; ``option`` gave it.
    """
    if dead := next((tar for tar in tars if not tar.exists()), None):
        raise UsageError(f"{option}: {dead} {why_unreadable(dead, FileNotFoundError())}", code="unreadable")
    return tars


def is_packed(tar: Path) -> bool:
    """Whether a tar is compressed; its name may not tell.

    Raises:
        OSError: it cannot be read.
    """
    return _unpacker(tar) is not None


def _unpacker(tar: Path) -> Callable[..., Any] | None:
    with open_file(tar) as file:
        return _unpacker_of(file.read(HEAD))


def _unpacker_of(head: bytes) -> Callable[..., Any] | None:
    return next((unpack for start, unpack in _PACKED.items() if head.startswith(start)), None)


def open_tar(tar: Path) -> IO[bytes]:
    """The plain tar, to be read from any place; a compressed one is unpacked into a temporary file, which lives for a while.

    Raises:
        OSError: it cannot be read.
    """
    file = open_file(tar)
    head = file.read(HEAD)
    if _unpacker_of(head) is None and not is_pointer(head):
        file.seek(0)
        return file
    file.close()
    if is_pointer(head):
        raise OSError(POINTER)
    state = tar.stat()
    copy = _unpacked(tar, state.st_size, state.st_mtime_ns)  # it goes with its last holder
    return open(copy.name, "rb")


@lru_cache(maxsize=2)  # tars are read one after the other; each copy takes its size on the disk
def _unpacked(tar: Path, _size: int, _changed: int) -> Any:
    copy = tempfile.NamedTemporaryFile(prefix="aimv2-", suffix=".tar")  # noqa: SIM115 - the cache closes it
    try:
        with (_unpacker(tar) or open)(tar, "rb") as packed:
            shutil.copyfileobj(packed, copy, 1 << 20)
    except (EOFError, zlib.error, lzma.LZMAError):  # cut: what is there is read, and reported like any tar that is cut
        copy.write(b"\xff")
    copy.flush()
    return copy


def body(tar: Path, member: tarfile.TarInfo) -> tuple[int, int] | None:
    """Where the content of a member is: offset and size; of a link: that of the file in the tar that it leads to, or None."""
    if member.isfile():
        return member.offset_data, member.size
    if not (member.islnk() or member.issym()):
        return None
    state = tar.stat()
    known, name = _contents(tar, state.st_size, state.st_mtime_ns), _target(member)
    for _ in range(8):  # links to links
        found = known.get(name)
        if not isinstance(found, str):
            return found
        name = found
    return None


def _target(member: tarfile.TarInfo) -> str:
    folder = posixpath.dirname(member.name) if member.issym() else ""  # a hard link is named from the top of the tar
    return posixpath.normpath(posixpath.join(folder, member.linkname))


@lru_cache(maxsize=4)
def _contents(tar: Path, _size: int, _changed: int) -> dict[str, tuple[int, int] | str]:
    """{name: (offset, size), or the name that a link leads to} of a tar; only of those that hold links."""
    known: dict[str, tuple[int, int] | str] = {}
    with open_tar(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            is_link = member.islnk() or member.issym()
            place = _target(member) if is_link else (member.offset_data, member.size) if member.isfile() else None
            if place is not None:
                known.setdefault(posixpath.normpath(member.name), place)
    return known


def read_body(file: IO[bytes], tar: Path, member: tarfile.TarInfo) -> bytes:
    place = body(tar, member)
    assert place is not None
    file.seek(place[0])
    return file.read(place[1])
