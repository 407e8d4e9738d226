"""The AIMV2 objective and a feature term to a frozen teacher (ours: the paper does not say how it distilled).

Legend: B pairs, I patches, D width of the student, E width of the teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.features.teacher import Teacher
from aimv2.models.decoder import Prediction
from aimv2.objectives import Terms
from aimv2.objectives.pretrain import PretrainObjective

NORM_EPS = 1e-6  # of the layer normalisation of a teacher's features


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of each patch, summed over patches.

    Args:
        student: projected, fp32 [B, I, E].
        teacher: fp32 [B, I, E].

    Returns:
        fp32 [], each patch between 0 and 2.
    """
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).sum()


def l2_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over E to the teacher's features after a layer normalisation of each patch (no affine), summed.

    Args and returns: see :func:`cosine_loss`.
    """
    wanted = F.layer_norm(teacher, teacher.shape[-1:], eps=NORM_EPS)
    return (student - wanted).square().mean(-1).sum()


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the cosines between the patches of an image, a mean over the other side's I, summed over patches.

    Args:
        student: fp32 [B, I, D], not projected.
        teacher: fp32 [B, I, E].

    Returns:
        fp32 [].
    """
    ours, theirs = (x @ x.transpose(1, 2) for x in (F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)))
    return (ours - theirs).square().mean(-1).sum()


LOSSES = {"cosine": cosine_loss, "l2": l2_loss, "relation": relation_loss}
PROJECTED = ("cosine", "l2")  # those that compare features with features


class DistillObjective:
    """``L_text + alpha * L_img + teacher_weight * L_feature``; each term is a sum and a count."""

    def __init__(self, config: ObjectiveConfig, teacher: Teacher) -> None:
        self.pretrain = PretrainObjective(config)
        self.teacher = teacher
        self.loss = LOSSES[config.teacher_loss]
        self.weights = {**self.pretrain.weights, "feature": config.teacher_weight}

    @property
    def stored_width(self) -> int:
        """E of the features that batches must bring along; 0: the teacher runs here."""
        return self.teacher.width if self.teacher.run is None else 0

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Scored tokens, scored patches and all patches of a batch: int64 [] each."""
        patches = batch.text_len.new_full((), len(batch) * self.teacher.grid**2)
        return {**self.pretrain.counts(batch), "feature": patches}

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        """Sums and counts of a batch.

        Args:
            model: a Distiller with the heads that the targets need, and a projection where the loss wants one.
            batch: on the model's device.

        Returns:
            ``text`` and ``pixel``: see :class:`PretrainObjective`; ``feature``: (summed loss of the B * I patches, B * I).
        """
        wanted = self.teacher.features(batch)
        base = self.pretrain
        prediction = model(batch, base.targets(batch), base.bidirectional, features=True)
        return {**base.terms(prediction, model, batch), **self.feature_term(prediction, wanted, batch)}

    def whole(self, model: nn.Module, batch: Batch) -> Terms:
        """The feature term alone, all patches of the student seeing each other as when it is used."""
        wanted = self.teacher.features(batch)
        prediction = model(batch, self.pretrain.targets(batch), True, features=True)
        return self.feature_term(prediction, wanted, batch)

    def feature_term(self, prediction: Prediction, wanted: Tensor, batch: Batch) -> Terms:
        """``feature`` of the student's features, beside those that the teacher has of the same images."""
        assert prediction.features is not None
        with torch.autocast(batch.images.device.type, enabled=False):
            loss = self.loss(prediction.features.float(), wanted)
        return {"feature": (loss, self.counts(batch)["feature"])}
