"""What a model shows: the sections of a report that need one, each from a few pictures.

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
from aimv2.report.images import Picture, blend, colour, enlarge, frame_patch, hide_behind
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
from aimv2.report.samples import HeldOutImage, Seen

SHARES = (0.1, 0.5, 0.9)  # prefixes at which patches are predicted
ROLLOUT_SHARE = 0.5
DEAR = 6.0  # nats at which a token's tint is full: a chance of 1 in 400
LAYERS = 8  # layers that PCA shows at most
HALF = 530  # CSS pixels of half the page: rows that fit lie in two columns
HEADS = 6  # heads that attention shows at most
NEIGHBOURS, AMONG = 5, 512  # of each image, and images among which they are looked for, at most
WORK = {"cpu": 4e12, "cuda": 4e14}  # floating-point operations that the search for neighbours may take
LARGE = 1e8  # parameters from which a CPU paints one image alone


Drawn = tuple[str, list[Strip]]  # how to read it, and the pictures


@dataclass
class Scene:
    """All that the sections are drawn from.

    Attributes:
        encoder: in evaluation mode.
        model: with its decoder; None for an encoder alone.
        why_no_decoder: said where there is none.
        training: samples at one visit.
        held_out: images to show; more of them where neighbours are looked for.
        tokenizer: of captions.
        images: how many to show.
        origin: of the held-out images, in words.
    """

    encoder: VisionEncoder
    model: AIMv2 | None
    why_no_decoder: str
    training: list[Seen]
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


def bytes_of(image: Tensor) -> Picture:
    """uint8 [3, H, W] -> [H, W, 3]."""
    return image.permute(1, 2, 0).cpu().numpy()


# ---- what it sees ----


def batch_section(scene: Scene) -> Drawn:
    """Training samples at one visit: crop, prefix, caption tokens by their loss."""
    strips = []
    for seen in scene.training:
        height, width = seen.image.shape[1] // scene.patch, seen.image.shape[2] // scene.patch
        picture = hide_behind(bytes_of(seen.image), seen.prefix, scene.patch, 0.6)
        under = f"prefix {seen.prefix} of {height * width} patches"
        strips.append(Strip(seen.source or "", [Shot(picture, under, small(picture))], loss_tokens(scene, seen)))
    lead = (
        "Training samples at one visit, after crop and flip. Clear patches are the prefix, which see each other; those under "
        "the chequer are read causally, and each is to be predicted from those before it."
    )
    if any(strip.tokens for strip in strips):
        lead += (
            " Below, the drawn caption in tokens: the number is a token's loss in nats under this prefix (0 is certain; "
            "log of the vocabulary is a guess), the redder the dearer."
        )
    return lead, strips


def loss_tokens(scene: Scene, seen: Seen) -> list[Tinted]:
    """The caption's tokens with their loss; plain ones without a decoder that reads text."""
    model = scene.model
    if not seen.caption or scene.tokenizer is None:
        return []
    if model is None or not model.decoder.config.text or model.tokenizer is None:
        ids = scene.tokenizer.encode(seen.caption)
        texts = [scene.tokenizer.decode([token]) for token in ids[:-1]]
        return [Tinted(visible(text), "", 0) for text in [*texts, END]]
    return [tinted(token) for token in caption_loss(model, seen.image, seen.caption, seen.prefix)]


def tinted(token: Token) -> Tinted:
    tip = f"loss {max(0.0, token.loss):.3f} nats, probability {np.exp(-max(0.0, token.loss)):.1%}"
    return Tinted(visible(token.text), f"{max(0.0, token.loss):.1f}", min(token.loss / DEAR, 1), tip)


def small(picture: Picture) -> bool:
    """Whether a picture shows its pixels when the page enlarges it."""
    return max(picture.shape[:2]) <= 96


def row_size(count: int) -> int:
    """CSS pixels a side at which a row of so many pictures takes half the page, where they stay large enough to be seen."""
    fitting = (HALF - 16) // count - 10
    return min(fitting, 112) if fitting >= 56 else 84


def with_decoder(scene: Scene) -> AIMv2:
    """The whole model.

    Raises:
        UsageError: there is no decoder.
    """
    if scene.model is None:
        raise UsageError(scene.why_no_decoder)
    return scene.model


# ---- what it predicts ----


def next_patch_section(scene: Scene) -> Drawn:
    """Held-out images with every patch behind the prefix predicted from the true ones before it."""
    model = with_decoder(scene)
    strips = []
    for one in scene.shown:
        found = [next_patches(model, one.image, share) for share in SHARES]
        truth = Shot(found[0].truth, "truth", small(found[0].truth))
        shots = []
        for share, painted in zip(SHARES, found):
            given = hide_behind(painted.truth, painted.prefix, scene.patch)
            shots.append(Shot(given, f"given: {share:.0%}", small(given)))
            shots.append(Shot(painted.image, f"predicted, loss {painted.loss:.2f}", small(given)))
        strips.append(Strip("", [*shots, truth]))
    lead = (
        f"{scene.origin.capitalize()} images. Each patch behind the prefix is predicted from all true patches before it, in "
        "reading order, never from itself; a loss of 1 is no better than a flat patch, 0 is perfect. " + NORMALISED
    )
    return lead, strips


