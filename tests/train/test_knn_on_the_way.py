"""kNN accuracy at each validation: that of the command, whatever the ranks, and training does not notice."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import aimv2
from aimv2.config.schema import Config
from aimv2.data.shards.format import read_samples, write_shard
from aimv2.data.stream.samples import View
from aimv2.errors import UsageError
from aimv2.interop.model_folder import read_best
from aimv2.tasks.knn import read_voters
from runs import exact, metrics, options, resume, torchrun, train
from world import TinyWorld

FIGURE = "val_knn_top1"
OPTIONS: dict[str, Any] = {"eval__every": 2, "eval__knn": True, "eval__captions": 0, "eval__samples": 1000}


@pytest.fixture(scope="module")
def data(world: TinyWorld) -> Path:
    return world.scenes


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("knn") / "run"
    train(data, run, eval__best=FIGURE, **OPTIONS)
    return run


def figures(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line[FIGURE]) for line in metrics(run) if FIGURE in line]


def test_it_is_measured_at_each_validation_and_chooses_the_best(whole: Path) -> None:
    found = figures(whole)
    assert [step for step, _ in found] == [2, 4, 6]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary[FIGURE] == found[-1][1] and 0 < summary[FIGURE] < 1
    highest = max(value for _, value in found)
    first = next(step for step, value in found if value == highest)
    assert read_best(whole) == {"figure": FIGURE, "value": highest, "step": first}


def features(model: Any, data: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors [N, D] and labels of a split, read by nobody of the product's evaluations."""
    samples = [sample for tar in sorted(data.glob(f"{split}-*.tar")) for _, sample in read_samples(tar)]
    images = [np.array(Image.open(io.BytesIO(sample["png"])).convert("RGB")) for sample in samples]
    with torch.inference_mode():
        found = model(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).mean(1).numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True), np.array([int(sample["cls"]) for sample in samples])


def test_it_is_the_class_of_most_of_the_20_nearest(whole: Path, data: Path) -> None:
    model = aimv2.load_model(whole)
    (train_x, train_y), (test_x, test_y) = (features(model, data, split) for split in ("train", "val"))
    nearest = np.argsort(-(test_x @ train_x.T), axis=1, kind="stable")[:, :20]
    voted = [np.bincount(train_y[rows]).argmax() for rows in nearest]
    assert figures(whole)[-1][1] == pytest.approx((np.array(voted) == test_y).mean(), abs=1.01 / len(test_y))


def test_few_voters_come_from_all_over_the_data(data: Path) -> None:
    config = Config()
    config.data.train, config.eval.knn_samples = str(data), 7
    view = View(32, 16)
    halves = [read_voters(config, view, rank, 2).keys for rank in (0, 1)]
    seven = read_voters(config, view).keys
    assert len(seven) == 7 and sorted(halves[0] + halves[1]) == sorted(seven)
    config.eval.knn_samples = 0
    every = read_voters(config, view).keys
    assert np.diff([every.index(key) for key in seven]).max() <= -(-len(every) // 7)


def test_training_does_not_notice_and_a_stop_changes_nothing(whole: Path, data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "without", **{**OPTIONS, "eval__knn": False})
    assert exact(tmp_path / "without") == exact(whole)
    train(data, tmp_path / "stopped", train__stop_at=3, **OPTIONS)
    resume(tmp_path / "stopped")
    assert exact(tmp_path / "stopped") == exact(whole) and figures(tmp_path / "stopped") == figures(whole)


def test_two_ranks_measure_the_same(data: Path, tmp_path: Path) -> None:
    more = {**OPTIONS, "train__steps": 2, "eval__knn_samples": 61}
    train(data, tmp_path / "one", data__workers=2, **more)
    torchrun(2, *options(data, tmp_path / "two", data__workers=1, **more)).check_returncode()
    assert figures(tmp_path / "two") == figures(tmp_path / "one") and len(figures(tmp_path / "one")) == 1


@pytest.mark.parametrize("left_out", ["cls", "val"])
def test_without_labels_it_is_refused(left_out: str, data: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        samples = read_samples(sorted(data.glob(f"{split}-*.tar"))[0])
        parts = [(key, {name: part for name, part in sample.items() if name != left_out}) for key, sample in samples]
        if split != left_out:
            (tmp_path / "data").mkdir(exist_ok=True)
            write_shard(tmp_path / "data" / f"{split}-000000.tar", iter(parts))
    with pytest.raises(UsageError) as error:
        train(tmp_path / "data", tmp_path / "run", **OPTIONS)
    assert error.value.option == "eval.knn" and error.value.code == "missing" and not (tmp_path / "run").exists()
