"""The card (README.md) of a model that is handed on: size, recipe, measured results, licence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aimv2
from aimv2.interop import hub
from aimv2.interop.load import Source
from aimv2.models.sizes import EncoderConfig, encoder_flops, encoder_parameters

USE = {
    "safetensors": "import aimv2\n\nencoder = aimv2.load_model({name!r})",
    "released": "import aimv2\n\nencoder = aimv2.load_model({name!r})",
    "transformers": "from transformers import AutoImageProcessor, AutoModel\n\n"
    "model = AutoModel.from_pretrained({name!r})\nprocessor = AutoImageProcessor.from_pretrained({name!r})",
    "timm": "import timm\n\nmodel = timm.create_model({timm!r}, checkpoint_path={file!r})",
    "onnx": "import onnxruntime\n\nsession = onnxruntime.InferenceSession({onnx!r})  # pixel_values -> features",
    "openvino": "from aimv2.interop.openvino import OpenVINOEncoder\n\nencoder = OpenVINOEncoder({name!r})",
}


def run_of(source: Source) -> Path | None:
    """The run folder that a model folder lies in, if it does."""
    for folder in (source.folder, *source.folder.parents[:4]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


def licence_of(source: Source) -> str | None:
    """The licence of a released model; None where nobody has said it."""
    name = source.given.removeprefix(f"{hub.OWNER}/")
    return hub.LICENCE if name in hub.RELEASED else None


def measured(source: Source) -> dict[str, float]:
    """What the run measured, from its ``summary.json``."""
    run = run_of(source)
    if run is None or not (run / "summary.json").is_file():
        return {}
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    wanted = ("val_", "probe_", "caption_exact")
    return {key: value for key, value in summary.items() if key.startswith(wanted) and isinstance(value, float)}


def card(source: Source, config: EncoderConfig, to: str, name: str, licence: str | None = None) -> str:
    """README.md of a converted model.

    Args:
        source: where it came from.
        config: of its encoder.
        to: the layout it is in now.
        name: how it will be called: a hub id or a folder.
        licence: of the weights; None: that of the release, else it is said that none was given.
    """
    from aimv2.interop.convert import timm_name

    licence = licence or licence_of(source)
    head = [
        "---",
        f"license: {licence or 'unknown'}",
        "library_name: " + ("transformers" if to == "transformers" else to),
    ]
    head += ["pipeline_tag: image-feature-extraction", "tags: [aimv2, vision]", "---", ""]
    size = (
        f"{config.image_size} px"
        if config.image_size
        else f"any size, {config.min_patches} to {config.max_patches} patches"
    )
    body = [
        f"# {config.name}",
        "",
        f"AIMV2 vision encoder, in the {to} layout; written by aimv2 {aimv2.__version__} from {source.given}.",
        "",
        f"- {encoder_parameters(config) / 1e6:,.1f}M parameters, {encoder_flops(config) / 1e9:,.1f} GFLOP an image",
        f"- {config.width} wide, {config.depth} blocks, {config.heads} heads, patches of {config.patch_size} px, {size}",
        f"- pixels: 0..1, mean {list(config.mean)}, std {list(config.std)}",
        f"- licence of the weights: {licence or 'none was given'}",
        "",
        "```python",
        USE[to].format(name=name, timm=timm_name(config), file=f"{name}/model.safetensors", onnx=f"{name}/model.onnx"),
        "```",
    ]
    if figures := measured(source):
        body += ["", "| measured | |", "|---|---|", *(f"| {key} | {value:.4f} |" for key, value in figures.items())]
    run = run_of(source)
    if run is not None:
        recipe = (run / "config.yaml").read_text().strip()
        body += ["", "## Recipe", "", "```yaml", recipe, "```"]
    return "\n".join([*head, *body]) + "\n"
