"""Scores of captions against hand counts, our tokeniser against Stanford's, and the verb on a model that was trained."""

import csv
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aimv2 import api
from aimv2.cli import main
from aimv2.data.images.captioned import open_captioned, read_captioned
from aimv2.data.shards.format import write_shard
from aimv2.errors import UsageError
from aimv2.evals import ptb
from aimv2.evals.caption_score import score
from aimv2.evals.result import read_result
from aimv2.features.fingerprint import weights_hash
from aimv2.models.aimv2 import AIMv2
from runs import scenes, train

FLICKR = Path(__file__).parents[3] / "shared" / "data" / "flickr8k-1k"
without_java = shutil.which("java") is None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scored") / "scenes", 60)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    train(data, folder, train__steps=1, optim__warmup=1)
    return folder


# ---- scores ----


def test_bleu_counted_by_hand() -> None:
    """Papineni's example: `the` seven times is right twice; and a short caption pays for its length."""
    written = ["the the the the the the the", "a dog"]
    references = [["the cat is on the mat", "there is a cat on the mat"], ["a brown dog runs"]]
    found = score(written, references)
    right, words = 2 + 2, 7 + 2
    length = 7 + 4  # the closest references have 7 and 4 words
    assert found["bleu1"] == pytest.approx(right / words * math.exp(1 - length / words), rel=1e-6)
    assert found["exact_match"] == 0 and found["exact_match_interval"][0] == 0


def test_cider_of_identical_captions() -> None:
    """Four n-gram lengths of cosine 1 each; n-grams of every image weigh nothing, and lengths without one give 0."""
    same = ["a red ball on wet grass", "two dogs run along some beach", "an old man sits near water"]
    found = score(same, [[text] for text in same])
    assert found["cider"] == pytest.approx(10) and found["cider_by_image"] == pytest.approx([10, 10, 10])
    assert found["bleu4"] == pytest.approx(1, abs=1e-6) and found["exact_match"] == 1
    short = score(["red ball", "blue cube"], [["red ball"], ["blue cube"]])
    assert short["cider"] == pytest.approx(10 * 2 / 4), "no 3-gram and no 4-gram there"
    crossed = score(["red ball", "blue cube"], [["blue cube"], ["red ball"]])
    assert crossed["cider"] == 0 and crossed["bleu1"] == pytest.approx(0, abs=1e-6)
    two = score(["red ball", "blue cube"], [["red ball", "green cone"], ["blue cube"]])
    assert two["cider_by_image"] == pytest.approx([2.5, 5]), "the mean over an image's references"


def test_exact_match_is_of_words() -> None:
    written = ["a man's dog", "a cat", "two birds"]
    found = score(written, [["A man ' s dog .", "A man's dog!"], ["the cat", "a cat ."], ["two bird"]])
    assert found["exact_match"] == pytest.approx(2 / 3)
    low, high = found["exact_match_interval"]
    assert 0 < low < 2 / 3 < high < 1


def test_what_cannot_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="CIDEr needs two or more"):
        score(["a dog"], [["a dog"]])
    with pytest.raises(UsageError, match="no word in any of the references"):
        score(["a dog", "a cat"], [["."], ["!"]])
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(UsageError, match=r"needs the package pycocoevalcap: pip install 'aimv2\[caption\]'"):
        score(["a dog", "a cat"], [["a dog"], ["a cat"]])


# ---- words ----


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog's ball , isn't it ?", "a dog 's ball is n't it"),
        ("They cannot; he's gonna.", "they can not he 's gon na"),
        ("Mr. Smith (left) pays $5.50 at 10:30 p.m.", "mr. smith -lrb- left -rrb- pays $ 5.50 at 10:30 p.m."),
        ("snow-covered, black/white — 50% of AT&T!!", "snow-covered black/white 50 % of at&t !!"),
        ("“rock 'n' roll” o'clock y'all …", "rock 'n' roll o'clock y' all"),
        ("", ""),
    ],
)
def test_words_by_hand(caption: str, words: str) -> None:
    assert ptb.ptb_tokens(caption) == words.split()


@pytest.mark.skipif(without_java, reason="no Java here: Stanford's tokeniser can't be asked")
@pytest.mark.skipif(not FLICKR.is_dir(), reason="Flickr8k's captions are not beside this repository")
def test_our_words_are_stanfords() -> None:
    with open(FLICKR / "all-captions-8k.txt", newline="") as file:
        captions = [row["caption"] for row in csv.DictReader(file)][::8]
    captions += ["Don't  they've\ncan't y'all's U.S. No. 5 [x] {y} <b>z</b> a&b", "café «ñ» 3,000 1/2-inch 5'6\" '80s"]
    theirs = ptb.java_tokens(captions)
    assert theirs is not None and len(captions) > 5000
    assert [(c, j) for c, j in zip(captions, theirs) if ptb.ptb_tokens(c) != j] == []


