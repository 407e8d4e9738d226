"""AdamW with the paper's fully decoupled weight decay, and the groups of parameters that it works on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from aimv2.config.schema import OptimConfig
from aimv2.models.groups import layer_of, parameter_groups


def make_optimizer(
    model: nn.Module, config: OptimConfig, groups: list[dict[str, Any]] | None = None
) -> torch.optim.AdamW:
    """Fused AdamW on a task's own groups, else on those by kind, layer and encoder.

    With ``decay=full`` a step does ``p *= 1 - weight_decay * lr / peak`` (AIMV2, Table A1), which is AdamW's rule with
    ``weight_decay / peak``.
    """
    return torch.optim.AdamW(
        groups or trained_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )


def trained_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of what learns, each with ``weight_decay`` and ``scale``, its learning rate as a fraction of the last layer's."""
    groups = parameter_groups(model, config)
    if config.freeze_encoder:
        groups = split_encoder(model, groups)
    if config.layer_decay != 1:
        groups = split_by_layer(model, groups, config.layer_decay)
    groups = [{"scale": 1.0, **group} for group in groups if any(p.requires_grad for p in group["params"])]
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    return groups


def split_encoder(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same groups, split into encoder and decoder by the flag ``encoder``: what is frozen in the first steps."""
    inside = {id(p) for p in model.encoder.parameters()}  # type: ignore[union-attr]
    out = []
    for group in groups:
        for encoder in (True, False):
            params = [p for p in group["params"] if (id(p) in inside) == encoder]
            name = f"{group['name']} {'encoder' if encoder else 'decoder'}"
            out.append({**group, "name": name, "params": params, "encoder": encoder})
    return out


def split_by_layer(model: nn.Module, groups: list[dict[str, Any]], decay: float) -> list[dict[str, Any]]:
    """The same groups split by depth, each with ``scale``: its learning rate as a fraction of the last layer's."""
    depth = len(model.encoder.blocks)  # type: ignore[arg-type, union-attr]
    layer = {
        id(p): layer_of(name.replace("_checkpoint_wrapped_module.", ""), depth) for name, p in model.named_parameters()
    }
    out = []
    for group in groups:
        for at in sorted({layer[id(p)] for p in group["params"]}):
            params = [p for p in group["params"] if layer[id(p)] == at]
            out.append({**group, "name": f"{group['name']} {at}", "params": params, "scale": decay ** (depth + 1 - at)})
    return out


def zero_frozen_grads(encoder: nn.Module) -> None:
    """Gives a frozen encoder zero gradients, so that AdamW has state for its weights from the first step."""
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def release_encoder(optimizer: torch.optim.AdamW) -> None:
    """Clears AdamW's state of the encoder as it starts to learn, also where a cooldown brought some."""
    for group in optimizer.param_groups:
        if group.get("encoder"):
            for parameter in group["params"]:
                for value in optimizer.state[parameter].values():
                    value.zero_()


def step_if_finite(
    optimizer: torch.optim.AdamW, broken: torch.Tensor, rate: Callable[[float | None], float], frozen: bool = False
) -> None:
    """One optimizer step, skipped on the device where ``broken`` (float32 [], 1.0 or 0.0) is 1, without a sync.

    Args:
        optimizer: of :func:`make_optimizer`.
        broken: whether a loss or the gradient is not finite.
        rate: learning rate for a group's own peak (None: the run's).
        frozen: that of the encoder is 0.
    """
    for group in optimizer.param_groups:
        held = frozen and group.get("encoder", False)
        group["lr"] = 0.0 if held else rate(group.get("peak")) * group["scale"]
    optimizer.grad_scale, optimizer.found_inf = None, broken  # type: ignore[attr-defined]
    optimizer.step()
