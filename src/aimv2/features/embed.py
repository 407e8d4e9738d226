"""Features of many images: files of equal parts on disk, each whole or absent; goes on where it was stopped.

Legend: N images, I patches, D width, L layers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.images.pictures import Picture, pictures
from aimv2.data.prefetch import ahead, batched
from aimv2.data.stream.transforms import image_transform
from aimv2.errors import RankError, UsageError
from aimv2.features.fingerprint import weights_hash
from aimv2.io import write_aside
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT

ABOUT, REJECTED = "embed.json", "rejected.jsonl"
FILE_BYTES = 512 * 2**20  # of a file of all patches, unless asked otherwise
PART = re.compile(r"-(\d{5,})\.")
ASIDE = re.compile(r"\.(?:embed\.json|rejected\.jsonl|features-\d+\.json)\.aside|\.features-\d+\.(?:npy|parquet)")
FORMATS, POOLS = ("npy", "parquet"), ("mean", "attention", "none")


@dataclass(frozen=True)
class Wanted:
    """Which features, and how they are written.

    Attributes:
        pool: mean of the patches, attention (the pooling head) or none: every patch.
        layers: of blocks; () is the output of the last one alone.
        format: npy or parquet.
        shard_size: images a file; None: see :func:`usual_shard_size`.
        batch_size: images at once.
        precision: of the products; fp32 is stored as float32, bf16 as float16.
    """

    pool: str
    layers: tuple[int, ...]
    format: str
    shard_size: int | None
    batch_size: int
    precision: str


def embed_images(name: str, model: Any, source: str, out: str, wanted: Wanted) -> dict[str, Any]:
    """See :func:`aimv2.api.embed`. Under torchrun each rank writes every WORLD_SIZE-th file.

    Raises:
        UsageError: options that do not fit the model, images that do not exist, ``out`` of something else.
    """
    encoder = model.image if isinstance(model, LiT) else model
    assert isinstance(encoder, VisionEncoder)
    check_options(encoder, wanted)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    keys = Keys()
    deque(keys.of(pictures(source)), maxlen=0)
    step = wanted.shard_size or usual_shard_size(encoder, wanted)
    about = {
        "model": name,  # as it was spelled: told, never compared
        "weights_sha256": weights_hash(encoder),
        "source": str(Path(source).expanduser().resolve()),
        "images": keys.count,
        "keys_sha256": keys.digest.hexdigest(),
        "pool": wanted.pool,
        "layers": list(wanted.layers),
        "format": wanted.format,
        "shard_size": step,
        "precision": wanted.precision,
    }
    folder, parts = Path(out).expanduser(), -(-keys.count // step)
    begin(folder, about, rank, size)
    seen = Keys()
    listed = seen.of(pictures(source))
    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=rank != 0 or not console.is_terminal) as progress:
        task = progress.add_task("embedding", total=sum(share(keys.count, step, rank, size)))
        for part in range(parts):
            images = islice(listed, step)
            if part % size != rank:
                deque(images, maxlen=0)
            elif (folder / f"features-{part:05d}.json").is_file():
                progress.advance(task, skip_part(folder, part, images))
            else:
                write_part(folder, part, encoder, images, wanted, lambda done: progress.advance(task, done))
        deque(listed, maxlen=0)  # what came since the first count
    if seen.digest.digest() != keys.digest.digest():
        raise UsageError(f"IMAGES {source}: the images changed while they were embedded; embed them into a new folder")
    return finish(folder, parts, keys.count) if rank == 0 else {"out": str(folder)}


class Keys:
    """Counts images and hashes their keys as they go by."""

    def __init__(self) -> None:
        self.count, self.digest = 0, hashlib.sha256()

    def of(self, listed: Iterable[Picture]) -> Iterator[Picture]:
        """The images, each with its key in one line."""
        for name, content in listed:
            key = one_line_key(name)
            self.count += 1
            self.digest.update(key.encode() + b"\n")
            yield key, content


def one_line_key(name: str) -> str:
    """A name as JSON writes a string, without the quotes around it: one line, valid UTF-8, ``json.loads`` reads it back.

    Quotes, backslashes, line ends and other control characters are escaped, and so are the bytes of a file name that is not
    UTF-8 (``\\udcXX``; ``os.fsencode`` of what ``json.loads`` gives is the name on disk).
    """
    text = json.dumps(name, ensure_ascii=False)[1:-1]
    return re.sub("[\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def usual_shard_size(encoder: VisionEncoder, wanted: Wanted) -> int:
    """Images a file where none are asked for: 1000, or as many as keep a file of all patches below FILE_BYTES."""
    if wanted.pool != "none":
        return 1000
    config = encoder.config
    patches = config.patches if config.image_size is not None else config.max_patches
    image = patches * config.width * max(1, len(wanted.layers)) * (2 if wanted.precision == "bf16" else 4)
    return min(1000, max(1, FILE_BYTES // image))


def share(count: int, step: int, rank: int, size: int) -> list[int]:
    """How many images each file of a rank holds: files of ``step``, dealt out in turn."""
    return [min(step, count - start) for start in range(rank * step, count, size * step)]


def check_options(encoder: VisionEncoder, wanted: Wanted) -> None:
    """Raises UsageError for options out of range."""
    if wanted.pool not in POOLS:
        raise UsageError(f"--pool {wanted.pool}: {', '.join(POOLS[:-1])} or {POOLS[-1]} expected")
    if wanted.pool == "attention" and encoder.head is None:
        raise UsageError(f"--pool attention: {encoder.config.name} has no pooling head; --pool mean")
    if wanted.format not in FORMATS:
        raise UsageError(f"--format {wanted.format}: npy or parquet expected")
    if wanted.pool == "none" and encoder.config.image_size is None and wanted.format == "npy":
        raise UsageError(
            "--pool none: a native model gives each image another number of patches, which an array can't hold; "
            "--format parquet, or --pool mean"
        )
    for layer in wanted.layers:
        if not -encoder.config.depth <= layer < encoder.config.depth:
            raise UsageError(f"--layers {layer}: {-encoder.config.depth} to {encoder.config.depth - 1} expected")
    for option, value in (("--batch-size", wanted.batch_size), ("--shard-size", wanted.shard_size)):
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: at least 1 expected")
    if wanted.precision not in ("fp32", "bf16"):
        raise UsageError(f"--precision {wanted.precision}: fp32 or bf16 expected")


def begin(folder: Path, about: dict[str, Any], rank: int, size: int) -> None:
    """Makes the folder, or makes sure that it holds the same work; what a process that was killed left half-written goes."""
    if rank:
        while not (folder / ABOUT).is_file():  # the first rank writes it, or ends all of us
            time.sleep(0.05)
    if (folder / ABOUT).is_file():
        check_same(folder, about)
        for path in asides(folder):
            part = PART.search(path.name)
            if int(part[1]) % size == rank if part else rank == 0:  # another rank may be writing its own
                path.unlink(missing_ok=True)
        return
    if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - set(asides(folder))):
        raise UsageError(f"OUT {folder}: holds something else; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path in asides(folder):
        path.unlink()
    write_aside(folder / ABOUT, json.dumps(about, indent=1) + "\n")


def asides(folder: Path) -> list[Path]:
    """Files that are written here before they get their names: half-written ones, after a process was killed."""
    return [path for path in folder.iterdir() if ASIDE.fullmatch(path.name)] if folder.is_dir() else []


def check_same(folder: Path, about: dict[str, Any]) -> None:
    """Raises UsageError where ``folder`` holds the features of another model, of other images or in another form."""
    try:
        stored = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"OUT {folder}: {ABOUT} can't be read ({error}); give a new folder") from None
    if not isinstance(stored, dict):
        raise UsageError(f"OUT {folder}: {ABOUT} is of something else; give a new folder")
    words = {"weights_sha256": "model", "images": "number of images", "keys_sha256": "list of images"}
    different = [words.get(key, key) for key in about if key != "model" and stored.get(key) != about[key]]
    if different:
        raise UsageError(f"OUT {folder}: holds features of another {' and '.join(different)}; give a new folder")


def skip_part(folder: Path, part: int, images: Iterator[Picture]) -> int:
    """Passes over the images of a file that is whole already; returns how many.

    Raises:
        RankError: its note speaks of other images.
    """
    keys = [key for key, _ in images]
    path = folder / f"features-{part:05d}.json"
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if keys and (note["first"], note["last"]) == (keys[0], keys[-1]):
            return len(keys)
    except (ValueError, KeyError, TypeError):
        pass
    ends = f"{keys[0]} to {keys[-1]}" if keys else "that are there"
    raise RankError(f"OUT {folder}: {path.name} is not of the images {ends}; give a new folder")


def write_part(
    folder: Path, part: int, encoder: VisionEncoder, images: Iterator[Picture], wanted: Wanted, advance: Any
) -> None:
    """One file of features, its keys, and last the note that says it is whole."""
    keys, rejected, blocks, ends = [], list[dict[str, str]](), list[list[Any]](), list[str | None]()
    for batch in batched(decoded(images, encoder), wanted.batch_size):
        ends = [*ends[:1], batch[0][0], batch[-1][0]]
        good = [(key, pixels) for key, pixels in batch if isinstance(pixels, Tensor)]
        rejected += [{"key": key, "reason": why} for key, why in batch if isinstance(why, str)]
        if good:
            keys += [key for key, _ in good]
            blocks.append(features_of(encoder, [pixels for _, pixels in good], wanted))
        advance(len(batch))
    if keys:
        write = write_parquet if wanted.format == "parquet" else write_npy
        write(folder, part, keys, [row for block in blocks for row in block], wanted)
    note = {"rows": len(keys), "first": (ends or [None])[0], "last": (ends or [None])[-1], "rejected": rejected}
    write_aside(folder / f"features-{part:05d}.json", json.dumps(note) + "\n")


def decoded(images: Iterator[Picture], encoder: VisionEncoder) -> Iterator[tuple[str, Tensor | str]]:
    """(key, pixels uint8 [3, H, W], or why there are none), decoded ahead in threads, in order."""
    transform = image_transform(encoder)

    def read(picture: Picture) -> tuple[str, Tensor | str]:
        key, content = picture
        try:
            return key, transform(decode_image(content()))
        except ImageError as error:
            return key, str(error)
        except OSError as error:
            return key, f"cannot be read: {error.strerror or error}"
        except ValueError as error:
            return key, f"cannot be used: {error}"

    return ahead(read, images)


@torch.inference_mode()
def features_of(encoder: VisionEncoder, seen: list[Tensor], wanted: Wanted) -> list[Any]:
    """A row an image: [D] or [I, D] for one layer, [L, D] or [L, I, D] for several; numpy, in the stored precision."""
    device = encoder.mean.device
    half = wanted.precision == "bf16"
    images = [pixels.to(device) for pixels in seen]
    given: Any = torch.stack(images) if encoder.config.image_size is not None else images
    with torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext():
        found = encoder.encode(given, wanted.layers or None, wanted.pool)
    layers = found if wanted.layers else [found]
    rows = []
    for at in range(len(seen)):
        row = torch.stack([layer[at].float() for layer in layers]).cpu().numpy()
        row = row if len(wanted.layers) > 1 else row[0]
        with np.errstate(over="ignore"):  # said below
            rows.append(row.astype(np.float16) if half else row)
    if half and not all(np.isfinite(row).all() for row in rows):
        raise RankError("--precision bf16: a feature is larger than float16 holds; --precision fp32")
    return rows


def write_npy(folder: Path, part: int, keys: list[str], rows: list[np.ndarray], wanted: Wanted) -> None:
    """``features-PPPPP.npy`` [n, ...] and ``keys-PPPPP.txt``, a key a line (see :func:`one_line_key`)."""
    (folder / f"keys-{part:05d}.txt").write_text("".join(key + "\n" for key in keys), encoding="utf-8")
    aside = folder / f".features-{part:05d}.npy"
    np.save(aside, np.stack(rows))
    aside.rename(folder / aside.name[1:])


def write_parquet(folder: Path, part: int, keys: list[str], rows: list[np.ndarray], wanted: Wanted) -> None:
    """``features-PPPPP.parquet``: ``key``, then ``features``, or ``layer_I`` for each of several layers.

    With ``pool=none`` a value is the flat [I, D] of an image and ``patches`` says I.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"key": pa.array(keys)}
    dense = wanted.pool == "none"
    if dense:
        columns["patches"] = pa.array([row.shape[-2] for row in rows], pa.int32())
    several = len(wanted.layers) > 1
    for at, name in enumerate([f"layer_{layer}" for layer in wanted.layers] if several else ["features"]):
        flat = [(row[at] if several else row).reshape(-1) for row in rows]
        values = pa.array(np.concatenate(flat))
        offsets = pa.array(np.cumsum([0, *map(len, flat)]), pa.int64())
        columns[name] = (
            pa.LargeListArray.from_arrays(offsets, values)
            if dense
            else pa.FixedSizeListArray.from_arrays(values, len(flat[0]))
        )
    aside = folder / f".features-{part:05d}.parquet"
    pq.write_table(pa.table(columns), aside)
    aside.rename(folder / aside.name[1:])


def finish(folder: Path, parts: int, count: int) -> dict[str, Any]:
    """Waits for the files of all ranks; writes ``rejected.jsonl``.

    Raises:
        UsageError: no image could be read; nothing is left behind.
    """
    notes = [folder / f"features-{part:05d}.json" for part in range(parts)]
    while missing := [note for note in notes if not note.is_file()]:
        assert int(os.environ.get("WORLD_SIZE", "1")) > 1, missing
        time.sleep(0.2)
    read = [json.loads(note.read_text()) for note in notes]
    rejected = [line for note in read for line in note["rejected"]]
    if len(rejected) == count:
        for path in [*notes, folder / ABOUT]:
            path.unlink()
        folder.rmdir()
        raise UsageError(f"IMAGES: none of {count} could be read; {rejected[0]['key']}: {rejected[0]['reason']}")
    write_aside(folder / REJECTED, "".join(json.dumps(line) + "\n" for line in rejected))
    return {
        "out": str(folder),
        "images": count,
        "rows": count - len(rejected),
        "rejected": len(rejected),
        "files": sum(note["rows"] > 0 for note in read),
    }
