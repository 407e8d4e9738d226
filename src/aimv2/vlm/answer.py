"""Greedy answers to questions on images, in batches: the one place that generates with a vision-language model.

Legend: B rows, T tokens, N features of an image, L width of the language model.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from aimv2.data.images.decode import decode_image
from aimv2.data.text.conversations import PLACE, flat_text, spread
from aimv2.errors import UsageError, first_line
from aimv2.interop.rendering import render
from aimv2.vlm.language import IMAGE_TOKEN
from aimv2.vlm.model import VisionLanguage

ANSWER = "\ue000"  # a text that no template holds
AHEAD = 4  # batches that are prepared at once: each image of them is encoded once, rows of similar length form a batch


class Picture:
    """An image of a question, decoded when it is needed; questions that share the object share its forward pass."""

    def __init__(self, source: bytes | Image.Image) -> None:
        """``source``: encoded bytes, or an opened image."""
        self.source = source

    def open(self) -> Image.Image:
        """
        Raises:
            ImageError: bytes that are no image.
        """
        return decode_image(self.source) if isinstance(self.source, bytes) else self.source.convert("RGB")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes, or of the pixels."""
        source = self.source
        raw = source if isinstance(source, bytes) else repr((source.mode, source.size)).encode() + source.tobytes()
        return hashlib.sha256(raw).hexdigest()


@dataclass(frozen=True)
class Question:
    """A conversation that the model is to continue.

    Attributes:
        messages: ``{"role", "content"}``; an ``<image>`` in a content is the place of an image.
        images: as many as places.
    """

    messages: tuple[dict[str, str], ...]
    images: tuple[Picture, ...] = ()

    def digest(self) -> str:
        """SHA-256 of everything that the model gets to see."""
        whole = [list(self.messages), [image.digest for image in self.images]]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def without_images(self) -> Question:
        """The same text, its images and their places left out."""
        texts = [PLACE.sub("", one["content"]) for one in self.messages]
        return Question(tuple({**one, "content": text} for one, text in zip(self.messages, texts)))


def question(text: str, *images: Picture | bytes | Image.Image) -> Question:
    """A user's message on images; without ``<image>`` in the text they come first, each on a line of its own."""
    pictures = tuple(image if isinstance(image, Picture) else Picture(image) for image in images)
    if images and IMAGE_TOKEN not in text:
        text = f"{IMAGE_TOKEN}\n" * len(images) + text
    return Question(({"role": "user", "content": text},), pictures)


def answers(
    model: VisionLanguage, processor: Any, questions: Sequence[Question], max_tokens: int = 16, batch_size: int = 64
) -> list[str]:
    """Greedy answers, in the order of the questions; see :func:`answer_batches`.

    Raises:
        UsageError: a question that does not fit the context, places of images without an image, or the other way round.
    """
    found = [""] * len(questions)
    for rows in answer_batches(model, processor, questions, max_tokens, batch_size):
        for row, text in rows:
            if text is None:
                why = too_long(model, processor, questions[row], max_tokens)
                raise UsageError(f"--max-tokens {max_tokens}: {why}", code="limit")
            found[row] = text
    return found


def answer_batches(
    model: VisionLanguage, processor: Any, questions: Sequence[Question], max_tokens: int = 16, batch_size: int = 64
) -> Iterator[list[tuple[int, str | None]]]:
    """Greedy answers as batches of them come: (number of the question, answer without special tokens, stripped).

    None stands for the answer to a question that does not fit the context together with it.

    A :class:`Picture` that several neighbouring questions share is encoded once.

    Args:
        model: of :func:`aimv2.vlm.model.open_vlm`, on any device.
        processor: its processor.
        questions: with or without images, also mixed.
        max_tokens: of an answer, its end included.
        batch_size: rows and images per forward pass.

    Raises:
        UsageError: places of images without an image, or the other way round.
    """
    ends, device = ends_of(model, processor), next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(questions), AHEAD * batch_size):
            chunk = questions[start : start + AHEAD * batch_size]
            features, rows = prepared(model, processor, chunk, batch_size)
            order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
            fits = sum(len(row) + max_tokens <= context_of(model) for row in rows)
            if order[fits:]:
                yield [(start + row, None) for row in order[fits:]]
            order = order[:fits]
            for first in range(0, len(order), batch_size):
                chosen = order[first : first + batch_size]
                images = [features[id(image)] for row in chosen for image in chunk[row].images]
                ids, mask = padded([rows[row] for row in chosen], device)
                tokens = generate(model, ids, mask, images, ends, max_tokens)
                texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
                yield [(start + row, text.strip()) for row, text in zip(chosen, texts)]


