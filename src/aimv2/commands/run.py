"""``aimv2 run``: a chain of stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from aimv2.config.types import PathText

EXAMPLES = """\
aimv2 run chain.yaml --data shards/mine --out runs/chain
aimv2 run chain.yaml --status"""
EPILOG = """\
a chain file:
  out: runs/chain              # a folder per stage below it; --out overrides it
  data: shards/mine            # {data} below; --data overrides it
  seeds: [0, 1, 2]             # optional: every stage once per seed
  stages:
    base:
      verb: pretrain
      config: cifar10-small
      options: {data.train: "{data}", train.steps: 2000}
    adapted:
      verb: pretrain
      init: "{base}"           # a stage's folder by its name; "{base}@1000": a step of it
      options: {data.train: "{data}", train.steps: 500, optim.warmup: 50}
    probed:
      verb: probe
      model: "{adapted}"
      options: {data: "{data}"}
  report: [val_text_loss, top1]

Keys of a stage: verb (any command but run); its positional arguments (config and init of
pretrain, model, source, images, ...); options: its other options; needs: [STAGE]; title;
seeds: false (one run for all seeds)."""


@dataclass(kw_only=True)
class RunOptions:
    """Run a chain of stages: what is not done yet, in order; an interrupted stage resumes, and one report is written.

    Args:
        chain: YAML file of stages, as in the example below, or a name of `aimv2 recipes`
        out: folder of the stages and of report.json and report.md; null: the file's out
        data: value of {data}; null: the file's data
        only: stages with commas; these and what they need
        redo: clear finished stages whose options, recipe, data or earlier stages changed, and run them again
        status: show what is done, stale, interrupted and to do, and run nothing
    """

    chain: PathText
    out: PathText | None = None
    data: PathText | None = None
    only: str | None = None
    redo: bool = False
    status: bool = False


def run(options: RunOptions) -> dict[str, Any]:
    """
    Returns:
        the report: ``stages``, a row each, and ``figures`` over the seeds.

    Raises:
        UsageError: a mistake in the file, a missing input, a stale stage without ``redo``, a stage that failed.
        Interrupted: a signal came; the stage that ran has saved what it can.
    """
    from aimv2.pipeline.work import run_chain

    return run_chain(options.chain, options.out, options.data, options.only, options.redo, options.status)


def render(result: dict[str, Any], console: Console) -> None:
    from aimv2.pipeline.report import as_text

    console.print(as_text(result))
