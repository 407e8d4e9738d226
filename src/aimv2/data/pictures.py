"""Images wherever they lie: a folder, a list of files, shards. Named in a fixed order, and read only when asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from aimv2.data.shards import IMAGE_EXTENSIONS, find_shards, image_of, read_sample, scan_shard
from aimv2.errors import UsageError

LISTS = (".txt", ".lst")
Picture = tuple[str, Callable[[], bytes]]  # its name, and what reads its encoded bytes


def pictures(source: str, option: str = "IMAGES") -> Iterator[Picture]:
    """Names and readers of all images, in an order that does not change; nothing is held for images gone by.

    Args:
        source: a folder (read recursively, names are paths within it), a text file with a path a line (relative to its own
            folder), shards (folder, glob, brace pattern or one tar; names are keys), or one image.
        option: what an error tells the user to change.

    Raises:
        UsageError: nothing there, or no image among what is there.
    """
    path = Path(source).expanduser()
    shards = path.suffix == ".tar" or (any(mark in source for mark in "*?[{") and not path.exists())
    if shards or (path.is_dir() and any(path.glob("*.tar"))):
        found = _of_shards(find_shards(source, "train", option=option))
    elif path.is_dir():
        found = ((name, partial(_read, path / name)) for name in walk(path))
    elif path.suffix.lower() in LISTS and path.is_file():
        found = _of_list(path)
    elif path.is_file():
        found = iter([(path.name, partial(_read, path))])
    else:
        raise UsageError(f"{option} {source}: no such file or folder")
    first = next(found, None)
    if first is None:
        raise UsageError(f"{option} {source}: no image there ({', '.join(IMAGE_EXTENSIONS[:4])}, ...)")
    return _chain(first, found)


def walk(folder: Path, inner: str = "") -> Iterator[str]:
    """Paths of the images below ``folder``, relative to it, folder by folder in the order of names."""
    with os.scandir(folder / inner) as entries:
        listed = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_folder in listed:
        if name.startswith("."):
            continue
        if is_folder:
            yield from walk(folder, f"{inner}{name}/")
        elif name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
            yield inner + name


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _of_list(path: Path) -> Iterator[Picture]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if name := line.strip():
                yield name, partial(_read, path.parent / Path(name).expanduser())


def _of_shards(shards: list[Path]) -> Iterator[Picture]:
    for shard in shards:
        scan = scan_shard(shard)
        for key, start, end in zip(scan.keys, scan.offsets, scan.offsets[1:]):
            yield key, partial(_read_from_shard, shard, start, end)


def _read_from_shard(shard: Path, start: int, end: int) -> bytes:
    found = image_of(read_sample(shard, start, end))
    return found[1] if found else b""


def _chain(first: Picture, rest: Iterator[Picture]) -> Iterator[Picture]:
    yield first
    yield from rest
