"""The page of samples: what it shows is what a run trains on, pixel for pixel, and it refuses what a run refuses."""

from __future__ import annotations

import base64
import io
import os
import re
import webbrowser
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aimv2 import api
from aimv2.batch import Batch, captions_of
from aimv2.cli import main
from aimv2.data.shards.format import write_shard
from aimv2.data.text.tokenizer import Tokenizer, train_tokenizer
from aimv2.report.browse.drawn import draw
from aimv2.report.browse.page import edge_path, histogram, rest_path
from aimv2.report.predictions import token_texts
from aimv2.train.loop import Trainer
from runs import TINY, scenes, train

ARTIFACTS = Path(__file__).parents[2] / "artifacts"
NATIVE = {
    "model.name": "aimv2-tiny-patch4-native",
    "model.min_patches": 4,
    "data.areas": "[4, 6]",
    "train.patch_budget": 256,
}
HOSTILE = '<script>document.title = "taken"</script> & a <b>red</b> "square"'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 captioned scenes in a, and 40 plain pictures in b, whose keys begin with plain."""
    folder = tmp_path_factory.mktemp("browse")
    scenes(folder / "a", 60)
    (folder / "b").mkdir()
    plain = [(f"plain{i}", {"png": picture((6 * i, 90, 30)), "txt": b"a plain picture"}) for i in range(40)]
    write_shard(folder / "b" / "train-000000.tar", plain)
    return folder


def picture(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "PNG")
    return file.getvalue()


def page_of(folder: Path, data: Any, count: int = 8, config: str | None = None, **more: Any) -> tuple[dict, str]:
    """What is returned and the page's text."""
    options = {**TINY, "data.train": str(data), **{key.replace("__", "."): value for key, value in more.items()}}
    result = api.data_browse(config, options, str(folder / "page.html"), count)
    return result, (folder / "page.html").read_text()


def cards(page: str) -> list[dict[str, Any]]:
    """Key, prefix, picture and words of each sample on a page."""
    out = []
    for part in page.split('<article class="sample"')[1:]:
        key, prefix = re.search(r'data-key="([^"]*)" data-prefix="(\d+)"', part).groups()  # type: ignore[union-attr]
        uri = re.search(r"data:image/png;base64,([^\"]+)", part)
        assert uri
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri[1]))))
        texts = re.findall(r'<span class="(\w+)" title="id (\d+)">([^<]*)</span>', part)
        out.append({"key": unescape(key), "prefix": int(prefix), "pixels": pixels, "tokens": texts})
    return out


# ---- what a run trains on ----


def trained_on(data: Any, run: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[Batch]:
    """The batches of a run's first step, as they reach the loop."""
    seen: list[Any] = []
    real = Trainer.train_step

    def noted(self: Trainer, batch: Any) -> None:
        seen.append(batch)
        real(self, batch)

    monkeypatch.setattr(Trainer, "train_step", noted)
    train(data, run, train__steps=1, optim__warmup=1, eval__samples=2, eval__captions=0, **more)
    first = seen[0]
    return first if isinstance(first, list) else [first]


@pytest.mark.parametrize(("workers", "count"), [(0, 8), (2, 4)])
def test_the_page_shows_the_first_batch_of_a_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, count: int
) -> None:
    mixture = f"[{{name: a, path: {data / 'a'}, weight: 3}}, {{name: b, path: {data / 'b'}}}]"
    more = {"data__workers": workers, "seed": 5, "data__flip": 0.5}
    (batch,) = trained_on(mixture, tmp_path / "run", monkeypatch, **more)
    result, page = page_of(tmp_path, mixture, count, **more)
    shown = cards(page)
    assert (len(shown), len(batch)) == (count, 8)
    each = 8 // max(workers, 1)  # a batch is a part of every worker, one behind the other
    share = count // max(workers, 1)
    rows = [worker * each + at for worker in range(max(workers, 1)) for at in range(share)]
    names = (data / "a" / "classes.txt").read_text().splitlines()
    labels = [int(batch.labels[row]) for row in rows]  # those of b have none
    assert re.findall(r"<span>class: ([^<]+)</span>", page) == [names[label] for label in labels if label >= 0]
    ends = batch.keys, batch.prefix_len.tolist(), batch.images.permute(0, 2, 3, 1).numpy(), captions_of(batch)
    for row, one in zip(rows, shown, strict=True):
        key, prefix, pixels, tokens = (part[row] for part in ends)
        assert (one["key"], one["prefix"]) == (key, prefix)
        assert np.array_equal(one["pixels"], pixels)
        assert [int(number) for _, number, _ in one["tokens"]] == tokens
    plain = sum(one["key"].startswith("plain") for one in shown)
    told = [(source["name"], source["weight"], source["wanted"], source["drawn"]) for source in result["sources"]]
    assert told == [("a", 3, 0.75, count - plain), ("b", 1, 0.25, plain)]
    labels = re.findall(r'data-key="([^"]*)" data-prefix="\d+" data-source="(\w)"', page)
    assert all(key.startswith("plain") == (name == "b") for key, name in labels) and len(labels) == count
    _, page = page_of(tmp_path, mixture, count, **{**more, "seed": 6})
    assert [one["key"] for one in cards(page)] != [one["key"] for one in shown]


