"""A run without a recipe fits its data and its kind of device, and goes past its limits only with a word."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from aimv2 import api
from aimv2.config.load import parse
from aimv2.config.schema import Config
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.interop.model_folder import save_model
from aimv2.models.create import build, create_model
from aimv2.models.sizes import DecoderConfig, EncoderConfig
from aimv2.report.browse.drawn import expected
from aimv2.tasks.pretrain import shapes
from aimv2.train import defaults, outlook
from aimv2.train.compiling import blank_batches
from aimv2.train.step import TrainStep
from runs import scenes


def chosen(kind: str, pairs: int, side: int, **given: object) -> dict[str, object]:
    """The defaults for images of one side, under a user's own values."""
    file = io.BytesIO()
    Image.new("RGB", (side + 7, side)).save(file, "PNG")
    own = {key.replace("__", "."): value for key, value in given.items()}
    return defaults.defaults_for([{"png": file.getvalue()}], pairs, kind, parse(own), set(own))


@pytest.mark.parametrize(
    ("kind", "pairs", "side", "name"),
    [
        ("cpu", 900, 150, "aimv2-tiny-patch14-112"),
        ("cpu", 900, 3000, "aimv2-tiny-patch14-112"),
        ("cpu", 10**7, 3000, "aimv2-tiny-patch14-112"),
        ("cpu", 50_000, 32, "aimv2-tiny-patch4-32"),
        ("cuda", 900, 3000, "aimv2-tiny-patch14-112"),
        ("cuda", 50_000, 32, "aimv2-mini-patch4-32"),
        ("cuda", 10**6, 100, "aimv2-small-patch14-112"),
        ("cuda", 10**6, 500, "aimv2-small-patch14-224"),
    ],
)
def test_the_model_follows_device_pairs_and_size(kind: str, pairs: int, side: int, name: str) -> None:
    assert chosen(kind, pairs, side)["model.name"] == name


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("pairs", [1, 3, 63, 900, 50_000, 10**7])
def test_no_more_than_40_visits_and_two_hours(kind: str, pairs: int) -> None:
    values = chosen(kind, pairs, 200)
    config = parse(values)
    steps, batch = config.train.steps, config.train.batch_size
    assert steps >= 1 and 1 <= batch <= pairs and steps * batch <= 40 * pairs
    seconds = steps * batch * defaults.pair_flops(*shapes(config, 4096)) / defaults.KINDS[kind].rate
    assert seconds <= 7200
    assert steps * batch > 39 * pairs - batch or seconds > 7000  # and no fewer than one of them allows
    assert values["train.compile"] == ("auto" if seconds > 1800 else "off")


def test_the_1000_photographs() -> None:
    values = chosen("cpu", 900, 150)
    assert (values["train.steps"], values["train.batch_size"], values["eval.every"]) == (562, 64, 93)


def test_the_steps_follow_the_users_model_and_batch() -> None:
    assert chosen("cpu", 900, 150, train__batch_size=30)["train.steps"] == 1200
    large = chosen("cpu", 900, 150, model__name="aimv2-large-patch14-224")
    assert large["model.name"] == "aimv2-large-patch14-224"
    assert large["train.steps"] == 5  # two hours
    assert chosen("cpu", 900, 150, train__epochs=10)["eval.every"] == 23
    assert chosen("cpu", 900, 150, train__steps=60)["eval.every"] == 10


def test_more_visits_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = scenes(tmp_path / "data", 61)
    for own, lines in (({}, 0), ({"train.steps": 500}, 1), ({"train.epochs": 40}, 0), ({"train.epochs": 42}, 1)):
        api.pretrain(None, None, {"data.train": str(data), **own}, print_config=True)
        said = capsys.readouterr().err
        assert said.count("see each of the 61 pairs") == lines, said


def test_the_defaults_reach_the_run(tmp_path: Path) -> None:
    data = scenes(tmp_path / "data", 40)
    found = api.pretrain(None, None, {"data.train": str(data), "data.flip": 0}, print_config=True)
    image = io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "PNG")
    expected = defaults.defaults_for([{"png": image.getvalue()}], 40, defaults.kind_here(), Config(), set())
    assert {key: found["config"][key] for key in expected} == expected
    assert {found["from"][key] for key in expected} == {"auto"}
    assert (found["config"]["data.flip"], found["config"]["data.train"]) == (0, str(data))


def test_a_recipe_may_see_a_pair_twice_as_often() -> None:
    config = parse({"train.steps": 600, "train.batch_size": 64})
    assert not list(defaults.too_many_visits(config, 900, defaults.most_visits([])))
    assert len(list(defaults.too_many_visits(config, 900, defaults.most_visits(["train.steps"])))) == 1
    (line,) = defaults.too_many_visits(config, 100, defaults.most_visits([]))
    assert "384.0 times" in line and "63 steps" in line


def test_a_step_in_parts_and_a_run_of_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"data.train": str(scenes(tmp_path / "data", 40))}
    with pytest.raises(UsageError, match=r"train.batch_size 32 does not divide by train.accumulate 3"):
        api.pretrain(None, None, {**data, "train.accumulate": 3}, print_config=True)
    found = api.pretrain(None, None, {**data, "train.steps": 1}, print_config=True)
    assert found["config"]["optim.warmup"] == 0 and "optim.warmup" not in capsys.readouterr().err


def test_the_steps_follow_the_model_of_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scenes(tmp_path / "data", 40)
    for kind in defaults.KINDS:
        monkeypatch.setitem(defaults.KINDS, kind, defaults.Kind(1e8, 64, "fp32"))
    save_model(create_model("aimv2-mini-patch4-32"), tmp_path / "mini")
    given = {
        "data.train": str(data),
        "init": str(tmp_path / "mini"),
        "objective.name": "probe",
        "objective.classes": 9,
    }
    found = api.pretrain(None, None, given, print_config=True)["config"]
    small = api.pretrain(None, None, {"data.train": str(data)}, print_config=True)["config"]
    assert found["model.name"] == "auto" and small["model.name"] == "aimv2-tiny-patch4-32"
    assert 1 <= found["train.steps"] < small["train.steps"] / 3


def test_time_and_memory_are_said_before_the_start() -> None:
    config = parse({"model.name": "aimv2-3B-patch14-448", "train.steps": 1000, "train.batch_size": 64})
    said = " ".join(expected(config, 4096))
    assert "train.max_hours" in said and "train.accumulate" in said
    small = parse({"model.name": "aimv2-tiny-patch4-32", "train.steps": 10, "train.batch_size": 8})
    assert not list(expected(small, 512))
    assert not list(outlook.too_long(replace(config, train=replace(config.train, max_hours=1.0)), 100.0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [128, 256])
def test_memory_is_that_of_the_tensors_that_a_step_keeps(precision: str, width: int) -> None:
    pairs, caption = 4, defaults.CAPTION
    config = Config()
    config.train.precision, config.train.batch_size = precision, pairs  # type: ignore[assignment]
    encoder = EncoderConfig("one", width, 4, 2, 384, 14, 112)
    model = build(encoder, DecoderConfig(width, 2, 2, 384, 512), 0)
    step = TrainStep(model, config, World(0, 1, torch.device("cpu")), False)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    (batch,) = blank_batches(step, pairs, [0] * caption, None)
    counts = torch.ones(len(step.objective.counts(batch)), dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.backward(batch, counts)
    found = sum(size for place, size in kept.items() if place not in own)
    parameters = sum(p.numel() for p in model.parameters())
    expected = outlook.step_memory(config, model) - 16 * parameters
    assert expected == pytest.approx(found, rel=0.3)
