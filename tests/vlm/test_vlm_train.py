"""``aimv2 vlm train``: the answers are learned, the encoder is not, and a stop, two processes or packed rows change nothing."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from aimv2 import api
from aimv2.config.load import parse, read_recipe
from aimv2.config.recipes import recipe_file
from aimv2.data.scenes import write_scenes
from aimv2.data.shards.format import write_shard
from aimv2.data.stream.conversations import RowMaker
from aimv2.data.text.conversations import Conversation, Turn
from aimv2.errors import UsageError
from aimv2.explorer.study import open_shown
from aimv2.tasks.instruct import Instruct
from aimv2.vlm.model import open_vlm
from runs import assert_refused, light_collections, metrics, torchrun
from tiny_llm import encoder, inputs, language_model, picture

TINY = {
    "data.workers": 0, "data.shuffle_buffer": 20, "optim.lr": 3e-3, "optim.warmup": 1, "train.steps": 6, "train.batch_size": 8,
    "train.precision": "fp32", "train.log_every": 1, "train.save_every": 0, "eval.every": 3, "eval.samples": 12,
    "log.tensorboard": False, "log.report": False,
}  # fmt: skip
EXACT = ("step", "loss", "answer_loss", "grad_norm", "lr", "val_answer_loss", "val_answer_accuracy")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``vlm``, ``native`` and ``tiles``, and shards of conversations and of captions."""
    root = tmp_path_factory.mktemp("train")
    encoder(root / "eyes")
    encoder(root / "eyes-native", native=True)
    language_model(root / "llm", tie_word_embeddings=True, initializer_range=0.02)
    api.vlm_build(root / "eyes", root / "llm", root / "vlm", features="post-norm")
    api.vlm_build(root / "eyes", root / "llm", root / "plain")
    api.vlm_build(root / "eyes", root / "llm", root / "tiles", tiles=2)
    api.vlm_build(root / "eyes-native", root / "llm", root / "native", image_size=40)
    write_scenes(str(root / "talks"), 60, val_count=12, size=32, questions=2)
    write_scenes(str(root / "captions"), 20, val_count=12, size=32)
    halves = [shown(picture(32, 32), [Turn("user", "What?"), Turn("assistant", "a red square")]) for _ in range(32)]
    halves = [{name: part for name, part in one.items() if at >= 16 or name == "json"} for at, one in enumerate(halves)]
    (root / "halves").mkdir()
    write_shard(root / "halves" / "train-000000.tar", [(f"k{at:02}", one) for at, one in enumerate(halves)])
    held = [one if at % 2 else {"json": b"{}"} for at, one in enumerate(halves[16:24])]
    write_shard(root / "halves" / "val-000000.tar", [(f"k{at:02}", one) for at, one in enumerate(held)])
    return root


def train(root: Path, run: Path, vlm: str | Path = "vlm", data: str = "talks", **options: Any) -> Path:
    given = {key.replace("__", "."): value for key, value in options.items()}
    with light_collections():
        api.vlm_train(run=str(run), options={**TINY, "init": str(root / vlm), "data.train": str(root / data), **given})
    return run


def exact(run: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT if key in line} for line in metrics(run)]


def close(one: Path, other: Path) -> bool:
    pairs = list(zip(exact(one), exact(other), strict=True))
    return all(left == pytest.approx(right, rel=2e-4, abs=1e-7) for left, right in pairs)


def without_dtype(about: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in about.items() if key != "dtype"}


def folder_of(run: Path, step: int = 6) -> Path:
    return run / "checkpoints" / f"step-{step:07d}" / "model"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(root, tmp_path_factory.mktemp("run") / "run")


def test_the_answers_are_learned_and_the_encoder_stays(root: Path, run: Path) -> None:
    first, *_, last = [line for line in metrics(run) if "loss" in line]
    assert last["loss"] < first["loss"] - 0.1
    assert 0 <= metrics(run)[-1]["val_answer_accuracy"] <= 1
    before, after = weights(root / "vlm"), weights(folder_of(run))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if ".vision_model." in name} != set()


