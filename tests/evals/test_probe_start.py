"""Heads that start as a linear classifier answer as it does, before they learn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aimv2.evals.linear import logistic
from aimv2.evals.probe import ProbeSettings, fresh_sweep, from_cache, predict
from aimv2.evals.probe_start import averages, classifier, start_linear, together
from aimv2.features.extraction import Cached
from aimv2.features.ragged import RaggedWriter, open_ragged

IMAGES, PATCHES, WIDTH = 90, 5, 16


def features(classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """[N, I, D] around a point of each class, far from mean 0 and deviation 1; labels [N]."""
    rng = np.random.default_rng(seed)
    labels = np.arange(IMAGES) % classes
    centres = rng.normal(0, 0.3, (classes, WIDTH)) * np.linspace(0.1, 5, WIDTH) + 3
    return (centres[labels][:, None] + rng.normal(0, 3, (IMAGES, PATCHES, WIDTH))).astype(np.float16), labels


def started(layers: list[Any], labels: np.ndarray, classes: int) -> Any:
    settings = ProbeSettings(layers=tuple(f"layer{n}" for n in range(len(layers))), rates=(0.1, 0.2), decays=(0.1,))
    sweep = fresh_sweep(WIDTH, classes, settings, 0, torch.device("cpu"))
    start_linear(sweep, [averages(layer) for layer in layers], labels, [0.1] * len(layers))
    return sweep


@pytest.mark.parametrize("classes", [2, 4])
def test_the_first_answers_are_those_of_the_linear_classifier(classes: int) -> None:
    layers, labels = [features(classes, seed)[0] for seed in range(2)], features(classes)[1]
    sweep = started(layers, labels, classes)
    found = predict(sweep, from_cache(Cached(layers, labels, [], [])))  # [heads, N], two heads a layer
    for number, layer in enumerate(layers):
        x = layer.astype(np.float32).mean(1)
        weight, bias = classifier(x, labels, classes, 0.1)
        wanted = (x @ weight.T + bias).argmax(1)
        assert (wanted == labels).mean() > 0.4
        assert (found[2 * number] == wanted).all() and (found[2 * number + 1] == wanted).all()
    assert classes == 2 or (found[0] != found[2]).any()


def test_a_class_without_images_is_never_answered() -> None:
    layer, labels = features(3)
    sweep = started([layer], labels * 2, 6)  # classes 0, 2 and 4
    found = predict(sweep, from_cache(Cached([layer], labels, [], [])))
    assert set(np.unique(found)) <= {0, 2, 4}


def test_two_classes_have_the_margin_of_scikit_learn() -> None:
    layer, labels = features(2)
    x = layer.astype(np.float32).mean(1)
    weight, bias = classifier(x, labels, 2, 1.0)
    assert ((x @ weight.T + bias).argmax(1) == logistic(x, labels, 1.0)[0].predict(x)).all()


def test_images_of_one_class_leave_the_heads_alone() -> None:
    layer, labels = features(2)
    sweep = started([layer], labels * 0, 2)
    assert sweep.heads[0].query.abs().sum() > 0


def test_averages_of_images_with_other_numbers_of_patches(tmp_path: Path) -> None:
    layer, _ = features(2)
    lengths = [1 + number % PATCHES for number in range(IMAGES)]
    images = [one[:count] for one, count in zip(layer, lengths)]
    writer = RaggedWriter(tmp_path, ["last"], WIDTH, IMAGES, 0)
    writer.append([images])
    writer.flush()
    found = averages(open_ragged(tmp_path, ["last"], WIDTH, IMAGES)[0])
    every = np.concatenate(images).astype(np.float64)
    np.testing.assert_allclose(found.means, np.stack([one.astype(np.float32).mean(0) for one in images]), rtol=1e-5)
    assert found.patches == len(every)
    np.testing.assert_allclose([found.total, found.squares], [every.sum(0), (every**2).sum(0)], rtol=1e-6)


def test_averages_of_two_splits_are_those_of_both() -> None:
    layer, _ = features(2)
    one, both = averages(layer, size=7), together([averages(layer[:20]), averages(layer[20:])])
    np.testing.assert_allclose(one.means, layer.astype(np.float32).mean(1), rtol=1e-5)
    for name in one._fields:
        np.testing.assert_allclose(getattr(both, name), getattr(one, name), rtol=1e-6)
