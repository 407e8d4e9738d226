"""What is learnt: a batch in, summed losses and their counts out."""

from __future__ import annotations

from aimv2.config import ObjectiveConfig
from aimv2.objectives.pretrain import PretrainObjective
from aimv2.objectives.probe import ProbeObjective, SweepObjective

Objective = PretrainObjective | ProbeObjective | SweepObjective


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a configuration names."""
    return ProbeObjective(config) if config.name == "probe" else PretrainObjective(config)
