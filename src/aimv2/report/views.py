"""The sections of a report that need a model, each drawn for a few images.

Legend: p patch side, h x w patch grid, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from aimv2.data.text.tokenizer import Tokenizer
from aimv2.errors import UsageError
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import encoder_flops
from aimv2.report.blocks import Section, Shot, Strip, Tinted
from aimv2.report.features import attention_maps, patch_maps, pca_rgb
from aimv2.report.images import Picture, blend, colour, enlarge, frame_patch, from_tensor, mask_after
from aimv2.report.predictions import (
    END,
    NORMALISED,
    Token,
    caption_loss,
    caption_words,
    next_patches,
    rollout,
    visible,
)
from aimv2.report.samples import HeldOutImage, TrainingSample
from aimv2.tables import percent

PREFIXES = (0.1, 0.5, 0.9)  # prefix fractions at which patches are predicted
ROLLOUT_PREFIX = 0.5
MAX_LOSS = 6.0  # nats at which a token has its full colour: a probability of 1 in 400
LAYERS = 8  # layers shown by PCA at most
HALF = 530  # half the page's width in CSS pixels: narrower rows are placed in two columns
HEADS = 6  # attention heads shown at most
COUNTED = "Layers and heads count from 0, as in encode(layers=[0])."
NEIGHBOURS, POOL = 5, 512  # neighbours per image, and images searched at most
MAX_FLOPS = {"cpu": 4e12, "cuda": 4e14}  # budget of the neighbour search
LARGE = 1e8  # parameters above which a CPU rolls out only one image


Content = tuple[str, list[Strip]]  # lead text and pictures


@dataclass
class ModelViews:
    """A model and the images that its sections are drawn from.

    Attributes:
        encoder: in evaluation mode.
        model: the model with its decoder; None for an encoder only.
        why_no_decoder: reason shown if there is no decoder.
        training: training samples at one visit.
        held_out: images to show, followed by further ones for the neighbour search.
        tokenizer: tokeniser of the captions.
        images: number of images to show.
        origin: origin of the held-out images, in words.
    """

    encoder: VisionEncoder
    model: AIMv2 | None
    why_no_decoder: str
    training: list[TrainingSample]
    held_out: list[HeldOutImage]
    tokenizer: Tokenizer | None
    images: int
    origin: str = "held-out"

    @property
    def shown(self) -> list[HeldOutImage]:
        return self.held_out[: self.images]

    @property
    def patch(self) -> int:
        return self.encoder.config.patch_size


# ---- input ----


def batch_section(scene: ModelViews) -> Content:
    """Training samples at one visit: crop, prefix, caption tokens by their loss."""
    strips = []
    for sample in scene.training:
        height, width = sample.image.shape[1] // scene.patch, sample.image.shape[2] // scene.patch
        picture = mask_after(from_tensor(sample.image), sample.prefix, scene.patch, 0.6)
        under = f"prefix {sample.prefix} of {height * width} patches"
        strips.append(Strip(sample.source or "", [Shot(picture, under, small(picture))], loss_tokens(scene, sample)))
    lead = (
        "Training samples at one visit, after crop and flip. Clear patches are the prefix, with bidirectional attention; the "
        "patches under the chequerboard have causal attention and are predicted, each from those before it."
    )
    if any(strip.tokens for strip in strips):
        lead += (
            " Below, the drawn caption in tokens: the number is a token's loss in nats under this prefix (0 is certain; "
            "the log of the vocabulary size is a uniform guess); the redder, the higher the loss."
        )
    return lead, strips


def loss_tokens(scene: ModelViews, sample: TrainingSample) -> list[Tinted]:
    """The caption's tokens with their loss; without a loss if there is no text decoder."""
    model = scene.model
    if not sample.caption or scene.tokenizer is None:
        return []
    if model is None or not model.decoder.config.text or model.tokenizer is None:
        ids = scene.tokenizer.encode(sample.caption)
        texts = [scene.tokenizer.decode([token]) for token in ids[:-1]]
        return [Tinted(visible(text), "", 0) for text in [*texts, END]]
    return [tinted(token) for token in caption_loss(model, sample.image, sample.caption, sample.prefix)]


