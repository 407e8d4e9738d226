"""``aimv2 detect train``: a detector, a run of ``objective.name=detect``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aimv2.commands.pretrain import PretrainOptions, run_as

EXAMPLES = """\
aimv2 detect train --init runs/mine --data.train boxes --dry-run
aimv2 detect train --init runs/mine --data.train boxes --run runs/detector
aimv2 detect train --config detect-grounding --init M --run R
aimv2 detect train --run runs/detector --resume"""
FIRST = (
    "config run data.train init objective.head objective.freeze train.steps train.batch_size resume overwrite dry_run"
)


@dataclass(kw_only=True)
class DetectTrainOptions(PretrainOptions):
    """Train a detector of classes, phrases or masks on the feature pyramid of an encoder.

    The encoder of init is frozen by default. The run's model folder opens with transformers once aimv2 is imported.

    Args:
        config: YAML recipe, by path or by a name of `aimv2 recipes`; without one twelve passes over the data
    """


def run(options: DetectTrainOptions) -> dict[str, Any]:
    """As :func:`aimv2.commands.pretrain.run`, whose run it is; another ``objective.name`` is a UsageError."""
    return run_as(options, "detect", "detect train")
