"""``aimv2 vlm score --tasks``: lmms-eval through our class, its figures against hand counts, and what is missing said at once."""

from __future__ import annotations

import json
import math
import shutil
import sys
import tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_llm
from aimv2 import api
from aimv2.errors import UsageError
from aimv2.evals.vlm.benchmarks import BENCHMARKS, INSTALL, TABLE_8, check_ready, task_names, write_tasks
from aimv2.vlm.answer import Picture, answers, question
from aimv2.vlm.model import open_vlm
from forked import forked
from tiny_llm import picture

pytest.importorskip("lmms_eval", reason=INSTALL)
QUESTIONS = [f"What is the small red square {n}?" for n in range(7)]
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
TASK = """\
task: local_scenes
dataset_path: parquet
dataset_kwargs: {{data_files: {{train: {root}/train.parquet, test: {root}/test.parquet}}}}
{train}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``vlm``, and in ``own`` the task local_scenes, of which it answers three documents of seven as wanted, two without an image."""
    import datasets

    root = tmp_path_factory.mktemp("tasks")
    tiny_llm.vlm(root, max_position_embeddings=512)
    images = [picture(20 + 3 * n, 30 - n) for n in range(16)]
    model, processor = open_vlm(root / "vlm")
    seen = answers(model, processor, [question(text, image) for text, image in zip(QUESTIONS, images)], 3)
    blind = answers(model, processor, [question(text) for text in QUESTIONS], 3)
    assert all(one != other for one, other in zip(seen, blind))
    wanted = [*seen[:3], *blind[3:5], "never", "never"]
    features = datasets.Features(
        {"image": datasets.Image(), **dict.fromkeys(("question", "answer"), datasets.Value("string"))}
    )
    (root / "own").mkdir()
    test = {"image": images[:7], "question": QUESTIONS, "answer": wanted}
    train = {
        "image": images[6:],
        "question": [QUESTIONS[6], *QUESTIONS, "a", "is"],
        "answer": [f"a {n}" for n in range(10)],
    }
    for name, rows in (("train", train), ("test", test)):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "own" / f"{name}.parquet")
    (root / "own" / "task.yaml").write_text(TASK.format(root=root / "own", train="training_split: train"))
    return root


def scored(place: Path, **options: Any) -> dict[str, Any]:
    return api.vlm_score(place / "vlm", tasks="local_scenes", include=place / "own", **options)


