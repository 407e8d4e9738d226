"""``aimv2 pretrain``: a run from a recipe, dotted options or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class PretrainOptions:
    """Pre-train an AIMV2: recipe, run folder and dotted options in, a trained run out.

    Args:
        config: YAML recipe, by path or by a name of `aimv2 recipes`; without one and without data: the demo on captioned scenes
        run: run folder
        options: values by dotted key, which override the recipe's (``{"train.steps": 100, "resume": True}``)
        dry_run: build everything, run one step, say what a run takes
        print_config: show the effective values and where they came from
    """

    config: str | None = None
    run: str | None = None
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
