"""Create models by name, with random weights."""

from typing import Any

import torch
from torch import nn

from aimv2.errors import UsageError
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.init import init_weights
from aimv2.models.sizes import DecoderConfig, EncoderConfig, model_config


def build(encoder: EncoderConfig, decoder: DecoderConfig | None, seed: int | None = None) -> nn.Module:
    """Build an encoder, or with a decoder an AIMv2, on the meta device and initialise it in place."""
    with torch.device("meta"):
        model = VisionEncoder(encoder) if decoder is None else AIMv2(encoder, decoder)
    model.to_empty(device=torch.get_default_device())
    init_weights(model, seed)
    return model


def create_model(name: str, decoder: bool = False, seed: int | None = None, **overrides: Any) -> nn.Module:
    """Create a model with random weights.

    Args:
        name: one of :func:`aimv2.list_models`.
        decoder: return the whole AIMv2 (its ``.encoder`` is the VisionEncoder) instead of the encoder.
        seed: random seed for the weights; None uses torch's global generator.
        **overrides: values of :class:`EncoderConfig` to replace (``image_size=112``); ``decoder_NAME`` replaces a value
            of :class:`DecoderConfig` (``decoder_depth=2``).

    Returns:
        VisionEncoder, or AIMv2 where ``decoder`` is true, in training mode, fp32.

    Raises:
        UsageError: an unknown name or option, numbers that do not fit each other; ``pretrained``, which other libraries have here.
    """
    if "pretrained" in overrides:
        raise UsageError(
            f"pretrained={overrides['pretrained']}: create_model makes random weights; aimv2.load_model({name!r}) loads those "
            "that were released, and aimv2.load_model(PATH) your own",
            option="pretrained",
            code="unsupported",
        )
    parts = {key.removeprefix("decoder_"): overrides.pop(key) for key in list(overrides) if key.startswith("decoder_")}
    encoder, shape = model_config(name, parts, **overrides)
    return build(encoder, shape if decoder else None, seed)
