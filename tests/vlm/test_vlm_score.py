"""``aimv2 vlm score``: answers are those of ``generate`` in transformers; what is counted, kept, shuffled and divided."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny_llm
from aimv2 import api
from aimv2.data.shards.format import write_shard
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.evals.vlm.answered import Answerer, AnswerStore, digests, shuffled
from aimv2.evals.vlm.questions import Document, figures_of, read_documents
from aimv2.evals.vlm.score import render_questions
from aimv2.vlm.answer import Picture, Question, answers, ends_of, generate, padded, question, tokenized
from aimv2.vlm.model import open_folder, open_vlm
from forked import forked
from tiny_llm import encoder, language_model, picture

LAYOUTS: dict[str, dict[str, Any]] = {"post": {}, "tiles": {"tiles": 2}, "native": {"image_size": 40}}
SHAPES = [(50, 20), (21, 64), (33, 33), (21, 64), (8, 9)]
TEXTS = ["What is this?", "a", "What is the small red square?", "is", "What"]
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each layout, ``eyes``, and shards ``scenes`` and ``others`` with questions."""
    root = tmp_path_factory.mktemp("score")
    encoder(root / "eyes")
    encoder(root / "eyes-native", native=True)
    language_model(root / "llm", tie_word_embeddings=True, max_position_embeddings=512)
    for name, options in LAYOUTS.items():
        api.vlm_build(root / ("eyes-native" if name == "native" else "eyes"), root / "llm", root / name, **options)
    api.data_shapes(root / "scenes", 12, size=32, objects=3, questions=4)
    api.data_shapes(root / "others", 6, size=32, objects=3, questions=4, seed=1)
    return root


def posed() -> list[Question]:
    """With an image each, without one, with two, and after an earlier answer."""
    torch.manual_seed(0)
    images = [Picture(picture(*shape)) for shape in SHAPES]
    found = [question(text, image) for text, image in zip(TEXTS, images)]
    talk = {"role": "user", "content": "<image>\na"}, {"role": "assistant", "content": "is"}
    found += [question("What is this?"), question("<image>\n<image>\na", images[0], images[2])]
    return [*found, Question((*talk, {"role": "user", "content": "<image>\nWhat"}), (images[1], images[3]))]


