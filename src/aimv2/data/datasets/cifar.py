"""CIFAR-10 and CIFAR-100 as their authors pickled them for Python; read by an unpickler that builds numeric arrays only."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aimv2.data.images.forms import Form, Listed, wrong
from aimv2.data.images.readers import ImageArrays
from aimv2.errors import UsageError
from aimv2.io import open_file

_BATCHES = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
    "cifar100": ("cifar-100-python", ["train"], ["test"]),
}
_META = {"cifar10": ("batches.meta", "label_names"), "cifar100": ("meta", "fine_label_names")}
_SIDE = 32


def cifar(root: Path, source: str) -> Form | None:
    """The Python version of CIFAR-10 and CIFAR-100, its folder or the one around it."""
    found = {}
    for name, (inner, train, test) in _BATCHES.items():
        homes = [folder for folder in (root, root / inner) if (folder / _META[name][0]).is_file()]
        if homes:
            found[name] = (homes[0], train, test)
    if len(found) > 1:
        inner_names = " and ".join(_BATCHES[name][0] for name in found)
        raise wrong(source, f"holds {inner_names}; give one of them")
    for name, (folder, train, test) in found.items():
        batches = {"train": train, "test": test}
        return Form(
            "CIFAR pickles",
            {split: partial(_list_cifar, folder, name, files, source) for split, files in batches.items()},
            name,
        )
    return None


def _list_cifar(folder: Path, name: str, files: list[str], source: str) -> Listed:
    meta, names_key = _META[name]
    keys, labels, arrays = list[str](), list[int](), list[Any]()
    for file in files:
        batch = load_pickle(folder / file)
        pixels: Any = batch.get("data")
        numbers: Any = batch.get("fine_labels", batch.get("labels"))
        whole = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and isinstance(numbers, list)
        if not whole or pixels.shape != (len(numbers), 3 * _SIDE * _SIDE):
            raise wrong(source, f"{file} is not a CIFAR batch: data [N, 3072] of bytes and N labels expected")
        arrays.append(pixels)
        labels += numbers
        keys += [f"{file}-{row:05d}" for row in range(len(numbers))]
    classes = tuple(_text(one) for one in load_pickle(folder / meta).get(names_key, ()))
    pixels = np.concatenate(arrays).reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return Listed(keys, np.array(labels, np.int64), classes, ImageArrays(np.ascontiguousarray(pixels)))


def load_pickle(path: Path) -> dict[str, Any]:
    """A pickled dictionary of numbers, text, lists and numeric arrays; nothing else is let in.

    Args:
        path: written by Python 2 or 3.

    Returns:
        Its keys as text.

    Raises:
        UsageError: missing, broken, or it needs anything that such a dictionary does not need.
    """
    try:
        with open_file(path) as file:
            value = _Arrays(file, encoding="bytes").load()
    except OSError as error:
        raise UsageError(f"--data {path}: cannot be read: {error.strerror or error}", code="unreadable") from None
    except Exception as error:  # a broken or planted pickle may raise anything
        raise UsageError(f"--data {path}: not a pickle of CIFAR ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(value, dict):
        raise UsageError(f"--data {path}: not a pickle of CIFAR (a {type(value).__name__}, a dictionary expected)")
    return {_text(key): entry for key, entry in value.items()}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _ArrayKind:
    """Stands for ``numpy.ndarray`` in a pickle, where it is an argument only."""


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """As numpy's ``_reconstruct``: an array that the pickle's state fills."""
    return np.empty(0, np.uint8)


def _filled_array(data: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """As numpy's ``_frombuffer``, of pickles of protocol 5."""
    return np.frombuffer(data, dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _number_kind(code: Any, align: bool = False, copy: bool = False) -> np.dtype:
    """A numeric dtype; a copy, since the pickle's state is written into it."""
    if not re.fullmatch(r"[|<>=]?[buif][1248]", _text(code)):
        raise pickle.UnpicklingError(f"refused: arrays of {_text(code)}")
    return np.dtype(_text(code), False, True)


class _Arrays(pickle.Unpickler):
    """Builds numeric arrays with functions of ours; every other global of a pickle is refused by name."""

    allowed: Mapping[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _ArrayKind,
        ("numpy", "dtype"): _number_kind,
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("numpy._core.multiarray", "_reconstruct"): _empty_array,
        ("numpy.core.numeric", "_frombuffer"): _filled_array,
        ("numpy._core.numeric", "_frombuffer"): _filled_array,
    }

    def find_class(self, module: str, name: str) -> Any:
        if found := self.allowed.get((module, name)):
            return found
        raise pickle.UnpicklingError(f"refused: it needs {module}.{name}")
