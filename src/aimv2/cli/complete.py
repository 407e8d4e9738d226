"""What the shell offers after ``aimv2 <TAB>``: commands, options, and the values that an option knows. No torch.

eval "$(register-python-argcomplete aimv2)"
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterable
from functools import partial
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from aimv2.commands.parse import option_fields, options_class, spelled
from aimv2.commands.table import COMMANDS, GROUPS
from aimv2.config.recipes import is_chain, shipped
from aimv2.config.schema import config_class, get_value, known_keys, leaf_keys

MODELS_TOO = ("model", "init", "other", "teacher", "objective.teacher", "source")  # take a model by name or by path
COMMON = ("json", "debug", "help", "help-all")
START = "_ARGCOMPLETE"  # number of the command's own word, from 1


def complete() -> None:
    """Answers the shell and ends the process; without argcomplete there is no answer."""
    try:
        import argcomplete
        from argcomplete.lexers import split_line
    except ImportError:
        os._exit(1)
    own = int(os.environ[START])
    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3][own:]  # those before the cursor
    name, used = command_of(words)
    os.environ[START] = str(own + used)  # the command's last word stands for the program
    if name is None:
        argcomplete.autocomplete(choice_of(words), always_complete_options=False)
    else:
        argcomplete.autocomplete(parser_of(name), always_complete_options=not COMMANDS[name].words)


def command_of(words: list[str]) -> tuple[str | None, int]:
    """The command that the words begin with, and how many of them are its name; None while it is not whole."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if len(words) >= count and name in COMMANDS:
            return name, count
    return None, 1 if words and words[0] in GROUPS else 0


def choice_of(words: list[str]) -> argparse.ArgumentParser:
    """A parser of a command's name, or of its second word."""
    parser = argparse.ArgumentParser(add_help=False)
    group = words[0] if words and words[0] in GROUPS else None
    if group is not None:
        offered = {
            name.split()[1]: command.summary for name, command in COMMANDS.items() if name.startswith(f"{group} ")
        }
    else:
        offered = {name.split()[0]: command.summary for name, command in COMMANDS.items()}
        offered |= {name: f"{name}: several commands" for name in GROUPS}
        parser.add_argument("--version", action="store_true")
    parser.add_argument("--help", action="store_true")
    give(parser.add_argument("command"), lambda prefix, **_: offered)
    return parser


def parser_of(name: str) -> argparse.ArgumentParser:
    """A parser of a command's words and options that knows their possible values, and nothing else."""
    parser = argparse.ArgumentParser(add_help=False)
    hints, command = get_type_hints(options_class(name)), COMMANDS[name]
    words = {word.rstrip("*"): word.endswith("*") for word in command.words}
    for key, many in words.items():
        more: dict[str, Any] = {"nargs": "*"} if many else {}
        offer(parser.add_argument(key, **more), key, hints[key])
    if command.configured:
        for key, kind in config_types(command.task).items():
            add_option(parser, key, key, kind)
    for key, field in option_fields(name).items():
        if command.configured and key in ("run", "options"):  # a key of the configuration; the values by key
            continue
        if command.part == "train" and field.default is False:
            parser.add_argument(spelled(name, key), action="store_true")
        elif key not in words:
            add_option(parser, key, spelled(name, key)[2:], hints[key])
    for switch in COMMON:
        parser.add_argument(f"--{switch}", action="store_true")
    return parser


def config_types(task: str | None = None) -> dict[str, Any]:
    """The type of each dotted key of a task's configuration."""
    config, kinds = config_class(task)(), {}
    for key in leaf_keys(type(config)):
        section, _, name = key.rpartition(".")
        owner = get_value(config, section) if section else config
        kinds[key] = get_type_hints(type(owner))[name]
    assert all(dataclasses.is_dataclass(get_value(config, key)) for key in set(known_keys(type(config))) - set(kinds))
    return kinds


def add_option(parser: argparse.ArgumentParser, key: str, shown: str, kind: Any) -> None:
    """``--shown`` of a type: a switch needs no true or false after it."""
    switch = bool in (kind, *get_args(kind))
    more: dict[str, Any] = {"nargs": "?"} if switch else {}
    offer(parser.add_argument(f"--{shown}", **more), key, kind)


def offer(action: argparse.Action, key: str, kind: Any) -> None:
    """Sets the possible values: the values of the type, names of models, else files."""
    if values := list(values_of(kind)):
        give(action, lambda prefix, **_: values)
    elif key == "model.name":
        give(action, lambda prefix, **_: shapes())
    elif key in MODELS_TOO:
        give(action, names_and_files)
    elif key in RECIPES_TOO:
        give(action, RECIPES_TOO[key])


def give(action: argparse.Action, completer: Callable[..., Any]) -> None:
    action.completer = completer  # type: ignore[attr-defined]  # where argcomplete looks for it


def values_of(kind: Any) -> Iterable[str]:
    """The values that a type names, one by one; nothing for text and numbers."""
    if kind is bool:
        yield from ("true", "false")
    elif get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    elif get_origin(kind) in (Union, UnionType):
        for part in get_args(kind):
            yield from values_of(part)


def shapes() -> list[str]:
    """Names of the sizes table."""
    from aimv2.models.sizes import MODELS

    return ["auto", *MODELS]


def recipes_and_files(chains: bool, prefix: str, **more: Any) -> list[str]:
    """Shipped recipes, or chains, and the files of the folder."""
    from argcomplete.completers import FilesCompleter

    return [*(name for name, path in shipped().items() if is_chain(path) == chains), *FilesCompleter()(prefix, **more)]


RECIPES_TOO: dict[str, Callable[..., Any]] = {
    "config": partial(recipes_and_files, False),
    "chain": partial(recipes_and_files, True),
    "names": lambda prefix, **_: list(shipped()),
}


def names_and_files(prefix: str, **more: Any) -> list[str]:
    """Released models, and the files of the folder."""
    from argcomplete.completers import FilesCompleter

    from aimv2.interop.hub import RELEASED

    return [*RELEASED, *FilesCompleter()(prefix, **more)]
