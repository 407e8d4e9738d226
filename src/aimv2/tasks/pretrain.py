"""The stage ``pretrain``: next patch and next token (AIMV2, Figure 1)."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from aimv2.config.schema import Config
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.distributed import World
from aimv2.interop.model_folder import checkpoints
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import build
from aimv2.models.lora import add_lora
from aimv2.models.sizes import DecoderConfig, EncoderConfig, model_config
from aimv2.objectives import Objective
from aimv2.objectives.pretrain import PretrainObjective
from aimv2.tasks.held_out import HeldOut, validate_pairs
from aimv2.tasks.init_weights import fill_from, origin_of, take_constants, take_shape


def reads_text(config: Config) -> bool:
    return config.objective.targets != "image"


def objective(config: Config) -> PretrainObjective:
    return PretrainObjective(config.objective)


def build_model(config: Config, tokenizer: Tokenizer | None, resuming: bool) -> AIMv2:
    """Random weights by ``seed``, under those of ``init``."""
    if config.init is not None and not resuming and config.model.name == "auto":
        take_shape(config)  # once: config.yaml keeps it
    model = build(*shapes(config, tokenizer.vocab_size if tokenizer else 1), config.seed)
    assert isinstance(model, AIMv2)
    if resuming and config.run and checkpoints(Path(config.run)):
        take_constants(model.encoder, origin_of(config.run).encoder)
    elif config.init is not None:
        fill_from(model, config.init, tokenizer, config)
    if config.optim.lora:
        add_lora(model.encoder, config.optim.lora, config.seed)
    return model


def validate(model: nn.Module, objective: Objective, data: HeldOut, config: Config, world: World) -> dict[str, float]:
    """Text and pixel losses; see :func:`aimv2.tasks.held_out.validate_pairs`."""
    assert isinstance(model, AIMv2)
    shape, patch = model.decoder.config, model.encoder.config.patch_size
    return validate_pairs(model, data, patch, config.eval.prefixes, world, shape.text, shape.pixels)


def shapes(config: Config, vocab_size: int) -> tuple[EncoderConfig, DecoderConfig]:
    """Encoder and decoder of a run: the table's row, the config's changes, and what the objective needs."""
    given = {
        key: value
        for key, value in vars(config.model).items()
        if value is not None and key not in ("name", "projection") and not key.startswith("text_")
    }
    decoder = {key.removeprefix("decoder_"): value for key, value in given.items() if key.startswith("decoder_")}
    encoder = {key: value for key, value in given.items() if not key.startswith("decoder_")}
    objective = config.objective
    scored = objective.targets == "image" or (objective.targets == "both" and objective.alpha > 0)
    decoder |= {"pixels": scored, "text": objective.targets != "image"}  # no head that gets no gradient
    decoder |= {"vocab_size": vocab_size, "max_text": config.data.max_tokens}
    return model_config(config.model.name, decoder, **encoder)
