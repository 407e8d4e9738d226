"""Scores of vision-language models next to Tables 7, 8 and C3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aimv2 import api
from aimv2.evals.compare import paper
from aimv2.evals.result import make_result, write_result
from aimv2.evals.vlm.benchmarks import BENCHMARKS, TABLE_8

MODEL = {"name": "vlm", "kind": "vlm", "weights_sha256": "0" * 64}


def test_the_papers_numbers() -> None:
    part = paper()["vlm"]
    assert [len(table["rows"]) for table in part["tables"]] == [8, 3] and set(part["columns"]) < set(BENCHMARKS)
    rows = {row[0]: dict(zip(part["columns"], row[1:])) for table in part["tables"] for row in table["rows"]}
    assert all(len(row) == 13 for row in rows.values())
    assert [rows["AIMv2 L"][name] for name in ("vqav2", "textvqa", "nocaps", "mme")] == [79.7, 53.6, 99.9, 1472]
    assert [rows["DINOv2 g/14"][name] for name in ("gqa", "docvqa", "textcaps", "seed")] == [72.7, 8.2, 42.1, 68.9]
    tiled = rows["AIMv2 L 1008 px, 3 x 3 tiles"]
    assert [tiled[name] for name in ("chartqa", "scienceqa", "coco", "seed", "mme")] == [65.1, 81.6, 93.7, None, 1507]
    assert all(max(rows, key=lambda name: rows[name][column]) == "AIMv2 3B" for column in ("vqav2", "coco", "textcaps"))
    assert paper()["incontext"]["rows"][2] == ["AIMv2 L/14", 39.6, 63.8, 67.2]


def task(score: float, unit: str, **more: Any) -> dict[str, Any]:
    return {
        "score": score, "by_shots": {"0": score}, "text_only": score / 2, "shuffled_images": score / 3, "metric": "m", "unit": unit,
        "version": "1", "split": "val", "documents": 100, "scored": 100, "note": "", **more,
    }  # fmt: skip


def stored(folder: Path, figures: dict[str, Any], protocol: dict[str, Any]) -> Path:
    folder.mkdir()
    data = {"name": "scenes", "dataset": None, "source": "x"}
    write_result(folder, make_result("vlm score", protocol, MODEL, data, figures, 1.0))
    return folder


def test_benchmarks_stand_next_to_the_tables(tmp_path: Path) -> None:
    tasks = {
        "aimv2_docvqa": task(25.0, BENCHMARKS["docvqa"].unit, note=BENCHMARKS["docvqa"].note, scored=9),
        "aimv2_mme": task(1400.0, BENCHMARKS["mme"].unit),
        "own": task(0.5, ""),
        "aimv2_docvqa_test": {
            **task(0, "a file to submit"),
            "by_shots": {"0": None},
            "text_only": None,
            "shuffled_images": None,
        },
    }
    figures = {"tasks": tasks, "mean_over_eight": {"0": 39.0, "4": 60.5}}
    found = api.compare(
        [str(stored(tmp_path / "a", figures, {"name": "lmms-eval", "lmms_eval": "0.7.3", "shots": [0, 4]}))]
    )
    assert found["datasets"] == ["docvqa", "mme", "own", "mean over eight"]
    by = {(cell["dataset"], cell["model"], cell["protocol"]): cell for cell in found["table"]}
    zero = "vision-language, 0 shots"
    assert by["docvqa", "vlm", zero]["value"] == 25.0 and by["docvqa", "text only", zero]["value"] == 12.5
    assert by["docvqa", "AIMv2 L", zero]["value"] == 26.6 and by["docvqa", "AIMv2 L 336 px", zero]["value"] == 50.2
    assert len([cell for cell in found["table"] if cell["dataset"] == "mme"]) == 3 + 11
    assert by["mean over eight", "AIMv2 L/14", "vision-language, 4 shots"]["value"] == 63.8
    assert by["mean over eight", "vlm", "vision-language, 4 shots"]["value"] == 60.5
    assert any("paper's is of the test split" in note for note in by["docvqa", "vlm", zero]["notes"])
    assert any("9 of 100" in note for note in by["docvqa", "vlm", zero]["notes"])
    assert "Llama 3.0 8B" in found["text"] and "attentive" not in found["text"]
    assert max(map(len, found["text"].splitlines())) <= 80
    assert len(TABLE_8) == 8


def test_questions_stand_next_to_what_needs_no_image(tmp_path: Path) -> None:
    one = {"accuracy": 0.6, "accuracy_interval": [0.5, 0.7], "text_only_accuracy": 0.4, "chance": 0.25, "kinds": {}}
    folder = stored(
        tmp_path / "a", {**one, "sets": {"seen": one, "unseen": {**one, "accuracy": 0.3}}}, {"name": "questions"}
    )
    found = api.compare([str(folder)])
    assert found["datasets"] == ["seen", "unseen"]
    values = {(cell["dataset"], cell["model"]): cell["value"] for cell in found["table"]}
    assert values["seen", "vlm"] == pytest.approx(60) and values["unseen", "vlm"] == pytest.approx(30)
    assert values["seen", "text only"] == pytest.approx(40) and values["seen", "chance"] == pytest.approx(25)
