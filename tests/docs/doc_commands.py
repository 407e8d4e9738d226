"""Commands and code as the documentation has them: taken out of Markdown, cut into words, checked by the real parsers."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimv2.cli.dispatch import is_file, read_options, read_words
from aimv2.commands.parse import read
from aimv2.commands.table import COMMANDS, FILES, GROUPS
from aimv2.config.load import parse, read_recipe
from aimv2.errors import UsageError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OURS = re.compile(r"(?:srun )?(?:aimv2|torchrun|python benchmarks/\S+|python -m aimv2|make) ")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^|\n\n)((?:    \S.*(?:\n|$)(?:\n(?=    \S))?)(?:    .*(?:\n|$))*)")


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        page: the file.
        text: as it stands there, continued lines joined.
        inline: within a sentence, where words may be left out.
    """

    page: Path
    text: str
    inline: bool = False


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of these languages, in order."""
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


def lines_of(block: str) -> list[str]:
    """Logical lines: continued ones joined, what follows a backslash and a comment left out."""
    joined = re.sub(r"\\\n\s*", "", block)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def commands(page: Path) -> list[Command]:
    """Every command of ours on a page: in fenced blocks, in indented ones, and within sentences."""
    text = page.read_text()
    prose = FENCE.sub("\n", text)
    found = [Command(page, line) for body in blocks(page, "bash", "sh", "") for line in lines_of(body)]
    found += [Command(page, line) for body in INDENTED.findall(prose) for line in lines_of(body)]
    spans = re.findall(r"`([^`]+)`", INDENTED.sub("\n\n", prose))
    found += [Command(page, " ".join(span.split()), inline=True) for span in spans]
    return [command for command in found if OURS.match(command.text + " ")]


def words_of(text: str) -> list[list[str]]:
    """Commands of a line as words: comments, ``...`` and what runs in the background left out; ``a | b X`` is ``a X`` and ``b X``,
    ``--precision fp32|bf16`` its first."""
    lexer = shlex.shlex(re.sub(r"(?<=\w)\|\w+", "", text), posix=True, punctuation_chars=";|&")
    lexer.whitespace_split = True
    words = [word.removesuffix("...") for word in lexer]
    out: list[list[str]] = []
    at: list[str] = []
    for word in [*words, ";"]:
        if word in (";", "&"):
            out += alternatives(at)
            at = []
        elif word:
            at.append(word)
    return [one for one in out if one]


def alternatives(words: list[str]) -> list[list[str]]:
    """``aimv2 knn | linear MODEL`` -> ``aimv2 knn MODEL``, ``aimv2 linear MODEL``."""
    if "|" not in words:
        return [words]
    last = len(words) - 1 - words[::-1].index("|")
    end = last + (3 if words[last + 1] in GROUPS else 2)
    tail, heads = words[end:], " ".join(words[:end]).split(" | ")
    return [["aimv2", *head.removeprefix("aimv2 ").split(), *tail] for head in heads]


def check(words: list[str], inline: bool = False) -> None:
    """Raises UsageError (or SystemExit, of argparse) where the command line would refuse the words."""
    if words[0] == "srun":
        words = words[1:]
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        if inline and "-m" not in words:
            return
        parsed = get_args_parser().parse_args(words[1:])
        assert parsed.module and parsed.training_script == "aimv2", words
        check(["aimv2", *(word for word in parsed.training_script_args if word != "--")], inline)
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"make {words[1]}"
    elif words[0] == "python":
        check_benchmark(words[1:]) if words[1].startswith("benchmarks/") else check(words[2:], inline)
    else:
        check_verb(words[1:], inline)


def check_verb(words: list[str], inline: bool) -> None:
    """Verb, options and their types, by the parsers of the command line."""
    words = [word for word in words if word not in ("--json", "--debug")]
    if not words or words[0] in ("VERB", "--help", "--help-all", "--version") or words == ["--install-completion"]:
        return
    name = words.pop(0)
    if name in GROUPS:
        if words and name in FILES and is_file(words[0]):
            words.insert(0, FILES[name].split()[1])
        name = f"{name} {words.pop(0)}" if words else next(other for other in COMMANDS if other.startswith(name + " "))
    assert name in COMMANDS, f"no command {name!r}"
    if {"--help", "--help-all"} & set(words) or (inline and not words):
        return
    if name in ("pretrain", "vlm train", "detect train"):
        recipe, given, _ = read_options(words)
        given |= {} if name == "pretrain" else {"objective.name": COMMANDS[name].task}
        parse({**(read_recipe(recipe) if recipe and recipe != "R.yaml" else {}), **given})
        return
    for missing in range(len(COMMANDS[name].words) + 1 if inline else 1):
        try:
            read(name, read_words(name, [*["X"] * missing, *words]))
            return
        except UsageError as error:
            if not inline or missing == len(COMMANDS[name].words):
                raise UsageError(f"{name}: {error}") from None


class Parsed(Exception):
    """The words were taken."""


def check_benchmark(words: list[str]) -> None:
    """A script of benchmarks/: its own parser takes the words; nothing is measured."""
    script = ROOT / words[0]
    assert script.is_file(), words[0]
    module, real = importlib.import_module(script.stem), argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: Any, *_: Any) -> None:
        real(parser, words[1:])
        raise Parsed

    argparse.ArgumentParser.parse_args = parse_and_stop  # type: ignore[method-assign, assignment]
    try:
        module.main()
    except Parsed:
        return
    finally:
        argparse.ArgumentParser.parse_args = real  # type: ignore[method-assign]
    raise AssertionError(f"{words[0]} parsed nothing")
