"""Images with captions, to be measured on: shards, a captions file, a folder with one, or sidecars.

Nothing is read before it is asked for: shards are known by their headers, folders by their listing and captions file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aimv2.data.images.decode import ImageError
from aimv2.data.images.sources import Columns, FileReader, Item, Reject, open_folder
from aimv2.data.shards.format import captions_of, find_shards, image_of, read_sample, scan_shard, split_shards
from aimv2.errors import UsageError

log = logging.getLogger(__name__)

USUAL = "captions.txt"  # of several captions files in a folder
SPLITS = ("test", "val", "train")


class Sample(NamedTuple):
    """A sample of a shard, between two of its offsets; ``image`` is its key, as an item's is its name."""

    image: str
    shard: Path
    start: int
    end: int


def open_captioned(source: str, captions: str | None = None) -> tuple[Sequence[Item | Sample], str]:
    """What every image is read from, and the split: test, else val, else train; "all" where no split is named.

    Args:
        source: shards (folder, pattern, one tar), a captions file beside its images, or a folder of images with a captions
            file or with .txt/.json sidecars.
        captions: the captions file, where a folder has several; None: ``captions.txt`` among them.

    Raises:
        UsageError: nothing there, or no captions.
    """
    path = Path(source).expanduser()
    pattern = path.suffix == ".tar" or (any(mark in source for mark in "*?[{") and not path.exists())
    if not pattern and not path.exists():
        raise UsageError(f"--data {source}: no such file or folder; images with captions, or shards, are expected")
    if not pattern and path.is_dir() and not any(path.glob("*.tar")):
        return _of_files(path, captions, source), "all"
    if captions is not None:
        raise UsageError(f"--captions {captions}: {source} holds its captions itself; leave the option out")
    if not pattern and path.is_file():
        return _of_files(path.parent, path.name, source), "all"
    return _of_shards(path, source)


def _of_files(root: Path, captions: str | None, source: str) -> list[Item]:
    if captions is None and (root / USUAL).is_file():
        captions = USUAL
    try:
        planned = open_folder(root, captions, Columns(), "{}")
    except UsageError as error:
        why = str(error).partition("; ")[0].removeprefix("SRC: ")
        raise UsageError(f"--data {source}: {why}; shards, a captions file, or a folder with one expected") from None
    if planned.classes:
        raise UsageError(f"--data {source}: class folders without captions; a captions file or sidecars expected")
    if items := [item for item in planned.items if isinstance(item, Item)]:
        return items
    raise UsageError(f"--data {source}: no image with a caption there")


def _of_shards(path: Path, source: str) -> tuple[list[Sample], str]:
    split, shards = "all", list[Path]()
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
    items = list[Sample]()
    for shard in shards:
        scan = scan_shard(shard)
        items += [Sample(key, shard, *span) for key, *span in zip(scan.keys, scan.offsets, scan.offsets[1:])]
    if not items:
        raise UsageError(f"--data {source}: no sample in {shards[0].name}{' and others' * (len(shards) > 1)}")
    return items, split


def read_captioned(item: Item | Sample) -> tuple[bytes, tuple[str, ...]]:
    """The encoded image and its captions, of all fields; an image without captions has ().

    Raises:
        ImageError: a file that can't be read, a sample without an image.
    """
    if isinstance(item, Item):
        (loaded,) = FileReader().load([item])
        if isinstance(loaded, Reject):
            raise ImageError(loaded.reason)
        data, fields = loaded.data, loaded.captions
    else:
        parts = read_sample(item.shard, item.start, item.end)
        if (found := image_of(parts)) is None:
            raise ImageError("no image in the sample")
        data, fields = found[1], captions_of(parts)
    return data, tuple(text for texts in fields.values() for text in texts)
