"""What speaks of images: caption. Heavy imports happen inside."""

from __future__ import annotations

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
) -> dict[str, Any]:
    """Write captions of images: greedy, drawn, or by beam search.

    Args:
        model: a model folder, RUN or RUN@STEP
        images: files or folders of images
        max_tokens: end of text included; null: as many as the model can write
        temperature: 0 takes the likeliest token each time
        top_p: draw from the smallest set of tokens with this mass, 0 to 1
        beams: more than 1: beam search
        seed: of the draw
        batch_size: images at once
    """
    from aimv2.evals.caption import caption_files

    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: at least 1 expected")
    loaded = load_model(model, decoder=True)
    return caption_files(loaded, images, max_tokens, temperature, top_p, beams, seed, batch_size)
