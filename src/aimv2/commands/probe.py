"""``aimv2 probe``: attentive probes, the whole grid at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from aimv2.config.types import Bounds, Count, FloatList, PositiveInt, RateList, SeedList, text
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

    Args:
        protocol: attentive, or efficient (several queries, no key projection)
        features: cached (one forward pass of the encoder, no augmentation) or augmented (random crop, flip, jitter, RandAugment)
        layers: last, avg6, all, or block numbers with commas; all are trained in the same pass
        epochs: passes over the training images
        warmup: warmup epochs (the paper uses 5 for ImageNet)
        batch_size: images per step (the paper uses 1024 for ImageNet)
        rates: peak learning rates of the grid
        decays: weight decays of the grid
        heads: attention heads, or queries; null: width / 64, or 32
        flip: cached features of mirrored images too
        select: where the best head is chosen: auto (the validation split, else a held-out tenth of the training images),
            val, heldout, or test (as the paper reports it; the result says so)
        seeds: random seeds of heads and order, with commas
        train_limit: number of training images to sample; 0: all
        test_limit: number of test images to sample; 0: all
        trunk_batch: images per forward pass of the encoder
        workers: processes that augment
        precision: of the encoder's matmuls, fp32 or bf16; the heads are fp32
        out: folder for result.json, feature cache and checkpoints; an interrupted command continues there
    """

    ORDER = (
        "model data dataset protocol features layers epochs warmup batch_size rates decays heads flip select seeds "
        "baselines train_limit test_limit image_size trunk_batch workers device precision cache out image_mean "
        "image_std image_root test_fraction"
    )
    protocol: Literal["attentive", "efficient"] = "attentive"
    features: Literal["cached", "augmented"] = "cached"
    epochs: PositiveInt = 100
    warmup: Annotated[float, Bounds(0)] = 0.0
    batch_size: PositiveInt = 512
    rates: RateList = text("5e-5,1e-4,2e-4,3e-4,5e-4,1e-3,2e-3")
    decays: FloatList = text("0.05,0.1")
    heads: int | None = None
    flip: bool = False
    select: Literal["auto", "val", "heldout", "test"] = "auto"
    seeds: SeedList = text("0")
    train_limit: Count = 0
    test_limit: Count = 0
    trunk_batch: PositiveInt = 64
    workers: int = 2

    def __post_init__(self) -> None:
        if self.warmup >= self.epochs:
            raise UsageError(f"--warmup {self.warmup:g}: less than the {self.epochs} --epochs expected")


def run(options: ProbeOptions) -> dict[str, Any]:
    from aimv2.evals.probe import ProbeSettings
    from aimv2.evals.probe_result import ProbeWork, evaluate_probe

    settings = ProbeSettings(
        options.protocol, ("last",), options.rates, options.decays, options.epochs, options.warmup, options.batch_size,
        options.heads, options.features == "augmented", options.flip,
    )  # fmt: skip
    work = ProbeWork(
        settings, options.select, options.seeds, options.train_limit, options.test_limit, options.trunk_batch, options.workers,
    )  # fmt: skip
    return evaluate_probe(options, work)
