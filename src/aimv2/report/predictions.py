"""What a pre-trained model says comes next: patches beside the truth, a rollout, words and where the decoder looked.

Legend: I patches of one image, P = p * p * 3 values a patch, M prefix, T tokens, V vocabulary, h x w patch grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from aimv2.batch import make_batch
from aimv2.errors import UsageError
from aimv2.models.aimv2 import AIMv2
from aimv2.models.decoder import Trunk
from aimv2.models.generate import generate
from aimv2.models.layers import Cache
from aimv2.models.likelihood import tokenize
from aimv2.models.positions import pixel_patches, unpatchify
from aimv2.objectives.pretrain import TARGET_EPS, normalized_patches
from aimv2.report.features import grid_of

ALTERNATIVES = 5  # likeliest tokens that a word carries
END = "⏎"  # how end of text is shown
SPACE = "␣"  # and a token of white space alone
NORMALISED = (
    "Targets are patches of mean 0 and deviation 1 each, so that the model predicts pattern and colours within a patch but "
    "not its brightness and contrast: mean and deviation are those of the true patch."
)


def visible(text: str) -> str:
    """A token's text as it is shown: white space alone as a sign for each character."""
    return text if text.strip() else SPACE * len(text)


@dataclass(frozen=True)
class Painted:
    """Patches that a model predicted, in the picture.

    Attributes:
        image: uint8 [H, W, 3]; the prefix as it was, behind it predictions.
        truth: uint8 [H, W, 3].
        prefix: patches left as they were, in raster order.
        loss: mean squared error of the predicted patches on the objective's scale (1: as good as a grey patch).
        note: what in the picture is not predicted.
    """

    image: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    prefix: int
    loss: float
    note: str = NORMALISED


@dataclass(frozen=True)
class Word:
    """A token that was written.

    Attributes:
        text: as it stands in the caption, a space before it included; ``⏎`` is the end of text.
        probability: 0..1.
        alternatives: the likeliest tokens here and their probabilities, the likeliest first.
        attention: float32 [h, w], where the decoder looked as it chose the token: its attention to the image positions,
            mean over heads and blocks. The sum is the share that went to the image; the rest went to words.
    """

    text: str
    probability: float
    alternatives: list[tuple[str, float]]
    attention: NDArray[np.float32]


@dataclass(frozen=True)
class Token:
    """A token of a given caption: its text (see :class:`Word`) and its loss, nats."""

    text: str
    loss: float


# ---- patches ----


@torch.inference_mode()
def next_patches(model: AIMv2, image: Tensor, share: float) -> Painted:
    """Every patch behind the prefix, each predicted from all the true patches before it, as in training.

    Args:
        model: with a pixel head, in evaluation mode.
        image: uint8 [3, H, W], as the encoder sees it.
        share: of the patches that is the prefix, 0..1; held in 1..I-1 of them.

    Raises:
        UsageError: no pixel head, a share out of range.
        ValueError: an image that the encoder can't see.
    """
    canvas, prefix, grid = _begin(model, image, share)
    batch = make_batch(canvas[None].cpu(), [[]], [prefix], grid[0] * grid[1]).to(canvas.device)
    with torch.compiler.set_stance("force_eager"):
        found = model.decoder(model.encoder.forward_batch(batch), batch).pixels
    said = found[: int(batch.patch_count)].float()  # [I - M, P]
    wanted, mean, deviation = _scales(model, canvas)
    loss = (said - wanted[prefix:]).square().mean()
    patches = _as_patches(model, canvas)
    patches[prefix:] = _to_bytes(model, said * deviation[prefix:] + mean[prefix:])
    return Painted(_picture(model, patches, grid), _bytes_of(canvas), prefix, float(loss))


@torch.inference_mode()
def rollout(model: AIMv2, image: Tensor, share: float) -> Painted:
    """The rest of an image, painted patch by patch: each is predicted from the prefix and from what was painted before it.

    Encoder and decoder read every patch once, as it becomes known, so that patches not painted yet can't leak: of the true
    image behind the prefix only each patch's mean and deviation are used.

    Args:
        model: with a pixel head, in evaluation mode.
        image: uint8 [3, H, W], as the encoder sees it.
        share: of the patches that is the prefix, 0..1; held in 1..I-1 of them.

    Raises:
        UsageError: no pixel head, a share out of range.
        ValueError: an image that the encoder can't see.
    """
    truth, prefix, grid = _begin(model, image, share)
    wanted, mean, deviation = _scales(model, truth)
    patches = _as_patches(model, truth)
    patches[prefix:] = 0
    reader, loss = _Reader(model), 0.0
    for at in range(prefix, len(patches)):
        canvas = unpatchify(patches[None], model.encoder.config.patch_size, *grid)
        said = reader.read(canvas, at)  # [P], from patches 0..at-1
        loss += float((said - wanted[at]).square().mean())
        patches[at] = _to_bytes(model, said * deviation[at] + mean[at])
    return Painted(_picture(model, patches, grid), _bytes_of(truth), prefix, loss / (len(patches) - prefix))


