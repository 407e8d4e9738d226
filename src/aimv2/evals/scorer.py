"""Images against texts: one face for the cosines of a pair and the likelihoods of a decoder.

Legend: B images, G groups of t texts each (a class's prompts, or one caption), P width of the shared space.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from aimv2.data.images.decode import upright_rgb
from aimv2.data.stream.transforms import image_transform, resized_crop, to_pixels
from aimv2.errors import UsageError
from aimv2.evals.untrained import with_untrained_encoder
from aimv2.features.fingerprint import weights_hash
from aimv2.features.foreign import is_foreign, open_transformers, probe_image, settle
from aimv2.features.frozen import refuse_stats
from aimv2.features.pixels import Processing, Stats, about, read_processor, refuse_other_inputs
from aimv2.interop.plain import open_plain
from aimv2.interop.shapes import processor_file
from aimv2.models.aimv2 import AIMv2
from aimv2.models.likelihood import log_likelihood, read_images, tokenize
from aimv2.models.lit import LiT
from aimv2.progress import progress_bar

PRIOR_IMAGES = 100  # that the probability of a text without its image is estimated from
TEXTS = 256  # in the text tower at once


class Pair(Protocol):
    """Two towers with one space: a LiT, or a pair of ``transformers``."""

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> [B, P], of unit length."""

    def encode_text(self, texts: list[str]) -> Tensor:
        """B texts -> [B, P], of unit length."""


@dataclass(frozen=True)
class Matcher:
    """A model that can say how well a text fits an image.

    Attributes:
        name: as the user gave it.
        by: contrastive or likelihood.
        model: a pair, or an encoder with its decoder, in evaluation mode; with its tokenizer.
        weights: to be hashed again.
        sha256: of the weights.
        see: PIL image -> uint8 [3, H, W].
        view: what ``see`` does, in words.
        shape: what a result says of the model besides its name and hash.
    """

    name: str
    by: str
    model: Pair | AIMv2
    weights: nn.Module
    sha256: str
    see: Callable[[Image.Image], Tensor]
    view: str
    shape: dict[str, Any]

    def about(self) -> dict[str, Any]:
        """What a result says of the model; with the proof that measuring left it as it was.

        Raises:
            RuntimeError: the weights have changed: a mistake of ours.
        """
        if weights_hash(self.weights) != self.sha256:
            raise RuntimeError(f"{self.name}: the weights changed while they were measured")
        return {"name": self.name, "weights_sha256": self.sha256, "unchanged": True, **self.shape}

    def untrained(self, seed: int) -> Matcher:
        """The same with an untrained encoder.

        Raises:
            UsageError: none of ours.
        """
        if not isinstance(self.model, AIMv2 | LiT):
            raise UsageError(f"--baselines random: {self.name} is not an AIMV2; its twin can't be drawn")
        twin = with_untrained_encoder(self.model, seed)
        return replace(self, model=twin, weights=twin, sha256=weights_hash(twin), see=image_transform(twin))

    def scorer(self, groups: Sequence[Sequence[str]], normalize: str, others: Iterable[Tensor] = ()) -> Scorer:
        """By cosine for a pair, which leaves ``normalize`` and ``others`` unused, else by likelihood."""
        if isinstance(self.model, AIMv2):
            return by_likelihood(self.model, groups, normalize, others)
        return by_cosine(self.model, groups)


class Scorer(Protocol):
    """uint8 images [B, 3, H, W] -> scores float [B, G] on the CPU; higher fits better."""

    def __call__(self, images: Tensor) -> Tensor: ...


# ---- models ----


def open_matcher(
    source: str, by: str = "auto", device: str | torch.device = "cpu", stats: Stats | None = None
) -> Matcher:
    """A pair, or an encoder with its decoder.

    Args:
        source: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder or hub id of an image-text pair
            of ``transformers``.
        by: contrastive (the two towers of a pair), likelihood (the decoder), or auto: what the model has.
        device: where it runs.
        stats: mean and std of a pair of ``transformers``; None: as its own image processor has it.

    Raises:
        UsageError: nothing to load, an encoder only, a pair or a decoder where the other is wanted, no tokenizer, weights
            that would be random.
    """
    from aimv2.data.text.models import load_model
    from aimv2.interop import load

    at = load.locate(source)
    if is_foreign(at.folder):
        return _of_transformers(source, at.folder, by, device, stats)
    refuse_stats(source, stats)
    has_decoder = load.has_decoder(at)
    if has_decoder and by == "contrastive":
        raise UsageError(
            f"--by contrastive: {source} has no text tower; --by likelihood scores texts by its decoder", code="missing"
        )
    model = load_model(source, decoder=has_decoder, device=device)
    if isinstance(model, LiT):
        _refuse_likelihood(source, by)
        if model.tokenizer is None:
            raise UsageError(
                f"MODEL {source}: no tokenizer with the weights; put CLIP's tokenizer.json there", code="missing"
            )
        return _of_ours(source, model, "contrastive", "pair")
    if not isinstance(model, AIMv2):
        raise _no_text(source)
    if not model.decoder.config.text:
        raise UsageError(
            f"MODEL {source}: its decoder has no text head (it was trained with objective.targets=image)",
            code="missing",
        )
    if model.tokenizer is None:
        raise UsageError(f"MODEL {source}: no tokenizer with the weights; give the RUN, or the folder that it wrote")
    return _of_ours(source, model, "likelihood", "encoder and decoder")


