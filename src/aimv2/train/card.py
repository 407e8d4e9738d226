"""The card that travels with a model."""

from typing import Any

import aimv2
from aimv2.config.schema import Config
from aimv2.models.sizes import EncoderConfig
from aimv2.tables import figure
from aimv2.tasks.task import CardText


def model_card(config: Config, text: CardText, encoder: EncoderConfig, step: int, figures: dict[str, Any]) -> str:
    """README.md of a model folder: what it is, how it was trained, what was measured."""
    from aimv2.interop.public import public

    train, optim = config.train, config.optim
    measured = "\n".join(f"| {key} | {figure(key, value)} |" for key, value in figures.items()) or "| none yet | |"
    taken = f"{train.batch_size} pairs" if train.patch_budget is None else f"{train.patch_budget} patches"
    size = f"{encoder.image_size} px" if encoder.image_size else "any size"
    notes = f"- weights: moving average of the trained ones, decay {train.ema:g}\n" if train.ema else ""
    if optim.lora:
        notes += f"- encoder: that of init with low-rank updates, rank {optim.lora}, merged into its weights\n"
    return f"""# {encoder.name}

{text.what}, with aimv2 {aimv2.__version__}.

- {encoder.width} wide, {encoder.depth} blocks, patches of {encoder.patch_size} px, {size}
- step {step} of {train.steps}, {taken} a step, peak learning rate {optim.lr:g}, {train.precision}
- objective: {public(text.learned)}
{notes}
| measured on the validation split | |
|---|---|
{measured}

Load it with {text.use}.
"""
