"""LoRA on the encoder's linears (arXiv 2106.09685), through ``peft``: ``W x + B (A x)``, W frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from aimv2.errors import need
from aimv2.models.encoder import VisionEncoder

TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate_up|down))"
BASE, LEFT, RIGHT = ".base_layer.weight", ".lora_B.default.weight", ".lora_A.default.weight"


def add_lora(encoder: VisionEncoder, rank: int, seed: int) -> None:
    """Add LoRA to every linear of the blocks, in place, and freeze the original weights; B starts at zero.

    Args:
        encoder: encoder with its weights.
        rank: rank of A [rank, in] and B [out, rank]; their product is not scaled (peft's alpha equals the rank).
        seed: seed for A.

    Raises:
        UsageError: peft is not installed.
    """
    need("peft", "peft", "optim.lora")
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), encoder)


def merge_lora(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights ``W + B A`` under plain names, from the weights of a model with LoRA; other weights pass unchanged."""
    plain = {}
    for key, value in weights.items():
        if key.endswith(BASE):
            name = key.removesuffix(BASE)
            plain[name + ".weight"] = value + weights[name + LEFT] @ weights[name + RIGHT]
        elif not key.endswith((LEFT, RIGHT)):
            plain[key] = value
    return plain
