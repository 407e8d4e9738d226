"""Texts for the text tower of a LiT pair: CLIP's BPE, start and end of text, padded with the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aimv2.data.text.tokenizer import MAX_TOKENS, Tokenizer, load_tokenizer
from aimv2.errors import UsageError

if TYPE_CHECKING:
    from aimv2.models.lit import TextConfig

START = "<|startoftext|>"


class StartedTokenizer(Tokenizer):
    """A tokenizer whose rows begin with the start of text, as a text tower is trained on them: start, text, end."""

    def __init__(self, tokenizer: Tokenizer, start: int) -> None:
        super().__init__(tokenizer._backend, tokenizer._end, tokenizer._pad, tokenizer.name)
        self.start = start

    def encode(self, text: str, max_tokens: int = MAX_TOKENS) -> list[int]:
        """Ids of the cleaned text between start and end, 2 to ``max_tokens`` in all."""
        return [self.start, *super().encode(text, max_tokens - 1)]


def started(tokenizer: Tokenizer, option: str = "data.tokenizer") -> StartedTokenizer:
    """A tokenizer for the text tower of a pair in training.

    Raises:
        UsageError: it has no start of text.
    """
    start = tokenizer.id_of(START)
    if start is None:
        raise UsageError(
            f"{option}: {tokenizer.name!r} has no start of text ('{START}'), which the text tower of a pair reads first; "
            "CLIP's tokenizer (openai/clip-vit-base-patch32) has it, and auto trains one with it",
            code="missing",
        )
    return StartedTokenizer(tokenizer, start)


class ClipTokenizer:
    """Texts to tokens: start, at most ``max_text`` - 2 tokens, end of text (kept when a text is cut), padding = end."""

    def __init__(self, tokenizer: Tokenizer, start: int, max_text: int = 77) -> None:
        self.tokenizer, self.start, self.max_text = tokenizer, start, max_text

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """B texts -> int64 [B, max_text].

        Raises:
            ValueError: one text instead of a list.
        """
        if isinstance(texts, str):
            raise ValueError(f"a list of texts is expected, got one text: [{texts!r}]")
        out = torch.full((len(texts), self.max_text), self.tokenizer.eos_id, dtype=torch.int64)
        for row, text in zip(out, texts):
            ids = [self.start, *self.tokenizer.encode(text, self.max_text - 1)]
            row[: len(ids)] = torch.tensor(ids)
        return out


def find_clip_tokenizer(folder: Path, text: TextConfig) -> ClipTokenizer | None:
    """The tokenizer saved with a pair's weights; None where there is none.

    Raises:
        UsageError: a tokenizer that is not the pair's.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    tokenizer = load_tokenizer(folder, option="MODEL")
    start = tokenizer.id_of(START)
    if start is None or tokenizer.eos_id != text.end or tokenizer.vocab_size > text.vocab_size:
        raise UsageError(
            f"MODEL {folder}: the tokenizer with the weights is not CLIP's (start {start}, end {tokenizer.eos_id}, "
            f"{tokenizer.vocab_size} tokens; end {text.end} and at most {text.vocab_size} tokens expected)"
        )
    return ClipTokenizer(tokenizer, start, text.max_text)
