"""``aimv2 fewshot``: a few images per class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aimv2.config.types import IntList, PositiveInt, text
from aimv2.evals.options import PooledOptions

EXAMPLES = """\
aimv2 fewshot aimv2-large-patch14-224 --data photos
aimv2 fewshot runs/mine --data photos --shots 1,5 --out results/fewshot"""
FIRST = "data dataset shots seeds layers device out"


@dataclass(kw_only=True)
class FewshotOptions(PooledOptions):
    """Evaluate a frozen encoder by a classifier fitted on a few images per class, over several draws.

    Args:
        shots: images per class; the headline is of the largest number
        seeds: number of draws
        layers: last, avg6, all, or block numbers with commas; the headline is of last if it is among them, else of the first
        seed: the first random seed; draws and the random baseline follow from it
    """

    ORDER = (
        "model data dataset shots seeds layers baselines test_limit image_size batch_size seed device precision cache "
        "out image_mean image_std image_root test_fraction"
    )
    shots: IntList = text("1,5,10")
    seeds: PositiveInt = 5


def run(options: FewshotOptions) -> dict[str, Any]:
    from aimv2.evals.fewshot import evaluate_fewshot

    return evaluate_fewshot(options, options.shots, options.seeds)