def _of_ours(source: str, model: LiT | AIMv2, by: str, kind: str) -> Matcher:
    config = model.encoder.config
    view = "centred square" if config.image_size else "whole image"
    shape = {"kind": kind, "image_size": config.image_size, "width": config.width}
    return Matcher(source, by, model, model, weights_hash(model), image_transform(model), view, shape)


def _of_transformers(source: str, folder: Path, by: str, device: str | torch.device, stats: Stats | None) -> Matcher:
    model, missing = open_transformers(source, folder, device)
    pair = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    refuse_other_inputs(source, model, model.get_image_features if pair else model.forward)
    if not pair:
        raise _no_text(source)
    _refuse_likelihood(source, by)
    vision = getattr(model.config, "vision_config", model.config)
    how = read_processor(source, folder, stats, getattr(vision, "image_size", None))
    try:
        towers = TransformersPair(model, folder, how)
        size = towers.check()
        settle(source, model, missing, lambda: [towers.encode_image(probe_image(size)), towers.encode_text(["a"])])
    except UsageError:
        raise
    except Exception as error:  # whatever a pair of another kind, or a tokenizer, says
        why = " ".join(str(error).split())[:200]
        raise UsageError(f"MODEL {source}: {type(model).__name__} can't be used as a pair here: {why}") from None
    shape = {"kind": "transformers pair", "architecture": type(model).__name__, "image_size": size}
    shape["width"] = getattr(vision, "hidden_size", None)
    shape |= about(how.pixels)
    view = f"as its {towers.file.name} says" if towers.file is not None else "centred square"
    return Matcher(source, "contrastive", towers, model, weights_hash(model), towers.see, view, shape)


def _refuse_likelihood(source: str, by: str) -> None:
    if by == "likelihood":
        raise UsageError(f"--by likelihood: {source} is a pair without a decoder; --by contrastive reads its towers")


def _no_text(source: str) -> UsageError:
    return UsageError(
        f"MODEL {source}: an encoder only, which reads no text; a pair (LiT, CLIP, SigLIP) does, and so does scoring by "
        "likelihood with a model that kept its decoder: RUN, or a folder of `aimv2 convert --to safetensors`"
    )


