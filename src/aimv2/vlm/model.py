"""The same vision-language model of our own encoder: what the folder of ``aimv2 vlm build`` computes, and images of several grids
in one batch.

Legend: B rows, T tokens, M images, N patches, D width of the encoder, L width of the language model, V vocabulary, g tiles a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimv2.errors import UsageError, first_line
from aimv2.features.foreign import open_transformers
from aimv2.features.pixels import quiet
from aimv2.interop import layouts, load
from aimv2.interop.plain import open_plain
from aimv2.interop.shapes import normalization, read_json
from aimv2.models.encoder import VisionEncoder
from aimv2.models.layers import NORM_EPS
from aimv2.models.sizes import EncoderConfig
from aimv2.vlm.build import POST, PRE, connector_of
from aimv2.vlm.language import is_vlm, named


class VisionLanguage(nn.Module):
    """Encoder, connector and language model; image features take the places of the image tokens.

    Attributes:
        encoder: [M, 3, H, W] -> [M, N, D].
        connector: D -> L.
        language: the language model without its head, of transformers.
        head: L -> V.
        newline: [L], after each row of patches of the tiles; None without tiles.
        ends: token ids that end an answer, besides those of the language model's configuration.
    """

    def __init__(
        self, encoder: VisionEncoder, connector: nn.Module, language: Any, head: nn.Module, image_id: int, features: str = POST,
        newline: nn.Parameter | None = None, ends: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.connector, self.language, self.head = encoder, connector, language, head
        self.image_id, self.features, self.newline = image_id, features, newline
        self.ends = tuple(ends)

    def connector_input(self, images: Tensor | Sequence[Tensor]) -> Any:
        """Images as the encoder takes them -> [M, N, D], of a list of M images a list of [N, D]: post-norm or pre-norm features."""
        if self.features == POST:
            return self.encoder(images)
        return self.encoder(images, layers=[-1])[1][0]

    def image_embeddings(self, images: Tensor | Sequence[Tensor], sizes: Tensor | None = None) -> Tensor:
        """What takes the places of the image tokens, of all images one after another: [image tokens, L].

        Args:
            images: [M, 3, H, W], a list of [3, H, W], or with tiles [M, 1 + g * g, 3, H, W], the thumbnail first.
            sizes: with tiles: heights and widths of the original images, int64 [M, 2].
        """
        if isinstance(images, Tensor) and images.ndim == 5:
            assert sizes is not None
            return torch.cat(self.tile_embeddings(images, sizes))
        x = self.connector_input(images)
        return self.connector(x.flatten(0, 1) if isinstance(x, Tensor) else torch.cat(x))

    def tile_embeddings(self, images: Tensor, sizes: Tensor) -> list[Tensor]:
        """Of each of M images with tiles what takes the places of its tokens; the arguments of :meth:`image_embeddings`."""
        x = self.connector(self.connector_input(images.flatten(0, 1))).unflatten(0, images.shape[:2])
        return [self.unrolled(one, tuple(size)) for one, size in zip(x, sizes.tolist())]

    def unrolled(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """[1 + g * g, N, L] of one image: the thumbnail's patches, then rows across all tiles without padding, a newline after each.

        Args:
            x: of the thumbnail and the tiles.
            size: height and width of the original image, whose aspect ratio says what is padding.
        """
        assert self.newline is not None
        grid, side = round((len(x) - 1) ** 0.5), round(x.shape[1] ** 0.5)
        rows = (
            x[1:].unflatten(1, (side, side)).unflatten(0, (grid, grid)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        )  # [gh, gw, L]
        whole, (height, width) = grid * side, size
        kept = int(round(min(size) * (whole / max(size)), 7))
        cut = slice((whole - kept) // 2, whole - (whole - kept) // 2)
        rows = rows[cut] if height < width else rows[:, cut]
        rows = torch.cat((rows, self.newline.expand(len(rows), 1, -1)), 1)
        return torch.cat((x[0], rows.flatten(0, 1)))

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Token ids and images -> logits [B, T, V].

        Args:
            input_ids: int64 [B, T]; an image token for each feature of each image, in order.
            images: see :meth:`image_embeddings`.
            attention_mask: [B, T], 0 for padding.
            sizes: see :meth:`image_embeddings`.

        Raises:
            UsageError: rows longer than the context, or another number of image tokens than features.
        """
        context = getattr(self.language.config, "max_position_embeddings", None)
        here = input_ids == self.image_id
        if context is not None and input_ids.shape[1] > context:
            raise UsageError(
                f"input_ids: {input_ids.shape[1]:,} tokens a row, {int(here.sum(1).max()):,} of them of images, and a context of "
                f"{context:,}; fewer images, or a VLM built with smaller --tiles",
                code="limit",
            )
        x = self.language.get_input_embeddings()(input_ids)
        if images is not None:
            features = self.image_embeddings(images, sizes).to(x.dtype)
            if len(features) != here.sum():
                raise UsageError(
                    f"input_ids: {int(here.sum()):,} image tokens for {len(features):,} features of images",
                    code="mismatch",
                )
            x = x.masked_scatter(here[..., None], features)
        return self.head(self.language(inputs_embeds=x, attention_mask=attention_mask).last_hidden_state)


