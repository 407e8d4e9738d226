"""Images with captions, to be measured on: shards, a captions file, a folder with one, or sidecars.

Nothing is read before it is needed: shards are known by their headers, folders by their listing and captions file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from aimv2.data.images.catalogue import kind_of
from aimv2.data.images.entries import Reject, SourceEntry, tar_entries
from aimv2.data.images.sources import IMAGE_FORMS, SourceOptions, open_folder
from aimv2.data.passed import passed_lines
from aimv2.data.shards.format import find_shards, split_shards
from aimv2.data.shards.tars import tars_in, why_unreadable
from aimv2.errors import UsageError, shown

log = logging.getLogger(__name__)

PREFERRED = "captions.txt"  # of several captions files in a folder
SPLITS = ("test", "val", "train")


def open_captioned(source: str, captions: str | None = None) -> tuple[Sequence[SourceEntry], str]:
    """Entries of all images, and the split: test, else val, else train; "all" where no split is named.

    Args:
        source: shards (folder, pattern, one tar), a captions file next to its images, or a folder of images with a captions
            file or with .txt/.json sidecars.
        captions: the captions file, where a folder has several; None: ``captions.txt`` among them.

    Raises:
        UsageError: nothing there, or no captions.
    """
    kind, path = kind_of(source)
    if kind in ("hub", "missing"):
        raise UsageError(
            f"--data {source}: no such file or folder; images with captions, or shards, are expected",
            code="not-found",
        )
    if kind == "folder" and not tars_in(path):
        return _of_files(path, captions, source)
    if captions is not None:
        raise UsageError(
            f"--captions {captions}: {source} holds its captions itself; leave the option out", code="conflict"
        )
    if kind == "file":
        return _of_files(path.parent, path.name, source)
    return _of_shards(path, source)


def _of_files(root: Path, captions: str | None, source: str) -> tuple[list[SourceEntry], str]:
    if captions is None and (root / PREFERRED).is_file():
        captions = PREFERRED
    try:
        planned = open_folder(root, SourceOptions(captions, held_out=True), IMAGE_FORMS)
    except UsageError as error:
        why = str(error).partition("; ")[0].removeprefix("SOURCE: ")
        if error.option == "--image-root":
            why = why.removeprefix("--image-root: ")
            raise UsageError(
                f"--data {source}: {why}; import it first, with data import --image-root DIR",
                option="--data",
                code="mismatch",
            ) from None
        raise UsageError(
            f"--data {source}: {why}; shards, a captions file, or a folder with one expected", code=error.code
        ) from None
    if planned.classes:
        raise UsageError(f"--data {source}: class folders without captions; a captions file or sidecars expected")
    listed = list(planned.items)
    if entries := [item for item in listed if isinstance(item, SourceEntry)]:
        if rejects := [item for item in listed if isinstance(item, Reject)]:
            first = shown(f"{rejects[0].image}: {rejects[0].reason}", 200)
            log.warning("--data %s: %d of %d are left out; %s", source, len(rejects), len(listed), first)
        for line in passed_lines(planned.passed.result()):
            log.warning("--data %s: %s", source, line)
        return entries, planned.split or "all"
    raise UsageError(f"--data {source}: no image with a caption there", code="missing")


def _of_shards(path: Path, source: str) -> tuple[list[SourceEntry], str]:
    split = "all"
    if path.is_dir():
        groups = split_shards(path, option="--data")
        name = next(name for name in SPLITS if groups[name])
        shards = groups[name]
        if shards[0].name.startswith(f"{name}-"):
            split = name
    else:
        shards = find_shards(source, "test", option="--data")
    if split == "train":
        log.warning("--data %s: no test-*.tar and no val-*.tar there; measured on its training pairs", source)
    scans = []
    for shard in shards:
        try:
            scans.append(tar_entries(shard))
        except OSError as error:
            raise UsageError(
                f"--data {source}: {shard.name} {why_unreadable(shard, error)}", code="unreadable"
            ) from error
    for shard, (scan, _) in zip(shards, scans):
        if scan.cut:
            log.warning("%s: %s; its whole samples are used", shard, scan.cut)
    entries = [entry for _, found in scans for entry in found]
    if not entries:
        why = f" ({scans[0][0].cut})" if scans[0][0].cut else ""
        raise UsageError(f"--data {source}: no sample in {shards[0].name}{' and others' * (len(shards) > 1)}{why}")
    return entries, split


def read_captioned(entry: SourceEntry) -> tuple[bytes, tuple[str, ...]]:
    """The encoded image and its captions, of all fields; an image without captions has ().

    Raises:
        ImageError: a file that can't be read, a sample without an image.
    """
    loaded = entry.reader.read(entry)
    return loaded.data, tuple(text for texts in loaded.captions.values() for text in texts)
