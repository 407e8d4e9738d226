"""The attentive probe on a frozen encoder, the whole grid of learning rates and decays at once (AIMV2, Table A2).

Legend: N images, I patches, D width, G heads of a sweep, C classes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aimv2.config.schema import Config, OptimConfig
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.evals.probe_stream import FeatureStream
from aimv2.features.extraction import Cached
from aimv2.features.frozen import LAST
from aimv2.features.ragged import Ragged
from aimv2.features.store import read_object
from aimv2.interop.model_folder import checkpoints, write_model
from aimv2.io import write_aside
from aimv2.models.probe_head import ProbeSweep, Trial
from aimv2.objectives import Objective
from aimv2.objectives.probe import SweepObjective
from aimv2.tasks import Task
from aimv2.tasks.held_out import HeldOut
from aimv2.tasks.task import Context
from aimv2.train import prepare
from aimv2.train.log import Log
from aimv2.train.loop import Stream, Trainer
from aimv2.train.optim import parameter_groups

RATES = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3)  # AIMV2, Table A2
DECAYS = (0.05, 0.1)
ABOUT = "probe.json"


@dataclass(frozen=True)
class ProbeSettings:
    """Everything that decides a probe besides encoder and data; the defaults are the paper's (AIMV2, Table A2).

    Attributes:
        protocol: attentive or efficient.
        layers: names of layers; every pair of rate and decay is trained on each.
        rates, decays: the grid: peak learning rates and weight decays.
        epochs: over the training images, on a cosine down to ``min_lr``.
        warmup: epochs, part of them.
        batch_size: images a step.
        heads: of the attention, or queries; None: width / 64, or 32 queries.
        augmented: train on augmented images instead of cached features.
        flip: cached features of the mirrored images too.
        min_lr, clip: end of the cosine; largest norm of a head's gradient.
        start: random weights, or the linear classifier on the averaged features; see :mod:`aimv2.evals.probe_start`.
    """

    protocol: str = "attentive"
    layers: tuple[str, ...] = (LAST,)
    rates: tuple[float, ...] = RATES
    decays: tuple[float, ...] = DECAYS
    epochs: int = 100
    warmup: float = 0.0
    batch_size: int = 512
    heads: int | None = None
    augmented: bool = False
    flip: bool = False
    min_lr: float = 1e-5
    clip: float = 3.0
    start: str = "random"

    def trials(self) -> list[Trial]:
        """The heads of a sweep, layer by layer."""
        return [Trial(layer, lr, decay) for layer in self.layers for lr in self.rates for decay in self.decays]


class SweepLog(Log):
    """The loss of a head, in the mean over the sweep; no tokens, for there is no text."""

    heads = 1

    def write(self, step: int, figures: dict[str, Any]) -> None:
        kept = {key: value for key, value in figures.items() if key != "tokens_per_s"}
        super().write(step, {key: value / self.heads if key.endswith("loss") else value for key, value in kept.items()})

    def early(self, step: int, loss: float) -> None:
        super().early(step, loss / self.heads)


class SweepTask(Task):
    """Many heads on frozen features, each with its own learning rate, weight decay and gradient norm."""

    def __init__(self, config: Config, sweep: ProbeSweep) -> None:
        super().__init__(config)
        self.sweep, self.sweep_objective = sweep, SweepObjective()

    def reads_text(self) -> bool:
        return False

    def build(self, context: Context) -> ProbeSweep:
        return self.sweep

    def objective(self, model: nn.Module) -> Objective:
        return self.sweep_objective

    def validate(self, model: nn.Module, objective: Objective, data: HeldOut, world: World) -> dict[str, float]:
        """Left to whoever holds the splits."""
        return {}

    def parameter_groups(self, model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
        """Weight decay is ``lr * decay``, as PyTorch means it (AIMV2, Table A2)."""
        assert isinstance(model, ProbeSweep)
        return [
            {**group, "weight_decay": decay, "peak": trial.lr, "scale": 1.0}
            for head, trial in zip(model.heads, model.trials)
            for group, decay in zip(parameter_groups(head), (trial.weight_decay, 0.0))
            if group["params"]
        ]

    def clip(self, model: nn.Module, limit: float) -> Tensor:
        """Clips each head by itself; the largest norm."""
        assert isinstance(model, ProbeSweep)
        return torch.stack([nn.utils.clip_grad_norm_(head.parameters(), limit) for head in model.heads]).max()


class ProbeTrainer(Trainer):
    """The one loop over a sweep: no validation on the way, only the heads are saved."""

    again = ""  # what a user types after an interruption
    saves = True

    def open_log(self) -> Log:
        log = SweepLog(self.run, self.config.log, self.config.train.steps, self.step, self.world.main)
        assert isinstance(self.model, ProbeSweep)
        log.heads = len(self.model.heads)
        self.log, self.peak = log, None  # the FLOPs of heads say nothing about a device
        return log

    def validate(self, log: Log) -> None:
        """Left to whoever holds the splits."""

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        sweep = self.model
        assert isinstance(sweep, ProbeSweep)
        write_model(folder, sweep.config_dict(), weights)

    def command_to_go_on(self) -> str:
        return self.again

    def save(self) -> None:
        if self.saves:
            super().save()


def train_sweep(
    sweep: ProbeSweep,
    stream: Stream,
    images: int,
    settings: ProbeSettings,
    seed: int,
    run: Path,
    device: torch.device,
    again: str = "",
    saves: bool = True,
    title: str = "",
) -> np.ndarray:
    """Trains the heads in place, in the one loop; a run folder that holds a beginning is gone on with.

    Args:
        sweep: with fresh heads.
        stream: of batches of ``settings.batch_size``.
        images: training images, which make an epoch.
        settings: see there.
        seed: of the run.
        run: its folder.
        device: where the heads are trained.
        again: the command that goes on after an interruption.
        saves: keep checkpoints; not with other ranks, which would have to take part.
        title: a line above those of the log, completed by the number of steps.

    Returns:
        the training loss of each step from the start of this process on, and of each head: float32 [steps, G], nats.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves by itself
    size = min(settings.batch_size, images)
    steps = settings.epochs * (images // size)
    config = Config(run=str(run), seed=seed)
    config.data.workers = 0
    config.log.tensorboard = False
    config.eval.every = 0
    config.train = dataclasses.replace(
        config.train,
        steps=steps,
        batch_size=size,
        precision="fp32",
        compile="off",
        save_every=max(steps // 10, 1),
        keep=1,
        log_every=max(steps // 20, 1) if saves else steps,
    )
    config.optim = dataclasses.replace(
        config.optim,
        lr=max(settings.rates),
        min_lr=settings.min_lr,
        warmup=round(settings.warmup * (images // size)),
        betas=(0.9, 0.999),
        clip=settings.clip,
    )
    world = World(0, 1, device)
    task = SweepTask(config, sweep)
    trainer = ProbeTrainer(config, sweep, None, run, world, stream=stream, task=task)
    trainer.again, trainer.saves = again, saves
    prepare.open_run(run, config, None)
    prepare.drop_damaged(run, world)
    found = prepare.find_resume(run, config, None) if checkpoints(run) else None
    if found is not None:
        trainer.restore(found)
    log = trainer.open_log()
    if title:
        log.say(f"{title}; {steps:,} steps of {size:,} images ({settings.epochs} epochs of {images:,})")
    try:
        trainer.train()
    finally:
        trainer.close()
    losses = task.sweep_objective.losses
    return torch.stack(losses).cpu().numpy() if losses else np.zeros((0, len(sweep.heads)), np.float32)


def fresh_sweep(
    width: int, classes: int, settings: ProbeSettings, seed: int, device: torch.device, trunk: Any = None
) -> ProbeSweep:
    """Heads that all start from the same weights, so that rate and decay are what differs."""
    trials = settings.trials()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sweep = ProbeSweep(width, classes, trials, settings.protocol, default_heads(width, settings), trunk)
        first = sweep.heads[0].state_dict()
        for head in sweep.heads:
            head.load_state_dict(first)
    return sweep.to(device)


def nearest_batch(ideal: float, largest: int) -> int:
    """The power of two next to ``ideal`` (above 0), from 16 to ``largest``."""
    return min(max(2 ** round(math.log2(ideal)), 16), largest)


def default_heads(width: int, settings: ProbeSettings) -> int | None:
    """Heads that divide the width: about one per 64 values by default.

    Raises:
        UsageError: heads that do not.
    """
    if settings.heads is not None:
        if settings.heads < 1 or width % settings.heads:
            raise UsageError(f"--heads {settings.heads} does not divide the features' width {width}", code="mismatch")
        return settings.heads
    if settings.protocol == "efficient":
        return None
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


@torch.no_grad()
def logits_of(sweep: ProbeSweep, batches: Iterator[list[Any]]) -> Iterator[Tensor]:
    """Logits of each batch by every head: [G, B, C]. Of each layer a batch holds [B, tokens, D] or B times [tokens, D]."""
    sweep.eval()
    device = next(sweep.parameters()).device

    def there(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else [one.to(device) for one in x]

    for features in batches:
        yield sweep.logits([there(x) for x in features])


def predict(sweep: ProbeSweep, batches: Iterator[list[Any]]) -> np.ndarray:
    """The likeliest class by every head: int64 [G, N]; see :func:`logits_of`."""
    return torch.cat([logits.argmax(-1).cpu() for logits in logits_of(sweep, batches)], 1).numpy()


def from_cache(cached: Cached, size: int = 256) -> Iterator[list[Any]]:
    """Batches of cached features; see :func:`predict`."""
    for at in range(0, len(cached.labels), size):
        own = range(at, min(at + size, len(cached.labels)))
        yield [
            [torch.from_numpy(np.array(layer[row])) for row in own]
            if isinstance(layer, Ragged)
            else torch.from_numpy(np.array(layer[at : at + size]))
            for layer in cached.features
        ]


def same_work(out: Path, about: dict[str, Any]) -> None:
    """Notes what an output folder is for, or makes sure that it is for this.

    Raises:
        UsageError: it holds another evaluation.
    """
    file = out / ABOUT
    if file.is_file():
        stored = read_object(file, "--out")
        different = [key for key in about if stored.get(key) != about[key]]
        if different:
            raise UsageError(
                f"--out {out}: holds an evaluation with another {' and '.join(different)} "
                f"({different[0]}: {stored.get(different[0])}, here {about[different[0]]}); give a new folder",
                code="mismatch",
            )
        return
    write_aside(file, json.dumps(about, indent=1) + "\n")


# ---- one head: what a training run is followed by ----


def train_probe(
    views: Sequence[Tensor],
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    epochs: int = 10,
    lr: float = 1e-3,
    heads: int | None = None,
    weight_decay: float = 0.05,
    size: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> float:
    """One head on features that were computed before.

    Args:
        views: of the training images, [N, I, D] each; one of them is drawn for each batch.
        labels: int64 [N].
        test, test_labels: [M, I, D], int64 [M].
        epochs: over the training images, half of the first one warming up.
        lr, weight_decay: of AdamW, at the peak of the cosine.
        heads: of the probe's attention; None: width / 64.
        size: batch; None: 256, of fewer than 5,120 images about a twentieth.
        seed: of the head and the order.
        device: where the head is trained; the CPU by default.

    Returns:
        top-1 accuracy on the test features, 0..1.
    """
    size = size or nearest_batch(len(labels) / 20, 256)
    settings = ProbeSettings(
        rates=(lr,), decays=(weight_decay,), epochs=epochs, warmup=0.5, batch_size=size, heads=heads, min_lr=0.0
    )
    device = device or torch.device("cpu")
    classes = int(max(labels.max(), test_labels.max())) + 1
    sweep = fresh_sweep(views[0].shape[-1], classes, settings, seed, device)
    stream = FeatureStream([[view.numpy()] for view in views], labels.numpy(), min(size, len(labels)), seed)
    with tempfile.TemporaryDirectory() as folder:
        train_sweep(sweep, stream, len(labels), settings, seed, Path(folder) / "run", device, saves=False)
    predicted = predict(sweep, ([part] for part in test.split(256)))
    return float((predicted[0] == test_labels.numpy()).mean())