def rollout_section(scene: Scene) -> Drawn:
    """Held-out images continued from the model's own predictions."""
    model = with_decoder(scene)
    big = sum(p.numel() for p in model.parameters()) > LARGE and scene.encoder.mean.device.type == "cpu"
    strips = []
    for one in scene.shown[: 1 if big else scene.images]:
        painted = rollout(model, one.image, ROLLOUT_SHARE)
        given = hide_behind(painted.truth, painted.prefix, scene.patch)
        shots = [
            Shot(given, f"given: {ROLLOUT_SHARE:.0%}", small(given)),
            Shot(painted.image, f"painted, loss {painted.loss:.2f}", small(given)),
            Shot(painted.truth, "truth", small(given)),
        ]
        strips.append(Strip("", shots))
    lead = (
        "The model paints on: each patch is predicted from the prefix and from the patches that it painted before, so that "
        "mistakes carry on. It gives the mean of what may follow, hence blur. " + NORMALISED
    )
    return lead, strips


def caption_section(scene: Scene) -> Drawn:
    """Greedy captions of held-out images, each token with its probability and where the decoder looked."""
    model = with_decoder(scene)
    strips = []
    for number, one in enumerate(scene.shown):
        words = caption_words(model, one.image)
        picture = bytes_of(one.image)
        tokens = [
            Tinted(
                visible(word.text),
                f"{word.probability:.0%}",
                1 - word.probability,
                "; ".join(f"{visible(text).strip()} {share:.0%}" for text, share in word.alternatives),
            )
            for word in words
        ]
        shots = [Shot(picture, "", small(picture))]
        if number < 2:  # where it looked, for two of them
            for word in words[:10]:
                heat = blend(enlarge(picture, *reach(picture)), colour(word.attention))
                shots.append(Shot(heat, visible(word.text).strip(), True))
        strips.append(Strip("", shots, tokens, f"reference: {one.caption}" if one.caption else "", size=74))
    lead = (
        f"Captions that the model writes for {scene.origin} images, the likeliest token each time. The number is its "
        f"probability, the redder the less sure; {END} is the end of text. For the first two, where the decoder looked as it "
        "chose each token (attention to the image, mean over heads and blocks; bright is much)."
    )
    return lead, strips


