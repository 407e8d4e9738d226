"""Features of a labelled data set, computed once: on disk where a folder is given, and checked to be this encoder's.

Legend: N images, I patches, D width.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from aimv2.data.images.decode import ImageError
from aimv2.data.prefetch import ahead, batched
from aimv2.errors import UsageError
from aimv2.features.contents import contents_of
from aimv2.features.frozen import LAST, Frozen
from aimv2.features.ragged import RaggedWriter, open_ragged
from aimv2.io import write_aside

if TYPE_CHECKING:
    from aimv2.data.images.labelled import Labelled

ABOUT = "about.json"
FLUSH = 20  # batches between two notes of how far it got
POOLS = ("mean", "attention", "none")


@dataclass
class Cached:
    """Features and labels of the images that could be read.

    Attributes:
        features: one array a layer: [N, D] float32 where patches are pooled, else [N, I, D] float16, memory-mapped; all
            patches at native: a :class:`aimv2.features.ragged.Ragged`.
        labels: int64 [N].
        keys: N names.
        rejected: ``{"key", "reason"}`` of the images that could not be read.
        home: holds the temporary folder, where there is no other.
    """

    features: list[Any]
    labels: np.ndarray
    keys: list[str]
    rejected: list[dict[str, str]]
    home: Any = field(default=None, repr=False)


def cached_features(
    frozen: Frozen,
    data: Labelled,
    layers: Sequence[str] = (LAST,),
    pool: str = "mean",
    folder: Path | None = None,
    batch_size: int = 64,
    flip: bool = False,
    contents: str | None = None,
) -> Cached:
    """The trunk runs once over all images; what ``folder`` holds already is read, an interrupted pass goes on.

    Args:
        frozen: the encoder.
        data: the images.
        layers: see :meth:`aimv2.features.frozen.Frozen.__call__`; all in one pass.
        pool: mean of the patches; attention: the model's pooling head (last layer alone); none: every patch.
        folder: of the cache; None: a temporary one.
        batch_size: images at once.
        flip: of the mirrored images.
        contents: what tells that the images are still the same; None: see :func:`aimv2.features.contents.contents_of`.

    Raises:
        UsageError: a cache of another model, data or view; no image could be read; values too large for float16.
    """
    home = tempfile.TemporaryDirectory() if folder is None else None
    root = Path(home.name) if home is not None else folder
    assert root is not None
    keys = hashlib.sha256("\n".join(data.keys).encode()).hexdigest()
    which = hashlib.sha256(f"{keys} {' '.join(layers)}".encode()).hexdigest()[:8]
    at = root / f"{data.split}-{pool}{'-flip' if flip else ''}-{which}"
    about = {
        "weights_sha256": weights_of(frozen),
        "image_size": frozen.image_size,
        "patches": list(frozen.range) if frozen.range else None,
        "layers": list(layers),
        "pool": pool,
        "precision": frozen.precision,
        "images": len(data.labels),
        "source": data.source if "://" in data.source else str(Path(data.source).expanduser().resolve()),
        "keys_sha256": keys,
        "contents_sha256": contents or contents_of(data),
    }
    state = _begin(at, about)
    if state["done"] < len(data.labels):
        _run(frozen, data, list(layers), pool, at, state, batch_size, flip)
    lost = {line["row"] for line in state["rejected"]}
    rows = np.array([row for row in range(len(data.labels)) if row not in lost], dtype=np.int64)
    if not len(rows):
        first = state["rejected"][0]
        raise UsageError(f"--data: no image could be read; {first['key']}: {first['reason']}")
    if frozen.range is not None and pool == "none":
        arrays: list[Any] = open_ragged(at, layers, frozen.width, len(rows))
    else:
        arrays = [np.load(at / f"{name}.npy", mmap_mode="r")[: len(rows)] for name in layers]
    if pool != "none":
        arrays = [np.array(array) for array in arrays]
    rejected = [{"key": line["key"], "reason": line["reason"]} for line in state["rejected"]]
    return Cached(arrays, data.labels[rows], [data.keys[row] for row in rows], rejected, home)


def seen(
    frozen: Frozen, data: Labelled, first: int = 0, size: int = 64
) -> Iterator[tuple[list[int], Any, list[dict[str, Any]]]]:
    """Test views of the images from row ``first`` on, decoded ahead.

    Returns:
        batches of (rows that could be read, their pixels uint8 [B, 3, H, W], at native a list of [3, H, W], or None where
        there are none, and ``{"row", "key", "reason"}`` of the others).
    """

    def read(row: int) -> tuple[int, np.ndarray | str]:
        try:
            return row, frozen.see(data.image(row))
        except ImageError as error:
            return row, str(error)

    for batch in batched(ahead(read, range(first, len(data.labels))), size):
        good = {row: pixels for row, pixels in batch if isinstance(pixels, np.ndarray)}
        lost = [{"row": row, "key": data.keys[row], "reason": why} for row, why in batch if isinstance(why, str)]
        if frozen.range is not None and good:
            yield list(good), [torch.from_numpy(pixels) for pixels in good.values()], lost
        else:
            yield list(good), torch.from_numpy(np.stack(list(good.values()))) if good else None, lost


def features_home(cache: str | None, home: Path, frozen: Frozen, name: str = "") -> Path:
    """Where an encoder's features lie: in a cache that several verbs share, by its weights, else below ``home``."""
    if cache is None:
        return home / "features" / name
    weights = frozen.sha256[:12] or weights_of(frozen)
    return Path(cache).expanduser() / f"{weights}-{frozen.image_size}-{frozen.precision}"


