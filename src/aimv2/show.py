"""What a verb prints for people: tables that fit 80 columns, on standard output."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table


def show(name: str, result: dict[str, Any]) -> None:
    """Prints a verb's result."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if name == "compare":
        console.print(result["text"])
    elif name == "caption" and "figures" in result:
        from aimv2.evals.caption_score import render_scores

        console.print(render_scores(result))
    elif name == "caption":
        for row in result["captions"]:
            console.print(f"{row['image']}\t{row['caption']}")
        for row in result["rejected"]:
            Console(stderr=True, markup=False).print(f"{row['image']}: {row['reason']}")
    elif name == "models":
        show_models(console, result)
    elif name == "run":
        from aimv2.chain.report import as_text

        console.print(as_text(result))
    elif name == "data check":
        from aimv2.data.check import render_check

        console.print(render_check(result))
    elif "figures" in result and "protocol" in result:
        show_result(console, result)
    elif "config" in result and "from" in result:
        show_config(console, result)
    else:
        show_figures(console, result)


def show_result(console: Console, result: dict[str, Any]) -> None:
    """What was measured and how, the figures, then baselines and layers as rows."""
    figures, data = result["figures"], result["data"]
    console.print(
        f"{result['model']['name']} on {data.get('dataset') or data['name']}: {result['protocol'].get('name', result['verb'])}"
    )
    rows: list[tuple[str, str]] = []
    for key, value in figures.items():
        if isinstance(value, bool | int | str) or value is None:
            rows.append((key, str(value)))
        elif isinstance(value, float):
            rows.append((key, f"{value:.4f}"))
        elif isinstance(value, list) and value and all(isinstance(x, int | float) for x in value):
            rows.append((key, "  ".join(f"{x:.4f}" for x in value)))
        elif isinstance(value, dict) and key in ("by_layer", "image_to_text", "text_to_image", "by_shots"):
            rows += [(f"{key} {name}", f"{x:.4f}") for name, x in value.items() if isinstance(x, float)]
    for chosen in figures.get("chosen", [])[:1]:
        rows.append(("chosen", "  ".join(f"{key} {value}" for key, value in chosen.items())))
    for name, other in figures.get("baselines", {}).items():
        shown = next(((key, value) for key, value in other.items() if isinstance(value, float)), None)
        if shown is not None:
            rows.append((f"baseline: {name}", f"{shown[0]} {shown[1]:.4f}"))
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, text in rows:
        table.add_row(key, text)
    console.print(table)


def show_models(console: Console, result: dict[str, Any]) -> None:
    """A line a model; released ones first."""
    table = Table(box=None, pad_edge=False)
    for head, side in (
        ("name", "left"),
        ("params", "right"),
        ("GFLOP", "right"),
        ("input", "left"),
        ("licence", "left"),
    ):
        table.add_column(head, justify="right" if side == "right" else "left", no_wrap=True)
    for row in result["models"]:
        flops = row["gflop_an_image"]
        size, flops = f"{row['parameters'] / 1e6:,.1f}M", f"{flops:,.0f}" if flops >= 100 else f"{flops:.3g}"
        table.add_row(row["name"], size, flops, row["input"], row["licence"] or "-")
    console.print(table)
    console.print("GFLOP: of one image (native: 256 patches). With a licence: released, load_model")
    console.print("takes the name (--json adds the pinned revision). Without: create_model gives it")
    console.print("with random weights.")


def show_config(console: Console, result: dict[str, Any]) -> None:
    """``key: value  # where it came from``, which is a recipe too."""
    for key, value in result["config"].items():
        console.print(f"{key + ':':<28} {json.dumps(value):<34} # {result['from'][key]}")
    console.print(f"# learning rate: {curve(result['learning_rate'])}")


def show_figures(console: Console, result: dict[str, Any]) -> None:
    """Two columns, then what does not fit a cell."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in result.items():
        if isinstance(value, str | int | float | bool) or value is None:
            table.add_row(
                key, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
            )
    console.print(table)
    if "learning_rate" in result:
        console.print(f"learning rate: {curve(result['learning_rate'])}")
    for row in result.get("captions", []):
        console.print(f"{row['key']}: {row['written']}  |  {row['reference']}")


def curve(points: list[dict[str, float]]) -> str:
    """step:rate pairs in a line."""
    return "  ".join(f"{int(point['step'])}: {point['lr']:.2e}" for point in points)
