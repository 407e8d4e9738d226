"""The table of model sizes (AIMV2, Table 1). To add a size, add a row to SIZES and one to SERIES."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from aimv2.errors import UsageError, nearest

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LARGEST = 20.0  # magnitude of a normalised pixel; the released models' own end at 2.7
NATIVE_PATCHES = (112, 4096)  # supported range of the released native model


def wrong_image_dtype(dtype: Any) -> str:
    """Error message for images of an integer type other than uint8."""
    return (
        f"images of {dtype}: uint8 (0..255) or normalised float expected; use images.to(torch.uint8) if they are 0..255"
    )


@cache
def warn_unit_range() -> None:
    """Warn, once a process, that images look like pixels in 0..1."""
    warnings.warn(
        "all pixels of these images lie in 0..1: uint8 images are expected in 0..255, float images normalised by the model's mean "
        "and std; of pixels in 0..1 make (images * 255).round().to(torch.uint8)",
        stacklevel=5,
    )


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of a vision encoder. ``image_size`` None: any size, 2-D sine-cosine positions (native)."""

    name: str
    width: int
    depth: int
    heads: int
    hidden: int  # SwiGLU width in units, not a ratio
    patch_size: int
    image_size: int | None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    min_patches: int = NATIVE_PATCHES[0]  # native only
    max_patches: int = NATIVE_PATCHES[1]
    pool_heads: int = 0  # heads of the attention pooling head (released LiT); 0: no such head

    @property
    def patches(self) -> int:
        """I, patches per image of the fixed size."""
        assert self.image_size is not None, "a native model has no fixed number of patches"
        return (self.image_size // self.patch_size) ** 2

    def check_values(self, low: float, high: float, bytes: bool) -> None:
        """Raise ValueError for float images that can't be normalised; warn once a process where they are likely pixels in 0..1.

        Args:
            low, high: smallest and largest value.
            bytes: of uint8 images.
        """
        ends = [(end - mean) / std for mean, std in zip(self.mean, self.std) for end in (0, 1)]  # of normalised pixels
        if not bytes and max(-low, high) > max(LARGEST, 2 * max(map(abs, ends))):
            raise ValueError(
                f"float images count as normalised, and these reach {max(low, high, key=abs):.4g}: give pixels in 0..255 as uint8 "
                "(images.to(torch.uint8)), or images normalised by the model's own mean and std"
            )
        if 0 <= low < high <= 1 and (bytes or min(ends) < 0):
            warn_unit_range()

    def check_pixels(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError for an image shape that this model does not support."""
        if len(shape) != 4 or shape[1] != 3:
            turn = "permute(0, 3, 1, 2)" if len(shape) == 4 else "permute(2, 0, 1)[None]"
            hint = "; one image: images[None]" if len(shape) == 3 else ""
            if len(shape) in (3, 4) and shape[-1] == 3 and 3 not in shape[-3:-1]:
                hint = f"; channels come first: images.{turn}"
            raise ValueError(f"images must be [B, 3, H, W], got {list(shape)}{hint}")
        height, width = shape[2:]
        if self.image_size is not None and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"{self.name} takes {self.image_size} x {self.image_size} px, got {height} x {width}; resize with "
                "aimv2.image_transform, or create the model with another image_size"
            )
        patches = (height // self.patch_size) * (width // self.patch_size)
        if self.image_size is None and not self.min_patches <= patches <= self.max_patches:
            raise ValueError(
                f"{self.name} takes {self.min_patches} to {self.max_patches} patches of {self.patch_size} px, "
                f"got {height} x {width} px = {patches} patches; scale with aimv2.image_transform"
            )


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of the multimodal decoder; the defaults are the paper's, the same for every encoder size."""

    width: int = 1024
    depth: int = 12
    heads: int = 8
    hidden: int = 2816
    vocab_size: int = 32000
    max_text: int = 77  # caption tokens, end of text included
    separate: bool = False  # two trunks, one for pixels and one for text (Table 9d)
    pixels: bool = True  # pixel head
    text: bool = True  # text head


@dataclass(frozen=True)
class Size:
    """Encoder shape, and the decoder used in its pre-training."""

    width: int
    depth: int
    heads: int
    hidden: int
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


# head dim 128 unless noted
SIZES = {
    "large": Size(1024, 24, 8, 2816),
    "huge": Size(1536, 24, 12, 4096),
    "1B": Size(2048, 24, 16, 5632),
    "3B": Size(3072, 24, 24, 8192),
    "base": Size(768, 12, 6, 2048, DecoderConfig(768, 6, 6, 2048)),
    # ours, head dim 64
    "small": Size(384, 12, 6, 1024, DecoderConfig(384, 4, 6, 1024)),
    "mini": Size(256, 8, 4, 704, DecoderConfig(256, 2, 4, 704)),
    "tiny": Size(128, 6, 2, 384, DecoderConfig(128, 2, 2, 384)),
}

# (size, patch, image sizes; None = native)
SERIES: list[tuple[str, int, list[int | None]]] = [
    *[(size, 14, [224, 336, 448, None]) for size in ("large", "huge", "1B", "3B")],
    ("base", 14, [224, 336, 448, None]),
    ("small", 14, [224, 112]),
    ("small", 4, [32]),
    ("mini", 14, [112]),
    ("mini", 4, [32]),
    ("tiny", 14, [112]),
    ("tiny", 8, [32]),
    ("tiny", 4, [32, None]),
]


def _table() -> dict[str, tuple[EncoderConfig, DecoderConfig]]:
    table = {}
    for size, patch, images in SERIES:
        row = SIZES[size]
        for image in images:
            name = f"aimv2-{size}-patch{patch}-{image or 'native'}"
            encoder = EncoderConfig(name, row.width, row.depth, row.heads, row.hidden, patch, image)
            table[name] = (encoder, row.decoder)
    return table


MODELS = _table()


def list_models(pattern: str = "*") -> list[str]:
    """Names that :func:`aimv2.create_model` takes, those that match ``pattern`` (``"*-448"``), in order of size."""
    return [name for name in MODELS if fnmatchcase(name, pattern)]


def model_config(
    name: str, decoder: dict[str, Any] | None = None, **overrides: Any
) -> tuple[EncoderConfig, DecoderConfig]:
    """Configs of a named model, with overrides.

    Args:
        name: one of :func:`list_models`.
        decoder: values of :class:`DecoderConfig` to replace.
        **overrides: values of :class:`EncoderConfig` to replace.

    Raises:
        UsageError: an unknown name or value, an image size that the patch does not divide, heads that do not divide
            the width.
    """
    if name == "auto":  # a run without a recipe chooses by the size of its images
        raise UsageError(
            "model.name auto: the recipe names no model; give --model.name NAME (`aimv2 models` lists them)"
        )
    if name not in MODELS:
        raise UsageError(f"model.name: no model '{name}'{nearest(name, MODELS)} (aimv2.list_models() names them all)")
    encoder, default_decoder = MODELS[name]
    for given, kind in ((overrides, EncoderConfig), (decoder or {}, DecoderConfig)):
        known = [f.name for f in fields(kind)]
        for key in given:
            if key not in known:
                raise UsageError(f"unknown model option '{key}'{nearest(key, known)}", code="unknown")
    encoder = replace(encoder, **overrides)
    result = replace(default_decoder, **(decoder or {}))
    check_config(encoder, result)
    return encoder, result


def encoder_parameters(config: EncoderConfig) -> int:
    """Parameters of an encoder, without building it."""
    width, pixels = config.width, 3 * config.patch_size**2
    block = 2 * width + 4 * width**2 + 3 * width * config.hidden
    head = width + 3 * width**2 + width if config.pool_heads else 0
    positions = config.patches * width if config.image_size is not None else 0
    return width * pixels + 2 * width + positions + config.depth * block + width + head


def encoder_flops(config: EncoderConfig, patches: int | None = None) -> int:
    """Forward FLOPs (2 per multiply-add) of one image: matmuls of the linears and of attention.

    Args:
        config: the encoder.
        patches: patches of the image; None: those of the fixed size, 256 for a native model.
    """
    count = patches or (config.patches if config.image_size is not None else 256)
    width = config.width
    block = 2 * (4 * width**2 + 3 * width * config.hidden) + 4 * width * count
    return count * (2 * 3 * config.patch_size**2 * width + config.depth * block)


def check_config(encoder: EncoderConfig, decoder: DecoderConfig) -> None:
    """Raise UsageError where the numbers do not fit each other."""
    for part, names, shape in (
        ("model.", ("patch_size", "width", "depth", "heads", "hidden"), encoder),
        ("model.decoder_", ("width", "depth", "heads", "hidden", "vocab_size", "max_text"), decoder),
    ):
        for name in names:
            if getattr(shape, name) < 1:
                raise UsageError(f"{part}{name} must be at least 1, got {getattr(shape, name)}")
    if encoder.image_size is not None and encoder.image_size % encoder.patch_size:
        raise UsageError(
            f"model.image_size {encoder.image_size} is not a multiple of model.patch_size {encoder.patch_size}"
        )
    if encoder.image_size is not None and encoder.patches < 2:
        raise UsageError(
            f"model.image_size {encoder.image_size} holds fewer than 2 patches of model.patch_size {encoder.patch_size}",
            code="limit",
        )
    for part, shape in (("model", encoder), ("model.decoder", decoder)):
        if shape.width % shape.heads or (shape.width // shape.heads) % 2:
            raise UsageError(f"{part}.width {shape.width} is not an even multiple of its {shape.heads} heads")
    if not (decoder.pixels or decoder.text):
        raise UsageError("model.decoder needs the pixel head, the text head or both")
