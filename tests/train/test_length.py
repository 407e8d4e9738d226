"""How long a run is: steps, passes over the data, hours; each decided once and the same after a stop."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from aimv2 import api
from aimv2.data.scenes import write_scenes
from aimv2.errors import UsageError
from runs import TINY, exact, metrics, resume, train
from world import TinyWorld


@pytest.fixture(scope="module")
def data(world: TinyWorld) -> Path:
    return world.scenes


@pytest.fixture(scope="module")
def samples(data: Path) -> int:
    return dry(data)["samples"]


def dry(data: Path, recipe: Path | None = None, **more: Any) -> dict[str, Any]:
    given = {**TINY, "data.train": str(data), **{key.replace("__", "."): value for key, value in more.items()}}
    return api.pretrain(None if recipe is None else str(recipe), None, given, dry_run=True)


def values(data: Path, recipe: Path | None = None, **more: Any) -> dict[str, Any]:
    """The configuration of a run that would start; ``train__steps=None`` leaves it out."""
    given = {**TINY, "data.train": str(data), **{key.replace("__", "."): value for key, value in more.items()}}
    given = {key: value for key, value in given.items() if value is not None}
    return api.pretrain(None if recipe is None else str(recipe), None, given, print_config=True)["config"]


def test_epochs_set_the_steps_once(data: Path, samples: int, tmp_path: Path) -> None:
    config = values(data, train__steps=None, train__epochs=2.5)
    assert config["train.steps"] == -(-samples * 5 // (2 * 8)) and config["train.epochs"] is None
    summary = train(data, tmp_path / "run", train__steps=None, train__epochs=0.1)
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]
    assert summary["step"] == stored["steps"] == -(-samples // 80) and stored["epochs"] is None
    assert resume(tmp_path / "run", train__epochs=0.1)["step"] == summary["step"]  # the same command again
    with pytest.raises(UsageError) as error:
        resume(tmp_path / "run", train__epochs=0.5)
    assert error.value.code == "conflict" and "train.steps" in str(error.value)


def test_both_are_refused_and_the_command_line_comes_before_a_recipe(data: Path, samples: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        values(data, train__steps=3, train__epochs=1)
    assert error.value.option == "train.epochs" and error.value.code == "conflict"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {epochs: 2}\n")
    assert values(data, recipe, train__steps=7)["train.steps"] == 7
    assert values(data, recipe, train__steps=None)["train.steps"] == -(-samples * 2 // 8)
    recipe.write_text("train: {steps: 9}\n")
    assert values(data, recipe, train__steps=None, train__epochs=1)["train.steps"] == -(-samples // 8)
    recipe.write_text("train: {steps: 9, epochs: 1}\n")
    with pytest.raises(UsageError, match="both in"):
        values(data, recipe, train__steps=None)


def test_epochs_of_native_training_are_refused(data: Path) -> None:
    with pytest.raises(UsageError) as error:
        values(data, train__steps=None, train__epochs=1, train__patch_budget=256)
    assert error.value.option == "train.epochs" and error.value.code == "conflict"


def test_warm_up_follows_the_steps_unless_it_is_given(data: Path) -> None:
    assert values(data, optim__warmup=None, train__steps=400)["optim.warmup"] == 20
    assert values(data, optim__warmup=None, train__steps=5000)["optim.warmup"] == 250
    assert values(data, optim__warmup=3, train__steps=400)["optim.warmup"] == 3


def test_a_run_ends_by_the_clock_and_resumes_exactly(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "whole")
    first = train(data, tmp_path / "run", train__max_hours=1e-9)
    assert first["stopped_at"] == 1 and metrics(tmp_path / "run")[-1]["step"] == 1
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["max_hours"] is None
    assert resume(tmp_path / "run", train__max_hours=1e-9)["stopped_at"] == 2
    with pytest.raises(UsageError) as error:
        resume(tmp_path / "run", train__stop_at=1)
    assert error.value.option == "train.stop_at" and error.value.code == "conflict"
    assert resume(tmp_path / "run", train__max_hours=1000)["step"] == 6
    assert exact(tmp_path / "run") == exact(tmp_path / "whole")


def test_a_step_without_a_recipe_has_no_more_pairs_than_there_are(data: Path, tmp_path: Path) -> None:
    assert values(data, train__batch_size=None)["train.batch_size"] == 64
    write_scenes(str(tmp_path / "few"), 21, size=32)
    assert values(tmp_path / "few", train__batch_size=None)["train.batch_size"] == 16
