"""A student of a frozen teacher: an AIMv2 whose patch features are also shown, projected to the teacher's width.

The paper does not say how its distilled models were made; this is ours.

Legend: B pairs, I patches, D width of the student, E width of the teacher.
"""

from __future__ import annotations

from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.models.aimv2 import AIMv2
from aimv2.models.decoder import Prediction

PROJECTION = "to_teacher."


class Projection(nn.Linear):
    """Features of the student as the teacher's: [.., D] -> [.., E]."""


class Distiller(AIMv2):
    """An AIMv2 and, where the feature term needs one, a projection of its features that only training knows.

    The teacher is no part of it: it is never optimised, sharded or saved.
    """

    def __init__(self, student: AIMv2, teacher_width: int | None, whole: bool = False) -> None:
        """Takes over the student's parts.

        Args:
            student: with its weights.
            teacher_width: E; None: features are compared without a projection.
            whole: features of a second forward pass in which all patches see each other.
        """
        nn.Module.__init__(self)  # not AIMv2's, which would build new parts
        self.encoder, self.decoder = student.encoder, student.decoder
        self.tokenizer = student.tokenizer
        self.whole = whole
        self.to_teacher = None if teacher_width is None else Projection(student.encoder.config.width, teacher_width)

    def forward(
        self, batch: Batch, text_targets: Tensor | None = None, bidirectional: bool = False, features: bool = False
    ) -> Prediction:
        """As :meth:`AIMv2.forward`; with ``features`` those to be compared with the teacher's are there too."""
        seen = self.encoder.forward_batch(batch, bidirectional)
        prediction = self.decoder(seen, batch, text_targets)
        if not features:
            return prediction
        if self.whole and not bidirectional:
            seen = self.encoder.forward_batch(batch, bidirectional=True)
        return prediction._replace(features=seen if self.to_teacher is None else self.to_teacher(seen))

    def saved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model folder keeps of the weights: the student's, under its own names."""
        return {key: value for key, value in weights.items() if not key.startswith(PROJECTION)}
