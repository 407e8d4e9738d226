"""``aimv2 data check``: what shards hold."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from aimv2.config.types import PathText
from aimv2.errors import UsageError

EXAMPLES = "aimv2 data check shards/mine"


@dataclass(kw_only=True)
class DataCheckOptions:
    """Check shards before training: counts, sizes, caption lengths, duplicates, unreadable and tiny images.

    Args:
        source: folder, glob, brace pattern or one tar
        tokenizer: count caption lengths in its tokens; null: in those of a BPE trained on the captions, as a run trains it
        min_side: images with a shorter side count as tiny, pixels
    """

    source: PathText
    tokenizer: PathText | None = None
    min_side: int = 16


def run(options: DataCheckOptions) -> dict[str, Any]:
    from aimv2.data.shards.check import check_data
    from aimv2.data.text.captions import read_captions
    from aimv2.data.text.tokenizer import load_tokenizer, train_tokenizer

    source = options.source
    if options.tokenizer is not None:
        counter = load_tokenizer(options.tokenizer, option="--tokenizer")
    else:
        if not any(mark in source for mark in "*?[{") and not Path(source).expanduser().exists():
            raise UsageError(
                f"SOURCE: {source!r} does not exist; a folder, glob, brace pattern or one tar is expected",
                code="not-found",
            )
        captions = list(islice(read_captions(source), 50_000))
        if not captions:
            return check_data(source, min_side=options.min_side, progress=True)
        counter = train_tokenizer(captions)
    return check_data(
        source, tokenizer=lambda text: len(counter.encode(text, 1_000_000)), min_side=options.min_side, progress=True
    )


def render(result: dict[str, Any], console: Console) -> None:
    from aimv2.data.shards.check import render_check

    console.print(render_check(result))
