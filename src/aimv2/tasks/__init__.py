"""What differs between the stages over the one loop: a model, an objective, a validation. One file a stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from aimv2.config.schema import Config
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.distributed import World
from aimv2.features.teacher import Teacher
from aimv2.objectives import Objective
from aimv2.tasks import classify as probe
from aimv2.tasks import contrastive, distill, pretrain
from aimv2.tasks.held_out import HeldOut

if TYPE_CHECKING:
    from aimv2.features.training_cache import CachedPairStream

OpenTeacher = Callable[[int], Teacher]  # patches a side -> the teacher


@dataclass(frozen=True)
class Stage:
    """One value of ``objective.name``.

    Attributes:
        text: whether the configuration's stage reads captions.
        build: (config, tokenizer, resuming) -> the model with its first weights; while resuming a checkpoint fills it.
        objective: of the configuration.
        validate: (model, objective, held-out samples, config, world) -> figures.
        taught: of a stage with a teacher, in place of ``build`` and ``objective``: (config, tokenizer, resuming, opener of
            the teacher) -> model and objective.
        stream: of a stage that may read other batches than images and captions: (config, model, tokenizer, world) -> the
            stream, or None for the usual one.
    """

    text: Callable[[Config], bool]
    build: Callable[[Config, Tokenizer | None, bool], nn.Module]
    objective: Callable[[Config], Objective]
    validate: Callable[[nn.Module, Objective, HeldOut, Config, World], dict[str, float]]
    taught: Callable[[Config, Tokenizer | None, bool, OpenTeacher], tuple[nn.Module, Objective]] | None = None
    stream: Callable[[Config, nn.Module, Tokenizer | None, World], CachedPairStream | None] | None = None


STAGES = {
    "pretrain": Stage(pretrain.reads_text, pretrain.build_model, pretrain.objective, pretrain.validate),
    "distill": Stage(  # without its teacher it is pre-training
        pretrain.reads_text, pretrain.build_model, pretrain.objective, distill.validate, distill.build
    ),
    "probe": Stage(probe.reads_text, probe.build_model, probe.objective, probe.validate),
    "contrastive": Stage(
        contrastive.reads_text,
        contrastive.build_model,
        contrastive.objective,
        contrastive.validate,
        stream=contrastive.cached_stream,
    ),
}


def stage_of(config: Config) -> Stage:
    """The stage that ``objective.name`` names."""
    return STAGES[config.objective.name]
