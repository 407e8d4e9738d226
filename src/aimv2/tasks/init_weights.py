"""Starting a run from another model: its encoder, its decoder where it has one, its shape, its tokenizer.

Reads weights and JSON only; one tensor is held in addition to the model at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from aimv2.config.schema import Config
from aimv2.data.text.tokenizer import Tokenizer, load_tokenizer
from aimv2.errors import UsageError
from aimv2.interop.layouts import Rules
from aimv2.interop.load import ModelSource, Weights, check_all_read, detect, fill_tensor, has_decoder, locate, plan
from aimv2.interop.shapes import config_name
from aimv2.io import say
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.positions import resize_positions
from aimv2.models.sizes import MODELS, DecoderConfig, EncoderConfig

SHAPE = ("patch_size", "width", "depth", "heads", "hidden")  # of the encoder: what must be equal
SIGHT = ("image_size", "min_patches", "max_patches")  # of the encoder: what may change
TRUNK = ("width", "depth", "heads", "hidden", "separate")  # of the decoder: what model.decoder_* changes
POSITION = "encoder.patch_embed.position"


@dataclass(frozen=True)
class Origin:
    """A model to start from, described without reading its weights.

    Attributes:
        at: its files.
        encoder: its shape, without a pooling head.
        decoder: its shape, None where there is none.
        rules: key of an AIMv2 -> keys of the file.
    """

    at: ModelSource
    encoder: EncoderConfig
    decoder: DecoderConfig | None
    rules: Rules


def origin_of(given: str) -> Origin:
    """Locates the model of ``init`` in any layout: ours with or without a decoder, a release, a pair's image side.

    Raises:
        UsageError: nothing there, or no model.
    """
    at = locate(given)
    with Weights(at.files) as weights:
        found = detect(at, weights)
        model, rules, skip = plan(at, weights, found, has_decoder(at))
        check_all_read(weights, rules, skip)
    encoder = model if isinstance(model, VisionEncoder) else model.encoder
    assert isinstance(encoder, VisionEncoder)
    return Origin(
        at,
        replace(encoder.config, pool_heads=0),
        model.decoder.config if isinstance(model, AIMv2) else None,
        {_whole_key(key, model): names for key, names in rules.items()},
    )


def _whole_key(key: str, model: nn.Module) -> str:
    """The key in an AIMv2 of a key of a bare encoder, or of a pair (whose image side is the encoder)."""
    if isinstance(model, AIMv2):
        return key
    return "encoder." + key if isinstance(model, VisionEncoder) else key.replace("image.", "encoder.", 1)


# ---- shape and tokenizer ----


def take_shape(config: Config) -> None:
    """``model.name`` auto: writes the shape of ``init`` into ``config.model``, under what is given there already."""
    assert config.init is not None
    origin, model = origin_of(config.init), config.model
    given = {key: getattr(model, key) for key in (*SHAPE, *SIGHT) if getattr(model, key) is not None}
    shape = replace(origin.encoder, **given)
    model.name = row_for(shape, origin.encoder.name)
    encoder, decoder = MODELS[model.name]
    for key in (*SHAPE, *SIGHT):
        if getattr(shape, key) != getattr(encoder, key):
            setattr(model, key, getattr(shape, key))
    for key in TRUNK if origin.decoder is not None and not config.optim.fresh_decoder else ():
        value = getattr(origin.decoder, key)
        if getattr(model, f"decoder_{key}") is None and value != getattr(decoder, key):
            setattr(model, f"decoder_{key}", value)


def row_for(shape: EncoderConfig, name: str) -> str:
    """The row of the sizes table that describes a shape: its own, that of ``name``, or the one nearest in width."""
    rows = {key: row for key, (row, _) in MODELS.items() if (row.image_size is None) == (shape.image_size is None)}
    for known in (config_name(shape), name):
        if known in rows:
            return known
    return min(rows, key=lambda key: abs(rows[key].width - shape.width))


def tokenizer_of_init(config: Config) -> Path | None:
    """The folder of ``init`` where it holds a tokenizer and a decoder that is kept; else None."""
    if config.init is None or config.optim.fresh_decoder:
        return None
    at = locate(config.init)
    return at.folder if (at.folder / "tokenizer_config.json").is_file() and has_decoder(at) else None


# ---- weights ----


def fill_from(model: AIMv2, given: str, tokenizer: Tokenizer | None, config: Config) -> None:
    """Copies the encoder of another model, and its decoder where it has one (unless ``optim.fresh_decoder``).

    Learned positions are interpolated to the grid of ``model``; for a native model they are left out.

    Args:
        model: with real weights; what the other model lacks keeps them.
        given: what ``init`` says.
        tokenizer: of the run.
        config: of the run.

    Raises:
        UsageError: nothing there, or a shape or a tokenizer that does not fit; names the option to change.
    """
    origin = origin_of(given)
    check_encoder(origin, model.encoder.config)
    parts: tuple[str, ...] = ("encoder.",)
    if origin.decoder is not None and not config.optim.fresh_decoder:
        check_decoder(origin, origin.decoder, model.decoder.config, tokenizer, config)
        parts = ("encoder.", "decoder.")
    with Weights(origin.at.files) as weights:
        for key, target in model.state_dict().items():
            if key == POSITION and origin.encoder.image_size != model.encoder.config.image_size:
                fill_positions(target, weights, origin.rules[key][0])
            elif key.startswith(parts):
                fill_tensor(target, weights, origin.rules[key])
    if origin.encoder.image_size is not None and model.encoder.config.image_size is None:
        say(f"init {given}: its learned positions are left out; a native model has sine-cosine positions")
    take_constants(model.encoder, origin.encoder)


@torch.no_grad()
def fill_positions(target: Tensor, weights: Weights, name: str) -> None:
    """Learned positions of another grid into ``target`` [1, I, D]: bicubic, antialiased."""
    side = int(target.shape[1] ** 0.5)
    stored = weights.get(name)
    target.copy_(resize_positions(stored.float().reshape(1, -1, target.shape[2]), (side, side)))


def take_constants(encoder: VisionEncoder, like: EncoderConfig) -> None:
    """Mean and std of the images that the other model was trained on."""
    encoder.config = replace(encoder.config, mean=like.mean, std=like.std)
    encoder.fill_constants()


# ---- what does not fit ----


def check_encoder(origin: Origin, wanted: EncoderConfig) -> None:
    """Raises UsageError where the encoders differ in more than their image size."""
    for key in SHAPE:
        there, here = getattr(origin.encoder, key), getattr(wanted, key)
        if there != here:
            raise UsageError(
                f"init {origin.at.given}: its encoder has {key} {there}, model.{key} is {here}; leave model.name and its "
                "sizes out to take the shape of init"
            )
    if origin.encoder.image_size is None and wanted.image_size is not None:
        raise UsageError(
            f"init {origin.at.given}: a native model, which has no learned positions; model.image_size "
            f"{wanted.image_size} needs them: give a native model.name, or start from a model of one image size",
            code="missing",
        )


def check_decoder(
    origin: Origin, there: DecoderConfig, here: DecoderConfig, tokenizer: Tokenizer | None, config: Config
) -> None:
    """Raises UsageError where the decoders or the tokenizers differ."""
    given, fresh = origin.at.given, "optim.fresh_decoder=true takes only the encoder"
    for key in ("pixels", "text"):
        if getattr(there, key) != getattr(here, key):
            has = "has" if getattr(there, key) else "lacks"
            head = {"pixels": "pixel", "text": "text"}[key]
            raise UsageError(
                f"init {given}: its decoder {has} the {head} head, and objective.targets={config.objective.targets} with "
                f"objective.alpha={config.objective.alpha:g} asks for the opposite; {fresh}"
            )
    for key in TRUNK:
        if getattr(there, key) != getattr(here, key):
            raise UsageError(
                f"init {given}: its decoder has {key} {getattr(there, key)}, model.decoder_{key} is {getattr(here, key)}; "
                f"change it, or {fresh}"
            )
    if not here.text:
        return
    if there.max_text != here.max_text:
        raise UsageError(
            f"init {given}: its decoder has {there.max_text} caption positions, data.max_tokens is {here.max_text}; "
            f"use data.max_tokens={there.max_text}, or {fresh}"
        )
    assert tokenizer is not None
    folder = origin.at.folder
    own = load_tokenizer(folder) if (folder / "tokenizer_config.json").is_file() else None
    same = own is None or own.fingerprint() == tokenizer.fingerprint()
    if there.vocab_size != here.vocab_size or not same:
        take = (
            f"use data.tokenizer={folder}" if own else "give the tokenizer that it was trained with as data.tokenizer"
        )
        raise UsageError(
            f"init {given}: its decoder was trained with a tokenizer of {there.vocab_size} tokens, data.tokenizer "
            f"{config.data.tokenizer} is another one of {here.vocab_size}; {take}, or {fresh}",
            code="mismatch",
        )
