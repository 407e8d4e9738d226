"""The probe's batch size, epochs and grid by the number of images, and what is said of a sweep that wants other ones.

Legend: G heads of a sweep, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from aimv2.evals.probe import ProbeSettings, nearest_batch

AUTOMATIC = (
    "epochs",
    "batch_size",
    "rates",
    "decays",
    "start",
)  # what follows the number of images where nothing decides it
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
DECAYS = (0.05, 5.0, 50.0)  # the last one leaves little but the bias: the best on features that say nothing
STAYING = 1e-5  # lowest rate of heads that start as a linear classifier: the one that hardly leaves it
SMALL = 10_000  # training images up to which heads start so
EPOCHS, STEPS, LEAST_STEPS = 50, 1000, 500
LARGEST = 512  # batch
SELECTING = 1000  # held-out images that choose a head, as far as there are so many
FALLEN, RISEN = 0.2, 0.03  # change of the loss over the last quarter, as a fraction of that of guessing


def fitted(settings: ProbeSettings, images: int, automatic: Collection[str]) -> ProbeSettings:
    """The same settings with those named ``automatic`` by the number of images.

    The batch is the power of two next to images * epochs / 1,000, from 16 to 512 (all images where they are fewer): about 1,000
    steps. Epochs are 50, and more where that makes fewer than 500 steps. Attentive heads on cached features of at most 10,000 images
    start as a linear classifier, and one more rate of the grid hardly leaves it.

    Args:
        settings: those not named stay.
        images: training images of the sweep, at least 1.
        automatic: some of :data:`AUTOMATIC`.
    """
    epochs, batch = settings.epochs, settings.batch_size
    if "batch_size" in automatic:
        ideal = images * (EPOCHS if "epochs" in automatic else epochs) / STEPS
        batch = min(nearest_batch(ideal, LARGEST), images)
    if "epochs" in automatic:
        epochs = max(EPOCHS, math.ceil(LEAST_STEPS / steps_of_epoch(images, batch)))
    start = settings.start
    if "start" in automatic and images <= SMALL and settings.protocol == "attentive" and not settings.augmented:
        start = "linear"
    return replace(
        settings,
        start=start,
        epochs=epochs,
        batch_size=batch,
        rates=(STAYING, *RATES)
        if "rates" in automatic and start == "linear"
        else RATES
        if "rates" in automatic
        else settings.rates,
        decays=DECAYS if "decays" in automatic else settings.decays,
    )


def folds_of(images: int) -> int:
    """How many fifths of the training images are held out in turn to choose a head: all of a few images, one of 5,000 or more."""
    return min(max(math.ceil(SELECTING / (images / 5)), 1), 5)


def steps_of_epoch(images: int, batch: int) -> int:
    """Whole batches of an epoch; one of all images where they are fewer than a batch."""
    return images // min(batch, images)


def complaints(
    settings: ProbeSettings, chosen: int, selection: np.ndarray, losses: np.ndarray, classes: int
) -> list[str]:
    """A line for each thing that another option may improve: a best value at the edge of its grid, a loss still on its way.

    Args:
        settings: of the sweep.
        chosen: head, 0..G-1.
        selection: top-1 of each head where one was chosen, float [G].
        losses: training cross-entropy of each step and head, float [S, G]; S 0: unknown.
        classes: of the data, at least 2.
    """
    trials = settings.trials()
    best = trials[chosen]
    found = [
        edge(option, getattr(best, name), values, [getattr(trial, name) for trial in trials], selection)
        for option, name, values in (("--rates", "lr", settings.rates), ("--decays", "weight_decay", settings.decays))
        if len(set(values)) > 2
    ]
    return [line for line in [*found, trend(losses[:, chosen], classes)] if line]


def edge(option: str, value: float, grid: Sequence[float], of_head: Sequence[float], selection: np.ndarray) -> str:
    """The line for a best value at the edge of its grid; "" inside, and where a value inside does as well."""
    least = {"--decays": min(DECAYS), "--rates": STAYING}[option]  # lower ones are as good as none
    if min(grid) < value < max(grid) or value <= least:
        return ""
    inside = [score for score, own in zip(selection, of_head) if own != value]
    if max(inside) >= max(selection):
        return ""
    end, other = ("highest", "higher") if value == max(grid) else ("lowest", "lower")
    name = "learning rate" if option == "--rates" else "weight decay"
    return f"the best {name}, {value:g}, is the {end} of its grid; {other} ones may do better: {option}"


def trend(losses: np.ndarray, classes: int) -> str:
    """The line for a training loss [S] that changes over the last quarter of the steps; "" where it does not."""
    quarter = len(losses) // 4
    if quarter < 2:
        return ""
    before, last = (float(part.mean()) for part in (losses[-2 * quarter : -quarter], losses[-quarter:]))
    guess = math.log(max(classes, 2))
    if not last <= before + RISEN * guess:
        return f"the training loss has risen at the end, from {before:.3f} to {last:.3f}: lower --rates"
    if before - last > FALLEN * guess:
        return f"the training loss still falls at the end, from {before:.3f} to {last:.3f}: more --epochs, or a smaller --batch-size"
    return ""
