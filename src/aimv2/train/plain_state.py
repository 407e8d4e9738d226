"""A rank's state without a pickle: tagged JSON, and its tensors in safetensors.

The position in the data consists of energon's state classes; :data:`CLASSES` is the closed table of those that occur. Files of earlier
versions are pickles; they are read by an unpickler that builds these classes and tensors, and nothing else.

Tags: ``["t", [...]]`` a tuple, ``["l", [...]]`` a list, ``["b", base64]`` bytes, ``["d", [[key, value], ...]]`` a dictionary,
``["x", name]`` a tensor, ``["a", dtype, shape, base64]`` an array, ``["c", class, fields]`` a class of the table; all else is itself.
"""

from __future__ import annotations

import base64
import importlib
import json
import pickle
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aimv2.io import parse_json, read_file, regular

CLASSES = {
    "SavableDataLoaderState": "megatron.energon.savable_loader",
    "SavableDatasetState": "megatron.energon.savable_loader",
    "SavableDatasetCheckpoint": "megatron.energon.savable_loader",
    "FlexState": "megatron.energon.state",
    "SliceState": "megatron.energon.flavors.webdataset.sample_loader",
    "SystemRngState": "megatron.energon.rng",
}
FORMAT = "aimv2 rank state 1"
DEEPEST = 100
TENSORS: dict[str, tuple[str, ...]] = {  # what a pickled tensor needs
    "torch._utils": ("_rebuild_tensor_v2",),
    "torch": ("Size", "device"),
    "collections": ("OrderedDict",),
    "_codecs": ("encode",),  # bytes, in pickles of protocol 2
}


def class_of(name: str) -> Any:
    """A class of the table.

    Raises:
        ValueError: it is not in the table.
    """
    if name not in CLASSES:
        raise ValueError(f"the class {name[:80]} has no place in the state of a rank")
    return getattr(importlib.import_module(CLASSES[name]), name)


def encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """As JSON; tensors go to ``tensors``.

    Raises:
        TypeError: a value of another type.
    """

    def inner(part: Any) -> Any:
        return encoded(part, tensors)

    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (tuple, list):
        return ["t" if kind is tuple else "l", [inner(part) for part in value]]
    if kind is bytes:
        return ["b", base64.b64encode(value).decode()]
    if kind is Tensor:
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return ["x", name]
    if kind is np.ndarray and value.dtype.kind in "biuf":
        return ["a", value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]
    if kind is dict:
        return ["d", [[inner(key), inner(part)] for key, part in value.items()]]
    if CLASSES.get(kind.__name__) == kind.__module__:
        if isinstance(value, dict):
            fields: Any = ["d", [[inner(key), inner(part)] for key, part in value.items()]]
        elif isinstance(value, tuple):
            fields = ["t", [inner(part) for part in value]]
        else:
            fields = ["d", [[name, inner(getattr(value, name))] for name in value.__dataclass_fields__]]
        return ["c", kind.__name__, fields]
    raise TypeError(f"{kind.__module__}.{kind.__name__} has no place in the state of a rank")


def decoded(value: Any, tensors: dict[str, Tensor], deep: int = 0) -> Any:
    """The value that :func:`encoded` turned into JSON.

    Raises:
        ValueError: none of its forms, a class that is not in the table, a tensor that is not there.
    """

    def inner(part: Any) -> Any:
        return decoded(part, tensors, deep + 1)

    if deep > DEEPEST:
        raise ValueError("nested too deeply")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    tag, *rest = value if isinstance(value, list) and value else (None,)
    if tag in ("t", "l") and len(rest) == 1 and isinstance(rest[0], list):
        return (tuple if tag == "t" else list)(inner(part) for part in rest[0])
    if tag == "b" and len(rest) == 1 and isinstance(rest[0], str):
        return base64.b64decode(rest[0], validate=True)
    if tag == "d" and len(rest) == 1 and isinstance(rest[0], list):
        return {inner(key): inner(part) for key, part in rest[0]}
    if tag == "x" and len(rest) == 1 and rest[0] in tensors:
        return tensors[rest[0]]
    if tag == "a" and len(rest) == 3 and str(rest[0])[1:2] in ("b", "i", "u", "f"):
        flat = np.frombuffer(base64.b64decode(rest[2], validate=True), dtype=np.dtype(rest[0]))
        return flat.reshape(rest[1]).copy()
    if tag == "c" and len(rest) == 2 and isinstance(rest[0], str):
        return built(class_of(rest[0]), inner(rest[1]))
    raise ValueError("not the state of a rank")


