"""Losses: a batch in, summed losses and their counts out."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from aimv2.batch import Batch

Terms = dict[str, tuple[Tensor, Tensor]]


class Objective(Protocol):
    """A stage's losses, each a sum and a count that whoever holds all counts divides once."""

    @property
    def weights(self) -> dict[str, float]:
        """Of each term in the total; a term of weight 0 is not computed."""
        ...

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Counts of a batch, known before any forward pass: int64 [] a term, in the terms' order."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """``{term: (sum, count)}``."""
        ...
