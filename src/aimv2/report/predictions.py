"""Predictions of a pre-trained model: next patches, patch rollout, captions with probabilities and attention.

Legend: I patches of one image, P = p * p * 3 values a patch, M prefix, T tokens, V vocabulary, h x w patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from aimv2.batch import make_batch
from aimv2.errors import UsageError
from aimv2.models.aimv2 import AIMv2, CaptionTokenizer
from aimv2.models.decoder import Trunk
from aimv2.models.generate import generate
from aimv2.models.layers import Cache
from aimv2.models.likelihood import tokenize
from aimv2.models.positions import pixel_patches, unpatchify
from aimv2.objectives.pretrain import TARGET_EPS, normalized_patches
from aimv2.report.features import grid_of
from aimv2.report.images import from_tensor

ALTERNATIVES = 5  # most likely tokens kept for each word
END = "⏎"  # display of end of text
SPACE = "␣"  # display of a white-space character
NORMALISED = (
    "Targets are normalised to mean 0 and std 1 per patch, so the model predicts pattern and colours within a patch but not its "
    "brightness and contrast: mean and std are taken from the true patch."
)


def visible(text: str) -> str:
    """Display form of a token: white space becomes visible."""
    return text if text.strip() else SPACE * len(text)


def token_texts(ids: Sequence[int], tokenizer: CaptionTokenizer) -> list[str]:
    """The text that each token adds to the text before it, leading space included."""
    before, texts = "", []
    for number, token in enumerate(ids):
        text = tokenizer.decode(list(ids[: number + 1]))
        # an incomplete character decodes to different text than the complete one
        texts.append(text[len(before) :] if text.startswith(before) else tokenizer.decode([token]))
        before = text
    return texts


@dataclass(frozen=True)
class PredictedImage:
    """An image whose patches after a prefix are predictions.

    Attributes:
        image: uint8 [H, W, 3]; the true prefix, then predictions.
        truth: uint8 [H, W, 3].
        prefix: prefix length, patches in raster order.
        loss: mean squared error of the predicted patches, normalised as in training (1: as good as a grey patch).
        note: what in the image is not predicted.
    """

    image: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    prefix: int
    loss: float
    note: str = NORMALISED


@dataclass(frozen=True)
class Word:
    """A generated token.

    Attributes:
        text: its text in the caption, with a leading space if it has one; ``⏎`` is the end of text.
        probability: 0..1.
        alternatives: the most likely tokens here and their probabilities, in descending order.
        attention: float32 [h, w], the decoder's attention from this position to the image, mean over heads and blocks. The
            rest to a sum of 1 is attention to text.
    """

    text: str
    probability: float
    alternatives: list[tuple[str, float]]
    attention: NDArray[np.float32]


@dataclass(frozen=True)
class Token:
    """A token of a given caption: its text (see :class:`Word`) and its loss in nats."""

    text: str
    loss: float


# ---- patches ----


@torch.inference_mode()
def next_patches(model: AIMv2, image: Tensor, fraction: float) -> PredictedImage:
    """Predict every patch after the prefix from all true patches before it, as in training.

    Args:
        model: with a pixel head, in evaluation mode.
        image: uint8 [3, H, W], of the encoder's size.
        fraction: prefix length as a fraction of the patches, 0..1; clipped to 1..I-1 patches.

    Raises:
        UsageError: no pixel head, a fraction out of range.
        ValueError: an image of the wrong size.
    """
    canvas, prefix, grid = _begin(model, image, fraction)
    batch = make_batch(canvas[None].cpu(), [[]], [prefix], grid[0] * grid[1]).to(canvas.device)
    with torch.compiler.set_stance("force_eager"):
        pixels = model.decoder(model.encoder.forward_batch(batch), batch).pixels
    predicted = pixels[: int(batch.patch_count)].float()  # [I - M, P]
    target, mean, std = _targets(model, canvas)
    loss = (predicted - target[prefix:]).square().mean()
    patches = _as_patches(model, canvas)
    patches[prefix:] = _to_bytes(model, predicted * std[prefix:] + mean[prefix:])
    return PredictedImage(_picture(model, patches, grid), from_tensor(canvas), prefix, float(loss))


@torch.inference_mode()
def rollout(model: AIMv2, image: Tensor, fraction: float) -> PredictedImage:
    """Generate the rest of an image patch by patch, each from the prefix and the patches generated before it.

    Encoder and decoder process every patch once, when it becomes known, so that later patches can't leak: of the true image
    after the prefix only the mean and std of each patch are used. Arguments and errors as for :func:`next_patches`.
    """
    truth, prefix, grid = _begin(model, image, fraction)
    target, mean, std = _targets(model, truth)
    patches = _as_patches(model, truth)
    patches[prefix:] = 0
    reader, loss = _CachedReader(model), 0.0
    for at in range(prefix, len(patches)):
        canvas = unpatchify(patches[None], model.encoder.config.patch_size, *grid)
        predicted = reader.next(canvas, at)  # [P], from patches 0..at-1
        loss += float((predicted - target[at]).square().mean())
        patches[at] = _to_bytes(model, predicted * std[at] + mean[at])
    return PredictedImage(_picture(model, patches, grid), from_tensor(truth), prefix, loss / (len(patches) - prefix))


class _CachedReader:
    """Encoder and decoder with key-value caches: the prefix at once with full attention, then patch by patch."""

    def __init__(self, model: AIMv2) -> None:
        self.model, self.cached = model, 0
        decoder = model.decoder
        self.trunk: Trunk = decoder.pixel_trunk if hasattr(decoder, "pixel_trunk") else decoder.trunk
        self.inner = [Cache() for _ in model.encoder.blocks]
        self.outer = [Cache() for _ in self.trunk.blocks]

    def next(self, canvas: Tensor, known: int) -> Tensor:
        """Predict patch ``known`` of uint8 [1, 3, H, W] from the patches before it: fp32 [P]."""
        encoder, decoder = self.model.encoder, self.model.decoder
        x = encoder.embed(canvas)[:, self.cached : known]
        for block, cache in zip(encoder.blocks, self.inner):
            x = block(x, mask="causal" if self.cached else None, cache=cache)
        self.cached = known
        out = self.trunk.step(decoder.project(encoder.norm(x)), self.outer)
        return decoder.pixel_head(out[0, -1]).float()


def _begin(model: AIMv2, image: Tensor, fraction: float) -> tuple[Tensor, int, tuple[int, int]]:
    """The image on the model's device, the prefix length, the grid."""
    if not model.decoder.config.pixels:
        raise UsageError("this model predicts no patches (it was trained with objective.targets=text)")
    if not 0 <= fraction <= 1:
        raise UsageError(f"share {fraction}: a fraction of the patches, 0 to 1, is expected", option="share")
    grid = grid_of(model.encoder, image[None])
    count = grid[0] * grid[1]
    if count < 2:
        raise UsageError("an image of one patch has no next patch", code="missing")
    return image.to(model.encoder.mean.device), min(max(round(fraction * count), 1), count - 1), grid


