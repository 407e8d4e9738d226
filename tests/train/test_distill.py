"""Distillation as runs: live and stored teachers of several origins, resume, ranks, and every mistake in one line."""

import hashlib
import io
import math
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from distillation import dino_model, distil, exact
from safetensors import safe_open

import aimv2
from aimv2 import api
from aimv2.batch import make_batch, split_batch
from aimv2.config.schema import Config, DataConfig
from aimv2.data.shards.format import read_samples, write_shard
from aimv2.data.stream.samples import TrainStream, View
from aimv2.data.stream.teacher_views import quantise
from aimv2.distributed import World, join_world
from aimv2.errors import UsageError
from aimv2.features.frozen import open_frozen
from aimv2.features.teach import Lesson
from aimv2.features.teach import teach as run_teach
from aimv2.features.teacher import Teacher, open_teacher, stored_features
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model
from aimv2.models.distilled import Distiller
from aimv2.models.init import init_weights
from aimv2.models.sizes import encoder_flops
from aimv2.objectives.distill import DistillObjective, relation_loss
from aimv2.tasks.held_out import read_held_out
from aimv2.train.step import TrainStep
from forked import call_on_ranks
from runs import assert_refused, metrics, need_ranks, options, resume, torchrun, train

NATIVE = "aimv2-large-patch14-native"


@pytest.fixture(scope="module")
def data(world):
    return world.scenes


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A run of another width, with its decoder."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    train(data, run, train__steps=2, model__width=48, model__heads=3)
    return run


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return dino_model(tmp_path_factory.mktemp("dino"))


def model_folder(run, step):
    return run / "checkpoints" / f"step-{step:07d}" / "model"


# ---- a run ----


