"""CHAIN.yaml -> jobs in the order in which they run, each a checked command.

A stage is one command; with several seeds it is one job per seed. No torch here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from aimv2.commands.parse import option_fields, plain, plain_hints, read
from aimv2.commands.table import COMMANDS, command_name, function_name
from aimv2.config.recipes import recipe_file
from aimv2.errors import UsageError, nearest
from aimv2.io import parse_yaml, read_file

TOP = ("out", "data", "seeds", "stages", "report")
KEYS = ("verb", "options", "needs", "title", "seeds")  # of every stage, besides the positional arguments of its command
NAME = re.compile(r"[A-Za-z][\w-]*")
REFERENCE = re.compile(r"\{([A-Za-z][\w-]*)\}")  # not {}, {a,b} or {000..004}, which commands read themselves
WORDS_OF_A_CHAIN = ("data", "seed")  # what {...} may name besides the stages
WRITTEN_BY_US = ("out", "run", "resume", "overwrite", "take_over", "accept_data")  # decided by the chain
NEEDS_DATA = ("probe", "knn", "linear", "fewshot", "segment", "depth", "zeroshot", "retrieve")


@dataclass(frozen=True)
class Stage:
    """One entry of ``stages``.

    Attributes:
        name: its key.
        verb: a function of aimv2.api.
        values: everything that decides what it does, as written: positional arguments and options by key.
        needs: stages that come before it, in the order of the file.
        title: for the report.
        seeded: runs once per seed.
    """

    name: str
    verb: str
    values: dict[str, Any]
    needs: tuple[str, ...]
    title: str
    seeded: bool


@dataclass(frozen=True)
class Job:
    """A stage with one seed (None: shared by all, or a chain without seeds).

    Attributes:
        name: of its folder.
        folder: that its command writes into.
        needs: stage -> name of the job that gives it.
        asked: the values as written, with the seed in them; what is compared when the chain runs again.
        values: the values that the command gets.
        command: words of the command line after ``aimv2``.
        recipe: of pretrain: the values of its recipe.
    """

    stage: Stage
    seed: int | None
    name: str
    folder: Path
    needs: dict[str, str]
    asked: dict[str, Any]
    values: dict[str, Any]
    command: list[str]
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """A chain file, checked.

    Attributes:
        path: of the file.
        out: folder of all stages.
        data: value of {data}.
        seeds: () runs every stage once, with its own seed.
        report: title -> [stage or "", figure]; {}: the default figures.
        jobs: in the order in which they run.
    """

    path: str
    out: Path
    data: str | None
    seeds: tuple[int, ...]
    report: dict[str, tuple[str, str]]
    jobs: list[Job]


def read_chain(path: str, out: str | None = None, data: str | None = None) -> Chain:
    """Reads a chain and checks everything that can be known before a stage runs, except inputs.

    Args:
        path: of the file.
        out: overrides the file's ``out``.
        data: overrides the file's ``data``.

    Raises:
        UsageError: in one line, naming the stage.
    """
    tree = _read_yaml(path)
    _check_keys(tree, TOP, f"in {path}")
    out, data = out or _text(tree, "out", path), data or _text(tree, "data", path)
    if not out:
        raise UsageError(f"CHAIN {path}: no folder for the stages: `out: FOLDER` in it, or --out FOLDER, is expected")
    seeds = _seeds(tree, path)
    stages = read_stages(tree, path)
    ordered = order(stages, path)
    folder = Path(out).expanduser()
    jobs: dict[str, Job] = {}
    for seed in seeds or (None,):
        for stage in ordered:
            job = make_job(stage, stages, folder, seed if stage.seeded else None, data, path)
            if job.name in jobs and jobs[job.name].stage.name != stage.name:
                raise UsageError(
                    f"CHAIN {path}: stages '{stage.name}' and '{jobs[job.name].stage.name}' share a folder"
                )
            jobs.setdefault(job.name, job)
    for job in jobs.values():
        check_steps(job, jobs, path)
    return Chain(path, folder, data, seeds, _report(tree, stages, path), list(jobs.values()))


# ---- the file ----


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = read_file(recipe_file(path, "CHAIN")).decode()
        tree = parse_yaml(text, _check_twice)
    except OSError as error:
        raise UsageError(f"CHAIN {path}: {(error.strerror or str(error)).lower()}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"CHAIN {path} is not YAML: {' '.join(str(error).split())}", code="unreadable") from None
    if not isinstance(tree, dict):
        raise UsageError(f"CHAIN {path}: `stages:` with a mapping of stages expected; aimv2 run --help shows one")
    return tree


def _check_twice(node: yaml.Node) -> None:
    """Refuses a key given twice: the first of two stages of a name would be gone without a word."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_twice(item)
    if isinstance(node, yaml.MappingNode):
        known = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in known:
                    raise yaml.YAMLError(f"'{key.value}' is given twice, line {key.start_mark.line + 1}")
                known.add(key.value)
            _check_twice(value)


