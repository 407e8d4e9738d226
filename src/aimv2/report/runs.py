"""Read a run folder for a report: configuration, metrics, results, newest checkpoint, machine. No torch."""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from aimv2.commit import git_state
from aimv2.config.schema import Config, get_value, leaf_keys
from aimv2.errors import UsageError
from aimv2.interop.model_folder import checkpoints
from aimv2.io import parse_json, read_file
from aimv2.train.log import read_metrics

CONFIG, METRICS, SUMMARY, RESULT = "config.yaml", "metrics.jsonl", "summary.json", "result.json"
NOT_COMPARED = {
    "run",
    "resume",
    "overwrite",
    "take_over",
    "accept_data",
    "train.stop_at",
    "train.max_hours",
}  # differ between any two runs
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")  # whatever the locale
DEEP = 3  # levels of folders below the run in which results are searched
NO_RESULTS = {"checkpoints", "data", "tensorboard", "wandb", "tokenizer", "report"}


@dataclass(frozen=True)
class Run:
    """Current content of a run folder.

    Attributes:
        folder: the run folder.
        config: its configuration.
        metrics: lines of metrics.jsonl, in order.
        summary: summary.json, {} before the end.
        checkpoint: (step, folder) of the newest complete checkpoint; None before the first.
        results: (path within the run, result) of evaluation commands.
    """

    folder: Path
    config: Config
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    checkpoint: tuple[int, Path] | None
    results: list[tuple[str, dict[str, Any]]]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last logged step."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def finished(self) -> bool:
        """Whether it reached its last step and was evaluated."""
        return self.summary.get("step") == self.config.train.steps

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric where it was logged."""
        found = [(line["step"], line[key]) for line in self.metrics if isinstance(line.get(key), int | float)]
        return [step for step, _ in found], [float(value) for _, value in found]

    def figures(self) -> list[str]:
        """Logged metrics, in order of first appearance."""
        return [key for key in dict.fromkeys(key for line in self.metrics for key in line) if key != "step"]


def read_run(folder: str | Path, waiting: bool = False) -> Run:
    """Read a run; half-written lines are skipped.

    Args:
        folder: the run folder.
        waiting: accept a run without metrics.

    Raises:
        UsageError: not a run, or no metrics yet.
    """
    from aimv2.config.load import parse, read_recipe

    path = Path(folder).expanduser()
    if not (path / CONFIG).is_file():
        what = "a run folder (with config.yaml) is expected" if path.exists() else "no such folder"
        raise UsageError(f"RUN {folder}: {what}", code="not-found")
    config = parse(read_recipe(path / CONFIG), stored=True)
    metrics, _ = read_metrics(path / METRICS)
    if not metrics and not waiting:
        raise UsageError(
            f"RUN {folder}: no metrics yet ({METRICS} is empty or missing); wait for the first line", code="missing"
        )
    found = checkpoints(path)
    return Run(path, config, metrics, _read_json(path / SUMMARY), found[-1] if found else None, find_results(path))


def find_results(run: Path) -> list[tuple[str, dict[str, Any]]]:
    """result.json files of evaluation commands within the run, by path."""
    found = []
    for depth in range(1, DEEP + 1):
        for path in sorted(run.glob("/".join(["*"] * depth) + f"/{RESULT}")):
            place = path.parent.relative_to(run)
            result = _read_json(path)
            if place.parts[0] not in NO_RESULTS and isinstance(result.get("figures"), dict):
                found.append((str(place), result))
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_file(path))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def config_rows(config: Config) -> list[tuple[str, str, bool]]:
    """Every key, its value, and whether it differs from the default."""
    default = type(config)()
    return [
        (key, shown(get_value(config, key), config.run), get_value(config, key) != get_value(default, key))
        for key in leaf_keys(type(config))
    ]


def differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Keys whose values differ between runs, with the value in each."""
    rows = []
    kinds = [leaf_keys(type(run.config)) for run in runs]
    for key in (key for key in kinds[0] if all(key in kind for kind in kinds)):
        values = [shown(get_value(run.config, key), run.config.run) for run in runs]
        if key not in NOT_COMPARED and len(set(values)) > 1:
            rows.append((key, values))
    return rows


def shown(value: Any, run: str | None = None) -> str:
    """Format a configuration value as text; paths are relative to the folder ``run``, others by their last part."""
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(shown(one, run) for one in value)
    if hasattr(value, "path"):
        weight = f" x {value.weight:g}" if value.weight != 1 else ""
        return (value.name or shown(value.path, run)) + weight
    return f"{value:g}" if isinstance(value, float) else without_places(str(value), run)


def without_places(text: str, run: str | Path | None = None) -> str:
    """A text for a page that others read; see :func:`aimv2.interop.public.public`."""
    from aimv2.interop.public import public

    own = {str(run), str(Path(run).expanduser().absolute())} if run else set()
    for folder in sorted(own, key=len, reverse=True):
        text = text.replace(f"{folder}/", "") if text != folder else "."
    return public(text)


def date_of(stamp: str | None = None) -> str:
    """A time in words, 28 Nov 2026, 14:03 UTC+01:00: that of an ISO stamp, None: now; another text as it is."""
    when = datetime.now().astimezone()
    if stamp is not None:
        try:
            when = datetime.fromisoformat(stamp)
        except ValueError:
            return stamp
    return f"{when.day} {MONTHS[when.month - 1]} {when:%Y, %H:%M %Z}".strip()


def about(run: Run) -> list[tuple[str, str]]:
    """Machine, versions and git state: the run's if recorded, else those of this report."""
    import torch

    import aimv2

    summary = run.summary
    here = f"{platform.machine()}, {platform.system()}"
    rows = [
        ("machine", summary.get("machine") or f"{here} (of this report)"),
        ("aimv2", summary.get("version") or f"{aimv2.__version__} (of this report)"),
        ("torch", summary.get("torch") or f"{torch.__version__} (of this report)"),
        ("Python", f"{platform.python_version()} (of this report)"),
        ("git", summary.get("git") or f"{git_state() or 'not under git'} (of this report)"),
        ("command", without_places(str(summary.get("command") or ""), run.folder)),
        (
            "finished",
            date_of(summary.get("finished", ""))
            if summary.get("finished")
            else f"not yet: step {run.step} of {run.config.train.steps}",
        ),
        ("weights (SHA-256)", summary.get("weights_sha256") or ""),
        ("report made by", without_places(shlex.join(["aimv2", *sys.argv[1:]]), run.folder)),
    ]
    return [(key, value) for key, value in rows if value]
