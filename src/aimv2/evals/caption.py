"""Captions of image files, and answers to a question on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import nn

from aimv2.data.images.catalogue import is_image, list_files
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.passed import PassedOver, passed_lines
from aimv2.data.shards.format import IMAGE_EXTENSIONS
from aimv2.data.stream.transforms import image_transform
from aimv2.distributed import default_device
from aimv2.errors import UsageError
from aimv2.models.aimv2 import AIMv2
from aimv2.progress import tracked

Prepared = TypeVar("Prepared")


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
    transform = image_transform(model)

    def write(batch: list[torch.Tensor]) -> list[str]:
        return writing(model, torch.stack(batch))

    return texts_of_files(images, lambda path: transform(decode_image(path)), write, writing.batch_size, "caption")


class Asker:
    """A vision-language model with one question, which it answers greedily for each image."""

    def __init__(self, model: Any, processor: Any, text: str, max_tokens: int, batch_size: int) -> None:
        self.model, self.processor, self.text = model, processor, text
        self.max_tokens, self.batch_size = max_tokens, batch_size

    def see(self, image: Image.Image) -> Image.Image:
        """As it is: the processor takes it."""
        return image

    def write(self, images: list[Image.Image], done: int = 0) -> list[str]:
        """Answers; how many were written before (``done``) does not matter to greedy ones."""
        from aimv2.vlm.answer import answers, question

        asked = [question(self.text, image) for image in images]
        return answers(self.model, self.processor, asked, self.max_tokens, self.batch_size)


def asker(source: str, text: str, max_tokens: int, batch_size: int, device: str | None) -> Asker:
    """The model of ``--ask``, on its device; see :func:`ask_files`."""
    from aimv2.vlm.language import IMAGE_TOKEN
    from aimv2.vlm.model import open_vlm

    if not text.strip():
        raise UsageError("--ask is empty: a question is expected", option="--ask")
    if text.count(IMAGE_TOKEN) > 1:
        raise UsageError(f"--ask {text!r}: a question with one {IMAGE_TOKEN} at most is expected", option="--ask")
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}: 1 or more expected", option="--max-tokens")
    model, processor = open_vlm(source, "MODEL")
    return Asker(model.to(default_device(device)), processor, text, max_tokens, batch_size)


def ask_files(
    source: str, images: Sequence[str], text: str, max_tokens: int = 64, batch_size: int = 64, device: str | None = None
) -> dict[str, Any]:
    """Greedy answers of a vision-language model to one question on each of the files and folders.

    Args:
        source: a folder of ``aimv2 vlm build``, or a RUN of ``aimv2 vlm train``.
        images: files and folders.
        text: the question; ``<image>`` in it is the place of the image, which else comes first.
        max_tokens: of an answer, its end included.
        batch_size: images per forward pass.
        device: None: cuda where there is one.

    Returns:
        ``question``; ``answers``: a list of {image, answer}; ``rejected``, ``passed_over``: see :func:`caption_files`.

    Raises:
        UsageError: no vision-language model, no image, a question that does not fit.
    """
    one = asker(source, text, max_tokens, batch_size, device)
    return {"question": text, **texts_of_files(images, decode_image, one.write, batch_size, "answer")}


def texts_of_files(
    images: Sequence[str],
    read: Callable[[Path], Prepared],
    write: Callable[[list[Prepared]], list[str]],
    batch_size: int,
    what: str,
) -> dict[str, Any]:
    """A text for each of the files and folders, in batches: caption or answer, as ``what`` says; see :func:`caption_files`."""
    if not images:
        raise UsageError("IMAGES: at least one image file or folder is expected")
    texts: list[dict[str, str]] = []
    rejected: list[dict[str, str]] = []
    waiting: list[tuple[Path, Prepared]] = []
    passed = PassedOver()

    def write_waiting() -> None:
        if waiting:
            written = write([image for _, image in waiting])
            texts.extend({"image": str(path), what: text} for (path, _), text in zip(waiting, written))
            waiting.clear()

    paths = list(image_files(images, passed))
    for path in tracked(paths, f"{what}s", len(paths)):
        try:
            waiting.append((path, read(path)))
        except ImageError as error:
            rejected.append({"image": str(path), "reason": str(error)})
        if len(waiting) >= batch_size:
            write_waiting()
    write_waiting()
    if not texts:
        raise UsageError(
            f"IMAGES: none of {len(rejected)} could be read; {rejected[0]['image']}: {rejected[0]['reason']}"
        )
    return {f"{what}s": texts, "rejected": rejected, "passed_over": passed.result()}
