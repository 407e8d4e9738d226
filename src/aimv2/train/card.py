"""The card that travels with a model."""

from typing import Any

import aimv2
from aimv2.config import Config
from aimv2.models.sizes import EncoderConfig


def model_card(config: Config, encoder: EncoderConfig, step: int, figures: dict[str, Any]) -> str:
    """README.md of a model folder: what it is, how it was trained, what was measured."""
    train, optim = config.train, config.optim
    measured = "\n".join(f"| {key} | {value:.4f} |" for key, value in figures.items()) or "| none yet | |"
    size = f"{encoder.image_size} px" if encoder.image_size else "any size"
    return f"""# {encoder.name}

AIMV2 vision encoder with its multimodal decoder, pre-trained with aimv2 {aimv2.__version__}.

- {encoder.width} wide, {encoder.depth} blocks, patches of {encoder.patch_size} px, {size}
- step {step} of {train.steps}, {train.batch_size} pairs a step, peak learning rate {optim.lr:g}, {train.precision}
- objective: {config.objective.targets}, alpha {config.objective.alpha:g}, {config.objective.attention} attention

| measured on the validation split | |
|---|---|
{measured}

Load it with `aimv2.load_model(FOLDER)` (encoder) or `aimv2.load_model(FOLDER, decoder=True)`.
"""
