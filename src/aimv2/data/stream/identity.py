"""What the training data of a run are: for each shard its name, size, samples, a hash of their offsets and of blocks of its content.

Two copies of the same shards have the same identity, wherever they lie and whenever they were written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aimv2.data.shards.index import offsets_of
from aimv2.errors import shown
from aimv2.io import open_file, read_file

BLOCK, BLOCKS = 4096, 5  # bytes, and places from the first to the last
LOOKED = 1000  # shards of a source, about, whose content is looked at; of the others size and offsets
Shard = list[Any]  # name, bytes, samples, hash of the offsets, hash of the blocks or ""
Identity = list[list[Shard]]  # by source


def identity_of(sources: Sequence[Sequence[Path]], indices: Sequence[Path]) -> Identity:
    """The identity of the shards of each source, in order, without those that have no sample.

    Args:
        sources: tars of each source.
        indices: the folder that ``build_index`` made of each.
    """
    with ThreadPoolExecutor(8) as pool:
        every = [_looked_at(offsets_of(tars, index)) for tars, index in zip(sources, indices)]
        return [list(pool.map(lambda one: shard_identity(*one), found)) for found in every]


def _looked_at(found: Sequence[tuple[Path, Path]]) -> list[tuple[Path, Path, bool]]:
    """Whether the content of each is looked at: by its name, so that the same ones are where others are added."""
    every = len(found) // LOOKED + 1
    numbers = [hashlib.sha256(os.fsencode(tar.name)).digest()[:4] for tar, _ in found]
    return [(*one, int.from_bytes(number) % every == 0) for one, number in zip(found, numbers)]


def shard_identity(tar: Path, offsets: Path, look: bool = True) -> Shard:
    """See :data:`Shard`; one that can't be read, or is not looked at, has no blocks."""
    numbers = read_file(offsets)
    digest, size, blocks = hashlib.sha256(), tar.stat().st_size, ""
    with contextlib.suppress(OSError):
        if look:
            with open_file(tar) as file:
                for place in range(BLOCKS):
                    file.seek(place * max(size - BLOCK, 0) // (BLOCKS - 1))
                    digest.update(file.read(BLOCK))
            blocks = digest.hexdigest()[:16]
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
    known = {shard[0]: shard[4] for shard in old}
    # a content that was looked at once only says nothing
    new = [
        [*shard[:4], known[shard[0]]] if shard[0] in known and "" in (shard[4], known[shard[0]]) else shard
        for shard in new
    ]
    found = [f"{kind} {_names(names)}" for kind, names in (("removed:", gone), ("added:", new_ones)) if names]
    by_name = {shard[0]: shard for shard in old}
    changed = dict[str, list[str]]()
    for shard in new:
        if (was := by_name.get(shard[0])) is not None and was != shard and shard not in old:
            kind = "cut, or replaced by less:" if shard[1] < was[1] and shard[2] <= was[2] else "replaced:"
            changed.setdefault(kind, []).append(shard[0])
    found += [f"{kind} {_names(names)}" for kind, names in changed.items()]
    both = {shard[0] for shard in old} & {shard[0] for shard in new}
    before, after = ([shard[0] for shard in shards if shard[0] in both] for shards in (old, new))
    # shards of one name in several folders: only their contents say that they were exchanged
    reordered = before != after or (not found and old != new)
    return [*found, "shards in another order"] if reordered else found


def _names(names: list[str]) -> str:
    return ", ".join(shown(name, 80) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
