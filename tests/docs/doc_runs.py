"""A reader's folder, and the commands of a page run in it: cut to a few steps on drawn pictures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doc_commands import FENCE, ROOT, check, lines_of, words_of
from PIL import Image

import aimv2
from aimv2.cli import main
from aimv2.data.scenes import draw_scene

DOCS = ROOT / "docs"
RELEASED = "aimv2-large-patch14-224"
NEEDS = {"tutorials/probe.md": ["tutorials/own-photographs.md"], "report.md": ["start.md", "tutorials/from-nothing.md"]}
OTHERS = ("python", "source", "pip", "make", "torchrun", "export", "trap", "wait", "srun", "head=$(scontrol")

# what makes a twin of a command; behind its own words, so that these count
STEPS = {
    **{
        "train.steps": 4,
        "train.batch_size": 8,
        "train.compile": "off",
        "train.log_every": 1,
        "train.precision": "fp32",
    },
    **{"optim.warmup": 1, "data.workers": 0, "data.shuffle_buffer": 8, "eval.samples": 4, "eval.captions": 1},
    **{
        "eval.probe_epochs": 1,
        "eval.probe_samples": 60,
        "eval.probe_val_samples": 60,
        "log.tensorboard": False,
        "log.report": False,
    },
}
SHAPE = {
    **{"model.width": 32, "model.depth": 2, "model.heads": 2, "model.hidden": 64, "data.vocab_size": 300},
    **{"model.decoder_width": 32, "model.decoder_depth": 1, "model.decoder_heads": 2, "model.decoder_hidden": 64},
}
FEWER = {
    "probe": ["--epochs", "1", "--seeds", "0"],
    "data shapes": ["--count", "500"],
    "doctor": ["--quick", "true"],
    "retrieve": ["--candidates", "20"],
}
PRINT = (
    "caption",
    "data check",
    "depth",
    "doctor",
    "fewshot",
    "knn",
    "linear",
    "probe",
    "retrieve",
    "segment",
    "zeroshot",
)


def make_home(folder: Path) -> Path:
    """A folder as a reader has it: photographs with captions, labelled images, satellite tiles, a released encoder."""
    (folder / "photos").mkdir()
    with open(folder / "photos" / "captions.txt", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for number in range(1, 61):
            scene = draw_scene(np.random.default_rng(number), 32)
            Image.fromarray(scene.image).save(folder / "photos" / f"{number:04d}.jpg")
            table.writerow([f"{number:04d}.jpg", scene.caption])
    draw_classes(folder / "labelled", ("oak", "birch", "pine"))
    draw_classes(folder / "satellite", ("Forest", "River", "Residential"))
    model = aimv2.create_model(RELEASED, seed=0, width=64, heads=2, hidden=64, depth=12).eval()
    aimv2.save_pretrained(model, str(folder / "released"), to="released")
    return folder


def draw_classes(folder: Path, names: tuple[str, ...]) -> None:
    """``folder/{train,test}/CLASS/*.jpg``: a colour and a direction of stripes a class, in noise."""
    rng, line = np.random.default_rng(len(names[0])), np.arange(32)
    for split, count in (("train", 14), ("test", 6)):
        for label, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            wave = (
                line[:, None] * (label == 0) + line[None] * (label == 1) + (line[:, None] + line) * (label == 2)
            ) % 8 < 4
            for number in range(count):
                pixels = np.full((32, 32, 3), 60.0)
                pixels[..., label] += 100 * wave
                pixels += rng.normal(0, 25, pixels.shape)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name / f"{number:04d}.jpg")


def twin(words: list[str]) -> list[str]:
    """A command with what makes it short behind it."""
    words = ["released" if word == RELEASED else word for word in words[1:]]
    name = " ".join(words[:2]) if words[0] == "data" else words[0]
    words = [word for word in words if word != "--open"]  # no browser
    if name in ("pretrain", "data browse") and "--resume" not in words:
        more = {**STEPS, **({} if "--init" in words else SHAPE)}
        return [*words, *(word for key, value in more.items() for word in (f"--{key}", str(value)))]
    return [*words, *FEWER.get(name, [])]


RAN: set[tuple[str, ...]] = set()


def run(words: list[str], line: str) -> None:
    """Runs a command; one that only prints figures, and ran with the same options on another page, is parsed."""
    name = " ".join(words[:2]) if words[0] == "data" else words[0]
    kind = (name, *sorted(word for word in words if word.startswith("--")))
    if name in PRINT and "--out" not in words and kind in RAN:
        check(["aimv2", *words])
        return
    assert main(words) == 0, line
    RAN.add(kind)


def run_page(page: str, home: Path, done: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every bash and Python block of a page, in order, in the reader's folder; what Python left behind."""
    if page in done:
        return done[page]
    for other in NEEDS.get(page, []):
        run_page(other, home, done, monkeypatch)
    monkeypatch.chdir(home)
    names: dict[str, Any] = {}
    for language, body in fenced(DOCS / page):
        if language == "python":
            exec(compile(body.replace(RELEASED, "released"), page, "exec"), names)
        for line in lines_of(body) if language == "bash" else []:
            for words in words_of(line):
                assert words[0] == "aimv2" or words[0] in OTHERS, f"{page}: what is {line!r}?"
                if words[0] == "aimv2":
                    run(twin(words), f"{page}: {line}")
    done[page] = names
    return names


def fenced(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text())
