"""The baseline of commands that need texts: the same model with an untrained encoder."""

from __future__ import annotations

from copy import deepcopy
from typing import overload

from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import build
from aimv2.models.lit import LiT

BASELINE = "random"


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
