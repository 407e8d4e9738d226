"""What the pages tell people to type runs, in order, from the first command to the last: cut to a few steps on drawn pictures."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doc_commands import FENCE, ROOT, blocks, commands, lines_of, words_of
from PIL import Image

import aimv2
from aimv2 import launch
from aimv2.cli import main
from aimv2.data.scenes import draw_scene
from runs import light_collections

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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it: photographs with captions, labelled images, satellite tiles, a released encoder."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "recipes").symlink_to(ROOT / "recipes")
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


@pytest.fixture(scope="module")
def done() -> dict[str, dict[str, Any]]:
    """What the Python of each page that has been run left behind."""
    return {}


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "DEMO_SCENES", 500)
    with light_collections():
        yield


def twin(words: list[str]) -> list[str]:
    """A command with what makes it short behind it."""
    words = ["released" if word == RELEASED else word for word in words[1:]]
    name = " ".join(words[:2]) if words[0] == "data" else words[0]
    words = [word for word in words if word != "--open"]  # no browser
    if name in ("pretrain", "data browse") and "--resume" not in words:
        more = {**STEPS, **({} if "--init" in words else SHAPE)}
        return [*words, *(word for key, value in more.items() for word in (f"--{key}", str(value)))]
    return [*words, *FEWER.get(name, [])]


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
                    assert main(twin(words)) == 0, f"{page}: {line}"
    done[page] = names
    return names


def fenced(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text())


def test_start_in_five_minutes(home: Path, done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run_page("start.md", home, done, monkeypatch)
    assert left["features"].ndim == 3 and left["features"].shape[0] == 1
    assert isinstance(left["captions"][0], str)
    assert len(np.load(home / "features" / "features-00000.npy")) > 500
    figures = json.loads((home / "runs" / "demo" / "summary.json").read_text())
    for name in ("val_text_loss", "val_pixel_loss", "caption_exact_match", "probe_top1", "probe_top1_random"):
        assert name in figures, f"the page explains {name}"


def test_own_photographs(home: Path, done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run_page("tutorials/own-photographs.md", home, done, monkeypatch)
    assert left["vectors"].shape == (60, 32) and left["nearest"][0] == 0
    assert left["keys"][0] == "0001.jpg"
    assert type(left["model"]).__name__ == "Aimv2VisionModel"
    result = json.loads((home / "results" / "photos" / "result.json").read_text())
    assert set(result["figures"]["baselines"]) == {"random", "pixels"}


def test_released_encoder(home: Path, done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run_page("tutorials/released-encoder.md", home, done, monkeypatch)
    assert left["patches"].shape == (2, 256, 64) and left["vectors"].shape == (2, 64)
    assert [tuple(one.shape) for one in left["maps"]] == [(2, 64, 16, 16)] * 2
    assert (home / "features" / "blocks" / "features-00000.parquet").is_file()
    assert all((home / "out" / form / "model.safetensors").is_file() for form in ("transformers", "timm", "ours"))


def test_probe(home: Path, done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left = run_page("tutorials/probe.md", home, done, monkeypatch)
    assert 0 <= left["result"]["figures"]["top1"] <= 1
    assert all((home / "results" / name / "result.json").is_file() for name in ("knn", "fewshot", "linear", "probe"))


def test_from_nothing(
    home: Path, done: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page("tutorials/from-nothing.md", home, done, monkeypatch)
    assert (home / "results" / "compare.png").stat().st_size > 1000
    captions = [words for words in (home / "shards" / "satellite").iterdir() if words.name.startswith("train-")]
    assert captions
    knn = json.loads((home / "results" / "satellite-knn" / "result.json").read_text())["figures"]
    assert set(knn["baselines"]) == {"random", "pixels"}


def test_report(home: Path, done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page("report.md", home, done, monkeypatch)
    one, both = (home / "runs" / "demo" / "report.html").read_text(), (home / "compare.html").read_text()
    text = (DOCS / "report.md").read_text()
    for section in re.findall(r"^\| ([A-Z][\w ,]+?) \|", text, re.MULTILINE):
        for title in ("Configuration", "Machine and code") if " and code" in section else (section,):
            assert f">{title}</h2>" in one, f"the page explains {title!r}"
    assert "demo" in both and "other" in both


def test_the_page_of_many_gpus_runs_as_it_is_up_to_torchrun(
    home: Path, done: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every torchrun of the page, in one process: recipe at toy size, then the dry run."""
    run_page("tutorials/own-photographs.md", home, done, monkeypatch)
    monkeypatch.chdir(home)
    lines = [line for body in blocks(DOCS / "tutorials/many-gpus.md", "bash") for line in lines_of(body)]
    starts = [words for line in lines if line.startswith("torchrun") for words in words_of(line)]
    assert len(starts) == 2
    for words in starts:
        inner = ["aimv2", *words[words.index("--") + 1 :]]
        more = ["--data.tokenizer", "auto", "--eval.every", "0"] if "--config" in inner else []
        small = ["--model.image_size", "28"] if "--config" in inner else []
        assert main([*twin(inner), *more, *small]) == 0


