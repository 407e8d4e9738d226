"""The checkpoint with the best held-out figure, by the name RUN@best (``eval.best``)."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path

from aimv2.config.schema import Config
from aimv2.distributed import World
from aimv2.errors import UsageError, nearest
from aimv2.interop.model_folder import BEST, read_best
from aimv2.io import write_aside

LOWER = ("_loss", "_perplexity")  # parts of the names of figures that are better when lower
NEITHER = ("val_pairs", "val_scale", "val_bias")


def check_best(config: Config, validated: bool, known: tuple[str, ...]) -> None:
    """Raises UsageError where ``eval.best`` names a figure and the run would not have it on the way.

    Args:
        config: of the run.
        validated: there are samples to validate on.
        known: names of the task's figures, ``*`` for any ending; (): not known yet.
    """
    figure = config.eval.best
    if figure is None:
        return
    why = None if validated else "there is no validation split (val-* or test-* shards, or data.val)"
    why = why or (None if config.eval.every else "eval.every 0 validates at the end only")
    why = why or (f"{figure} is neither better nor worse when it is higher" if figure in NEITHER else None)
    if why:
        raise UsageError(f"eval.best {figure}: {why}; change it, or leave it out", option="eval.best", code="conflict")
    if known and not any(fnmatchcase(figure, name) for name in known):
        raise unknown(figure, [name.rstrip("*") for name in known])


def unknown(figure: str, known: list[str]) -> UsageError:
    """The error for a figure that validation does not give."""
    return UsageError(
        f"eval.best {figure}: no such figure{nearest(figure, known)} (there: {', '.join(known)})",
        option="eval.best",
        code="unknown",
    )


class Best:
    """The best of a figure so far.

    Attributes:
        figure: its name; None: no checkpoint is the best.
        value: so far; None before the first.
    """

    def __init__(self, run: Path, figure: str | None, world: World) -> None:
        self.run, self.figure, self.world = run, figure, world
        self.value: float | None = None

    def restore(self, step: int) -> None:
        """What a run knew at ``step``: a later best was found after the checkpoint that is read, and is found again."""
        known = read_best(self.run)
        if self.figure is not None and known.get("figure") == self.figure and known["step"] <= step:
            self.value = known["value"]

    def improves(self, figures: dict[str, float]) -> bool:
        """Whether a validation is the best so far; a value that is not finite never is.

        Raises:
            UsageError: it has no such figure.
        """
        if self.figure is None or not figures:
            return False
        if self.figure not in figures:
            raise unknown(self.figure, [name for name in figures if name not in NEITHER])
        value = figures[self.figure]
        if not math.isfinite(value):
            return False
        lower = any(part in self.figure for part in LOWER)
        return self.value is None or (value < self.value if lower else value > self.value)

    def keep(self, step: int, figures: dict[str, float]) -> None:
        """Notes that the checkpoint of ``step``, which is saved, is the best."""
        assert self.figure is not None
        self.value = figures[self.figure]
        from aimv2.train.together import on_first

        about = json.dumps({"figure": self.figure, "value": self.value, "step": step}) + "\n"
        file = self.run / "checkpoints" / f"{BEST}.json"
        on_first(
            self.world, lambda: write_aside(file, about), file, f"step {step} is saved; make room and use --resume"
        )
