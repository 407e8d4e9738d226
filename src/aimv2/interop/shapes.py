"""Infer model configs from tensors and the configuration files next to them; mismatches are one-line errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimv2.errors import UsageError
from aimv2.interop import layouts, model_folder
from aimv2.interop.layouts import LAYOUTS, Detected
from aimv2.io import POINTER, is_pointer, parse_json, read_file, say
from aimv2.models.lit import LiTConfig, TextConfig
from aimv2.models.sizes import IMAGENET_MEAN, IMAGENET_STD, MODELS, SIZES, DecoderConfig, EncoderConfig

if TYPE_CHECKING:
    from aimv2.interop.load import Weights

PROCESSORS = (
    "processor_config.json",
    "preprocessor_config.json",
)  # newer, older; the first may be of a tokeniser only
STATED = ("image_mean", "image_std", "image_processor_type")
SETTINGS = (
    *STATED,
    "do_",
    "rescale_",
    "mean",
    "std",
    "size",
    "crop_",
    "resample",
    "feature_extractor_type",
    "auto_map",
)
VISION, DECODER = (
    ("vision_config", "encoder", "image_encoder"),
    (
        "decoder",
        "decoder_config",
        "text_decoder",
        "text_decoder_config",
        "multimodal_decoder",
        "language_config",
        "text_config",
    ),
)
HEADS = ("num_attention_heads", "heads", "num_heads", "attention_heads", "n_heads", "n_head", "nhead")
# keys of configurations that change what is computed: the values that AIMV2 has, the first for messages
ACTIVATIONS = ("silu", "swish", None)
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ACTIVATIONS,
    "act_layer": ACTIVATIONS,
    "norm_layer": ("rmsnorm", "RmsNorm", None),
    "num_channels": (3, None),
    "in_chans": (3, None),
    "quantization_config": (None, {}),
    **dict.fromkeys(
        ("qkv_bias", "use_bias", "mlp_bias", "proj_bias", "class_token", "qk_norm", "qkv_norm"), (False, None)
    ),
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no file.

    Raises:
        UsageError: not a JSON object.
    """
    if not path.is_file():
        return {}
    if is_pointer(path):
        raise UsageError(f"{path} is {POINTER}", code="unreadable")
    try:
        value = parse_json(read_file(path))
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} can't be read as JSON: {error}", code="unreadable") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a JSON object is expected", code="unreadable")
    return value


def section(stored: dict[str, Any], key: str) -> dict[str, Any]:
    """A JSON object within a configuration, {} where it is absent; another type is a UsageError."""
    value = stored.get(key)
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"{model_folder.CONFIG}: {key} {value!r}, an object expected")
    return value or {}


