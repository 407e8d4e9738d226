"""Model cards (README.md) of converted models: architecture, size, recipe, measured results, licence.

Licence, figures and recipe of the source's own card are kept, also through several conversions.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from torch import nn

import aimv2
from aimv2.interop import hub
from aimv2.interop.load import ModelSource
from aimv2.interop.model_folder import CONFIG, STEP
from aimv2.interop.public import last_name, public, public_recipe
from aimv2.io import parse_json, parse_yaml, read_file
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT
from aimv2.models.sizes import MODELS, EncoderConfig, encoder_flops
from aimv2.tables import figure

OURS = "import aimv2\n\n{variable} = aimv2.load_model({name!r}{options})"
USE = {
    "transformers": "from transformers import AutoImageProcessor, AutoModel\n\n"
    "model = AutoModel.from_pretrained({name!r})\nprocessor = AutoImageProcessor.from_pretrained({name!r})",
    "timm": "import timm\n\nmodel = timm.create_model({timm!r}, checkpoint_path='{name}/model.safetensors')",
    "backbone": "import aimv2\nfrom transformers import AutoBackbone, AutoImageProcessor\n\n"
    "backbone = AutoBackbone.from_pretrained({name!r})  # or aimv2.Aimv2Backbone.from_pretrained\n"
    "processor = AutoImageProcessor.from_pretrained({name!r})",
    "onnx": "import onnxruntime\n\n"
    "session = onnxruntime.InferenceSession('{name}/model.onnx')  # pixel_values -> features",
    "openvino": "from aimv2.interop.openvino import OpenVINOEncoder\n\nencoder = OpenVINOEncoder({name!r})",
}
TIMM_BASE = "aimv2_large_patch14_224"  # timm's name for sizes that it has no name for; model_args in config.json change its size
LIBRARIES = ("transformers", "timm", "onnx")  # library names on the hub
LICENCE_KEYS = ("license", "license_name", "license_link")  # the hub's spelling
HOLDS_PAIRS = ("released", "transformers", "safetensors")


def left_out(model: nn.Module, to: str) -> list[str]:
    """Parts of a model that a layout can't hold."""
    parts = []
    if isinstance(model, AIMv2) and to != "safetensors":
        parts.append("decoder")
    if isinstance(model, LiT) and to not in HOLDS_PAIRS:
        parts += ["text tower", "image and text projections"]
        if to == "timm":
            parts.append("pooling head")
    if to == "backbone" and encoder_in(model).head is not None:
        parts.append("pooling head")
    return parts


def timm_name(config: EncoderConfig) -> str | None:
    """timm's name for a released shape, None if it has none."""
    row = MODELS[config.name][0] if config.name in MODELS else None
    parts = config.name.split("-")
    if row is None or parts[1] not in ("large", "huge", "1B", "3B") or config.image_size is None:
        return None
    same = ("width", "depth", "heads", "hidden", "patch_size", "image_size")
    if any(getattr(config, key) != getattr(row, key) for key in same):
        return None
    return f"aimv2_{parts[1].lower()}_{parts[2]}_{parts[3]}"


# ---- metadata of the source ----


