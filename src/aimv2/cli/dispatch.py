"""``aimv2 COMMAND``: find the command, read its words, run it, print the result. No torch before a command runs."""
# PYTHON_ARGCOMPLETE_OK: argcomplete's global hook looks for this

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from aimv2 import __version__
from aimv2.commands.parse import module_of, option_fields, plain_hints, read, spelled
from aimv2.commands.table import COMMANDS, FILES, GROUPS, PARTS
from aimv2.errors import RankError, UsageError, first_line, nearest, one_line, shown
from aimv2.places import settle_caches

HELP = ("-h", "--help", "--help-all")
FLAGS = ("resume", "overwrite", "take_over", "accept_data")
LOST_KINDS = ("DistBackendError", "DistNetworkError", "DistStoreError")  # of torch.distributed
LOST_TEXTS = (
    "/gloo/",
    "[gloo]",
    "ncclRemoteError",
    "ncclSystemError",
    "NCCL communicator was aborted",
    "Connection closed by",
)
OWN_FAULT = (
    "ncclInvalid",
    "Invalid usage",
    "invalid usage",
    "Duplicate GPU",
    "nhandled cuda error",
    "ncclInternalError",
)
RANK_WAITS = 5.0  # seconds
DISK = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EIO,
    errno.ESTALE,
    errno.EISDIR,
    errno.EINVAL,  # a pipe or a device under the name of a file
)  # said in one line


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        the exit code: 0, 1 where doctor found a failure, 2 for a mistake of input, 75 where a data worker was lost, 130 after Ctrl-C,
        143 after SIGTERM, 129 after SIGHUP.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    # torchrun -m aimv2 -- pretrain ...: without the dashes torchrun takes --run for an option of its own
    if words[:1] == ["--"]:
        del words[0]
    settle_caches()
    try:
        code = dispatch(words)
        sys.stdout.flush()  # a reader that has gone is noticed here, not while the interpreter ends
        return code
    except UsageError as error:
        if debug:
            raise
        if not isinstance(error, RankError) and os.environ.get("RANK", "0") != "0":
            time.sleep(RANK_WAITS)  # torchrun ends all ranks with the first; the one that speaks must get there
        complain(f"error: {error}", everywhere=isinstance(error, RankError))
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        complain("stopped")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if debug or error.errno not in DISK:
            raise
        complain(f"error: {error.filename or 'the disk'}: {error.strerror}")
        return 2
    except ModuleNotFoundError as error:
        from aimv2.doctor.packages import install_line

        line = install_line(error.name or "")
        if debug or line is None:
            raise
        complain(f"error: the package of {error.name} is missing: {line}")
        return 2
    except Exception as error:
        if type(error).__name__ == "Interrupted":
            complain(str(error))
            return error.code  # type: ignore[attr-defined]
        if debug or not (int(os.environ.get("WORLD_SIZE", "1")) > 1 and is_lost_rank(error)):
            raise
        complain(f"rank {os.environ['RANK']} ends: the connection to another rank is lost", everywhere=True)
        return 1
    except BaseException as error:
        if debug or type(error).__name__ != "PanicException":  # of Rust, which is no Exception
            raise
        complain(
            f"error: a library ended on its input: {first_line(error)}; a tokenizer's pattern may not fit its texts"
        )
        return 2


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error of torch's process groups says that another rank has gone, or that it can't be reached."""
    text = str(error)
    if any(word in text for word in OWN_FAULT):
        return False
    kinds = {kind.__name__ for kind in type(error).__mro__}  # torch may not be imported here
    return bool(kinds & set(LOST_KINDS)) or ("RuntimeError" in kinds and any(word in text for word in LOST_TEXTS))


def run() -> None:
    """The command: :func:`main`, and the process ends with its code.

    One rank of several ends at once: gloo's threads may still hold tensors of the last collective, and one that lets go of
    them while the interpreter is taken down aborts a process whose work is done. So does a run that was interrupted: a
    further signal would find the interpreter without its handlers.
    """
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could follow
        from aimv2.cli.complete import complete

        complete()
    code = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk there is not the command's failure; Python would end with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if code in (75, 129, 130, 143) or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


def complain(line: str, everywhere: bool = False) -> None:
    """A line on standard error; under torchrun from rank 0 only, unless only this rank knows it."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a full disk, or nobody there
            print(shown(line), file=sys.stderr)


