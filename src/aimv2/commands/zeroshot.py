"""``aimv2 zeroshot``: classification by the texts of the classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aimv2.config.types import Count, PathText
from aimv2.evals.options import ZeroshotData

EXAMPLES = """\
aimv2 zeroshot aimv2-large-patch14-224-lit --data photos
aimv2 zeroshot runs/mine --data photos --classes names.txt --out results"""
FIRST = "data dataset templates classes limit device out"


@dataclass(kw_only=True)
class ZeroshotOptions(ZeroshotData):
    """Classify images by the texts of their classes, without training: top-1, top-5, by class (AIMV2, Table 5).

    Args:
        templates: default (three for photographs; of a pair on imagenet1k CLIP's eighty), imagenet (these eighty), one with {}
            (or {c}) for the class, or a file with one per line, or JSON (a list, or one by the names of data sets)
        classes: file of class names, one per line (or JSON) in the order of the labels, or the data set's own names in any
            order; null: the data set's own
        normalize: of the likelihood: sum, mean (per token), or prior (the sum minus the text's log-likelihood over other,
            unlabelled images)
        limit: number of images to sample; 0: all
        seed: random seed of the sampled images
    """

    ORDER = (
        "model data dataset templates classes by normalize limit seed baselines batch_size device out image_mean "
        "image_std image_root"
    )
    templates: PathText = "default"
    classes: PathText | None = None
    limit: Count = 0


def run(options: ZeroshotOptions) -> dict[str, Any]:
    from aimv2.evals.zeroshot import evaluate_zeroshot

    return evaluate_zeroshot(options, options.templates, options.classes, options.limit)
