"""``aimv2 vlm score --tasks``: data in the hub's cache without network, files to submit, questions that are too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aimv2 import api
from aimv2.errors import UsageError
from aimv2.evals.vlm.benchmarks import INSTALL, cached, check_ready
from aimv2.evals.vlm.run_tasks import render_tasks
from aimv2.vlm.answer import Picture
from tiny_llm import picture, vlm

pytest.importorskip("lmms_eval", reason=INSTALL)
ROWS = range(4)
PAGES = {
    "question": [f"What is this {n}?" for n in ROWS],
    "questionId": list(map(str, ROWS)),
    "question_id": list(ROWS),
    "answers": [["red"] for _ in ROWS],
}
GQA = {"question": PAGES["question"], "answer": ["red"] * 4, "imageId": [f"i{n}" for n in ROWS]}
OWN = """\
task: own
dataset_path: parquet
dataset_kwargs: {{data_files: {{train: {root}/train.parquet, test: {root}/test.parquet}}}}
training_split: train
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
SUBMIT = """\
task: pages
include: {theirs}/docvqa/docvqa_test.yaml
dataset_path: parquet
dataset_name: null
dataset_kwargs: {{data_files: {{test: {root}/pages.parquet}}}}
generation_kwargs: {{max_new_tokens: 6}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    vlm(root, max_position_embeddings=512)
    return root


def table(path: Path, columns: dict[str, list[Any]], images: list[Any] | None = None) -> None:
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    made = datasets.Dataset.from_dict(columns)
    if images:
        rows = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
        made = datasets.concatenate_datasets([made, rows], axis=1)
    made.to_parquet(path)


def snapshot(home: Path, source: str, parts: dict[str, tuple[str, dict[str, list[Any]], list[Any] | None]]) -> None:
    """A data set in the hub's cache, as ``hf download`` leaves it: of each configuration its split, columns and images."""
    folder, commit = home / f"datasets--{source.replace('/', '--')}", "1" * 40
    lines = []
    for name, (split, columns, images) in parts.items():
        table(folder / "snapshots" / commit / name / f"{split}-00000-of-00001.parquet", columns, images)
        lines += [f"- config_name: {name}", "  data_files:", f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "snapshots" / commit / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on a machine without network."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "built")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "built"))
    return tmp_path / "hub"


def refused(code: str, option: str, *words: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        api.vlm_score(*words, **options)
    assert (caught.value.code, caught.value.option) == (code, option), caught.value
    return str(caught.value)


def pictures() -> list[Any]:
    return [picture(20 + 9 * n, 30) for n in ROWS]


def test_data_in_the_hub_s_cache_are_read_without_network(place: Path, offline: Path) -> None:
    text = refused("not-found", "--tasks", place / "vlm", tasks="docvqa")
    assert "hf download --repo-type dataset lmms-lab-encoder/DocVQA" in text and str(offline) in text
    snapshot(offline, "lmms-lab-encoder/DocVQA", {"Other": ("validation", PAGES, pictures())})
    assert "DocVQA" in refused("not-found", "--tasks", place / "vlm", tasks="docvqa"), "another configuration only"
    snapshot(offline, "lmms-lab-encoder/DocVQA", {"DocVQA": ("validation", PAGES, pictures())})
    row = api.vlm_score(place / "vlm", tasks="docvqa", controls=False)["figures"]["tasks"]["aimv2_docvqa"]
    assert (row["documents"], row["scored"], row["source"]) == (4, 4, "lmms-lab-encoder/DocVQA")


def test_gqa_has_images_of_its_own(place: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aimv2.evals.vlm import task_functions

    monkeypatch.setattr(task_functions, "_gqa_images", task_functions._gqa_images.__wrapped__)  # nothing remembered
    questions = {"val_balanced_instructions": ("val", GQA, None)}
    snapshot(offline, "lmms-lab-encoder/GQA", questions)
    assert "val_balanced_images" in refused("not-found", "--tasks", place / "vlm", tasks="gqa")
    images = {"val_balanced_images": ("val", {"id": GQA["imageId"]}, pictures())}
    snapshot(offline, "lmms-lab-encoder/GQA", questions | images)
    row = api.vlm_score(place / "vlm", tasks="gqa", controls=False)["figures"]["tasks"]["aimv2_gqa"]
    assert row["scored"] == 4 and row["score"] is not None
    one = picture(9, 9)
    assert Picture(task_functions.gqa_image({"image": one})[0]).digest == Picture(one).digest, "of its own row"


def test_data_sets_that_are_built_already(offline: Path) -> None:
    names = {"DocVQA": "doc_vqa", "VQAv2": "vq_av2", "ChartQA": "chart_qa", "VizWiz-VQA": "viz_wiz-vqa", "MME": "mme"}
    for name, folder in names.items():
        source = f"lmms-lab-encoder/{name}"
        assert not cached(source)
        with pytest.raises(UsageError):
            check_ready("aimv2_x", {"dataset_path": source}, "no network")
        (offline.parent / "built" / f"lmms-lab-encoder___{folder}" / "default" / "0.0.0" / "a").mkdir(parents=True)
        check_ready("aimv2_x", {"dataset_path": source}, "no network")
        assert cached(source, "default") and not cached(source, "other")


def test_a_file_to_submit_holds_the_answers_to_the_images(place: Path, tmp_path: Path) -> None:
    from aimv2.evals.vlm.benchmarks import need_lmms_eval

    table(tmp_path / "pages.parquet", PAGES, pictures())
    table(tmp_path / "train.parquet", {**PAGES, "answer": ["red"] * 4}, pictures())
    text = SUBMIT.format(root=tmp_path, theirs=need_lmms_eval())
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "task.yaml").write_text(text)
    ours = text.replace("task: pages", "task: aimv2_docvqa_test")
    (tmp_path / "own" / "ours.yaml").write_text(ours)
    written = {}
    for name, controls in (("pages", False), ("pages", True), ("docvqa_test", True)):
        out = tmp_path / f"{name}-{controls}"
        result = api.vlm_score(place / "vlm", tasks=name, include=tmp_path / "own", out=out, controls=controls)
        (row,) = result["figures"]["tasks"].values()
        (file,) = (out / "submissions").iterdir()
        written[name, controls] = json.loads(file.read_text())
        assert ("shuffled_images" in row) == (name == "pages" and controls), "no score, no controls"
    first, *others = written.values()
    assert len({one["answer"] for one in first}) > 1 and all(other == first for other in others)


def test_one_document_that_is_too_long_is_wrong(place: Path, tmp_path: Path) -> None:
    same, words = picture(20, 20), [*(f"q{n}" for n in range(5)), "q" * 600]
    rows = {"question": words, "answer": ["a"] * 6}
    table(tmp_path / "test.parquet", rows, [same] * 5 + [picture(20, 20)])
    table(tmp_path / "train.parquet", rows, [picture(20, 20) for _ in range(6)])
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "task.yaml").write_text(OWN.format(root=tmp_path))
    options = {"tasks": "own", "include": tmp_path / "own"}
    result = api.vlm_score(place / "vlm", **options, shots="0,1", out=tmp_path / "out")
    row = result["figures"]["tasks"]["own"]
    assert row["scored"] == 6 and row["too_long"]["0"] == 1 <= row["too_long"]["1"]
    assert row["kept_images"] == 0, "equal images are another's too, but never the own ones"
    text = render_tasks(result)
    assert "1 of 6" in text and "with 0 shots" in text and result["protocol"]["controls"] == 0
    few = api.vlm_score(place / "vlm", **options, limit=3)["figures"]["tasks"]["own"]
    assert few["too_long"] == {"0": 0}
    text = refused("limit", "--shots", place / "vlm", **options, shots="5")
    assert "--shots 5" in text and "--max-tokens" not in text
    table(tmp_path / "test.parquet", {key: column[5:] for key, column in rows.items()}, [same])
    assert "max_new_tokens" in refused("limit", "--tasks", place / "vlm", **options)


def test_batch_size_of_lmms_eval_s_command(place: Path) -> None:
    from aimv2.evals.vlm.lmms import BATCH_SIZE, Aimv2Vlm

    assert Aimv2Vlm(vlm=str(place / "vlm"), batch_size="auto").answerer.batch_size == BATCH_SIZE
    assert Aimv2Vlm(vlm=str(place / "vlm"), batch_size="8").answerer.batch_size == 8


def test_documents_that_have_one_image_keep_it(place: Path, tmp_path: Path) -> None:
    same = picture(20, 20)
    table(tmp_path / "test.parquet", {"question": ["a", "b"], "answer": ["a", "b"]}, [same, same])
    (tmp_path / "own").mkdir()
    text = (
        OWN.format(root=tmp_path)
        .replace(f"train: {tmp_path}/train.parquet, ", "")
        .replace("training_split: train\n", "")
    )
    (tmp_path / "own" / "task.yaml").write_text(text)
    result = api.vlm_score(place / "vlm", tasks="own", include=tmp_path / "own")
    assert result["figures"]["tasks"]["own"]["kept_images"] == 2 and "kept: 2" in render_tasks(result)
