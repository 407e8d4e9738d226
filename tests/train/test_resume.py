"""Stopping and going on equals not stopping, bit for bit; checkpoints are complete, atomic, and kept as asked."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from functools import partial

import pytest
import torch
from PIL import Image

from aimv2.config.schema import DataConfig
from aimv2.data.shards.format import write_shard
from aimv2.data.stream.samples import TrainStream, View
from aimv2.data.text.captions import read_captions
from aimv2.data.text.tokenizer import train_tokenizer
from aimv2.errors import UsageError
from aimv2.train.compiling import can_compile
from aimv2.train.interrupt import StopFlag
from forked import forked
from runs import command, exact, metrics, options, resume, train


@pytest.fixture(scope="module")
def data(world):
    return world.scenes


def same_weights(one, other, step):
    files = [run / "checkpoints" / f"step-{step:07d}" / "model" / "model.safetensors" for run in (one, other)]
    return files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_has_the_losses_of_an_undisturbed_one(data, tmp_path, workers):
    train(data, tmp_path / "whole", data__workers=workers, eval__every=4)
    train(data, tmp_path / "parts", data__workers=workers, eval__every=4, train__stop_at=2)
    resume(tmp_path / "parts", train__stop_at=3)
    resume(tmp_path / "parts")
    assert len(exact(tmp_path / "whole")) == 8  # six steps, two validations
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole", 6)


def test_log_window_survives_a_stop(data, tmp_path):
    train(data, tmp_path / "whole", train__log_every=3)
    train(data, tmp_path / "parts", train__log_every=3, train__stop_at=2)
    resume(tmp_path / "parts")
    lines = [line for line in exact(tmp_path / "whole") if "loss" in line]
    assert [line["step"] for line in lines] == [3, 6]
    assert [line for line in exact(tmp_path / "parts") if line["step"] in (3, 6)] == exact(tmp_path / "whole")


def uneven_captions(folder):
    """Pictures with captions of 1 to 60 words, so that batches come in many shapes."""
    draw = random.Random(0)
    words = ["red", "blue", "green", "large", "small", "ring", "cross", "square", "circle", "top", "left", "right"]
    samples = []
    for number in range(200):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), tuple(draw.randrange(256) for _ in range(3))).save(file, "PNG")
        caption = " ".join(draw.choices(words, k=draw.choice([1, 5, 20, 60])))
        samples.append((f"k{number}", {"png": file.getvalue(), "txt": caption.encode()}))
    write_shard(folder / "train-000000.tar", samples)
    return folder


def shapes_seen(data, steps, batch_size):
    """Distinct shapes of a run's first batches."""
    config = DataConfig(train=str(data), workers=0, shuffle_buffer=20, flip=0.0)
    tokenizer = train_tokenizer(read_captions(data), 300)
    stream = TrainStream(config, View(32, 16), tokenizer, batch_size, 0)
    batches = [next(stream) for _ in range(steps)]
    return {(len(b.token_rows), len(b.patch_rows), b.text.shape[1]) for b in batches}


def test_resume_is_exact_with_compiled_blocks_over_many_shapes(tmp_path):
    if (reason := can_compile(torch.device("cpu"))) is not None:
        pytest.skip(f"torch.compile does not work here: {reason}")
    data = uneven_captions(tmp_path)
    long = {"train__compile": "on", "train__steps": 16, "train__batch_size": 16, "train__precision": "bf16"}
    long |= {"eval__captions": 0}
    assert len(shapes_seen(data, 16, 16)) > 8
    train(data, tmp_path / "whole", **long)
    train(data, tmp_path / "parts", **long, train__stop_at=7)
    went_on = forked(
        "pretrain", "--run", str(tmp_path / "parts"), "--resume"
    )  # another process: other history of shapes
    assert went_on.returncode == 0, went_on.stderr
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole", 16)


def test_lines_past_the_checkpoint_are_cut(data, tmp_path):
    run = tmp_path / "run"
    train(data, run, train__save_every=2)
    whole = exact(run)
    for name in ("step-0000004", "step-0000006"):
        shutil.rmtree(run / "checkpoints" / name)
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "half a li')  # killed while writing
    resume(run)
    assert exact(run) == whole


def test_finished_run_gives_its_summary(data, tmp_path):
    first = train(data, tmp_path / "run", train__steps=2)
    again = resume(tmp_path / "run")
    assert again == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["step"] == 2 and again["seconds"] == pytest.approx(first["seconds"])


