"""From a configuration to a run that can start: data, tokenizer, model and run folder, checked before anything is written."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from aimv2.config.load import parse, read_recipe
from aimv2.config.schema import Config, DataConfig, Source, get_value, leaf_keys, to_dict
from aimv2.data.shards.format import captions_of, read_samples
from aimv2.data.stream.samples import training_samples, training_shards
from aimv2.data.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.interop.model_folder import checkpoints
from aimv2.io import parse_json, read_file, write_aside
from aimv2.tasks import Task, task_of
from aimv2.train.checkpoint import read_about, remove_unfinished
from aimv2.train.log import say

CONFIG = "config.yaml"
PARTS = (
    CONFIG,
    "metrics.jsonl",
    "damaged-metrics.jsonl",
    "summary.json",
    "checkpoints",
    "tensorboard",
    "wandb",
    "tokenizer",
    "report.html",
    "report",
    "data",
)
SCENES = "scenes"  # what the manifest of built-in data says
TOKENIZER_CAPTIONS = 200_000  # training captions that a tokenizer is trained on, at most

# what may differ from the run's own configuration when it resumes
MAY_CHANGE = {
    "run", "resume", "overwrite", "take_over", "accept_data",
    "train.stop_at", "train.max_hours", "train.save_every", "train.keep", "train.log_every", "train.compile",
    "train.checkpointing",
    "data.index_dir", "data.workers", "data.timeout", "data.max_bad", "log.tensorboard", "log.wandb", "log.report",
    *(k for k in leaf_keys() if k.startswith(("eval.", "parallel."))),
}  # fmt: skip
MOVED = ("data.train", "data.val")  # paths that may be others, and are written back; see aimv2.train.same_run


# ---- paths and data ----


def locate_data(config: Config) -> None:
    """Fills in $AIMV2_DATA and makes paths absolute, so that the run can resume from any folder."""
    data, root = config.data, os.environ.get("AIMV2_DATA")
    if data.train is None:
        data.train = root
    if isinstance(data.train, str):
        data.train = absolute(data.train)
    for source in data.train if isinstance(data.train, list) else []:
        if not source.path and root and source.name:
            source.path = str(Path(root) / source.name)
        source.path = absolute(source.path) if source.path else ""
    for key in ("val", "index_dir", "features"):
        if (given := getattr(data, key)) is not None:
            setattr(data, key, absolute(given))
    if data.tokenizer != "auto":
        data.tokenizer = absolute_model(data.tokenizer)
    if config.init is not None:
        config.init = absolute_model(config.init)
    for key, model in task_of(config).models().items():
        setattr(config.objective, key, absolute_model(model))


def absolute(path: str) -> str:
    """The path from the root, ``~`` expanded."""
    return os.path.abspath(os.path.expanduser(path))


def absolute_model(given: str) -> str:
    """The absolute path of a local model or run (perhaps RUN@STEP); a released name or a hub id as it is."""
    return absolute(given) if Path(given.rpartition("@")[0] or given).expanduser().exists() else given


def first_samples(config: Config, count: int) -> list[dict[str, bytes]]:
    """The first samples of the first shard of each source."""
    found: list[dict[str, bytes]] = []
    for shards in training_shards(config.data):
        found += islice((sample for shard in shards for _, sample in read_samples(shard)), count)
    if not found:
        raise UsageError(f"data.train: an empty data set: no sample in {config.data.train}")
    return found


def check_captions(samples: list[dict[str, bytes]], config: Config) -> None:
    """Raises UsageError where no sample has a caption and the task reads text."""
    task = task_of(config)
    if task.reads_text() and not any(captions_of(sample) for sample in samples):
        raise UsageError(
            f"data.train: captions missing: none of the first {len(samples)} samples of {_names(config)} has a KEY.txt or "
            f"captions in KEY.json; import them with --captions{task.no_captions}"
        )


def check_labels(samples: list[dict[str, bytes]], config: Config) -> None:
    """Raises UsageError where ``eval.probe`` is on and no sample has a label."""
    if config.eval.probe and not any(sample.get("cls") for sample in samples):
        raise UsageError(
            f"eval.probe: labels missing: none of the first {len(samples)} samples of {_names(config)} has a KEY.cls; "
            "leave eval.probe out, or import a class-folder tree"
        )


def remarks(config: Config) -> list[str]:
    """Warnings on values that are allowed but rarely intended, a line each."""
    lines = []
    if config.optim.warmup >= config.train.steps:
        lines.append(
            f"optim.warmup {config.optim.warmup} is not shorter than train.steps {config.train.steps}: the learning rate "
            "never reaches optim.lr"
        )
    if config.data.features is not None:
        lines.append(
            "data.features: every image is read in its centre view only; data.crop_scale and data.flip do nothing"
        )
    lines += [
        f"{path}: its import was not finished (run `aimv2 data import` again to continue); training on what is there"
        for path in _paths(config)
        if (Path(path) / ".import").is_dir()
    ]
    return lines


def _names(config: Config) -> str:
    train = config.data.train
    return ", ".join(_paths(config)) if train else "data.train"


# ---- the length of a run ----


def check_length(values: dict[str, Any], where: str) -> None:
    """Raises UsageError where both the steps and the epochs are given."""
    steps, epochs = values.get("train.steps"), values.get("train.epochs")
    if steps is not None and epochs is not None:
        raise UsageError(
            f"train.epochs {epochs} and train.steps {steps}, both {where}: epochs set the steps; leave one of them out",
            option="train.epochs",
            code="conflict",
        )


def steps_of(config: Config, epochs: float) -> int:
    """Optimizer steps of so many passes over the training data, rounded up.

    Raises:
        UsageError: native training, where a step has no number of pairs.
    """
    if config.train.patch_budget is not None:
        raise UsageError(
            f"train.epochs {epochs:g}: a step of train.patch_budget has no number of pairs; give train.steps",
            option="train.epochs",
            code="conflict",
        )
    return max(1, math.ceil(epochs * training_samples(config.data) / config.train.batch_size))


def settle_length(config: Config, given: dict[str, Any], scaled: bool) -> None:
    """Sets ``train.steps`` where epochs count, and the warm-up of a run without a recipe to a twentieth of the steps.

    Args:
        config: with its data located.
        given: values of the command line, before which those of a recipe give way.
        scaled: the warm-up is nobody's choice.
    """
    train = config.train
    if train.epochs is not None and given.get("train.steps") is None:
        train.steps = steps_of(config, train.epochs)
    train.epochs = None
    if scaled:
        config.optim.warmup = min(max(1, train.steps // 20), train.steps - 1)


# ---- tokenizer and model ----


def training_captions(config: Config) -> Iterator[str]:
    """Every caption of the training shards, source by source."""
    for shards in training_shards(config.data):
        for shard in shards:
            for _, sample in read_samples(shard):
                yield from (text for field in captions_of(sample).values() for text in field)


def get_tokenizer(config: Config, known: Path | None, world: World) -> Tokenizer | None:
    """The run's tokenizer: loaded, that of ``init``, or trained on the training captions (rank 0, for all); None for images only.

    Args:
        config: of the run.
        known: a folder with the tokenizer of the run to resume; used where the configured one is not at hand.
        world: the ranks.
    """
    task = task_of(config)
    return task.ready(find_tokenizer(config, task, known, world)) if task.reads_text() else None


def find_tokenizer(config: Config, task: Task, known: Path | None, world: World) -> Tokenizer:
    """See :func:`get_tokenizer`."""
    source = config.data.tokenizer
    if source != "auto" and (known is None or Path(source).exists()):
        return load_tokenizer(source)
    if known is not None:
        return load_tokenizer(known)
    if (home := task.tokenizer_home()) is not None:
        kept, wanted = load_tokenizer(home), config.data.vocab_size
        if world.main and wanted not in (kept.vocab_size, DataConfig().vocab_size):
            say(f"data.vocab_size {wanted} is not used: the decoder of init keeps its own {kept.vocab_size} tokens")
        return kept
    from aimv2.train.together import on_first

    captions = islice(training_captions(config), TOKENIZER_CAPTIONS)
    size, begin = config.data.vocab_size, task.start_text
    trained = on_first(
        world, lambda: train_tokenizer(captions, size, start=begin), Path(_names(config)), "see data.train"
    )
    return world.broadcast(trained)


# ---- the run folder ----


def check_run_folder(config: Config) -> Path:
    """The run folder of a new run, empty of runs.

    Raises:
        UsageError: not given, not writable, or holds a run and neither ``resume`` nor ``overwrite`` says what to do.
    """
    if not config.run:
        raise UsageError("--run is not given: a folder for the run is expected")
    run = Path(config.run)
    parent = run
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--run {run}: {parent} is not a writable folder")
    if holds_run(run) and not (config.resume or config.overwrite):
        raise UsageError(f"--run {run} holds a run; go on with --resume, or start anew with --overwrite", code="exists")
    return run


def holds_run(run: Path) -> bool:
    """Whether a run lives in the folder."""
    return (run / CONFIG).exists() or (run / "checkpoints").exists()


def is_demo_data(folder: Path) -> bool:
    """Whether a folder holds the demo's own scenes (and may be removed with its run)."""
    try:
        return parse_json(read_file(folder / "aimv2.json")).get("source") == SCENES
    except (OSError, ValueError, AttributeError):
        return False


