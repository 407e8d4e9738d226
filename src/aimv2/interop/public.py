"""What is written for others names no place of this machine: absolute paths, users, hosts. All that writes cards and layouts uses it."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from aimv2.io import parse_json, parse_yaml, read_file

PLACE = re.compile(
    r"(?<![\w/.:~<\\-])(?:[A-Za-z]:\\|~[\w.-]*/|/)(?:[^\s'\"`<>|()\[\]{},;]*[/\\])+[^\s'\"`<>|()\[\]{},;]*"
)
WHOLE = re.compile(r"(?:[A-Za-z]:[\\/]|~|/)[^\n]*[/\\][^\n]*|\.\.[/\\][^\n]*")  # a value that is nothing but a path
# names that say nothing, and are words of other meanings
COMMON = {
    "root", "user", "admin", "ubuntu", "nobody", "localhost", "home", "data", "model", "train", "test", "image", "images", "text",
    "vision", "run", "runner", "app", "dev", "node", "gpu", "work", "worker",
}  # fmt: skip
PRIVATE = ("run", "log.wandb", "data.index_dir")  # keys of a configuration that are of one machine, or of one account
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # their tokens may look like paths


def last_name(path: str) -> str:
    """The last part of a path, of both kinds of slashes."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "/"


def owners() -> list[str]:
    """Names of this user and this machine that say who they are."""
    names = [socket.gethostname(), socket.gethostname().partition(".")[0]]
    with suppress(Exception):  # a user without an entry
        names.append(getpass.getuser())
    with suppress(RuntimeError):
        names.append(Path.home().name)
    return [name for name in dict.fromkeys(names) if len(name) > 2 and name.lower() not in COMMON]


def public(text: str) -> str:
    """A text without places: an absolute path becomes its last part, names of this user and machine become ``user``."""
    if WHOLE.fullmatch(text) and "://" not in text:
        text = last_name(text)
    homes = {os.path.expanduser("~"), os.getcwd()}
    for home in sorted(homes - {"/", "~"}, key=len, reverse=True):  # may hold blanks, which end a path below
        text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?=[/\\])", "~", text)
    text = PLACE.sub(lambda found: last_name(found[0]), text)
    for name in owners():
        text = _without(name, text)
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1", text)  # credentials of an address


def _without(name: str, text: str) -> str:
    """``user`` for a name: anywhere if it is no word (``jane-2``); one of letters only where it can be nothing but a name."""
    word = re.escape(name)
    if not name.isalpha():
        return re.sub(rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])", "user", text)
    after = rf"(?<=[/\\@~]){word}(?![\w-]|\.\w)|(?:(?<=@)|(?<=://)){word}(?=\.)"  # a part of a path, ~jane, jane@host.domain
    before = rf"(?<![\w.-]){word}(?=[/\\@]|:[/\\~])"  # jane@, a first part, host:/folder
    return "user" if text == name else re.sub(f"{after}|{before}", "user", text)


def public_value(value: Any) -> Any:
    """Nested values, with :func:`public` of every text."""
    if isinstance(value, dict):
        return {key: public_value(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [public_value(one) for one in value]
    return public(value) if isinstance(value, str) else value


def public_recipe(text: str) -> str:
    """A configuration for others: without the keys of one machine, comments and places; "" where it can't be read."""
    try:
        stored = parse_yaml(text)
    except yaml.YAMLError:
        return ""
    if not isinstance(stored, dict):
        return ""
    for key in PRIVATE:
        section, _, name = key.rpartition(".")
        within = stored.get(section) if section else stored
        if isinstance(within, dict):
            within.pop(name, None)
        stored.pop(key, None)
    return str(yaml.safe_dump(public_value(stored), sort_keys=False, allow_unicode=True, width=120)).strip()


def public_files(folder: Path) -> None:
    """Rewrites the JSON of a folder that was just written; texts of several lines, such as chat templates, stay."""
    for file in sorted(folder.glob("*.json")):
        if file.name in VOCABULARIES:
            continue
        try:
            stored = parse_json(read_file(file))
        except (OSError, ValueError):
            continue
        if (shown := _paths_only(stored)) != stored:
            file.write_text(json.dumps(shown, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _paths_only(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _paths_only(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_paths_only(one) for one in value]
    return last_name(value) if isinstance(value, str) and WHOLE.fullmatch(value) and len(value) < 4096 else value
