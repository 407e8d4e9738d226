"""Reads a state folder of PyTorch's distributed checkpoints (DCP) without running a pickle.

Its metadata are a pickle: only the plain classes that such metadata are made of are built, and files outside the folder are
refused. What is no tensor is read by PyTorch's own unpickler of plain values (``weights_only``).
"""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from aimv2.io import open_file
from aimv2.train.plain_state import plain_unpickler

ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),  # looks a name up
    "torch": ("Size",),
    "collections": ("OrderedDict",),
}
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


def path_class(module: str, name: str) -> Any:
    """A pure path in the place of any path; None for other names."""
    return pathlib.PurePath if module.partition(".")[0] == "pathlib" and name in PATHS else None


PlainUnpickler = plain_unpickler(ALLOWED, path_class)


class PlainReader(FileSystemReader):
    """Reads what a state folder holds, from files of the folder itself."""

    def __init__(self, folder: Path, tensors_of: str | None = None) -> None:
        """``tensors_of``: only tensors whose names begin so; nothing else is in the metadata, so nothing else can be requested."""
        super().__init__(folder)
        self.tensors_of = tensors_of

    def keeps(self, key: str, value: Any) -> bool:
        """Whether an entry of the metadata is read."""
        return self.tensors_of is None or (key.startswith(self.tensors_of) and isinstance(value, TensorStorageMetadata))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """
        Raises:
            pickle.UnpicklingError: metadata that name anything but plain classes.
        """
        with open_file(Path(self.path) / ".metadata") as file:
            found = PlainUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"{type(found).__name__} in the place of the metadata")
        kept = {key: value for key, value in found.state_dict_metadata.items() if self.keeps(key, value)}
        places = {index: place for index, place in found.storage_data.items() if is_own(index, place, kept)}
        planned = found.planner_data if len(kept) == len(found.state_dict_metadata) else None
        return Metadata(kept, planned, places, StorageMeta(load_id=self.load_id))


def is_own(index: Any, place: Any, kept: dict[str, Any]) -> bool:
    """Whether a piece of storage is of what is read, in a file of the folder itself, as it was written."""
    if not (isinstance(index, MetadataIndex) and isinstance(place, _StorageInfo) and index.fqn in kept):
        return False
    return Path(place.relative_path).name == place.relative_path and not place.transform_descriptors


class PlainPlanner(DefaultLoadPlanner):
    """Values that are no tensors are plain ones: numbers, text, lists, dictionaries."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
