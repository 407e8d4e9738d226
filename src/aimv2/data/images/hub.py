"""Labelled images that the library `datasets` reads: from the hub, saved to disk, or a folder of Parquet."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aimv2.data.images.columns import find_column
from aimv2.data.images.entries import first_line
from aimv2.data.images.forms import SPLITS, Form, Listed, number_labels, wrong
from aimv2.data.images.readers import TableImages
from aimv2.data.images.tables import encoded_images, hub_library, types_of
from aimv2.errors import UsageError


def saved_form(root: Path, source: str) -> Form | None:
    """A folder that ``save_to_disk`` wrote, or one of Parquet files (of which `datasets` makes a copy in its cache)."""
    saved = any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if not saved and not any(next(root.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet")):
        return None
    import datasets

    try:
        return _form((datasets.load_from_disk if saved else datasets.load_dataset)(str(root)), source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UsageError):
            raise
        raise wrong(source, f"`datasets` can't load it: {first_line(error)}") from None


def hub_form(path: Path, source: str) -> Form:
    """A data set of the hub, downloaded by `datasets` into its own cache.

    Raises:
        UsageError: no such data set, or the hub can't be reached.
    """
    with hub_library(source, "--data") as datasets:
        tables = datasets.load_dataset(source)
    return _form(tables, source)


def _form(tables: Any, source: str) -> Form:
    parts = tables if isinstance(tables, dict) else {tables.split or "train": tables}
    found = {split: rows for name, rows in parts.items() if (split := SPLITS.get(str(name).lower()))}
    if not found:
        raise wrong(source, f"has the splits {', '.join(map(str, parts))}; train, validation or test expected")
    labelled = {split: rows for split, rows in found.items() if not _is_unlabelled(rows)}  # ImageNet's test, for one
    found = labelled or found
    return Form("`datasets`", {split: partial(_list_rows, found, split, source) for split in found})


def _column(rows: Any, kind: str) -> str | None:
    return find_column(rows.column_names, kind, types_of(rows))


def _values(rows: Any, column: str) -> list[Any]:
    return rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()


def _is_unlabelled(rows: Any) -> bool:
    label = _column(rows, "label")
    return label is None or all(value in (-1, None) for value in _values(rows, label))


def _list_rows(parts: dict[str, Any], split: str, source: str) -> Listed:
    rows = parts[split]
    image, label = _column(rows, "image"), _column(rows, "label")
    if image is None or label is None:
        lacks = "labels" if image is not None else "images"
        raise wrong(source, f"no column of {lacks} among {', '.join(rows.column_names)}; image and label expected")
    values = _values(rows, label)
    classes = getattr(rows.features[label], "names", None)
    if any(isinstance(value, str) for value in values):
        words = ["" if value is None else str(value) for value in values]
        train = words if "train" not in parts else [str(value or "") for value in _values(parts["train"], label)]
        labels, classes = number_labels(words, train, None, source)
    else:
        labels = np.array([-1 if value is None else value for value in values], np.int64)
    keys = [f"{split}-{row:08d}" for row in range(len(rows))]
    images = TableImages(encoded_images(rows, image).select_columns([image]), image)
    return Listed(keys, labels, tuple(classes) if classes else None, images)