class _Reader:
    """Encoder and decoder with caches: the prefix is read at once, all of it by each of its patches, then patch by patch."""

    def __init__(self, model: AIMv2) -> None:
        self.model, self.read_so_far = model, 0
        decoder = model.decoder
        self.trunk: Trunk = decoder.pixel_trunk if hasattr(decoder, "pixel_trunk") else decoder.trunk
        self.inner = [Cache() for _ in model.encoder.blocks]
        self.outer = [Cache() for _ in self.trunk.blocks]

    def read(self, canvas: Tensor, known: int) -> Tensor:
        """The prediction of patch ``known`` of uint8 [1, 3, H, W], whose patches before it are known: fp32 [P]."""
        encoder, decoder = self.model.encoder, self.model.decoder
        pixels = encoder.normalize(canvas).to(encoder.patch_embed.proj.weight.dtype)
        x = encoder.patch_embed(pixels)[:, self.read_so_far : known]
        for block, cache in zip(encoder.blocks, self.inner):
            if self.read_so_far:
                x = block(x, cache=cache)
            else:
                _, k, v = block.attn.split(block.attn.qkv(block.norm1(x)))  # type: ignore[union-attr, operator]
                cache.extend(k, v)
                x = block(x)  # bidirectional: a cache alone would read causally
        self.read_so_far = known
        out = self.trunk.step(decoder.project(encoder.norm(x)), self.outer)
        return decoder.pixel_head(out[0, -1]).float()


def _begin(model: AIMv2, image: Tensor, share: float) -> tuple[Tensor, int, tuple[int, int]]:
    """The image on the model's device, the prefix, the grid."""
    if not model.decoder.config.pixels:
        raise UsageError("this model predicts no patches (it was trained with objective.targets=text)")
    if not 0 <= share <= 1:
        raise UsageError(f"share {share}: of the patches, 0 to 1 expected")
    grid = grid_of(model.encoder, image[None])
    count = grid[0] * grid[1]
    if count < 2:
        raise UsageError("an image of one patch has no next patch")
    return image.to(model.encoder.mean.device), min(max(round(share * count), 1), count - 1), grid


def _scales(model: AIMv2, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets [I, P], and the mean and deviation [I, 1] that were taken out of each."""
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
    return _bytes_of(unpatchify(patches[None], model.encoder.config.patch_size, *grid)[0])


def _bytes_of(image: Tensor) -> NDArray[np.uint8]:
    """uint8 [3, H, W] -> [H, W, 3]."""
    return image.permute(1, 2, 0).cpu().numpy().copy()


# ---- words ----


@torch.inference_mode()
def caption_words(model: AIMv2, image: Tensor, max_tokens: int | None = None) -> list[Word]:
    """The greedy caption of an image, token by token, end of text included where it was reached.

    Args:
        model: with a text head and its tokeniser, in evaluation mode.
        image: uint8 [3, H, W], as the encoder sees it.
        max_tokens: at most; None: as many as the decoder can write.

    Raises:
        UsageError: no tokeniser, no text head.
        ValueError: ``max_tokens`` out of range, an image that the encoder can't see.
    """
    _check_text(model)
    assert model.tokenizer is not None
    grid = grid_of(model.encoder, image[None])
    limit = model.decoder.config.max_text if max_tokens is None else max_tokens
    with torch.compiler.set_stance("force_eager"):
        images = image[None].to(model.encoder.mean.device)
        (ids,) = generate(model, images, model.tokenizer.eos_id, limit)
        logits, looks = _read(model, model.encoder(images), ids)
    chances = logits.softmax(-1)
    words = []
    for at, text in enumerate(_texts(model, ids)):
        best, which = chances[at].topk(min(ALTERNATIVES, chances.shape[1]))
        others = [(_texts(model, [*ids[:at], int(i)])[-1], float(share)) for share, i in zip(best, which)]
        look = looks[at].unflatten(0, grid).cpu().numpy()
        words.append(Word(text, float(chances[at, ids[at]]), others, look))
    return words


@torch.inference_mode()
def caption_loss(model: AIMv2, image: Tensor, caption: str, prefix: int | None = None) -> list[Token]:
    """What each token of a given caption costs, from the true tokens before it; end of text is the last.

    Args:
        model: with a text head and its tokeniser, in evaluation mode.
        image: uint8 [3, H, W], as the encoder sees it.
        caption: a text; cut to what the decoder reads.
        prefix: patches that see each other, the others causal, as in training; None: all, as captions are written.

    Raises:
        UsageError: no tokeniser, no text head.
        ValueError: an image that the encoder can't see.
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
    """The decoder over an image [1, I, D] and a caption of T tokens, the plain path.

    Returns:
        fp32 logits [T, V] that chose each token, and the attention [T, I] of those positions to the image, mean over heads
        and blocks.
    """
    decoder, patches = model.decoder, features.shape[1]
    text = torch.tensor([ids], dtype=torch.int64, device=features.device)
    x = torch.cat([decoder.project(features), decoder.caption_inputs(text, len(ids))], dim=1)
    hidden = torch.ones(len(ids), x.shape[1], dtype=torch.bool, device=x.device).triu(patches + 1)
    looks = torch.zeros(len(ids), patches, device=x.device)
    for block in decoder.trunk.blocks:
        q, k, _ = block.attn.split(block.attn.qkv(block.norm1(x)))  # type: ignore[union-attr, operator]
        scores = q[0, :, patches:].float() * q.shape[-1] ** -0.5 @ k[0].float().transpose(-2, -1)  # [H, T, I + T]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        looks += weights[..., :patches].mean(0) / len(decoder.trunk.blocks)
        x = block(x, mask="causal")
    return decoder.text_head(decoder.trunk.norm(x)[0, patches:]).float(), looks


def _texts(model: AIMv2, ids: list[int]) -> list[str]:
    """What each token adds to the caption."""
    assert model.tokenizer is not None
    out, before = [], ""
    for at, token in enumerate(ids):
        text = model.tokenizer.decode(ids[: at + 1])
        out.append(END if token == model.tokenizer.eos_id else text[len(before) :])
        before = text
    return out


def _check_text(model: AIMv2) -> None:
    if not model.decoder.config.text:
        raise UsageError("this model has no text head (it was trained with objective.targets=image)")
    if model.tokenizer is None:
        raise UsageError("the model has no tokenizer (its folder held none): load a RUN, which has one")
