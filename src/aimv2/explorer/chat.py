"""A vision-language model on the page: its answers on an image, and the patches at which each token of an answer looked.

Legend: T tokens of a prompt, A of its answer, N image tokens, S layers of the language model, h x w grid of a map, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aimv2.explorer.album import RequestError
from aimv2.report.predictions import ALTERNATIVES, Word, token_texts
from aimv2.vlm.answer import (
    Question,
    advance,
    context_of,
    embedded,
    ends_of,
    generate,
    padded,
    pixels_of,
    prepared,
    question,
)
from aimv2.vlm.model import VisionLanguage

TOKENS = 64  # of an answer at most


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: without special tokens, stripped.
        words: its tokens; their attention is the mean over the layers.
        layers: float32 [S, A, h, w], attention by layer, mean over heads; S = 0 where the language model gives none.
        limit: tokens at which the answer was cut; 0: it ended.
    """

    text: str
    words: list[Word]
    layers: np.ndarray
    limit: int


@dataclass(frozen=True)
class Talker:
    """A model and its processor, as of :func:`aimv2.vlm.model.open_vlm`."""

    model: VisionLanguage
    processor: Any

    def pixels(self, image: Image.Image) -> Tensor:
        """uint8 [3, H, W]: the image as the encoder receives it; of a model with tiles the thumbnail."""
        x, _ = pixels_of(self.processor, image)
        config = self.model.encoder.config
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
        return (((x[0] if x.ndim == 4 else x) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def box(self, width: int, height: int) -> list[float]:
        """What :meth:`pixels` shows: left, top, right, bottom as fractions of width and height; padding lies outside 0 to 1."""
        if self.model.newline is not None or not self.processor.image_processor.do_pad:
            return [0.0, 0.0, 1.0, 1.0]
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        return [-left / width, -top / height, (side - left) / width, (side - top) / height]

    @torch.inference_mode()
    def reply(self, image: Image.Image, texts: Sequence[str]) -> Reply:
        """The greedy answer to the last of ``texts``: questions and answers in turn, the first question on the image.

        Raises:
            RequestError: a conversation that fills the context.
        """
        first, model = question(texts[0], image), self.model
        more = ({"role": ("assistant", "user")[at % 2], "content": text} for at, text in enumerate(texts[1:]))
        one = Question((*first.messages, *more), first.images)
        features, (row,) = prepared(model, self.processor, [one], 1)
        inner, most = [features[id(one.images[0])]], int(min(TOKENS, context_of(model) - len(row)))
        if most < 1:
            why = f"The conversation has {len(row):,} tokens and fills the model's context of {context_of(model):,}"
            raise RequestError(409, f"{why}; start over, or ask less.")
        ids, mask = padded([row], inner[0].device)
        (answer,) = generate(model, ids, mask, inner, ends_of(model, self.processor), most)
        limit = most if len(answer) == most else 0
        words = self.processor.tokenizer
        text = words.decode(answer, skip_special_tokens=True).strip()
        scores, weights = self.read(row, answer, inner) if answer else (torch.empty(0), torch.empty(0, 0, len(row)))
        here = torch.tensor(row) == model.image_id
        layers = self.laid_out(weights[..., : len(row)][..., here], image).numpy()
        return Reply(text, self.words(answer, scores.softmax(-1), layers), layers, limit)

    def words(self, answer: list[int], chances: Tensor, layers: np.ndarray) -> list[Word]:
        """Tokens of an answer; ``chances`` [A, V], ``layers`` [S, A, h, w]."""
        tokenizer, found = self.processor.tokenizer, []
        mean = layers.mean(0) if len(layers) else np.zeros((len(answer), *layers.shape[2:]), np.float32)
        for at, text in enumerate(token_texts(answer, tokenizer)):
            best, which = chances[at].topk(min(ALTERNATIVES, chances.shape[1]))
            others = [
                (token_texts([*answer[:at], int(i)], tokenizer)[-1], float(chance)) for chance, i in zip(best, which)
            ]
            found.append(Word(text, float(chances[at, answer[at]]), others, mean[at]))
        return found

    def read(self, row: list[int], answer: list[int], images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Read an answer after its prompt: at the position before each of its tokens, which is the one that chooses it.

        The prompt is read into a cache, so that no T x T weights are held.

        Returns:
            fp32 scores [A, V], and attention weights [S, A, T + A - 1], mean over heads, on the CPU.
        """
        model, before = self.model, len(row) - 1
        ids, mask = padded([[*row, *answer[:-1]]], images[0].device)
        x = embedded(model, ids, mask, images)
        _, cache = advance(model, x[:, :before], mask[:, :before])
        with eager_attention(model.language):
            out, _ = advance(model, x[:, before:], mask, cache, output_attentions=True)
        scores = model.head(out.last_hidden_state[0]).float()
        scores[:, model.image_id] = -torch.inf
        found = [one[0].float().mean(0).cpu() for one in out.attentions or () if one is not None]
        whole = ids.shape[1]  # of a sliding window only the last positions are in the cache
        found = [F.pad(one, (whole - one.shape[-1], 0)) for one in found]
        return scores.cpu(), torch.stack(found) if found else torch.empty(0, len(answer), whole)

    def laid_out(self, weights: Tensor, image: Image.Image) -> Tensor:
        """Attention on the image tokens [S, A, N] as maps [S, A, h, w] of what :meth:`pixels` shows; their sums stay.

        With tiles the map has the patches of the tiles, over which the attention on a patch of the thumbnail is spread; that on
        the newlines is left out.
        """
        x, _ = pixels_of(self.processor, image)
        down, across = (side // self.model.encoder.config.patch_size for side in x.shape[-2:])
        small = weights[..., : down * across].unflatten(-1, (down, across))
        if x.ndim == 3:
            return small
        side = round((len(x) - 1) ** 0.5) * across
        rest = weights[..., down * across :]
        rows = rest.shape[-1] // (side + 1) if image.height < image.width else side
        large = rest.unflatten(-1, (rows, -1))[..., :-1]
        return large + fractions(rows, down) @ small @ fractions(large.shape[-1], across).T


def fractions(count: int, of: int) -> Tensor:
    """[count, of]: the fraction of each of ``of`` equal parts of a line that lies in each of ``count`` equal parts."""
    ours, theirs = torch.arange(count + 1) / count, torch.arange(of + 1) / of
    low, high = torch.maximum(ours[:-1, None], theirs[:-1]), torch.minimum(ours[1:, None], theirs[1:])
    return (high - low).clamp(min=0) * of


@contextmanager
def eager_attention(language: Any) -> Iterator[None]:
    """Let a model of transformers compute attention so that it can return the weights."""
    before = language.config._attn_implementation
    language.set_attn_implementation("eager")
    try:
        yield
    finally:
        language.set_attn_implementation(before)
