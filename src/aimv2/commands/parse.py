"""From a mapping to a command's options: the one road for the command line, chains and :mod:`aimv2.api`."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from aimv2.commands.table import COMMANDS, function_name
from aimv2.config.types import allowed, convert
from aimv2.errors import UsageError, nearest, one_line

ARGUMENT = re.compile(r"^    (\w+):(.*(?:\n {5,}.*)*)", re.MULTILINE)  # of a docstring


def module_of(name: str) -> ModuleType:
    """The module of a command; none of them imports torch."""
    return importlib.import_module(f"aimv2.commands.{function_name(name)}")


def options_class(name: str) -> type[Any]:
    """``data import`` -> DataImportOptions."""
    title = "".join(word.title() for word in function_name(name).split("_"))
    return getattr(module_of(name), f"{title}Options")


@cache
def option_fields(name: str) -> dict[str, Field[Any]]:
    """The options of a command in the order of its API function: ``ORDER`` of its class, else of its fields."""
    kind = options_class(name)
    found = {field.name: field for field in fields(kind)}
    order = getattr(kind, "ORDER", "").split() or list(found)
    assert set(order) == set(found), (name, set(order) ^ set(found))
    return {key: found[key] for key in order}


@cache
def help_texts(name: str) -> dict[str, str]:
    """A line for each option, from the docstrings of the options class and of its bases."""
    return argument_texts(options_class(name))


def argument_texts(dataclass: type) -> dict[str, str]:
    """A line for each field, from the docstrings of a dataclass and of its bases."""
    texts: dict[str, str] = {}
    for kind in reversed(dataclass.__mro__):
        args = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
        texts |= {key: " ".join(text.split()) for key, text in ARGUMENT.findall(args)}
    return texts


def doc_of(name: str) -> str:
    """The docstring of a command's API function: its options class, the meaning of every option, what ``run`` gives."""
    about = (inspect.getdoc(options_class(name)) or "").partition("\n\nArgs:")[0]
    texts = help_texts(name)
    args = ["Args:", *(f"    {key}: {texts[key]}" for key in option_fields(name))] if option_fields(name) else []
    gives = inspect.getdoc(module_of(name).run)
    return "\n\n".join(part for part in (about, "\n".join(args), gives) if part)


def plain_hints(name: str) -> dict[str, Any]:
    """The types of a command's options without their ranges."""
    return {key: _plain(hint) for key, hint in get_type_hints(options_class(name)).items()}


def _plain(hint: Any) -> Any:
    """A union as the help shows it: ``int | null``, ``Union[int, str, null]``."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    parts = get_args(hint)
    return parts[0] | parts[1] if len(parts) == 2 and NoneType in parts else Union[parts]  # noqa: UP007


def make_parser(name: str) -> Any:
    """jsonargparse's parser of a command, without arguments; errors in one line."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            raise UsageError(one_line(message, options=True))

    return Parser(prog=f"aimv2 {name}", usage=f"aimv2 {name}", allow_abbrev=False)


def add_common(parser: Any) -> None:
    """Options that every command has (taken out before parsing; here for the help)."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def parser_of(name: str) -> Any:
    """The parser of a command's positional arguments and options, in the order of its API function."""
    parser, texts = make_parser(name), help_texts(name)
    hints, ranges = plain_hints(name), get_type_hints(options_class(name), include_extras=True)
    words = {word.rstrip("*"): word.endswith("*") for word in COMMANDS[name].words}
    for key, many in words.items():
        more: dict[str, Any] = {"nargs": "*"} if many else {}
        word = parser.add_argument(key, metavar=key.upper(), type=str, help=texts.get(key, ""), **more)
        word.required = True  # Python 3.14 takes a list of none for optional
    group = parser.add_argument_group(inspect.getdoc(options_class(name)).split("\n\n")[0])  # type: ignore[union-attr]
    for key, field in option_fields(name).items():
        if key not in words:
            about = "; ".join(filter(None, (texts.get(key, ""), allowed(ranges[key]))))
            group.add_argument(f"--{key}", type=hints[key], default=field.default, help=about)
    add_common(parser)
    return parser


