"""What the training data of a run are: for each shard its name, size, samples, a hash of their offsets and of blocks of its content.

Two copies of the same shards have the same identity, wherever they lie and whenever they were written.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aimv2.data.shards.index import offsets_of
from aimv2.errors import shown

BLOCK, BLOCKS = 4096, 5  # bytes, and places from the first to the last
Shard = list[Any]  # name, bytes, samples, hash of the offsets, hash of the blocks
Identity = list[list[Shard]]  # by source


def identity_of(sources: Sequence[Sequence[Path]], indices: Sequence[Path]) -> Identity:
    """The identity of the shards of each source, in order, without those that have no sample.

    Args:
        sources: tars of each source.
        indices: the folder that ``build_index`` made of each.
    """
    with ThreadPoolExecutor(8) as pool:
        return [list(pool.map(shard_identity, *zip(*found))) if (found := offsets_of(tars, index)) else []
                for tars, index in zip(sources, indices)]  # fmt: skip


def shard_identity(tar: Path, offsets: Path) -> Shard:
    """See :data:`Shard`; a shard that can't be read has no blocks."""
    numbers = offsets.read_bytes()
    digest, size = hashlib.sha256(), tar.stat().st_size
    try:
        with tar.open("rb") as file:
            for place in range(BLOCKS):
                file.seek(place * max(size - BLOCK, 0) // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
        blocks = digest.hexdigest()[:16]
    except OSError:
        blocks = ""
    return [os.fspath(tar.name), size, len(numbers) // 8 - 1, hashlib.sha256(numbers).hexdigest()[:16], blocks]


def counts(identity: Identity) -> list[list[int]]:
    """Samples of each shard, by source: the position in the data consists of such numbers."""
    return [[shard[2] for shard in shards] for shards in identity]


def differences(before: Identity, now: Identity) -> list[str]:
    """What changed, in words, by name; [] where nothing did."""
    if before == now:
        return []
    if len(before) != len(now):
        return [f"{len(now)} sources in the place of {len(before)}"]
    found = []
    for number, (old, new) in enumerate(zip(before, now), 1):
        where = f" (source {number})" if len(now) > 1 else ""
        found += [line + where for line in _of_source(old, new)]
    return found


def _of_source(old: list[Shard], new: list[Shard]) -> list[str]:
    lost, more = (Counter(shard[0] for shard in shards) for shards in (old, new))
    gone, new_ones = list((lost - more).elements()), list((more - lost).elements())
    found = [f"{kind} {_names(names)}" for kind, names in (("removed:", gone), ("added:", new_ones)) if names]
    by_name = {shard[0]: shard for shard in old}
    changed = dict[str, list[str]]()
    for shard in new:
        if (was := by_name.get(shard[0])) is not None and was != shard and shard not in old:
            kind = "cut:" if shard[1] < was[1] and shard[2] <= was[2] else "replaced:"
            changed.setdefault(kind, []).append(shard[0])
    found += [f"{kind} {_names(names)}" for kind, names in changed.items()]
    both = {shard[0] for shard in old} & {shard[0] for shard in new}
    before, after = ([shard[0] for shard in shards if shard[0] in both] for shards in (old, new))
    # shards of one name in several folders: only their contents say that they were exchanged
    reordered = before != after or (not found and old != new)
    return [*found, "shards in another order"] if reordered else found


def _names(names: list[str]) -> str:
    return ", ".join(shown(name, 80) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
