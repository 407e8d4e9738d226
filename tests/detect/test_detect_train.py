"""``aimv2 detect train``: boxes are learned, the encoder is not, and neither a stop nor two processes change anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import aimv2
from aimv2 import api
from aimv2.config.load import parse
from aimv2.data.scene_objects import SceneLayout, make_layout
from aimv2.data.scenes import write_scenes
from aimv2.data.shards.format import read_samples, write_shard
from aimv2.detect.find import open_detector
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.interop.model_folder import save_model
from aimv2.tasks import task_of
from aimv2.tasks.detect import Detect
from aimv2.tasks.task import Context
from runs import assert_refused, light_collections, metrics, torchrun

TINY = {
    "data.workers": 0, "data.shuffle_buffer": 20, "optim.lr": 1e-3, "optim.warmup": 1, "train.steps": 6, "train.batch_size": 8,
    "train.precision": "fp32", "train.log_every": 1, "train.save_every": 0, "eval.every": 3, "eval.samples": 6,
    "log.tensorboard": False, "log.report": False, "objective.width": 32, "objective.encoder_layers": 1, "objective.decoder_layers": 2,
    "objective.queries": 10, "objective.pyramid": [1, 0.5],
}  # fmt: skip
ALONE = World(0, 1, torch.device("cpu"))
EXACT = ("step", "loss", "class_loss", "box_loss", "giou_loss", "grad_norm", "lr", "val_ap", "val_ap50", "val_p_at_1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``eyes``, an encoder, and ``scenes``, shards with boxes and phrases."""
    root = tmp_path_factory.mktemp("detect")
    shape = {"image_size": 64, "patch_size": 8, "width": 64, "heads": 2, "depth": 2, "hidden": 128}
    save_model(aimv2.create_model("aimv2-tiny-patch14-112", seed=0, **shape), root / "eyes")
    write_scenes(str(root / "scenes"), 40, val_count=8, size=64, layout=SceneLayout(3, (12, 28)))
    write_scenes(str(root / "captions"), 16, val_count=4, size=64)
    (root / "unnamed").mkdir()
    pairs = [(key, {"png": parts["png"], "json": b'{"objects": [{"box": [1, 1, 9, 9]}]}'}) for key, parts in
             read_samples(root / "captions" / "val-000000.tar")]  # fmt: skip
    write_shard(root / "unnamed" / "train-000000.tar", pairs)
    (root / "corners").mkdir()
    corners = b'{"objects": [{"box": [20, 30, 60, 62], "class": "ring"}]}'
    write_shard(root / "corners" / "train-000000.tar", [(key, {**parts, "json": corners}) for key, parts in pairs])
    return root


def given(root: Path, data: str = "scenes", **options: Any) -> dict[str, Any]:
    own = {key.replace("__", "."): value for key, value in options.items()}
    return {**TINY, "init": str(root / "eyes"), "data.train": str(root / data), **own}


def train(root: Path, run: Path, **options: Any) -> Path:
    with light_collections():
        api.detect_train(run=str(run), options=given(root, **options))
    return run


def exact(run: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in EXACT if key in line} for line in metrics(run)]


def folder_of(run: Path) -> Path:
    return run / "checkpoints" / "step-0000006" / "model"


def frozen(root: Path, run: Path) -> bool:
    before, after = load_file(root / "eyes" / "model.safetensors"), open_detector(run).model.encoder.state_dict()
    return all(torch.equal(before[f"encoder.{name}"], value) for name, value in after.items())


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(root, tmp_path_factory.mktemp("run") / "run")


def test_boxes_are_learned_and_the_encoder_stays(root: Path, run: Path) -> None:
    first, *_, last = [line for line in metrics(run) if "loss" in line]
    assert last["loss"] < first["loss"] - 1
    assert {"val_ap", "val_ap50", "val_p_at_1"} <= metrics(run)[-1].keys()
    assert frozen(root, run)


def test_held_out_combinations_are_no_absent_words(root: Path, tmp_path: Path) -> None:
    """They would be learned to be nowhere, and figures of unseen combinations be wrong."""
    layout = make_layout(64, 3, (12, 28), hold_out=0.2)
    assert layout is not None
    write_scenes(str(tmp_path / "held"), 8, val_count=2, size=64, layout=layout)
    task = task_of(parse({"objective.name": "detect", **given(root), "data.train": str(tmp_path / "held")}))
    assert isinstance(task, Detect)
    held_out, maker = {f"{colour} {shape}" for colour, shape in layout.held_out}, task.maker(task.shape())
    assert held_out and held_out <= {*task.names} and {*maker.classes[0]} == {*task.names} - held_out
    (key, parts), *_ = read_samples(tmp_path / "held" / "train-000000.tar")
    texts = [maker(key, parts, np.random.default_rng(seed), 0).tokens for seed in range(8)]
    words = task.tokenizer.batch_decode(texts)
    assert max(map(len, words)) > 100 and not any(name in text for name in held_out for text in words)


def test_transformers_opens_the_runs_folder(run: Path) -> None:
    from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer

    model, found = AutoModelForZeroShotObjectDetection.from_pretrained(folder_of(run), output_loading_info=True)
    assert not any(found.values()), found
    text = AutoTokenizer.from_pretrained(folder_of(run))("a red ring.", return_tensors="pt")
    assert text.input_ids[0, [0, -2, -1]].tolist() == [101, 1012, 102]
    pixels = torch.rand(1, 3, 64, 64)
    theirs = model.eval()(pixels, **text)
    ours = open_detector(run).model.grounded(pixels, text.input_ids)[-1]
    torch.testing.assert_close(ours.logits, theirs.logits[..., : ours.logits.shape[-1]])
    torch.testing.assert_close(ours.boxes, theirs.pred_boxes)


