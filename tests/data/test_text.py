"""Captions to ids and back: end of text always last, nothing lost, specials never read from captions."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from aimv2.data.text import tokenizer as text_module
from aimv2.data.text.captions import read_captions
from aimv2.data.text.tokenizer import (
    Tokenizer,
    clean_text,
    load_tokenizer,
    train_tokenizer,
)
from aimv2.errors import UsageError

CAPTIONS = [
    "A large red circle at the top left",
    "a small blue square at the bottom right",
    "a large blue circle and a small red square",
    "grayscale photo of the tower",
] * 2
TRAINED = train_tokenizer(CAPTIONS, 600)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  A\tRed \n circle  ", "a red circle"),
        ("Tom &amp;amp; Jerry", "tom & jerry"),
        ("&lt;b&gt;Bold&nbsp;&#39;x&#39;", "<b>bold 'x'"),
        ("donâ€™t", "don't"),
        ("CAFÉ cafÃ©", "café café"),
        ("", ""),
        ("\u3000 \xa0", ""),
        ("\ud800broken", "\ufffdbroken"),
        (f"a &#{'9' * 5000}; b", "a \ufffd b"),
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw) == clean


def siglip_like(path: Path) -> Path:
    """A unigram tokenizer whose pad is its end of text, id 1, as a transformers folder."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    specials = ["<unused>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=specials, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CAPTIONS, trainer)
    backend.enable_padding(pad_id=1, pad_token="</s>", length=64)
    backend.enable_truncation(8)
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    config = {"eos_token": {"content": "</s>"}, "pad_token": "</s>", "tokenizer_class": "SiglipTokenizer"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def clip_like(path: Path) -> Path:
    """A BPE with word ends, begin- and end-of-text ids added by its post-processor, as one tokenizer.json."""
    backend = Backend(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(CAPTIONS, trainer)
    backend.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", 1), ("<|startoftext|>", 0), trim_offsets=False, add_prefix_space=False
    )
    backend.save(str(path))
    return path


def bytes_like(path: Path) -> Path:
    """A transformers tokenizer written in Python: no tokenizer.json."""
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(str(path))
    return path


MAKERS = {"siglip": siglip_like, "clip": clip_like, "bytes": bytes_like}


@pytest.fixture(params=["trained", *MAKERS])
def tokenizer(request, tmp_path):
    if request.param == "trained":
        return TRAINED
    return load_tokenizer(MAKERS[request.param](tmp_path / request.param))


def test_contract_of_every_tokenizer(tokenizer, tmp_path):
    caption = "a small red circle"
    ids = tokenizer.encode(caption)
    assert ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == tokenizer.decode(ids + ids) == caption
    assert tokenizer.encode("") == tokenizer.encode(" \n") == [tokenizer.eos_id]
    assert tokenizer.encode(" A&nbsp;SMALL  red circle") == ids
    for limit in (1, 2, len(ids) - 1, len(ids)):
        assert tokenizer.encode(caption, limit) == [*ids[: limit - 1], tokenizer.eos_id]
    long = tokenizer.encode("red circle " * 200)
    assert len(long) == 77 and long[-1] == tokenizer.eos_id
    with pytest.raises(ValueError, match="max_tokens"):
        tokenizer.encode(caption, 0)

    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    for text in (caption, "&lt;/s&gt; <pad> <|endoftext|>", "Unseen: 東京!"):
        assert again.encode(text) == tokenizer.encode(text)
        assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)


def test_specials_spelled_out_in_a_caption_are_text(tokenizer):
    for text in ("red</s>circle", "red &lt;|endoftext|&gt; circle", "red<pad>circle"):
        ids = tokenizer.encode(text)
        assert ids.count(tokenizer.eos_id) == 1 and ids[-1] == tokenizer.eos_id
        assert "circle" in tokenizer.decode(ids)


def test_pad_equal_to_end_of_text_like_siglip(tmp_path):
    tokenizer = load_tokenizer(siglip_like(tmp_path / "siglip"))
    ids = tokenizer.encode("a red square")
    assert tokenizer.eos_id == 1 and ids[-1] == 1
    assert tokenizer.decode([*ids, 1, 1, 1]) == "a red square"
    assert len(tokenizer.encode("red square " * 40)) == 77  # the file's own limit of 8 does not count


def test_begin_of_text_is_left_out_like_clip(tmp_path):
    path = clip_like(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(path)
    assert Backend.from_file(str(path)).encode("a red square").ids[0] == 0
    ids = tokenizer.encode("a red square")
    assert 0 not in ids and ids[-1] == tokenizer.eos_id == 1


def test_trained_is_deterministic_and_has_a_token_a_word():
    again = train_tokenizer(CAPTIONS, 600)
    assert again.fingerprint() == TRAINED.fingerprint()
    assert again.encode("Any text") == TRAINED.encode("Any text")
    assert len(TRAINED.encode("red circle at the top left")) == 6 + 1
    assert TRAINED.encode("red")[0] == TRAINED.encode("a red")[1]
    assert TRAINED.fingerprint() != train_tokenizer(["other words here"] * 3, 600).fingerprint()
    assert train_tokenizer(iter(CAPTIONS), 258).vocab_size == 258


def test_trained_loads_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    TRAINED.save(tmp_path / "ours")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "ours"))
    assert theirs("a red circle").input_ids == TRAINED.encode("a red circle")
    assert (theirs.eos_token, theirs.pad_token) == ("</s>", "<pad>")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_nothing_is_lost(raw):
    assert TRAINED.decode(TRAINED.encode(raw, max_tokens=10_000)) == clean_text(raw)


