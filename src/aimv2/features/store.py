"""The feature store: a folder of frozen features that is read only with the fingerprint that it was made from.

The folder holds a description (the fingerprint as JSON), the data in parts, and for each whole part a note, written last. Files
are written as ``.NAME.aside`` and renamed, so that each is whole or absent. An interrupted pass computes the parts without a note;
what the note of a part says (rows, rejected images) is remembered. Of several ranks each writes every ranks-th part.

Legend: N images, I patches, D width.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aimv2.errors import RankError, UsageError, first_line
from aimv2.io import parse_json, read_file, regular, write_aside

ASIDE = re.compile(r"\..+?(?:\.(\d+))?\.aside")  # of the process that writes it
LONGEST_WAIT = 2 * 3600.0  # seconds for another rank, as for a process group
WORDS = {
    "weights_sha256": "model",
    "images": "number of images",
    "keys_sha256": "list of images",
    "contents_sha256": "state of the image files (replaced or changed since)",
}


class FeatureStore:
    """A folder of features, opened to be continued or read.

    Attributes:
        folder: of the store.
        about: its description: the fingerprint and what the first call noted with it.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        option: str,
        *,
        noted: Mapping[str, Any] | None = None,
        about: str = "about.json",
        note: str = "part-{:05d}.json",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Makes the folder, or checks that it holds features of the same fingerprint.

        Args:
            folder: new, empty, or a store.
            fingerprint: see :func:`aimv2.features.fingerprint.fingerprint`.
            option: that named the folder, for messages.
            noted: stored with the fingerprint by the first call, never compared.
            about: file name of the description.
            note: pattern of the notes' file names, by number of the part.
            rank, ranks: this process among those that share the folder; rank 0 makes it.

        Raises:
            UsageError: a store of another fingerprint or of an earlier version, something else in the folder, not writable.
        """
        self.folder, self.option, self.file, self.name = folder, option, folder / about, note
        self.rank, self.ranks = rank, ranks
        try:
            if rank:
                self._wait([self.file])
            if self.file.is_file():
                self.about = read_object(self.file, option)
                check_fingerprint(self.about, fingerprint, f"{option} {folder}")
                for name, value in (noted or {}).items():
                    if type(kept := self.about.get(name)) is not type(value) or (isinstance(kept, int) and kept < 1):
                        raise unreadable(self.file, option, f"{name} {kept!r}")
                self._clean()
                return
            if folder.exists() and (not folder.is_dir() or any(not ASIDE.fullmatch(p.name) for p in folder.iterdir())):
                raise UsageError(f"{option} {folder}: holds something else; give a new folder", code="exists")
            folder.mkdir(parents=True, exist_ok=True)
            self._clean()
            self.about = {**(noted or {}), **fingerprint}
            write_aside(self.file, json.dumps(self.about, indent=1) + "\n")
        except OSError as error:
            raise UsageError(
                f"{option} {folder}: can't be written: {error.strerror or error}; give another folder",
                code="unreadable",
            ) from None

    def _clean(self) -> None:
        """Removes what a process that was killed left half-written; of numbered files each rank its own. What a running process
        of this machine writes (another command with the same cache) is left alone."""
        for path in list(self.folder.iterdir()):
            found = ASIDE.fullmatch(path.name)
            part = re.search(r"-(\d{5,})\.", path.name)
            mine = (int(part[1]) % self.ranks if part else 0) == self.rank
            if found and mine and not (found[1] and is_running(int(found[1]))):
                path.unlink(missing_ok=True)

    def _wait(self, files: Iterable[Path]) -> None:
        """Until other ranks have written ``files``; under torchrun a rank that fails ends all of us.

        Raises:
            RankError: they are not written within two hours.
        """
        ends = time.monotonic() + LONGEST_WAIT
        for file in files:
            while not file.is_file():
                assert self.ranks > 1, file
                if time.monotonic() > ends:
                    raise RankError(
                        f"{self.option} {self.folder}: rank {self.rank} waited two hours for {file.name}, which another rank writes",
                        code="missing",
                    )
                time.sleep(0.05)

    # ---- parts ----

    def note_file(self, part: int) -> Path:
        return self.folder / self.name.format(part)

    def note(self, part: int) -> dict[str, Any] | None:
        """What the note of a part says; None where the part is not whole."""
        file = self.note_file(part)
        return read_object(file, self.option) if file.is_file() else None

    def commit(self, part: int, note: Mapping[str, Any]) -> None:
        """Marks a part as whole, after its data is written."""
        write_aside(self.note_file(part), json.dumps(note) + "\n")

    def missing(self, parts: int) -> list[int]:
        """This rank's parts that are not whole."""
        return [part for part in range(self.rank, parts, self.ranks) if not self.note_file(part).is_file()]

    def gather(self, parts: int) -> list[dict[str, Any]]:
        """The notes of all parts, once every rank has written its own."""
        files = [self.note_file(part) for part in range(parts)]
        self._wait(files)
        return [read_object(file, self.option) for file in files]

    def discard(self, parts: int) -> None:
        """Removes description and notes, and the folder where nothing else is in it."""
        for file in [self.file, *map(self.note_file, range(parts))]:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    # ---- data ----

    @contextlib.contextmanager
    def aside(self, name: str) -> Iterator[Path]:
        """A path to write, renamed to ``name`` afterwards."""
        path = self.folder / f".{name}.{os.getpid()}.aside"
        yield path
        os.replace(path, self.folder / name)

    def array(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """``NAME.npy``, memory-mapped to be written; rank 0 makes it where it is absent.

        Raises:
            UsageError: no room for it.
        """
        file = self.folder / f"{name}.npy"
        if self.rank == 0 and not file.is_file():
            need, free = np.dtype(dtype).itemsize * int(np.prod(shape)), shutil.disk_usage(self.folder).free
            if need > free:
                raise UsageError(
                    f"{self.option} {self.folder}: features of {shape[0]} images take {need / 1e9:.1f} GB, and "
                    f"{free / 1e9:.1f} GB are free there; give a folder with more room",
                    code="limit",
                )
            path = self.folder / f".{file.name}.{os.getpid()}.aside"
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            try:
                os.link(path, file)  # never over an array that another command has begun
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                os.replace(path, file)
            path.unlink(missing_ok=True)
        self._wait([file])
        return open_array(file, self.option, shape, "r+")

    def read_array(self, name: str, count: int) -> np.ndarray:
        """``NAME.npy`` of so many images, memory-mapped to be read.

        Raises:
            UsageError: it can't be read, or holds something else.
        """
        return open_array(self.folder / f"{name}.npy", self.option, (count,))


def is_running(process: int) -> bool:
    """Whether a process of this machine other than this one runs."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def unreadable(file: Path, option: str, why: str | BaseException) -> UsageError:
    """A file of a store that is damaged."""
    words = why if isinstance(why, str) else first_line(why)
    return UsageError(
        f"{option} {file.parent}: {file.name} can't be read ({words}); give a new folder", code="unreadable"
    )


def open_array(file: Path, option: str, shape: tuple[int, ...], mode: Literal["r", "r+"] = "r") -> np.memmap:
    """A .npy of numbers, memory-mapped.

    Args:
        file: of a store.
        option: that named the folder.
        shape: its first axes.
        mode: to read, or to write too.

    Raises:
        UsageError: it can't be read, or holds something else.
    """
    try:
        found = np.load(regular(file), mmap_mode="r", allow_pickle=False)  # to write would make a short one longer
        if not isinstance(found, np.memmap) or found.dtype.kind not in "fiu" or found.shape[: len(shape)] != shape:
            raise ValueError(f"{getattr(found, 'dtype', type(found).__name__)} {list(getattr(found, 'shape', []))}")
    except (
        OSError,
        ValueError,
        EOFError,
        SyntaxError,
        TypeError,
        OverflowError,
        MemoryError,
        tokenize.TokenError,
    ) as error:
        raise unreadable(file, option, error) from None
    return np.lib.format.open_memmap(regular(file), mode=mode) if mode == "r+" else found


def check_notes(store: FeatureStore, notes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rejected images in the notes of all parts: each has a key, a reason and maybe a row.

    Raises:
        UsageError: a note holds something else.
    """
    found = list[dict[str, Any]]()
    for part, note in enumerate(notes):
        rejected = note.get("rejected")
        whole = isinstance(note.get("rows"), int) and note["rows"] >= 0 and isinstance(rejected, list)
        for one in rejected if whole and rejected else ():
            whole = whole and isinstance(one, dict) and isinstance(row := one.get("row", 0), int) and row >= 0
            whole = whole and isinstance(one.get("key"), str) and isinstance(one.get("reason"), str)
        if not whole:
            raise unreadable(store.note_file(part), store.option, "rows and rejected are expected")
        found += rejected or ()
    return found


def read_object(file: Path, option: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UsageError: the file holds something else.
    """
    try:
        found = parse_json(read_file(file))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (ValueError, OSError) as error:
        raise unreadable(file, option, error) from None
    return found


def check_fingerprint(stored: Mapping[str, Any], fingerprint: Mapping[str, Any], subject: str) -> None:
    """Compares a store's description with a fingerprint.

    Raises:
        UsageError: it has other values, or was made by an earlier version; the message begins with ``subject``.
    """
    if "fingerprint" not in stored:
        why = "an earlier version made these features and did not record everything that they depend on"
    elif different := [key for key, value in fingerprint.items() if stored.get(key) != value]:
        why = f"holds features of another {', '.join(WORDS.get(key, key) for key in different)}"
    else:
        return
    raise UsageError(f"{subject}: {why}; give a new folder", code="mismatch")
