"""Final evaluation of a run: captions of held-out images, n-gram baselines, the probe."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimv2.config.schema import Config
from aimv2.data.prefetch import batched
from aimv2.data.shards.format import captions_of, find_shards, read_samples
from aimv2.data.shards.listing import list_shard
from aimv2.data.stream.native import area_probabilities, middle_area
from aimv2.data.stream.samples import View, training_shards, validation_shards
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.errors import UsageError
from aimv2.evals.ngram import bigram_loss, unigram_loss
from aimv2.evals.probe import train_probe
from aimv2.io import say
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import build
from aimv2.models.encoder import VisionEncoder
from aimv2.tables import figure
from aimv2.tasks.held_out import HeldOut, HeldOutSample, held_out_samples, read_held_out

NGRAM_CAPTIONS = 50_000  # training captions that the n-gram models are fitted on, at most
EXACT_IMAGES = 512  # held-out images whose caption is compared word for word
PROBE_FOLDERS = ".probe-*"  # in the run folder, of stored features
SIZE = 256  # labelled images in memory, and in the encoder, at once


def measure(config: Config, model: AIMv2, tokenizer: Tokenizer | None, run: Path) -> dict[str, Any]:
    """Figures of a finished run apart from its validation losses; ``run`` is its folder.

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
        figures |= ngram_losses(config, tokenizer, held_out)
        figures |= write_captions(model, tokenizer, held_out, config.eval.captions)
    if config.eval.probe:
        figures |= probe_against_random(config, model, view, run)
    return figures