def tinted(token: Token) -> Tinted:
    tip = f"loss {max(0.0, token.loss):.3f} nats, probability {percent(np.exp(-max(0.0, token.loss)))}"
    return Tinted(visible(token.text), f"{max(0.0, token.loss):.1f}", min(token.loss / MAX_LOSS, 1), tip)


def small(picture: Picture) -> bool:
    """Whether a picture is enlarged with sharp pixels."""
    return max(picture.shape[:2]) <= 96


def row_size(count: int) -> int:
    """CSS pixels per side at which a row of ``count`` pictures fits half the page, if they stay large enough."""
    fitting = (HALF - 16) // count - 10
    return min(fitting, 112) if fitting >= 56 else 84


def with_decoder(scene: ModelViews) -> AIMv2:
    """The whole model.

    Raises:
        UsageError: there is no decoder.
    """
    if scene.model is None:
        raise UsageError(scene.why_no_decoder)
    return scene.model


# ---- predictions ----


def next_patch_section(scene: ModelViews) -> Content:
    """Held-out images with every patch after the prefix predicted from the true ones before it."""
    model = with_decoder(scene)
    strips = []
    for one in scene.shown:
        shots = []
        for fraction in PREFIXES:
            predicted = next_patches(model, one.image, fraction)
            given = mask_after(predicted.truth, predicted.prefix, scene.patch)
            shots.append(Shot(given, f"given: {fraction:.0%}", small(given)))
            shots.append(Shot(predicted.image, f"predicted, loss {predicted.loss:.2f}", small(given)))
        strips.append(Strip("", [*shots, Shot(predicted.truth, "truth", small(predicted.truth))]))
    lead = (
        f"{scene.origin.capitalize()} images. Each patch after the prefix is predicted from all true patches before it, in "
        "raster order; a loss of 1 is no better than a flat patch, 0 is perfect. " + NORMALISED
    )
    return lead, strips


def rollout_section(scene: ModelViews) -> Content:
    """Held-out images continued from the model's own predictions."""
    model = with_decoder(scene)
    big = sum(p.numel() for p in model.parameters()) > LARGE and scene.encoder.mean.device.type == "cpu"
    strips = []
    for one in scene.shown[: 1 if big else scene.images]:
        predicted = rollout(model, one.image, ROLLOUT_PREFIX)
        given = mask_after(predicted.truth, predicted.prefix, scene.patch)
        shots = [
            Shot(given, f"given: {ROLLOUT_PREFIX:.0%}", small(given)),
            Shot(predicted.image, f"generated, loss {predicted.loss:.2f}", small(given)),
            Shot(predicted.truth, "truth", small(given)),
        ]
        strips.append(Strip("", shots))
    lead = (
        "Autoregressive rollout: each patch is predicted from the prefix and the patches generated so far, so errors accumulate. "
        "The squared error favours the mean of all possible continuations, hence the blur. " + NORMALISED
    )
    return lead, strips


def caption_section(scene: ModelViews) -> Content:
    """Greedy captions of held-out images, each token with its probability and the decoder's attention."""
    model = with_decoder(scene)
    strips = []
    for number, one in enumerate(scene.shown):
        words = caption_words(model, one.image)
        picture = from_tensor(one.image)
        tokens = [
            Tinted(
                visible(word.text),
                percent(word.probability),
                1 - word.probability,
                "; ".join(f"{visible(text).strip()} {percent(probability)}" for text, probability in word.alternatives),
            )
            for word in words
        ]
        shots = [Shot(picture, "", small(picture))]
        if number < 2:  # attention for the first two
            for word in words[:10]:
                heat = blend(enlarge(picture, *reach(picture)), colour(word.attention))
                shots.append(Shot(heat, visible(word.text).strip(), True))
        strips.append(Strip("", shots, tokens, f"reference: {one.caption}" if one.caption else "", size=74))
    lead = (
        f"Captions generated for {scene.origin} images by greedy decoding. The number is the token's probability; the redder, the "
        f"lower; {END} is the end of text. For the first two images, the decoder's attention to the image at each token (mean over "
        "heads and blocks; bright is high)."
    )
    return lead, strips


