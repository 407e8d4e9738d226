"""Boxes of classes or phrases in pictures, by a trained detector.

A class's score is the mean over its tokens of the sigmoid of their logits; without words it is the sigmoid of its logit. Of masks it is the
softmax among the classes and nothing, times the mean of the mask's probabilities inside it. Overlaps are not suppressed: queries compete in
training.

Legend: B pictures, Q queries, C classes, S side of the square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from aimv2.batch import make_batch
from aimv2.data.stream.regions import Place
from aimv2.data.stream.transforms import to_pixels
from aimv2.data.text.phrases import Prompts, phrase_numbers
from aimv2.detect.build import ABOUT, CLASSES, TEXT_LIMIT, get_tokenizer
from aimv2.detect.model import Detector, Predictions, corners
from aimv2.errors import UsageError
from aimv2.interop.checks import check_sizes, check_state, refuse_adapters
from aimv2.interop.model_folder import find_model
from aimv2.interop.plain import open_plain
from aimv2.interop.shapes import read_json

MOST = 300  # detections of a picture that are kept


class Found(NamedTuple):
    """Detections of a picture, the best first.

    Attributes:
        labels: int64 [n].
        scores: [n].
        boxes: [n, 4], xyxy in pixels of the square.
        masks: bool [n, h, w] or None.
    """

    labels: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor | None = None


@dataclass
class OpenDetector:
    """A detector and what it needs of a picture.

    Attributes:
        model: in evaluation mode.
        prompts: of a head that reads words, else None.
        names: classes of the data that it was trained on.
        side, square: pixels of a picture's longer side, and of the square around it.
        threshold: from which on boxes are drawn.
    """

    model: Detector
    prompts: Prompts | None
    names: list[str]
    side: int
    square: int
    threshold: float

    @property
    def fill(self) -> tuple[int, ...]:
        return tuple(round(255 * value) for value in self.model.encoder.config.mean)

    def pixels(self, image: Image.Image) -> tuple[Tensor, Place]:
        """An RGB picture in its square, uint8 [3, S, S], and where it lies there."""
        place = Place.whole(image.size, self.side)
        return torch.from_numpy(to_pixels(place.square(image, self.square, self.fill))), place


def token_scores(layer: Predictions, text: Tensor, phrases: int) -> Tensor:
    """[B, Q, phrases] from the logits of tokens: the mean probability of a phrase's tokens."""
    numbers = phrase_numbers(text)  # [B, T]
    own = (numbers[:, None] == torch.arange(phrases, device=text.device)[:, None]).float()  # [B, phrases, T]
    own = own / own.sum(-1, keepdim=True).clamp(min=1)
    return layer.logits.float().sigmoid() @ own.transpose(1, 2)


def predict(model: Detector, images: Tensor, texts: Sequence[Sequence[int]]) -> tuple[Predictions, Tensor]:
    """The last layer's predictions, and the texts int64 [B, T]."""
    batch = make_batch(images, texts, None, 0).to(next(model.parameters()).device)
    return model(batch)[-1], batch.text


@torch.no_grad()
def find_objects(model: Detector, prompts: Prompts | None, images: Tensor, names: Sequence[str]) -> list[Found]:
    """Objects of the classes ``names`` in each picture; ``images`` uint8 [B, 3, S, S]."""
    side = images.shape[-1]
    if model.head == "masks":
        return find_masks(model, images)
    scores, boxes = [], []
    for part in [list(names)] if prompts is None else prompts.parts(names):
        texts = [[] if prompts is None else prompts.encode(part)] * len(images)
        layer, text = predict(model, images, texts)
        assert layer.boxes is not None
        scores.append(layer.logits.float().sigmoid() if prompts is None else token_scores(layer, text, len(part)))
        boxes.append(corners(layer.boxes.float())[:, :, None].expand(-1, -1, scores[-1].shape[-1], -1))
    every, places = torch.cat(scores, 2).flatten(1), torch.cat(boxes, 2).flatten(1, 2)
    best, at = every.topk(min(MOST, every.shape[1]), 1)
    places = places.gather(1, at[..., None].expand(-1, -1, 4)) * side
    return [Found(*one) for one in zip((at % len(names)).cpu(), best.cpu(), places.cpu())]


