"""Words for a detector: phrases to the tokens of one text and back, and phrases of a mirrored picture.

MM-Grounding-DINO reads ``[CLS] a dog . a red ring . [SEP]``: a phrase attends only to itself, and its tokens are found by the ids of
[CLS] [SEP] . and ?, which transformers has as constants.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from aimv2.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

DELIMITERS = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}  # of bert-base-uncased
PAD, UNKNOWN = 0, 100
CLS, SEP, STOP = DELIMITERS["[CLS]"], DELIMITERS["[SEP]"], DELIMITERS["."]
SIDES = {"left": "right", "right": "left"}
SIDED = re.compile(r"(?<![^\W\d_])(left|right)(?=(?:most|hand|ward|wards|side)?(?![^\W\d_]))", re.IGNORECASE)


def mirrored(phrase: str) -> str:
    """A phrase about the mirrored picture: left and right exchanged, also in leftmost, right-hand and the like.

    >>> mirrored("the cup at the top left, right of Wright's")
    "the cup at the top right, left of Wright's"
    """

    def other(found: re.Match[str]) -> str:
        word = found[0]
        changed = SIDES[word.lower()]
        return changed.upper() if word.isupper() else changed.capitalize() if word[0].isupper() else changed

    return SIDED.sub(other, phrase)


def plain_phrase(phrase: str) -> str:
    """A phrase without what separates phrases, lower case: ``St. Bernard?`` is ``st bernard``."""
    return " ".join(re.sub(r"[.?]", " ", phrase.lower()).split())


def check_tokenizer(tokenizer: Any, source: str) -> None:
    """Raises UsageError where [CLS] [SEP] . ? or padding have other ids than MM-Grounding-DINO expects."""
    given = {token: tokenizer.convert_tokens_to_ids(token) for token in DELIMITERS}
    given |= {"[PAD]": tokenizer.pad_token_id}
    wanted = {**DELIMITERS, "[PAD]": PAD}
    if given != wanted:
        token = next(token for token in wanted if given[token] != wanted[token])
        raise UsageError(
            f"objective.text {source}: its tokenizer has {token} as {given[token]}, and MM-Grounding-DINO finds phrases by the ids of "
            "bert-base-uncased ([CLS] 101, [SEP] 102, . 1012, ? 1029, [PAD] 0); give a BERT with that vocabulary, or leave "
            "objective.text out: a small one is then trained",
            option="objective.text",
            code="mismatch",
        )


def words_of(phrases: Iterable[str]) -> list[str]:
    """The different words and signs of phrases as BERT's tokenizer splits them (accents removed, Chinese by character), sorted."""
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    plain, split = BertNormalizer(lowercase=True), BertPreTokenizer()
    whole = {plain.normalize_str(plain_phrase(phrase)) for phrase in phrases}
    return sorted({word for phrase in whole for word, _ in split.pre_tokenize_str(phrase)})


def small_tokenizer(words: Iterable[str]) -> Any:
    """A BERT tokenizer of these words, whose delimiters have the ids that MM-Grounding-DINO expects; letters spell other words.

    Args:
        words: of :func:`words_of`.
    """
    from transformers import BertTokenizer

    fixed = {PAD: "[PAD]", UNKNOWN: "[UNK]", 103: "[MASK]", **{number: token for token, number in DELIMITERS.items()}}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = sorted({*words})
    letters += "".join(sorted({letter for word in words for letter in word if letter.isalnum()} - {*letters}))
    known = dict.fromkeys([*words, *letters, *(f"##{letter}" for letter in letters), ",", "-", "'"])
    rest = iter(token for token in known if token not in fixed.values())
    vocabulary, number = dict[str, int](), 0
    while (token := fixed.get(number) or next(rest, None)) is not None or number <= max(fixed):
        vocabulary[token or f"[unused{number}]"] = number
        number += 1
    return BertTokenizer(vocab=vocabulary)


class Prompts:
    """Phrases to the token ids of one text.

    Attributes:
        tokenizer: of transformers, checked.
        limit: most tokens of a text.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        self.known: dict[str, list[int]] = {}

    def tokens(self, phrase: str) -> list[int]:
        """Ids of a phrase without delimiters; at least one, at most as many as fit."""
        if (found := self.known.get(phrase)) is None:
            ids = self.tokenizer.encode(plain_phrase(phrase), add_special_tokens=False)
            found = [number for number in ids if number not in (*DELIMITERS.values(), PAD)][: self.limit - 3]
            found = found or [UNKNOWN]
            if len(self.known) < 100_000:
                self.known[phrase] = found
        return found

    def spelt(self, phrases: Iterable[str]) -> list[str]:
        """The words that the vocabulary has neither whole nor in pieces of several letters: nothing was learned of them."""
        found = []
        for word in words_of(phrases):
            pieces = self.tokenizer.tokenize(word)
            if "[UNK]" in pieces or (len(word) > 1 and all(len(piece.removeprefix("##")) < 2 for piece in pieces)):
                found.append(word)
        return found

    def encode(self, phrases: Sequence[str]) -> list[int]:
        """``[CLS] phrase . phrase . [SEP]``; they must fit (:meth:`fitting`)."""
        return [CLS, *(number for phrase in phrases for number in (*self.tokens(phrase), STOP)), SEP]

    def fitting(self, phrases: Sequence[str]) -> int:
        """How many of the first phrases fit in one text; at least one."""
        room = self.limit - 2
        for count, phrase in enumerate(phrases):
            room -= len(self.tokens(phrase)) + 1
            if room < 0:
                return max(count, 1)
        return len(phrases)

    def parts(self, phrases: Sequence[str]) -> list[list[str]]:
        """The phrases in as few texts as they need, in order."""
        found, rest = [], list(phrases)
        while rest:
            count = self.fitting(rest)
            found.append(rest[:count])
            rest = rest[count:]
        return found


def phrase_numbers(text: Tensor) -> Tensor:
    """Which phrase each token belongs to: int64 [B, T], -1 for delimiters and padding.

    Args:
        text: int64 [B, T], of :meth:`Prompts.encode`, right-padded with 0.
    """
    inside = text != PAD
    for number in DELIMITERS.values():
        inside = inside & (text != number)
    return (text == STOP).cumsum(1).masked_fill(~inside, -1)
