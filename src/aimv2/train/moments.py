"""AdamW's moments out of the state folder of another run, without running a pickle.

Only ``--resume`` trusts a state folder, that of its own run. Here the folder may be anybody's: of DCP's metadata, which is
a pickle, only the plain classes that such metadata are made of are built, and only tensors are read.
"""

from __future__ import annotations

import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from aimv2.distributed import World
from aimv2.train.checkpoint import any_failed

PREFIX = "optim.state."
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


class PlainUnpickler(pickle.Unpickler):
    """Builds what DCP's metadata are made of, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name in PATHS:
            return pathlib.PurePath
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the metadata of a checkpoint")


class MomentsReader(FileSystemReader):
    """Reads the tensors of the optimizer's state; nothing else is in its metadata, so nothing else can be requested."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = PlainUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"{type(found).__name__} in the place of the metadata")
        tensors: dict[str, Any] = {
            key: value
            for key, value in found.state_dict_metadata.items()
            if key.startswith(PREFIX) and isinstance(value, TensorStorageMetadata)
        }
        places = {index: place for index, place in found.storage_data.items() if _is_tensor_in(index, place, tensors)}
        return Metadata(tensors, None, places, StorageMeta(load_id=self.load_id))


def _is_tensor_in(index: Any, place: Any, tensors: dict[str, Any]) -> bool:
    """Whether a piece of storage is one of these tensors, in a file of the folder itself, as it was written."""
    if not (isinstance(index, MetadataIndex) and isinstance(place, _StorageInfo) and index.fqn in tensors):
        return False
    return Path(place.relative_path).name == place.relative_path and not place.transform_descriptors


def take_moments(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> str | None:
    """Fills the optimizer with the moments and step counts of a checkpoint; all ranks or none.

    Args:
        folder: ``state`` of a checkpoint.
        model, optimizer: sharded or not, before the first step.
        world: the ranks.

    Returns:
        None, or why it could not be; the optimizer is as new then.
    """
    state = get_optimizer_state_dict(model, optimizer)
    wanted = {"optim": {"state": state["state"]}}
    why = misfit(folder, state["state"])
    if not any_failed(why, world):
        try:
            dcp.load(wanted, storage_reader=MomentsReader(folder))
        except (Exception, CheckpointException):  # whatever a file that is none of ours makes of it
            why = "it can't be read"
    if any_failed(why, world):
        optimizer.state.clear()
        return why or "another rank could not read it"
    filled = {"state": wanted["optim"]["state"], "param_groups": state["param_groups"]}
    set_optimizer_state_dict(model, optimizer, filled)
    return None


def misfit(folder: Path, state: Any) -> str | None:
    """Why a state folder can't serve an optimizer's state {parameter: {name: tensor}}; None where it can."""
    if not (folder / ".metadata").is_file():
        return "there is no state folder"
    try:
        known = MomentsReader(folder).read_metadata().state_dict_metadata
        sizes = {key: tuple(value.size) for key, value in known.items()}  # type: ignore[union-attr]
    except Exception as error:  # a file that is none of ours may hold anything
        return f"its metadata are not DCP's: {' '.join(str(error).split())[:120]}"
    for parameter, values in state.items():
        for name, value in values.items():
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if sizes.get(f"{PREFIX}{parameter}.{name}") != shape:
                return f"it has no {name} of {parameter} with shape {list(shape)}"
    return None
