"""The baseline of verbs that need texts: the same model, whose encoder has seen nothing."""

from __future__ import annotations

from copy import deepcopy
from typing import overload

from aimv2.errors import UsageError, nearest
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import build
from aimv2.models.lit import LiT

BASELINE = "random"


def check_baselines(given: str | None) -> bool:
    """Whether the baseline is asked for.

    Raises:
        UsageError: another one; raw pixels have no place before a decoder or beside a text tower.
    """
    if given is None:
        return False
    if given.strip() != BASELINE:
        why = "raw pixels can't stand in for an encoder that texts were learnt with; " if "pixels" in given else ""
        raise UsageError(f"--baselines {given}: {why}{BASELINE} is expected{nearest(given, (BASELINE,))}")
    return True


@overload
def with_untrained_encoder(model: AIMv2, seed: int = 0) -> AIMv2: ...
@overload
def with_untrained_encoder(model: LiT, seed: int = 0) -> LiT: ...
def with_untrained_encoder(model: AIMv2 | LiT, seed: int = 0) -> AIMv2 | LiT:
    """A copy with random weights in its encoder; decoder, head and text tower keep theirs."""
    twin = deepcopy(model)
    device = next(model.encoder.parameters()).device
    twin.encoder.load_state_dict(build(model.encoder.config, None, seed).to(device).state_dict())
    return twin.eval()
