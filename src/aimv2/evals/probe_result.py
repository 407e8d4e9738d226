"""The command ``probe``: splits, sweep, choice, test, baselines, result.

Legend: G heads of a sweep, C classes.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from aimv2.data.images.labelled import equal_parts, hold_out, joined, limit, subset
from aimv2.data.images.readers import contents_of_rows
from aimv2.errors import UsageError
from aimv2.evals.harness import Evaluation, baseline_figures, labelled_data, open_baselines, open_labelled_splits
from aimv2.evals.options import ClassifierOptions
from aimv2.evals.probe import ProbeSettings, same_work
from aimv2.evals.probe_auto import complaints, fitted, folds_of, steps_of_epoch
from aimv2.evals.probe_run import Outcome, SweepAnswer, SweepPlan, SweepSplits, best_head, run_sweep
from aimv2.evals.result import about_model
from aimv2.evals.scores import confusion, over_seeds, per_class, wilson
from aimv2.features.extraction import features_home
from aimv2.features.frozen import Frozen
from aimv2.io import say
from aimv2.models.probe_head import Trial

HELD_OUT = 0.1  # of each class's training images, where a data set has no validation split
PARTS = 5  # of the training images, where they are learnt from afterwards
CHOSEN_BY = {  # by the start of the heads
    "random": "lowest loss within one standard error of the best top-1",
    "linear": "lowest rate, then lowest decay, within two standard errors of the best top-1",
}


@dataclass(frozen=True)
class ProbeWork:
    """What the command ``probe`` is to do; see :class:`aimv2.commands.probe.ProbeOptions`."""

    settings: ProbeSettings
    select: str
    seeds: tuple[int, ...]
    train_limit: int
    test_limit: int
    trunk_batch: int
    workers: int
    cache: str | None = None
    refit: bool = False  # train the chosen head anew with the images that chose it
    automatic: tuple[str, ...] = ()  # settings that follow the number of images


def evaluate_probe(options: ClassifierOptions, work: ProbeWork) -> dict[str, Any]:
    """The command ``probe``: trains, chooses, tests, writes.

    Raises:
        UsageError: data or options that do not fit, an output folder of something else.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("probe: its batch norm sees one process; start it without torchrun", code="unsupported")
    with Evaluation("probe", options.out) as evaluation:
        frozen = options.open(options.precision)
        if frozen.range is not None and work.settings.augmented:
            raise UsageError(
                "--image-size native: augmented images are crops of one size; --features cached, or a number of pixels",
                code="conflict",
            )
        layers = tuple(dict.fromkeys(frozen.layer_names(options.layers)))
        settings = replace(work.settings, layers=layers)
        work = replace(work, settings=settings, cache=options.cache)
        splits, selected_on, held_out = find_splits(options, work)
        images = len(splits.train.labels)
        settings = fitted(settings, images, work.automatic)
        if settings.warmup >= settings.epochs:
            raise UsageError(f"--warmup {settings.warmup:g}: less than the {settings.epochs} --epochs expected")
        work = replace(work, settings=settings)
        others = open_baselines(options.baselines, frozen, work.seeds[0])
        home = evaluation.open_folder()
        same_work(home, identity(frozen, splits, selected_on, work))
        figures = sweep_figures(frozen, splits, selected_on, work, home)
        last = replace(work, settings=replace(settings, layers=("last",)))

        def baseline(name: str, other: Frozen) -> dict[str, Any]:
            return brief(sweep_figures(other, splits, selected_on, last, home / "run" / name))

        figures |= baseline_figures(others, baseline)
        if evaluation.out is not None and len(layers) > 1:
            plot_layers(figures["by_layer"], frozen.name, evaluation.out / "layers.png")
        whole = sum(len(part.labels) for part in splits.parts or (splits.train, splits.select) if part is not None)
        learnt_again = {
            "refit_on": "all training images" if splits.parts else "training and validation images",
            "refit_steps": settings.epochs * steps_of_epoch(whole, settings.batch_size),
        }
        protocol = {
            "name": f"{settings.protocol} probe",
            "features": "augmented" if settings.augmented else "cached",
            **{key: value for key, value in asdict(settings).items() if key not in ("protocol", "augmented")},
            "selected_on": selected_on,
            "chosen_by": CHOSEN_BY[settings.start] if work.refit else "best top-1",
            "steps": settings.epochs * steps_of_epoch(images, settings.batch_size),
            **({"automatic": {"options": list(work.automatic), "images": images}} if work.automatic else {}),
            **(learnt_again if work.refit else {}),
            **({"test_split": held_out} if held_out else {}),
        }
        data = labelled_data(splits.train, splits.test, options.dataset)
        if work.refit and splits.select is not None and splits.select.split == "heldout":
            data["train_images"] += len(splits.select.labels)
        return evaluation.result(protocol, about_model(frozen), data, figures, list(work.seeds))


