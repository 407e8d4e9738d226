"""A linear classifier learned from a few images a class, over several draws.

Legend: N images, D width, S shots (images a class).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from aimv2.data.images.decode import ImageError
from aimv2.data.images.labelled import Labelled, subset
from aimv2.errors import UsageError
from aimv2.evals.harness import Evaluation
from aimv2.evals.linear import logistic
from aimv2.evals.options import PooledOptions
from aimv2.evals.pooled import Pooled, evaluate_pooled, open_splits
from aimv2.evals.scores import over_seeds, top1
from aimv2.progress import tracked

C = 4000.0  # MSN's 0.00025 / N against the mean loss (Assran et al., 2022, its logistic_eval.py), as scikit-learn counts


class Draw:
    """Draws readable images of each class: the first so many of a shuffled class, so larger draws hold the smaller ones."""

    def __init__(self, data: Labelled) -> None:
        self.data = data
        self.readable: dict[int, bool] = {}

    def __call__(self, shots: int, seed: int) -> np.ndarray:
        """Rows of ``data``, int64 [classes, shots].

        Raises:
            UsageError: a class with fewer readable images.
        """
        rng = np.random.default_rng(seed)
        drawn = []
        for label, name in enumerate(self.data.classes):
            rows = [int(row) for row in rng.permutation(np.flatnonzero(self.data.labels == label))]
            good: list[int] = []
            for row in rows:
                if len(good) == shots:
                    break
                if self._opens(row):
                    good.append(row)
            if len(good) < shots:
                raise UsageError(
                    f"--shots {shots}: class {name} has {len(good)} training images that can be read; fewer shots expected"
                )
            drawn.append(good)
        return np.array(drawn, dtype=np.int64)

    def _opens(self, row: int) -> bool:
        if row not in self.readable:
            try:
                self.data.image(row)
                self.readable[row] = True
            except ImageError:
                self.readable[row] = False
        return self.readable[row]


def normalised(features: np.ndarray) -> np.ndarray:
    """Rows [N, D] less their own mean, to unit length: one strength C then fits every encoder (as in MSN)."""
    centred = features - features.mean(1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def fewshot_figures(pooled: Pooled, draws: dict[int, np.ndarray], shots: Sequence[int]) -> dict[str, Any]:
    """Top-1 on the whole test split, for each layer and number of shots over the draws.

    Args:
        pooled: its training split holds the drawn images only.
        draws: by seed: rows of that split [classes, most shots].
        shots: rising.
    """
    table = []
    for number, layer in enumerate(pooled.layers):
        features, test = normalised(pooled.train.features[number]), normalised(pooled.test.features[number])
        for few in shots:
            tops = []
            for rows in tracked(draws.values(), f"layer {layer}, {few} shots, fits", len(draws)):
                mine = rows[:, :few].flatten()
                fitted, _ = logistic(features[mine], pooled.train.labels[mine], C, intercept=False)
                tops.append(top1(fitted.predict(test), pooled.test.labels))
            spread = over_seeds(tops, fraction=True)
            table.append(
                {
                    "layer": layer,
                    "shots": few,
                    "top1": spread["mean"],
                    "top1_interval": [spread["low"], spread["high"]],
                    "top1_by_seed": tops,
                }
            )
    head = table[(pooled.headline() + 1) * len(shots) - 1]
    figures: dict[str, Any] = {
        **{key: head[key] for key in ("top1", "top1_interval", "top1_by_seed")},
        "interval": f"95%, t over {len(draws)} seeds" if len(draws) > 1 else "none: one seed",
        "chosen": [{"layer": head["layer"], "shots": head["shots"]}],
        "selected_on": f"nothing: C={C:g}, the most shots and layer {head['layer']} are fixed",
        "table": table,
        "unreadable": len(pooled.test.rejected),
    }
    if len(pooled.layers) > 1:
        figures["by_layer"] = {row["layer"]: row["top1"] for row in table if row["shots"] == head["shots"]}
    return figures


def evaluate_fewshot(options: PooledOptions, shots: Sequence[int], seeds: int) -> dict[str, Any]:
    """The command ``fewshot``: features of the drawn and the test images only.

    Args:
        options: of the command; its seed is the first one.
        shots: images per class.
        seeds: number of draws.

    Raises:
        UsageError: options or data that do not fit.
    """
    with Evaluation("fewshot", options.out) as evaluation:
        splits, few = open_splits(options), sorted(set(shots))
        draw = Draw(splits.train)
        numbers = range(options.seed, options.seed + seeds)
        drawn = {seed: draw(few[-1], seed) for seed in tracked(numbers, "drawing images, seeds", seeds)}
        used = np.unique(np.concatenate([rows.flatten() for rows in drawn.values()]))
        splits = replace(splits, train=subset(splits.train, used), val=None)
        within = {seed: np.searchsorted(used, rows) for seed, rows in drawn.items()}
        protocol = {
            "name": "few-shot",
            "shots": few,
            "seeds": seeds,
            "classifier": "logistic regression, no bias",
            "C": C,
            "features": "less their own mean, unit length",
        }
        return evaluate_pooled(
            evaluation,
            options,
            splits,
            protocol,
            lambda pooled: fewshot_figures(pooled, within, few),
            seeds=list(drawn),
        )