@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_are_those_of_generate(name: str, place: Path) -> None:
    ours, processor = open_vlm(place / name)
    model, _ = open_folder(place / name)
    questions = posed()
    if name == "native":
        del questions[-2:]  # images of different sizes in a row: ours only
    wanted = []
    for one in questions:
        contents = [one.images[:1] if len(one.messages) == 3 and turn == 0 else () for turn in range(len(one.messages))]
        contents[-1] = one.images[len(contents[0]) if len(contents) > 1 else 0 :]
        talk = [
            {
                "role": message["role"],
                "content": [
                    *({"type": "image", "image": image.open()} for image in images),
                    {"type": "text", "text": message["content"].replace("<image>\n", "")},
                ],
            }
            for message, images in zip(one.messages, contents)
        ]
        given = processor.apply_chat_template(
            [talk], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ends = ends_of(ours, processor).tolist()
        out = model.generate(**given, max_new_tokens=7, do_sample=False, eos_token_id=ends)
        out = [token for token in out[0, given["input_ids"].shape[1] :].tolist() if token not in ends]
        wanted.append(processor.tokenizer.decode(out, skip_special_tokens=True).strip())
    found = answers(ours, processor, questions, 7, 3)
    assert found == wanted and len(set(found)) > 3
    assert answers(ours, processor, questions[::-1], 7, 64) == wanted[::-1]


def test_an_answer_ends_with_its_turn(place: Path) -> None:
    ours, processor = open_vlm(place / "post")
    words = processor.tokenizer
    newline = words("\n", add_special_tokens=False)["input_ids"]
    assert set(ends_of(ours, processor).tolist()) == {words.eos_token_id, *newline}, (
        "the template ends a turn with a break"
    )
    ids, mask = padded(tokenized(processor, [question("What is this?"), question("a")]), torch.device("cpu"))
    none = torch.tensor([], dtype=torch.long)
    with torch.inference_mode():
        whole = generate(ours, ids, mask, [], none, 6)
        stop = next(token for token in whole[0][1:] if token != whole[0][0])
        found = generate(ours, ids, mask, [], torch.tensor([stop]), 6)
    assert [len(row) for row in whole] == [6, 6]
    assert found == [row[: row.index(stop)] if stop in row else row for row in whole] and len(found[0]) < 6


def test_places_of_images(place: Path) -> None:
    _, processor = open_vlm(place / "post")
    image = Picture(picture(9, 9))
    first = tokenized(processor, [question("<image>a", image), question("<image>\na", image), question("a", image)])
    assert first[0] == first[1] == first[2]
    assert processor.tokenizer.decode(first[0]) == "user: <image>\na\nassistant: "
    assert question("<image>\na", image).without_images() == question("a")
    with pytest.raises(UsageError, match="2 places of images for 1") as caught:
        tokenized(processor, [question("<image><image>", image)])
    assert caught.value.code == "mismatch"


def test_no_sample_keeps_its_image() -> None:
    one, two, three, four = (Picture(bytes([number])) for number in range(4))
    given = [(one,), (Picture(bytes([0])),), (two,), (), (three,), (two, four)]  # equal bytes are one image
    for seed in range(6):
        found = shuffled(given, seed)
        assert found[0] == found[1] and found[3] == () and found[5] == (two, four)
        assert {digests(found[at]) for at in (0, 2, 4)} == {digests((image,)) for image in (one, two, three)}
        assert all(digests(found[at]) != digests(given[at]) for at in (0, 1, 2, 4))
    assert len({tuple(map(digests, shuffled(given, seed))) for seed in range(9)}) == 2, "by the seed"


def test_figures_by_hand() -> None:
    rows = [("exists", "yes", "Yes."), ("exists", "no", "yes"), ("exists", "no", " no"), ("colour", "red", "red  ring")]
    rows += [("colour", "blue", "blue"), ("odd", "top  left", "TOP left")]
    documents = [Document("s", question("q"), answer, kind) for kind, answer, _ in rows]
    found = figures_of(documents, {"accuracy": [row[2] for row in rows], "text_only_accuracy": ["no"] * 6})
    assert (found["questions"], found["accuracy"], found["text_only_accuracy"]) == (6, 4 / 6, 2 / 6)
    kinds = found["kinds"]
    assert list(kinds) == ["colour", "exists", "odd"]
    assert [kinds[kind]["accuracy"] for kind in kinds] == [0.5, 2 / 3, 1.0]
    assert [kinds[kind]["majority_accuracy"] for kind in kinds] == [0.5, 2 / 3, 1.0]
    assert [kinds[kind]["chance"] for kind in kinds] == [0.5, 0.5, 1.0]
    assert found["majority_accuracy"] == pytest.approx(4 / 6) and found["chance"] == pytest.approx(3.5 / 6)
    low, high = found["accuracy_interval"]
    assert low < 4 / 6 < high


def test_a_result_and_its_second_start(place: Path, tmp_path: Path) -> None:
    sources, out = f"{place / 'scenes'},{place / 'others'}", tmp_path / "out"
    options = {"data": sources, "split": "train", "max_tokens": 3}
    first = api.vlm_score(place / "post", **options, out=out)
    assert json.loads((out / "result.json").read_text()) == first
    figures = first["figures"]
    assert (
        list(figures["sets"]) == ["scenes", "others"] and figures["accuracy"] == figures["sets"]["scenes"]["accuracy"]
    )
    assert first["data"]["questions"] == 48 and first["data"]["test_images"] == 12
    assert first["model"]["unchanged"] and len(first["model"]["weights_sha256"]) == 64
    documents = read_documents(str(place / "scenes"), "train").documents
    (file,) = (out / "answers").iterdir()
    kept = [json.loads(line) for line in file.read_text().splitlines() if line]
    changed = dict(kept[0]) | {f"{documents[0].question.digest()}-3": documents[0].answer}
    lines = [json.dumps(changed), *map(json.dumps, kept[1:-1]), json.dumps(kept[-1])[:-3]]  # as an interruption cuts it
    file.write_text("\n".join(lines))
    again = api.vlm_score(place / "post", **options, out=out)["figures"]
    assert again["accuracy"] == figures["accuracy"] + 1 / 48, "kept answers are read, not written again"
    assert again["sets"]["others"] == figures["sets"]["others"], "what was cut is answered anew"
    others = ({"max_tokens": 4}, {"data": str(place / "scenes")}, {"earlier_turns": False}, {"limit": 3})
    for other in others:
        refused("exists", "--out", place / "post", **{**options, **other}, out=out)
    refused("exists", "--out", place / "tiles", **options, out=out)
    assert json.loads((out / "result.json").read_text())["figures"] == again
    (out / "result.json").unlink()
    longer = api.vlm_score(place / "post", **{**options, "max_tokens": 4}, out=out)["figures"]
    assert longer["accuracy"] != again["accuracy"], "an answer of another length is another answer"


def test_two_processes_equal_one(place: Path, tmp_path: Path) -> None:
    words = [
        "vlm",
        "score",
        str(place / "post"),
        "--data",
        str(place / "scenes"),
        "--split",
        "train",
        "--max-tokens",
        "3",
    ]
    for ranks in (1, 2):
        ended = forked(*words, "--out", str(tmp_path / str(ranks)), ranks=ranks)
        assert ended.returncode == 0, ended.stderr
    one, two = (json.loads((tmp_path / name / "result.json").read_text())["figures"] for name in "12")
    assert one == two
    kept = sorted((tmp_path / "2" / "answers").iterdir())
    sizes = [sum(len(json.loads(line)) for line in file.read_text().splitlines() if line) for file in kept]
    assert len(kept) == 2 and max(sizes) - min(sizes) <= 3


def test_the_store_knows_what_decides(tmp_path: Path) -> None:
    AnswerStore(tmp_path, weights="a").add({"x": "1"})
    AnswerStore(tmp_path, 1, weights="a").add({"y": "2"})
    assert AnswerStore(tmp_path, weights="a").read() == {"x": "1", "y": "2"}
    assert AnswerStore(tmp_path, weights="b").read() == {} == AnswerStore(None, weights="a").read()


def test_equal_questions_are_answered_once(place: Path, tmp_path: Path) -> None:
    model, processor = open_vlm(place / "post")
    store = AnswerStore(tmp_path, weights="a")
    answerer = Answerer(model, processor, store, ALONE, 4, 8)
    image = picture(9, 9)
    twice = [question("a", image), question("a", image.copy()), question("a")]
    found = answerer(twice)
    assert found[0] == found[1] and len(store.read()) == 2
    changed = dataclasses.replace(answerer, store=AnswerStore(tmp_path, weights="b"))
    assert changed(twice) == found


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (9, 9), (shade, 0, 0)).save(out, "png")
    return out.getvalue()


