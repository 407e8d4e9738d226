"""Texts of a LiT pair are cut as CLIP's tokenizer in transformers cuts them; the end of text survives."""

import pickle
from pathlib import Path

import pytest
import torch

import aimv2
from aimv2.data.text.clip import START, find_clip_tokenizer, started
from aimv2.data.text.tokenizer import load_tokenizer, train_tokenizer
from aimv2.errors import UsageError
from aimv2.interop.convert import convert
from aimv2.models.init import init_weights
from aimv2.models.lit import LiT, LiTConfig, TextConfig
from aimv2.models.sizes import EncoderConfig

TEXTS = ["a dog", "A Dog  and a CAT", "", "dog dog dog dog dog dog dog dog", "zebra &amp; cat"]


def reference(folder: Path):
    """transformers' CLIP tokenizer over a small vocabulary, saved into ``folder``."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    merges = [("d", "o"), ("do", "g</w>"), ("c", "a"), ("ca", "t</w>"), ("a", "n"), ("an", "d</w>")]
    names = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {name: number for number, name in enumerate(dict.fromkeys(names))}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges)
    tokenizer.save_pretrained(folder)
    return tokenizer, TextConfig(16, 1, 2, 24, len(vocab), 8, vocab["<|endoftext|>"])


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    theirs, shape = reference(tmp_path)
    ours = find_clip_tokenizer(tmp_path, shape)
    assert ours is not None
    cleaned = [text.replace("&amp;", "&") for text in TEXTS]
    wanted = theirs(cleaned, padding="max_length", truncation=True, max_length=8, return_tensors="pt")["input_ids"]
    got = ours(TEXTS)
    assert torch.equal(got, wanted)
    assert (got == shape.end).any(dim=1).all() and got[3, -1] == shape.end  # kept where a text is cut
    with pytest.raises(ValueError, match="a list of texts is expected"):
        ours("a dog")


def test_a_pair_reads_texts_with_its_own_tokenizer(tmp_path: Path) -> None:
    _, shape = reference(tmp_path / "tokens")
    image = EncoderConfig("tiny", 32, 1, 2, 48, 14, 28, pool_heads=2)
    with torch.device("meta"):
        pair = LiT(LiTConfig(image, shape, projection=20))
    pair.to_empty(device="cpu")
    init_weights(pair, 0)
    convert(pair, tmp_path / "pair", "released")
    for file in (tmp_path / "tokens").iterdir():
        file.rename(tmp_path / "pair" / file.name)
    loaded = aimv2.load_model(tmp_path / "pair")
    texts = loaded.encode_text(["a dog", "a cat"])
    assert texts.shape == (2, 20) and torch.allclose(texts.norm(dim=-1), torch.ones(2))
    assert torch.equal(texts, loaded.encode_text(loaded.tokenizer(["a dog", "a cat"])))
    logits = loaded(torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8), ["a dog", "a cat"])
    assert logits.shape == (3, 2)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    _, shape = reference(tmp_path)
    other = TextConfig(16, 1, 2, 24, shape.vocab_size, 8, shape.end - 1)
    with pytest.raises(UsageError, match="is not CLIP's"):
        find_clip_tokenizer(tmp_path, other)
    assert find_clip_tokenizer(tmp_path / "none", shape) is None


def test_training_rows_are_those_of_the_pair_without_padding(tmp_path: Path) -> None:
    _, shape = reference(tmp_path)
    pair = find_clip_tokenizer(tmp_path, shape)
    training = pickle.loads(pickle.dumps(started(load_tokenizer(tmp_path))))  # data workers may be spawned
    for text, row in zip(TEXTS, pair(TEXTS).tolist()):
        ids = training.encode(text, 8)
        assert ids[0] == pair.start and ids.count(shape.end) == 1 and ids[-1] == shape.end
        assert row == ids + [shape.end] * (8 - len(ids))


def test_a_trained_bpe_with_a_start_is_a_pairs_tokenizer(tmp_path: Path) -> None:
    captions = ["a red circle", "a blue square at the left"] * 4
    train_tokenizer(captions, 300, start=START).save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.id_of("<pad>"), tokenizer.eos_id, tokenizer.id_of(START)) == (0, 1, 2)
    assert tokenizer.encode("a red circle")[0] != 2, "written by a pair's rows alone"
    shape = TextConfig(16, 1, 2, 24, tokenizer.vocab_size, 12, tokenizer.eos_id)
    pair = find_clip_tokenizer(tmp_path, shape)
    (row,) = pair(["a red circle"]).tolist()
    ids = started(tokenizer).encode("a red circle", 12)
    assert ids[0] == 2 and ids[-1] == 1 and row == ids + [1] * (12 - len(ids))
    assert tokenizer.decode(ids) == "a red circle"
    assert 2 not in tokenizer.encode(f"a {START} circle"), "a caption that spells the token out is text"
    plain = train_tokenizer(captions, 300)
    with pytest.raises(UsageError, match="has no start of text"):
        started(plain)
    with pytest.raises(UsageError, match="expected at least 259"):
        train_tokenizer(captions, 258, start=START)