def _targets(model: AIMv2, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised targets [I, P], and the mean and std [I, 1] of each patch."""
    pixels, patch = model.encoder.normalize(image[None]), model.encoder.config.patch_size
    x = pixel_patches(pixels.float(), patch)[0]
    return normalized_patches(pixels, patch)[0], x.mean(-1, keepdim=True), (x.var(-1, keepdim=True) + TARGET_EPS).sqrt()


def _to_bytes(model: AIMv2, patches: Tensor) -> Tensor:
    """Normalised pixels [..., P], channel last, as uint8."""
    mean, std = model.encoder.mean.flatten(), model.encoder.std.flatten()
    pixels = patches.unflatten(-1, (-1, 3)) * std + mean
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8).flatten(-2)


def _as_patches(model: AIMv2, image: Tensor) -> Tensor:
    return pixel_patches(image[None], model.encoder.config.patch_size)[0].clone()


def _picture(model: AIMv2, patches: Tensor, grid: tuple[int, int]) -> NDArray[np.uint8]:
    return from_tensor(unpatchify(patches[None], model.encoder.config.patch_size, *grid)[0])


# ---- words ----


@torch.inference_mode()
def caption_words(model: AIMv2, image: Tensor, max_tokens: int | None = None) -> list[Word]:
    """Greedy caption of an image, token by token, including end of text if reached.

    Args:
        model: with a text head and its tokeniser, in evaluation mode.
        image: uint8 [3, H, W], of the encoder's size.
        max_tokens: maximum length; None: the decoder's limit.

    Raises:
        UsageError: no tokeniser, no text head.
        ValueError: ``max_tokens`` out of range, an image of the wrong size.
    """
    _check_text(model)
    assert model.tokenizer is not None
    grid = grid_of(model.encoder, image[None])
    limit = model.decoder.config.max_text if max_tokens is None else max_tokens
    with torch.compiler.set_stance("force_eager"):
        images = image[None].to(model.encoder.mean.device)
        (ids,) = generate(model, images, model.tokenizer.eos_id, limit)
        logits, attention = _read(model, model.encoder(images), ids)
    probs = logits.softmax(-1)
    words = []
    for at, text in enumerate(_texts(model, ids)):
        best, which = probs[at].topk(min(ALTERNATIVES, probs.shape[1]))
        others = [(_texts(model, [*ids[:at], int(i)])[-1], float(p)) for p, i in zip(best, which)]
        words.append(Word(text, float(probs[at, ids[at]]), others, attention[at].unflatten(0, grid).cpu().numpy()))
    return words


@torch.inference_mode()
def caption_loss(model: AIMv2, image: Tensor, caption: str, prefix: int | None = None) -> list[Token]:
    """Loss of each token of a given caption (teacher forcing), end of text included.

    Args:
        model: with a text head and its tokeniser, in evaluation mode.
        image: uint8 [3, H, W], of the encoder's size.
        caption: a text; truncated to the decoder's limit.
        prefix: prefix length, as in training; None: bidirectional, as in caption generation.

    Raises:
        UsageError: no tokeniser, no text head.
        ValueError: an image of the wrong size.
    """
    _check_text(model)
    grid_of(model.encoder, image[None])
    device = model.encoder.mean.device
    (ids,) = tokenize(model, [caption])
    with torch.compiler.set_stance("force_eager"):
        mask = None if prefix is None else torch.tensor([prefix], device=device)
        logits, _ = _read(model, model.encoder(image[None].to(device), mask), ids)
    losses = F.cross_entropy(logits, torch.tensor(ids, device=device), reduction="none").tolist()
    return [Token(text, loss) for text, loss in zip(_texts(model, ids), losses)]


def _read(model: AIMv2, features: Tensor, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Run the decoder over an image [1, I, D] and a caption of T tokens, without a cache.

    Returns:
        fp32 logits [T, V] for each token, and the attention [T, I] of their positions to the image, mean over heads and blocks.
    """
    decoder, patches = model.decoder, features.shape[1]
    text = torch.tensor([ids], dtype=torch.int64, device=features.device)
    x = torch.cat([decoder.project(features), decoder.caption_inputs(text, len(ids))], dim=1)
    hidden = torch.ones(len(ids), x.shape[1], dtype=torch.bool, device=x.device).triu(patches + 1)
    attention = torch.zeros(len(ids), patches, device=x.device)
    for block in decoder.trunk.blocks:
        q, k, _ = block.attn.split(block.attn.qkv(block.norm1(x)))  # type: ignore[union-attr, operator]
        scores = q[0, :, patches:].float() * q.shape[-1] ** -0.5 @ k[0].float().transpose(-2, -1)  # [H, T, I + T]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        attention += weights[..., :patches].mean(0) / len(decoder.trunk.blocks)
        x = block(x, mask="causal")
    return decoder.text_head(decoder.trunk.norm(x)[0, patches:]).float(), attention


def _texts(model: AIMv2, ids: list[int]) -> list[str]:
    assert model.tokenizer is not None
    texts = token_texts(ids, model.tokenizer)
    return [END if token == model.tokenizer.eos_id else text for token, text in zip(ids, texts)]


def _check_text(model: AIMv2) -> None:
    if not model.decoder.config.text:
        raise UsageError("this model has no text head (it was trained with objective.targets=image)", code="missing")
    if model.tokenizer is None:
        raise UsageError("the model has no tokenizer (its folder held none): load a RUN, which has one", code="missing")
