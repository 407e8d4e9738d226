"""Conversations that people bring, and what `data import --conversations` makes of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from brought import picture, put, run

from aimv2.data.images.text_tables import read_json_list
from aimv2.data.shards.check import check_data, render_check
from aimv2.data.shards.format import read_samples, write_shard
from aimv2.data.text.conversations import read_conversation
from aimv2.errors import UsageError


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


GOOD: list[dict[str, Any]] = [
    {"id": "one", "image": "a/0.jpg", "conversations": turns("<image>\nWhat?", "a ring"), "weight": 2},
    {"id": "again", "image": "a/0.jpg", "conversations": turns("Where?\n<image>", "left", "Sure?", "yes")},
    {"id": "two", "image": ["a/0.jpg", "1.png"], "conversations": turns("<image>\n<image>\nSame?", "no")},
    {"id": "text", "conversations": turns("Hello?", "Hello.")},
    {"id": "chat", "images": ["1.png"], "messages": chat("No token?", "none")},
]
BAD_ROWS: dict[str, Any] = {
    "image-missing": {"image": "none.jpg", "conversations": turns("<image>", "x")},
    "image-unreadable": {"image": "broken.jpg", "conversations": turns("<image>", "x")},
    "token-without-image": {"id": "t", "conversations": turns("<image>", "x")},
    "two-tokens": {"image": "1.png", "conversations": turns("<image><image>", "x")},
    "image-without-token": {"image": ["1.png", "1.png"], "conversations": turns("<image>", "x")},
    "no-answer": {"image": "1.png", "conversations": turns("<image>")},
    "roles": {"image": "1.png", "conversations": turns("<image>", "x")[::-1]},
    "not-text": {"image": "1.png", "conversations": [7]},
    "empty": {"image": "1.png", "caption": "no turns"},
    "not-json": "a text",
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    put(tmp_path / "images" / "a" / "0.jpg", picture(1))
    put(tmp_path / "images" / "1.png", picture(2, format="PNG"))
    put(tmp_path / "images" / "broken.jpg", b"no image")
    return tmp_path / "images"


def talks(out: Path, split: str = "train") -> dict[str, tuple[dict[str, Any], list[bytes]]]:
    """{key: (KEY.json, images)} of a split; every sample is a conversation that training can read."""
    found = {}
    for tar in sorted(out.glob(f"{split}-*.tar")):
        for key, parts in read_samples(tar):
            _, own = read_conversation(parts)
            found[key] = json.loads(parts["json"]), own
    return found


def listed(path: Path, rows: list[Any], form: str = ".json") -> Path:
    text = json.dumps(rows, indent=1) if form == ".json" else "\n".join(map(json.dumps, rows))
    return put(path.with_suffix(form), text)


@pytest.mark.parametrize("form", [".json", ".jsonl"])
def test_rows_of_json(form: str, images: Path, tmp_path: Path) -> None:
    file = listed(tmp_path / "rows" / "llava", GOOD, form)
    result = run(file, tmp_path / "out", image_root=str(images), conversations=True)
    assert (result["train"], result["rejected"], result["bad"]) == (5, 0, {})
    found = talks(tmp_path / "out")
    assert list(found) == ["a_0", "a_0-2", "a_0-3", "text", "1"]
    jpeg, png = (images / name for name in ("a/0.jpg", "1.png"))
    assert [[jpeg.read_bytes()], [jpeg.read_bytes(), png.read_bytes()], []] == [
        found[key][1] for key in ("a_0", "a_0-3", "text")
    ]
    for row, (about, _) in zip(GOOD[:4], found.values()):
        assert about["conversations"] == row["conversations"]
    assert found["1"][0]["conversations"] == turns("<image>\nNo token?", "none")
    assert {key: found["a_0"][0][key] for key in ("id", "weight", "source")} == {
        "id": "one",
        "weight": 2,
        "source": "a/0.jpg",
    }
    assert found["a_0-3"][0]["source"] == ["a/0.jpg", "1.png"] and "captions" not in found["text"][0]


def test_bad_rows_are_counted_and_named(images: Path, tmp_path: Path) -> None:
    file = listed(tmp_path / "llava", [*GOOD, *BAD_ROWS.values()])
    result = run(file, tmp_path / "out", image_root=str(images), conversations=True)
    assert (result["train"], result["rejected"]) == (5, len(BAD_ROWS))
    assert {kind: about["number"] for kind, about in result["bad"].items()} == dict.fromkeys(BAD_ROWS, 1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {*BAD_ROWS} and all(line["reason"] for line in lines)
    assert result["bad"]["image-missing"]["examples"] == ["none.jpg (entry 6)"]
    assert result["bad"]["image-unreadable"]["examples"] == ["broken.jpg (entry 7)"]
    assert result["bad"]["token-without-image"]["examples"] == ["llava.json entry 8 (id t)"]
    rows = {line["kind"]: (line["image"], line.get("row")) for line in lines}
    assert (rows["image-missing"], rows["token-without-image"]) == (
        ("none.jpg", "entry 6"),
        ("llava.json entry 8", "id t"),
    )


def test_rows_of_one_image_are_of_one_split(tmp_path: Path) -> None:
    rows = []
    for number in range(20):
        put(tmp_path / f"{number}.jpg", picture(number))
        rows += [{"image": f"{number}.jpg", "conversations": turns("<image>\nWhat?", str(again))} for again in range(2)]
    file = listed(tmp_path / "llava", rows)
    run(file, tmp_path / "out", val_fraction=0.3, conversations=True)
    sources = [{about["source"] for about, _ in talks(tmp_path / "out", split).values()} for split in ("train", "val")]
    assert all(sources) and not sources[0] & sources[1]
    run(file, tmp_path / "list", val_list=str(put(tmp_path / "val.txt", "3.jpg\n")), conversations=True)
    assert list(talks(tmp_path / "list", "val")) == ["3", "3-2"]
    stated = listed(
        tmp_path / "stated", [{**row, "split": "val" if at < 4 else "train"} for at, row in enumerate(rows)]
    )
    assert run(stated, tmp_path / "stated-out", conversations=True)["val"] == 4


def test_it_resumes_and_has_the_same_bytes_in_processes(images: Path, tmp_path: Path) -> None:
    file = listed(images / "llava", GOOD * 2)
    options = {"conversations": True, "shard_size": 3}
    run(images, tmp_path / "one", **options)
    run(file, tmp_path / "several", workers=2, **options)
    shards = [sorted((tmp_path / out).glob("*.tar")) for out in ("one", "several")]
    assert len(shards[0]) == 4 and [one.read_bytes() for one in shards[0]] == [one.read_bytes() for one in shards[1]]
    with pytest.raises(UsageError) as caught:
        run(file, tmp_path / "one", **options)
    assert caught.value.code == "exists"


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_rows_of_tables(name: str, images: Path, tmp_path: Path) -> None:
    say = chat if name == "messages" else turns
    rows = {
        name: [say("<image>\nWhat?", "x"), say("Hello?", "y"), say("<image>\n<image>", "z"), say("<image>", "bad")],
        "images": [
            [{"bytes": picture(1), "path": None}],
            [],
            [{"bytes": picture(n), "path": None} for n in (1, 2)],
            None,
        ],
        "score": [1, 2, 3, 4],
    }
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "table" / "train-0.parquet")
    result = run(tmp_path / "table", tmp_path / "out", conversations=True)
    assert (result["train"], result["rejected"], {*result["bad"]}) == (3, 1, {"token-without-image"})
    assert [len(own) for _, own in talks(tmp_path / "out").values()] == [1, 0, 2]
    assert result["passed_over"]["columns that are not read"]["examples"] == ["score"]


def test_parts_and_one_image_column_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    content = [{"type": "text", "text": "What?\n"}, {"type": "image", "text": None}]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
    from PIL import Image

    pictures = [[Image.new("RGB", (20, 20), colour)] for colour in ("red", "blue")]
    features = datasets.Features(
        messages=[
            {
                "role": datasets.Value("string"),
                "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
            }
        ],
        images=datasets.List(datasets.Image()),
    )
    made = datasets.Dataset.from_dict({"messages": [said] * 2, "images": pictures}, features=features)
    made.save_to_disk(tmp_path / "saved")
    run(tmp_path / "saved", tmp_path / "out", conversations=True)
    found = talks(tmp_path / "out")
    assert [about["conversations"][0]["value"] for about, _ in found.values()] == ["What?\n<image>\n"] * 2
    assert len({own[0] for _, own in found.values()}) == 2


def test_tars_of_others(tmp_path: Path) -> None:
    about = {"messages": chat("<image> and <image>?", "x"), "image": ["p.jpg", "q.jpg"], "url": "u"}
    samples = [
        ("a", {"0.jpg": picture(1), "1.jpg": picture(2), "json": json.dumps(about).encode()}),
        (
            "b",
            {
                "jpg": picture(3),
                "txt": b"a caption",
                "json": json.dumps({"conversations": turns("What?", "y")}).encode(),
            },
        ),
        ("c", {"jpg": picture(3), "txt": b"a caption"}),
    ]
    write_shard(tmp_path / "in.tar", samples)
    result = run(tmp_path / "in.tar", tmp_path / "out", conversations=True)
    assert (result["train"], {*result["bad"]}) == (2, {"empty"})
    found = talks(tmp_path / "out")
    assert found["a"][1] == [picture(1), picture(2)] and found["a"][0]["url"] == "u"
    assert found["b"][0]["captions"] == {"caption": ["a caption"]}
    again = run(tmp_path / "out" / "train-000000.tar", tmp_path / "again", conversations=True)
    assert again["train"] == 2 and talks(tmp_path / "again") == found | {"a": found["a"], "b": found["b"]}


def test_captions_are_the_default_and_name_the_option(images: Path, tmp_path: Path) -> None:
    listed(images / "llava", GOOD[:1])
    result = run(images, tmp_path / "out")
    assert any("--conversations true" in kind for kind in result["passed_over"])
    ((_, parts),) = read_samples(tmp_path / "out" / "train-000000.tar")
    assert parts["txt"] == b"a ring" and "conversations" not in json.loads(parts["json"])
    write_shard(tmp_path / "in.tar", [("a", {"jpg": picture(1), "json": json.dumps(GOOD[0]).encode()})])
    with pytest.raises(UsageError, match="--conversations true"):
        run(tmp_path / "in.tar", tmp_path / "of-tar")


# ---- wrong use ----


def refused(code: str, option: str, source: Path, out: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        run(source, out, conversations=True, **options)
    assert (caught.value.code, caught.value.option) == (code, option), caught.value
    assert not list(out.glob("*.tar"))
    return str(caught.value)


def test_no_conversations_there(images: Path, tmp_path: Path) -> None:
    out, captions = tmp_path / "out", [{"image": "1.png", "caption": "x"}]
    refused("mismatch", "SOURCE", listed(images / "captions", captions), out)
    refused("mismatch", "SOURCE", listed(images / "lines", captions, ".jsonl"), out)
    assert str(images) in refused("missing", "SOURCE", images, out)
    refused("mismatch", "SOURCE", put(images / "captions.csv", "image,caption\n1.png,x\n"), out)
    pq.write_table(pa.table({"image": [picture(1)], "caption": ["x"]}), tmp_path / "t.parquet")
    refused("missing", "SOURCE", tmp_path / "t.parquet", out)
    assert "nowhere" in refused("not-found", "SOURCE", tmp_path / "nowhere", out)
    assert not out.exists(), "nothing is left of them"
    for text, code in (('[{"conversations": []}, {"conver', "unreadable"), ("[1 2]", "unreadable"), ("{1", "mismatch")):
        file = put(tmp_path / "broken.json", text)
        refused(code, "" if code == "unreadable" else "SOURCE", file, out)


def test_images_that_are_nowhere(images: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", listed(tmp_path / "rows" / "llava", GOOD)
    assert "a/0.jpg" in refused("not-found", "--image-root", file, out)
    refused("not-found", "--image-root", file, out, image_root=str(tmp_path / "nowhere"))
    refused("not-found", "--image-root", file, out, image_root=str(tmp_path / "rows"))
    absolute = listed(tmp_path / "absolute", [{"image": str(images / "1.png"), "conversations": turns("<image>", "x")}])
    refused("missing", "--image-root", absolute.rename(tmp_path / "rows" / "absolute.json"), out)
    assert run(tmp_path / "rows" / "absolute.json", out, image_root=str(images), conversations=True)["train"] == 1


def test_nothing_left(images: Path, tmp_path: Path) -> None:
    file = listed(images / "llava", [row for row in BAD_ROWS.values() if row != "a text"])
    assert "rejected" in refused("invalid", "SOURCE", file, tmp_path / "out")


def test_options_that_have_no_use(images: Path, tmp_path: Path) -> None:
    file, out = listed(images / "llava", GOOD), tmp_path / "out"
    listed(images / "more", GOOD)
    assert "--captions" in refused("conflict", "SOURCE", images, out)
    assert run(images, tmp_path / "chosen", captions="more.json", conversations=True)["train"] == 5
    refused("not-found", "--captions", images, out, captions="none.json")
    refused("conflict", "--captions", file, out, captions="more.json")
    for name, value in (("caption_column", "x"), ("template", "a {}"), ("class_folders", True), ("no_captions", True)):
        refused("conflict", f"--{name.replace('_', '-')}", file, out, **{name: value})


def test_a_json_list_is_read_an_entry_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aimv2.data.images.text_tables.CHUNK", 7)
    rows = [{"text": 'a "quoted" ] , é' * n, "n": [n, {"x": None}]} for n in range(20)]
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), "\n [ ]\n", "[1,23 , 456]"):
        file = put(tmp_path / "list.json", text)
        assert [value for _, value in read_json_list(file)] == json.loads(text)
    for text in (json.dumps(rows)[:-1], json.dumps(rows)[:-9], "", "{}", "[1 2]", "[1,,2]"):
        with pytest.raises(UsageError) as caught:
            list(read_json_list(put(tmp_path / "list.json", text)))
        assert caught.value.code == "unreadable"


# ---- check ----


def test_check_counts_conversations_and_what_is_bad(images: Path, tmp_path: Path) -> None:
    from rich.console import Console

    run(listed(tmp_path / "llava", GOOD), tmp_path / "out", image_root=str(images), conversations=True)
    result = check_data(tmp_path / "out")
    talks = result["conversations"]
    assert (talks["number"], talks["text_only"], talks["bad"]) == (5, 1, {})
    assert (talks["answers"]["max"], talks["images"]["max"], talks["images"]["min"]) == (2, 2, 0)
    assert (result["unreadable"]["number"], result["captions"]["missing"]["number"]) == (0, 0)
    assert result["passed_over"] == {} and talks["length"]["min"] == 2
    bad = [
        ("good", GOOD[0], {"jpg": picture(1)}),
        ("lost", GOOD[2], {"jpg": picture(1)}),
        ("odd", GOOD[0], {"jpg": b"no"}),
    ]
    bad += [
        (code, row, {"png": picture(2)})
        for code, row in BAD_ROWS.items()
        if code in ("two-tokens", "roles", "no-answer")
    ]
    samples = [(key, {**own, "json": json.dumps(row).encode()}) for key, row, own in bad]
    write_shard(tmp_path / "bad.tar", samples)
    result = check_data(tmp_path / "bad.tar")
    assert result["conversations"]["number"] == 1
    assert {kind: about["number"] for kind, about in result["conversations"]["bad"].items()} == dict.fromkeys(
        ("image-missing", "image-unreadable", "two-tokens", "roles", "no-answer"), 1
    )
    assert "bad.tar/lost: 2 images named, 1 there" in result["conversations"]["bad"]["image-missing"]["examples"]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_check(result))
    assert "more <image> than images: 1 (bad.tar/two-tokens" in console.export_text()


def test_further_images_of_a_caption_are_passed_over(tmp_path: Path) -> None:
    write_shard(tmp_path / "in.tar", [("a", {"jpg": picture(1), "1.jpg": picture(2), "txt": b"x"})])
    assert [about["number"] for about in check_data(tmp_path / "in.tar")["passed_over"].values()] == [1]
