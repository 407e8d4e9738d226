"""One encoder's sweep of probes with one seed: trained, chosen, trained anew with the images that chose it, tested.

Legend: G heads of a sweep, N images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.data.images.labelled import Labelled, joined
from aimv2.evals.probe import ProbeSettings, fresh_sweep, from_cache, logits_of, train_sweep
from aimv2.evals.probe_start import Averages, averages, start_linear, strength_of, together
from aimv2.evals.probe_stream import FeatureStream, ImageStream, join_features
from aimv2.features.extraction import Cached, cached_features, view_batches
from aimv2.features.frozen import Frozen
from aimv2.models.probe_head import ProbeSweep, Trial
from aimv2.train.loop import Stream


class StreamedSplit:
    """Features of a split, batch by batch, not kept; records which images could be read."""

    def __init__(self, frozen: Frozen, data: Labelled, layers: Sequence[str], size: int = 64) -> None:
        self.frozen, self.data, self.layers, self.size = frozen, data, list(layers), size
        self.rows: list[int] = []
        self.rejected: list[dict[str, str]] = []

    def __iter__(self) -> Iterator[list[Tensor]]:
        self.rows, self.rejected = [], []
        for rows, pixels, lost in view_batches(self.frozen, self.data, self.size):
            self.rows += rows
            self.rejected += [{"key": line["key"], "reason": line["reason"]} for line in lost]
            if pixels is not None:
                yield self.frozen(pixels, self.layers)


@dataclass
class Outcome:
    """What a sweep answered on one split.

    Attributes:
        predicted: int64 [G, N].
        labels: int64 [N].
        loss: cross-entropy of each head, float64 [G], nats.
        rejected: images that could not be read.
    """

    predicted: np.ndarray
    labels: np.ndarray
    loss: np.ndarray
    rejected: list[dict[str, str]] = field(default_factory=list)

    def top1(self) -> np.ndarray:
        """Of each head: float64 [G], 0..1."""
        return (self.predicted == self.labels).mean(1)

    def of_heads(self, heads: Sequence[int]) -> Outcome:
        """The answers of some heads."""
        return dataclasses.replace(self, predicted=self.predicted[heads], loss=self.loss[heads])


@dataclass
class SweepSplits:
    """Where the heads are trained, where one of them is chosen, and where it is tested; with ``folds`` the first ``folds`` of
    ``parts``, which are train and select in equal parts, are held out in turn; ``rows`` are their places in the data set."""

    train: Labelled
    select: Labelled | None  # None: the paper's way, on the test split
    test: Labelled
    parts: tuple[Labelled, ...] = ()
    folds: int = 0
    rows: np.ndarray | None = None

    def turns(self) -> list[tuple[list[Labelled], Labelled | None]]:
        """What the heads learn from, and on what one is chosen."""
        parts = list(self.parts)
        return [(parts[:k] + parts[k + 1 :], parts[k]) for k in range(self.folds)] or [([self.train], self.select)]


@dataclass
class SweepPlan:
    """How the heads of one encoder are trained with one seed.

    Attributes:
        frozen, settings, seed: see there.
        run: folder of the training run.
        folder: of cached features.
        workers: processes that augment.
        again: the command that goes on after an interruption.
        batch: images at once in the trunk.
        layers: whose features are cached together; those of ``settings`` are among them.
        strengths: of each layer of ``settings``, where heads start as a linear classifier; see :meth:`with_strengths`.
        averaged: by the ``id`` of a split and a layer, what :meth:`averages_of` has found.
    """

    frozen: Frozen
    settings: ProbeSettings
    seed: int
    run: Path
    folder: Path
    workers: int
    again: str
    batch: int
    layers: tuple[str, ...]
    strengths: tuple[float, ...] = ()
    averaged: dict[tuple[int, str], Averages] = field(default_factory=dict)

    def averages_of(self, splits: Sequence[Labelled]) -> list[Averages]:
        """Averages of the features of all ``splits``, for each layer of the heads; each split is read once."""
        for split in splits:
            if missing := [layer for layer in self.settings.layers if (id(split), layer) not in self.averaged]:
                found = dict(zip(self.settings.layers, self.cached(split).features))
                self.averaged |= {(id(split), layer): averages(found[layer]) for layer in missing}
        return [together([self.averaged[id(split), layer] for split in splits]) for layer in self.settings.layers]

    def with_strengths(self, splits: SweepSplits) -> SweepPlan:
        """The plan with the strength of each layer's linear classifier; it is chosen once, as ``aimv2 linear`` does."""
        known = splits.parts or (splits.train,)
        val = None if splits.parts else splits.select
        labels = np.concatenate([self.cached(part).labels for part in known])
        chosen_on = None if val is None else (self.averages_of([val]), self.cached(val).labels)
        order = np.arange(len(labels))
        if splits.rows is not None and len(splits.rows) == len(labels):  # all could be read
            order = np.argsort(splits.rows)
        found = []
        for number, (layer, own) in enumerate(zip(self.settings.layers, self.averages_of(known))):
            select = None if chosen_on is None else (chosen_on[0][number].means, chosen_on[1])
            found.append(strength_of(own.means[order], labels[order], select, layer))
        return dataclasses.replace(self, strengths=tuple(found))

    def cached(self, split: Labelled, flip: bool = False) -> Cached:
        """Features of a split, those of the layers of the heads."""
        found = cached_features(self.frozen, split, self.layers, "none", self.folder, self.batch, flip)
        own = [found.features[self.layers.index(layer)] for layer in self.settings.layers]
        return dataclasses.replace(found, features=own)

    def train(self, splits: Sequence[Labelled], what: str) -> tuple[ProbeSweep, np.ndarray]:
        """The heads, trained on the images of all ``splits``, and their losses; see :func:`train_sweep`."""
        settings, frozen, classes = self.settings, self.frozen, len(splits[0].classes)
        whose = f"baseline {frozen.kind}" if frozen.kind in ("random", "pixels") else frozen.name
        title = f"{whose}, seed {self.seed}: {what}"
        trunk = frozen if settings.augmented else None
        sweep = fresh_sweep(frozen.width, classes, settings, self.seed, frozen.device, trunk)
        if settings.augmented:
            data = reduce(joined, splits)
            images = len(data.labels)
            size = min(settings.batch_size, images)
            stream: Stream = ImageStream(data, frozen.side, size, self.seed, self.workers)
        else:
            views = [[self.cached(split, flip) for split in splits] for flip in (False, True)[: 1 + settings.flip]]
            labels = np.concatenate([part.labels for part in views[0]])
            images = len(labels)
            layers = [[join_features(parts) for parts in zip(*(part.features for part in view))] for view in views]
            if settings.start == "linear":
                start_linear(sweep, self.averages_of(splits), labels, self.strengths)
            stream = FeatureStream(layers, labels, min(settings.batch_size, images), self.seed)
        losses = train_sweep(
            sweep, stream, images, settings, self.seed, self.run, frozen.device, self.again, title=title
        )
        return sweep, losses

    def answer(self, sweep: ProbeSweep, split: Labelled) -> Outcome:
        """What the heads say on a split."""
        if self.settings.augmented:
            view = StreamedSplit(self.frozen, split, self.settings.layers, self.batch)
            predicted, loss = judge(sweep, iter(view), lambda: split.labels[view.rows])
            return Outcome(predicted, split.labels[view.rows], loss, view.rejected)
        held = self.cached(split)
        predicted, loss = judge(sweep, from_cache(held), lambda: held.labels)
        return Outcome(predicted, held.labels, loss, held.rejected)


