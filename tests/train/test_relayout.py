"""A run goes on over other ranks and data workers in the same number of parts: the same batches, the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from aimv2.config.schema import Config, DataConfig
from aimv2.data.stream.samples import TrainStream, View
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.train.checkpoint import RANK
from aimv2.train.plain_state import write_state
from aimv2.train.relayout import own_state, take_layout
from runs import exact, need_ranks, options, resume, torchrun, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(world: Any) -> Path:
    return world.scenes


def test_one_process_goes_on_as_two_and_two_as_one(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_ranks(2)
    whole, there, back = (tmp_path / name for name in ("whole", "there", "back"))
    train(data, whole, data__workers=2)
    train(data, there, data__workers=2, train__stop_at=3)
    ended = torchrun(2, "pretrain", "--run", str(there), "--resume", "--train.stop_at", "5")
    assert ended.returncode == 0, ended.stderr
    assert "2 ranks x 1 data workers instead of 1 x 2: the same batches" in ended.stderr
    ended = torchrun(2, *options(data, back, data__workers=1, train__stop_at=3))
    assert ended.returncode == 0, ended.stderr
    for run in (there, back):
        resume(run)
        assert "1 ranks x 2 data workers instead of 2 x 1: the same batches" in capsys.readouterr().err
        for left, right in zip(exact(whole), exact(run), strict=True):
            assert left == pytest.approx(right, rel=2e-4)  # sums in another order, as for two processes from the start


def streams(data: Path, layout: tuple[int, int]) -> list[TrainStream]:
    """One for each rank of a layout."""
    ranks, workers = layout
    config = DataConfig(train=str(data), workers=workers, shuffle_buffer=20)
    return [TrainStream(config, View(32, 16), None, 12, 3, rank, ranks) for rank in range(ranks)]


def keys(found: list[TrainStream], steps: int) -> list[list[str]]:
    """Keys of the samples of each step, in the order of the global batch."""
    batches = [[next(stream) for stream in found] for _ in range(steps)]
    return [[key for batch in step for key in batch.keys] for step in batches]  # type: ignore[union-attr]


def written(folder: Path, found: list[TrainStream], layout: tuple[int, int]) -> Path:
    """The part of a checkpoint that holds where the ranks stand."""
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "trainer.json").write_text(json.dumps({"layout": layout}))
    for rank, stream in enumerate(found):
        write_state(folder / "state" / RANK.format(rank), {"data": stream.state(), "rank": rank})
        stream.close()
    return folder


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 3), (3, 2)), ((4, 1), (2, 2)), ((1, 2), (2, 1)), ((3, 1), (1, 3)), ((3, 0), (3, 0))],
    ids=str,
)
def test_each_step_has_the_samples_that_it_would_have_had(
    before: tuple[int, int], after: tuple[int, int], data: Path, tmp_path: Path
) -> None:
    first = streams(data, before)
    keys(first, 12)  # past an epoch of 120 samples, so that every position is in another one
    folder = written(tmp_path / "step-0000012", first, before)
    for at, layout in enumerate((before, after)):
        ranks, workers = layout
        going_on = streams(data, layout)
        for rank, stream in enumerate(going_on):
            state = own_state(folder, World(rank, ranks, CPU), workers)
            assert state["rank"] == min(rank, before[0] - 1)
            stream.restore(state["data"])
        found = keys(going_on, 5)
        for stream in going_on:
            stream.close()
        if at == 0:
            wanted = found
    assert found == wanted and len({key for step in found for key in step}) > 30


@pytest.mark.parametrize(
    ("before", "ranks", "workers", "words"),
    [
        ((2, 3), 4, None, "got 4 ranks; .* 1 x 6, 2 x 3, 3 x 2, 6 x 1"),
        ((2, 3), 2, 2, r"got 2 ranks x 2 \(data.workers\); .* 1 x 6, 2 x 3, 3 x 2, 6 x 1; leave data.workers out"),
        ((2, 0), 1, None, "got 1 ranks; .* 2 ranks x 0"),
        ((2, 0), 2, 1, "got 2 ranks x 1 .* 2 ranks x 0"),
        ((1, 2), 2, 0, "got 2 ranks x 0 .* 1 x 2, 2 x 1"),
    ],
)
def test_another_number_of_parts_is_refused(
    before: tuple[int, int], ranks: int, workers: int | None, words: str, tmp_path: Path
) -> None:
    written(tmp_path, [], before)
    config = Config()
    config.data.workers = 3 if workers is None else workers
    with pytest.raises(UsageError, match=words):
        take_layout(config, workers is not None, tmp_path, World(0, ranks, CPU))


def test_a_position_of_other_parts_is_never_taken(data: Path, tmp_path: Path) -> None:
    folder = written(tmp_path, streams(data, (2, 0)), (2, 0))
    with pytest.raises(ValueError, match="positions of 2 x 0 are none of 3 x 0"):
        own_state(folder, World(0, 3, CPU), 0)