def built(kind: Any, fields: Any) -> Any:
    """An object of a class of the table, with these fields; nothing of the class runs but its own creation."""
    if issubclass(kind, dict):
        return kind(fields)
    if issubclass(kind, tuple):
        return kind(*fields)
    made = kind.__new__(kind)
    if set(fields) != set(kind.__dataclass_fields__):
        raise ValueError(f"{kind.__name__} has other fields")
    for key, part in fields.items():
        object.__setattr__(made, key, part)
    return made


def write_state(stem: Path, value: Any) -> None:
    """Writes ``STEM.json`` and, where there are tensors, ``STEM.safetensors``."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "state": encoded(value, tensors)}, separators=(",", ":"), allow_nan=True)
    if tensors:
        save_file(tensors, stem.with_name(f"{stem.name}.safetensors"))
    stem.with_name(f"{stem.name}.json").write_text(text, encoding="utf-8")


def read_state(stem: Path) -> Any:
    """What :func:`write_state` wrote, or an earlier version's ``STEM.pt``.

    Raises:
        ValueError, OSError: files that can't be read, or hold something else.
    """
    file, old = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.pt")
    if not file.is_file() and old.is_file():
        return read_pickled(old)
    about = parse_json(read_file(file))
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{file.name} is not the state of a rank")
    held = stem.with_name(f"{stem.name}.safetensors")
    return decoded(about["state"], load_file(regular(held)) if held.is_file() else {})


def read_pickled(file: Path) -> Any:
    """The state that earlier versions wrote with ``torch.save``, by :func:`plain_unpickler`.

    Raises:
        ValueError: it names anything else, or is no such file.
    """
    try:
        with zipfile.ZipFile(regular(file)) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                raise ValueError(f"{file.name} is a TorchScript archive")
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=plain_pickle(table()))
    except ValueError:
        raise
    except Exception as error:  # a broken or planted file may raise anything
        raise ValueError(f"{file.name}: {' '.join(str(error).split())[:200]}") from None


def table() -> dict[str, tuple[str, ...]]:
    """Names that the pickled state of a rank may hold, by module."""
    found = dict(TENSORS)
    for name, module in CLASSES.items():
        found[module] = (*found.get(module, ()), name)
    return found


def plain_unpickler(
    allowed: dict[str, tuple[str, ...]], more: Callable[[str, str], Any] | None = None
) -> type[pickle.Unpickler]:
    """An unpickler that builds dtypes, storages and the names of a table, and refuses all others by name.

    Args:
        allowed: names by module.
        more: (module, name) -> what stands for it, or None.
    """

    class PlainUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if more is not None and (found := more(module, name)) is not None:
                return found
            if name in allowed.get(module, ()):
                return super().find_class(module, name)
            kind = getattr(torch, name, None) if module == "torch" else None
            if isinstance(kind, torch.dtype) or (name.endswith("Storage") and isinstance(kind, type)):
                return kind
            raise pickle.UnpicklingError(f"{module}.{name} has no place in the state of a run")

    return PlainUnpickler


def plain_pickle(allowed: dict[str, tuple[str, ...]]) -> Any:
    """A stand-in for the module ``pickle`` that ``torch.load`` takes."""
    module, unpickler = types.ModuleType("plain_pickle"), plain_unpickler(allowed)
    module.Unpickler = unpickler  # type: ignore[attr-defined]
    module.load = lambda file, **options: unpickler(file, **options).load()  # type: ignore[attr-defined]
    return module