def weights_of(frozen: Frozen) -> str:
    """What makes an encoder: the hash of its weights; of raw pixels the patch, and which images it sees at native."""
    if frozen.sha256:
        return frozen.sha256
    sizes = f"-{frozen.range.low}-{frozen.range.high}" if frozen.range else ""
    return f"pixels-{math.isqrt(frozen.width // 3)}{sizes}"


def _begin(at: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The state of a cache folder; a fresh one where there is none.

    Raises:
        UsageError: it was made from something else.
    """
    file = at / ABOUT
    if file.is_file():
        stored = json.loads(file.read_text())
        different = [key for key in about if stored["about"].get(key) != about[key]]
        if different:
            name = different[0]
            if name not in stored["about"]:
                raise UsageError(f"--cache or --out: an earlier version made the feature cache {at}; give a new folder")
            if name == "contents_sha256":
                raise UsageError(
                    f"--cache or --out: the images have been replaced or changed since the feature cache {at} was made "
                    "(sizes and times of their files); give a new folder"
                )
            raise UsageError(
                f"--cache or --out: the feature cache {at} was made by another model or data ({name}: "
                f"{stored['about'].get(name)}, here {about[name]}); give a new folder"
            )
        return stored
    at.mkdir(parents=True, exist_ok=True)
    return {"about": about, "done": 0, "written": 0, "rejected": []}


def _run(
    frozen: Frozen,
    data: Labelled,
    layers: list[str],
    pool: str,
    at: Path,
    state: dict[str, Any],
    batch_size: int,
    flip: bool,
) -> None:
    """Fills the arrays from ``state["done"]`` on; rows of unreadable images are not written."""
    count = len(data.labels)
    arrays: list[Any] = []
    if frozen.range is not None and pool == "none":
        arrays = [RaggedWriter(at, layers, frozen.width, count, state["written"])]

    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"features, {data.split}", total=count, completed=state["done"])
        for number, (rows, pixels, lost) in enumerate(seen(frozen, data, state["done"], batch_size)):
            state["rejected"] += lost
            if pixels is not None:
                found = _features(frozen, pixels, layers, pool, flip)
                if arrays and isinstance(arrays[0], RaggedWriter):
                    arrays[0].append(found)
                else:
                    arrays = arrays or _open(at, layers, found, count)
                    for array, values in zip(arrays, found):
                        array[state["written"] : state["written"] + len(rows)] = values
            state["done"] += len(rows) + len(lost)
            state["written"] += len(rows)
            if number % FLUSH == FLUSH - 1 or state["done"] == count:
                for array in arrays:
                    array.flush()
                write_aside(at / ABOUT, json.dumps(state) + "\n")
            progress.advance(task, len(rows) + len(lost))


def _features(frozen: Frozen, images: Any, layers: list[str], pool: str, flip: bool) -> list[Any]:
    """[B, D] float32 or [B, I, D] float16 a layer; of all patches at native a list of B float16 [I, D]."""
    if frozen.range is None:
        found: list[Any] = frozen(images.flip(-1) if flip else images, layers)
    else:
        found = frozen.each([image.flip(-1) if flip else image for image in images], layers)
        if pool == "none":
            return [[_half(x.cpu().numpy()) for x in layer] for layer in found]
    if pool == "attention":
        head = frozen.head
        if head is None or layers != [LAST]:
            raise UsageError(f"--pool attention: {frozen.name} has no pooling head behind these layers; --pool mean")
        with torch.inference_mode():
            found = [torch.cat([head(x[None]) for x in found[0]]) if frozen.range else head(found[0])]
        if found[0].ndim != 2:
            raise UsageError(f"--pool attention: the head of {frozen.name} does not pool its patches; --pool mean")
    elif pool == "mean":
        found = [torch.stack([x.mean(0) for x in layer]) if frozen.range else layer.mean(1) for layer in found]
    arrays = [x.float().cpu().numpy() for x in found]
    return arrays if pool != "none" else [_half(array) for array in arrays]


def _half(values: np.ndarray) -> np.ndarray:
    """As float16. Raises UsageError where it does not hold a value."""
    with np.errstate(over="ignore"):  # said below
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise UsageError(
            "--features cached: a feature is larger than float16 holds; --features augmented, or --layers last"
        )
    return half


def _open(at: Path, layers: list[str], found: list[np.ndarray], count: int) -> list[np.ndarray]:
    """The files of the arrays, made or opened again."""
    opened: list[np.ndarray] = []
    for name, values in zip(layers, found):
        file = at / f"{name}.npy"
        if file.is_file():
            opened.append(np.lib.format.open_memmap(file, mode="r+"))
        else:
            shape = (count, *values.shape[1:])
            opened.append(np.lib.format.open_memmap(file, mode="w+", dtype=values.dtype, shape=shape))
    return opened
