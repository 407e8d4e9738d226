"""A model out, in the layout of the tool that will open it. Values are moved, never computed: back in, every bit is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aimv2.errors import UsageError, nearest
from aimv2.interop import layouts
from aimv2.interop.card import timm_name
from aimv2.interop.layouts import Rules
from aimv2.interop.model_folder import CONFIG, WEIGHTS, save_model
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.layers import NORM_EPS
from aimv2.models.lit import LiT
from aimv2.models.sizes import EncoderConfig

FORMATS = ("released", "transformers", "timm", "onnx", "openvino", "safetensors")


def renamed(model: nn.Module, rules: Rules) -> dict[str, Tensor]:
    """A model's tensors under other names: ours split along the first dimension where a rule names several."""
    state, out = model.state_dict(), dict[str, Tensor]()
    for ours, names in rules.items():
        parts = state[ours].chunk(len(names)) if len(names) > 1 else (state[ours],)
        for name, part in zip(names, parts):
            if name.endswith("position_embedding.weight"):  # transformers keeps an embedding's [positions, width]
                part = part.reshape(part.shape[-2:])
            out[name] = part.detach().cpu().clone()
    return out


def encoder_of(model: nn.Module) -> nn.Module:
    """What of a model the layouts of others can hold: the encoder of an AIMv2; an encoder or a pair as it is."""
    return model.encoder if isinstance(model, AIMv2) else model


def _tensors(model: nn.Module, layout: str) -> dict[str, Tensor]:
    if isinstance(model, LiT):
        return renamed(model, layouts.pair_rules(layout, model.config.encoder, model.config.text))
    assert isinstance(model, VisionEncoder)
    return renamed(model, layouts.encoder_rules(layout, model.config))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def preprocessor(config: EncoderConfig) -> dict[str, Any]:
    """``preprocessor_config.json`` for an image processor of transformers."""
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
    """What both configurations call by the same names."""
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


def _transformers_config(config: EncoderConfig) -> dict[str, Any]:
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
            "transformers layouts keep one number for both (--to safetensors keeps two)"
        )


def to_released(model: nn.Module, out: Path) -> None:
    """The layout of the authors' hub files."""
    image = model.image if isinstance(model, LiT) else model
    assert isinstance(image, VisionEncoder)
    _check_pool(image.config)
    config = _released_config(image.config)
    if isinstance(model, LiT):
        config = {
            "model_type": "aimv2",
            "projection_dim": model.config.projection,
            "init_temperature": model.config.temperature,
            "max_logit_scale": model.config.max_scale,
            "vision_config": config,
            "text_config": _text_config(model, released=True),
        }
    save_file(_tensors(model, "released"), out / WEIGHTS, {"format": "pt"})
    _write_json(out / CONFIG, config)
    _write_json(out / "preprocessor_config.json", preprocessor(image.config))


def to_transformers(model: nn.Module, out: Path) -> None:
    """A folder that ``AutoModel.from_pretrained`` and ``AutoImageProcessor`` open, without code of ours."""
    image = model.image if isinstance(model, LiT) else model
    assert isinstance(image, VisionEncoder)
    _check_pool(image.config)
    config = _transformers_config(image.config)
    if isinstance(model, LiT):
        config = {
            "architectures": ["Aimv2Model"],
            "model_type": "aimv2",
            "projection_dim": model.config.projection,
            "logit_scale_init_value": float(torch.tensor(1 / model.config.temperature).log()),
            "max_logit_scale": model.config.max_scale,
            "vision_config": config,
            "text_config": _text_config(model, released=False),
        }
    config["dtype"] = str(next(image.parameters()).dtype).removeprefix("torch.")
    save_file(_tensors(model, "transformers"), out / WEIGHTS, {"format": "pt"})
    _write_json(out / CONFIG, config)
    _write_json(out / "preprocessor_config.json", preprocessor(image.config))


def to_timm(model: nn.Module, out: Path) -> None:
    """A file for timm's ``aimv2_*`` models (``timm.create_model(NAME, checkpoint_path=OUT/model.safetensors)``).

    Of a pair the trunk of the image encoder alone: the layout has neither text tower nor pooling head.
    """
    image = model.image if isinstance(model, LiT) else model
    assert isinstance(image, VisionEncoder)
    config = replace(image.config, pool_heads=0) if isinstance(model, LiT) else image.config
    if config.image_size is None:
        raise UsageError("timm has no native AIMV2; --to released, transformers or onnx")
    tensors = renamed(image, layouts.encoder_rules("timm", config))
    name = timm_name(config)
    about = {
        "architecture": name or "vit",
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
        # what a VisionTransformer of timm with these weights is made of
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
        },
    }
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    _write_json(out / CONFIG, about)


def check_format(to: str) -> None:
    """Raises UsageError for a format that is none."""
    if to not in FORMATS:
        raise UsageError(f"--to {to}: one of {', '.join(FORMATS)} is expected{nearest(to, FORMATS)}")


def check_out(out: str | Path) -> Path:
    """A path to write into; nothing is made yet.

    Raises:
        UsageError: the path is a file, or a folder that holds something.
    """
    path = Path(out).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"OUT {out}: something is there already; give a new folder, or an empty one")
    return path


def convert(
    model: nn.Module,
    out: str | Path,
    to: str,
    card: str = "",
    beside: Callable[[Path], None] | None = None,
    **options: Any,
) -> Path:
    """Writes a model in another layout; where that fails, nothing of it is left, folders included.

    Args:
        model: VisionEncoder, LiT or AIMv2 (of which ``safetensors`` keeps the decoder; the others hold no decoder).
        out: a new or empty folder.
        to: of FORMATS.
        card: README.md of the folder; none where empty.
        beside: writes what else belongs into the folder.
        **options: of the exporter (see :mod:`aimv2.interop.onnx` and :mod:`aimv2.interop.openvino`).

    Returns:
        the folder.

    Raises:
        UsageError: an unknown format, something in ``out``, a model that the format can't hold.
    """
    check_format(to)
    from aimv2.interop.onnx import to_onnx
    from aimv2.interop.openvino import to_openvino

    writers: dict[str, Callable[..., None]] = {
        "released": lambda: to_released(encoder_of(model), folder),
        "transformers": lambda: to_transformers(encoder_of(model), folder),
        "timm": lambda: to_timm(encoder_of(model), folder),
        "onnx": lambda: to_onnx(encoder_of(model), folder),
        "openvino": lambda **options: to_openvino(encoder_of(model), folder, **options),
        "safetensors": lambda: save_model(model, folder),
    }
    folder = check_out(out)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writers[to](**options)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
        if beside is not None:
            beside(folder)
    except BaseException:
        for path in folder.iterdir() if folder.is_dir() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in new:
            with suppress(OSError):
                path.rmdir()
        raise
    return folder
