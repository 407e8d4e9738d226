"""``aimv2 probe``: attentive probes, the whole grid at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from aimv2.config.types import AutoFloatList, AutoRateList, Bounds, Count, PositiveInt, SeedList, text
from aimv2.errors import UsageError
from aimv2.evals.options import ClassifierOptions

EXAMPLES = """\
aimv2 probe aimv2-large-patch14-224 --data photos
aimv2 probe runs/mine --data photos --baselines random --out results/probe"""
FIRST = "data dataset epochs rates batch_size baselines device out"


@dataclass(kw_only=True)
class ProbeOptions(ClassifierOptions):
    """Evaluate a frozen encoder by probes on its patch features: the whole grid of learning rates and weight decays at once
    (AIMV2, Table A2).

    With --dataset epochs, batch size and grid are the paper's; without it each of them that is not given follows the number of
    training images, and the best head is trained anew with the images that chose it.

    Args:
        protocol: attentive, or efficient (several queries, no key projection)
        features: cached (one forward pass of the encoder, no augmentation) or augmented (random crop, flip, jitter, RandAugment)
        layers: last, avg6, all, or block numbers with commas; all are trained in the same pass
        epochs: passes over the training images; null: 100 (--dataset given), else 50, and more where that is fewer than 500 steps
        warmup: warmup epochs (the paper uses 5 for ImageNet)
        batch_size: images per step; null: 512 (--dataset given; the paper uses 1024 for ImageNet), else the power of two from 16 to
            512 that comes next to 1,000 steps
        rates: peak learning rates of the grid; null: 5e-5,1e-4,2e-4,3e-4,5e-4,1e-3,2e-3 (--dataset given), else
            3e-4,1e-3,3e-3,1e-2,3e-2, and 1e-5 with start linear
        decays: weight decays of the grid; null: 0.05,0.1 (--dataset given), else 0.05,5,50
        heads: attention heads, or queries; null: width / 64, or 32
        flip: cached features of mirrored images too
        select: where the best head is chosen: auto (the validation split, else held-out training images: a fifth with refit,
            of fewer than 5,000 several in turn, else a tenth), val, heldout, or test (as the paper reports it; the result says so)
        seeds: random seeds of heads and order, with commas
        train_limit: number of training images to sample; 0: all
        test_limit: number of test images to sample; 0: all
        trunk_batch: images per forward pass of the encoder
        workers: processes that augment
        precision: of the encoder's matmuls, fp32 or bf16; the heads are fp32
        out: folder for result.json, feature cache and checkpoints; an interrupted command continues there
        refit: train the best head anew with the images that chose it; null: yes for cached features, without a name of the paper (dataset)
        start: how attentive heads begin: random, or linear (the average of the patches under the classifier of the command linear, and
            trained from there); null: random (--dataset given, more than 10,000 training images, efficient or augmented), else linear
    """

    ORDER = (
        "model data dataset protocol features layers epochs warmup batch_size rates decays heads flip select seeds "
        "baselines train_limit test_limit image_size trunk_batch workers device precision cache out image_mean "
        "image_std image_root test_fraction refit start"
    )
    protocol: Literal["attentive", "efficient"] = "attentive"
    features: Literal["cached", "augmented"] = "cached"
    epochs: Annotated[int | None, Bounds(1)] = None
    warmup: Annotated[float, Bounds(0)] = 0.0
    batch_size: Annotated[int | None, Bounds(1)] = None
    rates: AutoRateList = text(None)
    decays: AutoFloatList = text(None)
    heads: int | None = None
    flip: bool = False
    select: Literal["auto", "val", "heldout", "test"] = "auto"
    seeds: SeedList = text("0")
    train_limit: Count = 0
    test_limit: Count = 0
    trunk_batch: PositiveInt = 64
    workers: int = 2
    refit: bool | None = None
    start: Literal["random", "linear"] | None = None

    def __post_init__(self) -> None:
        if self.epochs is not None and self.warmup >= self.epochs:
            raise UsageError(f"--warmup {self.warmup:g}: less than the {self.epochs} --epochs expected")
        if self.start == "linear" and (self.protocol != "attentive" or self.features != "cached"):
            raise UsageError(
                "--start linear: for attentive heads on cached features; --start random, or --protocol attentive and --features cached",
                option="--start",
                code="conflict",
            )
        if self.refit and self.select == "test":
            raise UsageError(
                "--refit: with --select test the best head has learnt from all images; leave one of them out",
                option="--refit",
                code="conflict",
            )


def run(options: ProbeOptions) -> dict[str, Any]:
    from aimv2.evals.probe import ProbeSettings
    from aimv2.evals.probe_auto import AUTOMATIC
    from aimv2.evals.probe_result import ProbeWork, evaluate_probe

    given = {name: value for name in AUTOMATIC if (value := getattr(options, name)) is not None}
    settings = ProbeSettings(
        protocol=options.protocol, warmup=options.warmup, heads=options.heads, augmented=options.features == "augmented",
        flip=options.flip, **given,
    )  # fmt: skip
    named = options.dataset is not None
    refit = not named and not settings.augmented if options.refit is None else options.refit
    work = ProbeWork(
        settings, options.select, options.seeds, options.train_limit, options.test_limit, options.trunk_batch, options.workers,
        refit=refit and options.select != "test", automatic=() if named else tuple(n for n in AUTOMATIC if n not in given),
    )  # fmt: skip
    return evaluate_probe(options, work)
