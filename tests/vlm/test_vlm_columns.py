"""Every task file of Tables 7 and 8, run on a few rows with the columns of its data set."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from aimv2 import api
from aimv2.evals.vlm.benchmarks import BENCHMARKS, INSTALL, TABLE_8, write_tasks
from tiny_llm import encoder, language_model, picture

pytest.importorskip("lmms_eval", reason=INSTALL)
ROWS = range(4)
PEOPLE = ["red"] * 6 + ["blue"] * 4
CAPTIONS = [[f"a red ring {n}", f"one ring of {n} colours"] for n in ROWS]
QUESTIONS: dict[str, list[Any]] = {"question": [f"What is this {n}?" for n in ROWS], "question_id": list(ROWS)}
VOTED = {**QUESTIONS, "answers": [PEOPLE for _ in ROWS]}
PAGES = {**QUESTIONS, "questionId": list(map(str, ROWS)), "answers": [["red", "a red one"] for _ in ROWS]}
CHOICES = {f"choice_{letter}": [letter for _ in ROWS] for letter in "abcd"}
COLUMNS: dict[str, dict[str, list[Any]]] = {
    "vqav2": {
        **QUESTIONS,
        "answers": [[{"answer": text, "answer_id": n} for n, text in enumerate(PEOPLE)] for _ in ROWS],
    },
    "gqa": {**QUESTIONS, "answer": ["red" for _ in ROWS], "imageId": [f"i{n}" for n in ROWS]},
    "okvqa": VOTED,
    "textvqa": {**VOTED, "ocr_tokens": [["a"] for _ in ROWS]},
    "docvqa": PAGES,
    "docvqa_test": {**PAGES, "answers": [None for _ in ROWS]},
    "infovqa": PAGES,
    "infovqa_test": {**PAGES, "answers": [None for _ in ROWS]},
    "chartqa": {**QUESTIONS, "answer": ["3" for _ in ROWS], "type": ["human_test", "augmented_test"] * 2},
    "scienceqa": {
        **QUESTIONS,
        "hint": ["" for _ in ROWS],
        "choices": [["one", "two"] for _ in ROWS],
        "answer": [0, 1, 0, 1],
    },
    "coco": {"question_id": [f"COCO_val2017_{n:012}.jpg" for n in ROWS], "id": list(ROWS), "answer": CAPTIONS},
    "textcaps": {"image_id": [f"t{n}" for n in ROWS], "caption_str": CAPTIONS},
    "nocaps": {"image_id": list(map(str, ROWS)), "annotations_captions": CAPTIONS},
    "seed": {**QUESTIONS, **CHOICES, "answer": ["A", "B", "C", "D"], "data_type": ["image", "image", "video", "image"]},
    "mme": {**QUESTIONS, "question_id": ["p", "p", "q", "q"], "answer": ["Yes", "No"] * 2, "category": ["count"] * 4},
    "vizwiz": VOTED,
}


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``vlm``, and in ``own`` our task files with data of this machine."""
    import datasets

    root = tmp_path_factory.mktemp("columns")
    encoder(root / "eyes")
    language_model(root / "llm", max_position_embeddings=1024)
    api.vlm_build(root / "eyes", root / "llm", root / "vlm")
    images = [{"bytes": png(picture(20 + n, 30)), "path": None} for n in ROWS]
    (root / "data").mkdir()
    for name, columns in COLUMNS.items():
        several = name == "seed"
        table = datasets.Dataset.from_dict({**columns, "image": [[one] if several else one for one in images]})
        table = table.cast_column("image", datasets.List(datasets.Image()) if several else datasets.Image())
        table.to_parquet(root / "data" / f"{name}.parquet")
    for file in write_tasks(root / "own").glob("*.yaml"):
        name = file.stem.removeprefix("aimv2_")
        split = {"okvqa": "val2014", "vqav2": "validation", "gqa": "val"}.get(name)
        split = split or (
            "test"
            if BENCHMARKS[name].split == "test"
            else "val"
            if name in ("coco", "textcaps", "vizwiz")
            else "validation"
        )
        files = dict.fromkeys(
            (split, *(["train"] if name in ("textvqa", "textcaps") else [])), str(root / "data" / f"{name}.parquet")
        )
        text = (
            file.read_text()
            .replace("dataset_kwargs: {} # public: no token", "")
            .replace("dataset_name: val_balanced_instructions", "")
        )
        more = {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        file.write_text(text + yaml.safe_dump(more))
    return root


def test_every_task_file_runs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aimv2.evals.vlm import task_functions

    images = [{"image": picture(9, 9)} for _ in ROWS]
    monkeypatch.setattr(task_functions, "_gqa_images", lambda: (images, {f"i{n}": n for n in ROWS}))
    words = {"tasks": ",".join(BENCHMARKS), "include": place / "own", "out": tmp_path / "out", "controls": False}
    result = api.vlm_score(place / "vlm", **words)
    rows = result["figures"]["tasks"]
    for name, one in BENCHMARKS.items():
        row = rows[f"aimv2_{name}"]
        assert row["documents"] == (3 if name == "seed" else 4) and row["unit"] == one.unit
        assert (row["score"] is None) == name.endswith("_test"), name
    assert result["figures"]["mean_over_eight"]["0"] == pytest.approx(
        sum(rows[f"aimv2_{n}"]["score"] for n in TABLE_8) / 8
    )
    assert "PTB" in result["protocol"]["tokenizer"]
    for name in ("docvqa", "infovqa"):
        written = json.loads((tmp_path / "out" / "submissions" / f"{name}_test_for_submission.json").read_text())
        assert [one["questionId"] for one in written] == list(ROWS) and all("answer" in one for one in written)
    shots = api.vlm_score(
        place / "vlm", tasks="textvqa,textcaps", include=place / "own", shots="0,2", out=tmp_path / "shots"
    )
    assert all(list(row["by_shots"]) == ["0", "2"] for row in shots["figures"]["tasks"].values())
