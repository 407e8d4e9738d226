"""``aimv2 caption``: captions of images, and their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from aimv2.config.types import AboveZero, Count, PathText, PositiveInt, UntrainedOnly, text
from aimv2.errors import UsageError, need, shown
from aimv2.terminal import VisibleConsole

EXAMPLES = """\
aimv2 caption runs/mine photos
aimv2 caption runs/mine --data shards/mine --score --out results/captions
aimv2 caption VLM photo.jpg --ask "What is this?"
aimv2 caption VLM --data shards/mine --score --ask "Describe it.\""""
FIRST = "beams temperature max_tokens repetition_penalty ask data score out device"


@dataclass(kw_only=True)
class CaptionOptions:
    """Write captions of images: greedy, sampled, or by beam search; or score such captions against references; or answer a question.

    Args:
        model: a model folder, RUN or RUN@STEP
        images: files or folders of images; none if data are scored
        max_tokens: end of text included; null: as many as the model can write
        temperature: 0 takes the likeliest token each time
        top_p: sample from the smallest set of tokens with this mass, 0 to 1
        beams: more than 1: beam search
        seed: random seed of sampling
        batch_size: images per forward pass
        data: images with reference captions to score against: shards (test-*, else val-*), a folder with captions.txt
            (image,caption), a captions file
        score: CIDEr, BLEU and exact match of captions of the data; needs the extra aimv2[caption]
        limit: number of the data's images to sample; 0: all
        baselines: of the scores: random (the same model with an untrained encoder); null: none
        out: folder for result.json, if data are scored
        device: cpu, cuda, ...; null: cuda where there is one
        repetition_penalty: more than 1 makes tokens that are written already less likely
        ask: a question, which a vision-language model (a folder of `aimv2 vlm build`, a RUN of `aimv2 vlm train`) answers for each image,
            greedily and in 64 tokens at most; with score the answers are scored as captions
    """

    model: PathText
    images: list[PathText]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    beams: PositiveInt = 1
    seed: int = 0
    batch_size: PositiveInt = 64
    data: PathText | None = None
    score: bool = False
    limit: Count = 0
    baselines: UntrainedOnly = text(None)
    out: PathText | None = None
    device: str | None = None
    repetition_penalty: AboveZero = 1.0
    ask: str | None = None

    def __post_init__(self) -> None:
        if self.ask is not None:
            others = {"beams": 1, "temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}
            if other := next((name for name, default in others.items() if getattr(self, name) != default), None):
                name = f"--{other.replace('_', '-')}"
                raise UsageError(
                    f"{name}: not with --ask, whose answers are greedy; leave one of them out", code="conflict"
                )
            if self.baselines:
                raise UsageError("--baselines: not with --ask; leave one of them out", code="conflict")
        scoring = ("--data", self.data), ("--limit", self.limit), ("--baselines", self.baselines), ("--out", self.out)
        given = [option for option, value in scoring if value]
        if not self.score and given:
            raise UsageError(f"{given[0]}: belongs to --score; add --score, or leave it out", code="conflict")
        if self.score and self.data is None:
            raise UsageError("--score: needs --data D, images with reference captions", code="missing")
        if self.score and self.images:
            raise UsageError(
                f"IMAGES {self.images[0]}: --score reads the images of --data; leave one of them out", code="conflict"
            )


def run(options: CaptionOptions) -> dict[str, Any]:
    if options.score:  # before hours of captions
        need("pycocoevalcap", "caption", "--score")
    from aimv2.data.text.models import load_model
    from aimv2.distributed import default_device
    from aimv2.evals.caption import Writing, ask_files, caption_files

    if options.ask is not None:
        most = 64 if options.max_tokens is None else options.max_tokens
        if options.data is None:
            return ask_files(options.model, options.images, options.ask, most, options.batch_size, options.device)
        from aimv2.evals.caption_score import evaluate_asked

        return evaluate_asked(
            options.model,
            options.ask,
            options.data,
            most,
            options.batch_size,
            options.limit,
            options.out,
            options.device,
        )

    loaded = load_model(options.model, decoder=True, device=default_device(options.device))
    writing = Writing(
        options.max_tokens, options.temperature, options.top_p, options.beams, options.seed, options.batch_size,
        options.repetition_penalty,
    )  # fmt: skip
    if options.data is None:
        return caption_files(loaded, options.images, writing)
    from aimv2.evals.caption_score import evaluate_captions

    return evaluate_captions(
        options.model, loaded, writing, options.data, options.limit, bool(options.baselines), options.out
    )


def render(result: dict[str, Any], console: Console) -> None:
    if "figures" in result:
        from aimv2.evals.caption_score import render_scores

        console.print(render_scores(result))
        return
    from aimv2.data.passed import passed_lines

    for row in result.get("answers") or result["captions"]:
        console.print(f"{row['image']}\t{row.get('answer') or row.get('caption', '')}")
    for row in result["rejected"]:
        VisibleConsole(stderr=True, markup=False, soft_wrap=True).print(shown(f"{row['image']}: {row['reason']}"))
    for line in passed_lines(result["passed_over"]):
        VisibleConsole(stderr=True, markup=False, soft_wrap=True).print(line)