def run_of(source: ModelSource) -> Path | None:
    """The run folder that contains a model folder, if any."""
    for folder in (source.folder, *source.folder.parents[:4]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


def card_of(source: ModelSource) -> str:
    """README.md next to the weights, "" if there is none.

    Next to a single file without a configuration it may describe something else and is not read.
    """
    path = source.folder / "README.md"
    if not path.is_file() or not (source.folder / CONFIG).is_file():
        return ""
    return read_file(path).decode(errors="replace")


def licence_of(source: ModelSource) -> dict[str, str]:
    """The licence from the source's card, else from config.json, else that of the release.

    Returns:
        ``license``, and ``license_name`` and ``license_link`` where given; {} if none is stated.
    """
    about: Any = {}
    if match := re.match(r"---\n(.*?)\n---\n", card_of(source), re.DOTALL):
        try:
            about = parse_yaml(match[1])
        except yaml.YAMLError:
            about = {}
    stated = {key: str(about[key]) for key in LICENCE_KEYS if isinstance(about, dict) and about.get(key)}
    if stated.get("license", "unknown") != "unknown":
        return stated
    try:
        stored = parse_json(read_file(source.folder / CONFIG))
    except (OSError, ValueError):
        stored = {}
    if isinstance(stored, dict) and isinstance(stored.get("license"), str):
        return {"license": stored["license"]}
    name = source.given.removeprefix(f"{hub.OWNER}/")
    return {"license": hub.LICENCE} if name in hub.RELEASED else {}


def measured(source: ModelSource) -> dict[str, float]:
    """Measured figures of exactly these weights.

    For a run its ``summary.json``, if that is of the same step; else the table of the source's card.
    """
    run = run_of(source)
    if run is None:
        rows = re.findall(r"^\| ([\w/.@-]+) \| (-?[\d.]+(?:e-?\d+)?)(%?) \|$", _table(card_of(source)), re.MULTILINE)
        return {key: float(value) / (100 if sign else 1) for key, value, sign in rows}
    try:
        summary: Any = parse_json(read_file(run / "summary.json"))
    except (OSError, ValueError):
        return {}
    step = STEP.search(source.folder.parent.name)
    if not isinstance(summary, dict) or step is None or summary.get("step") != int(step[1]):
        return {}
    wanted = ("val_", "probe_", "caption_exact")
    return {key: value for key, value in summary.items() if key.startswith(wanted) and isinstance(value, float)}


def _table(text: str) -> str:
    found = re.search(r"^\| measured[^\n]*\n\|---\|---\|\n((?:\|.*\n?)*)", text, re.MULTILINE)
    return found[1] if found else ""


def recipe_of(source: ModelSource) -> str:
    """The recipe of the run, else from the source's card, else ""."""
    run = run_of(source)
    if run is not None:
        return public_recipe(read_file(run / "config.yaml").decode())
    found = re.search(r"^## Recipe\n\n```yaml\n(.*?)\n```", card_of(source), re.MULTILINE | re.DOTALL)
    return public_recipe(found[1]) if found else ""


# ---- the card ----


def card(source: ModelSource | None, model: nn.Module, to: str, name: str, licence: str | None = None) -> str:
    """README.md of a converted model.

    Args:
        source: the model's files; None: it was in memory.
        model: VisionEncoder, LiT or AIMv2.
        to: layout of the output.
        name: name for users: a hub id, or a folder, of which the last part is written.
        licence: licence of the weights; None: as stated by the source, if at all.
    """
    config = encoder_in(model).config
    name = name if hub.is_hub_id(name) and not Path(name).exists() else last_name(name)
    terms = {"license": licence} if licence else licence_of(source) if source else {}
    pair = isinstance(model, LiT) and to in HOLDS_PAIRS
    whole = isinstance(model, AIMv2) and to == "safetensors"
    task = "zero-shot-image-classification" if pair else "image-to-text" if whole else "image-feature-extraction"
    head = [f"{key}: {value}" for key, value in terms.items()]
    head += [f"library_name: {to}"] if to in LIBRARIES else []
    head += [f"pipeline_tag: {task}", "tags: [aimv2, vision]"]
    size = (
        f"{config.image_size} px"
        if config.image_size
        else f"any size, {config.min_patches} to {config.max_patches} patches"
    )
    body = [f"# {config.name}", "", *_what(source, model, to)]
    body += [
        f"- {encoder_flops(config) / 1e9:,.1f} GFLOPs per image"
        + ("" if config.image_size else " of 256 patches (the image encoder)"),
        f"- {config.width} wide, {config.depth} blocks, {config.heads} heads, patches of {config.patch_size} px, {size}",
        f"- pixels: 0..1, mean {list(config.mean)}, std {list(config.std)}",
        f"- licence of the weights: {terms.get('license_name') or terms.get('license') or 'none was given'}",
        "",
        "```python",
        _use(config, to, name, pair, whole),
        "```",
    ]
    if figures := measured(source) if source else {}:
        body += [
            "",
            "| measured | |",
            "|---|---|",
            *(f"| {key} | {figure(key, value)} |" for key, value in figures.items()),
        ]
    if recipe := recipe_of(source) if source else "":
        body += ["", "## Recipe", "", "```yaml", recipe, "```"]
    return "\n".join(["---", *head, "---", "", *body]) + "\n"


def encoder_in(model: nn.Module) -> VisionEncoder:
    """The image encoder of a VisionEncoder, a LiT or an AIMv2."""
    encoder = getattr(model, "encoder", model)
    assert isinstance(encoder, VisionEncoder), type(encoder)
    return encoder


def _what(source: ModelSource | None, model: nn.Module, to: str) -> list[str]:
    """Lines about the architecture and the number of parameters."""
    parts = {"image encoder": _count(encoder_in(model))}
    kind, missing = "vision encoder", left_out(model, to)
    if isinstance(model, LiT) and to in HOLDS_PAIRS:
        kind = "image-text pair (locked-image tuning)"
        parts |= {"text tower": _count(model.text), "projections and scale": _count(model) - _count(model.encoder)}
        parts["projections and scale"] -= parts["text tower"]
    elif isinstance(model, AIMv2) and to == "safetensors":
        kind = "vision encoder with its multimodal decoder"
        parts["decoder"] = _count(model.decoder)
    if "pooling head" in missing:
        parts["image encoder"] -= sum(_count(part) for part in [encoder_in(model).head] if part is not None)
    origin = public(source.given) if source else "a model in memory"
    lines = [f"AIMV2 {kind}, in the {to} layout; written by aimv2 {aimv2.__version__} from {origin}."]
    if missing:
        lines += ["", f"Not included, since the layout can't hold them: {', '.join(missing)}."]
    each = ", ".join(f"{what} {number / 1e6:,.1f}M" for what, number in parts.items())
    return [*lines, "", f"- {sum(parts.values()) / 1e6:,.1f}M parameters" + (f": {each}" if len(parts) > 1 else "")]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _use(config: EncoderConfig, to: str, name: str, pair: bool, whole: bool) -> str:
    """Python code that loads the model."""
    known = timm_name(config)
    if to == "timm" and known is None:  # by the folder's config.json
        return f"import timm\n\nmodel = timm.create_model({f'local-dir:{name}'!r}, pretrained=True)"
    if to in USE:
        return USE[to].format(name=name, timm=known)
    variable = "pair" if pair else "model" if whole else "encoder"
    return OURS.format(variable=variable, name=name, options=", decoder=True" if whole else "")
