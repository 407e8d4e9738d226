"""Classification: classes through an attentive probe, the encoder frozen or trained with it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from aimv2.config.objective import ClassifyTaskOptions
from aimv2.config.schema import Config
from aimv2.data.images.class_names import names_beside
from aimv2.data.shards.listing import list_shard
from aimv2.data.stream.samples import training_shards, training_sources
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.interop.load import load_model
from aimv2.models.classifier import Classifier
from aimv2.models.encoder import VisionEncoder
from aimv2.models.flops import step_flops
from aimv2.models.init import init_weights
from aimv2.models.sizes import EncoderConfig
from aimv2.objectives import Objective
from aimv2.objectives.probe import ProbeObjective
from aimv2.tasks.held_out import HeldOut, validate_classes
from aimv2.tasks.init_weights import origin_of
from aimv2.tasks.pretrain import shapes
from aimv2.tasks.task import CardText, Context, Task

log = logging.getLogger(__name__)

MOST_CLASSES = 1_000_000


class Classify(Task):
    """An encoder under an attentive probe."""

    options: ClassVar[type[Any]] = ClassifyTaskOptions
    reads = ("init",)
    figures = ("val_class_loss", "val_top1")

    def check_world(self, world: World) -> None:
        if world.size > 1:
            raise UsageError(
                "objective.name=probe: its batch norm sees one process; start it without torchrun", code="unsupported"
            )

    def check(self) -> None:
        heads = self.config.objective.heads
        if self.config.init is not None or self.config.model.name != "auto":
            check_heads(heads, self.encoder_config(1).width)

    def reads_text(self) -> bool:
        return False

    def encoder_config(self, vocab_size: int) -> EncoderConfig:
        init = self.config.init
        return shapes(self.config, 1)[0] if init is None else origin_of(init).encoder

    def build(self, context: Context) -> Classifier:
        """The encoder of ``init`` (or a new one) under an attentive probe, its size that of ``init``."""
        config, options = self.config, self.config.objective
        source: VisionEncoder | None = None
        # a resumed run has its encoder in its own folder: init may be gone by then
        origin = config.run if context.resuming else config.init
        if origin is not None:
            loaded = load_model(origin)
            image: nn.Module = getattr(loaded, "image", loaded)  # of a pair its image tower
            assert isinstance(image, VisionEncoder)
            source = image
        shape = source.config if source is not None else shapes(config, 1)[0]
        if shape.image_size is None:
            raise UsageError(f"init {config.init}: a native model; training sees one image size, give model.image_size")
        options.classes = options.classes or count_classes(config)  # counted once: config.yaml keeps it
        heads = options.heads
        check_heads(heads, shape.width)
        with torch.device("meta"):
            model = Classifier(replace(shape, pool_heads=0), options.classes, heads)
        model.to_empty(device="cpu")
        init_weights(model, config.seed)
        if source is not None and not context.resuming:
            weights = {key: value.float() for key, value in source.state_dict().items() if not key.startswith("head.")}
            model.encoder.load_state_dict(weights)
        if options.freeze:
            model.encoder.requires_grad_(False)
        return model

    def objective(self, model: nn.Module) -> Objective:
        return ProbeObjective(self.config.objective)

    def flops(self, model: nn.Module, pairs: float, patches: float, tokens: float) -> float:
        return step_flops(model, pairs, patches, tokens)

    def validate(self, model: nn.Module, objective: Objective, data: HeldOut, world: World) -> dict[str, float]:
        """Loss and accuracy; see :func:`aimv2.tasks.held_out.validate_classes`."""
        return validate_classes(model, data, world)

    def card(self) -> CardText:
        frozen = self.config.objective.freeze
        return (
            super()
            .card()
            ._replace(
                what="AIMV2 vision encoder with an attentive probe" + ("" if frozen else ", both trained on labels"),
                learned=f"classes, {'frozen encoder' if frozen else 'encoder trained'}, init {self.config.init}",
            )
        )


def check_heads(heads: int | None, width: int) -> None:
    """Raises UsageError where the probe's heads do not divide the encoder's width."""
    if heads is not None and width % heads:
        raise UsageError(f"objective.heads {heads} does not divide the encoder's width {width}", code="mismatch")


def count_classes(config: Config) -> int:
    """The names in classes.txt next to the training shards, else their largest label + 1; headers and labels are read only.

    Raises:
        UsageError: no sample has a label, a label beyond the names, sources whose classes are not the same.
    """
    shards = [shard for found in training_shards(config.data) for shard in found]
    folders = dict.fromkeys(shard.parent for shard in shards)
    named = {folder: names for folder in folders if (names := names_beside(folder))}
    if len(set(named.values())) > 1:
        one, other = list(named)[:2]
        raise UsageError(
            f"data.train: {one} and {other} have other classes (classes.txt): their labels differ", code="mismatch"
        )
    labels = np.concatenate([list_shard(shard)[2] for shard in shards])
    largest, sources = int(labels.max(initial=-1)), ", ".join(source.path for source in training_sources(config.data))
    if largest < 1:
        raise UsageError(
            f"data.train: labels missing: {sources} has no KEY.cls with two classes or more; import a "
            "class-folder tree, or use objective.name=pretrain",
            code="missing",
        )
    count = len(next(iter(named.values()), ())) or largest + 1
    if count > MOST_CLASSES:
        raise UsageError(
            f"data.train: label {largest:,} in {sources}: a head of so many classes can't be built; objective.classes states their "
            "number, and labels beyond it are not learned from",
            option="objective.classes",
            code="limit",
        )
    if largest >= count:
        raise UsageError(
            f"data.train: label {largest} in {sources}, whose classes.txt has {count} names", code="mismatch"
        )
    absent = np.setdiff1d(np.arange(count), labels)
    if len(absent):
        log.warning("%s: no sample of %d of %d classes, %d first", sources, len(absent), count, absent[0])
    if unlabelled := int((labels < 0).sum()):
        log.warning("%s: %d of %d samples have no label; they are not learned from", sources, unlabelled, len(labels))
    return count


TASK = Classify
