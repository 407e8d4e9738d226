"""Features of a labelled data set, computed once: in a store where a folder is given, else in a temporary one.

Legend: N images, I patches, D width.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aimv2.data.images.decode import ImageError
from aimv2.data.images.readers import contents_of_rows
from aimv2.data.prefetch import batched, prefetch_map
from aimv2.errors import UsageError
from aimv2.features.fingerprint import fingerprint
from aimv2.features.frozen import LAST, Frozen
from aimv2.features.ragged import RaggedWriter, open_ragged
from aimv2.features.store import FeatureStore, check_notes
from aimv2.progress import progress_bar, tracked

if TYPE_CHECKING:
    from aimv2.data.images.labelled import Labelled

OPTION = "--cache or --out"
PART_BATCHES = 20  # batches a part
POOLS = ("mean", "attention", "none")


@dataclass
class Cached:
    """Features and labels of the images that could be read.

    Attributes:
        features: one array a layer: [N, D] float32 where patches are pooled, else [N, I, D] float16, memory-mapped; all
            patches at native: a :class:`aimv2.features.ragged.Ragged`.
        labels: int64 [N].
        keys: N names.
        rejected: ``{"key", "reason"}`` of each image that could not be read.
        home: keeps the temporary folder, where there is one.
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
    """Runs the trunk once over all images; what ``folder`` holds already is read, an interrupted pass is continued.

    Args:
        frozen: the encoder.
        data: the images.
        layers: see :meth:`aimv2.features.frozen.Frozen.__call__`; all in one pass.
        pool: mean of the patches; attention: the model's pooling head (last layer only); none: every patch.
        folder: of the stores; None: a temporary one.
        batch_size: images at once.
        flip: mirror the images.
        contents: content identity of the images; None: that of ``data``.

    Raises:
        UsageError: a store of another model, data or view; no image could be read; values too large for float16.
    """
    home = tempfile.TemporaryDirectory() if folder is None else None
    root = Path(home.name) if home is not None else folder
    assert root is not None
    count, keys = len(data.labels), hashlib.sha256("\n".join(data.keys).encode()).hexdigest()
    which = hashlib.sha256(f"{keys} {' '.join(layers)}".encode()).hexdigest()[:8]
    images = {
        "split": data.split,
        "source": data.source if "://" in data.source else str(Path(data.source).expanduser().resolve()),
        "images": count,
        "keys_sha256": keys,
        "contents_sha256": contents or contents_of_rows(data.image, np.arange(count)),
    }
    store = FeatureStore(
        root / f"{data.split}-{pool}{'-flip' if flip else ''}-{which}",
        fingerprint(frozen.fingerprint(), frozen.view(flip), layers, pool, images),
        OPTION,
        noted={"part_images": batch_size * PART_BATCHES},
    )
    notes = fill(store, frozen, data, list(layers), pool, batch_size, flip)
    rejected = check_notes(store, notes)
    lost = {line["row"] for line in rejected}
    rows = np.array([row for row in range(count) if row not in lost], dtype=np.int64)
    if not len(rows):
        raise UsageError(
            f"--data: no image could be read; {rejected[0]['key']}: {rejected[0]['reason']}", code="unreadable"
        )
    if frozen.range is not None and pool == "none":
        arrays: list[Any] = open_ragged(store.folder, layers, frozen.width, len(rows))
    else:
        arrays = [store.read_array(name, count) for name in layers]
        if pool != "none":
            arrays = [array[rows] for array in arrays]
        elif lost:
            arrays = [SelectedRows(array, rows) for array in arrays]
    rejected = [{"key": line["key"], "reason": line["reason"]} for line in rejected]
    return Cached(arrays, data.labels[rows], [data.keys[row] for row in rows], rejected, home)


