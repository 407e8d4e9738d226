"""AdamW with the paper's fully decoupled weight decay, and the groups of parameters it works on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from aimv2.config.schema import OptimConfig
from aimv2.models.lit import TunedLiT
from aimv2.models.probe_head import ProbeSweep
from aimv2.train.ema import local

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


def layer_of(name: str, depth: int) -> int:
    """How deep a parameter of the encoder lies: 0 for the patches, i + 1 for block i, depth + 1 for all behind them.

    Args:
        name: in the whole model.
        depth: blocks of the encoder.
    """
    parts = name.split(".")
    if parts[0] != "encoder" or parts[1] in ("norm", "head"):
        return depth + 1
    return int(parts[2]) + 1 if parts[1] == "blocks" else 0


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW.

    With ``decay=full`` a step does ``p *= 1 - weight_decay * lr / peak`` (AIMV2, Table A1), which is AdamW's rule with
    ``weight_decay / peak``.
    """
    strength = config.weight_decay
    if config.decay == "full" and strength:
        strength /= config.lr
    if isinstance(model, ProbeSweep):
        return torch.optim.AdamW(sweep_groups(model), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    groups = parameter_groups(model)
    groups[0]["weight_decay"], groups[1]["weight_decay"] = strength, 0.0
    if config.freeze_encoder:
        groups = split_encoder(model, groups)
    if config.layer_decay != 1:
        groups = split_by_layer(model, groups, config.layer_decay)
    groups = [{"scale": 1.0, **group} for group in groups if any(p.requires_grad for p in group["params"])]
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def sweep_groups(model: ProbeSweep) -> list[dict[str, Any]]:
    """Each head at its own peak rate and weight decay (``lr * decay``, as PyTorch means it; AIMV2, Table A2)."""
    groups = []
    for head, trial in zip(model.heads, model.trials):
        for group, decay in zip(parameter_groups(head), (trial.weight_decay, 0.0)):
            if group["params"]:
                groups.append({**group, "weight_decay": decay, "peak": trial.lr, "scale": 1.0})
    return groups


def split_encoder(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same groups, those of the encoder apart, with ``encoder``: what stands still in the first steps."""
    inside = {id(p) for p in model.encoder.parameters()}  # type: ignore[union-attr]
    out = []
    for group in groups:
        for encoder in (True, False):
            params = [p for p in group["params"] if (id(p) in inside) == encoder]
            name = f"{group['name']} {'encoder' if encoder else 'decoder'}"
            out.append({**group, "name": name, "params": params, "encoder": encoder})
    return out


def split_by_layer(model: nn.Module, groups: list[dict[str, Any]], decay: float) -> list[dict[str, Any]]:
    """The same groups cut by depth, each with ``scale``: its rate as a part of the last layer's."""
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


def hold_encoder(encoder: nn.Module) -> None:
    """Zeros for the gradients that a frozen encoder has not got, so that AdamW knows its weights from the first step."""
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def release_encoder(optimizer: torch.optim.AdamW) -> None:
    """Counts the encoder's steps from here: its moments are those of no step yet, also where a cooldown brought some."""
    for group in optimizer.param_groups:
        if group.get("encoder"):
            for parameter in group["params"]:
                for value in optimizer.state[parameter].values():
                    value.zero_()


def hold_scale(model: TunedLiT) -> None:
    """After a step: puts the learned scale back into its range. Outside it would get no gradient, and stay there."""
    local(model.log_scale).clamp_(0, model.max_log_scale)


def step_unless(
    optimizer: torch.optim.AdamW, broken: torch.Tensor, rate: Callable[[float | None], float], frozen: bool = False
) -> None:
    """One step, left out on the device where ``broken`` (float32 [], 1.0 or 0.0) is 1: no wait for it.

    ``rate`` gives the learning rate for a group's own peak (None: the run's); with ``frozen`` that of the encoder is 0.
    """
    for group in optimizer.param_groups:
        held = frozen and group.get("encoder", False)
        group["lr"] = 0.0 if held else rate(group.get("peak")) * group["scale"]
    optimizer.grad_scale, optimizer.found_inf = None, broken  # type: ignore[attr-defined]
    optimizer.step()
