"""The encoder unfrozen trains in every precision: from a loaded file, by layers, with large activations, without NaN."""

import hashlib
import json
import math
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import torch

import aimv2
from aimv2 import api
from aimv2.config.load import read_recipe
from aimv2.config.schema import Config, OptimConfig
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.interop.convert import convert
from aimv2.models.classifier import Classifier
from aimv2.models.create import build
from aimv2.models.init import init_weights
from aimv2.models.sizes import EncoderConfig
from aimv2.tasks.classify import count_classes
from aimv2.train.compiling import warm_up
from aimv2.train.launch import about_run
from aimv2.train.optim import layer_of, make_optimizer
from aimv2.train.step import FIRST_SCALE, TrainStep
from runs import bytes_read, metrics, resume, scenes

LARGE = 1 << 26  # bytes of an image that nobody needs to read
RECIPE = Path(__file__).parents[2] / "recipes" / "finetune-classes.yaml"
SHAPE = EncoderConfig("tiny", 32, 3, 2, 48, 8, 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"), 200)


def released_file(folder: Path, large: float = 1.0) -> Path:
    """A released-layout folder; ``large`` multiplies what the blocks add to the residual stream."""
    model = build(SHAPE, None, seed=0)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.down.weight.mul_(large)
            block.attn.proj.weight.mul_(large)
    convert(model, folder, "released")
    return folder


def finetune(data: Path, run: Path, source: Path, **more: object) -> dict:
    given = read_recipe(RECIPE) | {
        "init": str(source),
        "data.train": str(data),
        "data.workers": 0,
        "data.flip": 0.0,
        "data.crop_scale": 1.0,
        "data.shuffle_buffer": 50,
        "optim.lr": 3e-3,
        "optim.warmup": 5,
        "train.steps": 50,
        "train.batch_size": 32,
        "train.save_every": 0,
        "train.log_every": 1,
        "train.compile": "off",
        "eval.every": 0,
        "log.tensorboard": False,
        "log.report": False,
    }
    return api.pretrain(None, str(run), {**given, **{key.replace("__", "."): value for key, value in more.items()}})


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_fifty_steps_with_large_activations_stay_finite(precision: str, data: Path, tmp_path: Path) -> None:
    init = released_file(tmp_path / "m", large=3000.0)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert aimv2.load_model(init)(images, layers=[-1])[1][0].abs().max() > 5e3  # planted
    result = finetune(data, tmp_path / "run", init, train__precision=precision)
    losses = [line["class_loss"] for line in metrics(tmp_path / "run") if "class_loss" in line]
    assert len(losses) == 50 and all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert math.isfinite(result["val_class_loss"]) and 0 <= result["val_top1"] <= 1
    tuned, before = aimv2.load_model(tmp_path / "run"), aimv2.load_model(init)  # the encoder of the run
    assert not torch.equal(tuned.blocks[0].attn.qkv.weight, before.blocks[0].attn.qkv.weight)


def test_a_frozen_encoder_stays_as_it_is(data: Path, tmp_path: Path) -> None:
    init = released_file(tmp_path / "m")
    finetune(data, tmp_path / "run", init, objective__freeze=True, optim__layer_decay=1.0, train__steps=5)
    tuned, before = aimv2.load_model(tmp_path / "run"), aimv2.load_model(init)
    for key, value in before.state_dict().items():
        assert torch.equal(tuned.state_dict()[key], value), key
    card = (tmp_path / "run" / "checkpoints" / "step-0000005" / "model" / "README.md").read_text()
    assert "frozen encoder" in card


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resume_is_exact(precision: str, data: Path, tmp_path: Path) -> None:
    init = released_file(tmp_path / "m")
    more = {"train__steps": 6, "train__precision": precision}
    finetune(data, tmp_path / "whole", init, **more)
    finetune(data, tmp_path / "parts", init, **more, train__stop_at=3)
    init.rename(tmp_path / "gone")  # the run has all that it needs
    resume(tmp_path / "parts")
    keys = ("step", "class_loss", "grad_norm", "lr")
    one, two = ([[line.get(key) for key in keys] for line in metrics(tmp_path / name)] for name in ("whole", "parts"))
    assert one == two


def test_rates_fall_layer_by_layer() -> None:
    model = Classifier(SHAPE, 5)
    optimizer = make_optimizer(model, OptimConfig(layer_decay=0.5, decay="torch"))
    scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert set(scale) == {id(p) for p in named.values()}
    expected = {
        "encoder.patch_embed.position": 0.5**4,
        "encoder.blocks.0.mlp.down.weight": 0.5**3,
        "encoder.blocks.2.norm1.weight": 0.5,
        "encoder.norm.weight": 1.0,
        "probe.query": 1.0,
    }
    assert {name: scale[id(named[name])] for name in expected} == expected
    names = ("encoder.patch_embed.proj.bias", "encoder.blocks.1.x", "probe.linear.bias")
    assert [layer_of(name, 3) for name in names] == [0, 2, 4]


def test_an_overflow_in_fp16_halves_the_scale_and_skips_the_step() -> None:
    from aimv2.batch import make_batch

    config = Config()
    config.objective.name, config.objective.freeze = "probe", False
    config.train.precision, config.train.steps = "fp16", 10
    model = Classifier(SHAPE, 5)
    init_weights(model, 0)
    step = TrainStep(model, config, World(0, 1, torch.device("cpu")), False)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = make_batch(images, [[]] * 4, [1] * 4, 16, labels=[0, 1, 2, -1])
    step.loss_scale[0] = 2.0**24  # far too much
    before = model.encoder.blocks[0].attn.qkv.weight.clone()
    figures = step(batch, 5)
    assert step.loss_scale[0] == 2.0**23 and torch.equal(model.encoder.blocks[0].attn.qkv.weight, before)
    assert not figures.broken.any() and figures.counts.tolist() == [3]
    step.loss_scale[0] = FIRST_SCALE / 8
    step(batch, 5)
    assert not torch.equal(model.encoder.blocks[0].attn.qkv.weight, before)


def test_compiling_leaves_the_batch_norm_alone() -> None:
    config = Config()
    config.objective.name, config.train.precision = "probe", "fp32"
    model = Classifier(SHAPE, 5)
    init_weights(model, 0)
    step = TrainStep(model, config, World(0, 1, torch.device("cpu")), False)
    model.train()
    warm_up(step, 4, 8)
    assert model.probe.norm.num_batches_tracked == 0 and not model.probe.norm.running_mean.any()


def test_wrong_use(data: Path, tmp_path: Path) -> None:
    init = released_file(tmp_path / "m")
    for more, said in (
        ({"objective__heads": 5}, "objective.heads 5 does not divide"),
        ({"objective__classes": 1}, "objective.classes must be at least 2"),
        ({"init": "aimv2-larg-patch14-224"}, "did you mean 'aimv2-large-patch14-224'"),
        ({"init": None, "objective__freeze": True, "optim__layer_decay": 1.0}, "--init MODEL says which"),
        ({"objective__freeze": True, "optim__layer_decay": 0.9}, "does not learn unless objective.freeze is false"),
    ):
        with pytest.raises(UsageError, match=said):
            finetune(data, tmp_path / "run", init, **more)
    assert not (tmp_path / "run").exists()
    stored = json.loads((init / "config.json").read_text())
    assert stored["model_type"] == "aimv2"


@pytest.mark.parametrize("prefix", ["", "d" * 120 + "/"], ids=["plain names", "long names"])
def test_classes_are_counted_from_headers(prefix: str, tmp_path: Path) -> None:
    """Images are passed over: of ImageNet they are 150 GB, its labels 10 MB."""
    with open(tmp_path / "train-000000.tar", "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(3):
            for name, size in (("png", LARGE), ("cls", 1)):
                member = tarfile.TarInfo(f"{prefix}{number}.{name}")
                member.size = size
                file.write(member.tobuf(tarfile.GNU_FORMAT))
                if name == "cls":
                    file.write(str(2 * number).encode().ljust(512, b"\0"))
                else:
                    file.seek(size, 1)  # a hole
        tar.offset = file.tell()
    config = Config()
    config.data.train = str(tmp_path)
    before = bytes_read()
    assert count_classes(config) == 5
    assert bytes_read() - before < LARGE // 8


def test_a_weights_file_is_hashed_in_parts(tmp_path: Path) -> None:
    """Not read into memory: of a 3B model it has 11 GB."""
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(LARGE)
    config = Config()
    config.data.train = "shards"
    tracemalloc.start()
    try:
        found = about_run(config, weights)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found["weights_sha256"] == hashlib.sha256(bytes(LARGE)).hexdigest() and peak < LARGE // 8
