"""A task that is none of ours: one file, one loss, one recipe, found by its entry point; nothing else changes for it.

Legend: B images, D width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import aimv2
from aimv2 import api
from aimv2.config.load import parse
from aimv2.config.objective import BUILT_IN
from aimv2.errors import UsageError
from runs import TINY, assert_refused, light_collections, metrics, scenes

TASK = '''
"""Brightness: the mean of an image's pixels from the mean of its patch features."""

from dataclasses import dataclass

import torch
from torch import nn

from aimv2.config.objective import PretrainTaskOptions
from aimv2.models.encoder import VisionEncoder
from aimv2.models.init import init_weights
from aimv2.tasks.held_out import evaluating
from aimv2.tasks.pretrain import shapes
from aimv2.tasks.task import Task


@dataclass
class BrightnessOptions:
    """Brightness of an image.

    Args:
        exponent: of the error; 2 or 4
    """

    exponent: int = 2

    @staticmethod
    def check(config):
        from aimv2.errors import UsageError

        if config.objective.exponent not in (2, 4):
            raise UsageError(f"objective.exponent {config.objective.exponent}: 2 or 4 expected")


class Head(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = VisionEncoder(encoder), nn.Linear(encoder.width, 1)

    def block_lists(self):
        return [self.encoder.blocks]

    def config_dict(self):
        return {"encoder": self.encoder.config_dict()}

    def forward(self, batch):
        return self.head(self.encoder(batch.images).mean(1))[:, 0]


class BrightnessObjective:
    weights = {"brightness": 1.0}

    def __init__(self, exponent):
        self.exponent = exponent

    def counts(self, batch):
        return {"brightness": batch.text_len.new_full((), len(batch))}

    def __call__(self, model, batch):
        error = model(batch).float() - batch.images.float().mean((1, 2, 3)) / 255
        return {"brightness": ((error**self.exponent).sum(), self.counts(batch)["brightness"])}


class Brightness(Task):
    options = BrightnessOptions

    def reads_text(self):
        return False

    def encoder_config(self, vocab_size):
        return shapes(self.config, vocab_size)[0]

    def build(self, context):
        model = Head(self.encoder_config(1))
        init_weights(model.encoder, self.config.seed)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        return model

    def objective(self, model):
        return BrightnessObjective(self.config.objective.exponent)

    @torch.no_grad()
    def validate(self, model, objective, data, world):
        with evaluating(model):
            features = model.head(model.encoder(data.images).mean(1))[:, 0]
        error = (features - data.images.float().mean((1, 2, 3)) / 255).square()
        total = world.sum(torch.stack([error.sum(), torch.tensor(float(len(error)))]))
        return {"val_brightness": (total[0] / total[1]).item()}

    def exported(self, model, weights):
        return {key: value for key, value in weights.items() if not key.startswith("head.")}

    def final_evaluation(self, run, folder, tokenizer, device):
        return {"exponent": self.config.objective.exponent}
'''
RECIPE = """
model: {name: aimv2-tiny-patch8-32, width: 32, depth: 2, heads: 2, hidden: 64}
objective: {name: brightness, exponent: 4}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recipe of the task, which lies installed in a folder of its own."""
    site = tmp_path_factory.mktemp("site")
    (site / "brightness_task.py").write_text(TASK)
    about = site / "brightness_task-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness-task\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[aimv2.tasks]\nbrightness = brightness_task:Brightness\n")
    (site / "brightness.yaml").write_text(RECIPE)
    sys.path.insert(0, str(site))
    yield site / "brightness.yaml"
    sys.path.remove(str(site))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


def run_it(recipe: Path, data: Path, run: Path, **more: Any) -> dict[str, Any]:
    options = {key: value for key, value in TINY.items() if not key.startswith("model.")}
    options |= {"data.train": str(data), "eval.every": 3, "log.report": True}
    with light_collections():
        return api.pretrain(str(recipe), str(run), options | {key.replace("__", "."): v for key, v in more.items()})


@pytest.fixture(scope="module")
def whole(recipe: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_it(recipe, data, run)
    return run


def test_it_trains_validates_and_is_evaluated(whole: Path) -> None:
    lines = metrics(whole)
    losses = [line["brightness_loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert [line["step"] for line in lines if "val_brightness" in line] == [3, 6]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["exponent"] == 4 and summary["val_brightness"] == lines[-1]["val_brightness"]


def test_it_resumes_bit_for_bit(whole: Path, recipe: Path, data: Path, tmp_path: Path) -> None:
    run_it(recipe, data, tmp_path / "run", train__stop_at=2)
    with light_collections():
        api.pretrain(None, str(tmp_path / "run"), {"resume": True})
    keys = ("step", "loss", "grad_norm", "lr", "val_brightness")
    one, two = ([{k: line[k] for k in keys if k in line} for line in metrics(run)] for run in (whole, tmp_path / "run"))
    assert one == two
    weights = [run / "checkpoints/step-0000006/model/model.safetensors" for run in (whole, tmp_path / "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_its_model_folder_loads(whole: Path) -> None:
    model = aimv2.load_model(whole)
    assert model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 16, 32)
    assert "objective.name=brightness" in (whole / "checkpoints/step-0000006/model/README.md").read_text()


def test_it_reports(whole: Path, tmp_path: Path) -> None:
    assert json.loads((whole / "summary.json").read_text())["report"]
    page = Path(api.report([str(whole)], out=str(tmp_path / "report.html"))["report"]).read_text()
    assert all(name in page for name in ("Brightness loss", "Brightness (held out)", "objective.exponent"))


def test_its_options_have_types_rules_and_names(recipe: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["pretrain", "--config", recipe, "--run", tmp_path / "run", "--data.train", data]
    assert_refused(capsys, [*words, "--objective.exponent", "many"], "objective.exponent", "a whole number")
    assert_refused(capsys, [*words, "--objective.exponent", "3"], "objective.exponent 3: 2 or 4 expected")
    assert_refused(capsys, [*words, "--objective.exponnent", "2"], "did you mean 'objective.exponent'")
    with pytest.raises(UsageError) as refused:  # of another task
        parse({"objective.name": "brightness", "objective.alpha": 1.0})
    assert refused.value.option == "objective.alpha" and refused.value.code == "conflict"
    assert parse({"objective.name": "brightness", "objective.alpha": 0.4}).objective.exponent == 2


def test_a_task_that_nobody_brings() -> None:
    for name in ("nothing", "held_out", "..tasks.pretrain", "os"):
        with pytest.raises(UsageError) as refused:
            parse({"objective.name": name})
        assert refused.value.option == "objective.name" and refused.value.code == "unknown"
        assert all(known in str(refused.value) for known in BUILT_IN)


@pytest.mark.parametrize(
    ("task", "key", "value", "owner"),
    [
        ("pretrain", "smoothing", 0.1, "probe"),
        ("pretrain", "teacher_weight", 2.0, "distill"),
        ("contrastive", "alpha", 0.2, "pretrain"),
        ("probe", "contrast", "sigmoid", "contrastive"),
    ],
)
def test_an_option_of_another_task_is_refused_and_its_default_is_not(
    task: str, key: str, value: Any, owner: str
) -> None:
    given = {"objective.name": task, "init": "model"}
    with pytest.raises(UsageError) as refused:
        parse({**given, f"objective.{key}": value})
    assert refused.value.option == f"objective.{key}" and f"objective.name={owner}" in str(refused.value)
    default = getattr(parse(given).objective, key)
    assert parse({**given, f"objective.{key}": default}).objective.name == task
    assert getattr(parse({**given, f"objective.{key}": value}, stored=True).objective, key) == value  # a run of before


def test_a_task_may_take_the_options_of_another(recipe: Path, data: Path, tmp_path: Path) -> None:
    (recipe.parent / "same_options.py").write_text(
        "from aimv2.tasks.pretrain import Pretrain\n\n\nclass Same(Pretrain):\n    cools = False\n"
    )
    points = recipe.parent / "brightness_task-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "same = same_options:Same\n")
    own = tmp_path / "same.yaml"
    own.write_text(yaml.safe_dump({"objective": {"name": "same"}}))
    done = api.pretrain(str(own), str(tmp_path / "run"), TINY | {"data.train": str(data), "train.steps": 2})
    assert done["step"] == 2 and "val_text_loss" in done


@pytest.mark.parametrize("name", ["classify", "task", None, "no/where"])
def test_a_name_that_is_no_task_is_one_line(name: Any) -> None:
    with pytest.raises(UsageError, match=r"objective\.name"):
        parse({"objective.name": name})


@pytest.mark.parametrize(
    "key, value",
    [("init", "no/where"), ("optim.lora", 4), ("optim.fresh_decoder", True), ("data.features", "some/folder")],
)
def test_shared_options_that_it_does_not_read_are_refused(recipe: Path, key: str, value: object) -> None:
    more = {"init": "no/where"} if key in ("optim.lora", "optim.fresh_decoder") else {}
    with pytest.raises(UsageError) as refused:
        parse({"objective.name": "brightness", key: value} | more)
    assert refused.value.code == "conflict" and refused.value.option in (key, "init")
