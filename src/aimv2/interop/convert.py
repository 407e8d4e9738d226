"""Export a model to the layout of another tool. Values are copied, never computed: converting back restores every bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aimv2.errors import UsageError, nearest
from aimv2.interop import layouts
from aimv2.interop.card import TIMM_BASE, timm_name
from aimv2.interop.layouts import Rules
from aimv2.interop.model_folder import CONFIG, WEIGHTS, save_model
from aimv2.interop.public import public_files
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.layers import NORM_EPS
from aimv2.models.lit import LiT
from aimv2.models.sizes import EncoderConfig

FORMATS = ("released", "transformers", "timm", "onnx", "openvino", "safetensors", "backbone")


def renamed(model: nn.Module | dict[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Tensors of a model, or of its state, under other names, split along the first dimension where a rule has several."""
    state, out = model if isinstance(model, dict) else model.state_dict(), dict[str, Tensor]()
    for ours, names in rules.items():
        parts = state[ours].chunk(len(names)) if len(names) > 1 else (state[ours],)
        for name, part in zip(names, parts):
            if name.endswith("position_embedding.weight"):  # transformers keeps an embedding's [positions, width]
                part = part.reshape(part.shape[-2:])
            out[name] = part.detach().cpu().clone()
    return out


def encoder_of(model: nn.Module) -> nn.Module:
    """The part of a model that other layouts can hold: the encoder of an AIMv2; an encoder or a pair unchanged."""
    return model.encoder if isinstance(model, AIMv2) else model


def image_part(model: nn.Module) -> VisionEncoder:
    """The VisionEncoder of an encoder or a LiT pair."""
    image = model.image if isinstance(model, LiT) else model
    assert isinstance(image, VisionEncoder)
    return image


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def preprocessor(config: EncoderConfig) -> dict[str, Any]:
    """``preprocessor_config.json`` for transformers' image processors."""
    about: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "resample": 3,  # bicubic
    }
    size = config.image_size
    if size is None:
        return about | {"do_resize": False, "do_center_crop": False}
    crop = {"do_center_crop": True, "crop_size": {"height": size, "width": size}}
    return about | {"do_resize": True, "size": {"shortest_edge": size}} | crop


def _shape(config: EncoderConfig) -> dict[str, Any]:
    """Keys that both configurations share."""
    return {
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "patch_size": config.patch_size,
        "rms_norm_eps": NORM_EPS,
        "qkv_bias": False,
    }


def _released_config(config: EncoderConfig) -> dict[str, Any]:
    about = {"model_type": "aimv2", **_shape(config), "use_bias": False}
    about |= {"attention_dropout": 0.0, "projection_dropout": 0.0}
    return about | ({} if config.image_size is None else {"image_size": config.image_size})


def transformers_config(config: EncoderConfig) -> dict[str, Any]:
    """``config.json`` of an ``Aimv2VisionModel``."""
    return {
        "architectures": ["Aimv2VisionModel"],
        "model_type": "aimv2_vision_model",
        **_shape(config),
        "image_size": config.image_size or 224,
        "hidden_act": "silu",
        "mlp_bias": False,
        "use_head": bool(config.pool_heads),
        "is_native": config.image_size is None,
    }


def _text_config(model: LiT, released: bool) -> dict[str, Any]:
    text = model.config.text
    about: dict[str, Any] = {
        "model_type": "aimv2" if released else "aimv2_text_model",
        "hidden_size": text.width,
        "intermediate_size": text.hidden,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.heads,
        "vocab_size": text.vocab_size,
        "rms_norm_eps": NORM_EPS,
        "eos_token_id": text.end,
        "qkv_bias": False,
    }
    if released:
        return about | {"max_context_length": text.max_text, "use_bias": False}
    return about | {"max_position_embeddings": text.max_text, "hidden_act": "silu", "mlp_bias": False}


def _check_pool(config: EncoderConfig) -> None:
    if config.pool_heads not in (0, config.heads):
        raise UsageError(
            f"MODEL: a pooling head of {config.pool_heads} heads, and {config.heads} in the blocks; the released and "
            "transformers layouts have one number for both (--to safetensors has two)",
            code="unsupported",
        )


def _pair_config(model: LiT, vision: dict[str, Any], released: bool) -> dict[str, Any]:
    start = model.config.temperature
    scale = (
        {"init_temperature": start} if released else {"logit_scale_init_value": float(torch.tensor(1 / start).log())}
    )
    return {
        **({} if released else {"architectures": ["Aimv2Model"]}),
        "model_type": "aimv2",
        "projection_dim": model.config.projection,
        **scale,
        "max_logit_scale": model.config.max_scale,
        "vision_config": vision,
        "text_config": _text_config(model, released),
    }


