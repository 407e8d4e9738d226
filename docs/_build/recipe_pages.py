"""A page a recipe: what its head says, and every value that it changes with the one it had."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from aimv2.config.schema import config_class, get_value
from aimv2.config.load import read_recipe, task_in
from aimv2.config.recipes import head_lines


def paths(root: Path) -> list[Path]:
    """Recipes, then chains, by name."""
    return [*sorted((root / "recipes").glob("*.yaml")), *sorted((root / "recipes" / "chains").glob("*.yaml"))]


def pages(root: Path) -> dict[str, str]:
    """``recipes/NAME.md`` and their index."""
    recipes = [path for path in paths(root) if path.parent.name == "recipes"]
    chains = [path for path in paths(root) if path.parent.name == "chains"]
    index = [
        "# Recipes",
        "",
        "A recipe is a YAML file for `aimv2 pretrain --config NAME`; `aimv2 recipes` lists those of the package by name, "
        "`aimv2 recipes NAME > mine.yaml` writes one to edit, and a path goes as well as a name. The command line overrides any value (`--optim.lr 5e-4`). "
        "Its header lists command, source, data, hardware, hours and expected score; estimates are marked. "
        "`tests/test_recipes.py` parses every recipe strictly and runs it at toy size.",
        "",
        "| recipe | what |",
        "|---|---|",
        *(f"| [{path.stem}]({path.stem}.md) | {title(path)} |" for path in recipes),
        "",
        "A chain is a file of stages for `aimv2 run NAME` ([stages](../stages.md#stages-as-a-chain)).",
        "",
        "| chain | what |",
        "|---|---|",
        *(f"| [{path.stem}]({path.stem}.md) | {title(path)} |" for path in chains),
    ]
    written = {"recipes/index.md": "\n".join(index)}
    written |= {f"recipes/{path.stem}.md": recipe_page(path) for path in recipes}
    return written | {f"recipes/{path.stem}.md": chain_page(path) for path in chains}


def title(path: Path) -> str:
    """The first sentence of the head."""
    text = " ".join(" ".join(head_lines(path)).split())
    return re.split(r"(?<=[a-z0-9)])[.:] ", text + " ")[0].replace("|", "\\|")


def recipe_page(path: Path) -> str:
    """Head, the values that differ from the defaults, sources of the data, the file."""
    values, marks = read_recipe(path), whose(path)
    rows, sources = [], []
    for key, value in values.items():
        if key == "data.train" and isinstance(value, list):
            sources = value
            continue
        before = get_value(config_class(task_in(values))(), key)
        if plain(value) != plain(before):
            rows.append(f"| `{key}` | `{plain(value)}` | `{plain(before)}` | {marks.get(key, '')} |")
    lines = [
        f"# {path.stem}",
        "",
        *block(head_lines(path), "text"),
        "",
        "## Values that it changes",
        "",
        "| key | here | default | whose |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    if sources:
        lines += ["## Sources", "", "| name | weight | captions |", "|---|---|---|"]
        lines += [f"| `{one['name']}` | {one['weight']} | `{one.get('captions', '')}` |" for one in sources] + [""]
    return "\n".join([*lines, "## The file", "", *block(path.read_text().splitlines(), "yaml")])


def chain_page(path: Path) -> str:
    """Head, the stages as a table, the file."""
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    rows = [
        f"| {name} | `{stage['verb']}` | {str(stage.get('title', '')).replace('|', ' ')} |"
        for name, stage in tree["stages"].items()
    ]
    table = ["| stage | command | title |", "|---|---|---|", *rows]
    file = block(path.read_text().splitlines(), "yaml")
    return "\n".join(
        [
            f"# {path.stem}",
            "",
            *block(head_lines(path), "text"),
            "",
            "## Stages",
            "",
            *table,
            "",
            "## The file",
            "",
            *file,
        ]
    )


def whose(path: Path) -> dict[str, str]:
    """The comment after each value: the table of the paper, or "ours"."""
    marks, section = {}, ""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        if match := re.match(r"(\w+):\s*$", line):
            section = match[1] + "."
        elif match := re.match(r"(\s*)(\w+): [^#]*#\s*(.*)", line):
            marks[(section if match[1] else "") + match[2]] = match[3].replace("|", "\\|")
    return marks


def plain(value: Any) -> str:
    """Equal values, equal text: tuples as lists, numbers as numbers."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(plain(one) for one in value) + "]"
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return "null" if value is None else str(value)


def block(lines: list[str], language: str) -> list[str]:
    return [f"```{language}", *lines, "```"]