def judge(
    sweep: ProbeSweep, batches: Iterator[list[Any]], labels: Callable[[], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest class and the mean cross-entropy by every head: int64 [G, N], float64 [G].

    Args:
        sweep, batches: see :func:`aimv2.evals.probe.logits_of`.
        labels: those of all batches so far, in their order.
    """
    parts: list[Tensor] = []
    losses, done = torch.zeros(len(sweep.heads), dtype=torch.float64), 0
    for logits in logits_of(sweep, batches):
        parts.append(logits.argmax(-1).cpu())
        own = torch.from_numpy(labels()[done : done + logits.shape[1]]).to(logits.device)
        done += len(own)
        every = F.cross_entropy(logits.flatten(0, 1), own.repeat(len(logits)), reduction="none")
        losses += every.view(len(logits), -1).sum(1).double().cpu()
    return torch.cat(parts, 1).numpy(), (losses / done).numpy()


def all_of(outcomes: Sequence[Outcome]) -> Outcome:
    """What several sweeps of the same trials answered, each on images of its own."""
    labels = np.concatenate([one.labels for one in outcomes])
    loss = sum(len(one.labels) * one.loss for one in outcomes) / len(labels)
    rejected = [line for one in outcomes for line in one.rejected]
    return Outcome(np.concatenate([one.predicted for one in outcomes], 1), labels, np.asarray(loss), rejected)


def surest(select: Outcome, steps: Sequence[tuple[float, float]] | None = None) -> int:
    """Of the heads within one standard error of the best top-1, the one with the lowest loss: a few images can't rank by top-1.
    One that has diverged is the last.

    Args:
        select: what the heads answered.
        steps: of heads that start as a linear classifier, their learning rates and decays; they leave that start only for a clear gain:
            of those within two standard errors the lowest rate, then the lowest decay goes first.
    """
    tops, loss = select.top1(), np.nan_to_num(select.loss, nan=np.inf)
    error = np.sqrt(tops.max() * (1 - tops.max()) / len(select.labels))
    good = tops >= tops.max() - error * (1 if steps is None else 2)
    if steps is not None:
        closest = min(step for step, near in zip(steps, good) if near)
        good &= [step == closest for step in steps]
    return int(np.argmin(np.where(good, loss, np.inf)))


def best_head(select: Outcome, trials: Sequence[Trial], settings: ProbeSettings, refit: bool) -> int:
    """The head that is chosen by what all of them answered: the surest where it learns again, else that of the best top-1."""
    steps = [(trial.lr, trial.weight_decay) for trial in trials] if settings.start == "linear" else None
    return surest(select, steps) if refit else int(np.argmax(select.top1()))


@dataclass
class SweepAnswer:
    """What became of a sweep with one seed.

    Attributes:
        select, test: where a head is chosen, and tested.
        chosen: the best head, 0..G-1.
        final: of the chosen head on the test split, [1, N] after a refit.
        losses: see :func:`train_sweep`.
    """

    select: Outcome
    test: Outcome
    chosen: int
    final: Outcome
    losses: np.ndarray


def run_sweep(plan: SweepPlan, splits: SweepSplits, refit: bool) -> SweepAnswer:
    """Trains all heads with one seed, chooses one, and tests it; ``refit``: after training it anew with the images that chose it."""
    if plan.settings.start == "linear":
        plan = plan.with_strengths(splits)
    trials = plan.settings.trials()
    answers: list[tuple[Outcome, Outcome, np.ndarray]] = []
    for turn, (learn, choose) in enumerate(splits.turns()):
        own = dataclasses.replace(plan, run=plan.run.with_name(f"{plan.run.name}-turn-{turn}")) if turn else plan
        turns = f", turn {turn + 1} of {splits.folds}" if splits.folds else ""
        sweep, losses = own.train(learn, f"{len(trials)} heads{turns}, loss in the mean over them")
        test = own.answer(sweep, splits.test) if not turn else answers[0][1]
        answers.append((test if choose is None else own.answer(sweep, choose), test, losses))
    (_, test, losses), select = answers[0], all_of([select for select, _, _ in answers])
    if not refit or splits.select is None:
        chosen = best_head(select, trials, plan.settings, False)
        return SweepAnswer(select, test, chosen, test.of_heads([chosen]), losses)
    chosen = best_head(select, trials, plan.settings, True)
    trial = trials[chosen]
    settings = dataclasses.replace(
        plan.settings, layers=(trial.layer,), rates=(trial.lr,), decays=(trial.weight_decay,)
    )
    strengths = plan.strengths and (plan.strengths[plan.settings.layers.index(trial.layer)],)
    again = dataclasses.replace(
        plan, settings=settings, strengths=strengths, run=plan.run.with_name(f"{plan.run.name}-refit")
    )
    head, _ = again.train(
        list(splits.parts) or [splits.train, splits.select],
        f"the best head (lr {trial.lr:g}), trained anew on all images",
    )
    return SweepAnswer(select, test, chosen, again.answer(head, splits.test), losses)