def holds_vlm(folder: Path) -> bool:
    """Whether a folder holds a model of ``aimv2 vlm build``."""
    config = read_json(folder / "config.json")
    tower = config.get("vision_config")
    return isinstance(tower, dict) and tower.get("model_type") == "aimv2_vision_model" and is_vlm(config)


def vlm_folder(source: str | Path, option: str = "VLM") -> Path:
    """The folder of a vision-language model of ``aimv2 vlm build``, or of a run that trained one.

    Raises:
        UsageError: nothing there, an encoder or another model.
    """
    with named(option):
        at = load.locate(source)
        if not holds_vlm(at.folder):
            config = read_json(at.folder / "config.json")
            kind = str(config.get("model_type", "an AIMV2" if config.get("format") == "aimv2" else "none"))
            kind = "an encoder" if "aimv2" in kind.lower() else f"model_type '{kind}'"
            raise UsageError(
                f"MODEL {source}: {kind}; a folder of `aimv2 vlm build ENCODER LLM OUT` is expected", code="mismatch"
            )
    return at.folder


def open_processor(folder: Path, option: str = "VLM") -> Any:
    """The processor of a folder; it resizes with Pillow also where torchvision is installed, whose pixels differ by a grey level.

    Raises:
        UsageError: it can't be opened.
    """
    try:
        with quiet():
            return open_plain("AutoProcessor", folder, backend="pil")
    except Exception as error:  # of the file system, of a configuration
        raise UsageError(
            f"{option} {folder}: its processor can't be opened ({first_line(error)})", code="unreadable"
        ) from None


def open_folder(source: str | Path, option: str = "VLM") -> tuple[Any, Any]:
    """The model and the processor of a folder of ``aimv2 vlm build``, both of transformers; ``option``: for messages.

    Raises:
        UsageError: an encoder or another model, incomplete weights, a processor that can't be opened.
    """
    folder = vlm_folder(source, option)
    with named(option):
        model, missing = open_transformers(str(source), folder, "cpu", "AutoModelForImageTextToText")
    if missing:
        raise UsageError(f"{option} {source}: its weights lack {', '.join(list(missing)[:3])}", code="mismatch")
    return model, open_processor(folder, option)


def open_vlm(source: str | Path, option: str = "VLM") -> tuple[VisionLanguage, Any]:
    """A folder of ``aimv2 vlm build`` with our own encoder in place of the tower, and its processor; ``option``: for messages.

    Raises:
        UsageError: see :func:`open_folder`.
    """
    model, processor = open_folder(source, option)
    inner = model.model
    tower = getattr(inner, "vision_tower", None) or inner.vision_model
    parts = connector_of(model), inner.language_model, model.lm_head
    features = PRE if hasattr(inner, "vision_tower") else POST
    about = processor.image_processor.to_dict()
    encoder = encoder_of(tower, about, str(source))
    newline = getattr(inner, "image_newline", None)
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or ()
    return VisionLanguage(encoder, *parts, processor.image_token_id, features, newline, ends).eval(), processor


def encoder_of(tower: Any, about: dict[str, Any], source: str) -> VisionEncoder:
    """Our encoder with the weights of an ``Aimv2VisionModel``.

    Args:
        tower: of transformers.
        about: configuration of its image processor.
        source: for messages.
    """
    config = encoder_shape(tower.config, about, source)
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    state, shapes = tower.state_dict(), {key: value.shape for key, value in encoder.state_dict().items()}
    rules = layouts.encoder_rules("transformers", config)
    filled = {ours: torch.cat([state[name] for name in names]).reshape(shapes[ours]) for ours, names in rules.items()}
    encoder.to_empty(device="cpu").load_state_dict(filled, assign=True)
    encoder.fill_constants()
    return encoder.eval()


def encoder_shape(given: Any, about: dict[str, Any], source: str) -> EncoderConfig:
    """Shape of the encoder of an ``Aimv2VisionConfig``; the other arguments are those of :func:`encoder_of`.

    Raises:
        UsageError: norms of another epsilon.
    """
    if given.rms_norm_eps != NORM_EPS:
        raise UsageError(
            f"VLM {source}: its encoder has rms_norm_eps {given.rms_norm_eps}, {NORM_EPS} expected", code="mismatch"
        )
    mean, std = normalization(about, source)
    size = None if given.is_native else given.image_size
    shape = given.hidden_size, given.num_hidden_layers, given.num_attention_heads, given.intermediate_size
    any_grid = 1, 1 << 30  # what the processor gives, as in the tower
    return EncoderConfig("aimv2", *shape, given.patch_size, size, mean, std, *any_grid)
