"""What commands print for people: tables that fit 80 columns, on standard output."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from rich.console import Console
from rich.table import Table

from aimv2.commands.parse import module_of
from aimv2.data.images.boxes import BOX_FAULTS
from aimv2.data.passed import passed_lines
from aimv2.data.text.conversations import bad_lines
from aimv2.tables import TextTable, figure
from aimv2.terminal import VisibleConsole

WIDTH = 80
PLACES = ("default", "command line", "demo", "image size", "$AIMV2_DATA")  # sources of values; else a recipe's file
SHORT = 12  # values of a list that fit a line; longer ones are in the result file
MEASURES = ("top1", "miou", "rmse")  # suffixes of the columns of a sweep that are figures, not settings


def render(name: str, result: dict[str, Any]) -> None:
    """Prints a command's result: by its own ``render`` where it has one, else in the form that fits."""
    console = VisibleConsole(highlight=False, markup=False, soft_wrap=True)
    if (own := getattr(module_of(name), "render", None)) is not None:
        own(result, console)
    elif "figures" in result and "protocol" in result:
        render_result(console, result)
    elif "config" in result and "from" in result:
        render_config(console, result)
    else:
        render_figures(console, result)


def render_result(console: Console, result: dict[str, Any]) -> None:
    """The evaluation, its figures, baselines and layers as rows, then the sweep as a table."""
    figures, data = result["figures"], result["data"]
    console.print(
        f"{result['model']['name']} on {data.get('dataset') or data['name']}: {result['protocol'].get('name', result['verb'])}"
    )
    rows: list[tuple[str, str]] = []
    head = next((key for key, value in figures.items() if isinstance(value, float)), "")  # what there is by layer
    for key, value in figures.items():
        if isinstance(value, float):
            rows.append((key, with_interval(figures, key)))
        elif isinstance(value, bool | int | str):
            rows.append((key, str(value)))
        elif isinstance(value, list) and 0 < len(value) <= SHORT and not key.endswith("_interval"):
            if all(isinstance(x, int | float) for x in value) and key != "chosen":
                rows.append((key, "  ".join(figure(key, x) if isinstance(x, float) else str(x) for x in value)))
        elif isinstance(value, dict) and key in ("by_layer", "image_to_text", "text_to_image"):
            of = head if key == "by_layer" else ""
            rows += [
                (f"{key} {name}", with_interval(value, name, of)) for name, x in value.items() if isinstance(x, float)
            ]
    chosen = [in_words(one) for one in figures.get("chosen", [])]
    if chosen:
        rows.append(("chosen", ";  ".join(dict.fromkeys(chosen))))  # by seed, where they differ
    for name, other in figures.get("baselines", {}).items():
        first = next((key for key, value in other.items() if isinstance(value, float)), None)
        if first is not None:
            rows.append((f"baseline: {name}", f"{first} {with_interval(other, first)}"))
        for way in ("image_to_text", "text_to_image"):
            rows += [
                (f"baseline: {name}, {way} {key}", with_interval(other[way], key))
                for key in other.get(way, {})
                if key.endswith("@1")
            ]
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, text in rows:
        table.add_row(key, text)
    console.print(table)
    render_sweep(console, figures)
    if figures.get("table") and (rule := result["protocol"].get("chosen_by")):
        again = "; its row is from before it was trained anew with them" if "refit_on" in result["protocol"] else ""
        console.print(f"* chosen: {rule} on the images that choose{again}", soft_wrap=False)


def with_interval(figures: dict[str, Any], key: str, of: str = "") -> str:
    """A figure, and its interval where it has one; ``of``: its name where the key is none."""
    low, high = figures.get(f"{key}_interval") or (None, None)
    between = "" if low is None or high is None else f" ({figure(of or key, low)} to {figure(of or key, high)})"
    return figure(of or key, figures[key]) + between


def in_words(chosen: dict[str, Any] | float) -> str:
    """The chosen values by name, or a learning rate."""
    if not isinstance(chosen, dict):
        return f"rate {chosen:g}"
    return "  ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in chosen.items()
    )


def render_sweep(console: Console, figures: dict[str, Any]) -> None:
    """The rows of the sweep, the chosen one marked; of several layers those of the chosen one."""
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
    return with_interval(row, key) if key.endswith(MEASURES) else f"{value:g}"


def render_config(console: Console, result: dict[str, Any]) -> None:
    """``key: value  # where it came from``, which is a recipe too."""
    recipe = next((name for name in result["from"].values() if name not in PLACES), None)
    if recipe is not None:
        console.print(f"# recipe: {recipe}")
    for key, value in result["config"].items():
        place = result["from"][key]
        console.print(f"{key + ':':<27} {json.dumps(value):<34} # {place if place in PLACES else 'recipe'}")
    render_curve(console, result["learning_rate"], "# ")


def render_figures(console: Console, result: dict[str, Any]) -> None:
    """Two columns, then what does not fit a cell."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in result.items():
        if (isinstance(value, str | int | float | bool) or value is None) and key != "report":
            table.add_row(
                key,
                figure(key, value, ",.4g")
                if isinstance(value, float)
                else f"{value:,}"
                if type(value) is int
                else str(value),
            )
    console.print(table)
    if "learning_rate" in result:
        render_curve(console, result["learning_rate"])
    if result.get("captions"):
        render_captions(console, result["captions"])
    for section, why in result.get("left_out", {}).items() if isinstance(result.get("left_out"), dict) else ():
        console.print(f"left out: {section}: {why}")
    if isinstance(result.get("left_out"), list) and result["left_out"]:
        console.print(f"left out: {', '.join(result['left_out'])}")
    bad = {BOX_FAULTS.get(code, code): about for code, about in result.get("bad", {}).items()}
    for line in (*bad_lines(bad), *passed_lines(result.get("passed_over", {}))):
        console.print(line)
    if "report" in result:
        console.print(f"report: {result['report']}")


def render_captions(console: Console, rows: list[dict[str, Any]]) -> None:
    """Held-out images, the captions written for them, and their references."""
    cells = [[row["key"], row["written"], row["reference"]] for row in rows]
    table = TextTable(("image", "written", "reference"), cells, ratio={"image": 2, "written": 4, "reference": 4})
    console.print(f"\n{table.to_text(min(console.width, WIDTH))}")


def render_curve(console: Console, points: list[dict[str, float]], mark: str = "") -> None:
    """step:lr pairs, as many per line as fit; ``mark`` begins each line."""
    pairs = "\n".join(f"{int(point['step'])}:\u00a0{point['lr']:.2e} " for point in points)  # a pair stays on its line
    text = textwrap.fill(pairs, WIDTH, initial_indent=f"{mark}learning rate: ", subsequent_indent=f"{mark}{'':15}")
    console.print(text.replace("\u00a0", " "))
