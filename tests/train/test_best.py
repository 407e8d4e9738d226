"""RUN@best: the checkpoint with the best held-out figure, kept whatever else goes; RUN stays the newest."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

import aimv2
from aimv2.errors import UsageError
from aimv2.interop.model_folder import checkpoints, find_model
from aimv2.tasks.pretrain import Pretrain
from runs import metrics, resume, train
from world import TinyWorld

FIGURE = "val_text_loss"
# a learning rate at which the loss goes up and down
OPTIONS: dict[str, Any] = {
    "eval__every": 1,
    "eval__best": FIGURE,
    "train__keep": 1,
    "optim__lr": 1.0,
    "optim__warmup": 5,
}


@pytest.fixture(scope="module")
def data(world: TinyWorld) -> Path:
    return world.scenes


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("best") / "run"
    train(data, run, **OPTIONS)
    return run


def lowest(run: Path, last: int = 6) -> tuple[float, int]:
    return min((line[FIGURE], line["step"]) for line in metrics(run) if FIGURE in line and line["step"] <= last)


def test_best_is_the_checkpoint_with_the_lowest_loss(whole: Path) -> None:
    value, step = lowest(whole)
    assert step < 6, "the last step is the best one: this shows nothing"
    assert [number for number, _ in checkpoints(whole)] == [step, 6]  # of keep 1, and the best
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["best"] == {"figure": FIGURE, "value": value, "step": step} and summary[FIGURE] > value
    assert find_model(f"{whole}@best") == find_model(f"{whole}@{step}") != find_model(whole) == find_model(f"{whole}@6")
    best, newest = aimv2.load_model(f"{whole}@best"), aimv2.load_model(whole)
    assert not torch.equal(best.norm.weight, newest.norm.weight)


def test_a_stop_changes_nothing(whole: Path, data: Path, tmp_path: Path) -> None:
    for stop in (3, 5):
        run = tmp_path / f"run{stop}"
        train(data, run, train__stop_at=stop, **OPTIONS)
        value, step = lowest(run, stop)
        found = json.loads((run / "checkpoints/best.json").read_text())
        assert (found["value"], found["step"]) == (value, step)
        (run / "checkpoints/best.json").unlink(missing_ok=True) if step == stop else None  # stopped between the two
        resume(run)
        assert (run / "checkpoints/best.json").read_text() == (whole / "checkpoints/best.json").read_text()


def test_without_it_there_is_no_best(world: TinyWorld) -> None:
    with pytest.raises(UsageError) as error:
        aimv2.load_model(f"{world.run}@best")
    assert error.value.code == "not-found" and "eval.best" in str(error.value)


def test_a_word_that_is_no_step_names_the_steps_of_the_run(whole: Path) -> None:
    with pytest.raises(UsageError, match=r"no checkpoint of step bset in .*there: \d+, 6") as error:
        aimv2.load_model(f"{whole}@bset")
    assert error.value.code == "not-found"


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"eval__best": "val_text_los"}, "unknown", "did you mean 'val_text_loss'"),
        ({"eval__every": 0}, "conflict", "eval.every"),
        ({"eval__best": "val_pairs"}, "conflict", "neither better nor worse"),
    ],
)
def test_wrong_use(data: Path, tmp_path: Path, options: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        train(data, tmp_path / "run", **{**OPTIONS, **options})
    assert error.value.option == "eval.best" and error.value.code == code
    assert not (tmp_path / "run").exists()


def test_a_figure_that_only_validation_knows_to_be_missing_costs_no_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aimv2.tasks.pretrain.Pretrain.figures", ())  # of a task that does not list them
    with pytest.raises(UsageError, match="did you mean 'val_text_loss'"):
        train(data, tmp_path / "run", **{**OPTIONS, "eval__best": "val_text_los"})
    assert [number for number, _ in checkpoints(tmp_path / "run")] == [1]


def test_the_figures_of_the_task_are_those_that_validation_gives(whole: Path) -> None:
    given = {name for line in metrics(whole) for name in line if name.startswith("val_")}
    listed = [name for name in Pretrain.figures if not any(fnmatchcase(one, name) for one in given)]
    assert not listed and all(any(fnmatchcase(one, name) for name in Pretrain.figures) for one in given)


def test_no_validation_split(data: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "train-000000.tar").symlink_to(sorted(data.glob("train-*.tar"))[0])
    with pytest.raises(UsageError, match="no validation split") as error:
        train(alone, tmp_path / "run", **OPTIONS)
    assert error.value.option == "eval.best" and not (tmp_path / "run").exists()
