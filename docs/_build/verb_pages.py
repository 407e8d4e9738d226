"""One page per command, from its parser and its docstrings: options with types, defaults and meaning."""

from __future__ import annotations

import re
from typing import Any

from aimv2.cli.help import AUTO_HELP, help_parser
from aimv2.commands.parse import doc_of, module_of
from aimv2.commands.table import COMMANDS

# options that the command line removes from pretrain's arguments before its configuration is parsed
PRETRAIN_SWITCHES = (
    ("--config RECIPE", "", "", "YAML recipe, by path or by a name of `aimv2 recipes`; `--section.key value` overrides it"),
    ("--dry-run", "", "off", "build everything, run a few steps, print the resources of the run"),
    ("--print-config", "", "off", "show the effective values and their origin"),
)
EVERYWHERE = (
    ("--json", "", "off", "print the result as one JSON object on standard output; progress goes to standard error"),
    ("--debug", "", "off", "show the traceback of an error"),
)
Row = tuple[str, str, str, str]


def names() -> list[str]:
    """All commands, in the order of ``aimv2 --help``."""
    return list(COMMANDS)


def slug(name: str) -> str:
    """``data import`` -> ``data-import``."""
    return name.replace(" ", "-")


def pages() -> dict[str, str]:
    """``verbs/NAME.md`` and their index."""
    rows = [
        f"| {command.part} | [`aimv2 {name}`]({slug(name)}.md) | {cell(command.summary)} |"
        for name, command in COMMANDS.items()
    ]
    index = [
        "# Commands",
        "",
        "Each page is generated from the command's parser, like `aimv2 COMMAND --help-all`. Every command is also a function of the "
        "same options in `aimv2.api` ([Python reference](../reference.md)).",
        "",
        "| for | command | what it does |",
        "|---|---|---|",
        *rows,
        "",
        "Options may be written with `-` or `_`. Every command takes these two:",
        "",
        *table(list(EVERYWHERE)),
        "",
        "Exit codes: 0, 1 if `doctor` found a failure, 2 for invalid input (one line on standard error says which option to "
        "change), 75 if a data worker was lost, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.",
    ]
    return {"verbs/index.md": "\n".join(index), **{f"verbs/{slug(name)}.md": page(name) for name in COMMANDS}}


def page(name: str) -> str:
    """The page of a command."""
    command = COMMANDS[name]
    words = " ".join(f"[{w[:-1].upper()}...]" if w.endswith("*") else w.upper() for w in command.words)
    call = f"aimv2 {name} {words}".strip()
    lines = [f"# aimv2 {name}", "", sentence(command.summary), "", f"    {call} [--option VALUE ...]", ""]
    parser = help_parser(name)
    if name == "pretrain":
        lines += ["## Arguments", "", *table(list(PRETRAIN_SWITCHES)), ""]
    if command.configured:
        lines += [cell(AUTO_HELP), ""]
    for title, rows in groups(parser, dashes=name != "pretrain"):
        lines += [f"## {cell(title)}", "", *table(rows), ""]
    gives = returns(doc_of(name))
    if gives:
        lines += ["## Result", "", sentence(gives), ""]
    if epilog := getattr(module_of(name), "EPILOG", ""):
        lines += ["## A chain file", "", "```text", epilog, "```", ""]
    lines += ["`--json` and `--debug`: [every command](index.md)."]
    return "\n".join(lines)


def groups(parser: Any, dashes: bool) -> list[tuple[str, list[Row]]]:
    """(title, rows) of each group of options that has any."""
    formatter, found = parser._get_formatter(), []
    for group in parser._action_groups:
        rows = [row(formatter, action, dashes) for action in group._group_actions if shown(action)]
        if rows:
            found.append((f"{group.title[0].upper()}{group.title[1:]}", rows))
    return found


def shown(action: Any) -> bool:
    """Not --help, --json or --debug, and not what jsonargparse adds by itself (a file for a section)."""
    names = action.option_strings
    if not names:
        return True
    return getattr(action, "_typehint", None) is not None and not names[0].endswith(".help")


def row(formatter: Any, action: Any, dashes: bool) -> Row:
    """(option, type, default, meaning) out of the help's own text."""
    text = " ".join(formatter._expand_help(action).split())
    match = re.fullmatch(r"(.*?) ?\((required, )?type: (.*?)(?:, default: (.*))?\)", text)
    assert match, f"no type in the help of {action.dest}: {text}"
    option = action.option_strings[0] if action.option_strings else str(action.metavar)
    if dashes:
        option = re.sub(r"(?<=[a-z])_(?=[a-z])", "-", option)
    kind = re.sub(r"Literal\[(.*)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), match[3])
    return option, kind, match[4] if match[4] is not None else "", match[1]


def returns(text: str) -> str:
    """The Returns section of a docstring, in a line."""
    match = re.search(r"^Returns:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    return " ".join(match[1].split()).replace("``", "`") if match else ""


def table(rows: list[Row]) -> list[str]:
    """A table of options; columns that no row fills are left out."""
    heads = ("option", "type", "default", "meaning")
    kept = [i for i in range(4) if i in (0, 3) or any(one[i] for one in rows)]
    lines = [" | ".join(["", *(heads[i] for i in kept), ""]).strip(), "|" + "---|" * len(kept)]
    for one in rows:
        cells = [cell(one[i]) if i == 3 else code(one[i]) for i in kept]
        lines.append(" | ".join(["", *cells, ""]).strip())
    return lines


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def cell(text: str) -> str:
    """Plain text in a cell: nothing of it is read as markup."""
    return re.sub(r"([|*_<\[\]{}$])", r"\\\1", text)


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."
