"""Groups of parameters by kind: what weight decay is for."""

from __future__ import annotations

from typing import Any

from torch import nn

from aimv2.config.schema import OptimConfig

DECAYED = (nn.Linear, nn.Conv2d, nn.Embedding)  # their matrices; norms, biases, positions and [BOS] are not decayed


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
