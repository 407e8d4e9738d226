"""``aimv2 vlm score``: what a vision-language model answers, scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rich.console import Console

from aimv2.config.types import Bounds, Count, PathText, PathTexts, PositiveInt, ShotList, text
from aimv2.errors import UsageError

EXAMPLES = """\
aimv2 vlm score vlm --data scenes --out results/scenes
aimv2 vlm score runs/vlm --data seen,unseen
aimv2 vlm score runs/vlm --tasks gqa,textvqa,mme --out results/tables"""

FIRST = "data split tasks shots controls limit earlier_turns device out"


@dataclass(kw_only=True)
class VlmScoreOptions:
    """Score the answers of a vision-language model: questions of shards by exact match, or benchmarks of lmms-eval.

    With the images, without any, and with the images of other samples: what a model answers without looking is no sight.

    Args:
        vlm: a folder of aimv2 vlm build, RUN or RUN@STEP
        data: shards with questions or conversations; several with commas, the first is the headline
        tasks: vqav2, gqa, okvqa, textvqa, docvqa, infovqa, chartqa, scienceqa, coco, textcaps, nocaps, seed, mme, vizwiz, or other
            tasks of lmms-eval; needs the extra aimv2[vlm]
        shots: examples before each question, of the task's training split; several numbers with commas
        include: folder with task files of your own, whose code is run
        split: of the shards: train, val or test
        controls: score text only and shuffled images too
        limit: the first so many samples, or documents of each task; 0: all
        max_tokens: of an answer to questions of the data; null: 16
        batch_size: questions per forward pass
        seed: random seed of the shuffled images
        device: cpu, cuda, ...; null: cuda where there is one
        out: folder for result.json and the answers; an interrupted command continues there
        earlier_turns: put the earlier questions of its conversation and their right answers before each question of the data, as training
            does; false: each question by itself
    """

    vlm: PathText
    data: PathTexts | None = None
    split: Literal["train", "val", "test"] = "val"
    controls: bool = True
    limit: Count = 0
    max_tokens: Annotated[int | None, Bounds(1)] = None
    batch_size: PositiveInt = 64
    seed: int = 0
    device: str | None = None
    out: PathText | None = None
    tasks: str | None = None
    shots: ShotList = text("0")
    include: PathText | None = None
    earlier_turns: bool = True

    def __post_init__(self) -> None:
        if (self.data is None) == (self.tasks is None):
            both = self.data is not None
            code = "conflict" if both else "missing"
            why = "given together" if both else "needed: shards with questions, or names of benchmarks"
            raise UsageError(f"--data or --tasks: {why}; one of the two is expected", option="--data", code=code)
        if self.data is not None and (self.include is not None or max(self.shots) > 0):
            option = "--include" if self.include is not None else "--shots"
            raise UsageError(f"{option}: belongs to --tasks; leave it out with --data", option=option, code="conflict")
        given = {
            "--split": self.split != "val",
            "--max-tokens": self.max_tokens is not None,
            "--earlier-turns": not self.earlier_turns,
        }
        if self.tasks is not None and any(given.values()):
            option = next(name for name, used in given.items() if used)
            raise UsageError(f"{option}: belongs to --data; a task file states it", option=option, code="conflict")


def run(options: VlmScoreOptions) -> dict[str, Any]:
    if options.tasks is not None:
        from aimv2.evals.vlm.run_tasks import evaluate_tasks

        return evaluate_tasks(options)
    from aimv2.evals.vlm.score import evaluate_questions

    return evaluate_questions(options)


def render(result: dict[str, Any], console: Console) -> None:
    if "tasks" in result["figures"]:
        from aimv2.evals.vlm.run_tasks import render_tasks

        console.print(render_tasks(result))
        return
    from aimv2.evals.vlm.score import render_questions

    console.print(render_questions(result))
