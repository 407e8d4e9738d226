"""Captions in, token ids out: cleaning and tokenizers.

Cleaning follows the released code (AIMV2's tokenisation): broken Unicode repaired, HTML entities undone
twice, white space collapsed, lower case. A token row is the caption's ids and then the end-of-text id, at
most ``max_tokens`` in all. The beginning of text is an embedding that the decoder learns, so it has no id,
and nothing here pads: where pad and end of text share an id (SigLIP, CLIP), only lengths distinguish them.
"""

import hashlib
import html
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aimv2.errors import UsageError, first_line
from aimv2.io import POINTER, SETTINGS, is_pointer, parse_json, read_file, regular
from aimv2.progress import heartbeat

MAX_TOKENS = 77
PAD, END = "<pad>", "</s>"  # specials of our own tokenizers: ids 0 and 1
END_NAMES = ("</s>", "<|endoftext|>", "[EOS]")  # tried where no config names the end of text
SMALLEST_VOCABULARY = 256 + 2  # every byte and the two specials
READ = 200_000  # characters of a text that are cut into tokens: more would take minutes where they are one word
_WORD = re.compile(r"(\w{200})\w{800,}|([^\w\s]{200})[^\w\s]{800,}")  # training takes the square of a word's length
_DIGITS = re.compile(r"(?<=&#)\d{300,}")  # no character, and more than Python reads as a number


def clean_text(text: str) -> str:
    """Repaired, without HTML entities, single spaces, stripped, lower-cased."""
    import ftfy

    text = ftfy.fix_text(text)
    for _ in range(2):
        text = html.unescape(_DIGITS.sub("1114112", text))
    return " ".join(text.split()).lower()