def named_section(stored: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The first of several sections that is there, else {}."""
    return next((found for key in keys if (found := section(stored, key))), {})


def check_fixed(stored: dict[str, Any], where: str, **sizes: Any) -> None:
    """Check the keys of a configuration that change what a model computes, and that no AIMV2 has otherwise.

    Args:
        stored: the configuration.
        where: name of the weights, for the message.
        **sizes: what the weights say, by key; None: nothing.

    Raises:
        UsageError: another value.
    """
    given = {**section(stored, "model_args"), **stored}
    for key, allowed in FIXED.items():
        if key in given and given[key] not in allowed:
            raise UsageError(
                f"{where}: {key} {given[key]!r} in {model_folder.CONFIG}; AIMV2 has {allowed[0]!r}", code="unsupported"
            )
    eps = given.get("rms_norm_eps", 1e-5)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or abs(eps - 1e-5) > 1e-9:
        raise UsageError(f"{where}: rms_norm_eps {eps!r} in {model_folder.CONFIG}; AIMV2 has 1e-5", code="unsupported")
    for key, value in sizes.items():
        if value is not None and given.get(key) not in (None, value, [value, value]):
            raise UsageError(
                f"{where}: {key} {given[key]!r} in {model_folder.CONFIG}, {value} by the weights", code="mismatch"
            )


def whole(value: Any, key: str) -> int:
    """Validate a positive integer of a configuration; anything else is a UsageError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{model_folder.CONFIG}: {key} {value!r}, a whole number above 0 expected")
    return value


def configured_int(stored: dict[str, Any], key: str, other: str = "", default: Any = None) -> int | None:
    """A positive integer under ``key`` or under ``other``, else ``default``; None where there is none."""
    value = stored.get(key, stored.get(other, default))
    return None if value is None else whole(value, key)


def configured_heads(stored: dict[str, Any]) -> int | None:
    """Number of attention heads by a configuration; None where it says none."""
    return next((whole(stored[key], key) for key in HEADS if stored.get(key) is not None), None)


def positive(value: Any, key: str) -> float:
    """Validate a finite number above 0 of a configuration; anything else is a UsageError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{model_folder.CONFIG}: {key} {value!r}, a number above 0 expected")
    return float(value)


def dims(weights: Weights, key: str, form: str) -> tuple[int, ...]:
    """Shape of a tensor with the dimensions of ``form``, such as "width, 3, patch, patch".

    Raises:
        UsageError: no such key, or another number of dimensions.
    """
    shape = weights.shape(key)
    if len(shape) != form.count(",") + 1:
        raise UsageError(f"{weights.where}: key '{key}' has shape {list(shape)}, [{form}] expected", code="mismatch")
    return shape


def check_heads(heads: int, width: int, where: str) -> int:
    """Return ``heads`` if they divide the width, else raise UsageError."""
    if width % heads:
        raise UsageError(f"{where}: {heads} attention heads do not divide the width {width}", code="mismatch")
    return heads


def _processor(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """
    Raises:
        UsageError: an older file without any key of an image processor.
    """
    for name in PROCESSORS:
        stored = read_json(folder / name)
        nested: Any = stored.get("image_processor")
        inside, older = isinstance(nested, dict), name == PROCESSORS[1]
        about: dict[str, Any] = nested if inside else stored
        if any(key.startswith(SETTINGS if inside or older else STATED) for key in about):
            return folder / name, about
        if stored and older:
            raise UsageError(f"{folder / name}: nothing of an image processor ({', '.join(STATED)}) in it")
    return None, {}


def processor_file(folder: Path) -> Path | None:
    """The folder's image processor configuration; None where there is none."""
    return _processor(folder)[0]


def read_image_processor(folder: Path) -> dict[str, Any]:
    """Contents of :func:`processor_file`; {} where there is none."""
    return _processor(folder)[1]


def normalization(about: dict[str, Any], where: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and std for pixels in 0..1 equivalent to an image processor or timm's ``pretrained_cfg``; ImageNet's for {}.

    Raises:
        UsageError: a processor that does anything else, or does not state its mean and std.
    """
    if not about:
        return IMAGENET_MEAN, IMAGENET_STD
    if about.get("do_flip_channel_order") or about.get("rescale_offset"):
        raise UsageError(
            f"{where}: its image processor swaps channels or shifts pixels; AIMV2's does not", code="unsupported"
        )
    mean, std = about.get("image_mean") or about.get("mean"), about.get("image_std") or about.get("std")
    if not mean or not std:  # CLIPImageProcessor may omit its defaults
        clip = str(about.get("image_processor_type", "")).startswith("CLIPImageProcessor")
        mean, std = (mean or CLIP_MEAN, std or CLIP_STD) if clip else (mean, std)
    if about.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif not mean or not std:
        if "image_processor_type" in about or "do_normalize" in about:
            raise UsageError(f"{where}: its image processor normalises without stating image_mean and image_std")
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    scale = about.get("rescale_factor", 1 / 255) if about.get("do_rescale", True) else 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
        raise UsageError(f"{where}: rescale_factor {scale!r} of its image processor; a number above 0 expected")
    unit = 255 * scale if abs(255 * scale - 1) > 1e-6 else 1.0
    checked = (three(values, key, where, model_folder.MOST * unit) for values, key in ((mean, "mean"), (std, "std")))
    mean, std = (tuple(value / unit for value in values) for values in checked)
    return mean, std  # type: ignore[return-value]


def depth_of(weights: Weights, template: str, configured: int | None) -> int:
    """Number of blocks: from the configuration if given, checked against the keys.

    Raises:
        UsageError: no block, or fewer than configured; names the first missing key.
    """
    counted = layouts.count_blocks(weights.keys(), template)
    if not counted or counted < (configured or 0):
        raise UsageError(f"{weights.where}: key '{template.format(i=counted)}' is missing", code="mismatch")
    return configured or counted


def encoder_config(
    found: Detected, weights: Weights, stored: dict[str, Any], processor: dict[str, Any]
) -> EncoderConfig:
    """Encoder config from the tensors; heads and depth from the configuration, where there is one.

    Args:
        found: the layout.
        weights: open files.
        stored: ``config.json`` of the encoder, or {}.
        processor: configuration of the image processor, or {}.

    Raises:
        UsageError: a tensor or a value of the configuration that no AIMV2 has.
    """
    ours, prefix = found.layout == "ours", found.image
    if ours:
        embed, block = [f"patch_embed.{key}" for key in layouts.EMBED], [f"blocks.{{i}}.{key}" for key in layouts.BLOCK]
    else:
        embed, block = list(LAYOUTS[found.layout].embed), list(LAYOUTS[found.layout].trunk.block)
    width, _, patch, side = dims(weights, prefix + embed[0], "width, 3, patch, patch")
    if patch != side:
        raise UsageError(
            f"{weights.where}: key '{prefix + embed[0]}' holds patches of {patch} x {side}, squares expected"
        )
    about = {**section(stored, "model_args"), **stored}
    depth = depth_of(weights, prefix + block[0], configured_int(about, "num_hidden_layers", "depth"))
    gate = prefix + block[4].split()[0].format(i=0)
    hidden = dims(weights, gate, "hidden, width")[0] // (2 if ours else 1)
    image_size = grid_of(weights, prefix + embed[3]) * patch if found.position else None
    check_fixed(
        stored, weights.where, hidden_size=width, embed_dim=width, intermediate_size=hidden, patch_size=patch, image_size=image_size,
        img_size=image_size, is_native=False if found.position else None, use_head=True if found.head else None,
    )  # fmt: skip
    heads = configured_heads(about)
    heads = default_heads(width, weights.where) if heads is None else heads
    config = EncoderConfig("", width, depth, check_heads(heads, width, weights.where), hidden, patch, image_size)
    if found.head:
        config = replace(config, pool_heads=heads)
    # timm's older files have the mean and std themselves
    flat = stored if not ours and "mean" in stored and "std" in stored else {}
    mean, std = normalization(processor or section(stored, "pretrained_cfg") or flat, weights.where)
    return replace(config, mean=mean, std=std, name=config_name(config))


def grid_of(weights: Weights, key: str) -> int:
    """Positions per side, from a tensor [1, positions, width] or [positions, width].

    Raises:
        UsageError: another shape, or a number of positions that is no square.
    """
    shape = weights.shape(key)
    if len(shape) not in (2, 3):
        raise UsageError(f"{weights.where}: key '{key}' has shape {list(shape)}, [1, positions, width] expected")
    grid = math.isqrt(count := max(shape[:-1]))
    if grid * grid != count:
        raise UsageError(f"{weights.where}: key '{key}' holds {count} positions, a square grid expected")
    return grid


def three(values: Any, key: str, where: str, most: float = model_folder.MOST) -> tuple[float, float, float]:
    """:func:`aimv2.interop.model_folder.three`, with UsageError for anything else."""
    try:
        return model_folder.three(values, key, most)
    except TypeError as error:
        raise UsageError(f"{where}: {error} (in its configuration)") from None


def default_heads(width: int, where: str) -> int:
    """Number of heads for a known width.

    Raises:
        UsageError: no size has this width, and the number of heads can't be inferred from weights.
    """
    known = {size.width: size.heads for size in SIZES.values()} | {TextConfig.width: TextConfig.heads}
    if width in known:
        return known[width]
    raise UsageError(
        f"{where}: the number of attention heads can't be inferred from weights, and no known size has width {width}; put the "
        f"model's {model_folder.CONFIG} next to them",
        code="missing",
    )


def config_name(config: EncoderConfig) -> str:
    """The table's name for this shape, else a generic one."""
    shape = (config.width, config.depth, config.heads, config.hidden, config.patch_size, config.image_size)
    for name, (row, _) in MODELS.items():
        if shape == (row.width, row.depth, row.heads, row.hidden, row.patch_size, row.image_size):
            return name
    return f"aimv2-width{config.width}-patch{config.patch_size}-{config.image_size or 'native'}"


def pair_config(found: Detected, weights: Weights, stored: dict[str, Any], processor: dict[str, Any]) -> LiTConfig:
    """Config of a LiT pair in the released or transformers layout.

    Raises:
        UsageError: a tensor or a value of the configuration that no pair has.
    """
    image = encoder_config(found, weights, section(stored, "vision_config"), processor)
    names, text = LAYOUTS[found.layout], section(stored, "text_config")
    prefix = found.text or ""
    vocab, width = dims(weights, prefix + names.text[0], "vocabulary, width")
    end, heads = text.get("eos_token_id"), configured_heads(text)
    check_fixed(text, weights.where, hidden_size=width, vocab_size=vocab)
    if end is not None and (isinstance(end, bool) or not isinstance(end, int) or not 0 <= end < vocab):
        raise UsageError(
            f"{model_folder.CONFIG}: eos_token_id {end!r}, one of 0 to {vocab - 1} expected", code="unknown"
        )
    heads = default_heads(width, weights.where) if heads is None else heads
    config = TextConfig(
        width=width,
        depth=depth_of(weights, prefix + names.trunk.block[0], configured_int(text, "num_hidden_layers")),
        heads=check_heads(heads, width, weights.where),
        hidden=dims(weights, prefix + names.trunk.block[4].split()[0].format(i=0), "hidden, width")[0],
        vocab_size=vocab,
        max_text=dims(weights, prefix + names.text[1], "positions, width")[0],
        end=TextConfig.end if end is None else end,
    )
    temperature, scale = stored.get("init_temperature"), stored.get("max_logit_scale")
    return LiTConfig(
        image,
        config,
        dims(weights, names.ends[0], "shared, width")[0],
        LiTConfig.temperature if temperature is None else positive(temperature, "init_temperature"),
        LiTConfig.max_scale if scale is None else positive(scale, "max_logit_scale"),
    )


def decoder_config(weights: Weights, stored: dict[str, Any]) -> DecoderConfig:
    """Decoder config from a checkpoint of the released training code.

    Args:
        weights: open files.
        stored: ``config.json``, or {}; a section of the decoder in it states the heads.

    Raises:
        UsageError: a missing key, a tensor of another number of dimensions, a value of the configuration that no AIMV2 has.
    """
    about = named_section(stored, DECODER)
    theirs = "models.text_decoder."
    names = {ours: theirs + name for ours, name in layouts.TRAINER_DECODER.items()}
    width = dims(weights, names["decoder.project.weight"], "width, encoder")[0]
    trunk = LAYOUTS["trainer"].trunk
    check_fixed(about, weights.where, hidden_size=width, width=width)
    said = {key.removeprefix("decoder_"): n for key, n in {**stored, **about}.items() if key.startswith("decoder_")}
    heads = configured_heads(about) or configured_heads(said)
    if heads is None:
        heads = default_heads(width, weights.where)
        if stored:
            say(f"{weights.where}: heads of the decoder taken from its width: {heads}")
    return DecoderConfig(
        width=width,
        depth=depth_of(weights, theirs + trunk.block[0], configured_int(about, "num_hidden_layers", "depth")),
        heads=check_heads(heads, width, weights.where),
        hidden=dims(weights, theirs + trunk.block[4].split()[0].format(i=0), "hidden, width")[0],
        vocab_size=dims(weights, names["decoder.token_embed.weight"], "vocabulary, width")[0],
        max_text=dims(weights, names["decoder.text_position"], "positions, width")[0] - 1,
    )
