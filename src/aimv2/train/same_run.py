"""Whether a run goes on as the run that it was: what was edited in config.yaml, and the data that it reads.

A checkpoint keeps the content of config.yaml and the identity of the training data. What may change is taken and said; everything
else is refused, by name, before anything is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from aimv2.config.load import parse, renewed
from aimv2.config.schema import Config, Source, flatten, to_dict
from aimv2.distributed import join_world
from aimv2.errors import UsageError, shown
from aimv2.io import is_first, parse_yaml, read_file, write_aside
from aimv2.tasks import task_of
from aimv2.train.checkpoint import read_about
from aimv2.train.log import cut_metrics, read_metrics, say
from aimv2.train.prepare import CONFIG, MAY_CHANGE, MOVED, holds_run, stored_values

if TYPE_CHECKING:
    from aimv2.train.loop import Trainer

NAMED = 3  # changes in a line


def kept_values(run: Path) -> dict[str, Any]:
    """The flat values of config.yaml with all defaults, as JSON: what a checkpoint keeps of it."""
    return plain(parse(stored_values(run), stored=True))


def plain(config: Config) -> dict[str, Any]:
    """The flat values of a configuration, as JSON gives them back."""
    return json.loads(json.dumps(flatten(to_dict(config))))


def check_edits(run: Path, config: Config, about: dict[str, Any]) -> list[str]:
    """Compares config.yaml with what the last checkpoint kept of it; a line names what may change and did.

    Args:
        run: the run folder.
        config: of the resumed run: what config.yaml and the command line say.
        about: of the last checkpoint.

    Returns:
        the keys that changed.

    Raises:
        UsageError: anything else changed.
    """
    now, own = kept_values(run), parse(stored_values(run), stored=True)
    may_change = {*MAY_CHANGE, *MOVED, *task_of(own).may_change}
    before = about.get("stored")
    if not isinstance(before, dict):  # from before it was kept: what the run used, command line included
        used = about.get("config")
        flat = flatten(used if isinstance(used, dict) else {})
        before = {key: value for key, value in flat.items() if key not in may_change}
    before = renewed(before)
    # keys that another version has, or lacks, are none of a user
    changed = [key for key in now if key in before and now[key] != before[key]]
    words = {key: f"{key} {shown(before[key], 60)} -> {shown(now[key], 60)}" for key in changed}
    if refused := [words[key] for key in changed if key not in may_change]:
        raise UsageError(
            f"--resume: {run / CONFIG} was edited since the run was started: {listed(refused)}; this can't change on the way: set it "
            "back, or start another run",
            option="--resume",
            code="conflict",
        )
    if mixture(config.data.train) != mixture(about["config"]["data"]["train"]):
        raise UsageError(
            "--resume: data.train is another mixture (names, weights or captions of its sources); only paths may change",
            option="data.train",
            code="conflict",
        )
    if taken := [words[key] for key in changed if key not in MOVED]:
        say(f"{CONFIG} was edited, and is taken as it is: {listed(taken)}")
    return changed


def mixture(train: Any) -> list[Any]:
    """What a mixture is, apart from where it lies: name, weight and caption fields of each source."""
    sources = train if isinstance(train, list) else [Source(train or "")]
    every = [source if isinstance(source, dict) else asdict(source) for source in sources]
    return [{key: source.get(key) for key in ("name", "weight", "captions")} for source in every]


def listed(parts: list[str]) -> str:
    """The first few, and how many more there are."""
    return ", ".join(parts[:NAMED]) + (f" and {len(parts) - NAMED} more" if len(parts) > NAMED else "")


def check_never_saved(run: Path) -> None:
    """Raises UsageError where a run without checkpoints had one: its figures go past its first save, by its own configuration."""
    every = parse(stored_values(run), stored=True).train.save_every
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")[0]]
    if every and steps and max(steps) > every:
        raise UsageError(
            f"--resume: {run} has no checkpoint, but metrics.jsonl goes to step {max(steps):,} and the run saved every {every:,} steps "
            "(train.save_every): its checkpoints are gone; bring the folder checkpoints back, or --overwrite starts anew",
            option="--resume",
            code="missing",
        )


def start_or_go_on(
    recipe: str | None, base: dict[str, Any], given: dict[str, Any]
) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """What ``--resume auto`` stands for, as the first rank finds the run folder: the same command starts a run and goes on with it.

    Returns:
        the recipe, its values and the given ones. Of a run that is there its own configuration counts, not the recipe.
    """
    options = parse({**base, **given})
    if not options.run:
        raise UsageError("--resume auto needs --run, the folder of the run", option="--resume", code="missing")
    if options.overwrite:
        raise UsageError(
            "--resume auto goes on with a run and --overwrite removes it; give one of them", code="conflict"
        )
    world = join_world()
    if world.broadcast(holds_run(Path(options.run)) if world.main else None):
        return None, {"run": options.run}, {**given, "resume": True}
    return recipe, base, {key: value for key, value in given.items() if key not in ("resume", "accept_data")}


def mend_figures(run: Path, step: int) -> None:
    """Leaves lines of metrics out that can't be read, of a run that is finished; says so."""
    file = run / "metrics.jsonl"
    if is_first() and read_metrics(file)[1] and (broken := cut_metrics(file, step)):  # else nothing is written
        say(f"{broken} lines of metrics.jsonl can't be read and are left out; as it was it is damaged-metrics.jsonl")