def measured_view(config: Config, model: AIMv2, captions: bool) -> View:
    """Squares: of the encoder's size, of a native one about the middle of the run's areas."""
    shape = model.encoder.config
    side = shape.image_size
    if side is None:
        side = shape.patch_size * math.isqrt(middle_area(area_probabilities(*config.data.areas)))
    return View(side, (side // shape.patch_size) ** 2, captions)


def ngram_losses(config: Config, tokenizer: Tokenizer, held_out: HeldOut) -> dict[str, float]:
    """Loss of unigrams and bigrams of the training captions on the held-out ones, nats a token."""
    every = (
        tokenizer.encode(text, config.data.max_tokens)
        for shards in training_shards(config.data)
        for shard in shards
        for _, sample in read_samples(shard)
        for field in captions_of(sample).values()
        for text in field
    )
    train = list(islice(every, NGRAM_CAPTIONS))
    size = tokenizer.vocab_size
    return {
        "val_text_loss_unigram": unigram_loss(train, held_out.tokens, size),
        "val_text_loss_bigram": bigram_loss(train, held_out.tokens, size),
    }


def write_captions(model: AIMv2, tokenizer: Tokenizer, held_out: HeldOut, shown: int) -> dict[str, Any]:
    """Greedy captions of held-out images: the fraction that equals the reference, and a few to read."""
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


def probe_against_random(config: Config, model: AIMv2, view: View, run: Path) -> dict[str, Any]:
    """The attentive probe on the trained encoder and, with the same data and seed, on an untrained one.

    Images are decoded once, batch by batch; their features are written to a temporary folder of the run.

    Raises:
        UsageError: heads that do not divide the width, no room for the features.
    """
    view, probe = View(view.image_size, view.patches, captions=False), config.eval
    train = [tar for shards in training_shards(config.data) for tar in shards], view, probe.probe_samples
    test = probe_test_shards(config), view, probe.probe_val_samples
    if next(labelled(*train), None) is None or next(labelled(*test), None) is None:
        say("no probe: the training and validation shards hold no labels (.cls)")
        return {}
    heads, width = probe.probe_heads, model.encoder.config.width
    if heads is not None and width % heads:
        raise UsageError(f"eval.probe_heads {heads} does not divide the encoder's width {width}", code="mismatch")
    untrained = build(model.encoder.config, None, config.seed).to(model.encoder.mean.device)
    assert isinstance(untrained, VisionEncoder)
    encoders = {"probe_top1": model.encoder.eval(), "probe_top1_random": untrained.eval()}
    flips = (False, True) if config.data.flip > 0 else (False,)
    figures: dict[str, Any] = {}
    for left in run.glob(PROBE_FOLDERS):  # of an evaluation that was killed
        shutil.rmtree(left, ignore_errors=True)
    images = len(encoders) * (len(flips) * labels_in(train[0], train[2]) + labels_in(test[0], test[2]))
    check_room(run, 2 * images * view.patches * width, probe.probe_samples)
    with tempfile.TemporaryDirectory(prefix=PROBE_FOLDERS[:-1], dir=run) as folder:
        try:
            views, labels = store_features(encoders, labelled_batches(*train), flips, Path(folder, "train"))
            tests, test_labels = store_features(encoders, labelled_batches(*test), (False,), Path(folder, "test"))
        except OSError as error:
            raise UsageError(
                f"eval.probe_samples {probe.probe_samples}: the features of the labelled images can't be written to {run} "
                f"({error.strerror or error}); make room, or use fewer images",
                code="limit",
            ) from None
        figures["probe_test_images"] = len(test_labels)
        for name in encoders:
            say(f"{name}: attentive probe, {len(labels)} training and {len(test_labels)} test images")
            figures[name] = train_probe(
                views[name],
                labels,
                tests[name][0],
                test_labels,
                probe.probe_epochs,
                probe.probe_lr,
                heads,
                seed=config.seed,
                device=model.encoder.mean.device,
            )
            say(f"{name} {figure(name, figures[name])}")
    return figures


def labels_in(shards: list[Path], limit: int) -> int:
    """Labelled samples among the first ``limit`` (0: all), by the headers of the shards."""
    labels = np.concatenate([list_shard(shard)[2] for shard in shards])
    return int((labels[: limit or None] >= 0).sum())


def check_room(run: Path, need: int, samples: int) -> None:
    """Raises UsageError where the disk of the run has no room for ``need`` bytes of features."""
    free = shutil.disk_usage(run).free
    if need > free:
        raise UsageError(
            f"eval.probe_samples {samples}: the features of the labelled images take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
            f"are free in {run}; make room, or use fewer images (`aimv2 pretrain --resume` evaluates a finished run)",
            code="limit",
        )


def probe_test_shards(config: Config) -> list[Path]:
    """``test-*`` where the training folder has them, else the validation shards."""
    if isinstance(config.data.train, str) and Path(config.data.train).is_dir():
        return find_shards(config.data.train, "test", option="data.train") or validation_shards(config.data)
    return validation_shards(config.data)


def labelled(shards: list[Path], view: View, limit: int) -> Iterator[HeldOutSample]:
    """The samples that have a label, of the first ``limit`` (0: all)."""
    return (sample for sample in held_out_samples(shards, view, limit) if sample.label >= 0)


def labelled_batches(shards: list[Path], view: View, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of :func:`labelled` as uint8 [B, 3, H, W] and int64 [B]; one batch is in memory at a time."""
    for batch in batched(labelled(shards, view, limit), SIZE):
        yield torch.from_numpy(np.stack([one.pixels for one in batch])), torch.tensor([one.label for one in batch])


@torch.no_grad()
def features(encoder: Any, images: Tensor, flip: bool = False) -> Tensor:
    """Frozen post-norm features, bidirectional: uint8 [B, 3, H, W] -> float16 [B, I, D] on the CPU."""
    pixels = images.to(encoder.mean.device)
    with torch.compiler.set_stance("force_eager"):
        return encoder(pixels.flip(-1) if flip else pixels).to(torch.float16).cpu().contiguous()


def store_features(
    encoders: dict[str, VisionEncoder], batches: Iterable[tuple[Tensor, Tensor]], flips: Sequence[bool], folder: Path
) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Features of all images by every encoder, on disk.

    Args:
        encoders: in evaluation mode, by name.
        batches: images uint8 [B, 3, H, W] and labels int64 [B], at least one.
        flips: views of each image: as it is, or mirrored.
        folder: a new one.

    Returns:
        by encoder one memory-mapped float16 [N, I, D] a view; labels int64 [N].
    """
    folder.mkdir()
    every = [(name, number, flip) for name in encoders for number, flip in enumerate(flips)]
    labels: list[Tensor] = []
    shape: tuple[int, ...] = ()
    with ExitStack() as stack:
        files = {place: stack.enter_context((folder / f"{place[0]}-{place[1]}").open("wb")) for place in every}
        for images, own in batches:
            labels.append(own)
            for (name, _, flip), file in zip(every, files.values()):
                found = features(encoders[name], images, flip)
                file.write(found.numpy().data)
                shape = tuple(found.shape[1:])
    count = sum(map(len, labels))
    views: dict[str, list[Tensor]] = {name: [] for name in encoders}
    for name, number, _ in every:
        stored = np.memmap(folder / f"{name}-{number}", np.float16, "r+", shape=(count, *shape))
        views[name].append(torch.from_numpy(stored))
    return views, torch.cat(labels)
