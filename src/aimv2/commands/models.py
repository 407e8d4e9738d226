"""``aimv2 models``: every model by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from aimv2.tables import TextTable

EXAMPLES = "aimv2 models --json"


@dataclass(kw_only=True)
class ModelsOptions:
    """List every model: parameters, GFLOPs per image, input size; licence and revision of released ones."""


def run(options: ModelsOptions) -> dict[str, Any]:
    from aimv2.interop import hub
    from aimv2.models.sizes import MODELS, encoder_flops, encoder_parameters

    rows = []
    for name in sorted({**MODELS, **dict.fromkeys(hub.RELEASED)}, key=lambda name: (name not in hub.RELEASED,)):
        shape = hub.shape_of(name) if name in hub.RELEASED else MODELS[name][0]
        pair = name.endswith("-lit")
        rows.append(
            {
                "name": name,
                "parameters": hub.PAIR_PARAMETERS if pair else encoder_parameters(shape),
                "gflop_an_image": round(encoder_flops(shape) / 1e9, 2),
                "input": f"{shape.image_size} px" if shape.image_size else "any size",
                "patch": shape.patch_size,
                "licence": hub.LICENCE if name in hub.RELEASED else None,
                "revision": hub.RELEASED.get(name),
            }
        )
    return {"models": rows}


def render(result: dict[str, Any], console: Console) -> None:
    """One line per model; released ones first."""
    heads = ("name", "params", "GFLOP", "input", "licence")
    table = TextTable(heads, right=("params", "GFLOP"), whole=heads)
    for row in result["models"]:
        flops = row["gflop_an_image"]
        size, flops = f"{row['parameters'] / 1e6:,.1f}M", f"{flops:,.0f}" if flops >= 100 else f"{flops:.3g}"
        table.rows.append([row["name"], size, flops, row["input"], row["licence"] or "-"])
    console.print(table.to_text())
    console.print("GFLOP: per image (native: 256 patches). With a licence: released, load_model")
    console.print("takes the name (--json adds the pinned revision). Without: create_model gives it")
    console.print("with random weights.")
