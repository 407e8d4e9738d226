"""``aimv2 pretrain``: a run from a recipe, dotted options or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aimv2.config.types import PathText
from aimv2.errors import UsageError

EXAMPLES = """\
aimv2 pretrain --run runs/demo                      # the demo
aimv2 pretrain --data.train shards/mine --dry-run   # what a run would take
aimv2 pretrain --data.train shards/mine --run runs/mine
aimv2 pretrain --config cifar10-small --data.train shards/cifar --run runs/c10
aimv2 pretrain --run runs/mine --resume"""
FIRST = (
    "config run data.train init model.name train.steps train.epochs train.batch_size train.max_hours resume overwrite "
    "dry_run print_config"
)


@dataclass(kw_only=True)
class PretrainOptions:
    """Pre-train an AIMV2: recipe, run folder and dotted options in, a trained run out.

    With neither a recipe nor data the demo runs: captioned scenes, drawn into the run folder.

    Args:
        config: YAML recipe, by path or by a name of `aimv2 recipes`; without one and without data: the demo on captioned scenes
        run: run folder
        options: values by dotted key, which override the recipe's (``{"train.steps": 100, "resume": True}``)
        dry_run: build all, run three steps, say what a run takes
        print_config: show the effective values and where they came from
    """

    config: PathText | None = None
    run: PathText | None = None
    options: dict[str, Any] | None = None
    dry_run: bool = False
    print_config: bool = False


def run(options: PretrainOptions) -> dict[str, Any]:
    """
    Returns:
        the run's summary (also in ``summary.json``; of several processes on the first only, the others have ``run`` and ``step``), or
        what ``dry_run`` or ``print_config`` found.

    Raises:
        UsageError: a mistake of input, in one line.
        Interrupted: a signal came; the run has been saved.
    """
    from aimv2.train.launch import launch

    given = dict(options.options or {})
    if options.run is not None:
        given["run"] = options.run
    return launch(options.config, given, options.dry_run, options.print_config)


def run_as(options: PretrainOptions, task: str, command: str) -> dict[str, Any]:
    """A run of one task, as its own command starts it; see :func:`run`.

    Raises:
        UsageError: another ``objective.name`` is given.
    """
    given, name = dict(options.options or {}), "objective.name"
    if given.setdefault(name, task) != task:
        raise UsageError(
            f"{name} {given[name]}: {command} is of {task}; `aimv2 pretrain` takes others", option=name, code="conflict"
        )
    return run(PretrainOptions(**{**vars(options), "options": given}))