@torch.no_grad()
def test_transformers_opens_the_runs_folder(root: Path, run: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, found = AutoModelForImageTextToText.from_pretrained(folder_of(run), output_loading_info=True)
    assert not any(found.values()), found
    processor = AutoProcessor.from_pretrained(folder_of(run))
    given = inputs(processor, picture(50, 20))
    ours, _ = open_vlm(run)
    found = ours(given["input_ids"], given["pixel_values"], given["attention_mask"])
    torch.testing.assert_close(model.eval()(**given).logits, found, rtol=1e-4, atol=1e-5)
    for name in ("generation_config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (folder_of(run) / name).read_bytes() == (root / "vlm" / name).read_bytes(), name
    about = [
        json.loads((folder / "config.json").read_text(), object_hook=without_dtype)
        for folder in (folder_of(run), root / "vlm")
    ]
    assert about[0] == about[1]
    assert "val_answer_loss" in (folder_of(run) / "README.md").read_text()


@pytest.mark.parametrize("vlm", ["vlm", "native", "tiles"])
@torch.no_grad()
def test_rows_are_what_the_processor_makes(vlm: str, root: Path) -> None:
    ours, processor = open_vlm(root / vlm)
    maker, images = RowMaker(processor, None, False, "?", 10**8), [picture(50, 20), picture(21, 64), picture(32, 32)]
    for image in images:
        turns = [Turn("user", "<image>\nWhat is this?"), Turn("assistant", "a <small> square")]
        row = maker("key", shown(image, turns))
        messages = Conversation(tuple(turns)).messages()
        messages[0]["content"][0] = {"type": "image", "image": image}
        given = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert maker.chat.tokenizer.decode(row.ids) == maker.chat.tokenizer.decode(given["input_ids"][0])
        height, width = row.sizes[0]
        pixels = torch.from_numpy(row.pixels[0])
        pixels = pixels[:, :height, :width] if vlm == "native" else pixels
        wanted = given["pixel_values"][0]
        found = ours.encoder.normalize(pixels if vlm == "tiles" else pixels[None])
        torch.testing.assert_close(
            found.squeeze(0), wanted[..., : found.shape[-2], : found.shape[-1]], rtol=1e-5, atol=1e-5
        )
        if vlm == "tiles":
            assert row.sizes[0] == tuple(given["image_sizes"][0].tolist())


def shown(image: Image.Image, turns: list[Turn]) -> dict[str, bytes]:
    """A sample of shards."""
    png = io.BytesIO()
    image.save(png, "PNG")
    return {"png": png.getvalue(), "json": json.dumps({"conversations": Conversation(tuple(turns)).record()}).encode()}


def test_a_stopped_run_goes_on_exactly(root: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "vlm", tmp_path / "vlm")
    train(root, tmp_path / "run", tmp_path / "vlm", train__stop_at=2)
    shutil.rmtree(tmp_path / "vlm")  # the run has all that it needs
    with light_collections():
        api.vlm_train(run=str(tmp_path / "run"), options={"resume": True})
    assert exact(tmp_path / "run") == exact(run)
    one, other = weights(folder_of(run)), weights(folder_of(tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "options", [{"objective__pack": True}, {"train__accumulate": 2}, {"train__checkpointing": True}]
)
def test_layout_of_the_rows_changes_nothing(root: Path, run: Path, options: dict[str, Any], tmp_path: Path) -> None:
    assert close(train(root, tmp_path / "other", **options), run)


def test_bf16_learns_as_fp32(root: Path, run: Path, tmp_path: Path) -> None:
    half = train(root, tmp_path / "half", train__precision="bf16", eval__every=0)
    losses = [[line["loss"] for line in metrics(one) if "loss" in line] for one in (half, run)]
    pairs = list(zip(*losses, strict=True))
    assert len(pairs) > 3 and all(one == pytest.approx(other, rel=0.02) and one != other for one, other in pairs)
    assert pairs[-1][0] < pairs[0][0] - 0.1


@pytest.mark.parametrize("data", ["talks", "halves"])
def test_two_processes_equal_one(data: str, root: Path, tmp_path: Path) -> None:
    """``halves``: the rows of the first process have no image, and all its held-out rows are bad."""
    one = train(root, tmp_path / "one", data=data, data__workers=2, train__steps=3)
    given = {
        **TINY,
        "train.steps": 3,
        "train.accumulate": 2,
        "init": str(root / "vlm"),
        "data.train": str(root / data),
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    ended = torchrun(2, "vlm", "train", *words, "--run", str(tmp_path / "two"))
    assert ended.returncode == 0, ended.stderr
    assert close(tmp_path / "two", one)
    assert data == "talks" or "left out: no turns, or an empty question: 4" in ended.stderr
    first, second = weights(folder_of(one, 3)), weights(folder_of(tmp_path / "two", 3))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("vlm", ["vlm", "plain"])
def test_low_rank_updates_are_merged(vlm: str, root: Path, tmp_path: Path) -> None:
    """``plain`` has the features and the names of transformers' own Llava: its encoder's layers are adapted no more than the other's."""
    pytest.importorskip("peft")
    kind = {"vlm": "deepseek_vl", "plain": "llava"}[vlm]
    assert json.loads((root / vlm / "config.json").read_text())["model_type"] == kind
    run = train(root, tmp_path / "run", vlm, optim__lora=2, train__steps=2, eval__every=0)
    before, after = weights(root / vlm), weights(folder_of(run, 2))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(
        (".layers." in name and "_proj" in name) or "aligner." in name or "_projector." in name for name in moved
    )
    assert not any("vision" in name for name in moved)
    ranks = {
        torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3).item() for name in moved if "_proj." in name
    }
    assert ranks == {2}


@pytest.mark.parametrize(("vlm", "data"), [("native", "talks"), ("tiles", "talks"), ("vlm", "captions")])
def test_other_images_and_captions_train(vlm: str, data: str, root: Path, tmp_path: Path) -> None:
    run = train(root, tmp_path / "run", vlm, data, train__steps=2, eval__every=0)
    assert metrics(run)[-1]["val_answer_loss"] > 0


@pytest.mark.parametrize(("vlm", "freeze"), [("vlm", False), ("plain", False), ("plain", True)])
def test_an_encoder_learns_where_it_may(vlm: str, freeze: bool, root: Path, tmp_path: Path) -> None:
    run = train(root, tmp_path / "run", vlm, train__steps=2, eval__every=0, objective__freeze=freeze)
    before, after = weights(root / vlm), weights(folder_of(run, 2))
    eyes = {name for name in before if "vision" in name}
    learned = {name for name in eyes if not torch.equal(before[name], after[name])}
    weighty = {name for name in eyes if name.endswith(("fc1.weight", "gate_proj.weight"))}
    assert weighty
    assert learned == set() if freeze else learned >= weighty


# Table C1: learning rate of the language model, batch, warm-up, iterations; and the GPUs that the header names
COLUMNS = {"llava": (1e-5, 128, 250, 5_000, 8), "cambrian": (2e-5, 512, 700, 14_000, 32)}


@pytest.mark.parametrize("column", COLUMNS)
def test_recipes_hold_table_c1_and_their_twins_run(column: str, root: Path, tmp_path: Path) -> None:
    path = recipe_file(f"vlm-{column}", "--config")
    config, text = parse(read_recipe(path)), path.read_text()
    rate, batch, warmup, steps, gpus = COLUMNS[column]
    optim, objective = config.optim, config.objective
    assert (optim.lr, optim.min_lr, optim.warmup, optim.schedule, optim.clip) == (rate, 0.0, warmup, "cosine", 1.0)
    assert (optim.betas, optim.weight_decay, optim.decay) == ((0.9, 0.999), 0.01, "torch")
    assert (config.train.batch_size, config.train.steps, objective.freeze) == (batch, steps, True)
    assert objective.connector_scale * rate == pytest.approx({"llava": 8e-5, "cambrian": 1.6e-4}[column])
    for line in text.splitlines():
        assert line.startswith("#") or line.endswith(":") or re.search(r"# (Table C1|section 5.6|ours)", line), line
    a_row = 6 * 8_030_261_248 * 776 + 2 * 309_525_504 * 576
    total = a_row * batch * steps
    found = [
        float(re.search(pattern, text)[1]) for pattern in (r"hours +(\S+) ", r"\): (\S+) FLOPs a", r"= (\S+) FLOPs")
    ]  # type: ignore[index]
    assert found == pytest.approx([total / (gpus * 989e12 * 0.4) / 3600, a_row, total], rel=0.02)
    small = {
        "train.steps": 3,
        "train.batch_size": 8,
        "optim.warmup": 1,
        "eval.samples": 4,
        "data.workers": 0,
        "log.report": True,
    }
    given = {**small, "init": str(root / "vlm"), "data.train": str(root / "talks"), "log.tensorboard": False}
    with light_collections():
        tried = api.vlm_train(str(path), options=given, dry_run=True)
        summary = api.vlm_train(str(path), str(tmp_path / "run"), given)
    assert tried["samples"] == 60
    assert summary["step"] == 3 and 0 <= summary["val_answer_accuracy"] <= 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "answer loss" in page.lower() and "vision-language" in page
    assert open_shown(str(tmp_path / "run"), "cpu").talker is not None, "the explorer takes the run"


@pytest.mark.parametrize("name", ["vlm", "native", "tiles"])
def test_the_shape_of_the_encoder_is_known_without_its_weights(name: str, root: Path) -> None:
    config = parse({"objective.name": "instruct", "init": str(root / name), "data.train": str(root / "talks")})
    assert Instruct(config).encoder_config(1) == open_vlm(root / name)[0].encoder.config


def test_wrong_use_is_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def words(**more: Any) -> list[str]:
        given = {**TINY, "run": tmp_path / "run", "init": root / "vlm", "data.train": root / "talks"}
        given |= {key.replace("__", "."): value for key, value in more.items()}
        return ["vlm", "train", *(str(word) for key, value in given.items() for word in (f"--{key}", value))]

    assert_refused(capsys, words(init=root / "eyes"), "an encoder", "vlm build")
    assert_refused(capsys, words(init=root / "llm"), "init", "llama")
    assert_refused(capsys, words(objective__row_tokens=18), "18 tokens", "16 of them of images", "objective.row_tokens")
    assert_refused(capsys, words(objective__name="pretrain"), "aimv2 pretrain")
    assert_refused(capsys, words(eval__knn=True), "eval.knn")
    (root / "bare").mkdir()
    png = shown(picture(32, 32), [Turn("user", "a"), Turn("assistant", "b")])["png"]
    write_shard(root / "bare" / "train-000000.tar", [(f"k{at}", {"png": png, "cls": b"1"}) for at in range(8)])
    with pytest.raises(UsageError, match="or has captions") as bare:
        train(root, tmp_path / "run", data="bare")
    assert (bare.value.code, bare.value.option) == ("missing", "data.train")
    unread = {"data.tokenizer": "clip", "data.max_tokens": 5, "data.pack": 4, "data.crop_scale": 0.9, "data.flip": 0.0}
    for key, value in {**unread, "eval.prefixes": "[0.2]", "eval.captions": 3, "model.width": 64}.items():
        with pytest.raises(UsageError) as error:
            train(root, tmp_path / "run", **{key: value})
        assert (error.value.code, error.value.option) == ("conflict", key)
    assert_refused(capsys, words(objective__connector_scale=-1), "objective.connector_scale")
    assert_refused(capsys, ["pretrain", *words(objective__name="pretrain")[2:]], "vision-language model", "vlm train")
    assert_refused(
        capsys, ["vlm", "train", "--init", str(root / "vlm"), "--run", str(tmp_path / "run")], "data.train is not set"
    )
    with pytest.raises(UsageError) as missing:
        api.vlm_train(run=str(tmp_path / "run"), options={"data.train": str(root / "talks")})
    assert (missing.value.code, missing.value.option) == ("missing", "--init")
    assert not (tmp_path / "run").exists()
