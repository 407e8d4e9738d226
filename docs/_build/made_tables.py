"""Text that replaces ``<!-- made: NAME -->`` on a page."""

from __future__ import annotations

import inspect

import torch

from aimv2 import api
from aimv2.commands.table import COMMANDS, function_name
from aimv2.models.aimv2 import AIMv2
from aimv2.models.sizes import SIZES, model_config

BYTES = 16  # per parameter: weight, gradient and AdamW state, fp32
RANKS = (1, 8, 64)


def made(name: str) -> str:
    """The text of a marker.

    Raises:
        KeyError: no such marker.
    """
    return {"memory": memory, "api": functions}[name]()


def memory() -> str:
    """Memory of weights, gradients and AdamW state of each size at 224 px (or its smallest), by ranks."""
    heads = [f"{ranks} rank{'s' * (ranks > 1)}" for ranks in RANKS]
    lines = [f"| size | encoder and decoder | {' | '.join(heads)} |", "|---|---|" + "---|" * len(RANKS)]
    for size in SIZES:
        if size in ("mini", "tiny"):
            continue
        with torch.device("meta"):
            model = AIMv2(*model_config(f"aimv2-{size}-patch14-224"))
        count = sum(parameter.numel() for parameter in model.parameters())
        gigabytes = [f"{count * BYTES / ranks / 1e9:.2f} GB" for ranks in RANKS]
        lines.append(f"| {size} | {count / 1e6:,.0f} M | {' | '.join(gigabytes)} |")
    return "\n".join(lines)


def functions() -> str:
    """The function of every command, for mkdocstrings."""
    return "\n".join(f"::: aimv2.api.{function_name(name)}" for name in COMMANDS)