def find_masks(model: Detector, images: Tensor) -> list[Found]:
    """Objects with masks; a box is what its mask covers."""
    layer, _ = predict(model, images, [[]] * len(images))
    assert layer.masks is not None
    found = []
    for logits, masks in zip(layer.logits.float().softmax(-1)[..., :-1], layer.masks.float()):
        best, at = logits.flatten().topk(min(100, logits.numel()))
        chosen, p = at // logits.shape[1], masks.sigmoid()
        inside = p > 0.5
        score = best * ((p * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1))[chosen]
        order = score.argsort(descending=True)
        kept = inside[chosen[order]]
        scale = images.shape[-1] / masks.shape[-1]
        found.append(
            Found((at % logits.shape[1])[order].cpu(), score[order].cpu(), cover(kept).cpu() * scale, kept.cpu())
        )
    return found


def cover(masks: Tensor) -> Tensor:
    """Boxes xyxy [n, 4] around masks bool [n, h, w], in cells; zeros around none."""
    edges = []
    for axis in (1, 2):  # columns, then rows
        line = masks.any(axis).int()
        first, last = line.argmax(1), line.shape[1] - line.flip(1).argmax(1)
        edges += [first, torch.where(line.any(1), last, first)]
    left, right, top, bottom = edges
    return torch.stack([left, top, right, bottom], 1).float()


@torch.no_grad()
def find_phrases(model: Detector, prompts: Prompts, images: Tensor, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The best box of a phrase in each picture: xyxy [B, 4] in pixels of the square, and its score [B]."""
    layer, text = predict(model, images, [prompts.encode([phrase]) for phrase in phrases])
    assert layer.boxes is not None
    best, at = token_scores(layer, text, 1)[..., 0].max(1)
    boxes = corners(layer.boxes.float())[torch.arange(len(at), device=at.device), at]
    return boxes.cpu() * images.shape[-1], best.cpu()


def is_detector(source: str | Path) -> bool:
    """Whether MODEL is a folder or a run of a detector."""
    try:
        return (find_model(source) / ABOUT).is_file()
    except UsageError:
        return False


def open_detector(source: str | Path, device: str | torch.device = "cpu", option: str = "MODEL") -> OpenDetector:
    """The detector of a folder, RUN or RUN@STEP.

    Raises:
        UsageError: nothing there, or no detector.
    """
    try:
        folder = find_model(source)
    except UsageError as error:
        raise UsageError(str(error).replace("MODEL", option, 1), option=option, code=error.code) from None
    if not (folder / ABOUT).is_file():
        raise UsageError(
            f"{option} {source}: no detector ({ABOUT} is missing); a run of `aimv2 detect train` or its model folder is expected",
            option=option,
            code="mismatch",
        )
    about = read_json(folder / ABOUT)
    wanted = ("head", "classes", "image_size", "square", "threshold")
    if not about.keys() >= {*wanted} or about["head"] not in [*CLASSES]:
        raise UsageError(
            f"{option} {source}: {ABOUT} is no detector's ({', '.join(wanted)} expected, head one of {', '.join(CLASSES)})",
            option=option,
            code="unreadable",
        )
    refuse_adapters(f"{option} {source}", folder)
    check_sizes(f"{option} {source}", folder)
    net = open_plain(CLASSES[about["head"]], folder, dtype=torch.float32)
    check_state(net.state_dict(), f"{option} {source}")
    prompts = Prompts(get_tokenizer(folder), TEXT_LIMIT) if about["head"] == "grounding" else None
    model = Detector(about["head"], net).to(device).eval()
    return OpenDetector(model, prompts, about["classes"], about["image_size"], about["square"], about["threshold"])
