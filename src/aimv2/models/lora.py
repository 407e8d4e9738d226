"""LoRA on linears (arXiv 2106.09685), through ``peft``: ``W x + B (A x)``, W frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aimv2.errors import need

TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate_up|down))"
BASE, LEFT, RIGHT = ".base_layer.weight", ".lora_B.default.weight", ".lora_A.default.weight"
BASE_BIAS = ".base_layer.bias"


def add_lora(model: nn.Module, rank: int, seed: int, targets: str | Sequence[str] = TARGETS) -> None:
    """Add LoRA to every linear of the blocks, in place, and freeze the original weights; B starts at zero.

    Args:
        model: encoder, or another model, with its weights.
        rank: rank of A [rank, in] and B [out, rank]; their product is not scaled (peft's alpha equals the rank).
        seed: seed for A.
        targets: names of the linears, or a pattern of them; those of an encoder by default.

    Raises:
        UsageError: peft is not installed.
    """
    need("peft", "peft", "optim.lora")
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chosen = targets if isinstance(targets, str) else list(targets)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen), model)


def merge_lora(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights ``W + B A`` under plain names, from the weights of a model with LoRA; other weights pass unchanged."""
    plain = {}
    for key, value in weights.items():
        if key.endswith(BASE):
            name = key.removesuffix(BASE)
            plain[name + ".weight"] = value + weights[name + LEFT] @ weights[name + RIGHT]
        elif not key.endswith((LEFT, RIGHT)):
            plain[key.replace(BASE_BIAS, ".bias")] = value
    return plain
