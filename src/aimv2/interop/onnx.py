"""ONNX export of the encoder (dynamo exporter), with dynamic batch and, for native models, dynamic height and width."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimv2.errors import UsageError, need
from aimv2.models.encoder import PatchEmbed, VisionEncoder
from aimv2.models.layers import dtype_of
from aimv2.models.lit import LiT
from aimv2.models.positions import resize_positions

FILE = "model.onnx"
INPUT, FEATURES, POOLED = "pixel_values", "features", "pooled"


class Exported(nn.Module):
    """The exported function: normalised float pixels to features, and pooled features if there is a pooling head.

    The image size is not checked here: a graph can't raise an error.
    """

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> Any:
        """[B, 3, H, W] -> [B, I, D], or a pair of that and [B, D]."""
        x = self.encoder.patch_embed(pixel_values)
        features, _ = self.encoder._trunk(x, None, ())
        return features if self.encoder.head is None else (features, self.encoder.head(features))


class Placed(nn.Module):
    """A patch embedding whose positions are those of one grid."""

    def __init__(self, embed: PatchEmbed, grid: tuple[int, int]) -> None:
        super().__init__()
        self.proj, self.norm = embed.proj, embed.norm
        self.position = nn.Parameter(resize_positions(embed.position, grid))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, I, D]."""
        x: Tensor = self.norm(self.proj(images).flatten(2).transpose(1, 2))
        return x + self.position


class ExportedBackbone(nn.Module):
    """The exported function of a backbone at its configuration's image size: normalised float pixels to its feature maps."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).eval().float()
        encoder, sides = self.backbone.encoder, self.backbone.config.sides
        self.pixels = torch.zeros(2, 3, *sides)
        if encoder.config.image_size is not None:
            encoder.patch_embed = Placed(encoder.patch_embed, self.backbone.embed(self.pixels)[1])

    def forward(self, pixel_values: Tensor) -> Any:
        """[B, 3, H, W] -> the maps or tokens of each stage."""
        return self.backbone(pixel_values).feature_maps


def image_encoder(model: nn.Module, to: str) -> VisionEncoder:
    """An fp32 copy of the image encoder of ``model``.

    Raises:
        UsageError: there is none.
    """
    image = model.image if isinstance(model, LiT) else model
    if not isinstance(image, VisionEncoder):
        raise UsageError(f"--to {to}: an image encoder is expected, got {type(image).__name__}")
    return copy.deepcopy(image).eval().float()


def example(encoder: VisionEncoder) -> tuple[Tensor, dict[str, Any]]:
    """Example input for tracing, and its dynamic dimensions."""
    config = encoder.config
    side = config.image_size or config.patch_size * 12
    pixels = torch.zeros(2, 3, side, side if config.image_size else side + 2 * config.patch_size)
    dynamic: dict[int, Any] = dict.fromkeys((0,) if config.image_size else (0, 2, 3), torch.export.Dim.DYNAMIC)
    return pixels.to(encoder.mean.device, dtype_of(encoder)), {"pixel_values": dynamic}


def to_onnx(model: nn.Module, out: Path) -> None:
    """Write ``model.onnx`` into ``out`` (large models: weights in a separate file next to it).

    Args:
        model: VisionEncoder or LiT: ``features`` and with a pooling head ``pooled``; Aimv2Backbone: its ``out_features``, for images of
            its configuration's size.
        out: an existing folder.

    Raises:
        UsageError: no image encoder, or the extra is not installed.
    """
    need("onnx", "onnx", "--to onnx")
    need("onnxscript", "onnx", "--to onnx")
    wrapped: nn.Module
    if hasattr(model, "out_features"):
        wrapped = ExportedBackbone(model)
        pixels, names = wrapped.pixels, wrapped.backbone.out_features
        dynamic: dict[str, Any] = {INPUT: {0: torch.export.Dim.DYNAMIC}}
    else:
        encoder = image_encoder(model, "onnx")
        pixels, dynamic = example(encoder)
        wrapped, names = Exported(encoder), [FEATURES] + ([POOLED] if encoder.head is not None else [])
    logger = logging.getLogger("torch.onnx")  # logs every optional library that is not installed
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                wrapped,
                (pixels,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=names,
                dynamic_shapes=dynamic,
            )
        for node in program.model.graph.all_nodes():  # paths of this machine
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        large = sum(p.numel() for p in wrapped.parameters()) * 4 > 1.5e9
        program.save(str(out / FILE), external_data=large)
    finally:
        logger.setLevel(before)