@pytest.mark.parametrize("loss", ["cosine", "relation"])
def test_a_student_run(data, teacher, tmp_path, loss):
    run = tmp_path / "run"
    summary = distil(data, run, teacher, objective__teacher_loss=loss, objective__teacher_weight=0.5)
    lines = [line for line in metrics(run) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        parts = line["text_loss"] + 0.4 * line["pixel_loss"] + 0.5 * line["feature_loss"]
        assert line["loss"] == pytest.approx(parts) and math.isfinite(line["grad_norm"])
    digest = open_frozen(str(teacher)).sha256
    stored = yaml.safe_load((run / "config.yaml").read_text())["objective"]
    assert summary["teacher_sha256"] == stored["teacher_sha256"] == digest
    assert summary["teacher"] == str(teacher) and "caption_exact_match" in summary
    card = (model_folder(run, 6) / "README.md").read_text()
    assert digest in card and str(teacher) not in card
    with safe_open(model_folder(run, 6) / "model.safetensors", "pt") as weights:
        assert {key.split(".")[0] for key in weights.keys()} == {"encoder", "decoder"}  # noqa: SIM118
    model = aimv2.load_model(str(run), decoder=True)
    assert type(model) is AIMv2 and model.encoder.config.width == 32
    if loss == "relation":  # compared without a projection, which is not saved
        found = relation_of_held_out(data, model, open_teacher(str(teacher), torch.device("cpu")))
        assert metrics(run)[-1]["val_feature_loss"] == pytest.approx(found, rel=1e-4) and found > 0


def relation_of_held_out(data, student, known):
    """The feature loss that validation must find: whole images, no prefix."""
    view, total, patches = View(32, 16, False), 0.0, 0
    images = read_held_out(sorted(data.glob("val-*.tar")), view, None, 16).images
    with torch.no_grad():
        for image in images[:, None]:  # one at a time
            total += relation_loss(student.encoder(image), known.run(image)).item()
            patches += 16
    return total / patches


def test_mfu_counts_a_teacher_that_runs(data, teacher, dino, tmp_path, monkeypatch):
    known = open_teacher(str(teacher), torch.device("cpu"))
    assert known.flops == encoder_flops(aimv2.load_model(str(teacher)).config)
    tokens, width = 4 * 4 + 4, 24  # patches, and a class token and registers
    block = 2 * (4 * width**2 + 2 * width * 2 * width) + 4 * tokens * width
    assert open_teacher(str(dino), torch.device("cpu")).flops == 16 * 2 * 3 * 14**2 * width + 2 * tokens * block
    monkeypatch.setattr("aimv2.train.loop.peak_flops", lambda device, precision: 1e9)
    teach(teacher, data, tmp_path / "taught")
    distil(data, tmp_path / "live", teacher, train__steps=1, data__crop_scale=0.4)
    distil(tmp_path / "taught", tmp_path / "stored", "stored", train__steps=1)
    live, stored = (metrics(tmp_path / name)[0] for name in ("live", "stored"))
    flops = [line["mfu"] * 1e9 / line["pairs_per_s"] for line in (live, stored)]  # of a pair
    text = live["tokens_per_s"] / live["pairs_per_s"] - stored["tokens_per_s"] / stored["pairs_per_s"]
    assert text == pytest.approx(0), "the same captions"
    assert flops[0] - flops[1] == pytest.approx(known.flops, rel=1e-6)
    assert "val_feature_loss" not in metrics(tmp_path / "stored")[-1], "features are stored for training images alone"


def test_feature_loss_falls(data, teacher, tmp_path):
    distil(data, tmp_path / "run", teacher, train__steps=40, train__log_every=10, objective__teacher_view="whole")
    losses = [line["feature_loss"] for line in metrics(tmp_path / "run") if "feature_loss" in line]
    assert losses[-1] < 0.7 * losses[0]


def test_first_weights_are_those_of_pretraining(data, teacher, tmp_path):
    train(data, tmp_path / "plain", train__steps=1)
    distil(data, tmp_path / "run", teacher, train__steps=1)
    plain, run = metrics(tmp_path / "plain")[0], metrics(tmp_path / "run")[0]
    assert (plain["text_loss"], plain["pixel_loss"]) == (run["text_loss"], run["pixel_loss"])


def test_init_fills_the_student_alone(data, teacher, tmp_path):
    train(data, tmp_path / "plain", train__steps=2)
    first = train(data, tmp_path / "one", train__steps=1, init=str(tmp_path / "plain"))
    other = distil(data, tmp_path / "two", teacher, train__steps=1, init=str(tmp_path / "plain"))
    assert first["step"] == other["step"] == 1
    assert metrics(tmp_path / "one")[0]["text_loss"] == metrics(tmp_path / "two")[0]["text_loss"]


def test_a_transformers_model_teaches(data, dino, tmp_path):
    summary = distil(data, tmp_path / "run", dino, train__steps=2, objective__teacher_loss="l2")
    assert summary["teacher_sha256"] == open_frozen(str(dino)).sha256
    known = open_teacher(str(dino), torch.device("cpu"))
    assert (known.image_size, known.grid, known.width) == (56, 4, 24)
    batch = pairs()
    from transformers import AutoModel

    big = torch.nn.functional.interpolate(batch.images.float(), (56, 56), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.2, 0.3, 0.4], [0.5, 0.6, 0.7]))
    with torch.no_grad():
        out = AutoModel.from_pretrained(dino).eval()((big.round().clamp(0, 255) / 255 - mean) / std)
    torch.testing.assert_close(known.features(batch), out.last_hidden_state[:, 4:], rtol=1e-4, atol=1e-5)


def test_a_native_teacher_is_opened_at_the_students_grid(tmp_path):
    native = create_model(NATIVE, False, 0, width=16, heads=2, hidden=24, depth=1, min_patches=4)
    aimv2.save_pretrained(native, tmp_path / "native")
    known = open_teacher(str(tmp_path / "native"), torch.device("cpu"), 4)
    assert (known.image_size, known.grid) == (56, 4)
    with pytest.raises(UsageError, match=r"objective\.teacher.*4 to 4096 patches"):
        open_teacher(str(tmp_path / "native"), torch.device("cpu"), 1)


