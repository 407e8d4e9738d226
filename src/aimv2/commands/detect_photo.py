"""``aimv2 detect PHOTO``: what words mean in pictures, printed and drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console

from aimv2.config.types import Bounds, PathText
from aimv2.errors import UsageError, shown

EXAMPLES = """\
aimv2 detect photo photo.jpg --words "a dog, a red ring" --model RUN
aimv2 detect photo photos --model runs/closed --out found"""


@dataclass(kw_only=True)
class DetectPhotoOptions:
    """Find things in pictures with a detector of aimv2 detect train: print their boxes and draw them.

    Args:
        images: files or folders of images
        words: what to find, with commas: phrases, or of a detector with a fixed list some of its classes; null: all classes that it was
            trained on
        model: RUN or RUN@STEP of aimv2 detect train, or its model folder
        threshold: lowest score of a box that is shown, 0 to 1; null: the model's own
        out: folder for the pictures with their boxes; null: the current one
        device: cpu, cuda, ...; null: cuda where there is one
    """

    images: list[PathText]
    words: str | None = None
    model: PathText | None = None
    threshold: Annotated[float | None, Bounds(0, 1)] = None
    out: PathText | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.model is None:
            raise UsageError(
                "--model is not given: RUN of `aimv2 detect train`, or a model folder of it, is expected",
                option="--model",
                code="missing",
            )
        if self.words is not None and not any(word.strip() for word in self.words.split(",")):
            raise UsageError(
                "--words: nothing to find; phrases with commas are expected", option="--words", code="missing"
            )


def run(options: DetectPhotoOptions) -> dict[str, Any]:
    from aimv2.report.found import find_in_images

    return find_in_images(options)


def render(result: dict[str, Any], console: Console) -> None:
    for one in result["images"]:
        console.print(shown(one["image"]), style="bold", markup=False, highlight=False)
        for found in one["found"]:
            left, top, width, height = found["box"]
            line = f"  {found['score']:.2f}  {found['words']}: {width:.0f} x {height:.0f} px at {left:.0f}, {top:.0f}"
            console.print(line, markup=False, highlight=False)
        if not one["found"]:
            console.print(f"  nothing with a score of {result['threshold']:g} or more", highlight=False)
        console.print(f"  drawn: {shown(one['drawn'])}", markup=False, highlight=False)
    for one in result["rejected"]:
        console.print(f"left out: {shown(one['image'])}: {one['reason']}", markup=False, highlight=False)