def to_hub_layout(model: nn.Module, out: Path, layout: str) -> None:
    """Write an encoder or a LiT pair in the layout ``released`` (the authors' files on the hub) or ``transformers``.

    ``AutoModel.from_pretrained`` and ``AutoImageProcessor`` load the transformers layout without code of ours.
    """
    image, released = image_part(model), layout == "released"
    _check_pool(image.config)
    config = _released_config(image.config) if released else transformers_config(image.config)
    if isinstance(model, LiT):
        config = _pair_config(model, config, released)
    if not released:
        config["dtype"] = str(next(image.parameters()).dtype).removeprefix("torch.")
    rules = (
        layouts.pair_rules(layout, model.config.encoder, model.config.text)
        if isinstance(model, LiT)
        else layouts.encoder_rules(layout, image.config)
    )
    save_file(renamed(model, rules), out / WEIGHTS, {"format": "pt"})
    _write_json(out / CONFIG, config)
    _write_json(out / "preprocessor_config.json", preprocessor(image.config))


def to_timm(model: nn.Module, out: Path) -> None:
    """Write a file for timm's ``aimv2_*`` models (``timm.create_model(NAME, checkpoint_path=OUT/model.safetensors)``).

    Of a pair only the trunk of the image encoder: the layout has neither text tower nor pooling head.
    """
    image = image_part(model)
    config = replace(image.config, pool_heads=0) if isinstance(model, LiT) else image.config
    if config.image_size is None:
        raise UsageError(
            "timm has no native AIMV2; --to released, transformers or onnx", option="--to", code="unsupported"
        )
    tensors = renamed(image, layouts.encoder_rules("timm", config))
    ratio = config.hidden / config.width
    if int(config.width * ratio) != config.hidden:  # timm rounds down
        ratio = (config.hidden + 0.5) / config.width
    about = {
        "architecture": timm_name(config) or TIMM_BASE,
        "num_classes": 0,
        "num_features": config.width,
        "global_pool": "avg",
        "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(config.mean),
            "std": list(config.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        # arguments of timm's VisionTransformer for these weights
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": ratio,
        },
    }
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    _write_json(out / CONFIG, about)


def to_backbone(model: nn.Module, out: Path) -> None:
    """Write an ``aimv2.Aimv2Backbone``, its pyramid untrained, which ``AutoBackbone.from_pretrained`` opens after ``import aimv2``.

    The image processor is DETR's: with boxes, shorter sides of 800 px, longer of at most 1,333.
    """
    from aimv2.interop.backbone import Aimv2Backbone
    from aimv2.interop.backbone_config import Aimv2BackboneConfig

    image = image_part(model)
    dtype = next(image.parameters()).dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone: Any = Aimv2Backbone(Aimv2BackboneConfig(image.config, architectures=["Aimv2Backbone"]))
    backbone.to(dtype).config.dtype = dtype
    backbone.fill_encoder(image)
    save_file(backbone.state_dict(), out / WEIGHTS, {"format": "pt"})
    backbone.config.save_pretrained(out)
    about = preprocessor(image.config) | {
        "image_processor_type": "DetrImageProcessor",
        "do_resize": True,
        "do_pad": True,
    }
    about |= {"size": {"shortest_edge": 800, "longest_edge": 1333}}
    for key in ("do_center_crop", "crop_size"):
        about.pop(key, None)
    _write_json(out / "preprocessor_config.json", about)


def check_format(to: str) -> None:
    """Raise UsageError for an unknown format."""
    if to not in FORMATS:
        raise UsageError(f"--to {to}: one of {', '.join(FORMATS)} is expected{nearest(to, FORMATS)}", code="unknown")


def check_out(out: str | Path) -> Path:
    """Check that a path is free or an empty folder; nothing is created.

    Raises:
        UsageError: the path is a file, or a folder that is not empty.
    """
    path = Path(out).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"OUT {out}: something is there already; give a new folder, or an empty one", code="exists")
    return path


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A new or empty folder to write in; on failure nothing is left of it, nor of the folders created above it.

    Raises:
        UsageError: something is there.
    """
    folder = check_out(out)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except BaseException:
        for path in folder.iterdir() if folder.is_dir() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in new:
            with suppress(OSError):
                path.rmdir()
        raise


def convert(
    model: nn.Module,
    out: str | Path,
    to: str,
    card: str = "",
    extra: Callable[[Path], None] | None = None,
    **options: Any,
) -> Path:
    """Write a model in another layout; on failure nothing of it is left, folders included.

    Args:
        model: VisionEncoder, LiT or AIMv2 (only ``safetensors`` keeps its decoder); with ``onnx`` an Aimv2Backbone too.
        out: a new or empty folder.
        to: one of FORMATS.
        card: contents of README.md; none is written if empty.
        extra: writes further files into the folder.
        **options: options of the exporter (see :mod:`aimv2.interop.onnx` and :mod:`aimv2.interop.openvino`).

    Returns:
        the folder.

    Raises:
        UsageError: an unknown format, something in ``out``, a model that the format can't hold.
    """
    check_format(to)
    from aimv2.interop.onnx import to_onnx
    from aimv2.interop.openvino import to_openvino

    writers: dict[str, Callable[..., None]] = {
        "released": partial(to_hub_layout, layout="released"),
        "transformers": partial(to_hub_layout, layout="transformers"),
        "timm": to_timm,
        "onnx": to_onnx,
        "openvino": to_openvino,
        "safetensors": save_model,
        "backbone": to_backbone,
    }
    with new_folder(out) as folder:
        writers[to](model if to == "safetensors" else encoder_of(model), folder, **options)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        if extra is not None:
            extra(folder)
        public_files(folder)
    return folder