# ---- going on, and ranks ----


@pytest.mark.parametrize("view", ["prefix", "whole"])
def test_resumed_run_equals_an_undisturbed_one(data, teacher, tmp_path, view):
    more = {"objective__teacher_view": view, "eval__every": 4}
    distil(data, tmp_path / "whole", teacher, **more)
    distil(data, tmp_path / "parts", teacher, **more, train__stop_at=3)
    resume(tmp_path / "parts")
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")
    files = [model_folder(tmp_path / name, 6) / "model.safetensors" for name in ("parts", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_resume_wants_the_same_teacher(data, teacher, dino, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    distil(data, run, teacher, train__stop_at=2)
    shutil.copytree(model_folder(teacher, 2), moved)
    with pytest.raises(UsageError, match=r"objective\.teacher_sha256 says"):
        resume(run, objective__teacher=str(dino))
    with pytest.raises(UsageError, match=r"objective\.teacher_loss"):
        resume(run, objective__teacher_loss="l2")
    assert resume(run, objective__teacher=str(moved))["step"] == 6


def test_two_processes_have_the_losses_of_one(data, teacher, tmp_path):
    more = {"objective__name": "distill", "objective__teacher": str(teacher), "objective__teacher_view": "whole"}
    train(data, tmp_path / "one", **more, data__workers=2, train__steps=3)
    ended = torchrun(2, *options(data, tmp_path / "two", **more, data__workers=1, train__steps=3, train__accumulate=2))
    assert ended.returncode == 0, ended.stderr
    one, two = exact(tmp_path / "one"), exact(tmp_path / "two")
    assert len(one) == len(two) == 4 and "feature_loss" in one[0]
    assert all(right[key] == pytest.approx(left[key], rel=2e-4) for left, right in zip(one, two) for key in left)
    assert type(aimv2.load_model(str(tmp_path / "two"), decoder=True)) is AIMv2


def pairs():
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=draw)
    return make_batch(images, [[5, 6, 1], [7, 1], [8, 9, 10, 11, 12, 1], [1]], [1, 15, 7, 3], 16)


def one_step(world, batch, view, accumulate=1):
    config = Config()
    config.train.precision, config.train.steps, config.train.accumulate = "fp32", 10, accumulate
    config.objective.name, config.objective.teacher = "distill", "t"
    shape = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}
    decoder = {f"decoder_{key}": value for key, value in shape.items()}
    frozen = create_model("aimv2-tiny-patch8-32", False, 9, **{**shape, "width": 16}).eval()
    student = create_model("aimv2-tiny-patch8-32", True, 0, decoder_vocab_size=20, **shape, **decoder)
    model = Distiller(student, 16, view == "whole")
    init_weights(model.to_teacher, 1)
    objective = DistillObjective(config.objective, Teacher("t", "", 32, 4, 16, frozen))
    step = TrainStep(model, config, world, False, objective)
    gradients = {}

    def keep():
        for name, parameter in step.model.named_parameters():
            gradient = parameter.grad
            gradients[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()

    clip = step.clip
    step.clip = lambda: (keep(), clip())[1]
    return step(batch, 0), gradients


def rank_main(folder):
    world = join_world()
    rank = world.rank
    for view, accumulate in product(("prefix", "whole"), (1, 2)):
        figures, gradients = one_step(world, split_batch(pairs(), 2, 16)[rank], view, accumulate)
        if rank == 0:
            found = {"means": figures.means, "norm": figures.norm, "gradients": gradients}
            torch.save(found, folder / f"{view}-{accumulate}.pt")
    torch.distributed.destroy_process_group()


def test_two_gloo_processes_give_the_gradients_of_one(tmp_path):
    need_ranks(2)
    call_on_ranks(2, rank_main, tmp_path)
    for view, accumulate in product(("prefix", "whole"), (1, 2)):
        figures, gradients = one_step(World(0, 1, torch.device("cpu")), pairs(), view)
        two = torch.load(tmp_path / f"{view}-{accumulate}.pt")
        torch.testing.assert_close(two["means"], figures.means)
        torch.testing.assert_close(two["norm"], figures.norm)
        assert two["gradients"].keys() == gradients.keys() and "to_teacher.weight" in gradients
        for name, gradient in gradients.items():
            torch.testing.assert_close(two["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


# ---- wrong use ----


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"objective.name": "distill"}, ["objective.name=distill needs a teacher"]),
        ({"objective.teacher": "x"}, ["objective.teacher x is for objective.name=distill", "pretrain"]),
        ({"objective.name": "distill", "objective.teacher": "/nowhere/model"}, ["/nowhere/model"]),
        ({"objective.name": "distill", "objective.teacher": "x", "model.name": NATIVE}, ["native student", "model.image_size"]),
        ({"objective.name": "distill", "objective.teacher": "timm:nothing"}, ["timm:nothing"]),
        ({"objective.name": "distill", "objective.teacher": "stored"}, ["no features of a teacher", "aimv2 data teach"]),
        ({"objective.name": "distill", "objective.teacher": "x", "objective.teacher_weight": 0}, ["objective.teacher_weight"]),
        ({"objective.name": "distill", "objective.teacher": "x", "objective.teacher_loss": "l3"}, ["teacher_loss", "relation"]),
    ],
)  # fmt: skip
def test_mistakes(data, tmp_path, capsys, more, named):
    words = options(data, tmp_path / "run")
    assert_refused(capsys, [*words, *(word for key, value in more.items() for word in (f"--{key}", value))], *named)
    assert not (tmp_path / "run").exists()


