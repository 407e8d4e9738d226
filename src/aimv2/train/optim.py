"""AdamW with the paper's fully decoupled weight decay, and the groups of parameters it works on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aimv2.config import OptimConfig

DECAYED = (nn.Linear, nn.Conv2d, nn.Embedding)  # their matrices; norms, biases, positions and [BOS] are not decayed


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Decayed and undecayed parameters: every parameter once, asserted.

    Returns:
        two groups with ``name`` and ``params``, in the model's order.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            (decayed if isinstance(module, DECAYED) and name == "weight" else plain).append(parameter)
    every = [id(p) for p in model.parameters()]
    assert sorted(map(id, decayed + plain)) == sorted(every), "groups must partition the parameters"
    return [{"name": "decayed", "params": decayed}, {"name": "plain", "params": plain}]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW.

    With ``decay=full`` a step does ``p *= 1 - weight_decay * lr / peak`` (AIMV2, Table A1), which is AdamW's rule with
    ``weight_decay / peak``.
    """
    strength = config.weight_decay
    if config.decay == "full" and strength:
        strength /= config.lr
    groups = parameter_groups(model)
    groups[0]["weight_decay"], groups[1]["weight_decay"] = strength, 0.0
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def step_unless(optimizer: torch.optim.AdamW, broken: torch.Tensor, lr: float) -> None:
    """One step at rate ``lr``, left out on the device where ``broken`` (float32 [], 1.0 or 0.0) is 1: no wait for it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale, optimizer.found_inf = None, broken  # type: ignore[attr-defined]
    optimizer.step()
