"""Which layout of the ranks, which recomputation and which micro-batch fit a card: all that go are tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from aimv2.config.schema import Config
from aimv2.plan.memory import Checkpointing, Memory, Program, RankLayout, Sizes, step_peak
from aimv2.train.parallel import layout_of

# of a step's time, what recomputation adds: a forward pass of three; the cheap part of one (assumed, not measured)
AGAIN: dict[Checkpointing, float] = {"off": 0.0, "selective": 0.05, "full": 1 / 3}
RESERVED = 1.5e9  # bytes of a GPU that the driver, CUDA and NCCL take (assumed)
FEW_ROWS = 4096  # patches at once, below which matmuls no longer fill a large GPU (assumed)


@dataclass(frozen=True)
class Choice:
    """A layout and what it takes on each GPU."""

    layout: RankLayout
    pairs: int  # at once
    memory: Memory
    room: float  # bytes that a run keeps to

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room


def divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def layout_of_config(config: Config, ranks: int) -> RankLayout:
    """The layout that a configuration asks for.

    Raises:
        UsageError: its product is not the number of ranks.
    """
    train, parallel = config.train, config.parallel
    modes: dict[Any, Any] = {False: "off", True: "full"}
    mode = modes.get(train.checkpointing, train.checkpointing)
    return RankLayout(*layout_of(parallel, ranks), train.accumulate, mode, parallel.reshard)


def choices(
    model: Any, pairs: int, sizes: Sizes, ranks: int, room: float, program: Program, ema: bool
) -> Iterator[Choice]:
    """Every layout, recomputation and micro-batch of a rank's pairs, the ones that cost least time first.

    First comes what recomputes nothing, then larger micro-batches, then fewer ranks to a copy; micro-batches that no longer fill
    a GPU come last.
    """
    found = []
    for accumulate in divisors(pairs):
        at_once = pairs // accumulate
        few = at_once * sizes.patches < FEW_ROWS and accumulate > 1
        for mode in get_args(Checkpointing):
            for shard in divisors(ranks):
                found.append((few, AGAIN[mode], accumulate, shard, mode))
    for _, _, accumulate, shard, mode in sorted(found):
        layout = RankLayout(ranks // shard, shard, accumulate, mode)
        yield choice(model, pairs // accumulate, sizes, layout, room, program, ema)


def choice(
    model: Any, at_once: int, sizes: Sizes, layout: RankLayout, room: float, program: Program, ema: bool
) -> Choice:
    """What a layout takes with so many pairs at once."""
    part = Sizes(at_once, sizes.patches, sizes.tokens, sizes.longest, sizes.scored)
    return Choice(layout, at_once, step_peak(model, part, layout, program, ema), room)


def best_choice(
    model: Any, pairs: int, sizes: Sizes, ranks: int, room: float, program: Program, ema: bool
) -> Choice | None:
    """The first choice that fits; None: none does."""
    return next((one for one in choices(model, pairs, sizes, ranks, room, program, ema) if one.fits), None)