def reach(picture: Picture) -> tuple[int, int]:
    """A size at which a map of patches lies well over a picture: 96 pixels or more."""
    times = max(1, -(-96 // max(picture.shape[:2])))
    return picture.shape[0] * times, picture.shape[1] * times


# ---- what it has learnt ----


def feature_section(scene: Scene) -> Drawn:
    """PCA of the patch features of each layer as colours, one basis a layer over all images."""
    depth = len(scene.encoder.blocks)
    layers = sorted({round(at) for at in np.linspace(0, depth - 1, min(depth, LAYERS))})
    maps = [patch_maps(scene.encoder, one.image[None], layers) for one in scene.shown]
    colours = {name: pca_rgb([one[name][0] for one in maps]) for name in maps[0]}
    strips = []
    for number, one in enumerate(scene.shown):
        picture = bytes_of(one.image)
        shots = [Shot(picture, "image", small(picture))]
        shots += [Shot(colours[name][number], name if name == "last" else f"layer {name}") for name in colours]
        strips.append(Strip("", shots, size=row_size(len(shots))))
    lead = (
        "The three main directions of all patch features of a layer as red, green and blue: patches of one colour are alike "
        "to the encoder. Colours compare between the images of a column, not between columns."
    )
    return lead, strips


def attention_section(scene: Scene) -> Drawn:
    """Attention of two patches of two images: mean of the heads by layer, then each head of the last layer."""
    depth = len(scene.encoder.blocks)
    layers = sorted({0, depth // 2, depth - 1})
    strips = []
    for one in scene.shown[:2]:
        picture = bytes_of(one.image)
        grid = picture.shape[0] // scene.patch, picture.shape[1] // scene.patch
        for patch in chosen_patches(picture, grid, scene.patch):
            side = reach(picture)[0] // grid[0]
            framed = frame_patch(enlarge(picture, *reach(picture)), patch, side)
            shots = [Shot(framed, f"row {patch[0] + 1}, column {patch[1] + 1}", True)]
            for layer in layers:
                heads = attention_maps(scene.encoder, one.image, layer, patch)
                shots.append(Shot(colour(heads.mean(0)), f"layer {layer}"))
            shots += [Shot(colour(head), f"head {at}") for at, head in enumerate(heads[:HEADS])]
            strips.append(Strip("", shots, size=row_size(len(shots))))
    lead = (
        "How much the framed patch attends to every other, all patches seeing each other: the mean over the heads of the first, "
        f"a middle and the last of {depth} layers, then heads of the last one. Each map has its own scale; bright is much."
    )
    return lead, strips


def chosen_patches(picture: Picture, grid: tuple[int, int], side: int) -> list[tuple[int, int]]:
    """Two patches worth asking: the most varied one, and the most varied far from it."""
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


def neighbour_section(scene: Scene) -> Drawn:
    """The images nearest to a few by the cosine of their mean features."""
    pool = scene.held_out
    if len(pool) < 3:
        raise UsageError(f"{len(pool)} {scene.origin} images, at least 3 are needed")
    pooled = torch.cat([pooled_features(scene.encoder, one.image) for one in pool])
    like = pooled @ pooled.T
    like.fill_diagonal_(-2)
    strips = []
    for number, one in enumerate(scene.shown):
        best, places = like[number].topk(min(NEIGHBOURS, len(pool) - 1))
        shots = [Shot(bytes_of(one.image), named("image", one), small(bytes_of(one.image)))]
        for cosine, place in zip(best.tolist(), places.tolist()):
            picture = bytes_of(pool[place].image)
            shots.append(Shot(picture, named(f"{cosine:.3f}", pool[place]), small(picture)))
        strips.append(Strip("", shots, size=row_size(len(shots))))
    lead = (
        f"For each image on the left the nearest of {len(pool)} {scene.origin} images by the cosine of their mean patch "
        "features (below each), without any training on labels: what the encoder finds alike."
    )
    return lead, strips


def named(text: str, one: HeldOutImage) -> str:
    return f"{text} (class {one.label})" if one.label >= 0 else text


@torch.inference_mode()
def pooled_features(encoder: VisionEncoder, image: Tensor) -> Tensor:
    """Mean of the patch features, of length 1: fp32 [1, D] on the CPU."""
    found = encoder.encode(image[None].to(encoder.mean.device), pool="mean").float().cpu()
    return torch.nn.functional.normalize(found, dim=-1)


def searched(encoder: VisionEncoder, patches: int, images: int) -> int:
    """How many images neighbours are looked for among: as many as a moment's work allows, AMONG at most."""
    work = WORK["cuda" if encoder.mean.device.type == "cuda" else "cpu"]
    return max(images, min(AMONG, int(work / encoder_flops(encoder.config, patches))))


SECTIONS: dict[str, tuple[str, Callable[[Scene], Drawn]]] = {
    "batch": ("What the model sees", batch_section),
    "next-patch": ("The next patch", next_patch_section),
    "rollout": ("Painting the rest", rollout_section),
    "captions": ("Captions, word by word", caption_section),
    "features": ("Features by layer", feature_section),
    "attention": ("Where patches look", attention_section),
    "neighbours": ("Nearest neighbours", neighbour_section),
}


def sections(scene: Scene) -> list[Section]:
    """Every section that needs a model; one that can't be says why."""
    out = []
    for name, (title, make) in SECTIONS.items():
        try:
            if not (scene.training if name == "batch" else scene.held_out):
                raise UsageError("the run's data hold no image that can be read")
            out.append(Section(name, title, *make(scene)))
        except UsageError as error:
            out.append(Section(name, title, missing=str(error)))
    return out


def compared(scene: Scene) -> dict[str, tuple[list[Shot], str]]:
    """What one of several runs makes of the held-out images, by key: next patches, the features' colours, the caption."""
    maps = [patch_maps(scene.encoder, one.image[None], [-1])["last"][0] for one in scene.shown]
    out = {}
    for one, colours in zip(scene.shown, pca_rgb(maps)):
        shots, written = list[Shot](), ""
        if scene.model is not None and scene.model.decoder.config.pixels:
            painted = next_patches(scene.model, one.image, ROLLOUT_SHARE)
            shots.append(Shot(painted.image, f"loss {painted.loss:.2f}", small(painted.image)))
        if scene.model is not None and scene.model.decoder.config.text and scene.model.tokenizer is not None:
            written = scene.model.caption(one.image[None])[0]
        out[one.key] = ([*shots, Shot(colours, "features")], written)
    return out


def beside_section(names: Sequence[str], first: Scene, found: Sequence[dict[str, tuple[list[Shot], str]]]) -> Section:
    """The same held-out images as several runs see them; ``found``: :func:`compared` of each, ``first`` the scene of the
    first."""
    title, strips = "The same pictures", []
    for one in first.shown:
        if not all(one.key in run for run in found):
            continue
        picture = bytes_of(one.image)
        shots = [Shot(picture, "image", small(picture))]
        shots += [
            replace(shot, under=f"{name}: {shot.under}") for name, run in zip(names, found) for shot in run[one.key][0]
        ]
        said = [f"{name}: {run[one.key][1]}" for name, run in zip(names, found) if run[one.key][1]]
        strips.append(Strip("", shots, note=" | ".join(said)))
    if not strips:
        return Section("beside", title, missing="the runs have no held-out image in common")
    lead = (
        f"What each run makes of the same {first.origin} images: every patch behind a prefix of {ROLLOUT_SHARE:.0%} predicted "
        "from the true ones before it, the features of its last layer as colours (which compare within a run alone), and its "
        "caption."
    )
    return Section("beside", title, lead, strips)


def without_model(why: str) -> list[Section]:
    """All of them left out."""
    return [Section(name, title, missing=why) for name, (title, _) in SECTIONS.items()]
