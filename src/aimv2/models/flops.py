"""FLOPs of a training step and peak FLOP/s of a device, from which MFU is computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from aimv2.models.layers import Block
from aimv2.models.lit import TunedLiT
from aimv2.models.sizes import encoder_flops


def _block_flops(block: Block, rows: float, length: float) -> float:
    """Forward FLOPs (2 per multiply-add) of a block over ``rows`` rows in sequences of ``length`` (full attention)."""
    width = block.attn.proj.in_features
    weights = 4 * width**2 + 3 * width * block.mlp.down.in_features
    return rows * (2 * weights + 4 * width * length)


def step_flops(model: Any, pairs: float, patches: float, tokens: float) -> float:
    """FLOPs of one training step (forward and backward = 3 forwards).

    A frozen teacher is not counted here: the distillation objective measures it with :func:`count_flops`.

    Args:
        model: any model that training builds.
        pairs: B.
        patches: I.
        tokens: real caption tokens of the whole batch.
    """
    from aimv2.models.classifier import Classifier  # here: the loop needs no model but its task's
    from aimv2.models.distilled import Distiller

    encoder = model.encoder
    if isinstance(model, Classifier):
        trained = any(parameter.requires_grad for parameter in encoder.parameters())
        return (3 if trained else 1) * pairs * encoder_flops(encoder.config)
    if isinstance(model, TunedLiT):
        return _pair_flops(model, pairs, tokens)
    decoder = model.decoder
    rows = pairs * patches
    total = float(rows * 2 * 3 * encoder.config.patch_size**2 * encoder.config.width)
    for block in encoder.blocks:
        total += _block_flops(block, rows, patches)
    if isinstance(model, Distiller):
        total *= 2 if model.whole else 1
        total += rows * 2 * model.to_teacher.weight.numel() if model.to_teacher is not None else 0
    total += rows * 2 * decoder.project.weight.numel()
    length = patches + tokens / pairs
    if decoder.config.text:
        for block in decoder.trunk.blocks:
            total += _block_flops(block, rows + tokens, length)
        total += tokens * 2 * decoder.text_head.linear.weight.numel()
    if hasattr(decoder, "pixel_trunk"):
        for block in decoder.pixel_trunk.blocks:
            total += _block_flops(block, rows, patches)
    if decoder.config.pixels:
        total += rows / 2 * 2 * decoder.pixel_head.weight.numel()
    return 3 * total


def _pair_flops(model: TunedLiT, pairs: float, tokens: float) -> float:
    """One forward of the frozen trunk (none where cached features are read) and 3 forwards of what is trained: pooling head,
    text tower, projections and the logits of all pairs."""
    image, width = model.image.config, model.image.config.width
    trunk = 0.0 if model.from_features else pairs * encoder_flops(image)
    rows, shared = pairs * image.patches, model.config.projection
    trained = rows * (2 * 2 * width**2 + 4 * width) + pairs * 2 * width**2  # keys and values; one query; output
    for block in model.text.blocks:
        trained += _block_flops(block, tokens, tokens / pairs)  # type: ignore[arg-type]  # maybe wrapped
    trained += pairs * 2 * shared * (width + model.config.text.width)
    trained += (1 if model.bias is not None else 2) * 2 * pairs**2 * shared
    return trunk + 3 * trained


def count_flops(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result of ``run`` and the FLOPs of its matmuls, convolutions and attention, for a model of any origin; 0 where it
    leaves PyTorch."""
    cpu = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)  # unknown to the counter

    def attention(query: Any, key: Any, value: Any, *more: Any, out_shape: Any = None, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    with FlopCounterMode(display=False, custom_mapping={cpu: attention} if cpu is not None else None) as counter:
        result = run()
    return result, float(counter.get_total_flops())


@cache
def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a large matmul: from a table for accelerators (bf16), measured on a CPU; None if unknown."""
    if device.type != "cpu":
        from aimv2.models.cards import card_of_device

        card = card_of_device(torch.cuda.get_device_name(device))
        return card.bf16 if card is not None else None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layer = nn.Linear(1024, 1024, bias=False).to(dtype)
    x = torch.randn(1024, 1024, dtype=dtype)
    best = float("inf")
    began = time.perf_counter()
    with torch.no_grad():
        for count in range(20):  # other processes may run meanwhile: the best counts
            if count >= 5 and time.perf_counter() - began > 0.2:
                break
            start = time.perf_counter()
            layer(x)
            best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
