"""``aimv2 retrieve``: images by captions and captions by images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from aimv2.config.types import Bounds, IntList, PathText, text
from aimv2.errors import UsageError
from aimv2.evals.options import MatchOptions

EXAMPLES = """\
aimv2 retrieve aimv2-large-patch14-224-lit --data photos
aimv2 retrieve runs/mine --data shards/mine --candidates 100 --out results"""
FIRST = "data captions candidates k baselines device out"


@dataclass(kw_only=True)
class RetrieveOptions(MatchOptions):
    """Find the image of a caption and a caption of an image: recall at k, both ways, with chance.

    Args:
        data: shards with captions (test-*, else val-*, else train-*), a folder of images with a captions file (image,caption)
            or sidecars, or a captions file next to its images
        captions: the captions file, if a folder has several; null: captions.txt
        candidates: number of images to sample, which are searched with all their captions; null: 100 by likelihood, all for a
            pair
        k: ranks that count as found, with commas
        normalize: of the likelihood, for image to text (text to image is the same with all): sum, mean (per token), or prior
            (the sum minus the caption's log-likelihood over up to 100 other images)
        seed: random seed of the candidates
    """

    ORDER = "model data captions candidates k by normalize seed baselines batch_size device out image_mean image_std"
    captions: PathText | None = None
    candidates: Annotated[int | None, Bounds(2)] = None
    k: IntList = text("1,5,10")


def run(options: RetrieveOptions) -> dict[str, Any]:
    if options.data is None:
        raise UsageError(
            "--data is missing: images with captions (shards, or a folder with captions.txt)", code="missing"
        )
    from aimv2.evals.retrieve import evaluate_retrieval

    return evaluate_retrieval(options, options.data, options.captions, options.candidates, options.k)
