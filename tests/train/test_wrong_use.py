"""Each mistake ends with one clear line and exit code 2; nothing is lost, nothing half-written."""

import io
import json
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from aimv2.cli import main
from aimv2.data.shards.format import write_shard
from aimv2.errors import UsageError
from runs import assert_refused, command, exact, metrics, options, resume, scenes, train


@pytest.fixture(scope="module")
def data(world):
    return world.scenes


def picture(colour=(200, 30, 30)):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "PNG")
    return file.getvalue()


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"train.stpes": 5}, ["train.stpes", "train.steps"]),
        ({"train.steps": "many"}, ["train.steps", "int", "many"]),
        ({"train.steps": 0}, ["train.steps", "at least 1", "0"]),
        ({"train.precision": "fp8"}, ["train.precision", "fp8", "bf16"]),
        ({"optim.weight_decay": 0.05}, ["optim.weight_decay", "0.05", "optim.decay=torch"]),
        ({"objective.attention": "bidirectional"}, ["objective.attention", "objective.targets=text"]),
        ({"model.name": "aimv2-tiny-patch9-32"}, ["model.name", "aimv2-tiny-patch8-32"]),
        ({"model.image_size": 30}, ["model.image_size 30", "model.patch_size 8"]),
        ({"model.width": 33}, ["model.width 33", "2 heads"]),
        ({"config": "/nowhere/recipe.yaml"}, ["--config /nowhere/recipe.yaml", "no such file"]),
        ({"data.train": "/nowhere/shards"}, ["data.train", "/nowhere/shards"]),
        ({"data.val": "/nowhere/shards"}, ["data.val", "/nowhere/shards"]),
        ({"data.tokenizer": "/nowhere/bpe"}, ["data.tokenizer", "/nowhere/bpe"]),
        ({"init": "/nowhere/model"}, ["/nowhere/model"]),
        ({"train.batch_size": 7, "data.workers": 2}, ["train.batch_size 7", "1 ranks x 2 data workers"]),
        ({"train.batch_size": 6, "train.accumulate": 4}, ["train.batch_size 6", "train.accumulate 4"]),
        ({"train.batch_size": 1000}, ["120 samples", "train.batch_size 1000"]),
        ({"parallel.shard": 3}, ["parallel.replicate 1 x parallel.shard 3", "1 rank:", "torchrun"]),
    ],
)
def test_mistakes_of_the_configuration(data, tmp_path, capsys, more, named):
    run = tmp_path / "run"
    words = options(data, run)
    for key, value in more.items():
        words += [f"--{key}", value]
    assert_refused(capsys, words, *named)
    assert not run.exists(), tree(run)


