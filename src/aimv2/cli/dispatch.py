"""``aimv2 <verb>``: parse, call the verb's function in :mod:`aimv2.api`, print. No torch before a verb runs."""
# PYTHON_ARGCOMPLETE_OK: argcomplete's global hook looks for this

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aimv2 import __version__
from aimv2.errors import RankError, UsageError, nearest, one_line


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        function: its name in aimv2.api.
        words: positional arguments; the last may end in ``*`` (any number).
        summary: a line of help.
    """

    function: str
    words: tuple[str, ...]
    summary: str


VERBS = {
    "pretrain": Verb("pretrain", (), "pre-train an AIMV2; with nothing given, the demo on captioned scenes"),
    "run": Verb("run", ("chain",), "run a chain of stages: what is not done yet, in order, and one report"),
    "data import": Verb("data_import", ("source", "out"), "images and captions, as people have them, to shards"),
    "data check": Verb("data_check", ("source",), "look over shards before training"),
    "data browse": Verb("data_browse", (), "a page of samples as the model will see them, before a run (its options)"),
    "data shapes": Verb("data_shapes", ("out",), "write the built-in captioned scenes"),
    "data teach": Verb("data_teach", ("teacher", "data", "out"), "store a teacher's patch features beside the images"),
    "tokenizer train": Verb("tokenizer_train", ("captions", "out"), "train a BPE on captions"),
    "caption": Verb("caption", ("model", "images*"), "write captions of images, or score them against references"),
    "compare": Verb("compare", ("results*",), "results beside the paper's tables: text, Markdown, JSON, a plot"),
    "models": Verb("models", (), "every model by name: parameters, arithmetic, input size, licence, revision"),
    "convert": Verb("convert", ("source", "out"), "write a model for transformers, timm, ONNX, OpenVINO or ours"),
    "embed": Verb(
        "embed", ("model", "images", "out"), "features of images: a folder, a list or shards in, arrays or Parquet out"
    ),
    "probe": Verb("probe", ("model",), "measure a frozen encoder: the attentive probe's whole grid at once"),
    "knn": Verb("knn", ("model",), "measure a frozen encoder: nearest neighbours by cosine, a sweep over k"),
    "linear": Verb("linear", ("model",), "measure a frozen encoder: a linear classifier, by L-BFGS or SGD"),
    "fewshot": Verb("fewshot", ("model",), "measure a frozen encoder: a few images a class, over several draws"),
    "segment": Verb("segment", ("model",), "measure a frozen encoder: segmentation by a linear probe on its patches"),
    "depth": Verb("depth", ("model",), "measure a frozen encoder: depth by a linear probe on its patches"),
    "zeroshot": Verb(
        "zeroshot",
        ("model",),
        "classify by the texts of the classes: a pair (LiT, CLIP, ...), or a decoder's likelihood",
    ),
    "retrieve": Verb(
        "retrieve", ("model",), "find images by captions and captions by images: recall at k; a pair, or a decoder"
    ),
    "report": Verb(
        "report", ("runs*",), "a page of what a run has learnt: curves, pictures, figures; of several what differs"
    ),
    "explore": Verb("explore", ("model",), "look at a model in the browser: features, captions, next patches, search"),
    "doctor": Verb("doctor", (), "look over this machine, and train a tiny model; exit code 1 where something failed"),
    "push": Verb("push", ("model", "repository"), "upload a model to the hub, with its card"),
}
GROUPS = {name.split()[0] for name in VERBS if " " in name}
CONFIGURED = ("pretrain", "data browse")  # verbs that take the whole configuration as dotted options
CONFIG_HELP = "values of a run; dotted options go over them"
FLAGS = ("resume", "overwrite")
RANK_WAITS = 5.0  # seconds
DISK = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
)  # said in one line


def main(argv: list[str] | None = None) -> int:
    """Runs a verb.

    Returns:
        the exit code: 0, 1 where doctor found a failure, 2 for a mistake of input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    # torchrun -m aimv2 -- pretrain ...: without the dashes torchrun takes --run for an option of its own
    if words[:1] == ["--"]:
        del words[0]
    try:
        code = dispatch(words)
        sys.stdout.flush()  # a reader that has gone is noticed here, not while the interpreter ends
        return code
    except UsageError as error:
        if debug:
            raise
        if not isinstance(error, RankError) and os.environ.get("RANK", "0") != "0":
            time.sleep(RANK_WAITS)  # torchrun ends all ranks with the first; the one that speaks must get there
        complain(f"error: {' '.join(str(error).split())}", everywhere=isinstance(error, RankError))
        return 2
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
        if type(error).__name__ != "Interrupted":
            raise
        complain(str(error))
        return error.code  # type: ignore[attr-defined]


