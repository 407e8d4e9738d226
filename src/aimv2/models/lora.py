"""Low-rank updates of the encoder's products (LoRA, arXiv 2106.09685), through ``peft``: ``W x + B (A x)``, W frozen."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from aimv2.errors import UsageError
from aimv2.models.encoder import VisionEncoder

TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate_up|down))"
BASE, LEFT, RIGHT = ".base_layer.weight", ".lora_B.default.weight", ".lora_A.default.weight"


def add_updates(encoder: VisionEncoder, rank: int, seed: int) -> None:
    """Puts updates beside every product of the blocks, in place, and freezes what was there; B starts at zero.

    Args:
        encoder: with its weights.
        rank: of A [rank, in] and B [out, rank]; their product counts as it is (peft's alpha equals the rank).
        seed: of A.

    Raises:
        UsageError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise UsageError("optim.lora needs the package peft: pip install 'aimv2[peft]'")
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), encoder)


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights ``W + B A`` by plain names, of the weights of an adapted model; what has no update stays."""
    plain = {}
    for key, value in weights.items():
        if key.endswith(BASE):
            name = key.removesuffix(BASE)
            plain[name + ".weight"] = value + weights[name + LEFT] @ weights[name + RIGHT]
        elif not key.endswith((LEFT, RIGHT)):
            plain[key] = value
    return plain
