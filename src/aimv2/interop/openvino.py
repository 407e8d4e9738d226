"""OpenVINO export of the encoder: fp32, bf16 (the same file, run in bf16) and int8 (weights and activations, calibrated)."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimv2.errors import UsageError, first_line, nearest, need
from aimv2.interop.onnx import FEATURES, INPUT, POOLED, Exported, example, image_encoder
from aimv2.interop.shapes import read_json, three
from aimv2.models.sizes import NATIVE_PATCHES, EncoderConfig, wrong_image_dtype

FILE = "openvino_model.xml"
ABOUT = "openvino_config.json"
PRECISIONS = ("fp32", "bf16", "int8")
STORED = ("name", "image_size", "patch_size", "mean", "std", "min_patches", "max_patches")  # of the encoder's config


def to_openvino(model: nn.Module, out: Path, precision: str = "fp32", pixels: Sequence[Tensor] | None = None) -> None:
    """Write ``openvino_model.xml``, its ``.bin`` and ``openvino_config.json`` into ``out``.

    Args:
        model: model with an image encoder.
        out: output folder.
        precision: ``fp32``; ``bf16``: bf16 matmuls on processors that have them; ``int8``.
        pixels: uint8 or normalised images [B, 3, H, W] for calibration (int8 only), a few hundred that resemble the images of
            later use.

    Raises:
        UsageError: no image encoder, an unknown precision, int8 without images, the extra is not installed.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"--precision {precision}: one of {', '.join(PRECISIONS)} expected{nearest(precision, PRECISIONS)}",
            code="unknown",
        )
    need("openvino", "openvino", "--to openvino")
    encoder = image_encoder(model, "openvino")
    if precision == "int8":
        need("nncf", "openvino", "--precision int8")
        if not pixels:
            raise UsageError(
                "--precision int8 needs --images: a folder of images to calibrate on, like those of later use",
                option="--images",
                code="missing",
            )
    import openvino

    inputs, dynamic = example(encoder)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Exported(encoder), (inputs,), dynamic_shapes=dynamic)
        graph = openvino.convert_model(program)
    graph.inputs[0].get_tensor().set_names({INPUT})
    for output, name in zip(graph.outputs, (FEATURES, POOLED)):
        output.get_tensor().set_names({name})
    if precision == "int8":
        graph = quantize(graph, [encoder.normalize(part) for part in pixels or ()])
    openvino.save_model(graph, out / FILE, compress_to_fp16=False)
    about = {"precision": precision} | {key: getattr(encoder.config, key) for key in STORED}
    (out / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def quantize(graph: Any, pixels: Sequence[Tensor]) -> Any:
    """Post-training quantisation of matmuls to int8; norms, softmax and residual stream are unchanged."""
    import logging

    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    logging.getLogger("nncf").setLevel(logging.ERROR)
    images = [image[None].numpy() for part in pixels for image in part]
    with contextlib.redirect_stdout(sys.stderr):  # progress bars; standard output is for the result
        return nncf.quantize(
            graph,
            nncf.Dataset(images),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric ranges: a third less error here than asymmetric
            subset_size=len(images),
            fast_bias_correction=True,
            # half the weight range: with the full one the int16 sums of processors without VNNI overflow (cosine to fp32 of
            # a small encoder: 0.94 instead of 0.999)
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
        )


class OpenVINOEncoder:
    """An exported folder, ready to run on the CPU: ``encoder(images)`` -> features, as a tensor."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        need("openvino", "openvino", str(folder))
        import openvino

        path = Path(folder)
        if not (path / FILE).is_file():
            raise UsageError(
                f"MODEL {folder}: no {FILE}; write one with: aimv2 convert SRC OUT --to openvino", code="not-found"
            )
        self.folder, self.threads = path, threads
        self.about = read_json(path / ABOUT)
        self.config = input_config(path, self.about)
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        options["INFERENCE_PRECISION_HINT"] = "bf16" if self.about["precision"] == "bf16" else "f32"
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            self.run = openvino.Core().compile_model(path / FILE, "CPU", options)
        except Exception as error:  # of its C++ part
            raise UsageError(
                f"MODEL {folder}: OpenVINO can't open {FILE}: {first_line(error)}", code="unreadable"
            ) from None
        self.mean, self.std = (torch.tensor(part).view(1, 3, 1, 1) for part in (self.config.mean, self.config.std))

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: the folder is opened again."""
        return type(self), (self.folder, self.threads)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 or normalised float [B, 3, H, W] -> float32 [B, I, D].

        Raises:
            ValueError: integers other than uint8, floats of magnitudes above 20, or an unsupported image shape.
        """
        self.config.check_pixels(tuple(images.shape))
        if images.numel() and (images.dtype.is_floating_point or images.dtype == torch.uint8):
            self.config.check_values(float(images.min()), float(images.max()), images.dtype == torch.uint8)
        if images.dtype == torch.uint8:
            images = (images.float() / 255 - self.mean) / self.std
        elif not images.is_floating_point():
            raise ValueError(wrong_image_dtype(images.dtype))
        return torch.from_numpy(self.run(images.float().numpy())[0].copy())


def input_config(folder: Path, about: dict[str, Any]) -> EncoderConfig:
    """The input part of the encoder config, from ``openvino_config.json``; the trunk's shape is in the graph.

    Raises:
        UsageError: a value is missing or of another type.
    """
    low, high = about.get("min_patches", NATIVE_PATCHES[0]), about.get("max_patches", NATIVE_PATCHES[1])
    size, patch = about.get("image_size"), about.get("patch_size")
    numbers = [patch, low, high] if size is None else [patch, low, high, size]
    if about.get("precision") not in PRECISIONS or not all(isinstance(value, int) and value > 0 for value in numbers):
        raise UsageError(
            f"{folder / ABOUT}: written by another program, or broken; convert the model again", code="unreadable"
        )
    mean, std = (three(about.get(key), key, str(folder / ABOUT)) for key in ("mean", "std"))
    name = str(about.get("name", folder.name))
    return EncoderConfig(name, 0, 0, 0, 0, int(patch or 0), size, mean, std, low, high)