def talk(*texts: str, images: int = 1, shade: int = 0, system: bool = False) -> dict[str, bytes]:
    """The parts of a sample: questions and answers in turn, after a system prompt where it has one."""
    names = ("system", *("human", "gpt") * len(texts))[not system :]
    about = {"conversations": [{"from": who, "value": text} for who, text in zip(names, texts)]}
    found = {f"{number}.png" if number else "png": png(shade + number) for number in range(images)}
    return {"json": json.dumps(about).encode(), **found}


def test_conversations_are_questions_too(tmp_path: Path) -> None:
    turns = ("Be brief.", "<image>\nOne?", "1", "Two?", "2", "<image>\nThree?", "3")
    parts = talk(*turns, images=2, system=True)
    broken = {**parts, "png": b"none"}
    write_shard(tmp_path / "val-0.tar", [("a", parts), ("b", broken), ("c", {"json": b"{}", "png": parts["png"]})])
    found = read_documents(str(tmp_path))
    assert [one.answer for one in found.documents] == ["1", "2", "3"]
    for number, one in enumerate(found.documents):
        assert [message["content"] for message in one.question.messages] == list(turns[: 2 * number + 2])
        assert digests(one.question.images) == digests([Picture(png(shade)) for shade in range((1, 1, 2)[number])])
    assert found.unreadable == 1 and sum(found.bad.values()) == 1
    single = read_documents(str(tmp_path), earlier_turns=False).documents
    asked = ["<image>\nOne?", "<image>\nTwo?", "<image>\nThree?"]
    assert [one.question.messages[-1]["content"] for one in single] == asked
    assert [one.question.images[0].digest == Picture(png(0)).digest for one in single] == [True, True, False]
    assert all(len(one.question.messages) == 2 and len(one.question.images) == 1 for one in single)
    assert all(one.question.messages[0] == {"role": "system", "content": "Be brief."} for one in single)