class TransformersPair:
    """A pair that ``AutoModel`` opened, with the tokenizer and the image processor of its folder.

    Pillow resizes, wherever it runs. SigLIP was trained on texts in lower case, padded to its full length and without a
    mask: so they are given; to others as their tokenizer gives them, padded to the longest.
    """

    def __init__(self, model: Any, folder: Path, how: Processing) -> None:
        """Raises ValueError for a folder without a tokenizer, or whose image processor can't be had here."""
        self.model, self.file = model, processor_file(folder)
        self.how, self.side, self.processor = how
        if self.file is not None and self.processor is None:
            raise ValueError(f"the image processor of its {self.file.name} can't be opened here")
        self.tokenizer = open_plain("AutoTokenizer", folder)
        if not any((folder / name).is_file() for name in self.tokenizer.vocab_files_names.values()):
            raise ValueError("no tokenizer with the weights")  # transformers makes an empty one
        self.siglip = model.config.model_type.startswith("siglip")
        reads = ["input_ids"] if self.siglip else inspect.signature(model.get_text_features).parameters
        self.reads = [name for name in self.tokenizer.model_input_names if name in reads]
        places = getattr(getattr(model.config, "text_config", None), "max_position_embeddings", None)
        self.length = min(places or self.tokenizer.model_max_length, self.tokenizer.model_max_length)

    def see(self, image: Image.Image) -> Tensor:
        """The processor's view before its arithmetic, uint8 [3, H, W]: a quarter of the bytes to keep. Without one the centred
        square."""
        if self.processor is None:
            return torch.from_numpy(to_pixels(resized_crop(upright_rgb(image), self.side)))
        plain = dict(do_rescale=False, do_normalize=False, return_tensors="pt")
        if hasattr(self.processor, "do_flip_channel_order"):
            plain["do_flip_channel_order"] = False
        return self.processor(upright_rgb(image), **plain)["pixel_values"][0]

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float, scaled and normalised as the processor does."""
        return self.how(images.to(self.model.device))

    def encode_image(self, images: Tensor) -> Tensor:
        """See :class:`Pair`."""
        return _unit(self.model.get_image_features(pixel_values=self.pixels(images).to(self.model.dtype)))

    def encode_text(self, texts: list[str]) -> Tensor:
        """See :class:`Pair`."""
        texts = [text.lower() for text in texts] if self.siglip else texts
        padding = "max_length" if self.siglip else "longest"
        given = self.tokenizer(texts, padding=padding, truncation=True, max_length=self.length, return_tensors="pt")
        return _unit(self.model.get_text_features(**{name: given[name].to(self.model.device) for name in self.reads}))

    def check(self) -> int:
        """Pixels a side, after one image and one text.

        Raises:
            ValueError: towers that do not meet, a processor that does more than is done here or gives several sizes.
        """
        image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
        view, turned = self.see(image)[None], self.see(image.transpose(Image.Transpose.ROTATE_90))[None]
        if view.shape != turned.shape:
            raise ValueError("its image processor keeps the sides of an image; one size for all is expected")
        if self.processor is not None and self.how.origin != "options":
            whole = self.processor(image, return_tensors="pt")["pixel_values"]
        else:
            whole = self.pixels(view).cpu()
        if not torch.allclose(self.pixels(view).cpu(), whole, atol=1e-4):
            raise ValueError("its image processor does more than resize, crop, scale and normalise")
        with eager():
            vectors = self.encode_image(view), self.encode_text(["a"])
        if vectors[0].shape != vectors[1].shape:
            raise ValueError(f"features of {list(vectors[0].shape)} for an image, {list(vectors[1].shape)} for a text")
        return view.shape[-1]


def _unit(found: Any) -> Tensor:
    """Features as transformers gives them (newer: a part of the tower's output), fp32, of unit length."""
    features = found if isinstance(found, Tensor) else found.pooler_output
    return F.normalize(features.float(), dim=-1)


# ---- scores ----


def by_cosine(model: Pair, groups: Sequence[Sequence[str]]) -> Scorer:
    """Cosine of an image and a group: the group's vector is the normalised mean of its texts' normalised vectors (CLIP).

    Args:
        model: a pair with its tokenizer.
        groups: G of equally many texts.
    """
    texts = [text for group in groups for text in group]
    with eager(), progress_bar("texts", len(texts)) as advance:
        parts = list[Tensor]()
        for at in range(0, len(texts), TEXTS):
            parts.append(model.encode_text(texts[at : at + TEXTS]).float())
            advance(len(parts[-1]))
    vectors = F.normalize(torch.cat(parts).unflatten(0, (len(groups), -1)).mean(1), dim=-1)  # [G, P]

    def score(images: Tensor) -> Tensor:
        with eager():
            return (model.encode_image(images.to(vectors.device)).float() @ vectors.T).cpu()

    return score


def by_likelihood(
    model: AIMv2, groups: Sequence[Sequence[str]], normalize: str, others: Iterable[Tensor] = ()
) -> Scorer:
    """Log-likelihood of a group of texts given an image, nats; the texts of a group are equally likely beforehand.

    ``sum``: log of the mean of p(text | image) over the group. ``prior``: that, less the same with p(text), the mean of
    p(text | image) over other images: what is left is what the image itself says (pointwise mutual information).
    ``mean``: log p(text | image) a token, averaged over the group.

    Without the prior a text that fits any image is every image's best; where all texts are alike in form it costs
    something instead. docs/evaluate.md has both, measured.

    Args:
        model: with text head and tokenizer.
        groups: G of equally many texts.
        normalize: sum, mean or prior.
        others: batches of other images, uint8 [B, 3, H, W] (prior only).

    Raises:
        UsageError: a prior is wanted and there is no other image.
    """
    tokens = tokenize(model, [text for group in groups for text in group])
    lengths = torch.tensor([len(ids) for ids in tokens], dtype=torch.float64)

    def of_groups(images: Tensor) -> Tensor:
        with eager():
            logs = log_likelihood(model, read_images(model, images), tokens)  # [B, G * t]
        if normalize == "mean":
            return (logs / lengths).unflatten(1, (len(groups), -1)).mean(2)
        logs = logs.unflatten(1, (len(groups), -1))
        return logs.logsumexp(2) - math.log(logs.shape[2])

    if normalize != "prior":
        return of_groups
    parts = [of_groups(images) for images in others]
    if not parts:
        raise UsageError("--normalize prior: none of the other images could be read; --normalize sum needs none")
    logs = torch.cat(parts)
    prior = logs.logsumexp(0) - math.log(len(logs))  # [G]
    return lambda images: of_groups(images) - prior


def stacked(images: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Batches [B, 3, H, W] of up to ``size`` images [3, H, W] that follow each other and have one shape (native models)."""
    waiting: list[Tensor] = []
    for image in images:
        if waiting and (len(waiting) == size or image.shape != waiting[0].shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting)


@contextmanager
def eager() -> Iterator[None]:
    """No gradients, no torch.compile."""
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        yield