def reach(picture: Picture) -> tuple[int, int]:
    """Size at which a patch map is overlaid on a picture: 96 pixels or more."""
    times = max(1, -(-96 // max(picture.shape[:2])))
    return picture.shape[0] * times, picture.shape[1] * times


# ---- features ----


def feature_section(scene: ModelViews) -> Content:
    """PCA of the patch features of each layer as colours, one basis per layer over all images."""
    depth = len(scene.encoder.blocks)
    layers = sorted({round(at) for at in np.linspace(0, depth - 1, min(depth, LAYERS))})
    maps = [patch_maps(scene.encoder, one.image[None], layers) for one in scene.shown]
    colours = {name: pca_rgb([one[name][0] for one in maps]) for name in maps[0]}
    strips = []
    for number, one in enumerate(scene.shown):
        picture = from_tensor(one.image)
        shots = [Shot(picture, "image", small(picture))]
        shots += [Shot(colours[name][number], layer_name(layer, depth)) for name, layer in zip(colours, layers)]
        strips.append(Strip("", shots, size=row_size(len(shots))))
    lead = (
        "The first three principal components of all patch features of a layer as red, green and blue: patches of similar colour "
        f"have similar features. Colours compare between the images of a layer, not between layers. {COUNTED}"
    )
    return lead, strips


def attention_section(scene: ModelViews) -> Content:
    """Attention of two patches in two images: mean over the heads by layer, then each head of the last layer."""
    depth = len(scene.encoder.blocks)
    layers = sorted({0, depth // 2, depth - 1})
    strips = []
    for one in scene.shown[:2]:
        picture = from_tensor(one.image)
        grid = picture.shape[0] // scene.patch, picture.shape[1] // scene.patch
        for patch in chosen_patches(picture, grid, scene.patch):
            side = reach(picture)[0] // grid[0]
            framed = frame_patch(enlarge(picture, *reach(picture)), patch, side)
            shots = [Shot(framed, f"row {patch[0] + 1}, column {patch[1] + 1}", True)]
            for layer in layers:
                heads = attention_maps(scene.encoder, one.image, layer, patch)
                shots.append(Shot(colour(heads.mean(0)), layer_name(layer, depth)))
            shots += [Shot(colour(head), f"head {at}") for at, head in enumerate(heads[:HEADS])]
            strips.append(Strip("", shots, size=row_size(len(shots))))
    lead = (
        "Attention of the framed patch to every other (bidirectional): the mean over the heads of the first, a middle and the last "
        f"of {depth} layers, then heads of the last one. Each map has its own scale; bright is high. {COUNTED}"
    )
    return lead, strips


def layer_name(layer: int, depth: int) -> str:
    """A layer by its index, the number that ``layers`` takes everywhere: layer 0 to layer 5 (last)."""
    return f"layer {layer} (last)" if layer == depth - 1 else f"layer {layer}"


def chosen_patches(picture: Picture, grid: tuple[int, int], side: int) -> list[tuple[int, int]]:
    """Two query patches: the one with the largest variance, and the one with the largest variance far from it."""
    blocks = picture[: grid[0] * side, : grid[1] * side].astype(np.float64)
    blocks = blocks.reshape(grid[0], side, grid[1], side, 3)
    spread = blocks.std(axis=(1, 3)).sum(-1)  # [h, w]
    first = np.unravel_index(int(spread.argmax()), grid)
    rows, columns = np.indices(grid)
    far = np.hypot(rows - first[0], columns - first[1]) >= min(grid) / 2
    if not far.any():
        return [(int(first[0]), int(first[1]))]
    second = np.unravel_index(int(np.where(far, spread, -1).argmax()), grid)
    return [(int(first[0]), int(first[1])), (int(second[0]), int(second[1]))]


def neighbour_section(scene: ModelViews) -> Content:
    """Nearest neighbours of a few images by the cosine of their mean features."""
    pool = scene.held_out
    if len(pool) < 3:
        raise UsageError(f"{len(pool)} {scene.origin} images, at least 3 are needed", code="missing")
    pooled = torch.cat([pooled_features(scene.encoder, one.image) for one in pool])
    like = pooled @ pooled.T
    like.fill_diagonal_(-2)
    strips = []
    for number, one in enumerate(scene.shown):
        best, places = like[number].topk(min(NEIGHBOURS, len(pool) - 1))
        shots = [Shot(from_tensor(one.image), named("image", one), small(from_tensor(one.image)))]
        for cosine, place in zip(best.tolist(), places.tolist()):
            picture = from_tensor(pool[place].image)
            shots.append(Shot(picture, named(f"{cosine:.3f}", pool[place]), small(picture)))
        strips.append(Strip("", shots, size=row_size(len(shots))))
    lead = (
        f"For each image on the left, its nearest neighbours among {len(pool)} {scene.origin} images by the cosine of their mean "
        "patch features (below each, with the class), without any training on labels."
    )
    return lead, strips


def named(text: str, one: HeldOutImage) -> str:
    return f"{text}: {one.label}" if one.label else text


@torch.inference_mode()
def pooled_features(encoder: VisionEncoder, image: Tensor) -> Tensor:
    """Mean of the patch features, L2-normalised: fp32 [1, D] on the CPU."""
    mean = encoder.encode(image[None].to(encoder.mean.device), pool="mean").float().cpu()
    return torch.nn.functional.normalize(mean, dim=-1)


def pool_size(encoder: VisionEncoder, patches: int, images: int) -> int:
    """Number of images in the neighbour search: as many as the FLOP budget allows, POOL at most."""
    budget = MAX_FLOPS["cuda" if encoder.mean.device.type == "cuda" else "cpu"]
    return max(images, min(POOL, int(budget / encoder_flops(encoder.config, patches))))


SECTIONS: dict[str, tuple[str, Callable[[ModelViews], Content]]] = {
    "batch": ("Training samples", batch_section),
    "next-patch": ("Next-patch prediction", next_patch_section),
    "rollout": ("Patch rollout", rollout_section),
    "captions": ("Captions, token by token", caption_section),
    "features": ("Features by layer", feature_section),
    "attention": ("Attention", attention_section),
    "neighbours": ("Nearest neighbours", neighbour_section),
}


def sections(scene: ModelViews) -> list[Section]:
    """All sections that need a model; those that can't be drawn have a reason."""
    out = []
    for name, (title, make) in SECTIONS.items():
        try:
            if not (scene.training if name == "batch" else scene.held_out):
                raise UsageError("the run's data have no readable image", code="missing")
            out.append(Section(name, title, *make(scene)))
        except UsageError as error:
            out.append(Section(name, title, missing=str(error)))
    return out


def compared(scene: ModelViews) -> dict[str, tuple[list[Shot], str]]:
    """Outputs of one of several runs for the held-out images, by key: next patches, feature colours, caption."""
    maps = [patch_maps(scene.encoder, one.image[None], [-1])["last"][0] for one in scene.shown]
    out = {}
    for one, colours in zip(scene.shown, pca_rgb(maps)):
        shots, written = list[Shot](), ""
        if scene.model is not None and scene.model.decoder.config.pixels:
            predicted = next_patches(scene.model, one.image, ROLLOUT_PREFIX)
            shots.append(Shot(predicted.image, f"loss {predicted.loss:.2f}", small(predicted.image)))
        if scene.model is not None and scene.model.decoder.config.text and scene.model.tokenizer is not None:
            written = scene.model.caption(one.image[None])[0]
        out[one.key] = ([*shots, Shot(colours, "features")], written)
    return out


def comparison_section(
    names: Sequence[str], first: ModelViews, found: Sequence[dict[str, tuple[list[Shot], str]]]
) -> Section:
    """Outputs of several runs for the same held-out images.

    Args:
        names: names of the runs.
        first: model and images of the first run.
        found: :func:`compared` of each run.
    """
    title, strips = "The same images", []
    for one in first.shown:
        if not all(one.key in run for run in found):
            continue
        picture = from_tensor(one.image)
        shots = [Shot(picture, "image", small(picture))]
        shots += [
            replace(shot, under=f"{name}: {shot.under}") for name, run in zip(names, found) for shot in run[one.key][0]
        ]
        captions = [f"{name}: {run[one.key][1]}" for name, run in zip(names, found) if run[one.key][1]]
        strips.append(Strip("", shots, note=" | ".join(captions)))
    if not strips:
        return Section("beside", title, missing="the runs have no held-out image in common")
    lead = (
        f"Outputs of each run for the same {first.origin} images: every patch after a prefix of {ROLLOUT_PREFIX:.0%} predicted "
        "from the true ones before it, the features of the last layer as colours (which compare only within a run), and the "
        "caption."
    )
    return Section("beside", title, lead, strips)


def without_model(why: str) -> list[Section]:
    """All sections, left out for the reason ``why``."""
    return [Section(name, title, missing=why) for name, (title, _) in SECTIONS.items()]
