"""What a finished run is measured by: validation, captions of held-out images, n-gram yardsticks, the probe."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimv2.config.schema import Config
from aimv2.data.shards.format import captions_of, find_shards, read_samples
from aimv2.data.stream.native import area_probabilities, middle_area
from aimv2.data.stream.samples import View, training_shards, validation_shards
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.errors import UsageError
from aimv2.evals.ngram import bigram_loss, unigram_loss
from aimv2.evals.probe import attentive_probe
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import build
from aimv2.models.encoder import VisionEncoder
from aimv2.tasks.held_out import HeldOut, read_held_out

YARDSTICK_CAPTIONS = 50_000  # training captions that the n-gram models are fitted on, at most
EXACT_IMAGES = 512  # held-out images whose caption is compared word for word


def measure(config: Config, model: AIMv2, tokenizer: Tokenizer | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Figures of a finished run beside its validation losses.

    Returns:
        ``val_text_loss_unigram`` and ``_bigram``, ``caption_exact_match`` of ``caption_images`` and ``captions`` where there
        is text; ``probe_top1`` and ``probe_top1_random`` on ``probe_test_images`` with ``eval.probe``.
    """
    view = measured_view(config, model, tokenizer is not None)
    figures: dict[str, Any] = {}
    shards = validation_shards(config.data)
    if tokenizer is not None and shards:
        limit = max(config.eval.samples, config.eval.captions)
        held_out = read_held_out(shards, view, tokenizer, limit, config.data.max_tokens)
        figures |= yardsticks(config, tokenizer, held_out)
        figures |= write_captions(model, tokenizer, held_out, config.eval.captions)
    if config.eval.probe:
        figures |= probe_against_random(config, model, view, say)
    return figures


def measured_view(config: Config, model: AIMv2, captions: bool) -> View:
    """Squares: of the encoder's size, of a native one about the middle of the run's areas."""
    shape = model.encoder.config
    side = shape.image_size
    if side is None:
        side = shape.patch_size * math.isqrt(middle_area(area_probabilities(*config.data.areas)))
    return View(side, (side // shape.patch_size) ** 2, captions)


def yardsticks(config: Config, tokenizer: Tokenizer, held_out: HeldOut) -> dict[str, float]:
    """What unigrams and bigrams of the training captions know of the held-out ones, nats a token."""
    every = (
        tokenizer.encode(text, config.data.max_tokens)
        for shards in training_shards(config.data)
        for shard in shards
        for _, sample in read_samples(shard)
        for field in captions_of(sample).values()
        for text in field
    )
    train = list(islice(every, YARDSTICK_CAPTIONS))
    size = tokenizer.vocab_size
    return {
        "val_text_loss_unigram": unigram_loss(train, held_out.tokens, size),
        "val_text_loss_bigram": bigram_loss(train, held_out.tokens, size),
    }


def write_captions(model: AIMv2, tokenizer: Tokenizer, held_out: HeldOut, shown: int) -> dict[str, Any]:
    """Greedy captions of held-out images: the share that equals the reference, and a few to read."""
    from aimv2.data.text.tokenizer import clean_text

    images, wanted = held_out.images[:EXACT_IMAGES], held_out.captions[:EXACT_IMAGES]
    assert isinstance(images, Tensor)
    written = [text for part in images.split(128) for text in model.caption(part, tokenizer=tokenizer)]
    right = sum(text == tokenizer.decode(tokenizer.encode(clean_text(want))) for text, want in zip(written, wanted))
    examples = [
        {"key": key, "written": text, "reference": want}
        for key, text, want in list(zip(held_out.keys, written, wanted))[:shown]
    ]
    return {
        "caption_exact_match": right / max(len(written), 1),
        "caption_images": len(written),
        "captions": examples,
    }


def probe_against_random(config: Config, model: AIMv2, view: View, say: Callable[[str], None]) -> dict[str, Any]:
    """The attentive probe on the trained encoder and, with the same data and seed, on an untrained one."""
    view = View(view.image_size, view.patches, captions=False)
    train = labelled(
        [tar for shards in training_shards(config.data) for tar in shards], view, config.eval.probe_samples
    )
    test = labelled(probe_test_shards(config), view, config.eval.probe_val_samples)
    if not len(train[1]) or not len(test[1]):
        say("no probe: the training and validation shards hold no labels (.cls)")
        return {}
    heads, width = config.eval.probe_heads, model.encoder.config.width
    if heads is not None and width % heads:
        raise UsageError(f"eval.probe_heads {heads} does not divide the encoder's width {width}")
    untrained = build(model.encoder.config, None, config.seed).to(model.encoder.mean.device)
    figures: dict[str, Any] = {"probe_test_images": len(test[1])}
    assert isinstance(untrained, VisionEncoder)
    for name, encoder in (("probe_top1", model.encoder), ("probe_top1_random", untrained)):
        say(f"{name}: attentive probe, {len(train[1])} training and {len(test[1])} test images")
        probe = config.eval
        figures[name] = attentive_probe(
            encoder,
            train,
            test,
            probe.probe_epochs,
            probe.probe_lr,
            probe.probe_heads,
            flip=config.data.flip > 0,
            seed=config.seed,
        )
        say(f"{name} {figures[name]:.4f}")
    return figures


def probe_test_shards(config: Config) -> list[Path]:
    """``test-*`` where the training folder has them, else the validation shards."""
    if isinstance(config.data.train, str) and Path(config.data.train).is_dir():
        return find_shards(config.data.train, "test", option="data.train") or validation_shards(config.data)
    return validation_shards(config.data)


def labelled(shards: list[Path], view: View, limit: int) -> tuple[Tensor, Tensor]:
    """Images and labels of the samples that have one: uint8 [N, 3, H, W], int64 [N]."""
    data = read_held_out(shards, view, None, limit)
    assert isinstance(data.images, Tensor)
    keep = data.labels >= 0
    if not bool(keep.any()):
        return torch.zeros(0, 3, view.image_size, view.image_size, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    return data.images[keep], data.labels[keep]
