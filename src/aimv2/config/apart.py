"""Checks that the tasks share whose models are those of transformers, and whose options only their own configuration holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aimv2.config.objective import refuse_decoder_options
from aimv2.errors import UsageError

if TYPE_CHECKING:
    from aimv2.config.schema import Config


def check_least(objective: Any, least: Mapping[str, float]) -> None:
    """Raises UsageError for an option of the section ``objective`` below its least value; None is none."""
    for key, low in least.items():
        value = getattr(objective, key)
        if value is not None and not value >= low:
            raise UsageError(f"objective.{key} must be at least {low:g}, got {value:g}", option=f"objective.{key}")


def refuse_own_training(config: Config, does: str) -> None:
    """Raises UsageError for options of an encoder under our decoder, but for ``optim.lora``, and for parts of its training.

    Args:
        config: of the run.
        does: what the task does instead, in words.
    """
    lora, config.optim.lora = config.optim.lora, 0
    try:
        refuse_decoder_options(config)
    finally:
        config.optim.lora = lora
    refused = {
        "train.compile on": config.train.compile == "on",
        "train.patch_budget": config.train.patch_budget is not None,
        "eval.knn": config.eval.knn,
        "eval.probe": config.eval.probe,
    }
    if name := next((name for name, there in refused.items() if there), None):
        raise UsageError(
            f"{name}: objective.name={config.objective.name} {does}, without it; leave it out",
            option=name.split()[0],
            code="conflict",
        )
