"""The splits that rows of lists, tables and captions files state: what the words mean, and which rows are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from aimv2.errors import UsageError

SPLITS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val", "evaluation": "val"},
}
REST = "restval"  # as Karpathy calls what COCO's validation images add to training
WORDS = {**SPLITS, REST: "train"}


def stated_word(cell: Any) -> str:
    """The word of a cell that states a split; "" for an empty one."""
    return "" if cell is None or cell != cell else str(cell).strip().lower()  # NaN is not itself


def stated_split(cell: Any, place: str) -> str:
    """The split that a cell states: train, val or test; "" for an empty one.

    Raises:
        UsageError: a word that is none of :data:`WORDS`.
    """
    word = stated_word(cell)
    if word and word not in WORDS:
        raise UsageError(f"{place}: split {str(cell)[:40]!r}; train, val or test expected", code="unknown")
    return WORDS.get(word, "")


@dataclass
class StatedSplits:
    """The splits that a source states, and which of them is read.

    Args:
        place: the source, for messages.
        cells: what its rows state, each word once or more.
        chosen: the split that the user names; None: train and val, each as itself.
        held_out: test is read, else val, else train.
    """

    place: str
    cells: Iterable[Any]
    chosen: str | None = None
    held_out: bool = False
    wanted: str = field(init=False)

    def __post_init__(self) -> None:
        words = {*map(stated_word, self.cells)}
        stated = {stated_split(word, self.place) for word in words} - {""}
        self.wanted = ""
        if self.chosen is not None:
            word = self.chosen.lower()
            self.wanted = WORDS.get(word, "") if word != REST or word in words else ""
            if self.wanted not in stated or not self.wanted:
                has = f"has the splits {', '.join(sorted(stated))}" if stated else "states no split; leave it out"
                code = "unknown" if stated else "conflict"
                raise UsageError(f"--split {self.chosen}: {self.place} {has}", option="--split", code=code)
        elif self.held_out:
            self.wanted = next((split for split in ("test", "val", "train") if split in stated), "")

    def is_read(self, cell: Any) -> bool:
        """Whether a row is of the split that is read; where all are, a test row still waits for ``--split test``."""
        word = stated_word(cell)
        if (self.chosen or "").lower() == REST:
            return word == REST
        return self.wanted in ("", WORDS.get(word, ""))

    def refusal(self, cell: Any) -> str:
        """Why a row that is read may not be used; "" where it may."""
        is_test = not self.wanted and stated_split(cell, self.place) == "test"
        return "of the test split; --split test imports it" if is_test else ""

    def is_val(self, cell: Any) -> bool:
        """Whether a row goes to validation."""
        return not self.wanted and stated_split(cell, self.place) == "val"