def ends_of(model: VisionLanguage, processor: Any) -> Tensor:
    """Ids of tokens that end an answer: int64 [ends]. Besides those that the model states, the end of a turn in the chat template:
    its first special token, else its first token.
    """
    found, words = set(model.ends), processor.tokenizer
    for value in (getattr(model.language.config, "eos_token_id", None), words.eos_token_id):
        found |= {value} if isinstance(value, int) else set(value or ())
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    text = shown(words, turns, processor, False)
    tail = words(text.partition(ANSWER)[2], add_special_tokens=False)["input_ids"]
    special = [token for token in tail if token in words.all_special_ids]
    found |= set((special or tail)[:1])
    return torch.tensor(sorted(found), dtype=torch.long, device=next(model.parameters()).device)


def tokenized(processor: Any, questions: Sequence[Question]) -> list[list[int]]:
    """Token ids of each conversation up to its answer; one image token, and a line break, for each image."""
    words = processor.tokenizer
    for one in questions:
        places = sum(message["content"].count(IMAGE_TOKEN) for message in one.messages)
        if places != len(one.images):
            raise UsageError(f"question: {places} places of images for {len(one.images)} images", code="mismatch")
    turns = [[{**one, "content": flat_text(one["content"])} for one in each.messages] for each in questions]
    texts = [shown(words, one, processor, True) for one in turns]
    starts = words.bos_token is not None and texts[0].startswith(words.bos_token)  # as the processor decides
    return words(texts, add_special_tokens=not starts)["input_ids"]


def shown(words: Any, turns: list[dict[str, str]], processor: Any, prompt: bool) -> str:
    """A conversation as the chat template shows it.

    Raises:
        UsageError: the template can't be rendered.
    """
    try:
        return render(words, turns, processor.chat_template, prompt)
    except Exception as error:  # of Jinja, or raised by the template
        why = f"the chat template can't be rendered ({first_line(error)})"
        raise UsageError(f"MODEL: {why}", code="unreadable") from None


def prepared(
    model: VisionLanguage, processor: Any, questions: Sequence[Question], batch_size: int
) -> tuple[dict[int, Tensor], list[list[int]]]:
    """Image embeddings, see :func:`encoded`, and the token ids of each question."""
    features = encoded(model, processor, questions, batch_size)
    rows = [
        spread(ids, ids, processor.image_token_id, [len(features[id(image)]) for image in one.images])
        for ids, one in zip(tokenized(processor, questions), questions)
    ]
    return features, rows


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask (0 for padding), int64 [B, T], padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids.to(device), mask.to(device)


def encoded(model: VisionLanguage, processor: Any, questions: Sequence[Question], batch_size: int) -> dict[int, Tensor]:
    """Image embeddings [N, L] by the ``id`` of each different image; images of one size share a forward pass."""
    device, dtype = next(model.parameters()).device, next(model.encoder.parameters()).dtype
    different = list({id(image): image for one in questions for image in one.images}.values())
    found: dict[int, Tensor] = {}
    for start in range(0, len(different), batch_size):
        groups: dict[tuple[int, ...], list[tuple[int, Tensor, Any]]] = {}
        for image in different[start : start + batch_size]:
            pixels, size = pixels_of(processor, image.open())
            groups.setdefault(tuple(pixels.shape), []).append((id(image), pixels, size))
        for group in groups.values():
            names = [name for name, _, _ in group]
            inner = torch.stack([pixels for _, pixels, _ in group]).to(device, dtype)
            sizes = [size for _, _, size in group if size is not None]
            if not sizes:
                x = model.image_embeddings(inner)
                parts: Sequence[Tensor] = x.unflatten(0, (len(inner), -1)).unbind()
            else:
                parts = model.tile_embeddings(inner, torch.stack(sizes))
            found |= dict(zip(names, parts))
    return found


