"""The verb ``probe``: splits, sweep, choice, test, baselines, result.

Legend: G heads of a sweep, C classes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aimv2.data.images.labelled import joined, limit, open_labelled, subset
from aimv2.errors import UsageError
from aimv2.evals.linear import hold_out
from aimv2.evals.probe import Outcome, ProbeSettings, Splits, run_sweep, same_work
from aimv2.evals.result import about_model, check_out, make_result, write_result
from aimv2.evals.scores import confusion, over_seeds, per_class, wilson
from aimv2.features.extraction import features_home
from aimv2.features.frozen import Frozen, open_frozen, random_twin, raw_pixels
from aimv2.features.pixels import Stats

HELD_OUT = 0.1  # of each class's training images, where a data set has no validation split
BASELINES = ("random", "pixels")
SELECT = ("auto", "val", "heldout", "test")


@dataclass(frozen=True)
class Asked:
    """What a user asked for beside the encoder; see :func:`aimv2.api.probe`."""

    data: str
    dataset: str | None
    settings: ProbeSettings
    select: str
    seeds: tuple[int, ...]
    baselines: tuple[str, ...]
    train_limit: int
    test_limit: int
    batch_size: int
    workers: int
    out: str | None
    cache: str | None


def measure(frozen: Frozen, asked: Asked) -> dict[str, Any]:
    """Trains, chooses, tests, writes.

    Raises:
        UsageError: data or options that do not fit, an output folder of something else.
    """
    started = time.perf_counter()
    splits, selected_on = find_splits(asked)
    out = check_out(asked.out, "probe")
    with tempfile.TemporaryDirectory() as scratch:
        home = out or Path(scratch)
        same_work(home, identity(frozen, splits, selected_on, asked))
        figures = sweep_figures(frozen, splits, selected_on, asked, home)
        baselines = {}
        for name in asked.baselines:
            other = random_twin(frozen, asked.seeds[0]) if name == "random" else raw_pixels(frozen)
            last = replace(asked, settings=replace(asked.settings, layers=("last",)))
            at = home / "run" / name
            baselines[name] = brief(sweep_figures(other, splits, selected_on, last, at))
        if baselines:
            figures["baselines"] = baselines
        if out is not None and len(asked.settings.layers) > 1:
            plot_layers(figures["by_layer"], frozen.name, out / "layers.png")
    test = splits.test
    about = {
        "name": test.name,
        "dataset": asked.dataset,
        "source": test.source,
        "split": test.split,
        "train_images": len(splits.train.labels),
        "test_images": len(test.labels),
        "classes": len(test.classes),
    }
    protocol = {
        "name": f"{asked.settings.protocol} probe",
        "features": "augmented" if asked.settings.augmented else "cached",
        **{key: value for key, value in asdict(asked.settings).items() if key not in ("protocol", "augmented")},
        "selected_on": selected_on,
    }
    seconds = time.perf_counter() - started
    return write_result(
        out, make_result("probe", protocol, about_model(frozen), about, figures, seconds, list(asked.seeds))
    )


def find_splits(asked: Asked) -> tuple[Splits, str]:
    """The three splits, and in words where a head is chosen.

    Raises:
        UsageError: no training or test split; a validation split that is asked for and is not there.
    """
    train = open_labelled(asked.data, "train", asked.dataset)
    val = open_labelled(asked.data, "val", asked.dataset)
    test = open_labelled(asked.data, "test", asked.dataset)
    if train is None or test is None:
        missing = "training" if train is None else "test"
        raise UsageError(
            f"--data {asked.data}: no {missing} split there; a probe needs one to learn on and one to test on"
        )
    if asked.select == "val" and val is None:
        raise UsageError(
            f"--select val: {asked.data} has no validation split; --select heldout holds out training images"
        )
    for option, count in (("--train-limit", asked.train_limit), ("--test-limit", asked.test_limit)):
        if count and count < len(train.classes):
            raise UsageError(f"{option} {count}: at least one image of each of {len(train.classes)} classes expected")
    said = ""
    if asked.select == "test" and val is not None:  # nothing is chosen on it, so it is learnt from
        train, said = joined(train, val), "; learnt from the training and the validation split"
    train = limit(train, asked.train_limit) if 0 < asked.train_limit < len(train.labels) else train
    test = limit(test, asked.test_limit) if 0 < asked.test_limit < len(test.labels) else test
    if asked.select == "test":
        return Splits(train, None, test), f"test (the best head on the test labels, as the paper reports it{said})"
    if val is not None and asked.select != "heldout":
        return Splits(train, val, test), "validation split"
    kept, held = hold_out(train.labels, 0, HELD_OUT)
    select = replace(subset(train, held), split="heldout")
    return Splits(subset(train, kept), select, test), f"{len(held)} training images, held out"


def identity(frozen: Frozen, splits: Splits, selected_on: str, asked: Asked) -> dict[str, Any]:
    """What must be the same for an output folder to be gone on with."""
    return {
        "weights_sha256": frozen.sha256,
        "image_size": frozen.image_size,
        "precision": frozen.precision,
        "data": splits.test.source,
        "train_images": len(splits.train.labels),
        "test_images": len(splits.test.labels),
        "selected_on": selected_on,
        "settings": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(asked.settings).items()},
    }


def sweep_figures(frozen: Frozen, splits: Splits, selected_on: str, asked: Asked, home: Path) -> dict[str, Any]:
    """The sweep with every seed: the table of its heads, and the chosen one's figures on the test split."""
    again = " ".join(["aimv2", *sys.argv[1:]])
    answers = [
        run_sweep(
            frozen,
            splits,
            asked.settings,
            seed,
            home,
            features_home(asked.cache, home, frozen),
            asked.workers,
            again,
            asked.batch_size,
        )
        for seed in asked.seeds
    ]
    trials = asked.settings.trials()
    chosen = [int(np.argmax(select.top1())) for select, _ in answers]
    tests = [test for _, test in answers]
    tops = [float(test.top1()[head]) for test, head in zip(tests, chosen)]
    table = [
        {
            **asdict(trial),
            "selection_top1": float(np.mean([select.top1()[g] for select, _ in answers])),
            "test_top1": float(np.mean([test.top1()[g] for test in tests])),
        }
        for g, trial in enumerate(trials)
    ]
    classes = len(splits.train.classes)
    first, head = tests[0], chosen[0]
    figures: dict[str, Any] = {
        "top1": float(np.mean(tops)),
        "top1_interval": interval(tops, first, head),
        "interval": "95%, t over seeds" if len(tops) > 1 else "95%, Wilson over test images",
        "top1_by_seed": tops,
        "chosen": [asdict(trials[g]) for g in chosen],
        "selected_on": selected_on,
        "table": table,
    }
    if len(asked.settings.layers) > 1:
        figures["by_layer"] = by_layer(asked.settings.layers, trials, answers)
    figures["per_class"] = dict(zip(splits.train.classes, per_class(first.predicted[head], first.labels, classes)))
    figures["confusion"] = confusion(first.predicted[head], first.labels, classes)
    figures["unreadable"] = len(first.rejected)
    return figures