@pytest.mark.long
def test_torchrun_of_two_processes_as_the_page_has_it(home: Path, done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page("tutorials/own-photographs.md", home, done, monkeypatch)
    lines = [line for body in blocks(DOCS / "tutorials/many-gpus.md", "bash") for line in lines_of(body)]
    (line,) = [line for line in lines if line.startswith("torchrun --nproc-per-node 2")]
    (words,) = words_of(line)
    at = words.index("--")
    command = [sys.executable, "-m", "torch.distributed.run", *words[1 : at + 1], *twin(["aimv2", *words[at + 1 :]])]
    ended = subprocess.run(
        command, cwd=home, capture_output=True, text=True, timeout=300, check=False, env={**os.environ}
    )
    assert ended.returncode == 0, ended.stderr
    assert "memory_gb" in ended.stdout and not (home / "runs" / "large" / "dry").exists()


# ---- pages whose commands take longer ----

NOT_RUN = re.compile(r"\.\.\.|\b(?:MODEL|SHARDS|RUN|CHAIN|D|DATA|OUT|RESULT|TAUGHT)\b|aimv2-large|^torchrun|^make|^pip")


@pytest.mark.long
def test_stages(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every command of the page of stages that names no placeholder, in the page's order, as it stands there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "photos").symlink_to(home / "labelled")
    lines = [one.text for one in commands(DOCS / "stages.md") if not one.inline and not NOT_RUN.search(one.text)]
    made = [line for line in lines if "runs/base " in line and "--init" not in line]
    assert len(lines) > 12 and len(made) == 1
    order = ["aimv2 data shapes shapes --count 600", made[0] + " --train.save_every 10 --train.keep 0"]
    order += [line for line in dict.fromkeys(lines) if line != made[0] and "data shapes" not in line]
    for line in order:
        for words in words_of(line):
            more = ["--train.compile", "off", "--data.workers", "0"] if words[1] == "pretrain" else []
            assert main([*words[1:], *more]) == 0, line


@pytest.mark.long
def test_readme(home: Path, done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the README, placeholders filled in; what needs the hub, a browser, several GPUs or masks is only parsed."""
    run_page("tutorials/own-photographs.md", home, done, monkeypatch)
    monkeypatch.chdir(home)
    names = {
        "PHOTOS": "photos",
        "SHARDS": "readme/shards",
        "RUN": "readme/run",
        "HIGH": "readme/high",
        "PAIR": "readme/pair",
    }
    names |= {
        "DONE": "readme/done",
        "MODEL": "readme/run",
        "D": "labelled",
        "RESULT": "results/photos",
    }
    names |= {"RUN@STEP": "readme/run@2", "photo.jpg": "photos/0001.jpg", "cifar10": "none"}
    ran = 0
    for line in [line for body in blocks(ROOT / "README.md", "bash") for line in lines_of(body)]:
        for words in words_of(line):
            if words[0] != "aimv2" or words[1] in ("push", "segment", "depth", "explore", "run", "doctor"):
                continue
            words = [f"readme/out-{ran}" if word == "OUT" else names.get(word, word) for word in words]
            if words[1] == "pretrain":
                number = words.index("--run") + 1
                words[number] += f"-{ran}" if words[number] == "readme/run" and Path("readme/run").is_dir() else ""
                words += (
                    ["--train.save_every", "2"] if "--init" not in words and "--objective.name" not in words else []
                )
            if "--model.image_size" in words:
                words[words.index("--model.image_size") + 1] = "48"
            words = [word for i, word in enumerate(words) if "--dataset" not in words[max(i - 1, 0) : i + 1]]
            extra = PAIR if "contrastive" in words else []
            data = ["--data", "photos"] if words[1] in ("retrieve", "caption") and "--data" in words else []
            assert main([*twin(words), *extra, *data]) == 0, line
            ran += 1
    assert ran > 15


PAIR = [
    *("--model.text_width", "16", "--model.text_depth", "1", "--model.text_heads", "2", "--model.text_hidden", "32"),
    *("--model.projection", "16"),
]
