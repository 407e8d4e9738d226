"""``aimv2 data shapes``: the built-in captioned scenes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from aimv2.config.types import Bounds, Count, Fraction, PathText, SideRange, text

EXAMPLES = "aimv2 data shapes shards/scenes --count 2000"


@dataclass(kw_only=True)
class DataShapesOptions:
    """Write the built-in captioned scenes as shards: shapes with colour, size and place, and unseen validation scenes.

    Args:
        out: folder for the shards
        count: number of training scenes
        size: side in pixels
        largest: height and width of each picture are sampled between SIZE and this, pixels; null: all are SIZE x SIZE
        seed: random seed of the scenes
        objects: 1 to this many objects anywhere in the picture, with boxes and phrases in each sample's JSON; null: one or two,
            each in its own quarter
        object_size: smallest and largest side of an object in pixels, such as 3,9; null: what leaves room for OBJECTS of them
        distractors: fraction of the objects after the first that take their colour or shape from an earlier one
        questions: up to this many questions with answers in each sample's JSON, also as LLaVA's conversations
        hold_out: fraction of the combinations of colour and shape that never occur, such as 0.15
        hold_out_seed: random seed of the combinations that HOLD_OUT takes
        only_held_out: write scenes of the held-out combinations only, to test on what training never showed
    """

    out: PathText
    count: int = 20000
    size: int = 32
    largest: int | None = None
    seed: int = 0
    objects: Annotated[int | None, Bounds(1, 8)] = None
    object_size: SideRange = text(None)
    distractors: Fraction = 0.0
    questions: Count = 0
    hold_out: Annotated[float, Bounds(0, 0.25)] = 0.0
    hold_out_seed: Count = 0
    only_held_out: bool = False


def run(options: DataShapesOptions) -> dict[str, Any]:
    from aimv2.data.scene_objects import make_layout
    from aimv2.data.scenes import write_scenes

    layout = make_layout(
        options.size,
        options.objects,
        options.object_size,
        options.distractors,
        options.hold_out,
        options.hold_out_seed,
        options.only_held_out,
    )
    return write_scenes(
        options.out,
        options.count,
        size=options.size,
        largest=options.largest,
        seed=options.seed,
        layout=layout,
        questions=options.questions,
    )
