"""The stage ``probe``: classes through an attentive probe, the encoder frozen or trained with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from aimv2.config.schema import Config
from aimv2.data.stream.samples import training_shards, training_sources
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.interop.load import load_model
from aimv2.interop.model_folder import checkpoints
from aimv2.models.classifier import Classifier
from aimv2.models.encoder import VisionEncoder
from aimv2.models.init import init_weights
from aimv2.models.sizes import EncoderConfig
from aimv2.objectives import Objective
from aimv2.objectives.probe import ProbeObjective
from aimv2.tasks.held_out import HeldOut, validate_classes
from aimv2.tasks.pretrain import shapes


def reads_text(config: Config) -> bool:
    return False


def objective(config: Config) -> ProbeObjective:
    return ProbeObjective(config.objective)


def validate(model: nn.Module, objective: Objective, data: HeldOut, config: Config, world: World) -> dict[str, float]:
    """Loss and accuracy; see :func:`aimv2.tasks.held_out.validate_classes`."""
    return validate_classes(model, data, world)


def build_model(config: Config, tokenizer: Tokenizer | None, resuming: bool) -> Classifier:
    """The encoder of ``init`` (or a new one) under an attentive probe, its size that of ``init``."""
    objective = config.objective
    source = None
    # a run that goes on has its encoder in its own folder: --init may be gone by then
    origin = config.run if resuming and config.run and checkpoints(Path(config.run)) else config.init
    if origin is not None:
        loaded = load_model(origin)
        source = getattr(loaded, "image", loaded)
        assert isinstance(source, VisionEncoder)
    shape: EncoderConfig = source.config if source is not None else shapes(config, 1)[0]  # type: ignore[assignment]
    if shape.image_size is None:
        raise UsageError(f"init {config.init}: a native model; training sees one image size, give model.image_size")
    objective.classes = objective.classes or count_classes(config)  # counted once: config.yaml keeps it
    heads = objective.heads
    if heads is not None and shape.width % heads:
        raise UsageError(f"objective.heads {heads} does not divide the encoder's width {shape.width}")
    with torch.device("meta"):
        model = Classifier(replace(shape, pool_heads=0), objective.classes, heads)
    model.to_empty(device="cpu")
    init_weights(model, config.seed)
    if source is not None and not resuming:
        weights = {key: value.float() for key, value in source.state_dict().items() if not key.startswith("head.")}
        model.encoder.load_state_dict(weights)
    if objective.freeze:
        model.encoder.requires_grad_(False)
    return model


def count_classes(config: Config) -> int:
    """The largest label of the training shards + 1; of the shards only headers and labels are read.

    Raises:
        UsageError: no sample has a label.
    """
    from aimv2.data.shards.listing import list_shard

    largest = max(
        int(list_shard(shard)[2].max(initial=-1)) for shards in training_shards(config.data) for shard in shards
    )
    if largest < 1:
        names = ", ".join(source.path for source in training_sources(config.data))
        raise UsageError(
            f"data.train: labels missing: {names} has no KEY.cls with two classes or more; import a "
            "class-folder tree, or use objective.name=pretrain"
        )
    return largest + 1