def check_overwrite(config: Config, run: Path) -> None:
    """Raises UsageError where clearing the run folder would take the data away."""
    inside = [
        path
        for path in [*_paths(config), config.data.val, config.init, *task_of(config).models().values()]
        if path and _within(path, run)
    ]
    if config.overwrite and inside:
        raise UsageError(
            f"--overwrite would clear --run {run}, which contains {inside[0]}; move it, or choose another run",
            code="exists",
        )


def _within(path: str, folder: Path) -> bool:
    return Path(os.path.abspath(path.partition("@")[0])).is_relative_to(os.path.abspath(folder))


def _paths(config: Config) -> list[str]:
    train = config.data.train
    return [train] if isinstance(train, str) else [source.path for source in train or []]


def clear_run(run: Path) -> None:
    """Removes a run's own files from its folder, and nothing else."""
    if not holds_run(run):
        return
    for part in PARTS:
        path = run / part
        if part == "data" and not is_demo_data(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def open_run(run: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    """Creates the folder and writes what the run is: config.yaml and a trained tokenizer."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None and config.data.tokenizer == "auto":
            tokenizer.save(run / "tokenizer")
        start_only = ("resume", "overwrite", "take_over", "accept_data")
        stored = {key: value for key, value in to_dict(config).items() if key not in start_only}
        stored["train"] |= {"stop_at": None, "max_hours": None}  # of this start, not of the run
        write_aside(run / CONFIG, yaml.safe_dump(stored, sort_keys=False))
    except OSError as error:
        raise UsageError(f"--run {run} can't be written: {error.strerror}") from None


# ---- resuming ----


def resumed_values(run: Path, given: dict[str, Any]) -> Config:
    """The run's own configuration, with those of the given values that may change.

    Args:
        run: the run folder.
        given: flat values of the command line and of a recipe.

    Raises:
        UsageError: no run there, or a given value that may not change and differs.
    """
    if not (run / CONFIG).is_file():
        raise UsageError(f"--resume: no run in {run} ({CONFIG} expected); leave --resume out to start one")
    stored = stored_values(run)
    wanted = parse({**stored, **given})
    locate_data(wanted)
    if wanted.train.epochs is not None:  # the run has steps by now
        given = {**given, "train.steps": steps_of(wanted, wanted.train.epochs)}
        del given["train.epochs"]
        wanted.train.steps, wanted.train.epochs = given["train.steps"], None
    own = parse(stored, stored=True)
    may_change = {*MAY_CHANGE, *MOVED, *task_of(own).may_change}
    for key in given:
        old, new = get_value(own, key), get_value(wanted, key)
        if key not in may_change and old != new:
            raise UsageError(
                f"--resume keeps the run's own configuration: {key} is {_plain(old)} there, got {_plain(new)}; "
                "leave it out, or start another run",
                code="conflict",
            )
    return wanted


def stored_values(run: Path) -> dict[str, Any]:
    """The flat values of the run's config.yaml."""
    return read_recipe(run / CONFIG)


def known_tokenizer(run: Path) -> Path | None:
    """A folder of the run that holds its tokenizer: the trained one, or the newest checkpoint's copy."""
    homes = [run / "tokenizer", *(folder / "model" for _, folder in reversed(checkpoints(run)))]
    return next((home for home in homes if (home / "tokenizer_config.json").exists()), None)


def _plain(value: Any) -> Any:
    return (
        [source.path or source.name for source in value]
        if isinstance(value, list) and value and isinstance(value[0], Source)
        else value
    )


def drop_damaged(run: Path, world: World) -> None:
    """Keeps damaged checkpoints aside before anything is read of them; see :mod:`aimv2.train.sealing`.

    Raises:
        UsageError: on all ranks, where none is good.
    """
    from aimv2.train.sealing import set_aside_damaged
    from aimv2.train.together import on_first

    def clean() -> None:
        remove_unfinished(run)
        set_aside_damaged(run, say)

    on_first(world, clean, run, "the run's folder must be writable")


def find_resume(run: Path, config: Config, tokenizer: Tokenizer | None) -> Path | None:
    """The newest checkpoint, if it belongs to this tokenizer.

    Returns:
        its folder, or None where the run was stopped before its first one.
    """
    found = checkpoints(run)
    if not found:
        return None
    folder = found[-1][1]
    about = read_about(folder)
    if {"step", "seconds", "figures", "window", "tokenizer"} - about.keys():
        raise UsageError(
            f"--resume: {folder}/state/trainer.json lacks entries; remove {folder.name} to use the one before"
        )
    mine = tokenizer.fingerprint() if tokenizer else None
    if about["tokenizer"] != mine:
        raise UsageError(
            f"--resume: data.tokenizer {config.data.tokenizer} is not the tokenizer that the run was trained with"
        )
    return folder
