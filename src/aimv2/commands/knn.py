"""``aimv2 knn``: the classifier without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from aimv2.config.types import AboveZero, Count, IntList, text
from aimv2.evals.options import PooledOptions

EXAMPLES = """\
aimv2 knn aimv2-large-patch14-224 --data photos
aimv2 knn runs/mine --data photos --baselines random,pixels --out results/knn"""
FIRST = "data dataset layers baselines batch_size device out"


@dataclass(kw_only=True)
class KnnOptions(PooledOptions):
    """Evaluate a frozen encoder by its nearest neighbours: no training, cosine similarity, a sweep over k.

    Args:
        k: numbers of neighbours; all are reported, the headline is chosen on the validation split, and is 20 without one
        weights: uniform (one vote each) or distance (votes of exp(cosine / temperature), as in DINO)
        temperature: of the votes by distance
        backend: torch, faiss, or auto (faiss on a CPU where it is installed); both are exact
        pool: mean of the patches, or attention (models with a pooling head)
        train_limit: number of training images to sample; 0: all
        seed: random seed of the sampled images and the random baseline
    """

    ORDER = (
        "model data dataset k weights temperature backend layers pool baselines train_limit test_limit image_size "
        "batch_size seed device precision cache out image_mean image_std image_root test_fraction"
    )
    k: IntList = text("1,5,10,20,50,100,200")
    weights: Literal["uniform", "distance"] = "uniform"
    temperature: AboveZero = 0.07
    backend: Literal["auto", "torch", "faiss"] = "auto"
    pool: Literal["mean", "attention"] = "mean"
    train_limit: Count = 0


def run(options: KnnOptions) -> dict[str, Any]:
    from aimv2.evals.knn import KnnSettings, evaluate_knn

    settings = KnnSettings(options.k, options.weights, options.temperature, options.backend)
    return evaluate_knn(options, settings, options.pool, options.train_limit)