@pytest.mark.skipif(without_java, reason="no Java here: Stanford's tokeniser can't be asked")
def test_the_tokeniser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (["a man's red dog", "a cat"], [["a man 's red dog"], ["the cat"]])
    by_java = score(*pair)
    assert by_java.pop("tokenizer") == ptb.JAVA and "Java" in ptb.JAVA
    monkeypatch.setattr(ptb.shutil, "which", lambda name: None)
    ours = score(*pair)
    assert ours.pop("tokenizer") == ptb.OURS
    assert ours == by_java


def pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (40, 30), (40 * number, 30, 30)).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


# ---- the verb ----


def test_verb(data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["caption", str(run), "--score", "--data", str(data), "--out", str(tmp_path / "out"), "--max-tokens", "5"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "CIDEr" in printed and max(map(len, printed.splitlines())) <= 80
    result = read_result(tmp_path / "out")
    assert result["verb"] == "caption" and result["data"]["test_images"] == 24 and result["data"]["split"] == "val"
    model = api.load_model(run, decoder=True)
    assert result["model"]["weights_sha256"] == weights_hash(model) and result["model"]["kind"] == "ours"
    assert result["model"]["unchanged"] is True
    assert result["protocol"]["tokenizer"] in (ptb.JAVA, ptb.OURS) and result["protocol"]["decoding"] == "greedy"
    alone = [(item.image, list(read_captioned(item)[1])) for item in open_captioned(str(data))[0]]
    assert [(row["image"], row["references"]) for row in result["figures"]["captions"]] == alone[:10]
    assert all(0 <= result["figures"][f"bleu{n}"] <= 1 for n in range(1, 5))
    again = api.caption(str(run), [], data=str(data), score=True, limit=5, max_tokens=5, beams=2)
    assert again["data"]["test_images"] == 5 and again["protocol"]["decoding"] == "beam search, 2 beams"
    assert "captions" in api.compare([str(tmp_path / "out")])["text"]


def test_weights_that_change_meanwhile_are_noticed(
    data: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = AIMv2.caption

    def spoils(self: AIMv2, *args: Any, **more: Any) -> list[str]:
        written = real(self, *args, **more)
        self.encoder.norm.weight.data[0] += 1
        return written

    monkeypatch.setattr(AIMv2, "caption", spoils)
    with pytest.raises(RuntimeError, match="weights changed"):
        api.caption(str(run), [], data=str(data), score=True, limit=2, max_tokens=3, out=str(tmp_path / "out"))
    assert not (tmp_path / "out" / "result.json").exists()


def test_figures_are_those_of_the_captions(run: Path, tmp_path: Path) -> None:
    """Captions written by ``aimv2 caption`` are references here: everything matches."""
    names = pictures(tmp_path / "images", 3)
    written = api.caption(str(run), [str(tmp_path / "images")], max_tokens=6)["captions"]
    with open(tmp_path / "captions.txt", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        rows.writerows([[name, row["caption"] or "-"] for name, row in zip(names, written)])
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    figures = api.caption(str(run), [], data=str(tmp_path), score=True, max_tokens=6)["figures"]
    assert figures["exact_match"] == 1 and figures["unreadable"] == 1


def test_wrong_use(data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    pictures(bare / "a", 1)
    no_captions = tmp_path / "shards"
    no_captions.mkdir()
    write_shard(no_captions / "val-000000.tar", [("x", {"png": (bare / "a" / "0.png").read_bytes()})])
    encoder, mute = tmp_path / "encoder", tmp_path / "mute"
    api.convert(str(run), str(encoder), to="released")
    api.convert(str(run), str(mute), to="safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mute / name).unlink()
    scored: list[Any] = ["--score", "--data", data]
    for words, said in (
        ([run, "--score"], "--score: needs --data D"),
        ([run, bare, *scored], "--score reads the images of --data"),
        ([run, "--data", data], "--data: belongs to --score"),
        ([run, bare, "--limit", 3], "--limit: belongs to --score"),
        ([run, *scored, "--limit", -1], "--limit -1"),
        ([run, "--score", "--data", tmp_path / "none"], "no such file or folder"),
        ([run, "--score", "--data", bare], "class folders without captions"),
        ([run, "--score", "--data", bare / "a"], "captions missing"),
        ([run, "--score", "--data", no_captions], "no captions in the data"),
        ([encoder, *scored], "only an encoder, without a decoder"),
        ([mute, *scored], "no tokenizer with its weights"),
        ([run, *scored, "--max-tokens", 0], "max_tokens"),
        ([run], "IMAGES: at least one image"),
    ):
        assert main(["caption", *map(str, words)]) == 2, words
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err, err
