"""The student of distillation: an AIMv2 that also returns its patch features, projected to the teacher's width.

The paper does not publish its distillation method; this one is ours.

Legend: B pairs, I patches, D width of the student, E width of the teacher.
"""

from __future__ import annotations

from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.models.aimv2 import AIMv2
from aimv2.models.decoder import Prediction

PROJECTION = "to_teacher."


class Projection(nn.Linear):
    """Linear projection of student features to the teacher's width: [.., D] -> [.., E]."""


class Distiller(AIMv2):
    """An AIMv2 and, if the feature term needs one, a projection that is used in training only.

    The teacher is not part of this module: it is never optimised, sharded or saved.
    """

    def __init__(self, student: AIMv2, teacher_width: int | None, whole: bool = False) -> None:
        """Take over the student's parts.

        Args:
            student: model with its weights.
            teacher_width: E; None: features are compared without a projection.
            whole: features come from a second forward pass with bidirectional attention.
        """
        nn.Module.__init__(self)  # AIMv2.__init__ would build new parts
        self.encoder, self.decoder = student.encoder, student.decoder
        self.tokenizer = student.tokenizer
        self.whole = whole
        self.to_teacher = None if teacher_width is None else Projection(student.encoder.config.width, teacher_width)

    def forward(
        self, batch: Batch, text_targets: Tensor | None = None, bidirectional: bool = False, features: bool = False
    ) -> Prediction:
        """:meth:`AIMv2.forward`; ``features`` adds the features to be compared with the teacher's."""
        encoded = self.encoder.forward_batch(batch, bidirectional)
        prediction = self.decoder(encoded, batch, text_targets)
        if not features:
            return prediction
        if self.whole and not bidirectional:
            encoded = self.encoder.forward_batch(batch, bidirectional=True)
        return prediction._replace(features=encoded if self.to_teacher is None else self.to_teacher(encoded))

    def saved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights to save: only the student's."""
        return {key: value for key, value in weights.items() if not key.startswith(PROJECTION)}
