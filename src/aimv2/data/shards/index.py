"""The index of shards that energon opens: a folder of links to the tars, the offsets of their samples, a little metadata.

energon imports any class that its YAML and JSON files name. So they are written anew at every start, into a folder of the
user's own: nothing of the kind is ever read from the data folder, or from what an earlier start left. Next to a tar only
``TAR.idx`` is read, as validated numbers. The index knows samples by position: equal keys in two shards are fine.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from aimv2.data.shards.format import scan_shard
from aimv2.data.shards.tars import is_packed, why_unreadable
from aimv2.errors import UsageError
from aimv2.io import open_file, parse_json, read_file
from aimv2.progress import tracked

log = logging.getLogger(__name__)

INDEX_FORMAT = 3
META = ".nv-meta"
INDEX_SUFFIX = ".idx"  # of TAR.idx, which energon writes next to a tar: the offsets of its samples
TARS = "tars.json"  # the links that have samples, and why a tar could not be read to its end
BLOCK = tarfile.BLOCKSIZE
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _Shard(NamedTuple):
    """One tar: uint64 offsets of its samples and the end of the last (none without one), and why reading stopped early, or ""."""

    offsets: np.ndarray
    cut: str


def build_index(shards: list[Path], index_dir: Path | None = None, progress: bool = False) -> Path:
    """Make, or find again, the folder that energon opens as a data set of these tars (split part ``train``).

    It is in ``index_dir``, without one in the user's cache folder. It is named by the tars' paths, sizes and times, so
    changed tars get a new one. Offsets that were found once are kept there; YAML and JSON are written at every call. Any
    number of processes may call this at once: all write the same.

    Returns:
        The folder: links to the tars, ``.tar.idx`` next to the links, ``.nv-meta``.

    Raises:
        UsageError: no sample in any tar, or no place to write.
    """
    if not shards:
        raise UsageError("empty data set: no shards were given")
    links, signature = _link_names(shards), hashlib.sha256(f"index {INDEX_FORMAT}".encode())
    for given, path in zip(shards, links.values()):
        try:
            found = path.stat()
        except OSError as error:
            raise UsageError(f"shard {given} {why_unreadable(given, error)}", code="unreadable") from error
        signature.update(json.dumps([str(path), found.st_size, found.st_mtime_ns]).encode())
    home, name = _index_home(index_dir), signature.hexdigest()[:16]
    folder = home / name
    try:
        home.mkdir(parents=True, exist_ok=True)
        aside = home / f".{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        aside.mkdir()
        try:
            if not _is_whole(folder, links):
                _write_offsets(aside / name, links, progress)
                _move_into_place(aside / name, folder, links)
            _write_meta(folder, links, aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"no index of the shards can be written to {home} ({error.strerror or error}); give a writable folder with "
            "data.index_dir"
        ) from error
    for tar, why in _read_tars(folder)[1].items():
        log.warning("%s: %s; only its whole samples are used", tar, why)
    return folder


def count_samples(index: Path) -> int:
    """Number of samples in an index that `build_index` made: one fewer than the offsets of each tar."""
    return sum(_count(path) for path in index.glob(f"*.tar{INDEX_SUFFIX}"))


def offsets_of(shards: Sequence[Path], index: Path) -> list[tuple[Path, Path]]:
    """(tar, file of its offsets) of those that have samples, in an index that `build_index` made of them."""
    links = _link_names(list(shards))
    return [(tar, file) for name, tar in links.items() if (file := index / (name + INDEX_SUFFIX)).is_file()]


def read_offsets(index: Path, tar: Path) -> np.ndarray | None:
    """The offsets in ``TAR.idx``, uint64; None unless they are what the index of this tar can be.

    8 bytes each, ascending, multiples of 512 within the tar. A link, or anything else that is no plain file, is none.
    """
    try:
        size = tar.stat().st_size
        descriptor = os.open(index, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size % 8 or not 16 <= found.st_size <= size:
                return None
            offsets = np.frombuffer(file.read(), "<u8")
    except OSError:
        return None
    rising = len(offsets) > 1 and bool((offsets[1:] > offsets[:-1]).all())
    return offsets if rising and offsets[-1] <= size and not (offsets % BLOCK).any() else None


def _link_names(shards: list[Path]) -> dict[str, Path]:
    """A unique link name for each tar, free of what energon would expand or cut -> the tar itself."""
    links = dict[str, Path]()
    for number, path in enumerate(shards):
        stem = re.sub(r"[^\w\-.]", "_", path.name.removesuffix(".tar"))
        name = f"{stem}.tar"
        if name in links:
            name = f"{stem}-{number:06d}.tar"
        links[name] = path.resolve()
    return links


def _index_home(index_dir: Path | None) -> Path:
    if index_dir is not None:
        return Path(index_dir).expanduser().absolute()
    from aimv2.places import cache_folder

    return cache_folder("index")


def _count(index: Path) -> int:
    return index.stat().st_size // 8 - 1


def _is_whole(folder: Path, links: dict[str, Path]) -> bool:
    """Whether an earlier call has left every offset, and nothing that it would not have written."""
    meta = folder / META
    if any(path.is_symlink() for path in (folder, meta, folder / TARS)) or (meta.exists() and not meta.is_dir()):
        return False
    indexed = _read_tars(folder)[0]
    known = {TARS, META, *indexed, *(name + INDEX_SUFFIX for name in indexed)}
    if not indexed or indexed - links.keys() or {path.name for path in folder.iterdir()} - known:
        return False
    return all(
        os.path.islink(folder / name)
        and os.readlink(folder / name) == str(links[name])
        and read_offsets(folder / (name + INDEX_SUFFIX), links[name]) is not None
        for name in indexed
    )


def _write_offsets(folder: Path, links: dict[str, Path], progress: bool) -> None:
    """Links and offsets. Tars without a whole sample are left out."""
    folder.mkdir()
    cut, indexed = dict[str, str](), list[str]()
    with ThreadPoolExecutor(4) as pool:  # waiting on a disk, most of the time
        read = tracked(pool.map(_read_shard, links.values()), "indexing shards", len(links), progress)
        for (name, path), shard in zip(links.items(), read):
            if shard.cut:
                cut[str(path)] = shard.cut
            if not len(shard.offsets):
                continue
            indexed.append(name)
            os.symlink(path, folder / name)
            (folder / (name + INDEX_SUFFIX)).write_bytes(shard.offsets.astype("<u8").tobytes())
    if not indexed:
        tars = [str(path) for path in links.values()]
        why = f" ({cut[tars[0]]})" if tars[0] in cut else ""
        raise UsageError(
            f"empty data set: no sample in {tars[0]}{why}" + f" and {len(tars) - 1} more" * (len(tars) > 1)
        )
    (folder / TARS).write_text(json.dumps({"indexed": indexed, "cut": cut}))


def _read_shard(tar: Path) -> _Shard:
    """The offsets in ``TAR.idx`` where they match the tar; else those of its headers, which takes many more reads."""
    index = tar.with_name(tar.name + INDEX_SUFFIX)
    try:
        if is_packed(tar):
            raise UsageError(
                f"shard {tar} is compressed, and training reads at any place; unpack it (gunzip, unxz, bunzip2), or make shards of "
                "it with `aimv2 data import`",
                code="unsupported",
            )
        if index.is_file() and index.stat().st_mtime_ns >= tar.stat().st_mtime_ns:
            offsets = read_offsets(index, tar)
            if offsets is not None and offsets[0] == 0 and _fits(offsets, tar):
                return _Shard(offsets, "")
        links: list[str] = []
        scan = scan_shard(tar, False, lambda member: links.append(member.name) if not member.isfile() else None)
    except OSError as error:
        raise UsageError(f"shard {tar} {why_unreadable(tar, error)}", code="unreadable") from error
    if links:
        raise UsageError(
            f"shard {tar}: {len(links):,} members are links ({links[0]}), which training does not follow; make shards of it with "
            "`aimv2 data import`",
            code="unsupported",
        )
    return _Shard(np.array(scan.offsets, np.uint64), scan.cut)


def _fits(offsets: np.ndarray, tar: Path) -> bool:
    """Whether at each offset there is the header of a sample of its own, and nothing after the last.

    An offset that is left out is not noticed here; energon then ends the run (see :data:`aimv2.data.stream.samples.BAD_INDEX`).
    A name that comes twice may be that of two halves, as in an unsorted tar, which only a scan tells.
    """
    known, end = set[int](), int(offsets[-1])
    with open_file(tar) as file:
        for at in offsets[:-1].tolist():
            member, is_extended = tarfile.TarInfo(), True
            while is_extended:  # such a header comes before the sample's own
                file.seek(at)
                try:
                    member = tarfile.TarInfo.frombuf(file.read(BLOCK), tarfile.ENCODING, "surrogateescape")
                except tarfile.HeaderError:
                    return False
                is_extended = member.type in _EXTENDED
                at += BLOCK + (member.size + BLOCK - 1) // BLOCK * BLOCK
            folder, _, last = member.name.rpartition("/")
            known.add(hash((folder, last.partition(".")[0])))
        file.seek(end - BLOCK)
        is_end = bool(file.read(BLOCK).strip(b"\0")) and not file.read(BLOCK).strip(b"\0")
    return is_end and len(known) == len(offsets) - 1


def _move_into_place(aside: Path, folder: Path, links: dict[str, Path]) -> None:
    """Renames a new index to its name; what is there and not whole goes, unless another process has just put it there."""
    for _ in range(10):
        with contextlib.suppress(OSError):  # something is there
            os.rename(aside, folder)
            return
        if _is_whole(folder, links):
            return
        rest = aside.with_name(f"rest-{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            os.rename(folder, rest)
    os.rename(aside, folder)


def _write_meta(folder: Path, links: dict[str, Path], aside: Path) -> None:
    """What energon reads besides the offsets, each file replaced atomically; other files there are removed."""
    counts = {name: _count(folder / (name + INDEX_SUFFIX)) for name in links if (folder / name).is_symlink()}
    files = {
        "dataset.yaml": yaml.safe_dump({"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}),
        "split.yaml": yaml.safe_dump({"split_parts": {"train": list(counts)}, "exclude": []}, allow_unicode=True),
        ".info.json": json.dumps({"shard_counts": counts}),
    }
    meta = folder / META
    meta.mkdir(exist_ok=True)
    for path in meta.iterdir():
        if path.name not in files or path.is_dir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for name, text in files.items():
        (aside / name).write_text(text, encoding="utf-8")
        os.replace(aside / name, meta / name)


def _read_tars(folder: Path) -> tuple[set[str], dict[str, str]]:
    """(names of the links that have samples, {tar: why it could not be read to its end}); nothing where the note is not ours."""
    try:
        stored = parse_json(read_file(folder / TARS))
        return set(map(str, stored["indexed"])), {str(tar): str(why) for tar, why in stored["cut"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set(), {}