@pytest.mark.parametrize("pack", [0, 2])
def test_images_of_their_own_size_are_laid_together_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: int
) -> None:
    folder = tmp_path / "wide"
    api.data_shapes(str(folder), count=40, size=24, largest=60, objects=2, questions=4)
    more = {**NATIVE, "data.pack": pack}
    asked = {key.replace(".", "__"): value for key, value in more.items()}
    batches = trained_on(folder, tmp_path / "run", monkeypatch, **asked)
    _, page = page_of(tmp_path, folder, 4, **asked)
    shown = cards(page)
    keys = [key for batch in batches for key in batch.keys]
    assert [one["key"] for one in shown] == keys[:4]
    assert [int(number) for _, number, _ in shown[0]["tokens"]] == captions_of(batches[0])[0]
    first = batches[0]
    assert first.places is not None and first.image_len is not None
    for at, (row, column) in enumerate(first.places[0, : int(first.image_len[0])].tolist()):
        patch = first.images[0, :, :, at * 4 : at * 4 + 4].permute(1, 2, 0).numpy()
        assert np.array_equal(shown[0]["pixels"][row * 4 : row * 4 + 4, column * 4 : column * 4 + 4], patch)
    assert len({one["pixels"].shape for one in shown}) > 1


def test_a_recipe_and_options_over_it(data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {max_tokens: 6}\nseed: 3\n")
    result, page = page_of(tmp_path, data / "a", 4, config=str(recipe), train__steps=50)
    assert result["caption_tokens"]["max"] == 6 and result["captions_cut"] == 4
    assert "4 of 4 fill data.max_tokens (6)" in page and "run with seed 3" in page
    assert result["learning_rate"][-1]["step"] == 49


def test_open_hands_the_page_to_the_browser(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "browser"
    script.write_text(f'#!/bin/sh\necho "$1" > {tmp_path / "opened"}\n')
    script.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{script} %s")
    monkeypatch.setattr(webbrowser, "_tryorder", None)  # $BROWSER is read once
    monkeypatch.chdir(tmp_path)
    words = [word for key, value in {**TINY, "data.train": data / "a"}.items() for word in (f"--{key}", str(value))]
    assert main(["data", "browse", *words, "--out", "page.html", "--count", "2", "--open"]) == 0
    assert (tmp_path / "opened").read_text().strip() == (tmp_path / "page.html").as_uri()
    assert re.search(r"^samples +2\s*$", capsys.readouterr().out, re.MULTILINE)


def test_nothing_is_left_behind(data: Path, tmp_path: Path) -> None:
    before = sorted(data.rglob("*"))
    page_of(tmp_path, data / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and sorted(data.rglob("*")) == before


# ---- the page ----


def test_the_prefix_is_drawn_patch_by_patch() -> None:
    for rows, columns in ((4, 4), (3, 5), (1, 6)):
        for prefix in range(1, rows * columns):
            covered = np.zeros((rows, columns), bool)
            for left, top, right, bottom in re.findall(r"M(\d+) (\d+)H(\d+)V(\d+)", rest_path(prefix, rows, columns)):
                covered[int(top) : int(bottom), int(left) : int(right)] = True
            wanted = np.arange(rows * columns).reshape(rows, columns) >= prefix
            assert np.array_equal(covered, wanted), (rows, columns, prefix)
    assert edge_path(6, 4, 4) == "M0 2H2V1H4" and edge_path(8, 4, 4) == "M0 2H4"


def test_words_are_the_tokens_one_by_one() -> None:
    tokenizer = train_tokenizer(["a red circle and a blue square", "naïve café 東京"] * 5, 300)
    for text in ("a red circle", "café 東京 squares", "unseen wörds"):
        ids = tokenizer.encode(text)
        pieces = token_texts(ids, tokenizer)
        assert len(pieces) == len(ids) and pieces[-1] == ""
        if text == "a red circle":
            assert "".join(pieces) == text
    assert ids_of(tokenizer, "red") == ["red"]


def ids_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return token_texts(tokenizer.encode(text)[:-1], tokenizer)


def test_lengths_fall_into_their_bars() -> None:
    assert histogram([]) == []
    bars = histogram([9, 9, 12])
    assert [(bar.label, bar.count) for bar in bars] == [("9", 2), ("10", 0), ("11", 0), ("12", 1)]
    wide = histogram(list(range(2, 79)))
    assert len(wide) <= 16 and sum(bar.count for bar in wide) == 77 and wide[0].label == "2–6"


def test_captions_and_keys_are_text_and_never_markup(tmp_path: Path) -> None:
    samples = [(f"k<i>{i}", {"png": picture(), "txt": HOSTILE.encode()}) for i in range(12)]
    (tmp_path / "odd <u>").mkdir()
    write_shard(tmp_path / "odd <u>" / "train-000000.tar", samples)
    _, page = page_of(tmp_path, tmp_path / "odd <u>", 4)
    assert not re.search(r"<(script|i>\d|u>|b>red)", page)
    assert cards(page)[0]["key"].startswith("k<i>")
    assert "http://" not in page and "https://" not in page, "self-contained"


# ---- mistakes ----


@pytest.mark.parametrize(
    "more",
    [
        {"data.train": "/nowhere/shards"},
        {"data.train": "{empty}"},
        {"data.train": "{photos}"},
        {"data.train": "{bare}"},
        {"train.batch_size": 1000},
        {"train.batch_size": 7, "data.workers": 2},
        {"train.stpes": 5},
        {"optim.lr": 0},
        {"model.image_size": 30},
        {"model.name": "aimv2-tiny-patch9-32"},
        {"data.tokenizer": "/nowhere/bpe"},
        {"init": "/nowhere/model"},
        {"objective.name": "contrastive"},
        {"train.patch_budget": 512},
        {"eval.probe": "true", "data.train": "{unlabelled}"},
        {"config": "/nowhere/recipe.yaml"},
    ],
    ids=lambda more: " ".join(more),
)
def test_mistakes_are_those_of_pretrain(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any]
) -> None:
    for name, parts in (("bare", {"png": picture()}), ("unlabelled", {"png": picture(), "txt": b"a word"})):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "train-000000.tar", [(f"k{i}", parts) for i in range(20)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(picture())
    given = {**TINY, "data.train": str(data / "a"), **more}
    words = [word.format_map(Folders(tmp_path)) for key, value in given.items() for word in (f"--{key}", str(value))]
    lines = []
    for verb in (["pretrain", "--run", str(tmp_path / "run")], ["data", "browse", "--out", str(tmp_path / "p.html")]):
        assert main([*verb, *words]) == 2
        out, err = capsys.readouterr()
        lines.append([line for line in err.splitlines() if line.startswith("error: ")])
        assert out == "" and len(lines[-1]) == 1
    assert lines[0] == lines[1]
    assert not (tmp_path / "p.html").exists()


class Folders(dict):
    """{name} is a folder below another."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __missing__(self, name: str) -> str:
        return str(self.root / name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "page.txt"], "--out page.txt: a file NAME.html"),
        (["--count", "0"], "--count 0: 1 to 1000"),
        (["--count", "many"], "--count many: a whole number"),
        (["--out"], "--out needs a value"),
        (["--cuont", "3"], "'--cuont'; did you mean '--count'"),
        (["--resume"], "--resume: `data browse` shows the start of a run"),
        (["--dry-run"], "dry-run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_of_its_own(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "browse", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_samples_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    good = [(f"good{i}", {"png": picture(), "txt": b"a word"}) for i in range(30)]
    bad = [(f"bad{i}", {"png": b"no image", "txt": b"a word"}) for i in range(10)]
    write_shard(tmp_path / "train-000000.tar", [*good, *bad])
    result, page = page_of(tmp_path, tmp_path, 24)
    assert result["unreadable"] and all("bad" in line for line in result["unreadable"])
    assert 'id="unreadable"' in page and unescape(page).count("train-000000.tar/bad") == len(result["unreadable"])
    found = draw(None, {**TINY, "data.train": str(tmp_path)}, 24, tmp_path / "scratch")
    assert [one.key for one in found.samples] == [one["key"] for one in cards(page)]


# ---- in a browser ----


def test_the_page_as_a_person_sees_it(data: Path, tmp_path: Path, browser: Any) -> None:
    mixture = f"[{{name: a, path: {data / 'a'}, weight: 3}}, {{name: b, path: {data / 'b'}}}]"
    _, text = page_of(tmp_path, mixture, 8)
    asked: list[str] = []
    light: dict[str, float] = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 375, "height": 800}, color_scheme=scheme)
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "page.html").as_uri())
        assert page.locator(".sample img").count() == 8
        assert page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth == 32)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, "no sideways scrolling on a telephone"
        light[scheme] = np.asarray(shot(page.screenshot())).mean()
        sight = page.locator(".sample .sight").nth(0)
        dimmed = np.asarray(shot(sight.screenshot())).astype(int)
        page.locator("#dim").click()
        clear = np.asarray(shot(sight.screenshot())).astype(int)
        changed = (np.abs(dimmed - clear).max(-1) > 8).mean()
        wanted = 1 - cards(text)[0]["prefix"] / 16
        assert changed == pytest.approx(wanted, abs=0.08), "what lies behind the prefix, and nothing else"
        page.locator("#dim").click()
        if os.environ.get("CI"):
            ARTIFACTS.mkdir(exist_ok=True)
            page.screenshot(path=ARTIFACTS / f"browse-{scheme}.png", full_page=True)
        page.close()
    assert light["light"] > 150 > 90 > light["dark"]
    assert all(url.startswith(("file:", "data:")) for url in asked)


def shot(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")