def test_wrong_recipes(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    for text, named in (
        ("train:\n  stpes: 5\n", ["unknown key 'train.stpes'", "train.steps", "recipe.yaml"]),
        ("trian:\n  steps: 5\n", ["trian.steps", "train.steps"]),
        ("train: 5\n", ["'train'", "section"]),
        ("train: [\n", ["recipe.yaml", "not YAML"]),
        ("- a\n", ["recipe.yaml", "list"]),
    ):
        recipe.write_text(text)
        assert_refused(capsys, ["pretrain", "--config", recipe, "--run", tmp_path / "run"], *named)
    assert tree(tmp_path) == ["recipe.yaml"]


def test_a_recipe_without_a_model(data, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("optim:\n  warmup: 1\ntrain:\n  steps: 3\n  batch_size: 8\n")
    words = ["--config", tmp_path / "recipe.yaml", "--data.train", data, "--run", tmp_path / "run"]
    assert_refused(capsys, ["pretrain", *words], "model.name auto", "--model.name NAME")
    assert tree(tmp_path) == ["recipe.yaml"]


def test_no_run_folder(capsys, data):
    words = options(data, "x")
    at = words.index("--run")
    assert_refused(capsys, words[:at] + words[at + 2 :], "--run")


def test_empty_data(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert_refused(capsys, options(tmp_path / "empty", tmp_path / "run"), "data.train", "no .tar")
    (tmp_path / "none").mkdir()
    write_shard(tmp_path / "none" / "train-000000.tar", [])
    assert_refused(capsys, options(tmp_path / "none", tmp_path / "run"), "empty data set")
    assert not (tmp_path / "run").exists()


def test_captions_missing(tmp_path, capsys):
    write_shard(tmp_path / "train-000000.tar", [(f"k{i}", {"png": picture((i, 0, 0))}) for i in range(30)])
    assert_refused(capsys, options(tmp_path, tmp_path / "run"), "captions missing", "objective.targets=image")
    result = train(tmp_path, tmp_path / "images", objective__targets="image", train__steps=2)
    assert result["step"] == 2 and "val_text_loss" not in result


def test_folder_that_is_no_shards(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(picture())
    assert_refused(capsys, options(tmp_path / "photos", tmp_path / "run"), "aimv2 data import")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.md").write_text("no image here")
    assert_refused(capsys, ["data", "import", tmp_path / "text", tmp_path / "out"], "text")
    assert not (tmp_path / "out").exists()


def test_output_that_is_not_writable(data, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert_refused(capsys, options(data, tmp_path / "file" / "run"), "--run", "not a writable folder")
    assert_refused(capsys, ["data", "shapes", tmp_path / "file" / "out", "--count", "5"], str(tmp_path / "file"))
    captions = tmp_path / "captions.txt"
    captions.write_text("a red circle\na blue square\n")
    assert_refused(capsys, ["tokenizer", "train", captions, tmp_path / "file" / "bpe"], str(tmp_path / "file" / "bpe"))
    assert (tmp_path / "file").read_text() == "not a folder"


def test_run_folder_in_use(data, tmp_path, capsys):
    run = tmp_path / "run"
    train(data, run, train__steps=2)
    (run / "notes.txt").write_text("mine")
    before = {path: (run / path).read_bytes() for path in tree(run) if (run / path).is_file()}
    assert_refused(capsys, options(data, run), str(run), "--resume", "--overwrite")
    assert {path: (run / path).read_bytes() for path in before} == before
    train(data, run, train__steps=3, overwrite=True)
    assert (run / "notes.txt").read_text() == "mine"
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2, 3]


def test_too_many_bad_samples(tmp_path, capsys):
    good = [(f"good{i}", {"png": picture((i, 0, 0)), "txt": b"a word"}) for i in range(40)]
    bad = [(f"bad{i}", {"png": b"no image", "txt": b"a word"}) for i in range(5)]
    write_shard(tmp_path / "train-000000.tar", [*good, *bad])
    words = options(tmp_path, tmp_path / "run", **{"train.steps": 30})
    line = assert_refused(capsys, [*words, "--data.max_bad", "3"], "data.max_bad allows 3", "bad", "train-000000.tar")
    step = int(re.search(r"until step (\d+), which is saved", line)[1])
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:07d}" / "files.json").is_file()
    again = ["pretrain", "--run", str(tmp_path / "run"), "--resume"]
    assert_refused(capsys, again, "data.max_bad allows 3", "in this run so far", "bad")
    assert main([*again, "--data.max_bad", "5"]) == 0
    train(tmp_path, tmp_path / "whole", train__steps=30)
    assert exact(tmp_path / "run") == exact(tmp_path / "whole")


def test_a_bad_sample_is_counted_once_in_a_run(tmp_path):
    good = [(f"good{i}", {"png": picture((i, 0, 0)), "txt": b"a word"}) for i in range(14)]
    write_shard(tmp_path / "train-000000.tar", [*good, ("bad", {"png": b"no image", "txt": b"a word"})])
    train(tmp_path, tmp_path / "run", train__steps=30, data__max_bad=1, train__stop_at=15)
    assert resume(tmp_path / "run")["step"] == 30, "17 visits to the bad one"
    assert metrics(tmp_path / "run")[-1]["bad_samples"] == 1
    (tmp_path / "run" / "summary.json").unlink()  # all steps are done: only its end is done again, whatever the limit
    assert resume(tmp_path / "run", data__max_bad=0)["step"] == 30


def test_every_sample_bad(tmp_path, capsys):
    write_shard(tmp_path / "train-000000.tar", [(f"k{i}", {"png": b"no image", "txt": b"w"}) for i in range(30)])
    for workers in (0, 1):
        words = options(tmp_path, tmp_path / "run", **{"data.workers": workers})
        assert_refused(capsys, [*words, "--data.max_bad", "3", "--overwrite"], "none of 61 samples in a row", "k")


def test_loss_that_is_not_finite(data, tmp_path, capsys):
    run = tmp_path / "run"
    train(data, run, train__stop_at=2)
    words = ["pretrain", "--run", str(run), "--resume"]
    before = exact(run)
    model = shutil.copytree(next((run / "checkpoints").iterdir()) / "model", tmp_path / "spoiled")
    spoil(model / "model.safetensors", "decoder.pixel_head.weight", float("inf"))
    other = [*options(data, tmp_path / "other"), "--init", str(model)]
    assert_refused(capsys, other, "decoder.pixel_head.weight", "NaN or infinite")
    spoil(model / "model.safetensors", "decoder.pixel_head.weight", 1e30)  # finite, but its square is not
    other = [*options(data, tmp_path / "other"), "--init", str(model)]
    line = assert_refused(capsys, other, "step 1", "non-finite", "pixel", "gradient")
    assert "text" not in line.split(";")[0]
    assert not list((tmp_path / "other").glob("checkpoints/step-*")), "nothing broken is saved"
    assert main(words) == 0, "the run's own state is as it was"
    assert exact(run)[: len(before)] == before


def spoil(file, key, value):
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    weights[key][0, 0] = value
    save_file(weights, file)


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_full_disk_while_saving(world, data, tmp_path):
    run = tmp_path / "run"
    train(data, run, train__stop_at=2)
    before = exact(run)
    words = command("pretrain", "--run", str(run), "--resume")
    ended = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit_files, check=False, timeout=120)
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "step 6" in line and "step 2 stays" in line and "File too large" in line
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000002"]
    resume(run)
    assert exact(run) == exact(world.run) and exact(run)[: len(before)] == before


def test_model_that_is_none(tmp_path, capsys):
    image = tmp_path / "a.png"
    image.write_bytes(picture())
    assert_refused(capsys, ["caption", tmp_path / "none", image], "MODEL", "no such file, folder, run or released name")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"format": "something"}))
    assert_refused(capsys, ["caption", tmp_path / "model", image], "model.safetensors", "is expected")
    with pytest.raises(UsageError, match="no run in"):
        resume(tmp_path / "model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    assert_refused(capsys, ["caption", tmp_path / "run", image], "MODEL", "or a run that has a checkpoint")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("pretrain --train.stop_at x", "train.stop_at x: a whole number (int) or null expected"),
        ("pretrain --train.steps 1.5", "train.steps 1.5: a whole number (int) expected"),
        ("pretrain --train.ema x", "train.ema x: a number expected"),
        ("pretrain --model.decoder_separate 4", "model.decoder_separate 4: true or false or null expected"),
        ("pretrain --train.compile 4", "train.compile 4: one of auto, on, off expected"),
        ("pretrain --optim.betas [1,2,3]", "optim.betas [1, 2, 3]: a list of 2 expected"),
        ("pretrain --optim.betas x", "optim.betas x: a list such as [0.9, 0.95] expected"),
        ("caption M --max-tokens x", "--max-tokens x: a whole number (int) expected"),
        ("report RUN --watch x", "--watch x: a number expected"),
    ],
)
def test_a_value_of_another_kind(words, line, capsys):
    assert assert_refused(capsys, words.split()) == f"error: {line}"


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("{path: a, weight: x}", "weight x: a number expected"),
        ("{path: a, captions: {caption: x}}", "captions: x: a number expected"),
        ("{path: a, weigth: 1}", "Option 'weigth' is not accepted"),
        ("3", "3: a source, such as {path: shards, weight: 1.0}, expected"),
    ],
)
def test_a_part_of_another_kind(source, line, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data:\n  train: [{source}]\n")
    words = ["pretrain", "--config", recipe, "--run", tmp_path / "run"]
    assert assert_refused(capsys, words) == f"error: data.train: {line}"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"optim.lr": 0}, ["optim.lr", "0"]),
        ({"optim.betas": "[0.9, 1.5]"}, ["optim.betas", "1.5"]),
        ({"model.heads": 0}, ["model.heads", "at least 1"]),
        ({"model.decoder_depth": 0}, ["model.decoder_depth", "at least 1"]),
        ({"model.image_size": 8}, ["model.image_size 8", "2 patches"]),
        ({"eval.prefixes": "[]"}, ["eval.prefixes"]),
        ({"train.stop_at": 0}, ["train.stop_at", "0"]),
        ({"data.crop_ratio": "[0, 1]"}, ["data.crop_ratio"]),
        ({"log.wandb": "project"}, ["log.wandb", "aimv2[wandb]"]),
    ],
)
def test_numbers_out_of_range(data, tmp_path, capsys, more, named):
    words = options(data, tmp_path / "run")
    for key, value in more.items():
        words += [f"--{key}", str(value)]
    assert_refused(capsys, words, *named)
    assert not (tmp_path / "run").exists()


