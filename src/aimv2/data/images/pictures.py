"""Images of a folder, a list of files or shards: named in a fixed order, and read only when needed.

What can't be read is named all the same, and raises the reason when it is read: one image among a million ends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cache, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from aimv2.data.images.catalogue import is_image, kind_of, list_files, walk_files
from aimv2.data.images.decode import ImageError
from aimv2.data.images.entries import SourceEntry, read_tar_sample, tar_entries
from aimv2.data.images.names import inside, locate_inside, shared, taken
from aimv2.data.images.readers import contents_of_files
from aimv2.data.images.text_tables import no_text
from aimv2.data.passed import PassedOver, passed_lines
from aimv2.data.shards.format import IMAGE_EXTENSIONS, find_shards
from aimv2.data.shards.tars import tars_in, why_unreadable
from aimv2.data.text.encoding import text_lines
from aimv2.errors import UsageError
from aimv2.io import read_file

LISTS = (".txt", ".lst")
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
# a name, and what reads the encoded bytes (or raises OSError or ImageError)
Picture = tuple[str, Callable[[], bytes]]


def pictures(
    source: str, option: str = "IMAGES", image_root: Path | None = None, passed: PassedOver | None = None
) -> Iterator[Picture]:
    """Names and readers of all images, in an order that does not change; nothing is held for images gone by.

    Args:
        source: a folder (read recursively, names are paths within it; without an image in it all its tars, of every
            split), a text file with a path a line (relative to its own folder), shards (glob, brace pattern or one tar;
            names are keys), or one image. A name that is not UTF-8 holds surrogates (os.fsencode gives its bytes).
        option: the option that an error names.
        image_root: a folder outside the list's own that it may name files in.
        passed: counts what is passed over; complete when all images have been named.

    Raises:
        UsageError: nothing there, or no image among what is there; a list that is not UTF-8, or names files elsewhere.
    """
    passed = PassedOver() if passed is None else passed
    _file_state.cache_clear()  # of an earlier listing
    kind, path = kind_of(source)
    if image_root is not None and not (kind == "file" and path.suffix.lower() in LISTS):
        raise UsageError(
            f"--image-root {image_root}: {source} is no list of paths ({', '.join(LISTS)}); leave it out",
            option="--image-root",
            code="conflict",
        )
    if kind == "folder":
        found = _of_folder(path, passed)
    elif kind == "tars":
        found = _of_shards(find_shards(source, "train"), passed)
    elif kind == "file" and path.suffix.lower() in TABLES:
        raise UsageError(
            f"{option} {source}: a table; a folder of images, shards, one image or a list of paths ({', '.join(LISTS)}, one "
            "per line) is expected",
            code="unsupported",
        )
    elif kind == "file":
        found = (
            _of_list(path, option, image_root)
            if path.suffix.lower() in LISTS
            else iter([(path.name, partial(_read, path))])
        )
    else:
        raise UsageError(f"{option} {source}: no such file or folder", code="not-found")
    first = next(found, None)
    if first is None:
        words = "; ".join(("", *passed_lines(passed.result())))
        raise UsageError(
            f"{option} {source}: no image there ({', '.join(IMAGE_EXTENSIONS[:4])}, ...){words}", code="missing"
        )
    return chain([first], found)


def content_identity(read: Any) -> str:
    """State of the file that a reader of :func:`pictures` will read, and its place in it: changes where the image is replaced."""
    (given,) = read.args
    if read.func is _fail:
        return str(given)
    path, *place = given.where if read.func is _load else (given,)
    try:
        return f"{_file_state(Path(path).expanduser())} {place}"
    except (ValueError, RuntimeError):  # a name with a zero byte, ~ of nobody
        return "none"


@lru_cache(maxsize=64)  # one tar holds many images
def _file_state(path: Path) -> str:
    return contents_of_files([path])


def _of_folder(folder: Path, passed: PassedOver) -> Iterator[Picture]:
    """Image files where there are any: a tar among them is ignored; else the folder's tars."""
    tars = tars_in(folder)
    if tars and next(_image_files(folder, PassedOver()), None) is None:
        yield from _of_shards(tars, passed)
        own = {tar.name for tar in tars}
        passed.add_files(name for name in list_files(folder, passed) if name not in own)
    else:
        yield from _image_files(folder, passed)


def _image_files(folder: Path, passed: PassedOver) -> Iterator[Picture]:
    for name, error in walk_files(folder, passed=passed):
        if error is not None:
            yield name or str(folder), partial(_fail, f"folder can't be read: {error.strerror or error}")
        elif is_image(name):
            yield name, partial(_read, folder / name)
        else:
            passed.add_files([name])


def _read(path: Path) -> bytes:
    try:
        return read_file(path.expanduser())
    except (ValueError, RuntimeError) as error:  # a name with a zero byte, ~ of nobody
        raise ImageError(f"no such file ({error})") from None


def _fail(why: str) -> bytes:
    raise ImageError(why)


def _of_list(path: Path, option: str, image_root: Path | None) -> Iterator[Picture]:

    @cache
    def several() -> set[Path | None]:
        reads = (_read_named(path.parent, name, image_root) for name in dict.fromkeys(text_lines(path)))
        return shared(read.args[0] if read.func is _read else None for read in reads)

    try:
        for name in text_lines(path):
            yield name, _read_named(path.parent, name, image_root, several)
    except UnicodeError:
        raise no_text(path, option) from None


def _read_named(
    folder: Path, name: str, image_root: Path | None, several: Callable[[], Collection[Path | None]] = tuple
) -> partial[bytes]:
    """``several``: files that several names of the list mean; used where the file is not found under its own name."""
    try:
        path = locate_inside(folder, name, image_root)
        homes = (folder, image_root or folder)
        if path not in [home / inside(folder, name, image_root) for home in homes] and path in several():
            raise ImageError(taken(path.name))
        return partial(_read, path)
    except (ImageError, OSError) as error:
        return partial(_fail, str(error))


def _of_shards(shards: list[Path], passed: PassedOver) -> Iterator[Picture]:
    """The whole samples of each tar; where one is cut or broken, then the tar itself, which can't be read."""
    for shard in shards:
        try:
            scan, entries = tar_entries(shard)
        except OSError as error:
            yield shard.name, partial(_fail, f"shard {why_unreadable(shard, error)}")
            continue
        passed.update(scan.passed)
        for entry in entries:
            yield entry.image, partial(_load, entry)
        if scan.cut:
            yield shard.name, partial(_fail, f"shard is {scan.cut}; only its whole samples are read")


def _load(entry: SourceEntry) -> bytes:
    return read_tar_sample(*entry.where)[0]