def find_splits(options: ClassifierOptions, work: ProbeWork) -> tuple[SweepSplits, str, str | None]:
    """The three splits, and in words where a head is chosen and how the test split was held out.

    Raises:
        UsageError: no training or test split; a validation split that is wanted and does not exist.
    """
    splits = open_labelled_splits(options, work.seeds[0])
    train, val, test, source = splits.train, splits.val, splits.test, options.source
    if work.select == "val" and val is None:
        raise UsageError(
            f"--select val: {source} has no validation split; --select heldout holds out training images",
            code="missing",
        )
    for option, count in (("--train-limit", work.train_limit), ("--test-limit", work.test_limit)):
        if count and count < len(train.classes):
            raise UsageError(f"{option} {count}: at least one image of each of {len(train.classes)} classes expected")
    said = ""
    if work.select == "test" and val is not None:  # nothing is chosen on it, so it is trained on
        train, said = joined(train, val), "; learnt from the training and the validation split"
    train = limit(train, work.train_limit) if 0 < work.train_limit < len(train.labels) else train
    test = limit(test, work.test_limit) if 0 < work.test_limit < len(test.labels) else test
    if work.select == "test":
        how = f"test (the best head on the test labels, as the paper reports it{said})"
        return SweepSplits(train, None, test), how, splits.held_out
    if val is not None and work.select != "heldout":
        return SweepSplits(train, val, test), "validation split", splits.held_out
    if work.refit:
        fifths = equal_parts(train.labels, 0, PARTS)
        parts = [replace(subset(train, rows), split="heldout") for rows in fifths]
        folds = min(folds_of(len(train.labels)), len(parts))
        held_images = sum(len(part.labels) for part in parts[:folds])
        how = f"{held_images} training images, held out" + f" in {folds} turns" * (folds > 1)
        rest = replace(reduce(joined, parts[1:]), split=train.split)
        rows = np.concatenate(fifths)
        return SweepSplits(rest, parts[0], test, tuple(parts), folds, rows), how, splits.held_out
    kept, held = hold_out(train.labels, 0, HELD_OUT)
    select = replace(subset(train, held), split="heldout")
    return SweepSplits(subset(train, kept), select, test), f"{len(held)} training images, held out", splits.held_out


def identity(frozen: Frozen, splits: SweepSplits, selected_on: str, work: ProbeWork) -> dict[str, Any]:
    """What must be the same for an output folder to be continued."""
    images = [split for split in (splits.train, splits.select, splits.test) if split is not None]
    contents = [contents_of_rows(split.image, np.arange(len(split.keys))) for split in images]
    labels = [
        hashlib.sha256(repr((split.classes, list(split.keys), split.labels.tolist())).encode()) for split in images
    ]
    return {
        "weights_sha256": frozen.sha256,
        "model": frozen.fingerprint(),
        "contents": contents,
        "labels": [found.hexdigest() for found in labels],
        "image_size": frozen.image_size,
        "precision": frozen.precision,
        "data": splits.test.source,
        "train_images": len(splits.train.labels),
        "test_images": len(splits.test.labels),
        "selected_on": selected_on,
        "settings": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(work.settings).items()
            if (key, value) != ("start", "random")  # what was written before there was another
        },
        **({"refit": True} if work.refit else {}),
    }


