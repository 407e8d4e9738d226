"""Where figures go while training: metrics.jsonl, TensorBoard, Weights & Biases, and a line for the eye."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from aimv2.config.schema import LogConfig
from aimv2.io import parse_json, read_file, write_aside
from aimv2.io import say as say
from aimv2.progress import duration as duration
from aimv2.progress import open_bar
from aimv2.tables import figure

FIRST = (1, 2, 5)  # steps of a start that the console shows whatever train.log_every is: the first line comes soon
SILENCE = 30.0  # seconds after which a slow run shows a step in between


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl that have a step, and how many others there are, not counting a half-written last one."""
    lines, broken = [], 0
    texts = read_file(path).decode(errors="replace").split("\n") if path.is_file() else [""]
    for number, text in enumerate(texts, 1):
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        else:
            broken += number < len(texts)
    return lines, broken


def cut_metrics(path: Path, step: int) -> int:
    """Drops the lines past ``step`` (a run resumed there writes them again), a half-written last one and those that can't be read.

    Returns:
        the number of lines that could not be read.
    """
    if not path.exists():
        return 0
    lines, broken = read_metrics(path)
    if broken:
        path.replace(path.with_name(f"damaged-{path.name}"))
    write_aside(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
    return broken


class Log:
    """Figures of the main rank; other ranks get a log that does nothing."""

    def __init__(self, run: Path, config: LogConfig, steps: int, start: int, active: bool) -> None:
        self.active, self.steps = active, steps
        from aimv2.terminal import VisibleConsole

        self.console: Console = VisibleConsole(stderr=True)
        self.progress: Progress | None = None
        if not active:
            return
        if broken := cut_metrics(run / "metrics.jsonl", start):
            self.say(
                f"{broken} lines of metrics.jsonl can't be read and are left out; as it was it is damaged-metrics.jsonl"
            )
        from aimv2.train.events import Events
        from aimv2.train.lines import Lines

        self.lines = Lines(run / "metrics.jsonl", self.say)
        self.events = Events(run / "tensorboard", start, self.say) if config.tensorboard else None
        self.wandb = self._wandb(run, config.wandb) if config.wandb else None
        if self.console.is_terminal:
            self.progress = open_bar(self.console, steps, start, transient=False)
        self.began, self.first, self.shown = time.perf_counter(), start, time.perf_counter()

    def _wandb(self, run: Path, project: str) -> Any:
        import wandb

        place = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]  # runs of one name in two folders
        return wandb.init(project=project, dir=str(run), name=run.name, id=f"{run.name}-{place}", resume="allow")

    def say(self, line: str) -> None:
        """A line for the user, on standard error."""
        if self.active:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """One line of metrics."""
        if not self.active:
            return
        self.lines.write(json.dumps({"step": step, **figures}))
        numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
        if self.events is not None:
            self.events.write(step, numbers)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)
        self._show(step, figures)

    def settle(self) -> None:
        """Makes sure that the lines of metrics are on the disk; OSError where they are not."""
        if self.active:
            self.lines.settle()

    def start(self) -> None:
        """The first step begins: from now on time is counted, and a terminal has its bar."""
        if self.active:
            self.began = self.shown = time.perf_counter()
            if self.progress is not None:
                self.progress.start()

    def wants(self, step: int) -> bool:
        """Whether to show a step that gets no line of metrics: one of the first, or one after a long silence.

        A terminal's bar goes on in any case.
        """
        if not self.active:
            return False
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=step)
        return step - self.first in FIRST or time.perf_counter() - self.shown > SILENCE

    def early(self, step: int, loss: float) -> None:
        """A step for the eye only."""
        if self.active:
            self._show(step, {"loss": loss}, of_training=True)

    def _show(self, step: int, figures: dict[str, Any], of_training: bool = False) -> None:
        text, self.shown = describe(figures), time.perf_counter()
        if self.progress is not None:
            self.progress.start()  # does nothing where it runs
            if of_training or "lr" in figures:
                self.progress.update(self.progress.task_ids[0], completed=step, description=text)
            else:
                self.say(f"step {step}: {text}")
            return
        rate = (time.perf_counter() - self.began) / max(step - self.first, 1)
        self.say(f"step {step}/{self.steps} {text} eta {duration(rate * (self.steps - step))}")

    def close(self) -> None:
        if not self.active:
            return
        if self.progress is not None:
            self.progress.stop()
        self.lines.close()
        if self.events is not None:
            self.events.close()
        if self.wandb is not None:
            self.wandb.finish()
        sys.stderr.flush()


SHOWN = {  # key: label, form of what is no fraction
    "loss": ("loss", ".3f"),
    "text_loss": ("text", ".3f"),
    "pixel_loss": ("pixel", ".3f"),
    "val_text_loss": ("val text", ".3f"),
    "val_pixel_loss": ("val pixel", ".3f"),
    "val_feature_loss": ("val feature", ".3f"),
    "val_class_loss": ("val class", ".3f"),
    "val_contrastive_loss": ("val contrastive", ".3f"),
    "val_top1": ("val top-1", ""),
    "val_knn_top1": ("val kNN", ""),
    "val_answer_loss": ("val answer", ".3f"),
    "val_answer_accuracy": ("val answers right", ""),
    "val_image_to_text": ("val image to text", ""),
    "val_text_to_image": ("val text to image", ""),
    "grad_norm": ("norm", ".2f"),
    "lr": ("lr", ".1e"),
    "pairs_per_s": ("pairs/s", ".0f"),
    "tokens_per_s": ("tokens/s", ".0f"),
    "mfu": ("mfu", ""),
    "memory_gb": ("GB", ".1f"),
}


def describe(figures: dict[str, Any]) -> str:
    """The figures that fit a line."""
    parts = [
        f"{label} {figure(key, figures[key], form)}"
        for key, (label, form) in SHOWN.items()
        if figures.get(key) is not None
    ]
    return " ".join(parts)