def interval(tops: Sequence[float], test: Outcome, head: int) -> list[float]:
    """95% of the top-1 accuracy: over seeds where there are several, else over the test images."""
    if len(tops) > 1:
        spread = over_seeds(list(tops), share=True)
        return [spread["low"], spread["high"]]
    right = int((test.predicted[head] == test.labels).sum())
    return [float(bound) for bound in wilson(right, len(test.labels))]


def by_layer(
    layers: Sequence[str], trials: Sequence[Any], answers: Sequence[tuple[Outcome, Outcome]]
) -> dict[str, float]:
    """Test accuracy of each layer's best head, the head chosen as the headline's is."""
    found = {}
    for layer in layers:
        mine = [g for g, trial in enumerate(trials) if trial.layer == layer]
        tops = []
        for select, test in answers:
            best = mine[int(np.argmax(select.top1()[mine]))]
            tops.append(float(test.top1()[best]))
        found[layer] = float(np.mean(tops))
    return found


def brief(figures: dict[str, Any]) -> dict[str, Any]:
    """What a baseline's row needs."""
    return {key: figures[key] for key in ("top1", "top1_interval", "top1_by_seed", "chosen")}


def plot_layers(found: dict[str, float], name: str, path: Path) -> None:
    """Accuracy by layer, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(range(len(found)), [100 * value for value in found.values()], marker="o")
    axes.set_xticks(range(len(found)), list(found), rotation=60 if len(found) > 12 else 0)
    axes.set(xlabel="layer", ylabel="top-1, %", title=f"probe by layer, {name}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def open_and_measure(
    model: str,
    device: str,
    image_size: int | str | None,
    precision: str,
    layers: str,
    asked: Asked,
    stats: Stats | None = None,
) -> dict[str, Any]:
    """Opens the encoder, turns ``layers`` into names, measures."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("probe: its batch norm sees one process; start it without torchrun")
    frozen = open_frozen(model, device, image_size, precision, stats)
    if frozen.range is not None and asked.settings.augmented:
        raise UsageError(
            "--image-size native: augmented images are crops of one size; --features cached, or a number of pixels"
        )
    settings = replace(asked.settings, layers=tuple(dict.fromkeys(frozen.layer_names(layers))))
    return measure(frozen, replace(asked, settings=settings))
