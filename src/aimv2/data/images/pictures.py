"""Images wherever they lie: a folder, a list of files, shards. Named in a fixed order, and read only when asked for.

What can't be read is named all the same, and says why when it is read: nothing among a million images ends the work on them.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from aimv2.data.images.decode import ImageError
from aimv2.data.shards.format import IMAGE_EXTENSIONS, find_shards, image_of, read_sample, scan_shard
from aimv2.errors import UsageError

LISTS = (".txt", ".lst")
Picture = tuple[
    str, Callable[[], bytes]
]  # its name, and what reads its encoded bytes (or raises OSError or ImageError)


def pictures(source: str, option: str = "IMAGES") -> Iterator[Picture]:
    """Names and readers of all images, in an order that does not change; nothing is held for images gone by.

    Args:
        source: a folder (read recursively, names are paths within it; without an image in it all its tars, of every
            split), a text file with a path a line (relative to its own folder), shards (glob, brace pattern or one tar;
            names are keys), or one image. A name that is not UTF-8 holds surrogates (os.fsencode gives its bytes).
        option: what an error tells the user to change.

    Raises:
        UsageError: nothing there, or no image among what is there; a list that is not UTF-8.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _of_folder(path)
    elif path.suffix == ".tar" or (any(mark in source for mark in "*?[{") and not path.exists()):
        found = _of_shards(find_shards(source, "train", option=option))
    elif path.suffix.lower() in LISTS and path.is_file():
        found = _of_list(path, option)
    elif path.is_file():
        found = iter([(path.name, partial(_read, path))])
    else:
        raise UsageError(f"{option} {source}: no such file or folder")
    first = next(found, None)
    if first is None:
        raise UsageError(f"{option} {source}: no image there ({', '.join(IMAGE_EXTENSIONS[:4])}, ...)")
    return _chain(first, found)


def _of_folder(folder: Path) -> Iterator[Picture]:
    """Photographs where there are any: a stray tar among them is none of them; else the folder's tars."""
    tars = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if tars and next(_below(folder), None) is None:
        yield from _of_shards(tars)
        return
    for name, error in _below(folder):
        if error is None:
            yield name, partial(_read, folder / name)
        else:
            yield name or str(folder), partial(_fail, f"folder can't be read: {error.strerror or error}")


def walk(folder: Path, inner: str = "") -> Iterator[str]:
    """Paths of the images below ``folder``, relative to it, folder by folder in the order of names.

    Raises:
        OSError: a folder that can't be read.
    """
    for name, error in _below(folder, inner):
        if error is not None:
            raise error
        yield name


def _below(
    folder: Path, inner: str = "", above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[str, OSError | None]]:
    """See :func:`walk`; a folder that can't be read is named, with the reason.

    Args:
        folder: where to look.
        inner: the part of it to list, "" or ending in a slash.
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
        if is_folder:
            yield from _below(folder, f"{inner}{name}/", (*above, (here.st_dev, here.st_ino)))
        elif name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
            yield inner + name, None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _read(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except (ValueError, RuntimeError) as error:  # a name with a zero byte, ~ of nobody
        raise ImageError(f"no such file ({error})") from None


def _fail(why: str) -> bytes:
    raise ImageError(why)


def _of_list(path: Path, option: str) -> Iterator[Picture]:
    with path.open(encoding="utf-8") as lines:
        try:
            for line in lines:
                if name := line.strip():
                    whole = Path(name) if name.startswith("~") else path.parent / name
                    yield name, partial(_read, whole)
        except UnicodeDecodeError as error:
            raise UsageError(f"{option} {path}: UTF-8 text with a path a line is expected ({error.reason})") from None


def _of_shards(shards: list[Path]) -> Iterator[Picture]:
    """The whole samples of each tar; where one is cut or broken, then the tar itself, which can't be read."""
    for shard in shards:
        try:
            scan = scan_shard(shard)
        except OSError as error:
            yield shard.name, partial(_fail, f"shard can't be read: {error.strerror or error}")
            continue
        for key, start, end in zip(scan.keys, scan.offsets, scan.offsets[1:]):
            yield key, partial(_read_from_shard, shard, start, end)
        if scan.cut:
            yield shard.name, partial(_fail, f"shard is {scan.cut}; only its whole samples are read")


def _read_from_shard(shard: Path, start: int, end: int) -> bytes:
    try:
        found = image_of(read_sample(shard, start, end))
    except (tarfile.TarError, EOFError) as error:
        raise ImageError(f"broken sample in {shard.name} ({error})") from None
    if found is None:
        raise ImageError(f"no image in the sample (of {shard.name})")
    return found[1]


def _chain(first: Picture, rest: Iterator[Picture]) -> Iterator[Picture]:
    yield first
    yield from rest
