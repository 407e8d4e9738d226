"""Captions of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aimv2.data.images.catalogue import is_image, list_files
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.passed import PassedOver, passed_lines
from aimv2.data.shards.format import IMAGE_EXTENSIONS
from aimv2.data.stream.transforms import image_transform
from aimv2.errors import UsageError
from aimv2.models.aimv2 import AIMv2
from aimv2.progress import tracked


def image_files(paths: Sequence[str], passed: PassedOver | None = None) -> Iterator[Path]:
    """The files among ``paths`` and the images in the folders among them, sorted; ``passed`` counts what is passed over.

    Raises:
        UsageError: a path that does not exist, a folder without an image.
    """
    passed = PassedOver() if passed is None else passed
    for path in map(Path, paths):
        if path.is_file():
            yield path
        elif path.is_dir():
            files = list_files(path, passed)
            passed.add_files(name for name in files if not is_image(name))
            if not any(map(is_image, files)):
                words = "; ".join(("", *passed_lines(passed.result())))
                raise UsageError(f"IMAGES {path}: no image in the folder ({', '.join(IMAGE_EXTENSIONS)}){words}")
            yield from (path / name for name in files if is_image(name))
        else:
            raise UsageError(f"IMAGES {path}: no such file or folder", code="not-found")


@dataclass(frozen=True)
class Writing:
    """How captions are written; see :meth:`aimv2.models.aimv2.AIMv2.caption`."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 1
    seed: int = 0
    batch_size: int = 64
    repetition_penalty: float = 1.0

    def __call__(self, model: AIMv2, images: torch.Tensor, done: int = 0) -> list[str]:
        """Captions of uint8 [B, 3, H, W]; ``done`` images were captioned before, which the seed of sampling counts.

        Raises:
            UsageError: options out of range, a model that can't write.
        """
        try:
            return model.caption(
                images, self.max_tokens, self.temperature, self.top_p, self.beams, self.seed + done,
                repetition_penalty=self.repetition_penalty,
            )  # fmt: skip
        except ValueError as error:
            raise UsageError(str(error)) from None


def caption_files(model: nn.Module, images: Sequence[str], writing: Writing) -> dict[str, Any]:
    """Captions of files and folders.

    Returns:
        ``captions``: a list of {image, caption}; ``rejected``: of {image, reason}, files that can't be read; ``passed_over``:
        {kind: {number, examples}} of files that are not read.
    """
    assert isinstance(model, AIMv2)
    if not images:
        raise UsageError("IMAGES: at least one image file or folder is expected")
    transform = image_transform(model)
    captions: list[dict[str, str]] = []
    rejected: list[dict[str, str]] = []
    waiting: list[tuple[Path, torch.Tensor]] = []
    passed = PassedOver()

    def write() -> None:
        if waiting:
            texts = writing(model, torch.stack([image for _, image in waiting]))
            captions.extend({"image": str(path), "caption": text} for (path, _), text in zip(waiting, texts))
            waiting.clear()

    paths = list(image_files(images, passed))
    for path in tracked(paths, "captions", len(paths)):
        try:
            waiting.append((path, transform(decode_image(path))))
        except ImageError as error:
            rejected.append({"image": str(path), "reason": str(error)})
        if len(waiting) >= writing.batch_size:
            write()
    write()
    if not captions:
        raise UsageError(
            f"IMAGES: none of {len(rejected)} could be read; {rejected[0]['image']}: {rejected[0]['reason']}"
        )
    return {"captions": captions, "rejected": rejected, "passed_over": passed.result()}
