"""The keys of a configuration that hold a path, or what may be one: ``~`` at their start is a home folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aimv2.places import from_home

PATHS = (
    "run",
    "init",
    "data.train",
    "data.val",
    "data.tokenizer",
    "data.index_dir",
    "data.features",
    "objective.teacher",
    "objective.text",
)


def from_homes(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, with home folders in those of :data:`PATHS`, and in the paths of a mixture's sources.

    Raises:
        UsageError: a user without a home folder.
    """
    return {key: _each(value, key) if key in PATHS else value for key, value in flat.items()}


def _each(value: Any, key: str) -> Any:
    if isinstance(value, list):
        return [_each(one, key) for one in value]
    if isinstance(value, dict) and "path" in value:
        return {**value, "path": from_home(value["path"], key)}
    return from_home(value, key)