# ---- data ----


def moved_data_are_given(build: Callable[[], Trainer]) -> Trainer:
    """``build()``; where the data of a run that goes on are not there, the UsageError says what to give."""
    try:
        return build()
    except UsageError as error:
        if (error.option, error.code) != ("data.train", "not-found"):
            raise
        raise UsageError(
            f"{error}; data that have moved are given by --resume --data.train NEW",
            option="data.train",
            code="not-found",
        ) from None


def note_run(trainer: Trainer) -> None:
    """Gives a trainer what its checkpoints keep of config.yaml and of the data; on the first rank."""
    trainer.notes = {"stored": kept_values(trainer.run), "data": data_of(trainer)}


def data_of(trainer: Trainer) -> Any:
    """The identity of the training data; None where they are not read on the way (``data.features`` has its own)."""
    if (indices := getattr(trainer.stream, "indices", None)) is None:
        return None
    from aimv2.data.stream.identity import identity_of
    from aimv2.data.stream.samples import training_shards

    return identity_of(training_shards(trainer.config.data), indices)


def same_data(trainer: Trainer, checkpoint: Path | None, accepted: bool) -> bool:
    """Compares the training data with those of the last checkpoint, writes moved paths back, and notes both; collective.

    Args:
        trainer: of the resumed run, before it is restored.
        checkpoint: its folder; None: the run starts again.
        accepted: ``--accept-data``.

    Returns:
        whether the position in the data is still valid.

    Raises:
        UsageError: on all ranks, where they changed and are not accepted.
    """
    problem, valid = None, True
    if trainer.world.main:
        try:
            about = read_about(checkpoint) if checkpoint is not None else {}
            now = data_of(trainer)
            if checkpoint is not None:
                moved = paths_of(trainer.config) != paths_in(about)
                valid = still_valid(about.get("data"), now, moved, accepted)
            write_back(trainer.run, trainer.config)
            trainer.notes = {"stored": kept_values(trainer.run), "data": now}
        except UsageError as error:
            problem = str(error)
        except OSError as error:  # else the other ranks would wait
            problem = f"--resume: {error.filename or trainer.run} can't be read or written: {error.strerror or error}"
    problem, valid = trainer.world.broadcast((problem, valid))
    if problem is not None:
        raise UsageError(problem, option="data.train", code="conflict")
    return valid


def still_valid(before: Any, now: Any, moved: bool, accepted: bool) -> bool:
    """Whether a position in data that were ``before`` is one in data that are so ``now``; see :func:`same_data`."""
    if before is None or now is None:
        if moved and not accepted:
            raise UsageError(
                "--resume: data.train has another path, and the checkpoint does not know what the data were (it is from before they "
                "were kept, or data.features is set); --accept-data takes them all the same"
            )
        if now is not None:
            say("the checkpoint is from before the identity of data was kept: whether data.train changed is not known")
        return True
    from aimv2.data.stream.identity import counts, differences

    if not (found := differences(before, now)):
        if moved:
            say(f"data.train has moved and is the same; {CONFIG} names its new path")
        return True
    what = listed(found)
    if not accepted:
        raise UsageError(
            f"--resume: data.train is not what the run was trained on: {what}; bring it back, or --accept-data goes on with it"
        )
    if counts(before) == counts(now):
        say(f"--accept-data: {what}; every shard has as many samples as before: the position in the data stays")
        return True
    say(
        f"--accept-data: {what}; the position in the data is lost with the numbers of samples: they are read from the start, and "
        "samples come again that this pass has had"
    )
    return False


def paths_of(config: Config) -> list[str]:
    """Where the sources of the mixture lie."""
    train = config.data.train
    return [train] if isinstance(train, str) else [source.path for source in train or []]


def paths_in(about: dict[str, Any]) -> list[str]:
    """Where they lay when a checkpoint was written."""
    train = about["config"]["data"]["train"]
    return [train] if isinstance(train, str) else [source["path"] for source in train or []]


def write_back(run: Path, config: Config) -> None:
    """Writes into config.yaml where the data lie, if that is elsewhere."""
    tree, now = parse_yaml(read_file(run / CONFIG).decode()), to_dict(config)["data"]
    names = [key.partition(".")[2] for key in MOVED]
    kept = tree["data"] = tree.get("data") or {}
    if all(kept.get(name) == now[name] for name in names):
        return
    kept |= {name: now[name] for name in names}
    write_aside(run / CONFIG, yaml.safe_dump(tree, sort_keys=False))