def dispatch(words: list[str]) -> int:
    """Finds the command, reads its options, runs it and prints its result."""
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    if not words or words[0] in HELP:
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name = words.pop(0)
    if name in GROUPS:
        inner = [command.split()[1] for command in COMMANDS if command.startswith(name + " ")]
        if not words or words[0] in HELP:
            print(overview(name))
            return 0
        if words[0] not in inner and name in FILES and is_file(words[0]):
            words.insert(0, FILES[name].split()[1])
        if words[0] not in inner:
            known = f"{nearest(words[0], inner)} (there: {', '.join(inner)})"
            raise UsageError(f"unknown command '{name} {words[0]}'{known}", code="unknown")
        name = f"{name} {words.pop(0)}"
    if name not in COMMANDS:
        known = f"{nearest(name, [*COMMANDS, *GROUPS])} (aimv2 --help lists them)"
        raise UsageError(f"unknown command '{name}'{known}", code="unknown")
    if any(word in HELP for word in words):
        from aimv2.cli.help import help_of

        print(help_of(name, whole="--help-all" in words))
        return 0
    given = read_words(name, words)
    options = read(name, given)  # mistakes are reported before torch is imported
    if "model" in COMMANDS[name].words and str(given.get("device") or "cpu") == "cpu":
        from aimv2.models.matmul import fast_matmul

        fast_matmul()
    result = module_of(name).run(options)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if as_json:
        import json

        print(json.dumps(result, default=str))
    else:
        from aimv2.commands.render import render

        render(name, result)
    exit_code = getattr(module_of(name), "exit_code", None)
    return exit_code(result) if exit_code is not None else 0


def is_file(word: str) -> bool:
    """Whether a word is a path rather than a command: it is there, or has an ending or a folder."""
    return not word.startswith("-") and (Path(word).exists() or bool(Path(word).suffix) or "/" in word)


def overview(group: str | None = None) -> str:
    """The commands, a line each: all of them under what they are for, or those of a group such as ``data``."""
    shown = {name: command for name, command in COMMANDS.items() if group is None or name.startswith(f"{group} ")}
    width = max(map(len, shown))
    parts = [] if group else ["AIMV2: multimodal autoregressive pre-training of vision encoders"]
    for part in PARTS:
        rows = [f"  {name:<{width}}  {command.summary}" for name, command in shown.items() if command.part == part]
        if rows:
            parts.append("\n".join(rows if group else [f"{part}:", *rows]))
    parts.append("`aimv2 COMMAND --help` shows a command's options;\n--json prints its result as one JSON object.")
    return "\n\n".join(parts)


def read_words(name: str, words: list[str]) -> dict[str, Any]:
    """The words of a command line as values by option.

    Raises:
        UsageError: an unknown option, a word too many or too few, a value of another type.
    """
    if COMMANDS[name].configured:
        own = [key for key in option_fields(name) if key not in ("config", "run", "options")]
        bare_ones = tuple(key for key in own if option_fields(name)[key].default is False)
        first = tuple(key for key in module_of(name).FIRST.split() if "." in key)
        recipe, given, bare = read_options(words, bare_ones, tuple(key for key in own if key not in bare_ones), first)
        mine: dict[str, Any] = {key: given.pop(key) for key in own if key in given}
        return {"config": recipe, "options": given, **mine, **{key: True for key in bare}}
    _check_options(name, words)
    hints, positional = plain_hints(name), COMMANDS[name].words
    parser = LineParser(prog=f"aimv2 {name}", add_help=False, allow_abbrev=False)
    for word in positional:
        key = word.rstrip("*")
        parser.add_argument(key, metavar=key.upper(), nargs="*" if word.endswith("*") else None)
    options = [key for key in option_fields(name) if key not in {word.rstrip("*") for word in positional}]
    for key in options:
        parser.add_argument(spelled(name, key), dest=key, default=argparse.SUPPRESS)
    switches = {spelled(name, key) for key in options if hints[key] is bool}
    values = parser.parse_args(
        _bare_switches(switches, _dashes([word for word in _join_negative(words) if word != "--debug"]))
    )
    return vars(values)


