"""The card that travels with a model."""

from pathlib import Path
from typing import Any

import aimv2
from aimv2.config.schema import Config
from aimv2.models.sizes import EncoderConfig


def model_card(config: Config, encoder: EncoderConfig, step: int, figures: dict[str, Any]) -> str:
    """README.md of a model folder: what it is, how it was trained, what was measured."""
    train, optim = config.train, config.optim
    measured = "\n".join(f"| {key} | {value:.4f} |" for key, value in figures.items()) or "| none yet | |"
    taken = f"{train.batch_size} pairs" if train.patch_budget is None else f"{train.patch_budget} patches"
    size = f"{encoder.image_size} px" if encoder.image_size else "any size"
    objective, use = config.objective, "`aimv2.load_model(FOLDER)` (encoder)"
    if objective.name == "probe":
        what = "AIMV2 vision encoder with an attentive probe" + ("" if objective.freeze else ", both trained on labels")
        learnt = f"classes, {'frozen encoder' if objective.freeze else 'encoder trained'}, init {config.init}"
    elif objective.name == "distill":
        what = "AIMV2 vision encoder with its multimodal decoder, pre-trained as the student of a frozen teacher"
        learnt = (
            f"{objective.targets}, alpha {objective.alpha:g}, {objective.attention} attention; patch features of "
            f"{Path(objective.teacher or '').name} (weights {objective.teacher_sha256}), {objective.teacher_loss} loss, weight "
            f"{objective.teacher_weight:g}, {objective.teacher_view} view"
        )
        use += " or `aimv2.load_model(FOLDER, decoder=True)`"
    elif objective.name == "contrastive":
        what = "AIMV2 image-text pair: a text tower and a pooling head tuned to a frozen encoder"
        learnt = f"contrastive, {objective.contrast}; frozen encoder, init {config.init}"
        use = "`aimv2.load_model(FOLDER)` (both towers), measure it with `aimv2 zeroshot` and `aimv2 retrieve`"
    else:
        what = "AIMV2 vision encoder with its multimodal decoder, pre-trained"
        learnt = f"{objective.targets}, alpha {objective.alpha:g}, {objective.attention} attention"
        use += " or `aimv2.load_model(FOLDER, decoder=True)`"
    notes = f"- weights: moving average of the trained ones, decay {train.ema:g}\n" if train.ema else ""
    if optim.lora:
        notes += f"- encoder: that of init with low-rank updates, rank {optim.lora}, merged into its weights\n"
    return f"""# {encoder.name}

{what}, with aimv2 {aimv2.__version__}.

- {encoder.width} wide, {encoder.depth} blocks, patches of {encoder.patch_size} px, {size}
- step {step} of {train.steps}, {taken} a step, peak learning rate {optim.lr:g}, {train.precision}
- objective: {learnt}
{notes}
| measured on the validation split | |
|---|---|
{measured}

Load it with {use}.
"""
