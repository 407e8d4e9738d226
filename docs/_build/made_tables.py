"""Text that replaces ``<!-- made: NAME -->`` on a page."""

from __future__ import annotations

import inspect

import torch

from aimv2 import api
from aimv2.commands.parse import doc_of, signature_of
from aimv2.commands.table import COMMANDS, function_name
from aimv2.models.aimv2 import AIMv2
from aimv2.models.cards import CARDS
from aimv2.models.sizes import SIZES, model_config

BYTES = 16  # per parameter: weight, gradient and AdamW state, fp32
RANKS = (1, 8, 64)


def made(name: str) -> str:
    """The text of a marker.

    Raises:
        KeyError: no such marker.
    """
    return {"memory": memory, "api": functions, "cards": cards}[name]()


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
    """The function of every command: its signature, what it does, and where its options are explained."""
    parts = []
    for name in COMMANDS:
        function, about = function_name(name), " ".join(doc_of(name).split("\n\n")[0].split())
        parameters = (str(one).replace("typing.", "") for one in signature_of(name).parameters.values())
        call = f"{function}({', '.join(parameters)})"
        page = f"verbs/{name.replace(' ', '-')}.md"
        parts.append(f"### {function}\n\n```python\n{call}\n```\n\n{about} Parameters: [`aimv2 {name}`]({page}).\n")
    return "\n".join(parts)


def cards() -> str:
    """The table of cards, with the data sheet of each row."""
    lines = ["| `--gpu` | card | bf16, TFLOP/s | fp8, TFLOP/s | memory, GB | bandwidth, TB/s | source |", "|---|---|" + "---:|" * 4 + "---|"]
    for name, card in CARDS.items():
        fp8 = "-" if card.fp8 is None else f"{card.fp8 / 1e12:,g}"
        numbers = f"{card.bf16 / 1e12:,g} | {fp8} | {card.memory / 1e9:g} | {card.bandwidth / 1e12:g}"
        lines.append(f"| `{name}` | {card.title} | {numbers} | {card.source} |")
    return "\n".join(lines)
