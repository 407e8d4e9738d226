"""Locked-image tuning end to end: frozen encoder, exact resumption, ranks, cached features, verbs, wrong use."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import aimv2
from aimv2 import api
from aimv2.batch import Batch, make_batch, split_batch
from aimv2.config.load import parse
from aimv2.config.schema import Config
from aimv2.data.shards.format import read_samples, scan_shard, write_shard
from aimv2.data.stream.samples import View, training_shards
from aimv2.data.text.tokenizer import train_tokenizer
from aimv2.distributed import World, join_world, local
from aimv2.errors import UsageError
from aimv2.models.create import create_model
from aimv2.models.flops import step_flops
from aimv2.models.init import init_weights
from aimv2.models.lit import LiT, LiTConfig, TextConfig, TunedLiT
from aimv2.models.sizes import EncoderConfig, encoder_flops
from aimv2.tasks import task_of
from aimv2.tasks.contrastive import default_tower
from aimv2.tasks.held_out import read_held_out
from aimv2.tasks.task import Context
from aimv2.train.compiling import can_compile
from aimv2.train.prepare import get_tokenizer
from aimv2.train.step import TrainStep
from forked import call_on_ranks, forked
from runs import TINY, metrics, need_ranks, options, resume, scenes, torchrun, train
from world import TinyWorld

SHAPE = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}
PAIR: dict[str, Any] = {
    "objective__name": "contrastive",
    "model__text_width": 32,
    "model__text_depth": 2,
    "model__text_heads": 2,
    "model__text_hidden": 64,
    "model__projection": 24,
}
ALONE = World(0, 1, torch.device("cpu"))
FIGURES = ("val_contrastive_loss", "val_image_to_text", "val_text_to_image", "val_scale")
EXACT = ("step", "loss", "grad_norm", "lr", *FIGURES)


@pytest.fixture(scope="module")
def data(world: TinyWorld) -> Path:
    return world.scenes


@pytest.fixture(scope="module")
def encoder(world: TinyWorld) -> Path:
    """A model with its decoder: of it the encoder is taken."""
    return world.encoder


def tune(data: Path, encoder: Path, run: Path, **more: Any) -> dict[str, Any]:
    return train(data, run, **{"init": str(encoder), **PAIR, **more})


def exact(run: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT if key in line} for line in metrics(run)]


def model_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:07d}" / "model"


@pytest.fixture(scope="module")
def tuned(data: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of forty steps."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    tune(data, encoder, run, train__steps=40, train__batch_size=24, optim__lr=3e-3)
    return run


def test_the_loss_falls_and_the_encoder_stays_as_it_was(tuned: Path, encoder: Path) -> None:
    losses = [line["contrastive_loss"] for line in metrics(tuned) if "loss" in line]
    assert len(losses) == 40 and all(np.isfinite(losses))
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:4])
    pair, before = aimv2.load_model(tuned), aimv2.load_model(encoder)
    assert isinstance(pair, LiT) and pair.image.config.pool_heads == 2
    after = pair.image.state_dict()
    for key, value in before.state_dict().items():
        assert torch.equal(after[key], value), key
    summary = json.loads((tuned / "summary.json").read_text())
    assert summary["val_contrastive_loss"] < np.log(24) and summary["val_pairs"] == 16
    assert all(0 <= summary[key] <= 1 for key in ("val_image_to_text", "val_text_to_image"))
    assert summary["parameters"] > summary["encoder_parameters"] > 0
    card = (model_of(tuned, 40) / "README.md").read_text()
    assert "image-text pair" in card and "contrastive, softmax" in card and "frozen encoder" in card


def test_the_saved_pair_reads_texts_and_goes_to_the_released_layout_and_back(tuned: Path, tmp_path: Path) -> None:
    pair = aimv2.load_model(tuned)
    tokens = pair.tokenizer(["a red circle", "a blue square"])
    assert tokens.shape == (2, 77) and len(set(tokens[:, 0].tolist())) == 1 and pair.tokenizer.start == tokens[0, 0]
    for to in ("released", "transformers"):
        api.convert(str(tuned), str(tmp_path / to), to)
        back = aimv2.load_model(tmp_path / to)
        assert isinstance(back, LiT) and back.log_scale.shape == ()
        assert back.state_dict().keys() == pair.state_dict().keys()
        for key, value in pair.state_dict().items():
            assert torch.equal(back.state_dict()[key], value), key
        assert torch.equal(back.encode_text(["a red circle"]), pair.encode_text(["a red circle"]))


@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
def test_resumed_run_equals_an_undisturbed_one(contrast: str, data: Path, encoder: Path, tmp_path: Path) -> None:
    gone = tmp_path / "model"
    gone.mkdir()
    for file in encoder.iterdir():
        (gone / file.name).write_bytes(file.read_bytes())
    more = {"objective__contrast": contrast, "eval__every": 3}
    tune(data, gone, tmp_path / "whole", **more)
    tune(data, gone, tmp_path / "parts", **more, train__stop_at=2)
    gone.rename(tmp_path / "moved")  # the run has all that it needs
    result = resume(tmp_path / "parts")
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")
    one, two = (model_of(tmp_path / name, 6) / "model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()
    assert ("val_bias" in result) == (contrast == "sigmoid")
    if contrast == "sigmoid":
        assert result["val_bias"] == pytest.approx(-10, abs=0.1) and result["val_scale"] == pytest.approx(10, rel=0.1)
        assert isinstance(aimv2.load_model(tmp_path / "parts"), LiT)


def test_a_tower_that_nobody_described() -> None:
    """The released one beside encoders of its width or more, one of the encoder's shape beside narrower ones."""
    large = EncoderConfig("large", 1024, 24, 8, 2816, 14, 224)
    assert default_tower(large) == (TextConfig(), 768)
    tower, projection = default_tower(EncoderConfig("tiny", 96, 4, 3, 256, 4, 32))
    assert (tower.width, tower.depth, tower.heads, tower.hidden, projection) == (96, 4, 3, 256, 96)


