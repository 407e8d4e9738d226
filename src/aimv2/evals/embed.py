"""Features of many images: files of equal parts on disk, each whole or absent; goes on where it was stopped.

Legend: N images, I patches, D width, L layers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from aimv2.data.ahead import ahead, batched
from aimv2.data.images import ImageError, decode_image
from aimv2.data.pictures import Picture, pictures
from aimv2.data.transforms import image_transform
from aimv2.errors import UsageError
from aimv2.evals.weights import weights_hash
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT
from aimv2.train.files import write_aside

ABOUT, REJECTED = "embed.json", "rejected.jsonl"
FORMATS, POOLS = ("npy", "parquet"), ("mean", "attention", "none")


@dataclass(frozen=True)
class Wanted:
    """Which features, and how they are written.

    Attributes:
        pool: mean of the patches, attention (the pooling head) or none: every patch.
        layers: of blocks; () is the output of the last one alone.
        format: npy or parquet.
        shard_size: images a file.
        batch_size: images at once.
        precision: of the products; fp32 is stored as float32, bf16 as float16.
    """

    pool: str
    layers: tuple[int, ...]
    format: str
    shard_size: int
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
    count = sum(1 for _ in pictures(source))
    about = {
        "model": name,
        "weights_sha256": weights_hash(encoder),
        "source": str(Path(source).expanduser().resolve()),
        "images": count,
        "pool": wanted.pool,
        "layers": list(wanted.layers),
        "format": wanted.format,
        "shard_size": wanted.shard_size,
        "precision": wanted.precision,
    }
    folder, parts = Path(out).expanduser(), -(-count // wanted.shard_size)
    begin(folder, about, rank)
    with Progress(console=Console(file=sys.stderr), transient=True, disable=rank != 0) as progress:
        task = progress.add_task("embedding", total=count // size)
        listed = pictures(source)
        for part in range(parts):
            images = islice(listed, wanted.shard_size)
            if part % size != rank or (folder / f"features-{part:05d}.json").is_file():
                deque(images, maxlen=0)
                continue
            write_part(folder, part, encoder, images, wanted, lambda done: progress.advance(task, done))
    return finish(folder, parts, count) if rank == 0 else {"out": str(folder)}


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
        if value < 1:
            raise UsageError(f"{option} {value}: at least 1 expected")
    if wanted.precision not in ("fp32", "bf16"):
        raise UsageError(f"--precision {wanted.precision}: fp32 or bf16 expected")


def begin(folder: Path, about: dict[str, Any], rank: int) -> None:
    """Makes the folder, or makes sure that it holds the same work."""
    if rank:
        while not (folder / ABOUT).is_file():  # the first rank writes it, or ends all of us
            time.sleep(0.05)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        stored = json.loads((folder / ABOUT).read_text()) if (folder / ABOUT).is_file() else None
        if stored != about:
            different = [key for key in about if stored and stored.get(key) != about[key]]
            what = f"features of another {' and '.join(different)}" if different else "something else"
            raise UsageError(f"OUT {folder}: holds {what}; give a new folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / ABOUT, json.dumps(about, indent=1) + "\n")


def write_part(
    folder: Path, part: int, encoder: VisionEncoder, images: Iterator[Picture], wanted: Wanted, advance: Any
) -> None:
    """One file of features, its keys, and last the note that says it is whole."""
    keys, rejected, blocks = [], list[dict[str, str]](), list[list[Any]]()
    for batch in batched(decoded(images, encoder), wanted.batch_size):
        good = [(key, pixels) for key, pixels in batch if isinstance(pixels, Tensor)]
        rejected += [{"key": key, "reason": why} for key, why in batch if isinstance(why, str)]
        if good:
            keys += [key for key, _ in good]
            blocks.append(features_of(encoder, [pixels for _, pixels in good], wanted))
        advance(len(batch))
    if keys:
        write = write_parquet if wanted.format == "parquet" else write_npy
        write(folder, part, keys, [row for block in blocks for row in block], wanted)
    note = {"rows": len(keys), "rejected": rejected}
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
        rows.append(row.astype(np.float16) if half else row)
    if half and not all(np.isfinite(row).all() for row in rows):
        raise UsageError("--precision bf16: a feature is larger than float16 holds; --precision fp32")
    return rows


def write_npy(folder: Path, part: int, keys: list[str], rows: list[np.ndarray], wanted: Wanted) -> None:
    """``features-PPPPP.npy`` [n, ...] and ``keys-PPPPP.txt``, a key a line."""
    (folder / f"keys-{part:05d}.txt").write_text("".join(" ".join(key.split("\n")) + "\n" for key in keys))
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
        "files": parts,
    }