def test_keep_and_layout(data, tmp_path):
    run = tmp_path / "run"
    train(data, run, train__save_every=1, train__keep=2, log__tensorboard=True)
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["step-0000005", "step-0000006"]
    model = run / "checkpoints" / "step-0000006" / "model"
    assert {p.name for p in model.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "metrics.jsonl", "summary.json", "tensorboard"}
    assert all("checkpoints" in str(p) for p in run.rglob("*.pt")), "pickles lie in state folders only"


def test_half_written_checkpoint_is_never_read(data, tmp_path):
    run = tmp_path / "run"
    train(data, run, train__stop_at=3)
    aside = run / "checkpoints" / ".aside-step-0000004"
    shutil.copytree(run / "checkpoints" / "step-0000003", aside)
    result = resume(run)
    assert result["step"] == 6 and not aside.exists()
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 0), (signal.SIGHUP, 0)])
def test_signal_to_the_group_saves_and_says_how_to_go_on(data, tmp_path, number, workers):
    run = tmp_path / "run"
    long = {"train__steps": 4000, "data__workers": workers}
    words = command(*options(data, run, **long))
    said = tmp_path / "stderr.txt"
    with said.open("w") as file:
        heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        process = subprocess.Popen(words, stderr=file, start_new_session=True, preexec_fn=heard)
    deadline = time.time() + 90
    while (
        time.time() < deadline
        and process.poll() is None
        and (not (run / "metrics.jsonl").exists() or len(metrics_safely(run)) < 3)
    ):
        time.sleep(0.1)
    for _ in range(3):  # a terminal's Ctrl-C reaches the data workers too, and people are impatient
        os.killpg(process.pid, number)
        time.sleep(0.1)
        if process.poll() is not None:
            break
    process.wait(timeout=60)
    stderr = said.read_text()
    assert stderr.count("stopping after this step, and saving") == 1
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}[number], stderr
    assert f"aimv2 pretrain --run {run} --resume" in stderr and "Traceback" not in stderr
    (folder,) = (run / "checkpoints").iterdir()
    stopped = int(folder.name.removeprefix("step-"))
    assert stopped >= 3
    resume(run, train__stop_at=stopped + 2)
    train(data, tmp_path / "whole", **long, train__stop_at=stopped + 2)
    assert exact(run) == exact(tmp_path / "whole")


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        flag = StopFlag()
        os.kill(os.getpid(), signal.SIGHUP)
        flag.restore()
        assert flag.code == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        flag = StopFlag()
        os.kill(os.getpid(), signal.SIGHUP)
        flag.restore()
        assert flag.code == 129
    finally:
        signal.signal(signal.SIGHUP, before)


def metrics_safely(run):
    return (run / "metrics.jsonl").read_text().splitlines()


def test_what_may_not_change_on_the_way(data, tmp_path):
    run = tmp_path / "run"
    train(data, run, train__stop_at=2)
    before = (run / "config.yaml").read_text()
    for changed, named in (
        ({"train__steps": 9}, "train.steps is 6 there, got 9"),
        ({"model__name": "aimv2-tiny-patch4-32"}, "model.name"),
        ({"model__width": 64}, "model.width"),
        ({"data__tokenizer": str(run / "checkpoints/step-0000002/model")}, "data.tokenizer"),
        ({"optim__lr": 1.0}, "optim.lr"),
        ({"data__workers": 2}, "1 ranks x 0 data workers"),
    ):
        with pytest.raises(UsageError, match=named):
            resume(run, **changed)
    assert (run / "config.yaml").read_text() == before
    assert resume(run, train__log_every=2)["step"] == 6


def test_tokenizer_that_changed_on_disk_is_refused(data, tmp_path):
    from aimv2.data.text.tokenizer import train_tokenizer

    train_tokenizer(["a red circle"] * 3, 280).save(tmp_path / "bpe")
    train(data, tmp_path / "run", data__tokenizer=str(tmp_path / "bpe"), train__stop_at=2)
    train_tokenizer(["some other words"] * 3, 280).save(tmp_path / "bpe")
    with pytest.raises(UsageError, match=r"data\.tokenizer"):
        resume(tmp_path / "run")


def test_resume_without_a_run(tmp_path):
    with pytest.raises(UsageError, match="no run in"):
        resume(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
