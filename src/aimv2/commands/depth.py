"""``aimv2 depth``: depth by a linear probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from aimv2.config.types import Bounds, ValueList, text
from aimv2.evals.options import DenseOptions

EXAMPLES = """\
aimv2 depth aimv2-large-patch14-224 --data rooms
aimv2 depth runs/mine --data rooms --baselines random --out results/depth"""
FIRST = "data dataset head depth_scale invalid val_fraction baselines device out"


@dataclass(kw_only=True)
class DepthOptions(DenseOptions):
    """Estimate depth by a probe on frozen patch features: RMSE in metres, abs-rel, delta1 (ratio below 1.25).

    The probe is a linear regression of metres by least squares, kept within the range of the training depths.

    Args:
        data: images and depth maps (16-bit PNG, 0 where there is no value): ROOT/{train,val}/{images,depth},
            ROOT/{images,depth}/{train,val}, or ROOT/{images,depth} with a list or a fraction
        depth_scale: units of the depth maps per metre; null: 1000 (millimetres) in 16-bit maps, and 8-bit maps are rejected
        invalid: values of the maps that mean "no depth", with commas, such as 0,65535; null: 0, and maps that hold the largest
            value of their type are rejected
    """

    ORDER = (
        "model data depth_scale val_list val_fraction layers rates weight_decay epochs batch_size seeds baselines image_size "
        "trunk_batch device out image_mean image_std invalid dataset head"
    )
    depth_scale: Annotated[float | None, Bounds(0, above=True)] = None
    invalid: ValueList = text(None)


def run(options: DepthOptions) -> dict[str, Any]:
    from aimv2.evals.dense import evaluate_depth

    return evaluate_depth(options, options.depth_scale, options.invalid)
