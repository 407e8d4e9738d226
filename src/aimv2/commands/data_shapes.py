"""``aimv2 data shapes``: the built-in captioned scenes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class DataShapesOptions:
    """Write the built-in captioned scenes as shards: shapes with colour, size and place, and unseen validation scenes.

    Args:
        out: folder for the shards
        count: number of training scenes
        size: side in pixels
        largest: height and width of each picture are sampled between SIZE and this, pixels; null: all are SIZE x SIZE
        seed: random seed of the scenes
    """

    out: str
    count: int = 20000
    size: int = 32
    largest: int | None = None
    seed: int = 0


def run(options: DataShapesOptions) -> dict[str, Any]:
    from aimv2.data.scenes import write_scenes

    return write_scenes(options.out, options.count, size=options.size, largest=options.largest, seed=options.seed)