class LineParser(argparse.ArgumentParser):
    """Splits the words of a command line; what the values mean is left to :func:`aimv2.commands.parse.read`."""

    def error(self, message: str) -> Any:
        raise UsageError(one_line(message, options=True), code="missing" if "required" in message else "invalid")


def _dashes(words: list[str]) -> list[str]:
    """--val_fraction is --val-fraction."""
    out = []
    for word in words:
        head, equals, tail = word.partition("=")
        out.append((head.replace("_", "-") if head.startswith("--") else head) + equals + tail)
    return out


def _join_negative(words: list[str]) -> list[str]:
    """``--layers -6,-1`` is ``--layers=-6,-1``: no option of ours starts with a digit."""
    out: list[str] = []
    for word in words:
        if re.match(r"-\d", word) and out and out[-1].startswith("--") and "=" not in out[-1]:
            out[-1] += f"={word}"
        else:
            out.append(word)
    return out


def _bare_switches(switches: set[str], words: list[str]) -> list[str]:
    """--score is --score=true: an option of true or false with no such word after it."""
    out = []
    for word, following in zip(words, [*words[1:], ""]):
        bare = word in switches and following.lower() not in ("true", "false", "yes", "no")
        out.append(f"{word}=true" if bare else word)
    return out


def _check_options(name: str, words: list[str]) -> None:
    known = ["--help", "--help-all", "--json", "--debug", *(spelled(name, key) for key in option_fields(name))]
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known and option != "--":
            raise UsageError(f"unknown option '{option}'{nearest(option, known)}", code="unknown")


def read_options(
    words: list[str],
    switch_names: tuple[str, ...] = ("dry_run", "print_config"),
    more: tuple[str, ...] = (),
    first: tuple[str, ...] = (),
) -> tuple[str | None, dict[str, Any], set[str]]:
    """``--config R --run D --train.steps 10 --resume`` -> (recipe, values by dotted key, switches).

    Args:
        words: of the command line.
        switch_names: options of the command itself without a value.
        more: those with one, which are among the values.
        first: keys that its help shows first, a task's own among them: proposed before others.

    Raises:
        UsageError: an unknown option (with the nearest known one), an option without its value, a stray word.
    """
    from aimv2.config.schema import known_keys, leaf_keys

    keys, recipe, given, switches = {*known_keys(), *more}, None, dict[str, Any](), set[str]()
    at = 0
    while at < len(words):
        option, equals, value = words[at].partition("=")
        at += 1
        key = option[2:].replace("-", "_")
        if not option.startswith("--"):
            raise UsageError(f"unexpected '{option}'; options are --section.key VALUE")
        if key in switch_names and not equals:
            switches.add(key)
            continue
        if key not in keys and key != "config" and not key.startswith("objective."):  # a task may bring more of these
            own = ["config", *(name.replace("_", "-") for name in (*switch_names, *more))]
            known = nearest(key, [*first, *leaf_keys(), *own]).replace("'", "'--", 1)
            raise UsageError(f"unknown option '{option}'{known}", option=option, code="unknown")
        following = words[at] if at < len(words) else None
        if not equals:
            if key in FLAGS and (following is None or following.startswith("--")):
                given[key] = True
                continue
            if following is None or following.startswith("--"):
                raise UsageError(f"{option} needs a value", code="missing")
            value, at = following, at + 1
        if key == "config":
            recipe = value
        else:
            given[key] = value
    return recipe, given, switches