def _check_keys(tree: dict[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in tree:
        if key not in known:
            raise UsageError(
                f"unknown key '{key}' {where}{nearest(str(key), known)} (there: {', '.join(known)})", code="unknown"
            )


def _text(tree: dict[str, Any], key: str, path: str) -> str | None:
    value = tree.get(key)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"CHAIN {path}: {key} must be a path, got {value!r}")
    return value


def _seeds(tree: dict[str, Any], path: str) -> tuple[int, ...]:
    seeds = tree.get("seeds", [])
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or len(set(seeds)) < len(seeds) or ("seeds" in tree and not seeds):
        raise UsageError(f"CHAIN {path}: seeds must be a list of different whole numbers from 0 on, got {seeds!r}")
    return tuple(seeds)


def _report(tree: dict[str, Any], stages: dict[str, Stage], path: str) -> dict[str, tuple[str, str]]:
    """``[figure, ...]`` or ``{title: stage.figure}`` -> title: (stage or "", figure)."""
    given = tree.get("report") or {}
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        return {name: ("", name) for name in given}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given.values()):
        raise UsageError(f"CHAIN {path}: report must be a list of figures or `title: stage.figure`, got {given!r}")
    found = {}
    for title, name in given.items():
        stage, dot, figure = name.partition(".")
        if not dot or stage not in stages:
            raise UsageError(
                f"CHAIN {path}: report: '{name}' of '{title}' is not stage.figure{nearest(stage, stages)} "
                f"(stages: {', '.join(stages)})"
            )
        found[str(title)] = (stage, figure)
    return found


# ---- stages ----


def read_stages(tree: dict[str, Any], path: str) -> dict[str, Stage]:
    """Every stage, its verb, keys and references checked."""
    entries = tree.get("stages")
    if not isinstance(entries, dict) or not entries:
        raise UsageError(f"CHAIN {path}: `stages:` with a mapping of stages expected; aimv2 run --help shows one")
    for name in entries:
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in WORDS_OF_A_CHAIN:
            raise UsageError(
                f"CHAIN {path}: stage '{name}': a name of letters, digits, _ and -, starting with a letter, other than "
                f"{' and '.join(WORDS_OF_A_CHAIN)}, expected"
            )
    return {name: _read_stage(name, entry, list(entries), path) for name, entry in entries.items()}


def _read_stage(name: str, entry: Any, names: list[str], path: str) -> Stage:
    where = f"CHAIN {path}: stage '{name}'"
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: keys such as verb and options expected, got {entry!r}")
    verb = _command(entry.get("verb"), where)
    words = own_words(verb)
    _check_stage_keys(entry, words, verb, where)
    values = {word: entry[word] for word in words if entry.get(word) is not None}
    options = entry.get("options") or {}
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise UsageError(f"{where}: options must be a mapping of keys to values, got {options!r}")
    for key, value in options.items():
        plain = key.replace("-", "_") if verb != "pretrain" else key
        if plain in WRITTEN_BY_US:
            raise UsageError(f"{where}: options.{key}: the chain decides it; leave it out", code="conflict")
        if plain in words:
            raise UsageError(f"{where}: options.{key}: a key of the stage itself; write `{plain}:` next to verb")
        values[plain] = value
    for word in ("init", "model", "teacher", "objective.teacher"):
        if str(values.get(word)).partition("@")[0] in names:
            raise UsageError(f"{where}: {word} {values[word]}: a stage is named in braces: '{{{values[word]}}}'")
    needs = entry.get("needs") or []
    if not isinstance(needs, list):
        raise UsageError(f"{where}: needs must be a list of stages, got {needs!r}")
    named = [*references(values), *needs]
    for other in named:
        if other not in names and (other not in WORDS_OF_A_CHAIN or other in needs):
            known = [*names, *WORDS_OF_A_CHAIN]
            raise UsageError(
                f"{where}: '{{{other}}}' is none of the stages{nearest(str(other), known)} (there: {', '.join(known)})"
            )
    seeded = entry.get("seeds", True)
    if not isinstance(seeded, bool):
        raise UsageError(f"{where}: seeds must be false (one run, shared) or left out, got {seeded!r}")
    return Stage(name, verb, values, tuple(n for n in names if n in named), str(entry.get("title") or ""), seeded)


