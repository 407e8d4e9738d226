"""What the shell offers behind ``aimv2 <TAB>``: verbs, options, and the values that an option knows. No torch.

eval "$(register-python-argcomplete aimv2)"
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from aimv2.cli.dispatch import CONFIGURED, GROUPS, VERBS
from aimv2.config.schema import Config, get_value, known_keys, leaf_keys

MODELS_TOO = ("model", "init", "other", "teacher", "objective.teacher", "source")  # take a model by name or by path
COMMON = ("json", "debug", "help")
SWITCHES = {"pretrain": ("dry-run", "print-config")}
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
    name, used = verb_of(words)
    os.environ[START] = str(own + used)  # the verb's last word stands for the command
    if name is None:
        argcomplete.autocomplete(choice_of(words), always_complete_options=False)
    else:
        argcomplete.autocomplete(parser_of(name), always_complete_options=not VERBS[name].words)


def verb_of(words: list[str]) -> tuple[str | None, int]:
    """The verb that the words begin with, and how many of them are its name; None while it is not whole."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if len(words) >= count and name in VERBS:
            return name, count
    return None, 1 if words and words[0] in GROUPS else 0


def choice_of(words: list[str]) -> argparse.ArgumentParser:
    """A parser of a verb's name, or of its second word."""
    parser = argparse.ArgumentParser(add_help=False)
    group = words[0] if words and words[0] in GROUPS else None
    if group is not None:
        offered = {name.split()[1]: verb.summary for name, verb in VERBS.items() if name.startswith(f"{group} ")}
    else:
        offered = {name.split()[0]: verb.summary for name, verb in VERBS.items()}
        offered |= {name: f"{name}: several verbs" for name in GROUPS}
        parser.add_argument("--version", action="store_true")
    parser.add_argument("--help", action="store_true")
    give(parser.add_argument("verb"), lambda prefix, **_: offered)
    return parser


def parser_of(name: str) -> argparse.ArgumentParser:
    """A parser of a verb's words and options that knows what they may be, and nothing else."""
    from aimv2 import api

    parser = argparse.ArgumentParser(add_help=False)
    function = getattr(api, VERBS[name].function)
    hints = get_type_hints(function)
    words = [word.rstrip("*") for word in VERBS[name].words]
    for word in VERBS[name].words:
        key = word.rstrip("*")
        more: dict[str, Any] = {"nargs": "*"} if word.endswith("*") else {}
        offer(parser.add_argument(key, **more), key, hints[key])
    if name in CONFIGURED:
        offer(parser.add_argument("--config"), "config", str)
        for key, kind in config_types().items():
            add_option(parser, key, key, kind)
        for switch in SWITCHES.get(name, ()):
            parser.add_argument(f"--{switch}", action="store_true")
    if name != "pretrain":
        left_out = [*words, "config", "options"] if name in CONFIGURED else words
        for key in inspect.signature(function).parameters:
            if key not in left_out:
                add_option(parser, key, key.replace("_", "-"), hints[key])
    for switch in COMMON:
        parser.add_argument(f"--{switch}", action="store_true")
    return parser


def config_types() -> dict[str, Any]:
    """The type of each dotted key of a configuration."""
    config, kinds = Config(), {}
    for key in leaf_keys():
        section, _, name = key.rpartition(".")
        owner = get_value(config, section) if section else config
        kinds[key] = get_type_hints(type(owner))[name]
    assert all(dataclasses.is_dataclass(get_value(config, key)) for key in set(known_keys()) - set(kinds))
    return kinds


def add_option(parser: argparse.ArgumentParser, key: str, shown: str, kind: Any) -> None:
    """``--shown`` of a type: true and false may be left out behind a switch."""
    switch = bool in (kind, *get_args(kind))
    more: dict[str, Any] = {"nargs": "?"} if switch else {}
    offer(parser.add_argument(f"--{shown}", **more), key, kind)


def offer(action: argparse.Action, key: str, kind: Any) -> None:
    """Sets what may stand there: the values of the type, names of models, else files."""
    if values := list(values_of(kind)):
        give(action, lambda prefix, **_: values)
    elif key == "model.name":
        give(action, lambda prefix, **_: shapes())
    elif key in MODELS_TOO:
        give(action, names_and_files)


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


def names_and_files(prefix: str, **more: Any) -> list[str]:
    """Released models, and what lies in the folder."""
    from argcomplete.completers import FilesCompleter

    from aimv2.interop.hub import RELEASED

    return [*RELEASED, *FilesCompleter()(prefix, **more)]
