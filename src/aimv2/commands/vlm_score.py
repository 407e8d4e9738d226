"""``aimv2 vlm score``: what a vision-language model answers, scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rich.console import Console

from aimv2.config.types import Bounds, Count, PositiveInt
from aimv2.errors import UsageError

EXAMPLES = """\
aimv2 vlm score vlm --data scenes --out results/scenes
aimv2 vlm score runs/vlm --data seen,unseen --split val"""


@dataclass(kw_only=True)
class VlmScoreOptions:
    """Score the answers of a vision-language model: questions of shards by exact match.

    With the images, without any, and with the images of other samples: what a model answers without looking is no sight.

    Args:
        vlm: a folder of aimv2 vlm build, RUN or RUN@STEP
        data: shards with questions or conversations; several with commas, the first is the headline
        split: of the shards: train, val or test
        controls: score text only and shuffled images too
        limit: the first so many samples; 0: all
        max_tokens: of an answer; null: 16
        batch_size: questions per forward pass
        seed: random seed of the shuffled images
        device: cpu, cuda, ...; null: cuda where there is one
        out: folder for result.json and the answers; an interrupted command continues there
    """

    vlm: str
    data: str | None = None
    split: Literal["train", "val", "test"] = "val"
    controls: bool = True
    limit: Count = 0
    max_tokens: Annotated[int | None, Bounds(1)] = None
    batch_size: PositiveInt = 64
    seed: int = 0
    device: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        if self.data is None:
            raise UsageError("--data: needs shards with questions, such as those of data shapes", code="missing")


def run(options: VlmScoreOptions) -> dict[str, Any]:
    from aimv2.evals.vlm.score import evaluate_questions

    return evaluate_questions(options)


def render(result: dict[str, Any], console: Console) -> None:
    from aimv2.evals.vlm.score import render_questions

    console.print(render_questions(result))
