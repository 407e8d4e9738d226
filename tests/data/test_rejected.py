"""Bad samples are counted once, over visits, ranks and starts."""

import json

import torch

from aimv2.data.stream.rejected import BadSample, Rejected
from aimv2.distributed import World, join_world, leave_world
from forked import call_on_ranks


def bad(name: str, why: str = "no image") -> BadSample:
    return BadSample(f"train-000000.tar/{name}", why)


def test_a_sample_counts_once_whatever_its_reason() -> None:
    found = Rejected(1)
    assert found.add(bad("a (1)")) and not found.add(bad("a (1)", "no caption")) and not found.too_many
    assert found.add(bad("a (2)")) and found.too_many
    assert found.line() == (
        "2 samples could not be read, data.max_bad allows 1: train-000000.tar/a (1) (no image), train-000000.tar/a (2) (no image)"
    )
    assert not Rejected(None).too_many


def test_it_goes_through_a_checkpoint() -> None:
    found = Rejected(30)
    for number in range(3000):
        found.add(bad(str(number)))
    again = Rejected(30)
    again.restore(json.loads(json.dumps(found.state())))
    assert len(again) == 3000 and not again.add(bad("2999")) and again.add(bad("new"))
    assert list(again.named)[:2] == list(found.named)[:2]
    again.restore(None)  # of a checkpoint from before they were counted
    assert len(again) == 3001


def exchanged() -> None:
    world = join_world()
    found = Rejected(2)
    for name in ("both", f"only-{world.rank}"):
        found.add(bad(name))
    found.exchange(world)
    assert len(found) == 3 and found.too_many
    found.add(bad("late")) if world.rank == 1 else None
    found.exchange(world)
    found.exchange(world)
    assert len(found) == 4 and "train-000000.tar/late" in found.named
    leave_world()


def test_ranks_know_those_of_all() -> None:
    call_on_ranks(2, exchanged)
    alone = Rejected(0)
    alone.add(bad("a"))
    alone.exchange(World(0, 1, torch.device("cpu")))
    assert len(alone) == 1
