"""Samples that can't be used: each counted once, over all visits, ranks and starts of a run."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from aimv2.distributed import World

KEPT = 1000  # whose names are kept
SAVED = 20  # of them in a checkpoint
UNREAD = "__unread__"  # part of a sample that could not be read: why
CUT = "its shard was cut or damaged since it was indexed"


class BadSample(NamedTuple):
    """A sample by shard and key, and why it can't be used."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


class Rejected:
    """Distinct bad samples.

    Attributes:
        limit: ``data.max_bad``.
        named: the first ones, by name.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit, self.named = limit, dict[str, BadSample]()
        self._known, self._fresh = set[int](), list[BadSample]()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, bad: BadSample) -> bool:
        """Whether it was not known yet."""
        number = int.from_bytes(hashlib.blake2b(bad.name.encode(errors="replace"), digest_size=8).digest(), "little")
        if number in self._known:
            return False
        self._known.add(number)
        self._fresh.append(bad)
        if len(self.named) < KEPT:
            self.named[bad.name] = bad
        return True

    @property
    def too_many(self) -> bool:
        return self.limit is not None and len(self) > self.limit

    def exchange(self, world: World) -> None:
        """Every rank knows those of all ranks; collective."""
        fresh, self._fresh = self._fresh, []
        if world.max(torch.tensor(float(bool(fresh)), device=world.device)):
            for part in world.gather(fresh):
                for bad in part:
                    self.add(bad)
        self._fresh = []

    def line(self) -> str:
        """Error message for too many of them."""
        return too_many_bad([str(bad) for bad in self.named.values()], self.limit, len(self))

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        numbers = np.array(sorted(self._known), dtype="<u8").tobytes()
        return {"numbers": base64.b64encode(numbers).decode(), "named": [*self.named.values()][:SAVED]}

    def restore(self, state: Any) -> None:
        """Those of :meth:`state`; of a checkpoint that has none, none."""
        if isinstance(state, dict):
            self._known |= set(np.frombuffer(base64.b64decode(state["numbers"]), "<u8").tolist())
            self.named |= {str(name): BadSample(str(name), str(why)) for name, why in state["named"]}


def too_many_bad(names: Sequence[str], limit: int | None, count: int | None = None) -> str:
    """Error message for ``count`` bad samples, by default as many as there are names."""
    count = len(names) if count is None else count
    shown = ", ".join(names[:5]) + (f" and {count - 5:,} more" if count > 5 else "")
    return f"{count:,} samples could not be read, data.max_bad allows {limit}: {shown}"