class Tokenizer:
    """Caption to ids and back, over a ``tokenizers.Tokenizer`` or a transformers tokenizer written in Python.

    Args:
        backend: what cuts text into ids.
        end: the token that ends every text.
        pad: the padding token; only written to the saved config, as padding never reads it here.
        name: where the tokenizer came from, for messages and results.
    """

    def __init__(self, backend: Any, end: str, pad: str | None = None, name: str = "trained") -> None:
        vocabulary = backend.get_vocab()
        if end not in vocabulary:
            raise ValueError(f"end-of-text token {end!r} is not in the vocabulary of {name}")
        self._backend, self._end = backend, end
        self._pad = pad if pad in vocabulary else end
        self.name = name
        self.eos_id: int = vocabulary[end]
        self.vocab_size: int = max(vocabulary.values()) + 1
        self._prepare()

    def _prepare(self) -> None:
        """A caption that spells out "</s>" is text: special tokens are never read from captions."""
        self._is_fast = hasattr(self._backend, "to_str")
        if self._is_fast:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True
            # CLIP marks the end of a word with "</w>", which its decoder leaves in the text.
            self._suffix = getattr(self._backend.model, "end_of_word_suffix", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()  # pickling drops the backend's switches, and data workers may be spawned

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size}, eos_id={self.eos_id})"

    def encode(self, text: str, max_tokens: int = MAX_TOKENS) -> list[int]:
        """Ids of the cleaned text, truncated to ``max_tokens`` with ``eos_id`` always the last; no BOS, no padding."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1 for the end of text")
        text = clean_text(text)[:READ]
        if self._is_fast:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        else:
            ids = self._backend.encode(text, add_special_tokens=False, split_special_tokens=True)
        # A unigram vocabulary can match its own "</s>" inside text; it ends texts and does nothing else.
        ids = [i for i in ids if i != self.eos_id]
        return [*ids[: max_tokens - 1], self.eos_id]  # a longer caption is truncated (data.max_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first ``eos_id``, without special tokens, single spaces."""
        body = [int(i) for i in ids]
        if self.eos_id in body:
            body = body[: body.index(self.eos_id)]
        text = self._backend.decode(body, skip_special_tokens=True)
        if self._is_fast and self._suffix:
            text = text.replace(self._suffix, " ")
        return " ".join(text.split())

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None where there is none."""
        return self._backend.get_vocab().get(token)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``: for `load_tokenizer` and AutoTokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        if not self._is_fast:
            self._backend.save_pretrained(str(folder))
            return
        self._backend.save(str(folder / "tokenizer.json"))
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._end,
            "pad_token": self._pad,
            "model_max_length": MAX_TOKENS,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """16 hex digits of a hash over tokens, ids, merges and end of text: equal means the same ids."""
        merges: list[Any] = []
        if self._is_fast:
            merges = json.loads(self._backend.to_str())["model"].get("merges") or []
        merges = [m if isinstance(m, str) else " ".join(m) for m in merges]
        known = json.dumps([sorted(self._backend.get_vocab().items()), merges, self.eos_id])
        return hashlib.sha256(known.encode()).hexdigest()[:16]


def load_tokenizer(source: str | Path, option: str = "data.tokenizer") -> Tokenizer:
    """A tokenizer from a folder, a ``tokenizer.json`` or a hub name.

    Args:
        source: a folder written by `Tokenizer.save` or by transformers, a ``tokenizer.json``, or a hub name
            such as ``google/siglip-base-patch16-224``.
        option: the option that the user would change, for error messages.
    """
    path = Path(source).expanduser()
    for file in (path, *(path.glob("*") if path.is_dir() else ())):
        if is_pointer(file):
            raise UsageError(f"{option}: {file} is {POINTER}", code="unreadable")
    if path.is_file():
        return _from_file(path, None, str(source), option)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return _from_file(path / "tokenizer.json", path / "tokenizer_config.json", str(source), option)
        return _from_transformers(str(path), str(source), option, offline=True)
    return _from_hub(str(source), option)


def _refuse(source: str, option: str, why: str = "") -> UsageError:
    return UsageError(
        f"{option}: {source!r} is neither a folder with a tokenizer, nor a tokenizer.json, nor a "
        f"hub name that can be reached{f' ({why})' if why else ''}"
    )


def _from_file(path: Path, config: Path | None, source: str, option: str) -> Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(regular(path, SETTINGS)))
        about = parse_json(read_file(config)) if config and config.is_file() else {}
    except Exception as error:  # tokenizers raises bare Exception
        raise _refuse(source, option, f"{path.name} cannot be read: {first_line(error)}") from error
    named = [about.get("eos_token"), about.get("sep_token")]
    return _with_end(backend, named, about.get("pad_token"), source, option)


def _from_transformers(where: str, source: str, option: str, offline: bool) -> Tokenizer:
    from aimv2.interop.plain import open_plain

    try:
        loaded = open_plain("AutoTokenizer", where, local_files_only=offline)
    except Exception as error:  # OSError, ValueError, ImportError of a missing backend, ...
        raise _refuse(source, option, first_line(error)) from error
    backend = getattr(loaded, "backend_tokenizer", None) or loaded
    return _with_end(backend, [loaded.eos_token, loaded.sep_token], loaded.pad_token, source, option)


def _with_end(backend: Any, named: list[Any], pad: Any, source: str, option: str) -> Tokenizer:
    """Choose the end of text: what the config names, else a well-known name."""
    vocabulary = backend.get_vocab()
    spelled = [token.get("content") if isinstance(token, dict) else token for token in (*named, pad)]
    for end in (*spelled[:-1], *END_NAMES):
        if end is not None and str(end) in vocabulary:
            return Tokenizer(backend, str(end), None if spelled[-1] is None else str(spelled[-1]), source)
    raise UsageError(
        f"{option}: the tokenizer {source!r} has no end-of-text token: expected an eos_token or sep_token in "
        f"its tokenizer_config.json, or one of {', '.join(END_NAMES)} in its vocabulary",
        code="missing",
    )


def _from_hub(name: str, option: str) -> Tokenizer:
    """Cached files first; one short request finds out whether the hub can be reached."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise _refuse(name, option)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    from aimv2.interop.hub import unreachable

    found = try_to_load_from_cache(name, "tokenizer.json")
    if not isinstance(found, str):
        why = unreachable()
        if why:
            try:
                return _from_transformers(name, name, option, offline=True)
            except UsageError as error:
                raise _refuse(name, option, why) from error
        try:
            hf_hub_download(name, "tokenizer_config.json")
            found = hf_hub_download(name, "tokenizer.json")
        except EntryNotFoundError:
            return _from_transformers(name, name, option, offline=False)
        except Exception as error:
            raise _refuse(name, option, first_line(error)) from error
    return _from_file(Path(found), Path(found).with_name("tokenizer_config.json"), name, option)


def train_tokenizer(
    captions: Iterable[str], vocab_size: int = 4096, min_frequency: int = 2, start: str | None = None
) -> Tokenizer:
    """A byte-level BPE of one's own captions: no unknowns, and the cleaned text comes back exactly.

    Args:
        captions: raw captions; they are cleaned here.
        vocab_size: at most this many ids, at least 258 (every byte, pad, end of text), 259 with ``start``.
        min_frequency: rarer pairs are not merged.
        start: a third special token (id 2) for models that begin their texts with one; not written by ``encode``.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    special = [PAD, END, *([start] if start else [])]
    smallest = SMALLEST_VOCABULARY + (start is not None)
    if vocab_size < smallest:
        raise UsageError(f"vocab_size: got {vocab_size}, expected at least {smallest} (all bytes)")
    count = 0

    def cleaned() -> Iterator[str]:
        nonlocal count
        for caption in captions:
            text = clean_text(caption)
            if text:
                count += 1
                yield _WORD.sub(r"\1\2", text)

    backend = Backend(models.BPE())
    # A first word gets a space as well, so that "red" is one token wherever it stands.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with heartbeat(lambda: f"training a tokenizer, {count} captions read"):
        backend.train_from_iterator(cleaned(), trainer)
    if not count:
        raise UsageError("captions: none found, expected at least one that is not blank to train a tokenizer on")
    marks = [(token, number) for number, token in enumerate(special) if token != PAD]
    single = f"{start} $A {END}" if start else f"$A {END}"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    # Training used threads; without a word the library warns in every worker that is forked from here on.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return Tokenizer(backend, END, PAD)
