"""Features of many images in files of equal size, each whole or absent; an interrupted run resumes. Written and read here.

Legend: N images, I patches, D width, L layers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.images.pictures import Picture, content_identity, pictures
from aimv2.data.passed import PassedOver
from aimv2.data.prefetch import batched, prefetch_map
from aimv2.data.stream.transforms import VIEW, image_transform
from aimv2.errors import RankError, UsageError
from aimv2.features.fingerprint import architecture, fingerprint, model_fingerprint, weights_hash
from aimv2.features.frozen import PRECISIONS
from aimv2.features.store import FeatureStore, check_notes
from aimv2.io import read_file, regular, write_aside
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT
from aimv2.progress import progress_bar

ABOUT, REJECTED = "embed.json", "rejected.jsonl"
FILE_BYTES = 512 * 2**20  # of a file of all patches, by default
FORMATS, POOLS = ("npy", "parquet"), ("mean", "attention", "none")


@dataclass(frozen=True)
class Wanted:
    """Which features, and how they are written.

    Attributes:
        pool: mean of the patches, attention (the pooling head) or none: every patch.
        layers: of blocks; () is the output of the last one only.
        format: npy or parquet.
        shard_size: images a file; None: see :func:`default_shard_size`.
        batch_size: images at once.
        precision: of the matmuls; fp32 is stored as float32, bf16 as float16.
    """

    pool: str
    layers: tuple[int, ...]
    format: str
    shard_size: int | None
    batch_size: int
    precision: str


def embed_images(
    name: str, model: Any, source: str, out: str, wanted: Wanted, image_root: Path | None = None
) -> dict[str, Any]:
    """See :func:`aimv2.api.embed`. Under torchrun each rank writes every WORLD_SIZE-th file.

    Raises:
        UsageError: options that do not fit the model, images that do not exist, ``out`` of something else, no image could be
            read (then nothing is left in ``out``).
    """
    encoder = model.image if isinstance(model, LiT) else model
    assert isinstance(encoder, VisionEncoder)
    check_options(encoder, wanted)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    images = list_images(source, image_root)
    count, step = images.count, wanted.shard_size or default_shard_size(encoder, wanted)
    about = fingerprint(
        model_fingerprint(weights_hash(encoder), architecture(encoder), wanted.precision),
        view_of(encoder),
        wanted.layers,
        wanted.pool,
        {"source": str(Path(source).expanduser().resolve()), **images.fingerprint()},
    )
    about |= {"format": wanted.format, "shard_size": step}
    noted = {"model": name, **({"image_root": str(image_root.resolve())} if image_root else {})}
    folder, parts = Path(out).expanduser(), -(-count // step)
    store = FeatureStore(
        folder, about, "OUT", noted=noted, about=ABOUT, note="features-{:05d}.json", rank=rank, ranks=ranks
    )
    missing, again = set(store.missing(parts)), ListedImages()
    listed = again.pass_through(pictures(source, image_root=image_root))
    own = sum(min(step, count - part * step) for part in range(rank, parts, ranks))
    with progress_bar("embedding", own) as advance:
        for part in range(parts):
            pictured = islice(listed, step)
            if part in missing:
                write_part(store, part, encoder, pictured, wanted, advance)
            elif part % ranks == rank:
                advance(skip_part(store, part, pictured))
            else:
                deque(pictured, maxlen=0)
        deque(listed, maxlen=0)  # what came since the first listing
    if again.fingerprint() != images.fingerprint():
        raise UsageError(
            f"IMAGES {source}: the images changed while they were embedded; embed them into a new folder",
            code="mismatch",
        )
    if rank:
        return {"out": str(folder)}
    notes = store.gather(parts)
    rejected = check_notes(store, notes)
    if len(rejected) == count:
        store.discard(parts)
        first = rejected[0]
        raise UsageError(f"IMAGES: none of {count} could be read; {first['key']}: {first['reason']}", code="unreadable")
    write_aside(folder / REJECTED, "".join(json.dumps(line) + "\n" for line in rejected))
    return {
        "out": str(folder),
        "images": count,
        "rows": count - len(rejected),
        "rejected": len(rejected),
        "files": sum(note["rows"] > 0 for note in notes),
        "passed_over": images.passed.result(),
    }


class ListedImages:
    """Counts images and hashes their keys and contents while they are listed."""

    def __init__(self) -> None:
        self.count, self._keys, self._contents = 0, hashlib.sha256(), hashlib.sha256()
        self.passed = PassedOver()

    def pass_through(self, listed: Iterable[Picture]) -> Iterator[Picture]:
        """The images, each with its key in one line."""
        for name, read in listed:
            key = one_line_key(name)
            self.count += 1
            self._keys.update(key.encode() + b"\n")
            self._contents.update(content_identity(read).encode() + b"\n")
            yield key, read

    def fingerprint(self) -> dict[str, Any]:
        """The images' keys of a fingerprint."""
        return {
            "images": self.count,
            "keys_sha256": self._keys.hexdigest(),
            "contents_sha256": self._contents.hexdigest(),
        }