def test_grids_that_differ(data, teacher, tmp_path, capsys):
    words = [*options(data, tmp_path / "run", model__patch_size=4), "--objective.name", "distill"]
    words += ["--objective.teacher", teacher]
    assert_refused(
        capsys,
        words,
        "4 x 4 patches (32 px)",
        "8 x 8 (32 px, patches of 4)",
        "model.image_size=16 or model.patch_size=8",
    )
    assert not (tmp_path / "run").exists()


def test_a_pinned_teacher_that_is_another(data, teacher, tmp_path, capsys):
    words = [*options(data, tmp_path / "run"), "--objective.name", "distill", "--objective.teacher", teacher]
    other = hashlib.sha256(b"another").hexdigest()
    assert_refused(capsys, [*words, "--objective.teacher_sha256", other], "objective.teacher_sha256 says", other[:12])


def test_the_teacher_in_a_run_folder_is_not_cleared(data, tmp_path, capsys):
    train(data, tmp_path / "run", train__steps=2)
    words = [*options(data, tmp_path / "run"), "--objective.name", "distill", "--objective.teacher", tmp_path / "run"]
    assert_refused(capsys, [*words, "--overwrite"], "--overwrite", "which contains")
    assert (tmp_path / "run" / "summary.json").exists()


# ---- stored features ----


def teach(teacher, data, out, **more):
    return api.data_teach(str(teacher), str(data), str(out), **{"views": 3, "flip": 0.0, "device": "cpu", **more})


def stored_batch(taught, width, **more):
    config = DataConfig(train=str(taught), workers=0, shuffle_buffer=20, flip=0.0, **more)
    return next(TrainStream(config, View(32, 16, False, teacher=width), None, 16, 0))


