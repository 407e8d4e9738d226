"""Tiny real runs for tests: captioned scenes, a model of a few thousand parameters, a handful of steps."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from aimv2 import api
from aimv2.cli import main
from aimv2.data.scenes import write_scenes
from forked import forked

TINY = {
    "model.name": "aimv2-tiny-patch8-32",
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.hidden": 64,
    "model.decoder_width": 32,
    "model.decoder_depth": 2,
    "model.decoder_heads": 2,
    "model.decoder_hidden": 64,
    "data.vocab_size": 300,
    "data.workers": 0,
    "data.shuffle_buffer": 20,
    "data.flip": 0.0,
    "optim.warmup": 2,
    "optim.lr": 2e-3,
    "train.steps": 6,
    "train.batch_size": 8,
    "train.precision": "fp32",
    "train.compile": "off",
    "train.log_every": 1,
    "train.save_every": 0,
    "eval.every": 0,
    "eval.samples": 16,
    "eval.captions": 2,
    "log.tensorboard": False,
    "log.report": False,
}


def scenes(folder: Path, count: int = 120) -> Path:
    """A folder of shards with ``count`` training and a few validation scenes."""
    write_scenes(str(folder), count, val_count=24, size=32)
    return folder


def train(data: Path, run: Path, **options: Any) -> dict[str, Any]:
    """A tiny run in this process; options as ``train__steps=3``."""
    given = {key.replace("__", "."): value for key, value in options.items()}
    with light_collections():
        return api.pretrain(None, str(run), {**TINY, "data.train": str(data), **given})


def resume(run: Path, **options: Any) -> dict[str, Any]:
    """Goes on with a run in this process."""
    given = {key.replace("__", "."): value for key, value in options.items()}
    with light_collections():
        return api.pretrain(None, str(run), {"resume": True, **given})


@contextlib.contextmanager
def light_collections() -> Iterator[None]:
    """What lives before a run is not looked over for garbage in it: the stream collects as it starts, in every data worker
    too, and all that the test process has imported takes longer than the run."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


EXACT = ("step", "loss", "text_loss", "pixel_loss", "grad_norm", "lr", "val_text_loss", "val_pixel_loss")


def exact(run: Path) -> list[dict[str, Any]]:
    """The figures of a run that must not depend on how it was started and stopped."""
    return [{key: line[key] for key in EXACT if key in line} for line in metrics(run)]


def command(*words: str) -> list[str]:
    """The command line of this project's own interpreter."""
    return [sys.executable, "-m", "aimv2", *words]


def options(data: Path, run: Path, **more: Any) -> list[str]:
    """TINY as command-line words."""
    given = {**TINY, "data.train": str(data), "run": str(run)}
    given |= {key.replace("__", "."): value for key, value in more.items()}
    return ["pretrain", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


def call(*words: str, timeout: float = 120, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own."""
    return subprocess.run(
        command(*words), capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}, check=False
    )


def need_ranks(ranks: int) -> None:
    """Skips a test of several processes where GPUs are seen, but fewer than processes."""
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} processes need {ranks} GPUs; CUDA_VISIBLE_DEVICES= runs them on the CPU")


def torchrun(ranks: int, *words: str, timeout: float = 180, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs the command line on several processes: gloo, or nccl where there are GPUs.

    Args:
        fresh: by the launcher itself; else the ranks are forked with the environment that it sets.
    """
    need_ranks(ranks)
    if not fresh:
        return forked(*words, ranks=ranks, timeout=timeout)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*start, "-m", "aimv2", "--", *words], capture_output=True, text=True, timeout=timeout, check=False
    )


def bytes_read() -> int:
    """Bytes that this process has read so far, through whatever call (Linux)."""
    about = Path("/proc/self/io")
    if not about.exists():
        pytest.skip("needs /proc/self/io")
    return int(re.search(r"rchar: (\d+)", about.read_text())[1])  # type: ignore[index]


def assert_refused(capsys, words, *named):
    """Runs the command line in this process: exit code 2 and one line that holds every word of ``named``."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert not any("Traceback" in line for line in lines)
    for word in named:
        assert word in errors[0], errors[0]
    return errors[0]


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def write_processor(folder: Path, mean: list[float] = IMAGENET[0], std: list[float] = IMAGENET[1], **more: Any) -> None:
    """What says how images are normalised, beside the weights of a model of transformers."""
    about = {
        "image_processor_type": "ViTImageProcessor",
        "image_mean": mean,
        "image_std": std,
        "do_resize": False,
        "size": None,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps({**about, **more}))


def read_terminal(main_end: int) -> str:
    """All that was written to a pseudo-terminal whose other end is, or will be, closed."""
    out = b""
    while True:
        try:
            part = os.read(main_end, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        out += part
    os.close(main_end)
    return out.decode()
