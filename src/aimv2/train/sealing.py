"""The list of a checkpoint's files with sizes and hashes: what was written last is complete, and what was changed since is noticed.

Each rank flushes and hashes the files that it wrote; rank 0 joins the parts into ``files.json``. Before a run goes on, the newest
checkpoint is compared with its list; a damaged one is kept aside, and the one before it is used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from aimv2.errors import UsageError
from aimv2.features.fingerprint import file_hash
from aimv2.interop.model_folder import STEP
from aimv2.io import parse_json, read_file

LIST = "files.json"
PART = ".files-{:05d}.json"
FORMAT = "aimv2 files 1"
DAMAGED = "damaged-"  # before the name of a checkpoint that is kept aside


def flush(path: Path) -> None:
    """A file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal_part(folder: Path, rank: int, files: Iterable[Path]) -> None:
    """Flushes what a rank wrote, and notes it.

    Args:
        folder: of the checkpoint.
        rank: of this process.
        files: that it wrote, in ``folder``.
    """
    found = {}
    for file in sorted(files):
        flush(file)
        found[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": file_hash(file)}
    part = folder / PART.format(rank)
    part.write_text(json.dumps(found))
    flush(part)


def seal(folder: Path, final: Path, ranks: int) -> None:
    """Joins the parts of all ranks into the list, once all of them are there, flushes the names and gives the folder its own."""
    parts = [folder / PART.format(rank) for rank in range(ranks)]
    files: dict[str, Any] = {}
    for part in parts:
        files |= parse_json(read_file(part))
    listed = folder / LIST
    listed.write_text(json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}, indent=1) + "\n")
    flush(listed)
    for part in parts:
        part.unlink()
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush(path)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    flush(final.parent)


def written_by(folder: Path, rank: int) -> list[Path]:
    """The files of a checkpoint that a rank wrote: its shards and its own state; rank 0 all that are nobody else's."""
    own = re.compile(rf"(__{rank}_\d+\.distcp|rank-{rank:05d}\..*)")
    others = re.compile(r"(__\d+_\d+\.distcp|rank-\d+\..*|\.files-\d+\.json)")
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if own.fullmatch(path.name) or (rank == 0 and not others.fullmatch(path.name))]


def listed(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The list of a checkpoint: path -> size and sha256; None: it has none.

    Raises:
        ValueError: a list that can't be read.
    """
    try:
        about = parse_json(read_file(folder / LIST))
    except FileNotFoundError:
        return None
    files = about.get("files") if isinstance(about, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(one, dict) and isinstance(one.get("size"), int) and isinstance(one.get("sha256"), str)
        for one in files.values()
    ):
        raise ValueError("no list of files with sizes and hashes")
    return files


def faults(folder: Path, tick: Callable[[int], object] = lambda size: None) -> list[str] | None:
    """What is wrong with a checkpoint, file by file; [] where nothing is; None: it has no list, so nothing is known.

    Args:
        folder: of the checkpoint.
        tick: called with the bytes that were read.
    """
    try:
        files = listed(folder)
    except (OSError, ValueError) as error:
        return [f"{LIST} can't be read ({' '.join(str(error).split())[:100]})"]
    if files is None:
        # a checkpoint of an earlier version, unless something else of it is missing too
        lost = [name for name in ("state/trainer.json", "state/.metadata", "model") if not (folder / name).exists()]
        return [f"{name} is missing" for name in lost] or None
    found = []
    for name, about in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != about["size"]:
            found.append(f"{name} has {size:,} bytes instead of {about['size']:,}")
        else:
            try:
                if file_hash(path) != about["sha256"]:
                    found.append(f"{name} was changed (another SHA-256)")
            except OSError as error:
                found.append(f"{name} can't be read ({error.strerror})")
        tick(about["size"])
    return found


def unlisted(folder: Path) -> list[str]:
    """Files in a checkpoint with a list that are not in it: nothing reads them, and this package wrote none of them."""
    try:
        known = {*(listed(folder) or ()), LIST}
    except (OSError, ValueError):
        return []
    return sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - known)


def step_folders(run: Path) -> list[tuple[int, Path]]:
    """All checkpoints of a run that were finished, damaged or not, oldest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if path.is_dir()]
    return sorted((int(match[1]), path) for path in folders if (match := STEP.search(path.name)))


def newest_is_whole(run: Path) -> bool:
    """Whether the newest checkpoint is as it was written, as far as it can be known; True where there is none."""
    folders = step_folders(run)
    return not folders or not faults(folders[-1][1])


def set_aside_damaged(run: Path, say: Callable[[str], None]) -> None:
    """Leaves a good checkpoint as the newest one, or one from before there were lists; a line for each that is kept aside.

    Args:
        run: the run folder.
        say: prints a line.

    Raises:
        UsageError: there are checkpoints, and none is good.
    """
    for step, folder in reversed(step_folders(run)):
        wrong = faults(folder)
        if wrong is None:
            say(f"the checkpoint of step {step} is from before there were lists of files: it can't be verified")
            return
        if not wrong:
            return
        aside = free_name(folder.with_name(f"{DAMAGED}{folder.name}"))
        folder.rename(aside)
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        say(
            f"the checkpoint of step {step} is damaged: {wrong[0]}{more}; it is kept as {aside.name}, the one before it is used"
        )
    if any((run / "checkpoints").glob(f"{DAMAGED}step-*")):
        raise UsageError(
            f"--resume: no checkpoint of {run} is good; those that are kept aside are in its folder checkpoints, --overwrite starts anew",
            option="--resume",
            code="unreadable",
        )


def free_name(path: Path) -> Path:
    """``path``, or with the first number behind it that is not taken."""
    number, found = 1, path
    while found.exists():
        number, found = number + 1, path.with_name(f"{path.name}.{number}")
    return found