def test_one_enormous_word_is_read_as_its_beginning(tokenizer):
    """Training takes the square of a word's length, and a caption may be a picture in base64: minutes, else."""
    start, rest = "ab" * 100, "xyz" * 300_000
    long = train_tokenizer([*CAPTIONS, start + rest, "-" * 1_000_000], 600)
    assert long.fingerprint() == train_tokenizer([*CAPTIONS, start, "-" * 200], 600).fingerprint()
    assert tokenizer.encode("a red circle " + "ab" * 1_000_000) == tokenizer.encode("a red circle " + "ab" * 1_000)
    assert len(tokenizer.encode("ab" * 1_000_000, 10_000_000)) <= text_module.READ + 1


def test_training_errors():
    with pytest.raises(UsageError, match="captions"):
        train_tokenizer([" ", ""])
    with pytest.raises(UsageError, match="258"):
        train_tokenizer(CAPTIONS, 100)


def test_missing_source_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("aimv2.interop.hub.unreachable", lambda: "no network")
    for source in (tmp_path / "none", "no-such/name", "a/b/c.json"):
        with pytest.raises(UsageError) as error:
            load_tokenizer(source, option="model.tokenizer")
        message = str(error.value)
        assert message.startswith("model.tokenizer:") and str(source) in message and "\n" not in message


def test_broken_and_endless_tokenizers(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tokenizer.json").write_text("{}")
    for source in (tmp_path / "empty", tmp_path / "tokenizer.json"):
        with pytest.raises(UsageError, match="neither a folder"):
            load_tokenizer(source)
    Backend(models.WordLevel({"red": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "endless.json"))
    with pytest.raises(UsageError, match="no end-of-text token"):
        load_tokenizer(tmp_path / "endless.json")
    with pytest.raises(ValueError, match="not in the vocabulary"):
        Tokenizer(Backend(models.WordLevel({"red": 0})), "</s>")


def test_hub_files_are_used_once_cached(tmp_path, monkeypatch):
    import huggingface_hub

    TRAINED.save(tmp_path / "cached")
    cached = str(tmp_path / "cached" / "tokenizer.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: cached)
    monkeypatch.setattr("aimv2.interop.hub.unreachable", lambda: pytest.fail("asked the hub"))
    tokenizer = load_tokenizer("some/name")
    assert tokenizer.name == "some/name" and tokenizer.fingerprint() == TRAINED.fingerprint()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.txt", "one, two\n\n  three \n"),
        ("lines.csv", 'image,caption\n1.jpg,"one, two"\n2.jpg,\n3.jpg,three\n'),
        ("flickr.txt", 'image,caption\n1.jpg,"one, two"\n3.jpg,three\n'),
        ("table.tsv", "url\tText\nu\tone, two\nu\tthree\n"),
        ("rows.jsonl", '{"caption": "one, two"}\n\n"three"\n'),
        ("list.json", '["one, two", {"id": 1}, {"prompt": "three"}]'),
        ("llava.json", '[{"conversations": [{"from": "gpt", "value": "one, two"}]}, {"text": "three"}]'),
        (
            "coco.json",
            '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "one, two"}, {"image_id": 1, "caption": "three"}]}',
        ),
        ("karpathy.json", '{"images": [{"filename": "a", "sentences": [{"raw": "one, two"}, {"raw": "three"}]}]}'),
        ("lines.json", '{"caption": "one, two"}\n{"caption": "three"}\n'),
        ("fields.jsonl", '{"captions": {"alt": ["one, two"], "syn": "three"}}\n{"other": 1}\n'),
    ],
)
def test_read_captions(tmp_path, name, content):
    (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
    assert list(read_captions(tmp_path / name)) == ["one, two", "three"]


def test_read_captions_of_shards(tmp_path):
    from aimv2.data.shards.format import write_shard

    samples = [
        ("a", {"png": b"", "txt": b"one", "json": b'{"captions": {"alt": ["one"], "syn": ["two", " "]}}'}),
        ("b", {"png": b"", "txt": b"three\n"}),
    ]
    write_shard(tmp_path / "train-000000.tar", samples)
    write_shard(tmp_path / "val-000000.tar", [("c", {"txt": b"unseen"})])
    assert list(read_captions(tmp_path)) == ["one", "two", "three"]
    assert list(read_captions(tmp_path / "val-*.tar")) == ["unseen"]
    write_shard(tmp_path / "broken.tar", [("bad", {"txt": b"x", "json": b"{"})])
    assert list(read_captions(tmp_path / "broken.tar")) == ["x"]  # a .json that is none is as good as absent


def test_read_captions_errors(tmp_path):
    (tmp_path / "a.csv").write_text("image,name\n1,2\n")
    (tmp_path / "b.jsonl").write_text('{"caption": "x"}\n{oops\n')
    for name, what in {"none.txt": "does not exist", "a.csv": "image, name", "b.jsonl": "line 2"}.items():
        with pytest.raises(UsageError, match=what):
            list(read_captions(tmp_path / name))