def test_stored_features_are_those_of_a_live_teacher(data, teacher, tmp_path):
    teach(teacher, data, tmp_path / "taught", flip=0.5)
    batch, known = stored_batch(tmp_path / "taught", 48), open_teacher(str(teacher), torch.device("cpu"))
    stored, live = stored_features(batch), known.features(batch)
    assert batch.teacher.dtype == torch.int8 and batch.teacher_scale.dtype == torch.float16
    cosine = torch.nn.functional.cosine_similarity(stored, live, dim=-1)
    assert cosine.shape == (16, 16) and cosine.min() > 0.999
    shuffled = torch.nn.functional.cosine_similarity(stored.roll(1, 0), live, dim=-1)
    assert shuffled.min() < 0.99, "so the features belong to these very crops"
    model = Distiller(create_model("aimv2-tiny-patch8-32", True, 0, decoder_text=False), 48)
    init_weights(model.to_teacher, 1)
    options = Config().objective
    options.targets = "image"
    losses = [
        DistillObjective(options, one)(model, batch)["feature"][0].item() for one in (known, replace(known, run=None))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_quantised_features(tmp_path):
    draw = np.random.default_rng(0)
    features = draw.normal(size=(3, 16, 256)).astype(np.float32) * draw.lognormal(0, 3, (3, 16, 1)).astype(np.float32)
    features[0, 0, 7] *= 12  # an outlier takes the levels of its patch
    features[0, 1] = 0
    levels, scales = quantise(features)
    back = levels.astype(np.float32) * scales[..., None]
    same = (back * features).sum(-1) / np.maximum(
        np.linalg.norm(back, axis=-1) * np.linalg.norm(features, axis=-1), 1e-9
    )
    assert np.delete(same.reshape(-1), [0, 1]).min() > 0.9995 and same[0, 0] > 0.99
    assert np.abs(back - features).max() <= 0.51 * scales.max().astype(np.float32) * 1.01 and not back[0, 1].any()


def test_taught_shards_hold_the_same_samples(data, teacher, tmp_path):
    summary = teach(teacher, data, tmp_path / "taught")
    for name in sorted(path.name for path in data.glob("*.tar")):
        ours, theirs = list(read_samples(tmp_path / "taught" / name)), list(read_samples(data / name))
        stored = [parts.pop("teacher", None) for _, parts in ours]
        assert ours == theirs and all((part is not None) == name.startswith("train") for part in stored)
    assert summary["samples"] == 120 and summary["unreadable"] == 0 and summary["views"] == 3
    assert summary["teacher_bytes_a_sample"] == pytest.approx(len(stored_of(tmp_path / "taught")[0]), rel=0.01)
    assert 3 * 16 * 50 < summary["teacher_bytes_a_sample"] < 3 * 16 * 50 + 1500
    again = teach(teacher, data, tmp_path / "other")
    assert again["teacher_sha256"] == summary["teacher_sha256"]
    assert stored_of(tmp_path / "other") == stored_of(tmp_path / "taught"), "the same call gives the same bytes"
    with np.load(io.BytesIO(stored_of(tmp_path / "taught")[0]), allow_pickle=False) as views:
        assert len({tuple(box) for box in views["boxes"].tolist()}) == 3, "three views, three crops"
        assert (views["boxes"] >= 0).all() and (views["boxes"] <= 1).all() and not views["flips"].any()


def stored_of(folder):
    return [parts["teacher"] for tar in sorted(folder.glob("train-*.tar")) for _, parts in read_samples(tar)]


def test_teaching_goes_on_by_whole_shards(data, teacher, tmp_path, monkeypatch):
    parts = tmp_path / "parts"
    parts.mkdir()
    samples = [sample for tar in sorted(data.glob("train-*.tar")) for sample in read_samples(tar)]
    for number in range(3):
        write_shard(parts / f"train-{number:06d}.tar", samples[number * 20 : number * 20 + 20])
    seen = []
    lesson = Lesson("t", "0" * 64, 32, 4, 5, 2, 0.4, (0.75, 1.3333), 0.5, 0)

    def look(images, stop=25):
        seen.append(len(images))
        if len(seen) > stop:
            raise KeyboardInterrupt
        return images.float().mean((1, 2, 3))[:, None, None] + torch.arange(80).view(1, 16, 5)

    with pytest.raises(KeyboardInterrupt):
        run_teach(str(parts), str(tmp_path / "out"), lesson, lambda images: look(images, 3), 16)
    first = tmp_path / "out" / "train-000000.tar"
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [".teach-000000.json", ".teach.json", "train-000000.tar"]
    written = first.stat().st_mtime_ns
    with pytest.raises(UsageError) as error:
        run_teach(str(parts), str(tmp_path / "out"), replace(lesson, views=3), look, 16)
    assert (error.value.option, error.value.code) == ("OUT", "mismatch")
    summary = run_teach(str(parts), str(tmp_path / "out"), lesson, look, 16)
    assert (
        first.stat().st_mtime_ns == written
        and summary["samples"] == 60
        and not list((tmp_path / "out").glob(".teach*"))
    )
    count = len(seen)
    assert run_teach(str(parts), str(tmp_path / "out"), lesson, look, 16) == summary and len(seen) == count
    run_teach(str(parts), str(tmp_path / "whole"), lesson, lambda images: look(images, 999), 16)
    assert stored_of(tmp_path / "out") == stored_of(tmp_path / "whole")


def test_a_run_on_stored_features_resumes(data, teacher, tmp_path):
    teach(teacher, data, tmp_path / "taught")
    summary = distil(tmp_path / "taught", tmp_path / "whole", "stored", data__workers=1)
    assert summary["teacher_sha256"] == open_frozen(str(teacher)).sha256 and summary["val_text_loss"] > 0
    distil(tmp_path / "taught", tmp_path / "parts", "stored", data__workers=1, train__stop_at=3)
    resume(tmp_path / "parts")
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")
    assert all(0 < line["feature_loss"] < 2 for line in metrics(tmp_path / "whole") if "loss" in line)


def test_micro_batches_and_workers_keep_features_with_their_images(data, teacher, tmp_path):
    teach(teacher, data, tmp_path / "taught")
    distil(tmp_path / "taught", tmp_path / "one", "stored", train__steps=2, data__workers=2)
    distil(tmp_path / "taught", tmp_path / "two", "stored", train__steps=2, data__workers=2, train__accumulate=4)
    for left, right in zip(exact(tmp_path / "one"), exact(tmp_path / "two"), strict=True):
        assert all(right[key] == pytest.approx(left[key], rel=2e-4) for key in left)


def test_misuse_of_stored_features(data, teacher, tmp_path, capsys):
    taught = tmp_path / "taught"
    teach(teacher, data, taught)
    more = ["--objective.name", "distill", "--objective.teacher", "stored"]
    assert_refused(
        capsys,
        [*options(taught, tmp_path / "run", model__patch_size=4), *more],
        "4 x 4 patches",
        "8 x 8",
        "model.image_size=16",
    )
    assert_refused(
        capsys, [*options(taught, tmp_path / "run"), *more, "--data.flip", 0.5], "flip 0.0", "data.flip is 0.5"
    )
    assert_refused(capsys, ["data", "teach", teacher, taught, taught], "OUT", "DATA itself")
    assert_refused(capsys, ["data", "teach", teacher, data, taught], "another view", "give a new folder")
    assert_refused(capsys, ["data", "teach", teacher, data, data], "OUT", "DATA itself")
    assert_refused(capsys, ["data", "teach", "/nowhere/model", data, tmp_path / "x"], "/nowhere/model")
    assert_refused(capsys, ["data", "teach", teacher, "/nowhere", tmp_path / "x"], "/nowhere")
    assert_refused(capsys, ["data", "teach", teacher, data, tmp_path / "x", "--views", 0], "--views 0")
    assert not (tmp_path / "run").exists() and not (tmp_path / "x").exists()
    tar = taught / "train-000000.tar"
    write_shard(tar, [(key, {**parts, "teacher": b"PK no such thing"}) for key, parts in list(read_samples(tar))])
    assert_refused(
        capsys,
        [*options(taught, tmp_path / "run"), *more, "--data.max_bad", 3],
        "samples in a row can be used",
        "broken features",
    )