def test_scores_are_those_of_our_answers(place: Path, tmp_path: Path) -> None:
    result = scored(place, shots="0,2", out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    row = result["figures"]["tasks"]["local_scenes"]
    assert row["score"] == pytest.approx(3 / 7) and row["text_only"] == pytest.approx(2 / 7)
    assert row["shuffled_images"] is not None and list(row["by_shots"]) == ["0", "2"]
    assert (row["version"], row["split"], row["documents"], row["scored"]) == ("3", "test", 7, 7)
    assert row["prompt"] == QUESTIONS[0] and row["max_tokens"] == 3
    kept = list((tmp_path / "out" / "answers").iterdir())
    before = [file.read_text() for file in kept]
    (tmp_path / "out" / "result.json").write_text(
        json.dumps({**result, "protocol": result["protocol"] | {"shots": [0]}})
    )
    again = scored(place, shots="0,2", out=tmp_path / "out")  # which adds a number of shots
    assert again["figures"] == result["figures"] and [file.read_text() for file in kept] == before, (
        "nothing is answered twice"
    )
    for other in ({"shots": "0"}, {"shots": "0,2", "controls": False}, {"shots": "0,2", "limit": 1}):
        tiny_llm.refused(scored, "exists", "--out", place, **other, out=tmp_path / "out")


def test_two_processes_equal_one(place: Path, tmp_path: Path) -> None:
    words = [
        "vlm",
        "score",
        place / "vlm",
        "--tasks",
        "local_scenes",
        "--include",
        place / "own",
        "--out",
        tmp_path / "two",
    ]
    ended = forked(*map(str, words), ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert "local_scenes" in ended.stdout and "%|" not in ended.stderr
    two = json.loads((tmp_path / "two" / "result.json").read_text())["figures"]["tasks"]["local_scenes"]
    one = scored(place)["figures"]["tasks"]["local_scenes"]
    for key in ("score", "text_only", "shuffled_images"):
        assert one[key] == pytest.approx(two[key]), key
    assert len(list((tmp_path / "two" / "answers").iterdir())) == 2


def test_lmms_eval_finds_the_class(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``lmms_eval --model aimv2_vlm --model_args vlm=...`` does."""
    from lmms_eval import models
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    about = tmp_path / "elsewhere-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1\n")
    lines = [
        f"[{name}]\n{key} = {value}\n"
        for name, part in settings["project"]["entry-points"].items()
        for key, value in part.items()
    ]
    (about / "entry_points.txt").write_text("".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = models.MODEL_REGISTRY_V2
    registry.load_entrypoint_manifests(overwrite=True)
    manager = TaskManager("ERROR", str(place / "own"), include_defaults=False)
    found = simple_evaluate(
        model="aimv2_vlm", model_args=f"vlm={place / 'vlm'}", batch_size=4, tasks=["local_scenes"], task_manager=manager,
        bootstrap_iters=0, cli_args=SimpleNamespace(output_path=str(tmp_path), process_with_media=True),
    )  # fmt: skip
    assert found["results"]["local_scenes"]["exact_match,none"] == pytest.approx(3 / 7)


def test_examples_are_never_the_document(place: Path) -> None:
    from aimv2.evals.vlm.lmms import Aimv2Vlm
    from aimv2.evals.vlm.run_tasks import index, loaded
    from aimv2.evals.vlm.score import opened

    manager, _ = index("local_scenes", place / "own", None)
    task = loaded(manager, "local_scenes")
    model = Aimv2Vlm(answerer=opened(str(place / "vlm"), "cpu", 4), shots=9)
    text = task.doc_to_text
    asked = [
        model.question_of((text(task.dataset["test"][n]), {}, task.doc_to_visual, n, "local_scenes", "test"))
        for n in range(7)
    ]
    for number, one in enumerate(asked):
        turns = [message["content"] for message in one.messages]
        assert len(one.images) == 10 and turns[-1] == f"<image>\n{QUESTIONS[number]}"
        examples = list(zip(turns[:-1:2], turns[1::2]))
        assert len(set(examples)) == 9
        assert number != 6 or ("<image>\n" + QUESTIONS[6], "a 0") not in examples, (
            "training document 0 is test document 6"
        )
    fewer = Aimv2Vlm(answerer=model.answerer, shots=3)
    short = fewer.question_of((text(task.dataset["test"][0]), {}, task.doc_to_visual, 0, "local_scenes", "test"))
    assert short.messages[:6] == asked[0].messages[:6], "more shots add examples to the same ones"
    other = Aimv2Vlm(answerer=model.answerer, shots=3, seed=1)
    args = (text(task.dataset["test"][0]), {}, task.doc_to_visual, 0, "local_scenes", "test")
    assert other.question_of(args).messages != short.messages
    with pytest.raises(UsageError) as caught:
        Aimv2Vlm(answerer=model.answerer, shots=11).question_of(args)
    assert (caught.value.code, caught.value.option) == ("limit", "--shots")


def test_exchanged_images_are_another_document_s(place: Path) -> None:
    from aimv2.evals.vlm.lmms import CONDITIONS, Aimv2Vlm
    from aimv2.evals.vlm.run_tasks import index, loaded
    from aimv2.evals.vlm.score import opened

    task = loaded(index("local_scenes", place / "own", None)[0], "local_scenes")
    model = Aimv2Vlm(answerer=opened(str(place / "vlm"), "cpu", 4))
    digests = [Picture(task.dataset["test"][n]["image"]).digest for n in range(7)]
    model.condition = CONDITIONS[2]
    given = [
        model.question_of((QUESTIONS[n], {}, task.doc_to_visual, n, "local_scenes", "test")).images[0].digest
        for n in range(7)
    ]
    assert sorted(given) == sorted(digests) and all(one != own for one, own in zip(given, digests))


# ---- the task files ----


@pytest.mark.parametrize("name", BENCHMARKS)
def test_task_files(name: str, tmp_path: Path) -> None:
    from lmms_eval.api.task import TaskConfig
    from lmms_eval.utils import load_yaml_config

    theirs_too = load_yaml_config(write_tasks(tmp_path) / f"aimv2_{name}.yaml", mode="full")
    config, one = TaskConfig(**theirs_too), BENCHMARKS[name]
    assert config.task == f"aimv2_{name}" and config.metadata == {"version": 1}
    assert one.metric in {metric["metric"] for metric in config.metric_list}
    assert config.test_split in {"val": ("val", "validation", "val2014")}.get(one.split, (one.split,))
    assert config.generation_kwargs["max_new_tokens"] == {"CIDEr": 64, "ANLS, %": 32, "a file to submit": 32}.get(
        one.unit, 16
    )
    prompts = (config.lmms_eval_specific_kwargs or {}).get("default", {})
    found = prompts.get("post_prompt", prompts.get("prompt", config.doc_to_text))
    if name == "seed":
        found = config.doc_to_text({f"choice_{letter}": "x" for letter in "abcd"} | {"question": "Q?"})
        assert found == f"Q?\nA. x\nB. x\nC. x\nD. x{LETTER}"
    elif name != "vizwiz":
        assert found == {"CIDEr": CAPTION}.get(one.unit, LETTER if name == "scienceqa" else SHORT)


def test_all_columns_have_a_task() -> None:
    columns = {one.printed for one in BENCHMARKS.values()}
    assert len(columns) == 14 and len({name.removesuffix("_test") for name in BENCHMARKS}) == 14
    assert len(TABLE_8) == 8 and set(TABLE_8) <= set(BENCHMARKS)


# ---- lmms-eval's metrics against hand counts ----


def test_vqa_accuracy() -> None:
    """Of ten people's answers each is left out in turn, and min(1, matches of the other nine / 3) averaged."""
    from lmms_eval.tasks.ok_vqa.utils import ok_vqa_process_results
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vizwiz_vqa.utils import vizwiz_vqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

    for matching, wanted in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        people = ["red"] * matching + ["blue"] * (10 - matching)
        whole = {"question_id": 1, "answers": list(people)}
        for process in (textvqa_process_results, ok_vqa_process_results, vizwiz_vqa_process_results):
            assert process({**whole, "answers": list(people)}, ["The red."])["exact_match"] == pytest.approx(wanted)
        persons = [{"answer": answer, "answer_id": number} for number, answer in enumerate(people)]
        assert vqav2_process_results_val({**whole, "answers": persons}, ["a red"])["exact_match"] == pytest.approx(
            wanted
        )


def test_anls() -> None:
    from lmms_eval.api.metrics import anls

    for references, written, wanted in (
        (["Paris"], "paris ", 1.0),
        (["hello"], "hallo", 1 - 1 / 5),
        (["abcd"], "abxy", 0.5),
        (["abcd"], "axyz", 0.0),  # 1/4 is under the threshold of 1/2
        (["ten", "10 dollars"], "10 dollar", 1 - 1 / 10),  # the best of the references
    ):
        assert anls(references=references, predictions=[written])["anls"] == pytest.approx(wanted)


def test_relaxed_accuracy() -> None:
    from lmms_eval.tasks.chartqa.utils import chartqa_process_results

    for written, target, wanted in (
        ("105", "100", 1.0), ("105.1", "100", 0.0), ("95", "100", 1.0), ("94.9", "100", 0.0),
        ("Red", "red", 1.0), ("reds", "red", 0.0), ("50%", "0.5", 1.0), ("0", "0", 1.0),
    ):  # fmt: skip
        found = chartqa_process_results({"answer": target, "type": "human_test"}, [written])
        assert found == {"relaxed_overall": wanted, "relaxed_human_split": wanted}, (written, target)


def test_mme_sums() -> None:
    """A category's points: percent of questions right, plus percent of images with both right; categories are added."""
    from lmms_eval.tasks.mme.utils import mme_aggregate_results, mme_process_results

    rows = []
    for category, number, right in (
        ("count", 0, (1, 1)), ("count", 1, (1, 0)), ("color", 2, (1, 1)), ("color", 3, (0, 0)), ("OCR", 4, (1, 1)),
    ):  # fmt: skip
        for answer, good in zip(("Yes", "No"), right):
            written = {"Yes": "yes.", "No": "No, it is not"}[answer if good else {"Yes": "No", "No": "Yes"}[answer]]
            doc = {"answer": answer, "category": category, "question_id": number}
            rows.append(mme_process_results(doc, [written])["mme_perception_score"])
    assert mme_aggregate_results(rows) == pytest.approx((75 + 50) + (50 + 50) + (100 + 100))
    doc = {"answer": "Yes", "category": "code_reasoning", "question_id": 1}
    assert list(mme_process_results(doc, ["y"])) == ["mme_cognition_score"]


CAPTIONS = [("red ring blue cross", ["red ring blue cross"]), ("green star", ["green star pink moon"])]


def test_cider() -> None:
    """Words of one image only have equal weights, which cancel: means over 1- to 4-grams of cosines, times 10."""
    from aimv2.evals.vlm.task_functions import cider

    rows = [{"pred": text, "answer": references} for text, references in CAPTIONS]
    partial = 10 * (2 / math.sqrt(2 * 4) + 1 / math.sqrt(1 * 3)) / 4 * math.exp(-((3 - 1) ** 2) / (2 * 6**2))
    assert cider(rows) == pytest.approx((10 + partial) / 2, rel=1e-6)
    assert cider([{"pred": "x", "answer": row["answer"]} for row in rows]) == 0


@pytest.mark.skipif(shutil.which("java") is None, reason="lmms-eval's own scorers are Java programs")
def test_cider_is_lmms_evals(tmp_path: Path) -> None:
    from lmms_eval.tasks.textcaps.utils import textcaps_cider

    from aimv2.evals.vlm.task_functions import cider

    rows = [{"pred": text, "answer": references, "image_id": n} for n, (text, references) in enumerate(CAPTIONS)]
    assert cider(rows) == pytest.approx(textcaps_cider(rows, SimpleNamespace(output_path=str(tmp_path))), rel=1e-9)


# ---- wrong use ----


refused = partial(tiny_llm.refused, api.vlm_score)


def test_wrong_use(place: Path, tmp_path: Path) -> None:
    vlm, own = place / "vlm", place / "own"
    assert "'gqa'" in refused("unknown", "--tasks", vlm, tasks="gqq")
    assert "'local_scenes'" in refused("unknown", "--tasks", vlm, tasks="local_scene", include=own)
    refused("not-found", "--include", vlm, tasks="gqa", include=tmp_path / "none")
    refused("mismatch", "VLM", place / "eyes", tasks="local_scenes", include=own)
    refused("conflict", "--data", vlm, tasks="gqa", data="scenes")
    refused("conflict", "--shots", vlm, data="scenes", shots="2")
    refused("conflict", "--max-tokens", vlm, tasks="gqa", max_tokens=3)
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "task.yaml").write_text(TASK.format(root=own, train=""))
    assert "training" in refused(
        "unsupported", "--shots", vlm, tasks="local_scenes", include=tmp_path / "untrained", shots="4"
    )
    (tmp_path / "untrained" / "task.yaml").write_text(TASK.format(root=tmp_path, train=""))
    assert "train.parquet" in refused("not-found", "--tasks", vlm, tasks="local_scenes", include=tmp_path / "untrained")


def test_java_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="aimv2_coco") as caught:
        check_ready("coco2014_cap_val", {"dataset_path": "parquet"})
    assert caught.value.code == "missing"
    check_ready("aimv2_coco", {"dataset_path": "parquet"})
    names = task_names("coco, mme,coco,pope", {"aimv2_coco", "aimv2_mme", "mme", "pope"})
    assert names == ["aimv2_coco", "aimv2_mme", "pope"], "ours before lmms-eval's of the same name"
    assert "lmms_eval" in sys.modules
