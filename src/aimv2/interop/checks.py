"""Models of others, looked at before they are built: adapters, sizes that the weights lack, weights that are no numbers."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aimv2.errors import UsageError
from aimv2.interop.hub import INDEX, indexed_files
from aimv2.interop.model_folder import CONFIG
from aimv2.interop.shapes import read_json
from aimv2.io import regular

ATTENTION = ("eager", "sdpa", "flex_attention")  # PyTorch's own
# the packages without which transformers fetches a kernel
FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
COUNTS = re.compile(r"depth|(.*_)?(layers?|blocks|stages|experts)")  # of parts; what else is a whole number is a size
UNBUILT = re.compile(r".*(token|_id|position|max|length|window|seed|theta|steps).*")  # numbers that no tensor follows


def check_sizes(where: str, folder: Path, files: Iterable[Path] | None = None) -> None:
    """Compares the numbers of a configuration with its weights, by their headers, before anything of that size is built.

    Args:
        where: what is opened, for the message.
        folder: of ``config.json``.
        files: the weights, in safetensors; by default those of the folder.

    Raises:
        UsageError: more blocks than the files have tensors (from 1,000 on), or a size above all their values (from a million on).
    """
    numbers = dict(_numbers(read_json(folder / CONFIG), 0))
    if max(numbers.values(), default=0) <= 1000:
        return
    tensors = values = 0
    for file in sorted(folder.glob("*.safetensors")) if files is None else files:
        try:
            with safe_open(regular(file), "pt") as handle:
                shapes = [handle.get_slice(key).get_shape() for key in handle.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file} can't be read as safetensors: {error}", code="unreadable") from None
        tensors, values = tensors + len(shapes), values + sum(map(math.prod, shapes))
    for key, number in numbers.items():
        counts = COUNTS.fullmatch(key) is not None
        most = max(tensors, 1000) if counts else max(values, 1_000_000)
        if number > most and not UNBUILT.fullmatch(key):
            there = f"{tensors:,} tensors" if counts else f"{values:,} values"
            raise UsageError(
                f"{where}: {key} {number} in {CONFIG}, but the weights hold {there} in all",
                code="mismatch",
            )


def _numbers(stored: Any, depth: int) -> Iterator[tuple[str, int]]:
    """(key, whole number) in a configuration, of lists each; the largest of a key comes last."""
    found = list[tuple[str, int]]()
    for key, value in stored.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict) and depth < 10:
                found += _numbers(one, depth + 1)
            elif isinstance(one, int) and not isinstance(one, bool):
                found.append((key, one))
    yield from sorted(found, key=lambda one: one[1])


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises UsageError for weights that are NaN or infinite; their sum tells, which is quick."""
    if tensor.is_meta or not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return
    if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
        raise UsageError(f"{what} holds {bad} values that are NaN or infinite", code="non-finite")


def check_state(state: dict[str, Tensor], where: str, skip: Iterable[str] = ()) -> None:
    """:func:`check_finite` of all tensors of a model but those of ``skip``."""
    for name, tensor in state.items():
        if name not in skip:
            check_finite(tensor, f"{where}: {name}")


def refuse_adapters(where: str, folder: Path) -> None:
    """Looks at the configuration of a model of transformers.

    Raises:
        UsageError: an adapter, which would be ignored or fetch another model; weights that are no safetensors or elsewhere;
            attention code that would be downloaded.
    """
    if (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"{where}: an adapter (adapter_config.json) on another model; merge the two and save the whole model",
            code="unsupported",
        )
    for name in indexed_files(folder) if (folder / INDEX).is_file() else ():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UsageError(
                f"{where}: {INDEX} names {name}; .safetensors files of the same folder expected", code="unsupported"
            )

    def nested(value: Any) -> Iterator[Any]:
        if isinstance(value, list):
            for one in value:
                yield from nested(one)
        if isinstance(value, dict):
            for key, one in value.items():
                if key in ("attn_implementation", "_attn_implementation"):
                    yield from one.values() if isinstance(one, dict) else (one,)
                else:
                    yield from nested(one)

    installed = [name for name, package in FLASH.items() if importlib.util.find_spec(package) is not None]
    for name in nested(read_json(folder / CONFIG)):
        if name is not None and name not in (*ATTENTION, *installed):
            raise UsageError(
                f"{where}: its config.json requires the attention '{name}', code that is not installed here; "
                f"one of {', '.join((*ATTENTION, *installed))} expected",
                code="unknown",
            )
