"""What ``aimv2 COMMAND --help`` and ``--help-all`` print: the few options of a first use, or all of them. No torch."""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import textwrap
from typing import Any, get_type_hints

from aimv2.cli.complete import values_of
from aimv2.commands.parse import (
    add_common,
    argument_texts,
    help_texts,
    make_parser,
    module_of,
    option_fields,
    options_class,
    parser_of,
    plain_hints,
    spelled,
)
from aimv2.commands.table import COMMANDS
from aimv2.config.schema import AUTO, config_class, get_value
from aimv2.config.types import allowed

CONFIG_HELP = "YAML recipe, by path or by a name of `aimv2 recipes`; --section.key value overrides it"
AUTO_HELP = (
    "auto: without --config RECIPE the value follows the data and the device (number and size of the images, CPU or GPU; "
    "optim.warmup follows train.steps), and --print-config shows it. The paper's values come with --config RECIPE."
)


def help_of(name: str, whole: bool) -> str:
    """The help of a command; ``whole``: with every option, also where the command has many."""
    first = "" if whole else getattr(module_of(name), "FIRST", "")
    parts = [head(name), first_options(name, first.split()) if first else all_options(name)]
    parts.append(getattr(module_of(name), "EPILOG", ""))
    if COMMANDS[name].configured:
        parts.append(wrapped(AUTO_HELP))
    if first:
        parts.append(f"`aimv2 {name} --help-all` shows every option.")
    return "\n\n".join(part.strip("\n") for part in parts if part)


def about(name: str) -> list[str]:
    """What a command does, in paragraphs."""
    return inspect.getdoc(options_class(name)).partition("\n\nArgs:")[0].split("\n\n")  # type: ignore[union-attr]


def head(name: str) -> str:
    """Usage, what the command does, examples."""
    command = COMMANDS[name]
    words = [f"[{word[:-1].upper()} ...]" if word.endswith("*") else word.upper() for word in command.words]
    words += ["[--config RECIPE]", "[--section.key VALUE ...]"] if command.configured else ["[--option VALUE ...]"]
    parts = [f"usage: {' '.join(['aimv2', name, *words])}", *map(wrapped, about(name))]
    if examples := getattr(module_of(name), "EXAMPLES", ""):
        parts.append(f"examples:\n{textwrap.indent(examples, '  ')}")
    return "\n\n".join(parts)


def wrapped(text: str) -> str:
    width = min(shutil.get_terminal_size().columns, 100) - 2
    return textwrap.fill(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)


def first_options(name: str, keys: list[str]) -> str:
    """The options of a first use, each with its values, its meaning and its default."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    for word in COMMANDS[name].words:
        key = word.rstrip("*")
        parser.add_argument(key, metavar=key.upper(), help=help_texts(name)[key].replace("%", "%%"))
    group = parser.add_argument_group("options")
    for key in keys:
        text, kind, default = option_of(name, key)
        text += f" (default: {default})" if default not in (None, False) else ""
        values = list(values_of(kind))
        more: dict[str, Any] = {"metavar": f"{{{','.join(values)}}}" if values else key.rpartition(".")[2].upper()}
        shown = f"--{key}" if "." in key else spelled(name, key)
        group.add_argument(
            shown, help=text.replace("%", "%%"), **({"action": "store_true"} if default is False else more)
        )
    add_common(group)
    return parser.format_help()


def option_of(name: str, key: str) -> tuple[str, Any, Any]:
    """Meaning, type and default of an option, or of a key of the configuration."""
    if key == "config":
        return CONFIG_HELP, str, None
    if COMMANDS[name].configured and (key == "run" or key not in option_fields(name)):
        section, _, last = key.rpartition(".")
        whole = config_class(COMMANDS[name].task)()
        owner = get_value(whole, section) if section else whole
        default = "auto" if key in AUTO else getattr(owner, last)
        return argument_texts(type(owner))[last], get_type_hints(type(owner))[last], default
    hint = get_type_hints(options_class(name), include_extras=True)[key]
    text = "; ".join(filter(None, (help_texts(name)[key], allowed(hint))))
    return text, plain_hints(name)[key], option_fields(name)[key].default


def all_options(name: str) -> str:
    """jsonargparse's help, without what is refused (a file for a section, appending) and with dashes in a command's options."""
    lines = []
    for line in help_parser(name).format_help().splitlines():
        if re.match(r"usage:|  --\w+ CONFIG\b|  --[\w.]+\.help\b", line):
            continue
        line = "options of the command:" if line == f"{about(name)[0]}:" else re.sub(r", --[\w.]+\+ \S+", "", line)
        lines.append(re.sub(r"(?<=[ \[])--[a-z_]+(?![\w.])", lambda found: found[0].replace("_", "-"), line))
    return "\n".join(lines).lstrip()


def help_parser(name: str) -> Any:
    """The parser of all options of a command, for its help and its page of the documentation: defaults as users meet them."""
    if not COMMANDS[name].configured:
        return parser_of(name)
    parser, texts, hints = make_parser(name), help_texts(name), plain_hints(name)
    trains = COMMANDS[name].part == "train"
    kind: dict[str, Any] = {} if trains else {"type": str}
    parser.add_argument("--config", metavar="RECIPE", help=CONFIG_HELP, **kind)
    for key, field in option_fields(name).items():  # switches of training have no value, options of others have
        if key not in ("config", "run", "options"):
            bare: dict[str, Any] = {"action": "store_true"} if field.default is False and trains else {}
            parser.add_argument(f"--{key}", help=texts[key], **(bare or {"type": hints[key], "default": field.default}))
    add_common(parser)
    parser.add_class_arguments(config_class(COMMANDS[name].task), nested_key=None)
    for action in parser._actions:
        if action.dest in AUTO:
            action.default = "auto"
    return parser
