"""Labelled images that the library `datasets` reads: from the hub, saved to disk, or a folder of Parquet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.images.forms import LABEL_COLUMNS, SPLITS, Form, Listed, number_labels, wrong
from aimv2.data.images.sources import IMAGE_COLUMNS
from aimv2.errors import UsageError
from aimv2.interop.hub import unreachable


@dataclass(frozen=True)
class TableImages:
    """Images of a column of a `datasets.Dataset` that leaves them encoded."""

    rows: Any
    column: str

    def __call__(self, row: int) -> Image.Image:
        cell = self.rows[row][self.column]
        if isinstance(cell, dict):  # {"bytes", "path"}, either of them None
            cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
        if not cell:
            raise ImageError("no image in its row")
        return decode_image(Path(cell) if isinstance(cell, str) else cell)


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
        raise wrong(source, f"`datasets` can't load it: {_first_line(error)}") from None


def hub_form(source: str) -> Form:
    """A data set of the hub, downloaded by `datasets` into its own cache.

    Raises:
        UsageError: no such data set, or the hub can't be reached.
    """
    import datasets

    was_offline, why = datasets.config.HF_HUB_OFFLINE, unreachable()
    try:
        # offline, `datasets` looks into its cache at once; it would first retry for half a minute
        datasets.config.HF_HUB_OFFLINE = was_offline or bool(why)
        tables = datasets.load_dataset(source)
    except Exception as error:  # network, missing repository, configurations, scripts: `datasets` raises anything
        words = f"the hub can't be reached ({why})" if why else f"the hub gives no such data set: {_first_line(error)}"
        raise wrong(source, f"no path here, and {words}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    return _form(tables, source)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _form(tables: Any, source: str) -> Form:
    parts = tables if isinstance(tables, dict) else {tables.split or "train": tables}
    found = {split: rows for name, rows in parts.items() if (split := SPLITS.get(str(name).lower()))}
    if not found:
        raise wrong(source, f"has the splits {', '.join(map(str, parts))}; train, validation or test expected")
    labelled = {split: rows for split, rows in found.items() if not _is_unlabelled(rows)}  # ImageNet's test, for one
    found = labelled or found
    return Form("`datasets`", {split: partial(_list_rows, found, split, source) for split in found})


def _column(rows: Any, kind: type, names: tuple[str, ...]) -> str | None:
    """The column of this feature, else of one of these names."""
    typed = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    named = [name for name in names if name in rows.column_names]
    return next((name for name in named if name in typed or not typed), typed[0] if len(typed) == 1 else None)


def _label_column(rows: Any) -> str | None:
    import datasets

    return _column(rows, datasets.ClassLabel, LABEL_COLUMNS)


def _values(rows: Any, column: str) -> list[Any]:
    return rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()


def _is_unlabelled(rows: Any) -> bool:
    label = _label_column(rows)
    return label is None or all(value in (-1, None) for value in _values(rows, label))


def _list_rows(parts: dict[str, Any], split: str, source: str) -> Listed:
    import datasets

    rows = parts[split]
    image, label = _column(rows, datasets.Image, IMAGE_COLUMNS), _label_column(rows)
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
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    keys = [f"{split}-{row:08d}" for row in range(len(rows))]
    return Listed(keys, labels, tuple(classes) if classes else None, TableImages(rows.select_columns([image]), image))
