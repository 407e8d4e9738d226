"""Scores of a classifier: top-1, by class, confusion, and intervals of confidence.

Legend: N images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np


def top1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of images whose class was found, 0..1; both int [N], N at least 1."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    assert predicted.shape == labels.shape and labels.size > 0
    return float((predicted == labels).mean())


def per_class(predicted: np.ndarray, labels: np.ndarray, classes: int) -> list[float | None]:
    """Fraction of each class's images that were found, 0..1, in the order of the labels; None: a class without an image."""
    labels = np.asarray(labels)
    count = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[np.asarray(predicted) == labels], minlength=classes)
    return [float(right[c] / count[c]) if count[c] else None for c in range(classes)]


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> list[list[int]]:
    """Counts [C, C]: row the true class, column the predicted one; the sum is N."""
    cells = np.asarray(labels, dtype=np.int64) * classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes).tolist()


def wilson(right: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a fraction (Wilson, JASA 22, 1927), which stays within 0..1 at both ends.

    Args:
        right: successes, 0..n.
        n: trials, at least 1.
        level: of confidence.

    Returns:
        (low, high): what the images drawn leave open; it knows nothing of the seeds of training.
    """
    assert n > 0 and 0 <= right <= n
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate, square = right / n, z * z
    middle = (rate + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(rate * (1 - rate) / n + square / (4 * n * n))
    return (0.0 if right == 0 else middle - half, 1.0 if right == n else middle + half)


def over_seeds(values: Sequence[float], level: float = 0.95, fraction: bool = False) -> dict[str, Any]:
    """Mean over seeds and Student's t interval of that mean.

    Args:
        values: one score a seed, at least one.
        level: of confidence.
        fraction: the scores are fractions: the interval, which has no bounds by itself, is cut to 0..1.

    Returns:
        ``mean``, ``low``, ``high``, floats; one seed has no interval: both bounds None.
    """
    assert len(values) > 0
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    from scipy.stats import t

    half = float(t.ppf(0.5 + level / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    low, high = mean - half, mean + half
    return {"mean": mean, "low": max(low, 0.0) if fraction else low, "high": min(high, 1.0) if fraction else high}