def test_zero_shot_and_retrieval_measure_the_run(tuned: Path, data: Path, tmp_path: Path) -> None:
    found = api.zeroshot(str(tuned), str(data), out=str(tmp_path / "zero"))
    assert found["protocol"]["name"] == "zero-shot, contrastive"
    assert 0 <= found["figures"]["top1"] <= 1
    found = api.retrieve(str(tuned), str(data), out=str(tmp_path / "retrieve"), k="1,5")
    assert found["protocol"]["name"] == "retrieval, contrastive"
    assert 0 <= found["figures"]["text_to_image"]["R@1"] <= found["figures"]["text_to_image"]["R@5"] <= 1


# ---- ranks ----


def pairs() -> Batch:
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=draw)
    return make_batch(images, [[2, 5, 6, 1], [2, 7, 1], [2, 8, 9, 10, 11, 12, 1], [2, 1]], [1] * 4, 16)


def one_step(world: World, batch: Batch, contrast: str) -> tuple[Any, dict[str, torch.Tensor]]:
    config = Config()
    config.train.precision, config.train.steps, config.optim.warmup = "fp32", 10, 0
    config.objective.name, config.objective.contrast = "contrastive", contrast  # type: ignore[assignment]
    image = EncoderConfig("tiny", 32, 2, 2, 64, 8, 32, pool_heads=2)
    model = TunedLiT(LiTConfig(image, TextConfig(24, 2, 2, 32, 20, 12, end=1), 16), contrast == "sigmoid")
    init_weights(model, 0)
    step, gradients = TrainStep(model, config, world, False), {}

    def keep() -> None:
        for name, parameter in step.model.named_parameters():
            if (gradient := parameter.grad) is not None:
                gradients[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()

    clip = step.clip
    step.clip = lambda: (keep(), clip())[1]  # type: ignore[method-assign]
    figures = step(batch, 0)
    local(step.model.log_scale).fill_(9.0)
    step.task.after_step(step.model)
    return figures, {**gradients, "scale, held": local(step.model.log_scale).clone()}


def rank_main(folder: Path, contrast: str) -> None:
    world = join_world()
    figures, gradients = one_step(world, split_batch(pairs(), 2, 16)[world.rank], contrast)
    if world.main:
        torch.save({"means": figures.means, "norm": figures.norm, "gradients": gradients}, folder / "two.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("contrast", ["softmax", "sigmoid"])
def test_two_gloo_processes_give_the_gradients_of_one(contrast: str, tmp_path: Path) -> None:
    figures, gradients = one_step(World(0, 1, torch.device("cpu")), pairs(), contrast)
    need_ranks(2)
    call_on_ranks(2, rank_main, tmp_path, contrast)
    two = torch.load(tmp_path / "two.pt")
    torch.testing.assert_close(two["means"], figures.means, rtol=1e-5, atol=0)
    torch.testing.assert_close(two["norm"], figures.norm, rtol=1e-5, atol=0)
    assert two["gradients"].keys() == gradients.keys() and "text.blocks.0.attn.qkv.weight" in gradients
    assert gradients["scale, held"].exp().item() == pytest.approx(100)
    assert "image.head.query" in gradients and "image.norm.weight" not in gradients
    for name, gradient in gradients.items():
        close = {"rtol": 1e-5, "atol": 1e-5 * float(gradient.abs().max())}
        torch.testing.assert_close(
            two["gradients"][name], gradient, **close, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_scale_at_its_limit_comes_back() -> None:
    """Pairs that do not match want a smaller scale; above the limit the clamp would give them no gradient."""
    config = Config()
    config.train.precision, config.optim.warmup, config.optim.lr = "fp32", 0, 1e-2
    config.objective.name = "contrastive"
    image = EncoderConfig("tiny", 32, 2, 2, 64, 8, 32, pool_heads=2)
    model = TunedLiT(LiTConfig(image, TextConfig(24, 2, 2, 32, 20, 12, end=1), 16), False)
    init_weights(model, 0)
    with torch.no_grad():
        model.log_scale.fill_(6.0)  # as after a step that was too long
    step, scales = TrainStep(model, config, World(0, 1, torch.device("cpu")), False), []
    for number in range(3):
        step(pairs(), number)
        scales.append(model.log_scale.item())
    assert scales[0] == model.max_log_scale and scales[2] < scales[1] < scales[0]


@pytest.mark.parametrize("bound", ["lower", "upper"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_scale_has_a_gradient_at_its_bounds(
    bound: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever torch's clamp has there: 1 up to 2.13, 0 from 2.14 on, with which a scale at its limit would stay for ever."""
    clamp = torch.Tensor.clamp

    def newer(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        inside = (x > low) & (x < high)
        return torch.where(inside, x, clamp(x.detach(), low, high))

    monkeypatch.setattr(torch.Tensor, "clamp", newer)
    image = EncoderConfig("tiny", 32, 2, 2, 64, 8, 32, pool_heads=2)
    model = LiT(LiTConfig(image, TextConfig(24, 2, 2, 32, 20, 12, end=1), 16))
    at = model.max_log_scale if bound == "upper" else 0.0
    model.log_scale = torch.nn.Parameter(torch.full(shape, at))
    model.scale.sum().backward()
    assert model.log_scale.grad is not None
    assert model.log_scale.grad.item() == pytest.approx(math.exp(at)) == model.scale.item()
    with torch.no_grad():
        model.log_scale.fill_(9.0)  # beyond it the value is held
    assert model.scale.item() == pytest.approx(100)


@pytest.mark.parametrize("cached", [False, True])
def test_two_processes_have_the_figures_of_one(cached: bool, data: Path, encoder: Path, tmp_path: Path) -> None:
    more = {**PAIR, "init": str(encoder), "eval__every": 3, "eval__samples": 15}
    one, two = dict(more), dict(more)
    if cached:
        one["data__features"], two["data__features"] = tmp_path / "features1", tmp_path / "features2"
    train(data, tmp_path / "one", data__workers=2, **{key: str(value) for key, value in one.items()})
    ended = torchrun(2, *options(data, tmp_path / "two", data__workers=1, **two))
    assert ended.returncode == 0, ended.stderr[-3000:]
    left, right = exact(tmp_path / "one"), exact(tmp_path / "two")
    assert len(left) == len(right) == 8
    for one_line, two_line in zip(left, right):
        assert two_line == pytest.approx(one_line, rel=2e-4)
    ended = torchrun(2, *options(data, tmp_path / "parts", data__workers=1, **two, train__stop_at=2))
    assert ended.returncode == 0, ended.stderr[-3000:]
    ended = torchrun(2, "pretrain", "--run", str(tmp_path / "parts"), "--resume")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert exact(tmp_path / "parts") == right


# ---- cached features ----


def test_cached_features_train_as_the_encoder_does(
    data: Path, encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "features"
    tune(data, encoder, tmp_path / "whole", data__features=str(home))
    assert "centre view only" in capfd.readouterr().err
    features = np.load(home / "last.npy", mmap_mode="r")
    assert features.shape == (120, 16, 32) and features.dtype == np.float16
    written = (home / "last.npy").stat().st_mtime_ns
    tune(data, encoder, tmp_path / "parts", data__features=str(home), train__stop_at=2)
    resume(tmp_path / "parts")
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")
    assert (home / "last.npy").stat().st_mtime_ns == written, "computed once"
    losses = [line["contrastive_loss"] for line in metrics(tmp_path / "whole") if "loss" in line]
    assert all(np.isfinite(losses))
    model = aimv2.load_model(tmp_path / "whole")
    seen = {tuple(np.round(row[0, :4].astype(np.float32), 2)) for row in features}
    assert len(seen) > 100 and torch.equal(model.image.norm.weight, aimv2.load_model(encoder).norm.weight)


def test_cached_features_give_the_loss_of_the_images(data: Path, encoder: Path, tmp_path: Path) -> None:
    given = {**TINY, "data.train": str(data), "data.features": str(tmp_path / "features"), "init": str(encoder)}
    config = parse(given | {key.replace("__", "."): value for key, value in PAIR.items()})
    tokenizer = get_tokenizer(config, None, ALONE)
    task, context = task_of(config), Context(tokenizer, ALONE)
    model = task.build(context)
    stream = task.stream(context, model)
    assert tokenizer is not None and stream is not None
    batch, (shards,) = next(stream), training_shards(config.data)
    seen = read_held_out(shards, View(32, 16, True), tokenizer, 0)  # centre crops
    images = seen.images[[seen.keys.index(key) for key in batch.keys]]
    assert isinstance(images, torch.Tensor) and batch.features is not None
    assert batch.features.shape == (8, 16, 32) and batch.images.numel() == 0
    torch.testing.assert_close(batch.features.float(), model.image(images), rtol=2e-3, atol=2e-3)
    both = batch, replace(batch, images=images, features=None)
    losses = [task.objective(model)(model, one)["contrastive"][0] for one in both]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_an_interrupted_pass_resumes(
    data: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aimv2.features.training_cache.PART_BATCHES", 1)
    home = tmp_path / "features"
    tune(data, encoder, tmp_path / "one", data__features=str(home), train__steps=2)
    whole = np.load(home / "last.npy").copy()
    lost = np.lib.format.open_memmap(home / "last.npy", mode="r+")
    lost[64:] = 0
    lost.flush()
    (home / "part-00001.json").rename(home / ".part-00001.json.aside")  # killed while writing
    tune(data, encoder, tmp_path / "two", data__features=str(home), train__steps=2)
    assert np.array_equal(np.load(home / "last.npy"), whole) and exact(tmp_path / "two") == exact(tmp_path / "one")


def test_a_cache_of_another_model_or_data_is_refused(data: Path, encoder: Path, tmp_path: Path) -> None:
    home = str(tmp_path / "features")
    tune(data, encoder, tmp_path / "run", data__features=home, train__steps=2)
    other = create_model("aimv2-tiny-patch8-32", seed=6, **SHAPE)
    api.save_pretrained(other, tmp_path / "other")
    larger = create_model("aimv2-tiny-patch8-32", seed=6, image_size=48, **SHAPE)
    api.save_pretrained(larger, tmp_path / "larger")
    more = scenes(tmp_path / "scenes", 90)
    (shard,), told = data.glob("train-*.tar"), tmp_path / "told"
    told.mkdir()
    samples = [  # the same images, keys and lengths; other words
        (key, {name: body.replace(b"red", b"tan") if name in ("txt", "json") else body for name, body in parts.items()})
        for key, parts in read_samples(shard)
    ]
    write_shard(told / shard.name, samples)
    assert scan_shard(told / shard.name).offsets == scan_shard(shard).offsets
    for shards, model, size, differs in (
        (data, tmp_path / "other", 32, "model;"),
        (data, tmp_path / "larger", 48, "model, architecture, view;"),
        (more, encoder, 32, "number of images, state of the image files"),
        (told, encoder, 32, "another state of the image files"),
    ):
        with pytest.raises(UsageError, match=rf"data\.features .*{differs}"):
            tune(shards, model, tmp_path / "refused", data__features=home, model__image_size=size)
    assert not (tmp_path / "refused").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError) as error:
        tune(data, encoder, tmp_path / "refused", data__features=str(tmp_path / "full"))
    assert (error.value.option, error.value.code) == ("data.features", "exists")


def test_samples_without_a_caption_are_bad(data: Path, encoder: Path, tmp_path: Path) -> None:
    samples = []
    for number in range(20):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (12 * number, 90, 30)).save(file, "PNG")
        text = {"txt": f"a thing in colour {number}".encode()} if number % 7 else {}
        samples.append((f"k{number}", {"png": file.getvalue(), **text}))
    write_shard(tmp_path / "train-000000.tar", samples)
    for more in ({"data__features": str(tmp_path / "features")}, {}):
        with pytest.raises(UsageError, match=r"data\.max_bad allows 2: .*k\d+ \(no caption\)"):
            tune(tmp_path, encoder, tmp_path / "few", data__max_bad=2, train__steps=6, **more)
    tune(
        tmp_path, encoder, tmp_path / "run", data__features=str(tmp_path / "features"), data__max_bad=3, train__steps=6
    )
    note = json.loads((tmp_path / "features" / "part-00000.json").read_text())
    assert (note["rows"], [line["key"] for line in note["rejected"]]) == (17, ["k0", "k7", "k14"])
    with pytest.raises(UsageError, match=r"data\.max_bad allows 2: .*k0"):  # known by then
        tune(tmp_path, encoder, tmp_path / "again", data__features=str(tmp_path / "features"), data__max_bad=2)


@pytest.mark.parametrize("more", [{"train__checkpointing": "full"}, {"train__compile": "on"}, {"train__ema": 0.5}])
def test_what_must_not_change_the_losses(more: dict[str, Any], data: Path, encoder: Path, tmp_path: Path) -> None:
    if "train__compile" in more and (reason := can_compile(torch.device("cpu"))) is not None:
        pytest.skip(f"torch.compile does not work here: {reason}")
    tune(data, encoder, tmp_path / "plain", train__steps=3, data__max_tokens=40)
    tune(data, encoder, tmp_path / "run", train__steps=3, data__max_tokens=40, **more)  # two widths of captions
    plain, other = ([line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in ("plain", "run"))
    assert other == pytest.approx(plain, rel=1e-4)
    assert torch.equal(aimv2.load_model(tmp_path / "run").image.norm.weight, aimv2.load_model(encoder).norm.weight)


# ---- the rest ----


def test_arithmetic_of_a_step() -> None:
    image = EncoderConfig("tiny", 32, 2, 2, 64, 8, 32, pool_heads=2)
    pair = LiTConfig(image, TextConfig(24, 2, 2, 32, 20, 12, end=1), 16)
    run, read = (step_flops(TunedLiT(pair, False, cached), 8, 16, 40) for cached in (False, True))
    assert run - read == 8 * encoder_flops(image), "the trunk runs forwards alone"
    text = 2 * 40 * (2 * (4 * 24**2 + 3 * 24 * 32) + 4 * 24 * 5)
    head = 8 * 16 * (4 * 32**2 + 4 * 32) + 8 * 2 * 32**2
    ends = 8 * 2 * 16 * (32 + 24) + 2 * 2 * 8**2 * 16
    assert read == 3 * (text + head + ends)


def test_dry_run_writes_no_features(data: Path, encoder: Path, tmp_path: Path) -> None:
    given = {"objective.name": "contrastive", "init": str(encoder), "data.train": str(data), "train.precision": "fp32"}
    given |= {
        "data.workers": 0,
        "train.batch_size": 8,
        "train.compile": "off",
        "data.features": str(tmp_path / "features"),
    }
    given |= {"model.text_depth": 1}
    found = api.pretrain(None, None, given, dry_run=True)
    assert found["seconds_a_step"] > 0 and not (tmp_path / "features").exists()


def blank_shards(folder: Path) -> Path:
    samples = []
    for number in range(20):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (12 * number, 90, 30)).save(file, "PNG")
        samples.append((f"k{number}", {"png": file.getvalue()}))
    folder.mkdir()
    write_shard(folder / "train-000000.tar", samples)
    return folder


def test_wrong_use(data: Path, encoder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    train_tokenizer(["a red circle"] * 3, 280).save(plain)
    noise = tmp_path / "noise"
    noise.mkdir()
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, noise / "model.safetensors")
    for shards, more, said in (
        (data, {"init": None}, "--init MODEL says which"),
        (data, {"init": str(noise)}, "no layout of AIMV2 fits"),
        (blank_shards(tmp_path / "blank"), {}, "captions missing.*import them with --captions$"),
        (data, {"train__accumulate": 2}, r"train\.accumulate 2 .*train\.checkpointing=full"),
        (data, {"model__image_size": 64}, "its frozen encoder takes 32 px, model.image_size is 64"),
        (data, {"model__width": 64}, "its encoder has width 32, model.width is 64"),
        (data, {"model__text_heads": 5}, "model.text_heads 5 does not divide model.text_width 32"),
        (data, {"optim__layer_decay": 0.8}, r"optim\.layer_decay 0\.8: the encoder of .* does not learn"),
        (data, {"model__projection": 0}, "model.projection must be at least 1"),
        (data, {"data__tokenizer": str(plain)}, r"data\.tokenizer: .* has no start of text"),
        (data, {"data__vocab_size": 258}, "expected at least 259"),
        (
            data,
            {"objective__name": "pretrain", "init": None, "data__features": "x"},
            "data.features is for objective.name",
        ),
    ):
        with pytest.raises(UsageError, match=said):
            tune(shards, encoder, tmp_path / "run", **more)
        assert not (tmp_path / "run").exists(), more


def test_wrong_use_is_one_line_and_exit_2(data: Path, encoder: Path, tmp_path: Path) -> None:
    ended = forked(*options(data, tmp_path / "run", **PAIR, init=encoder, train__accumulate=2))
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert [line for line in ended.stderr.splitlines() if line.startswith("error: ")] == [
        "error: objective.name=contrastive compares each pair with the whole batch: train.accumulate 2 would lose most of the "
        "others; use 1, and train.checkpointing=full where memory is short"
    ]