def _command(given: Any, where: str) -> str:
    """The command that a stage names as ``data_shapes`` or ``data shapes``, in the first form."""
    known = [function_name(name) for name in COMMANDS if name != "run"]
    if given is None:
        raise UsageError(f"{where}: verb is missing (one of {', '.join(known)})", code="missing")
    verb = function_name(str(given))
    if verb not in known:
        raise UsageError(
            f"{where}: unknown verb '{given}'{nearest(verb, known)} (one of {', '.join(known)})", code="unknown"
        )
    return verb


def own_words(verb: str) -> tuple[str, ...]:
    """Keys of a stage that are its command's own: config and init of pretrain, else its positional arguments."""
    if verb == "pretrain":
        return ("config", "init")
    return tuple(word.rstrip("*") for word in COMMANDS[command_name(verb)].words if word != "out")


def _check_stage_keys(entry: dict[Any, Any], words: tuple[str, ...], verb: str, where: str) -> None:
    for key in entry:
        if key not in (*KEYS, *words):
            known = (*KEYS, *words)
            option = "" if nearest(str(key), known) else "; options of the command go below `options:`"
            raise UsageError(
                f"{where}: unknown key '{key}'{nearest(str(key), known)}{option} (keys of {verb}: {', '.join(known)})",
                code="unknown",
            )
    scoring = verb == "caption" and (entry.get("options") or {}).get("score")
    for word in words if verb != "pretrain" and not scoring else ():
        if entry.get(word) in (None, "", []):
            raise UsageError(f"{where}: {verb} needs `{word}:`", code="missing")
    if verb in NEEDS_DATA and not (entry.get("options") or {}).get("data"):
        raise UsageError(f"{where}: {verb} needs `data:` in its options", code="missing")


# ---- references ----


def strings(value: Any) -> Iterator[str]:
    """Every text inside lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def references(value: Any) -> list[str]:
    """What ``{...}`` names in a value."""
    return [name for text in strings(value) for name in REFERENCE.findall(text)]


def fill(value: Any, meaning: Callable[[str], str | None]) -> Any:
    """The value with each ``{name}`` replaced; where ``meaning`` gives None it stays."""
    if isinstance(value, str):
        return REFERENCE.sub(lambda found: found[0] if (new := meaning(found[1])) is None else new, value)
    if isinstance(value, dict):
        return {key: fill(item, meaning) for key, item in value.items()}
    return [fill(item, meaning) for item in value] if isinstance(value, list) else value


def order(stages: dict[str, Stage], path: str) -> list[Stage]:
    """The stages, each after what it needs, else as in the file.

    Raises:
        UsageError: a cycle, named.
    """
    done: dict[str, Stage] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            cycle = " -> ".join([*trail[trail.index(name) :], name])
            raise UsageError(f"CHAIN {path}: a cycle: {cycle}; each needs the next to be done before it")
        if name not in done:
            for other in stages[name].needs:
                visit(other, (*trail, name))
            done[name] = stages[name]

    for name in stages:
        visit(name, ())
    return list(done.values())


# ---- jobs ----


def make_job(stage: Stage, stages: dict[str, Stage], out: Path, seed: int | None, data: str | None, path: str) -> Job:
    """A stage with its seed, as a checked command line."""
    where = f"CHAIN {path}: stage '{stage.name}'"
    named = references(stage.values)
    if "data" in named and data is None:
        raise UsageError(f"{where}: {{data}} is undefined: set `data:` in the chain file or pass --data PATH")
    if "seed" in named and seed is None:
        why = "the chain names no seeds" if stage.seeded else "it has seeds: false"
        raise UsageError(f"{where}: {{seed}} is undefined: {why}")
    for other in stage.needs:
        if seed is None and stages[other].seeded and not stage.seeded:
            raise UsageError(f"{where}: it has seeds: false and needs '{other}', which runs once per seed")
    needs = {other: _job_name(other, seed if stages[other].seeded else None) for other in stage.needs}
    asked = {**fill(stage.values, {"seed": str(seed)}.get), **_seed_option(stage, seed)}
    meaning = {other: str(out / job) for other, job in needs.items()} | ({} if data is None else {"data": data})
    values = fill(asked, meaning.get)
    name = _job_name(stage.name, seed)
    try:
        recipe = check_values(stage.verb, values, out / name)
    except UsageError as error:
        raise UsageError(f"{where}: {error}", option=error.option, code=error.code) from None
    return Job(
        stage, seed, name, out / name, needs, asked, values, command_words(stage.verb, values, out / name), recipe
    )


def _job_name(stage: str, seed: int | None) -> str:
    return stage if seed is None else f"{stage}-seed{seed}"


def _seed_option(stage: Stage, seed: int | None) -> dict[str, Any]:
    """The option by which the command takes a seed, unless the stage gives it itself."""
    known = ("seed",) if stage.verb == "pretrain" else option_fields(command_name(stage.verb))
    key = "seed" if "seed" in known else "seeds" if "seeds" in known else None
    return {} if seed is None or key is None or key in stage.values else {key: seed}


def with_folder(verb: str, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values of a stage, and its folder where its command takes one."""
    if verb == "pretrain":
        return {**values, "run": str(folder)}
    captions_only = verb == "caption" and not values.get("score")  # they are the result
    takes = "out" in option_fields(command_name(verb)) and not captions_only
    return {**values, "out": str(folder)} if takes else dict(values)


