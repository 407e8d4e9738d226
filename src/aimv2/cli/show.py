"""What a verb prints for people: tables that fit 80 columns, on standard output."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 80
PLACES = ("default", "command line", "demo", "image size", "$AIMV2_DATA")  # of values; else a recipe's file
SHORT = 12  # values of a list that fit a line; longer ones are in the result file
MEASURES = ("top1", "miou", "rmse")  # how columns of a sweep end that are figures, not what was tried


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
        from aimv2.pipeline.report import as_text

        console.print(as_text(result))
    elif name == "data check":
        from aimv2.data.shards.check import render_check

        console.print(render_check(result))
    elif name == "doctor":
        from aimv2.doctor.examine import render

        console.print(render(result), soft_wrap=False, width=min(console.width, WIDTH))
    elif "figures" in result and "protocol" in result:
        show_result(console, result)
    elif "config" in result and "from" in result:
        show_config(console, result)
    else:
        show_figures(console, result)


def show_result(console: Console, result: dict[str, Any]) -> None:
    """What was measured and how, the figures, baselines and layers as rows, then the sweep as a table."""
    figures, data = result["figures"], result["data"]
    console.print(
        f"{result['model']['name']} on {data.get('dataset') or data['name']}: {result['protocol'].get('name', result['verb'])}"
    )
    rows: list[tuple[str, str]] = []
    for key, value in figures.items():
        if isinstance(value, float):
            rows.append((key, share(figures, key)))
        elif isinstance(value, bool | int | str):
            rows.append((key, str(value)))
        elif isinstance(value, list) and 0 < len(value) <= SHORT and not key.endswith("_interval"):
            if all(isinstance(x, int | float) for x in value) and key != "chosen":
                rows.append((key, "  ".join(f"{x:.4f}" if isinstance(x, float) else str(x) for x in value)))
        elif isinstance(value, dict) and key in ("by_layer", "image_to_text", "text_to_image"):
            rows += [(f"{key} {name}", share(value, name)) for name, x in value.items() if isinstance(x, float)]
    said = [in_words(chosen) for chosen in figures.get("chosen", [])]
    if said:
        rows.append(("chosen", ";  ".join(dict.fromkeys(said))))  # by seed, where they differ
    for name, other in figures.get("baselines", {}).items():
        first = next((key for key, value in other.items() if isinstance(value, float)), None)
        if first is not None:
            rows.append((f"baseline: {name}", f"{first} {share(other, first)}"))
        for way in ("image_to_text", "text_to_image"):
            rows += [
                (f"baseline: {name}, {way} {key}", share(other[way], key))
                for key in other.get(way, {})
                if key.endswith("@1")
            ]
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, text in rows:
        table.add_row(key, text)
    console.print(table)
    show_sweep(console, figures)


def share(figures: dict[str, Any], key: str) -> str:
    """A figure, and its interval where it has one."""
    low, high = figures.get(f"{key}_interval") or (None, None)
    return f"{figures[key]:.4f}" + (f" ({low:.4f} to {high:.4f})" if low is not None and high is not None else "")


def in_words(chosen: dict[str, Any] | float) -> str:
    """What was chosen: values by name, or a rate."""
    if not isinstance(chosen, dict):
        return f"rate {chosen:g}"
    return "  ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in chosen.items()
    )


def show_sweep(console: Console, figures: dict[str, Any]) -> None:
    """The rows among which was chosen, the chosen one marked; of several layers those of the chosen one."""
    rows, picked = figures.get("table", []), figures.get("chosen", [])
    picked = [one if isinstance(one, dict) else {"rate": one} for one in picked]
    layers = {one.get("layer") for one in picked}
    rows = [row for row in rows if row.get("layer") in layers]
    if not rows:
        return
    several = len({row.get("layer") for row in rows}) > 1
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "layer" or several]
    columns = [key for key in columns if not key.endswith(("_interval", "_by_seed"))]
    table = Table(box=None, pad_edge=False)
    for key in [*columns, ""]:
        table.add_column(key, justify="right", no_wrap=True)
    for row in rows:
        cells = [cell(row, key) for key in columns]
        table.add_row(*cells, "*" if any(one.items() <= row.items() for one in picked) else "")
    console.print()
    console.print(table)


def cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return share(row, key) if key.endswith(MEASURES) else f"{value:g}"


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
    recipe = next((name for name in result["from"].values() if name not in PLACES), None)
    if recipe is not None:
        console.print(f"# recipe: {recipe}")
    for key, value in result["config"].items():
        place = result["from"][key]
        console.print(f"{key + ':':<27} {json.dumps(value):<34} # {place if place in PLACES else 'recipe'}")
    show_curve(console, result["learning_rate"], "# ")


def show_figures(console: Console, result: dict[str, Any]) -> None:
    """Two columns, then what does not fit a cell."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in result.items():
        if (isinstance(value, str | int | float | bool) or value is None) and key != "report":
            table.add_row(
                key, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
            )
    console.print(table)
    if "learning_rate" in result:
        show_curve(console, result["learning_rate"])
    if result.get("captions"):
        show_captions(console, result["captions"])
    for section, why in result.get("left_out", {}).items() if isinstance(result.get("left_out"), dict) else ():
        console.print(f"left out: {section}: {why}")
    if "report" in result:
        console.print(f"report: {result['report']}")


def show_captions(console: Console, rows: list[dict[str, Any]]) -> None:
    """Held-out images, what was written of them, and what stands beside them in the data."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head, share in (("image", 2), ("written", 4), ("reference", 4)):
        table.add_column(head, overflow="fold", ratio=share)
    for row in rows:
        table.add_row(row["key"], row["written"], row["reference"])
    console.print()
    console.print(table, soft_wrap=False, width=min(console.width, WIDTH))


def show_curve(console: Console, points: list[dict[str, float]], mark: str = "") -> None:
    """step:rate pairs, as many a line as fit; ``mark`` begins each."""
    pairs = "\n".join(f"{int(point['step'])}:\u00a0{point['lr']:.2e} " for point in points)  # a pair stays on its line
    text = textwrap.fill(pairs, WIDTH, initial_indent=f"{mark}learning rate: ", subsequent_indent=f"{mark}{'':15}")
    console.print(text.replace("\u00a0", " "))