def test_questions_of_scenes_come_as_in_training(place: Path) -> None:
    from aimv2.data.shards.format import json_of, read_samples

    (tar,) = (place / "scenes").glob("train-*.tar")
    wanted = [
        [turn["value"] for turn in json_of(parts)["conversations"]] for _, parts in read_samples(tar)
    ]  # what the objective `instruct` reads
    documents = iter(read_documents(str(place / "scenes"), "train").documents)
    for turns in wanted:
        pictures = set()
        for at in range(0, len(turns), 2):
            one = next(documents)
            assert [message["content"] for message in one.question.messages] == turns[: at + 1]
            assert one.answer == turns[at + 1]
            pictures |= {id(image) for image in one.question.images}
        assert len(pictures) == 1, "encoded once for all questions"
    single = read_documents(str(place / "scenes"), "train", earlier_turns=False).documents
    assert all(len(one.question.messages) == 1 == len(one.question.images) for one in single)


def test_what_is_too_long_is_wrong_and_what_is_kept_is_counted(place: Path, tmp_path: Path) -> None:
    rows = [(str(shade), talk(f"<image>\nq{shade}", "a", shade=shade)) for shade in range(3)]
    rows += [
        ("long", talk("<image>\n" + "q" * 600, "a")),
        ("two", talk("<image>\none", "a", "<image>\nmore", "b", images=2)),
    ]
    (tmp_path / "mixed").mkdir()
    write_shard(tmp_path / "mixed" / "val-0.tar", rows)
    result = api.vlm_score(place / "post", data=str(tmp_path / "mixed"), max_tokens=3)
    figures = result["figures"]
    assert (figures["questions"], figures["too_long"], figures["kept_images"]) == (6, 1, 1)
    assert result["protocol"]["before_a_question"]
    text = render_questions(result)
    assert "1 of 6" in text and "kept: 1" in text
    single = api.vlm_score(
        place / "post", data=str(tmp_path / "mixed"), max_tokens=3, earlier_turns=False, controls=False
    )
    assert single["protocol"]["before_a_question"] is None and single["protocol"]["name"] != result["protocol"]["name"]


# ---- wrong use ----


refused = partial(tiny_llm.refused, api.vlm_score)


def test_wrong_use(place: Path, tmp_path: Path) -> None:
    scenes = str(place / "scenes")
    refused("missing", "--data", place / "post")
    refused("mismatch", "VLM", place / "eyes", data=scenes, split="train")
    refused("mismatch", "VLM", place / "llm", data=scenes, split="train")
    refused("not-found", "--data", place / "post", data=str(tmp_path / "none"))
    shutil.copytree(place / "scenes", tmp_path / "train-only", ignore=shutil.ignore_patterns("val-*"))
    refused("missing", "--data", place / "post", data=str(tmp_path / "train-only"))
    api.data_shapes(tmp_path / "captions", 4, size=32)
    assert "--questions" in refused("missing", "--data", place / "post", data=str(tmp_path / "captions"))
    text = refused("limit", "--max-tokens", place / "post", data=scenes, split="train", max_tokens=500)
    assert "16 of them of images" in text and "512" in text