def test_a_detector_goes_on(root: Path, run: Path, tmp_path: Path) -> None:
    """From its own weights and words; its form can't be changed."""
    config = {"objective.name": "detect", **given(root, init=str(run))}
    task = task_of(parse(config))
    model, opened = task.build(Context(None, ALONE)), open_detector(run)
    stored = opened.model.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert isinstance(task, Detect) and opened.prompts is not None
    assert task.tokenizer.get_vocab() == opened.prompts.tokenizer.get_vocab()
    for key, value in (("window", 4), ("queries", 7), ("decoder_layers", 3), ("pyramid", [2, 1])):
        with pytest.raises(UsageError) as error:
            task_of(parse(config | {f"objective.{key}": value})).build(Context(None, ALONE))
        assert (error.value.option, error.value.code) == (f"objective.{key}", "mismatch")


def test_a_stop_changes_nothing(root: Path, run: Path, tmp_path: Path) -> None:
    train(root, tmp_path / "run", train__stop_at=2)
    with light_collections():
        api.detect_train(run=str(tmp_path / "run"), options={"resume": True})
    assert exact(tmp_path / "run") == exact(run)
    one, other = (load_file(folder_of(where) / "model.safetensors") for where in (run, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_two_processes_equal_one(root: Path, tmp_path: Path) -> None:
    train(root, tmp_path / "one", data__workers=2, train__steps=3)
    words = {**given(root), "data.workers": 1, "train.steps": 3, "run": tmp_path / "two"}
    flat = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    done = torchrun(2, "detect", "train", *flat)
    assert not done.returncode, done.stderr
    for left, right in zip(exact(tmp_path / "one"), exact(tmp_path / "two"), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("head", ["closed", "masks"])
def test_other_heads_learn_and_open(root: Path, tmp_path: Path, head: str) -> None:
    import transformers

    more = {"objective__pyramid": [4, 2, 1, 0.5], "train__batch_size": 4} if head == "masks" else {}
    train(root, tmp_path / "run", objective__head=head, **more)
    first, *_, last = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert last < first
    assert "val_ap" in metrics(tmp_path / "run")[-1] and frozen(root, tmp_path / "run")
    opened = open_detector(tmp_path / "run")
    auto = (
        transformers.AutoModelForObjectDetection if head == "closed" else transformers.AutoModelForUniversalSegmentation
    )
    model, found = auto.from_pretrained(folder_of(tmp_path / "run"), output_loading_info=True)
    assert not any(found.values()), found
    assert model.config.id2label == dict(enumerate(opened.names))
    assert {"red ring", "blue cross"} <= {*opened.names}


def test_the_encoder_is_fine_tuned_by_layer_or_low_rank(root: Path) -> None:
    options = given(root, objective__freeze=False, optim__layer_decay=0.5, objective__text_scale=0.5)
    task = task_of(parse({"objective.name": "detect", **options}))
    model = task.build(Context(None, ALONE))
    groups = task.parameter_groups(model, task.config.optim)
    assert groups is not None
    scale = {id(parameter): group["scale"] for group in groups for parameter in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    blocks = [scale[id(block.attn.qkv.weight)] for block in model.encoder.blocks]
    assert blocks == [pytest.approx(0.025), pytest.approx(0.05)]
    assert scale[id(model.net.model.level_embed)] == 1 and scale[id(next(model.text_tower().parameters()))] == 0.5
    task = task_of(parse({"objective.name": "detect", **given(root, optim__lora=2)}))
    model = task.build(Context(None, ALONE))
    learning = {name for name, one in model.encoder.named_parameters() if one.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    assert "LoRA of rank 2" in " ".join(task.card())
    names = task.exported(model, dict(model.state_dict())).keys()
    assert (
        names
        == task_of(parse({"objective.name": "detect", **given(root)})).build(Context(None, ALONE)).state_dict().keys()
    )


def refused(root: Path, **options: Any) -> UsageError:
    with pytest.raises(UsageError) as found:
        api.detect_train(dry_run=True, options=given(root, **options))
    return found.value


def test_wrong_use(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(root, data="captions")
    assert (error.code, error.option) == ("missing", "data.train")
    assert "class names" in str(refused(root, data="unnamed"))
    assert refused(root, init=None).code == "missing"
    error = refused(root, objective__window=9)
    assert (error.code, error.option) == ("mismatch", "objective.window")
    error = refused(root, objective__head="masks")
    assert (error.code, error.option) == ("mismatch", "objective.pyramid")
    assert refused(root, objective__pyramid=[1, 0.3]).option == "objective.pyramid"
    assert refused(root, objective__queries=1000).code == "limit"
    assert refused(root, optim__layer_decay=0.9).option == "optim.layer_decay"
    assert refused(root, objective__zoom=[2, 1]).option == "objective.zoom"
    assert refused(root, objective__keep_area=1.5).option == "objective.keep_area"
    assert refused(root, objective__threshold=30.0).option == "objective.threshold"
    error = refused(root, data="corners")
    assert (error.code, error.option) == ("mismatch", "data.train") and "leave their pictures" in str(error)
    words = [
        "detect",
        "train",
        "--init",
        str(root / "eyes"),
        "--data.train",
        str(root / "captions"),
        "--run",
        str(root / "none"),
    ]
    assert_refused(capsys, words, "data.train", "has a box")
