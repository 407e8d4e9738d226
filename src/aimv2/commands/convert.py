"""``aimv2 convert``: a model in the layout of the tool that will open it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aimv2.config.types import PathText
from aimv2.errors import UsageError

Target = Literal["released", "transformers", "timm", "onnx", "openvino", "safetensors", "backbone"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
EXAMPLES = """\
aimv2 convert runs/mine exported --to timm
aimv2 convert aimv2-large-patch14-224 graph --to onnx"""


@dataclass(kw_only=True)
class ConvertOptions:
    """Write a model in the layout of the tool that will open it.

    Args:
        source: released name, hub id, folder, .safetensors file, RUN or RUN@STEP
        out: a new or empty folder
        to: released, transformers, timm, onnx, openvino, safetensors (ours, with the decoder) or backbone (for detectors of transformers)
        revision: of a hub id
        precision: of openvino: fp32, bf16 or int8
        images: for int8: a folder of images like those that the model will see
        samples: number of these images to read
        licence: of the weights, for the model card
    """

    source: PathText
    out: PathText
    to: Target = "transformers"
    revision: str | None = None
    precision: Literal["fp32", "bf16", "int8"] | None = None
    images: PathText | None = None
    samples: int = 300
    licence: str | None = None


def run(options: ConvertOptions) -> dict[str, Any]:
    return write(options, options.out)


def write(options: ConvertOptions, name: str) -> dict[str, Any]:
    """Convert; ``name``: how the card calls the model."""
    from aimv2.interop import convert as out_of
    from aimv2.interop import load
    from aimv2.interop.card import card, encoder_in, left_out
    from aimv2.progress import heartbeat

    to, out = options.to, options.out
    out_of.check_format(to)
    for option, value in (("--precision", options.precision), ("--images", options.images)):
        if value is not None and to != "openvino":
            raise UsageError(f"{option} is of --to openvino; --to {to} keeps the weights as they are", code="conflict")
    out_of.check_out(out)
    at = load.locate(options.source, options.revision)
    whole = load.has_decoder(at)
    model: Any = load.load_model(at, decoder=whole and to == "safetensors")
    encoder = encoder_in(model)
    if to == "onnx" and load.read_json(at.folder / "config.json").get("model_type") == "aimv2_backbone":
        from aimv2.features.pixels import quiet
        from aimv2.interop.backbone import Aimv2Backbone

        with quiet():
            model = Aimv2Backbone.from_pretrained(at.folder, trust_remote_code=False, use_safetensors=True)
    more: dict[str, Any] = {}
    if to == "openvino":
        more["precision"] = options.precision or "fp32"
        if options.images is not None:
            more["pixels"] = read_pixels(encoder, options.images, options.samples)
    readme = card(at, model, to, name, options.licence)
    with heartbeat(lambda: f"writing {to}"):
        folder = out_of.convert(model, out, to, readme, lambda folder: copy_tokenizer(at.folder, folder, to), **more)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    missing = left_out(model, to) + (["decoder"] if whole and to != "safetensors" else [])
    return {"out": str(folder), "to": to, "model": encoder.config.name, "left_out": missing, "files": files}


def copy_tokenizer(source: Path, out: Path, to: str) -> None:
    """The tokenizer goes with the models that read or write text."""
    if to in ("safetensors", "released", "transformers"):
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copy(source / name, out / name)


def read_pixels(encoder: Any, images: str, samples: int) -> list[Any]:
    """Up to ``samples`` images of a folder as the encoder sees them, in batches of one size."""
    from aimv2.data.images.decode import ImageError, decode_image
    from aimv2.data.stream.transforms import image_transform
    from aimv2.evals.caption import image_files

    transform, found = image_transform(encoder), list[Any]()
    for path in image_files([images]):
        if len(found) == samples:
            break
        try:
            found.append(transform(decode_image(path))[None])
        except ImageError:
            continue
    return found