def run() -> None:
    """The command: :func:`main`, and the process ends with its code.

    One rank of several ends at once: gloo's threads may still hold tensors of the last collective, and one that lets go of
    them while the interpreter is taken down aborts a process whose work is done. So does a run that was asked to stop: a
    further signal would find the interpreter without its handlers.
    """
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could follow
        from aimv2.cli.complete import complete

        complete()
    code = main()
    if code in (130, 143) or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def complain(line: str, everywhere: bool = False) -> None:
    """A line on standard error; under torchrun from rank 0 alone, unless the rank alone knows of it."""
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def dispatch(words: list[str]) -> int:
    """Finds the verb, parses its options, calls it and prints its result."""
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name = words.pop(0)
    if name in GROUPS:
        inner = [verb.split()[1] for verb in VERBS if verb.startswith(name + " ")]
        if not words or words[0] in ("-h", "--help"):
            print(overview(name))
            return 0
        if words[0] not in inner:
            raise UsageError(f"unknown verb '{name} {words[0]}'{nearest(words[0], inner)} (there: {', '.join(inner)})")
        name = f"{name} {words.pop(0)}"
    if name not in VERBS:
        raise UsageError(f"unknown verb '{name}'{nearest(name, [*VERBS, *GROUPS])} (aimv2 --help lists them)")
    run = run_configured if name in CONFIGURED else run_verb
    result = run(name, words)
    if result is None or os.environ.get("RANK", "0") != "0":
        return 0
    if as_json:
        print(json.dumps(result, default=str))
    else:
        from aimv2.cli.show import show

        show(name, result)
    return int(name == "doctor" and result["failed"] > 0)


def overview(group: str | None = None) -> str:
    """The verbs, a line each."""
    rows = [(name, verb.summary) for name, verb in VERBS.items() if group is None or name.startswith(group + " ")]
    width = max(len(name) for name, _ in rows)
    lines = [f"  aimv2 {name:<{width}}  {summary}" for name, summary in rows]
    head = "AIMV2: multimodal autoregressive pre-training of vision encoders\n\n" if group is None else ""
    tail = "\n\n`aimv2 VERB --help` shows a verb's options; --json prints its result as one JSON object."
    return head + "\n".join(lines) + tail


def make_parser(name: str) -> Any:
    """jsonargparse's parser of a verb, with errors in one line."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            raise UsageError(one_line(message, options=True))

    verb = VERBS[name]
    return Parser(prog=f"aimv2 {name}", description=verb.summary, allow_abbrev=False)


def add_common(parser: Any) -> None:
    """Options that every verb has (taken out before parsing; here for the help)."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run_verb(name: str, words: list[str]) -> dict[str, Any] | None:
    """Parses a verb's options from its function's signature and calls it."""
    from aimv2 import api

    verb = VERBS[name]
    function: Callable[..., dict[str, Any]] = getattr(api, verb.function)
    if any(word in ("-h", "--help") for word in words):
        print_help(verb_parser(name))
        if name == "run":
            from aimv2.api.stages import EXAMPLE

            print(f"\n{EXAMPLE}")
        return None
    values = read_words(name, words)
    if "model" in verb.words and str(values.get("device") or "cpu") == "cpu":
        from aimv2.models.matmul import fast_products

        fast_products()
    return function(**values)


def verb_parser(name: str) -> Any:
    """The parser of a verb's words and of the options that its function takes."""
    from aimv2 import api

    function, parser = getattr(api, VERBS[name].function), make_parser(name)
    words = VERBS[name].words
    helps = _docs(function)
    for word in words:
        key = word.rstrip("*")
        many: dict[str, Any] = {"nargs": "*", "type": str} if word.endswith("*") else {"type": str}
        parser.add_argument(key, metavar=key.upper(), help=helps.get(key, ""), **many)
    taken = {word.rstrip("*") for word in words}
    if name in CONFIGURED:  # its own options; those of a configuration are read apart
        parser.add_argument("--config", metavar="RECIPE.yaml", type=str, help=CONFIG_HELP)
        taken |= {"config", "options"}
    parser.add_function_arguments(function, skip=taken)
    add_common(parser)
    return parser


def read_words(name: str, words: list[str]) -> dict[str, Any]:
    """The words of a command line as values of the verb's function.

    Raises:
        UsageError: an unknown option, a word too many or too few, a value of another type.
    """
    if name == "data browse":
        return read_browse(words)
    parser = verb_parser(name)
    words = _join_negative(words)
    _check_options(parser, words)
    values = vars(parser.parse_args(_bare_switches(parser, _dashes(words))))
    return {key: value for key, value in values.items() if key not in ("json", "debug")}


