"""``aimv2 segment``: segmentation by a linear probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from aimv2.config.types import Bounds, ValueList, text
from aimv2.evals.options import DenseOptions

EXAMPLES = """\
aimv2 segment aimv2-large-patch14-224 --data scenes
aimv2 segment runs/mine --data scenes --baselines random --out results/segment"""
FIRST = "data dataset head classes ignore values val_fraction epochs baselines device out"


@dataclass(kw_only=True)
class SegmentOptions(DenseOptions):
    """Segment by a probe on frozen patch features: mIoU, 0 to 1.

    Classes that neither occur nor are predicted are left out of the mean.

    Args:
        data: images and masks (PNG of class ids): ROOT/{train,val}/{images,masks}, ROOT/{images,masks}/{train,val} (ADE20K:
            images/training, annotations/training), or ROOT/{images,masks} with a list or a fraction
        classes: number of classes; null: the largest id in the masks plus one
        ignore: mask value to ignore; -1: none
        reduce_zero: ignore mask value 0 too and move ids down by one (ADE20K)
        values: mask values of the classes in their order, with commas, such as 0,255; null: the values are the classes' ids
    """

    ORDER = (
        "model data classes ignore reduce_zero val_list val_fraction layers rates weight_decay epochs batch_size seeds baselines "
        "image_size trunk_batch device out image_mean image_std values dataset head"
    )
    classes: Annotated[int | None, Bounds(2)] = None
    ignore: int = 255
    reduce_zero: bool = False
    values: ValueList = text(None)


def run(options: SegmentOptions) -> dict[str, Any]:
    from aimv2.evals.dense import evaluate_segmentation

    return evaluate_segmentation(options, options.classes, options.ignore, options.reduce_zero, options.values)
