"""Caption likelihood under the decoder: log p(caption | image) for every image with every caption.

Legend: B images, C captions, c captions of a chunk, T tokens of its longest, I patches, H heads, d width of a head.

An image is prefilled once: its keys and values of every block are cached, and all captions are scored on top, in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.models.aimv2 import AIMv2, CaptionTokenizer
from aimv2.models.decoder import IGNORED, MultimodalDecoder
from aimv2.models.encoder import not_images
from aimv2.models.layers import Cache

CHUNK_POSITIONS = 16384  # image and caption positions in attention at once
CHUNK_ROWS = 1024  # rows of fp32 logits at once: 128 MiB of a vocabulary of 32,000


class ImageCache:
    """The decoder's key-value cache of B images: [B, H, I, d] of every block."""

    def __init__(self, caches: list[Cache]) -> None:
        self.caches = caches

    @property
    def images(self) -> int:
        """B."""
        assert self.caches[0].key is not None
        return self.caches[0].key.shape[0]

    @property
    def patches(self) -> int:
        """I."""
        assert self.caches[0].key is not None
        return self.caches[0].key.shape[2]

    def expanded(self, block: int, begin: int, end: int, captions: int) -> Cache:
        """A copy of a block's cache of images ``begin`` to ``end``, each repeated for ``captions`` rows."""
        cache, held = Cache(), self.caches[block]
        assert held.key is not None and held.value is not None
        cache.key, cache.value = (
            part[begin:end, None].expand(-1, captions, -1, -1, -1).flatten(0, 1) for part in (held.key, held.value)
        )
        return cache


@torch.no_grad()
def read_images(model: AIMv2, images: Tensor) -> ImageCache:
    """Prefill the decoder's cache with images.

    Args:
        model: with a text head, in evaluation mode.
        images: uint8 or normalised float [B, 3, H, W]; bidirectional attention, as in caption generation.

    Raises:
        TypeError: images that are no tensor.
        ValueError: a model without a text head.
    """
    if not model.decoder.config.text:
        raise ValueError("this model has no text head (it was trained with objective.targets=image)")
    if not isinstance(images, Tensor):
        raise not_images(images)
    caches = model.decoder.new_caches()
    with torch.compiler.set_stance("force_eager"):
        model.decoder.read_image(model.encoder(images.to(model.encoder.mean.device)), caches)
    return ImageCache(caches)


@torch.no_grad()
def log_likelihood(model: AIMv2, memory: ImageCache, captions: Sequence[Sequence[int]]) -> Tensor:
    """log p(caption | image) of every image with every caption: the sum over its tokens, end of text included.

    Values do not depend on padding or on the rest of the batch.

    Args:
        model: the model that filled ``memory``, in evaluation mode.
        memory: cache of B images, from :func:`read_images`.
        captions: C lists of 1 to ``max_text`` token ids, each ending with end of text.

    Returns:
        float64 [B, C] on the CPU, nats, never above 0.
    """
    limit = model.decoder.config.max_text
    assert all(1 <= len(caption) <= limit for caption in captions), f"captions of 1 to {limit} tokens expected"
    out = torch.empty(memory.images, len(captions), dtype=torch.float64)
    for places, text in _chunks(captions, memory.patches):
        text = text.to(model.decoder.bos.device)
        size = max(1, CHUNK_POSITIONS // (len(text) * (memory.patches + text.shape[1])))
        for begin in range(0, memory.images, size):
            end = min(begin + size, memory.images)
            out[begin:end, places] = _score_chunk(model.decoder, memory, begin, end, text)
    return out


def score(
    model: AIMv2, images: Tensor, captions: Sequence[str], tokenizer: CaptionTokenizer | None = None, mean: bool = False
) -> Tensor:
    """:func:`log_likelihood` of captions given as texts.

    Args:
        model: with a text head, in evaluation mode.
        images: uint8 or normalised float [B, 3, H, W].
        captions: C texts.
        tokenizer: replaces the model's own.
        mean: mean per token instead of the sum.

    Returns:
        float64 [B, C] on the CPU, nats.

    Raises:
        ValueError: no tokeniser, no text head.
    """
    tokens = tokenize(model, captions, tokenizer)
    found = log_likelihood(model, read_images(model, images), tokens)
    return found / torch.tensor([len(ids) for ids in tokens]) if mean else found


def tokenize(model: AIMv2, captions: Sequence[str], tokenizer: CaptionTokenizer | None = None) -> list[list[int]]:
    """Token ids as in training: truncated to ``max_text`` tokens, end of text last.

    Raises:
        ValueError: no tokeniser, one text instead of a list.
    """
    if isinstance(captions, str):
        raise ValueError(f"a list of texts is expected, got one text: [{captions!r}]")
    tokenizer = tokenizer or model.tokenizer
    if tokenizer is None:
        raise ValueError("this model came without a tokenizer; give tokenizer=")
    return [tokenizer.encode(text, model.decoder.config.max_text) for text in captions]  # type: ignore[attr-defined]


def _chunks(captions: Sequence[Sequence[int]], patches: int) -> list[tuple[Tensor, Tensor]]:
    """Captions grouped by similar length: (indices int64 [c], tokens int64 [c, T], padded with IGNORED)."""
    order = sorted(range(len(captions)), key=lambda place: len(captions[place]))
    parts, begun = list[list[int]](), list[int]()
    for place in order:  # lengths only grow, so the newest is the chunk's longest
        if begun and (len(begun) + 1) * (patches + len(captions[place])) > CHUNK_POSITIONS:
            parts.append(begun)
            begun = []
        begun.append(place)
    parts += [begun] * bool(begun)
    out = []
    for part in parts:
        text = torch.full((len(part), len(captions[part[-1]])), IGNORED, dtype=torch.int64)
        for row, place in enumerate(part):
            text[row, : len(captions[place])] = torch.tensor(captions[place], dtype=torch.int64)
        out.append((torch.tensor(part), text))
    return out


def _score_chunk(decoder: MultimodalDecoder, memory: ImageCache, begin: int, end: int, text: Tensor) -> Tensor:
    """Captions [c, T], padded with IGNORED, for images begin..end-1: float64 [end - begin, c] on the CPU.

    Padding follows the real tokens and attention is causal: it is fed as token 0 and its output is dropped.
    """
    count = end - begin
    x = decoder.caption_inputs(text.clamp(min=0), text.shape[1]).repeat(count, 1, 1)
    blocks = range(len(decoder.trunk.blocks))
    out = decoder.trunk.step(x, (memory.expanded(block, begin, end, len(text)) for block in blocks))
    targets = text.repeat(count, 1).flatten()
    real = (targets != IGNORED).nonzero().flatten()
    rows = out.flatten(0, 1).index_select(0, real)
    logs = [
        -F.cross_entropy(decoder.text_head(part).float(), target, reduction="none")
        for part, target in zip(rows.split(CHUNK_ROWS), targets.index_select(0, real).split(CHUNK_ROWS))
    ]
    total = torch.zeros(count * len(text), dtype=torch.float64)
    total.index_add_(0, (real // text.shape[1]).cpu(), torch.cat(logs).double().cpu())
    return total.view(count, len(text))
