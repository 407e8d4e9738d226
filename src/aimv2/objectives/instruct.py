"""Instruction tuning: the next token of the answers (AIMV2, section 5.6)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.objectives import Terms
from aimv2.objectives.pretrain import text_targets


class InstructObjective:
    """Cross-entropy of the answers' tokens, each with its end of turn; nothing else is scored."""

    weights: ClassVar[dict[str, float]] = {"answer": 1.0}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens of answers: int64 []."""
        return {"answer": batch.token_count}

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """``answer``: (loss in nats summed over the tokens of the answers, their number); fp32 [] and int64 [].

        Args:
            model: a TunedVisionLanguage.
            batch: conversations, on the model's device.
        """
        return {"answer": (model(batch, text_targets(batch)).loss, batch.token_count)}
