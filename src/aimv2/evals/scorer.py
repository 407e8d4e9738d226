"""Images against texts: one face for the cosines of a pair and the likelihoods of a decoder.

Legend: B images, G groups of t texts each (a class's prompts, or a caption alone), P width of the shared space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aimv2.data.transforms import image_transform
from aimv2.errors import UsageError
from aimv2.evals.weights import weights_hash
from aimv2.models.aimv2 import AIMv2
from aimv2.models.likelihood import log_likelihood, read_images, tokenize
from aimv2.models.lit import LiT

BY = ("auto", "contrastive", "likelihood")
NORMALIZE = ("prior", "sum", "mean")
PRIOR_IMAGES = 100  # that the probability of a text without its image is estimated from
TEXTS = 256  # in the text tower at once


@dataclass(frozen=True)
class Matcher:
    """A model that can say how well a text fits an image.

    Attributes:
        name: as the user gave it.
        by: contrastive or likelihood.
        model: LiT or AIMv2, with its tokeniser, in evaluation mode.
        sha256: of its weights.
        see: PIL image -> uint8 [3, H, W]: the centred square (native models: the image in the range of patches).
    """

    name: str
    by: str
    model: LiT | AIMv2
    sha256: str
    see: Callable[[Image.Image], Tensor]

    def about(self) -> dict[str, Any]:
        """What a result says of the model; with the proof that measuring left it as it was.

        Raises:
            RuntimeError: the weights have changed: a mistake of ours.
        """
        if weights_hash(self.model) != self.sha256:
            raise RuntimeError(f"{self.name}: the weights changed while they were measured")
        shape = self.model.encoder.config
        kind = "pair" if isinstance(self.model, LiT) else "encoder and decoder"
        about = {"name": self.name, "kind": kind, "weights_sha256": self.sha256, "unchanged": True}
        return {**about, "image_size": shape.image_size, "width": shape.width}


class Scorer(Protocol):
    """uint8 images [B, 3, H, W] -> scores float [B, G] on the CPU; higher fits better."""

    def __call__(self, images: Tensor) -> Tensor: ...


def open_matcher(source: str, by: str = "auto", device: str | torch.device = "cpu") -> Matcher:
    """A pair, or an encoder with its decoder.

    Args:
        source: released name, hub id, folder, .safetensors file, RUN or RUN@STEP.
        by: contrastive (the two towers of a pair), likelihood (the decoder), or auto: what the model has.
        device: where it runs.

    Raises:
        UsageError: nothing to load, an encoder alone, a pair or a decoder where the other is asked for, no tokeniser.
    """
    from aimv2.api.models import load_model
    from aimv2.interop import load

    has_decoder = load.has_decoder(load.locate(source))
    if has_decoder and by == "contrastive":
        raise UsageError(f"--by contrastive: {source} has no text tower; --by likelihood scores texts by its decoder")
    model = load_model(source, decoder=has_decoder, device=device)
    if isinstance(model, LiT):
        if by == "likelihood":
            raise UsageError(
                f"--by likelihood: {source} is a pair without a decoder; --by contrastive reads its towers"
            )
        if model.tokenizer is None:
            raise UsageError(f"MODEL {source}: no tokenizer beside the weights; put CLIP's tokenizer.json there")
        return Matcher(source, "contrastive", model, weights_hash(model), image_transform(model))
    if not isinstance(model, AIMv2):
        raise UsageError(
            f"MODEL {source}: an encoder alone, which reads no text; a pair (LiT) does, and so does scoring by likelihood "
            "with a model that kept its decoder: RUN, or a folder of `aimv2 convert --to safetensors`"
        )
    if not model.decoder.config.text:
        raise UsageError(f"MODEL {source}: its decoder has no text head (it was trained with objective.targets=image)")
    if model.tokenizer is None:
        raise UsageError(f"MODEL {source}: no tokenizer beside the weights; give the RUN, or the folder that it wrote")
    return Matcher(source, "likelihood", model, weights_hash(model), image_transform(model))


def by_cosine(model: LiT, groups: Sequence[Sequence[str]]) -> Scorer:
    """Cosine of an image and a group: the group's vector is the normalised mean of its texts' normalised vectors (CLIP).

    Args:
        model: a pair with its tokeniser.
        groups: G of equally many texts.
    """
    texts = [text for group in groups for text in group]
    with eager():
        parts = [model.encode_text(texts[at : at + TEXTS]).float() for at in range(0, len(texts), TEXTS)]
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
        model: with text head and tokeniser.
        groups: G of equally many texts.
        normalize: sum, mean or prior.
        others: batches of other images, uint8 [B, 3, H, W] (prior alone).

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
    seen = torch.cat(parts)
    prior = seen.logsumexp(0) - math.log(len(seen))  # [G]
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