def read(name: str, given: Mapping[str, Any]) -> Any:
    """A command's options from values by name, each of its type and within its range.

    Args:
        name: of the command.
        given: what the user gave; as text, as Python values, or as YAML has them.

    Raises:
        UsageError: an unknown option, a value of another type or out of range, options that do not go together.
    """
    known, hints = option_fields(name), get_type_hints(options_class(name), include_extras=True)
    for key in given:
        if key not in known:
            option = spelled(name, str(key))
            raise UsageError(
                f"unknown option '{option}'{nearest(option, [spelled(name, one) for one in known])}", code="unknown"
            )
    for key, field in known.items():
        if field.default is MISSING and key not in given:
            raise UsageError(f"{spelled(name, key)} is missing", code="missing")
    values = {key: field.default for key, field in known.items() if field.default is not MISSING}
    values |= typed(name, dict(given))
    values = {key: convert(value, hints[key], spelled(name, key)) for key, value in values.items()}
    return options_class(name)(**values)


def typed(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Values of the types of the options: what a YAML file or Python has, as text where text is expected.

    Raises:
        UsageError: a value of another type.
    """
    hints, parser = plain_hints(name), make_parser(name)
    mappings = [key for key, value in given.items() if isinstance(value, dict) and hints[key] == dict[str, Any] | None]
    whole = {key: given[key] for key in mappings}  # a configuration is parsed elsewhere
    given = {key: value for key, value in given.items() if key not in whole}
    for key, value in given.items():
        parser.add_argument(f"--{key}", type=hints[key])
        known = [
            str(one)
            for part in (hints[key], *get_args(hints[key]))
            if get_origin(part) is Literal
            for one in get_args(part)
        ]
        if known and value is not None and value not in known:
            option = spelled(name, key)
            among = f"one of {', '.join(known)} is expected{nearest(str(value), known)}"
            raise UsageError(f"{option} {value}: {among}", option=option, code="unknown")
    values = {key: plain(value, hints[key] in (str, str | None)) for key, value in given.items()}
    for key, value in values.items():
        if isinstance(value, dict):
            raise UsageError(
                f"{spelled(name, key)} {value}: a single value expected, or a list where several are meant"
            )
        if get_origin(hints[key]) is list and isinstance(value, str):
            values[key] = [value]  # one of several
    try:
        found = vars(parser.parse_object(values, defaults=False))
    except UsageError as error:
        words = {f"--{key.replace('_', '-')}": spelled(name, key) for key in given}
        option = words.get(error.option, error.option)
        raise UsageError(str(error).replace(error.option, option, 1), option=option, code=error.code) from None
    return whole | {key: value for key, value in found.items() if key in given}


def plain(value: Any, is_text: bool) -> Any:
    """Paths and devices as text; ``is_text``: numbers and lists too (``[1, 5]`` is ``"1,5"``)."""
    if value is None or isinstance(value, str | bool | dict):
        return value
    if isinstance(value, list | tuple):
        return ",".join(str(one) for one in value) if is_text else [plain(one, False) for one in value]
    if isinstance(value, int | float):
        return str(value) if is_text else value
    if hasattr(value, "state_dict"):
        raise UsageError(
            f"a name, folder or file expected, got a {type(value).__name__} in memory; aimv2.save_pretrained(model, FOLDER) makes one",
            code="mismatch",
        )
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def spelled(name: str, key: str) -> str:
    """An option as the command line has it: ``--batch-size``, or ``MODEL`` of a positional argument."""
    words = [word.rstrip("*") for word in COMMANDS[name].words]
    return key.upper() if key in words else "--" + key.replace("_", "-")


def execute(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the options and runs the command."""
    return module_of(name).run(read(name, given))


def signature_of(name: str) -> inspect.Signature:
    """Parameters of the command's API function."""
    hints = plain_hints(name)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter(
            key,
            kind,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[key],
        )
        for key, field in option_fields(name).items()
    ]
    return inspect.Signature(parameters, return_annotation=dict[str, Any])