class SelectedRows:
    """Some rows of a memory-mapped array, read when they are indexed."""

    def __init__(self, array: np.ndarray, rows: np.ndarray) -> None:
        self.array, self.rows, self.shape = array, rows, (len(rows), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.array[self.rows[index]]


View = tuple[int, np.ndarray | str]  # row of an image, and its test view [3, H, W] or why it can't be read


def _views(frozen: Frozen, data: Labelled, rows: Iterable[int]) -> Iterator[View]:
    """Test views of some rows, in order, decoded in threads."""

    def read(row: int) -> View:
        try:
            return row, frozen.see(data.image(row))
        except ImageError as error:
            return row, str(error)

    return prefetch_map(read, rows)


def _stacked(frozen: Frozen, data: Labelled, views: Sequence[View]) -> tuple[list[int], Any, list[dict[str, Any]]]:
    """Rows that could be read, their pixels, and ``{"row", "key", "reason"}`` of the others; see :func:`view_batches`."""
    good = {row: pixels for row, pixels in views if isinstance(pixels, np.ndarray)}
    lost = [{"row": row, "key": data.keys[row], "reason": why} for row, why in views if isinstance(why, str)]
    if frozen.range is not None and good:
        return list(good), [torch.from_numpy(pixels) for pixels in good.values()], lost
    return list(good), torch.from_numpy(np.stack(list(good.values()))) if good else None, lost


def view_batches(
    frozen: Frozen, data: Labelled, size: int = 64
) -> Iterator[tuple[list[int], Any, list[dict[str, Any]]]]:
    """Test views of all images, batch by batch.

    Returns:
        batches of (rows that could be read, their pixels uint8 [B, 3, H, W], at native a list of [3, H, W], or None where
        there are none, and ``{"row", "key", "reason"}`` of the others).
    """
    count = len(data.labels)
    views = tracked(_views(frozen, data, range(count)), f"images, {data.split}", count)
    return (_stacked(frozen, data, batch) for batch in batched(views, size))


def features_home(cache: str | None, home: Path, frozen: Frozen, name: str = "") -> Path:
    """Folder of an encoder's stores: by its weights in a cache that several commands use, else below ``home``."""
    if cache is None:
        return home / "features" / name
    weights = frozen.sha256[:12] or frozen.weights_sha256
    return Path(cache).expanduser() / f"{weights}-{frozen.image_size}-{frozen.precision}"


def fill(
    store: FeatureStore,
    frozen: Frozen,
    data: Labelled,
    layers: list[str],
    pool: str,
    batch_size: int,
    flip: bool = False,
    extra: Callable[[list[int], list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Computes this rank's missing parts of a store; its description says how many images a part has (``part_images``).

    Args:
        store, frozen, data, layers, pool, batch_size, flip: see :func:`cached_features`.
        extra: further entries of a part's note, by its rows and its rejected images.

    Returns:
        the notes of all parts: ``rows`` (their number), and ``rejected``, ``{"row", "key", "reason"}`` of the others.
    """
    count, size = len(data.labels), int(store.about["part_images"])
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    missing, ragged = store.missing(len(parts)), None
    if (
        missing and frozen.range is not None and pool == "none"
    ):  # appended: all after the first missing part is done again
        missing = list(range(missing[0], len(parts)))
        for part in missing:
            store.note_file(part).unlink(missing_ok=True)
        written = sum(note["rows"] for note in store.gather(missing[0]))
        ragged = RaggedWriter(store.folder, layers, frozen.width, count, written)
    files: list[Any] = [] if ragged is None else [ragged]
    views = _views(frozen, data, chain.from_iterable(parts[part] for part in missing))
    total = sum(len(parts[part]) for part in missing)
    with progress_bar(f"features, {data.split}", total) as advance:
        for part in missing:
            good, rejected = list[int](), list[dict[str, Any]]()
            for batch in batched(islice(views, len(parts[part])), batch_size):
                rows, pixels, lost = _stacked(frozen, data, batch)
                if pixels is not None:
                    found = _features(frozen, pixels, layers, pool, flip, store.option)
                    if ragged is not None:
                        ragged.append(found)
                    else:
                        files = files or [
                            store.array(name, values.dtype, (count, *values.shape[1:]))
                            for name, values in zip(layers, found)
                        ]
                        for array, values in zip(files, found):
                            array[rows] = values
                good, rejected = good + rows, rejected + lost
                advance(len(batch))
            note = {"rows": len(good), "rejected": rejected, **(extra(good, rejected) if extra else {})}
            for file in files:
                file.flush()
            store.commit(part, note)
    return store.gather(len(parts))


def _features(frozen: Frozen, images: Any, layers: list[str], pool: str, flip: bool, option: str) -> list[Any]:
    """[B, D] float32 or [B, I, D] float16 a layer; of all patches at native a list of B float16 [I, D]."""
    if frozen.range is None:
        found: list[Any] = frozen(images.flip(-1) if flip else images, layers)
    else:
        found = frozen.each([image.flip(-1) if flip else image for image in images], layers)
        if pool == "none":
            return [[_half(x.cpu().numpy(), option) for x in layer] for layer in found]
    if pool == "attention":
        head = frozen.head
        if head is None or layers != [LAST]:
            raise UsageError(
                f"--pool attention: {frozen.name} has no pooling head after these layers; --pool mean", code="missing"
            )
        with torch.inference_mode():
            found = [torch.cat([head(x[None]) for x in found[0]]) if frozen.range else head(found[0])]
        if found[0].ndim != 2:
            raise UsageError(f"--pool attention: the head of {frozen.name} does not pool its patches; --pool mean")
    elif pool == "mean":
        found = [torch.stack([x.mean(0) for x in layer]) if frozen.range else layer.mean(1) for layer in found]
    arrays = [x.float().cpu().numpy() for x in found]
    return arrays if pool != "none" else [_half(array, option) for array in arrays]


def _half(values: np.ndarray, option: str) -> np.ndarray:
    """As float16. Raises UsageError for a value beyond its range."""
    with np.errstate(over="ignore"):  # reported below
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise UsageError(
            f"{option}: a feature is larger than float16 holds; choose other layers, or do not store features "
            "(--features augmented; no data.features)",
            option=option if option.startswith("data.") else "--features",
            code="limit",
        )
    return half
