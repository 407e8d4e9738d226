"""Groups of parameters by kind: what weight decay is for."""

from __future__ import annotations

from typing import Any

from torch import nn

from aimv2.config.schema import OptimConfig

DECAYED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)  # their matrices; not norms, biases, positions


def parameter_groups(model: nn.Module, config: OptimConfig | None = None) -> list[dict[str, Any]]:
    """Decayed and undecayed parameters: every parameter once, asserted.

    Returns:
        two groups with ``name`` and ``params``, in the model's order, and with ``config`` their ``weight_decay``.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    known = set[int]()  # two modules may share a parameter
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in known:
                continue
            known.add(id(parameter))
            (decayed if isinstance(module, DECAYED) and name == "weight" else plain).append(parameter)
    every = [id(p) for p in model.parameters()]
    assert sorted(map(id, decayed + plain)) == sorted(every), "groups must partition the parameters"
    groups: list[dict[str, Any]] = [{"name": "decayed", "params": decayed}, {"name": "plain", "params": plain}]
    if config is not None:
        strength = config.weight_decay / (config.lr if config.decay == "full" else 1)
        groups[0]["weight_decay"], groups[1]["weight_decay"] = strength, 0.0
    return groups


def layer_of(name: str, depth: int) -> int:
    """Depth of a parameter: 0 for the patch embedding, i + 1 for block i, depth + 1 for everything after them.

    Args:
        name: in the whole model.
        depth: blocks of the encoder.
    """
    parts = name.split(".")
    if parts[0] != "encoder" or parts[1] in ("norm", "head"):
        return depth + 1
    return int(parts[2]) + 1 if parts[1] == "blocks" else 0