def one_line_key(name: str) -> str:
    """A name as JSON writes a string, without the quotes around it: one line, valid UTF-8, ``json.loads`` reads it back.

    Quotes, backslashes, line ends and other control characters are escaped, and so are the bytes of a file name that is not
    UTF-8 (``\\udcXX``; ``os.fsencode`` of what ``json.loads`` gives is the name on disk).
    """
    text = json.dumps(name, ensure_ascii=False)[1:-1]
    return re.sub("[\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def list_images(source: str, image_root: Path | None = None) -> ListedImages:
    """Keys and content identities of all images of a source, read by nobody yet."""
    images = ListedImages()
    deque(images.pass_through(pictures(source, image_root=image_root, passed=images.passed)), maxlen=0)
    return images


def view_of(encoder: VisionEncoder) -> dict[str, Any]:
    """What :func:`aimv2.data.stream.transforms.image_transform` does to an image, for a fingerprint."""
    return {"image_size": encoder.config.image_size, "crop": VIEW if encoder.config.image_size else "none"}


def default_shard_size(encoder: VisionEncoder, wanted: Wanted) -> int:
    """Images a file by default: 1000, or as many as keep a file of all patches below FILE_BYTES."""
    if wanted.pool != "none":
        return 1000
    config = encoder.config
    patches = config.patches if config.image_size is not None else config.max_patches
    image = patches * config.width * max(1, len(wanted.layers)) * (2 if wanted.precision == "bf16" else 4)
    return min(1000, max(1, FILE_BYTES // image))


def check_options(encoder: VisionEncoder, wanted: Wanted) -> None:
    """Raises UsageError for options out of range."""
    for option, chosen, known in (
        ("--pool", wanted.pool, POOLS), ("--format", wanted.format, FORMATS), ("--precision", wanted.precision, PRECISIONS),
    ):  # fmt: skip
        if chosen not in known:
            raise UsageError(f"{option} {chosen}: {', '.join(known[:-1])} or {known[-1]} expected")
    if wanted.pool == "attention" and encoder.head is None:
        raise UsageError(f"--pool attention: {encoder.config.name} has no pooling head; --pool mean", code="missing")
    if wanted.pool == "none" and encoder.config.image_size is None and wanted.format == "npy":
        raise UsageError(
            "--pool none: a native model gives each image another number of patches, which an array can't hold; "
            "--format parquet, or --pool mean",
            code="unsupported",
        )
    for layer in wanted.layers:
        if not -encoder.config.depth <= layer < encoder.config.depth:
            raise UsageError(f"--layers {layer}: {-encoder.config.depth} to {encoder.config.depth - 1} expected")
    for option, value in (("--batch-size", wanted.batch_size), ("--shard-size", wanted.shard_size)):
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: at least 1 expected")


def skip_part(store: FeatureStore, part: int, images: Iterator[Picture]) -> int:
    """Passes over the images of a file that is whole; returns how many.

    Raises:
        RankError: its note is of other images.
    """
    keys, note = [key for key, _ in images], store.note(part) or {}
    if keys and (note.get("first"), note.get("last")) == (keys[0], keys[-1]):
        return len(keys)
    ends = f"{keys[0]} to {keys[-1]}" if keys else "that are there"
    name = store.note_file(part).name
    raise RankError(f"OUT {store.folder}: {name} is not of the images {ends}; give a new folder", code="mismatch")


def write_part(
    store: FeatureStore,
    part: int,
    encoder: VisionEncoder,
    images: Iterator[Picture],
    wanted: Wanted,
    advance: Callable[[int], None],
) -> None:
    """One file of features, its keys, and last the note."""
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
        write(store, part, keys, [row for block in blocks for row in block], wanted)
    ends = ends or [None]
    store.commit(part, {"rows": len(keys), "first": ends[0], "last": ends[-1], "rejected": rejected})


def decoded(images: Iterator[Picture], encoder: VisionEncoder) -> Iterator[tuple[str, Tensor | str]]:
    """(key, pixels uint8 [3, H, W], or why there are none), decoded in threads, in order."""
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

    return prefetch_map(read, images)


@torch.inference_mode()
def features_of(encoder: VisionEncoder, views: list[Tensor], wanted: Wanted) -> list[Any]:
    """A row an image: [D] or [I, D] for one layer, [L, D] or [L, I, D] for several; numpy, in the stored precision."""
    device = encoder.mean.device
    half = wanted.precision == "bf16"
    images = [pixels.to(device) for pixels in views]
    given: Any = torch.stack(images) if encoder.config.image_size is not None else images
    with torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext():
        found = encoder.encode(given, wanted.layers or None, wanted.pool)
    layers = found if wanted.layers else [found]
    rows = []
    for at in range(len(views)):
        row = torch.stack([layer[at].float() for layer in layers]).cpu().numpy()
        row = row if len(wanted.layers) > 1 else row[0]
        with np.errstate(over="ignore"):  # reported below
            rows.append(row.astype(np.float16) if half else row)
    if half and not all(np.isfinite(row).all() for row in rows):
        raise RankError("--precision bf16: a feature is larger than float16 holds; --precision fp32", code="limit")
    return rows


def write_npy(store: FeatureStore, part: int, keys: list[str], rows: list[np.ndarray], wanted: Wanted) -> None:
    """``features-PPPPP.npy`` [n, ...] and ``keys-PPPPP.txt``, a key a line (see :func:`one_line_key`)."""
    (store.folder / f"keys-{part:05d}.txt").write_text("".join(key + "\n" for key in keys), encoding="utf-8")
    with store.aside(f"features-{part:05d}.npy") as path, path.open("wb") as file:
        np.save(file, np.stack(rows))


def write_parquet(store: FeatureStore, part: int, keys: list[str], rows: list[np.ndarray], wanted: Wanted) -> None:
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
    with store.aside(f"features-{part:05d}.parquet") as path:
        pq.write_table(pa.table(columns), path)


def read_parts(folder: Path, layers: list[int], place: int, format: str) -> Iterator[tuple[str, np.ndarray]]:
    """Key and features of each image that a folder holds, part by part.

    Args:
        folder: that :func:`embed_images` wrote.
        layers: stored there.
        place: of the wanted one among them.
        format: of the files.

    Raises:
        ValueError, KeyError, OSError: files that can't be read.
    """
    several = len(layers) > 1
    for path in sorted(folder.glob(f"features-*.{format}")):
        if format == "parquet":
            import pyarrow.parquet as pq

            column = f"layer_{layers[place]}" if several else "features"
            table = pq.read_table(regular(path), columns=["key", column])
            for key, row in zip(table["key"].to_pylist(), table[column]):
                yield key, np.array(row.values)
        else:
            rows = np.load(regular(path), mmap_mode="r", allow_pickle=False)
            keys = read_file(path.with_name(f"keys-{path.stem.rpartition('-')[2]}.txt")).decode().split("\n")[:-1]
            for key, row in zip(keys, rows, strict=True):
                yield key, np.array(row[place] if several else row)
