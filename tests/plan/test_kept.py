"""The arithmetic of a block's memory equals what autograd keeps of a real block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aimv2.models import layers
from aimv2.models.layers import Block, Packed
from aimv2.plan.memory import Program, kept_by_block, parameters_of

WIDTH, HEADS, HIDDEN = 256, 4, 704
PAIRS, PATCHES, TEXT, CAPTION, KEPT = 2, 64, 32, 44, 60


def kept_of(forward: Callable[[], Tensor], own: set[int]) -> int:
    """Bytes of the storages that a forward pass keeps for its backward pass, apart from ``own``."""
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return sum(size for place, size in found.items() if place not in own)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_an_eager_block_keeps_what_is_computed(
    half: bool, fused: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 0 if fused else 4096
    monkeypatch.setattr(layers, "MATMUL_LENGTH", {False: length, True: length})
    block = Block(WIDTH, HEADS, HIDDEN)
    rows = PAIRS * PATCHES + CAPTION if packed else PAIRS * PATCHES
    shape = (rows, WIDTH) if packed else (PAIRS, PATCHES, WIDTH)
    x = torch.randn(shape, requires_grad=True) * 1
    mask = "causal" if packed else torch.ones(PAIRS, 1, PATCHES, PATCHES, dtype=torch.bool)
    own = {part.untyped_storage().data_ptr() for part in block.parameters()}
    if isinstance(mask, Tensor):
        own.add(mask.untyped_storage().data_ptr())
    layout = Packed(torch.arange(CAPTION), PAIRS, PATCHES, TEXT) if packed else None
    keep = torch.arange(KEPT) if packed else None
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = kept_of(lambda: block(x, mask, layout, keep), own)
    found -= 2 * parameters_of(block)[1] if half else 0  # the casts of its weights are counted elsewhere
    positions = PATCHES + TEXT if packed else PATCHES
    wanted = kept_by_block(
        block, rows, KEPT if packed else rows, PAIRS * positions, positions, PAIRS * TEXT if packed else None,
        Program(half, False, length, fused_norm=False),
    )  # fmt: skip
    assert found == pytest.approx(wanted, rel=0.01)
