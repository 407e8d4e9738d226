"""What the tutorials tell people to type runs, in order, from the first command to the last: cut to a few steps on drawn pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doc_commands import blocks, check, lines_of, words_of
from doc_runs import DOCS, run_page, twin

from aimv2.cli import main
from runs import torchrun

pytestmark = pytest.mark.usefixtures("few_scenes")


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


def test_torchrun_of_two_processes_as_the_page_has_it(home: Path, done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page("tutorials/own-photographs.md", home, done, monkeypatch)
    lines = [line for body in blocks(DOCS / "tutorials/many-gpus.md", "bash") for line in lines_of(body)]
    (line,) = [line for line in lines if line.startswith("torchrun --nproc-per-node 2")]
    (words,) = words_of(line)
    check(words)  # by the launcher's parser; tests/train/test_ranks.py starts the launcher itself
    monkeypatch.chdir(home)
    ended = torchrun(2, *twin(["aimv2", *words[words.index("--") + 1 :]]))
    assert ended.returncode == 0, ended.stderr
    assert "memory_gb" in ended.stdout and not (home / "runs" / "large" / "dry").exists()
