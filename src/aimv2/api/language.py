"""What speaks of images: caption. Heavy imports happen inside."""

from __future__ import annotations

import importlib.util
from typing import Any

from aimv2.api.models import load_model
from aimv2.errors import UsageError


def caption(
    model: str,
    images: list[str],
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    beams: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    data: str | None = None,
    score: bool = False,
    limit: int = 0,
    baselines: str | None = None,
    out: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Write captions of images: greedy, drawn, or by beam search; or score such captions against references.

    Args:
        model: a model folder, RUN or RUN@STEP
        images: files or folders of images; none where data are scored
        max_tokens: end of text included; null: as many as the model can write
        temperature: 0 takes the likeliest token each time
        top_p: draw from the smallest set of tokens with this mass, 0 to 1
        beams: more than 1: beam search
        seed: of the draw
        batch_size: images at once
        data: images with reference captions to score against: shards (test-*, else val-*), a folder with captions.txt
            (image,caption), a captions file
        score: CIDEr, BLEU and exact match of captions of the data; needs the extra aimv2[caption]
        limit: how many of the data's images are drawn; 0: all
        baselines: of the scores: random (the same model, its encoder untrained); null: none
        out: folder of result.json, where data are scored
        device: cpu, cuda, ...; null: cuda where there is one
    """
    from aimv2.api.features import usual_device

    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: at least 1 expected")
    given = [
        option
        for option, value in (("--data", data), ("--limit", limit), ("--baselines", baselines), ("--out", out))
        if value
    ]
    if not score and given:
        raise UsageError(f"{given[0]}: belongs to --score; add --score, or leave it out")
    if score and data is None:
        raise UsageError("--score: needs --data D, images with reference captions")
    if score and images:
        raise UsageError(f"IMAGES {images[0]}: --score reads the images of --data; leave one of them out")
    if limit < 0:
        raise UsageError(f"--limit {limit}: 0 (all) or more expected")
    if score and importlib.util.find_spec("pycocoevalcap") is None:  # before hours of captions
        raise UsageError("--score needs pycocoevalcap: pip install 'aimv2[caption]'")
    loaded = load_model(model, decoder=True, device=usual_device(device))
    if data is None:
        from aimv2.evals.caption import caption_files

        return caption_files(loaded, images, max_tokens, temperature, top_p, beams, seed, batch_size)
    from aimv2.evals.caption_score import Asked, measure
    from aimv2.evals.untrained import check_baselines

    baseline = check_baselines(baselines)
    asked = Asked(data, max_tokens, temperature, top_p, beams, seed, batch_size, limit, out, baseline)
    return measure(model, loaded, asked)
