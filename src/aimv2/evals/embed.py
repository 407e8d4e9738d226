"""Features of many images: one array on disk, one line an image; goes on where it was stopped.

Legend: N images, I patches, D width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from aimv2.data.images import ImageError, decode_image
from aimv2.data.shards import find_shards, image_of, read_samples
from aimv2.data.transforms import image_transform
from aimv2.errors import UsageError
from aimv2.evals.caption import image_files
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT

ABOUT, ROWS, FEATURES = "embed.json", "images.jsonl", "features.npy"


def pictures(source: str) -> tuple[int, Iterator[tuple[str, Any]]]:
    """How many images there are, and (name, file or bytes) of each: of a folder, of shards, or one image."""
    path = Path(source).expanduser()
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        shards = find_shards(source, "train", option="IMAGES")

        def samples() -> Iterator[tuple[str, Any]]:
            for shard in shards:
                for key, sample in read_samples(shard):
                    if (found := image_of(sample)) is not None:
                        yield key, found[1]

        return sum(1 for _ in samples()), samples()
    files = list(image_files([source]))
    root = path if path.is_dir() else path.parent
    return len(files), ((str(file.relative_to(root)), file) for file in files)


def embed_images(
    name: str, model: Any, source: str, out: str, pool: str, layer: int | None, batch_size: int, precision: str
) -> dict[str, Any]:
    """See :func:`aimv2.api.embed`.

    Returns:
        ``images``, ``rejected``, ``shape`` and ``out``.

    Raises:
        UsageError: options that do not fit the model, images that do not exist, ``out`` of something else.
    """
    encoder = model.image if isinstance(model, LiT) else model
    assert isinstance(encoder, VisionEncoder)
    check_options(encoder, pool, layer, batch_size, precision)
    count, images = pictures(source)
    if not count:
        raise UsageError(f"IMAGES {source}: no image there")
    about = {
        "model": name,
        "weights": fingerprint(encoder),
        "source": str(Path(source).expanduser().resolve()),
        "images": count,
        "pool": pool,
        "layer": layer,
        "precision": precision,
    }
    folder = Path(out).expanduser()
    done = begin(folder, about)
    shape = [count, *([] if pool != "none" else [encoder.config.patches]), encoder.config.width]
    mode = "r+" if done else "w+"
    array = np.lib.format.open_memmap(folder / FEATURES, mode=mode, dtype=np.float32, shape=tuple(shape))
    batches = batched(islice(images, done, None), batch_size)
    total = -(-(count - done) // batch_size)
    rows = folder / ROWS
    with rows.open("a") as lines:
        for batch in track(batches, "embedding", total=total, console=_console(), transient=True):
            features, notes = embed_batch(encoder, batch, pool, layer, precision)
            array[done : done + len(batch)] = features
            array.flush()
            lines.writelines(json.dumps(note) + "\n" for note in notes)
            lines.flush()  # a row counts as done once its line is there
            done += len(batch)
    rejected = [row for row in map(json.loads, rows.read_text().splitlines()) if "rejected" in row]
    if len(rejected) == count:
        for name in (ABOUT, ROWS, FEATURES):
            (folder / name).unlink()
        folder.rmdir()
        raise UsageError(f"IMAGES: none of {count} could be read; {rejected[0]['image']}: {rejected[0]['rejected']}")
    return {"out": str(folder), "images": count, "rejected": len(rejected), "shape": shape}


def _console() -> Any:
    from rich.console import Console

    return Console(file=sys.stderr)


def check_options(encoder: VisionEncoder, pool: str, layer: int | None, batch_size: int, precision: str) -> None:
    """Raises UsageError for options out of range."""
    if pool not in ("mean", "head", "none"):
        raise UsageError(f"--pool {pool}: mean, head or none expected")
    if pool == "head" and encoder.head is None:
        raise UsageError(f"--pool head: {encoder.config.name} has no pooling head; --pool mean")
    if pool == "none" and encoder.config.image_size is None:
        raise UsageError("--pool none: a native model gives each image another number of patches; --pool mean")
    if layer is not None and not -encoder.config.depth <= layer < encoder.config.depth:
        raise UsageError(f"--layer {layer}: {-encoder.config.depth} to {encoder.config.depth - 1} expected")
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: at least 1 expected")
    if precision not in ("fp32", "bf16"):
        raise UsageError(f"--precision {precision}: fp32 or bf16 expected")


def begin(folder: Path, about: dict[str, Any]) -> int:
    """Makes the folder, or finds how far an interrupted run of the same work got: rows done."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        stored = json.loads((folder / ABOUT).read_text()) if (folder / ABOUT).is_file() else None
        if stored != about:
            different = [key for key in about if stored and stored.get(key) != about[key]]
            what = f"features of another {' and '.join(different)}" if different else "something else"
            raise UsageError(f"OUT {folder}: holds {what}; give a new folder")
        lines = (folder / ROWS).read_text().splitlines(keepends=True) if (folder / ROWS).is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        (folder / ROWS).write_text("".join(whole))
        return len(whole) if (folder / FEATURES).is_file() else 0
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return 0


def batched(images: Iterator[tuple[str, Any]], size: int) -> Iterator[list[tuple[str, Any]]]:
    """Lists of at most ``size``."""
    while batch := list(islice(images, size)):
        yield batch


@torch.inference_mode()
def embed_batch(
    encoder: VisionEncoder, batch: list[tuple[str, Any]], pool: str, layer: int | None, precision: str
) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Features float32 [N, D] or [N, I, D] of one batch (NaN where an image can't be read), and a note a row."""
    transform, device = image_transform(encoder), encoder.mean.device
    seen: list[Tensor] = []
    places, notes = [], []
    for place, (name, image) in enumerate(batch):
        try:
            seen.append(transform(decode_image(image)).to(device))
            places.append(place)
            notes.append({"image": name})
        except ImageError as error:
            notes.append({"image": name, "rejected": str(error)})
    width = encoder.config.width
    shape = (len(batch), width) if pool != "none" else (len(batch), encoder.config.patches, width)
    out = np.full(shape, np.nan, np.float32)
    if seen:
        images = torch.stack(seen) if encoder.config.image_size is not None else seen
        half = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with half:
            found = encoder.encode(images, None if layer is None else [layer], None if pool == "none" else pool)
        found = found[0] if layer is not None else found
        out[places] = (found if isinstance(found, Tensor) else torch.stack(found)).float().cpu().numpy()
    return out, notes


def fingerprint(encoder: VisionEncoder) -> str:
    """16 hex digits over the sums of the weights: tells one checkpoint from another without reading every byte twice."""
    digest = hashlib.sha256()
    for value in encoder.state_dict().values():
        digest.update(value.detach().float().sum(dtype=torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