def print_help(parser: Any) -> None:
    """jsonargparse's help, without what is refused (a file for a section, appending) and with dashes in a verb's options."""
    lines = []
    for line in parser.format_help().splitlines():
        if re.match(r"  --\w+ CONFIG\b", line) or re.match(r"  --[\w.]+\.help\b", line):
            continue
        line = re.sub(r", --[\w.]+\+ \S+", "", line)
        lines.append(re.sub(r"(?<=[ \[])--[a-z_]+(?![\w.])", lambda found: found[0].replace("_", "-"), line))
    print("\n".join(lines))


def _docs(function: Callable[..., Any]) -> dict[str, str]:
    from docstring_parser import parse

    return {
        param.arg_name: " ".join((param.description or "").split()) for param in parse(function.__doc__ or "").params
    }


def _dashes(words: list[str]) -> list[str]:
    """--val-fraction is --val_fraction."""
    out = []
    for word in words:
        head, equals, tail = word.partition("=")
        out.append((head.replace("-", "_").replace("__", "--", 1) if head.startswith("--") else head) + equals + tail)
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


def _bare_switches(parser: Any, words: list[str]) -> list[str]:
    """--score is --score=true: an option of true or false with no such word behind it."""
    switches = {
        name
        for action in parser._actions
        if getattr(action, "_typehint", None) is bool
        for name in action.option_strings
    }
    out = []
    for word, following in zip(words, [*words[1:], ""]):
        bare = word in switches and following.lower() not in ("true", "false", "yes", "no")
        out.append(f"{word}=true" if bare else word)
    return out


def _check_options(parser: Any, words: list[str]) -> None:
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for word in _dashes(words):
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known and option != "--":
            shown = [o.replace("_", "-") for o in known]
            raise UsageError(f"unknown option '{option.replace('_', '-')}'{nearest(option.replace('_', '-'), shown)}")


def run_configured(name: str, words: list[str]) -> dict[str, Any] | None:
    """A verb that takes the whole configuration as dotted options."""
    from aimv2 import api

    if any(word in ("-h", "--help") for word in words):
        print_configured_help(name)
        return None
    if name == "pretrain":
        recipe, given, switches = read_options(words)
        return api.pretrain(recipe, None, given, "dry_run" in switches, "print_config" in switches)
    return api.data_browse(**read_browse(words))


def read_browse(words: list[str]) -> dict[str, Any]:
    """The words of ``data browse`` as values of its function: its own options, and those of a configuration."""
    recipe, given, switches = read_options(words, ("open",), ("out", "count"))
    own: dict[str, Any] = {key: given.pop(key) for key in ("out", "count") if key in given}
    if "count" in own:
        try:
            own["count"] = int(own["count"])
        except ValueError:
            raise UsageError(f"--count {own['count']}: a whole number expected") from None
    return {"config": recipe, "options": given, "open": "open" in switches, **own}


def print_configured_help(name: str) -> None:
    """Every key with its type, default and meaning."""
    from aimv2.config.schema import Config

    if name == "pretrain":
        parser = make_parser(name)
        parser.add_argument("--config", metavar="RECIPE.yaml", help=CONFIG_HELP)
        parser.add_argument(
            "--dry-run", action="store_true", help="build everything, run one step, say what a run takes"
        )
        parser.add_argument(
            "--print-config", action="store_true", help="show the effective values and where they came from"
        )
        add_common(parser)
    else:
        parser = verb_parser(name)
    parser.add_class_arguments(Config, nested_key=None)
    print_help(parser)


def read_options(
    words: list[str], switch_names: tuple[str, ...] = ("dry_run", "print_config"), more: tuple[str, ...] = ()
) -> tuple[str | None, dict[str, Any], set[str]]:
    """``--config R --run D --train.steps 10 --resume`` -> (recipe, values by dotted key, switches).

    Args:
        words: of the command line.
        switch_names: options of the verb itself without a value.
        more: those with one, which come among the values.

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
            raise UsageError(
                f"Unknown key: '{option[2:]}'{nearest(key, [*leaf_keys(), 'config', *switch_names, *more])}"
            )
        following = words[at] if at < len(words) else None
        if not equals:
            if key in FLAGS and (following is None or following.startswith("--")):
                given[key] = True
                continue
            if following is None or following.startswith("--"):
                raise UsageError(f"{option} needs a value")
            value, at = following, at + 1
        if key == "config":
            recipe = value
        else:
            given[key] = value
    return recipe, given, switches