def test_demo_leaves_what_is_not_its_own(tmp_path, capsys):
    (tmp_path / "x" / "data").mkdir(parents=True)
    (tmp_path / "x" / "data" / "holiday.jpg").write_bytes(picture())
    assert_refused(capsys, ["pretrain", "--run", tmp_path / "x"], "data", "in the way")
    assert_refused(capsys, ["pretrain", "--run", tmp_path / "y", "--model.image_size", "30"], "model.image_size 30")
    assert tree(tmp_path) == ["x", "x/data", "x/data/holiday.jpg"]


def test_overwrite_never_takes_the_data_away(tmp_path, capsys):
    run = tmp_path / "run"
    train(scenes(tmp_path / "first"), run, train__steps=2)
    inside = scenes(run / "shards")
    assert_refused(capsys, [*options(inside, run), "--overwrite"], "--overwrite", "shards")
    assert (inside / "train-000000.tar").exists() and (run / "summary.json").exists()


def test_only_validation_shards(tmp_path, capsys):
    write_shard(tmp_path / "val-000000.tar", [("a", {"png": picture(), "txt": b"a word"})])
    assert_refused(capsys, options(tmp_path, tmp_path / "run"), "validation shards only")


def test_resume_shows_its_configuration_without_training(data, tmp_path, capsys):
    run = tmp_path / "run"
    train(data, run, train__stop_at=2)
    assert main(["pretrain", "--run", str(run), "--resume", "--print-config", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["train.steps"] == 6 and shown["from"]["train.steps"].endswith("config.yaml")
    assert len(exact(run)) == 2


@pytest.mark.parametrize(
    "words",
    [["--model.name", "auto"], ["--objective.name", "probe", "--objective.freeze", "false", "--model.heads", "7"]],
    ids=" ".join,
)
def test_the_demo_clears_nothing_before_its_mistakes(words, tmp_path, capsys):
    run = tmp_path / "run"
    train(scenes(tmp_path / "first"), run, train__steps=2)
    before = tree(run)
    assert_refused(capsys, ["pretrain", "--run", run, "--overwrite", *words], "model.")
    assert tree(run) == before