def command_words(verb: str, values: dict[str, Any], folder: Path) -> list[str]:
    """The words of the command line after ``aimv2``."""
    name = command_name(verb)
    words, rest = name.split(), with_folder(verb, values, folder)
    if verb != "pretrain":  # as the options were checked: a list of a text option is text with commas
        texts = {key for key, hint in plain_hints(name).items() if hint in (str, str | None)}
        rest = {key: plain(value, key.replace("-", "_") in texts) for key, value in rest.items()}
    for word in COMMANDS[name].words:
        given = rest.pop(word.rstrip("*"), [])
        words += [_as_word(item) for item in (given if isinstance(given, list) else [given])]
    for key in ("run", "out"):  # first
        words += [f"--{key}={rest.pop(key)}"] if key in rest else []
    return words + [f"--{key}={_as_word(value)}" for key, value in rest.items()]


def _as_word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def check_values(verb: str, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the command itself would say of a stage's values; nothing runs.

    Returns:
        of pretrain: the values of its recipe.

    Raises:
        UsageError: an unknown option, a value of another type or out of range, no data.
    """
    from aimv2.config.load import check_keys, parse, read_recipe

    if verb != "pretrain":
        read(command_name(verb), configured(verb, with_folder(verb, values, folder)))
        return {}
    given = {key: value for key, value in values.items() if key != "config"}
    recipe = read_recipe(values["config"]) if values.get("config") else {}
    check_keys(given, "in its options", recipe)
    config = parse({**recipe, **given})
    continued = config.optim.schedule == "cooldown" and config.init is not None  # with the data of the run it finishes
    if config.data.train is None and not continued and not os.environ.get("AIMV2_DATA"):
        raise UsageError("pretrain needs `data.train:` in its options (or $AIMV2_DATA)", code="missing")
    return recipe


def configured(verb: str, values: dict[str, Any]) -> dict[str, Any]:
    """Values by option; those of a configuration among the options of ``data browse`` below ``options``."""
    known = option_fields(command_name(verb))
    if "options" not in known:
        return {key.replace("-", "_"): value for key, value in values.items()}
    own = {key: value for key, value in values.items() if key in known}
    return {**own, "options": {key: value for key, value in values.items() if key not in known}}


def check_steps(job: Job, jobs: dict[str, Job], path: str) -> None:
    """Raises UsageError where ``{stage}@STEP`` names a checkpoint that the stage will not keep."""
    from aimv2.config.load import parse

    for text in strings(job.asked):
        found = re.fullmatch(r"\{([A-Za-z][\w-]*)\}@(\d+)", text)
        if not found or found[1] not in job.needs:
            continue
        other, step = jobs[job.needs[found[1]]], int(found[2])
        if other.stage.verb != "pretrain":
            raise UsageError(f"CHAIN {path}: stage '{job.stage.name}': {text}: '{found[1]}' is no pretrain stage")
        given = {key: value for key, value in other.values.items() if key != "config"}
        train = parse({**other.recipe, **given}).train
        if train.epochs is not None:  # the number of steps is known with the data
            continue
        saved = {*range(0, train.steps, train.save_every or train.steps), train.steps} - {0}
        kept = sorted(saved)[-train.keep :] if train.keep else sorted(saved)
        if step not in kept:
            raise UsageError(
                f"CHAIN {path}: stage '{job.stage.name}': {text}: the stage keeps {', '.join(map(str, kept[-5:]))} "
                "(train.steps, train.save_every, train.keep)"
            )