def sweep_figures(frozen: Frozen, splits: SweepSplits, selected_on: str, work: ProbeWork, home: Path) -> dict[str, Any]:
    """The sweep with every seed: the table of its heads, and the chosen one's figures on the test split."""
    again = shlex.join(["aimv2", *sys.argv[1:]])
    settings, folder = work.settings, features_home(work.cache, home, frozen)

    def sweep(seed: int) -> SweepAnswer:
        run, layers = home / "run" / f"seed-{seed}", settings.layers
        plan = SweepPlan(frozen, settings, seed, run, folder, work.workers, again, work.trunk_batch, layers)
        return run_sweep(plan, splits, work.refit)

    answers = [sweep(seed) for seed in work.seeds]
    trials, classes = settings.trials(), len(splits.train.classes)
    tops = [float(answer.final.top1()[0]) for answer in answers]
    table = [
        {
            **asdict(trial),
            "selection_top1": float(np.mean([answer.select.top1()[g] for answer in answers])),
            "test_top1": float(np.mean([answer.test.top1()[g] for answer in answers])),
        }
        for g, trial in enumerate(trials)
    ]
    for line in dict.fromkeys(
        line
        for answer in answers
        for line in complaints(settings, answer.chosen, answer.select.top1(), answer.losses, classes)
    ):
        say(f"{frozen.name}: {line}")
    first = answers[0].final
    figures: dict[str, Any] = {
        "top1": float(np.mean(tops)),
        "top1_interval": interval(tops, first),
        "interval": "95%, t over seeds" if len(tops) > 1 else "95%, Wilson over test images",
        "top1_by_seed": tops,
        "chosen": [asdict(trials[answer.chosen]) for answer in answers],
        "selected_on": selected_on,
        "table": table,
    }
    if len(settings.layers) > 1:
        figures["by_layer"] = by_layer(settings, trials, answers, work.refit)
    figures["per_class"] = dict(zip(splits.train.classes, per_class(first.predicted[0], first.labels, classes)))
    figures["confusion"] = confusion(first.predicted[0], first.labels, classes)
    figures["unreadable"] = len(first.rejected)
    return figures


def interval(tops: Sequence[float], test: Outcome) -> list[float]:
    """95% of the top-1 accuracy: over seeds where there are several, else over the test images."""
    if len(tops) > 1:
        spread = over_seeds(list(tops), fraction=True)
        return [spread["low"], spread["high"]]
    right = int((test.predicted[0] == test.labels).sum())
    return [float(bound) for bound in wilson(right, len(test.labels))]


def by_layer(
    settings: ProbeSettings, trials: Sequence[Trial], answers: Sequence[SweepAnswer], refit: bool
) -> dict[str, float]:
    """Test accuracy of each layer's best head, chosen as the headline's is, before that one learns again."""
    found = {}
    for layer in settings.layers:
        mine = [g for g, trial in enumerate(trials) if trial.layer == layer]
        tops = []
        for answer in answers:
            best = mine[best_head(answer.select.of_heads(mine), [trials[g] for g in mine], settings, refit)]
            tops.append(float(answer.test.top1()[best]))
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

    from aimv2.plots import own_style

    with own_style():
        figure, axes = pyplot.subplots(figsize=(7, 4))
        axes.plot(range(len(found)), [100 * value for value in found.values()], marker="o")
        axes.set_xticks(range(len(found)), list(found), rotation=60 if len(found) > 12 else 0)
        axes.set(xlabel="layer", ylabel="top-1, %", title=f"probe by layer, {name}")
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