def pixels_of(processor: Any, image: Image.Image) -> tuple[Tensor, Tensor | None]:
    """Pixels as the model takes them, [3, H, W] or with tiles [1 + g * g, 3, H, W], and with tiles the original's size."""
    made = processor.image_processor(image, return_tensors="pt")
    sizes = made.get("image_sizes")
    return made["pixel_values"][0], None if sizes is None else torch.as_tensor(sizes)[0]


def context_of(model: VisionLanguage) -> float:
    """Most tokens of a question and its answer; infinity where the language model states none."""
    return getattr(model.language.config, "max_position_embeddings", None) or math.inf


def too_long(
    model: VisionLanguage, processor: Any, one: Question, max_tokens: int, advice: str = "--max-tokens"
) -> str:
    """What a question that does not fit the context needs, and which options make it shorter.

    Args:
        model: as of :func:`answer_batches`, like the next.
        processor: its processor.
        one: the question.
        max_tokens: of its answer.
        advice: how its answer gets shorter.
    """
    with torch.inference_mode():
        (row,) = prepared(model, processor, [one], 1)[1]
    return (
        f"a question of {len(row):,} tokens, {row.count(processor.image_token_id):,} of them of images, and its answer need "
        f"{len(row) + max_tokens:,} positions, and the context holds {context_of(model):,}; a smaller {advice}, fewer images, "
        "or a VLM built with smaller --tiles or --image-size"
    )


def generate(
    model: VisionLanguage, ids: Tensor, mask: Tensor, images: Sequence[Tensor], ends: Tensor, max_tokens: int
) -> list[list[int]]:
    """Greedy continuations of B rows without their ends; an image token is never generated.

    Args:
        model: whose language model keeps keys and values.
        ids: int64 [B, T], padded on the left.
        mask: [B, T], 0 for padding.
        images: embeddings of all images, row by row.
        ends: ids that end a row.
        max_tokens: of a continuation, its end included.
    """
    x = embedded(model, ids, mask, images)
    done, written, cache = torch.zeros(len(ids), dtype=torch.bool, device=ids.device), list[Tensor](), None
    while True:
        out, cache = advance(model, x, mask, cache)
        scores = model.head(out.last_hidden_state[:, -1])
        scores[:, model.image_id] = -torch.inf
        token = scores.argmax(-1)
        done |= torch.isin(token, ends)
        written.append(torch.where(done, -1, token))
        if len(written) == max_tokens or bool(done.all()):
            return [[token for token in row if token >= 0] for row in torch.stack(written, 1).tolist()]
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        x = model.language.get_input_embeddings()(token[:, None])


def embedded(model: VisionLanguage, ids: Tensor, mask: Tensor, images: Sequence[Tensor]) -> Tensor:
    """What the language model reads, [B, T, L]; the arguments are those of :func:`generate`."""
    x = model.language.get_input_embeddings()(ids)
    if images:
        here = (ids == model.image_id) & mask.bool()
        x = x.masked_scatter(here[..., None], torch.cat(list(images)).to(x.dtype))
    return x


def advance(model: VisionLanguage, x: Tensor, mask: Tensor, cache: Any = None, **more: Any) -> tuple[Any, Any]:
    """A forward pass of the language model over the positions that follow those in a cache.

    Args:
        model: as of :func:`generate`.
        x: [B, T, L] of these positions.
        mask: [B, positions so far], 0 for padding; these positions included.
        cache: of the positions before; None: there are none.
        more: further arguments of the language model.

    Returns:
        its output, and the cache, which holds these positions too.
    """
    known = inspect.signature(model.language.forward).parameters
    kept = "cache" if "cache" in known else "past_key_values"  # newer and older versions of transformers
    if "position_ids" in known:
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
    out = model.language(inputs_embeds=x, attention_mask=mask, use_cache=True, **{kept: cache}, **more)
    return out, out[kept]
