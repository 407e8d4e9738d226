"""What the task files in ``tasks`` name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from aimv2.evals.vlm.benchmarks import GQA_IMAGES, place_of
from aimv2.interop.hub import offline_if_unreachable


def cider(results: Sequence[dict[str, Any]]) -> float:
    """CIDEr of captions, 0..10, by pycocoevalcap; each has ``pred`` and references in ``answer``.

    lmms-eval's own figure of the same captions wherever there is Java, without starting its other scorers.
    """
    from aimv2.evals.caption_score import score

    return float(score([row["pred"] for row in results], [row["answer"] for row in results])["cider"])


@cache
def _gqa_images() -> tuple[Any, dict[str, int]]:
    import datasets

    source, name = GQA_IMAGES
    with offline_if_unreachable() as why:
        images = datasets.load_dataset(place_of(source) if why else source, name, split="val")
    return images, {name: row for row, name in enumerate(images["id"])}


def gqa_questions(rows: Any) -> Any:
    """The questions of GQA as they are; images that can't be loaded are an error here, before any question is answered."""
    if "image" not in rows.column_names:
        _gqa_images()
    return rows


def gqa_image(doc: dict[str, Any]) -> list[Any]:
    """The image of a question of GQA: of its own row, else of the configuration that GQA has for images."""
    if "image" in doc:
        return [doc["image"].convert("RGB")]
    images, rows = _gqa_images()
    return [images[rows[doc["imageId"]]]["image"].convert("RGB")]


def seed_images(rows: Any) -> Any:
    """The questions of SEED-Bench on images; those on videos are left out."""
    return rows.filter(lambda kind: kind == "image", input_columns="data_type")
