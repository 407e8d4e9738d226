"""Self-test: generate scenes, train a tiny model, save and reload it."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from aimv2.doctor.check import Check
from aimv2.doctor.kernels import training_device
from aimv2.errors import first_line

SCENES, STEPS, PAIRS = 512, 60, 32
MAX_RATIO = 0.6  # of last to first loss
VALUES = {
    "model.name": "aimv2-tiny-patch8-32",
    "model.width": 64,
    "model.depth": 2,
    "model.heads": 2,
    "model.hidden": 128,
    "model.decoder_width": 64,
    "model.decoder_depth": 2,
    "model.decoder_heads": 2,
    "model.decoder_hidden": 128,
    "data.vocab_size": 400,
    "data.workers": 0,
    "data.shuffle_buffer": 64,
    "data.flip": 0.0,
    "optim.lr": 3e-3,
    "optim.warmup": 5,
    "train.steps": STEPS,
    "train.batch_size": PAIRS,
    "train.precision": "fp32",
    "train.compile": "off",
    "train.log_every": 10,
    "train.save_every": 0,
    "eval.every": 0,
    "eval.samples": 32,
    "log.tensorboard": False,
    "log.report": False,
}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread: as fast for matmuls this small, and not slowed down by thread contention on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def self_test() -> Iterator[Check]:
    """Train, save and load; check the decrease of the loss, the speed, and equal features."""
    from aimv2.train.interrupt import Interrupted

    began = time.perf_counter()
    log = io.StringIO()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stderr(log),
            one_thread(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            first, last, speed, off = tiny_run(Path(folder))
    except Interrupted:  # its message is about resuming, which does not apply here
        raise KeyboardInterrupt from None
    except Exception as error:
        advice = "training does not work here: see the failures above, else report it with `aimv2 doctor --json`"
        yield Check("self-test", "a tiny run", "fail", f"{type(error).__name__}: {first_line(error)}", advice)
        return
    seconds = time.perf_counter() - began
    fell = last < MAX_RATIO * first
    yield Check(
        "self-test",
        "loss",
        "ok" if fell else "fail",
        f"{first:.2f} to {last:.2f} in {VALUES['train.steps']} steps",
        "" if fell else "training does not converge here: report it with `aimv2 doctor --json`",
    )
    yield Check("self-test", "speed", "ok", f"{speed:,.0f} pairs/s of a tiny model on {training_device()}")
    equal = off <= 1e-5
    yield Check(
        "self-test",
        "saved and loaded",
        "ok" if equal else "fail",
        "equal features" if equal else f"features differ by {off:.2g}",
        "" if equal else "a reloaded model differs from the saved one: report it with `aimv2 doctor --json`",
        seconds,
    )


def tiny_run(folder: Path) -> tuple[float, float, float, float]:
    """Generate data, train, save and load in an empty folder.

    Returns:
        first and last loss (means of ten steps), pairs per second, and the largest difference of a feature after loading.
    """
    from aimv2.config.load import parse
    from aimv2.data.scenes import write_scenes
    from aimv2.distributed import World
    from aimv2.interop.load import load_model
    from aimv2.train import prepare
    from aimv2.train.launch import build_trainer

    device = training_device()
    write_scenes(str(folder / "scenes"), SCENES, val_count=32, size=32)
    config = parse({**VALUES, "data.train": str(folder / "scenes"), "run": str(folder / "run")})
    prepare.locate_data(config)
    run = prepare.check_run_folder(config)
    trainer = build_trainer(config, run, World(0, 1, device))
    try:
        prepare.open_run(run, config, trainer.tokenizer)
        trainer.train()
    finally:
        trainer.close()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    loaded = load_model(str(run), device=device)
    with torch.no_grad():
        features = [model.eval()(images.to(device)) for model in (trainer.unwrapped().encoder, loaded)]
    off = (features[0] - features[1]).abs().max().item()
    return losses[0], losses[-1], trainer.step * PAIRS / trainer.seconds, off
