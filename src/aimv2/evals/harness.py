"""The frame of every evaluation: its clock, its folder, its baselines, and the result at the end."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aimv2.data.images.labelled import HELD_OUT, Labelled, hold_out, subset
from aimv2.data.images.opening import open_labelled, require_labelled
from aimv2.errors import UsageError
from aimv2.evals.options import ClassifierOptions
from aimv2.evals.result import check_out, make_result, write_result
from aimv2.features.frozen import Frozen, random_twin, raw_pixels
from aimv2.interop.load import check_there

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledSplits:
    """Images to fit on, to choose on (None: the data set has no such split) and to test on; how the test split was held out."""

    train: Labelled
    val: Labelled | None
    test: Labelled
    held_out: str | None = None


class Evaluation:
    """One run of an evaluation command.

    Attributes:
        out: folder of ``--out``; None without one.
        home: ``out``, else a temporary folder that lives as long as the ``with`` block.
        scratch: the temporary folder.
    """

    def __init__(self, command: str, out: str | None) -> None:
        """Starts the clock; ``out`` is made by :meth:`open_folder`, after the mistakes of the data."""
        self.command, self.given, self.started = command, out, time.perf_counter()
        self.out: Path | None = None

    def __enter__(self) -> Evaluation:
        self.temporary = tempfile.TemporaryDirectory()
        self.home = self.scratch = Path(self.temporary.name)
        return self

    def __exit__(self, *_: object) -> None:
        self.temporary.cleanup()

    def open_folder(self) -> Path:
        """Makes the folder of the result.

        Raises:
            UsageError: it holds something else.
        """
        self.out = check_out(self.given, self.command)
        self.home = self.out or self.scratch
        return self.home

    def result(
        self,
        protocol: dict[str, Any],
        model: dict[str, Any],
        data: dict[str, Any],
        figures: dict[str, Any],
        seed: int | list[int] | None,
    ) -> dict[str, Any]:
        """The result, written into the folder where there is one; see :func:`aimv2.evals.result.make_result`."""
        seconds = time.perf_counter() - self.started
        return write_result(self.out, make_result(self.command, protocol, model, data, figures, seconds, seed))


def open_baselines(names: Iterable[str], frozen: Frozen, seed: int) -> dict[str, Frozen]:
    """The baselines of an encoder by name: random (the same one untrained), pixels. Opened before any forward pass.

    Raises:
        UsageError: an encoder that can't be drawn anew.
    """
    return {name: random_twin(frozen, seed) if name == "random" else raw_pixels(frozen) for name in names}


def baseline_figures(others: dict[str, Frozen], evaluate: Callable[[str, Frozen], dict[str, Any]]) -> dict[str, Any]:
    """``{"baselines": ...}`` by name, or {} without any; ``evaluate``: (name, encoder) -> figures."""
    found = {name: evaluate(name, other) for name, other in others.items()}
    return {"baselines": found} if found else {}


def open_labelled_splits(options: ClassifierOptions, seed: int) -> LabelledSplits:
    """The splits of labelled images; without a test split a fraction of each class is held out by the seed, which is said.

    Raises:
        UsageError: no training images, a test split that a registered data set lacks or that comes with a fraction, other classes.
    """
    with contextlib.suppress(OSError):  # a name too long: said where it is opened
        check_there(options.model)
    source, fraction, rest = options.source, options.test_fraction, (options.dataset, options.image_root)
    train = require_labelled(source, "train", *rest)
    val, test = (open_labelled(source, split, *rest) for split in ("val", "test"))
    held_out = None
    if test is not None and fraction is not None:
        raise UsageError(
            f"--test-fraction {fraction:g}: {source} has a test split; leave the option out", code="conflict"
        )
    if test is None and options.dataset is not None:
        test = require_labelled(source, "test", *rest)
    if test is None:
        fraction = HELD_OUT if fraction is None else fraction
        kept, held = hold_out(train.labels, seed, fraction)
        held_out = f"{fraction:.0%} of each class's images ({len(held):,}), held out of training with seed {seed}"
        log.warning("%s has no test split: %s", source, held_out)
        train, test = subset(train, kept), replace(subset(train, held), split="held-out")
    for other in (val, test):
        if other is not None and other.classes != train.classes:
            different = sorted(set(other.classes) ^ set(train.classes)) or ["their order"]
            raise UsageError(
                f"--data {source}: the splits train and {other.split} have different classes ({different[0]}); "
                "the same expected in both",
                code="mismatch",
            )
    return LabelledSplits(train, val, test, held_out)


def labelled_data(train: Labelled, test: Labelled, dataset: str | None) -> dict[str, Any]:
    """What a result says of labelled images."""
    return {
        "name": test.name,
        "dataset": dataset,
        "source": test.source,
        "split": test.split,
        "train_images": len(train.labels),
        "test_images": len(test.labels),
        "classes": len(test.classes),
    }
