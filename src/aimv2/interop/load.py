"""Any AIMV2 from anywhere: released name, hub id, folder, file, run. The layout is found from the keys.

Nothing here unpickles: weights are safetensors, the rest is JSON. A model is built without memory and every tensor is copied
from the mapped file straight into its place, so that weights are never held twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from aimv2.errors import UsageError, nearest
from aimv2.interop import hub, layouts, model_folder
from aimv2.interop.layouts import LAYOUTS, Found, Rules
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT, LiTConfig, TextConfig
from aimv2.models.sizes import MODELS, SIZES, DecoderConfig, EncoderConfig

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    Attributes:
        given: what the user wrote.
        folder: that holds config, preprocessor and tokeniser; may hold none of them.
        files: the weights.
    """

    given: str
    folder: Path
    files: tuple[Path, ...]


def locate(source: str | Path, revision: str | None = None) -> Source:
    """The files behind MODEL.

    Args:
        source: released name, hub id, folder, ``.safetensors`` file, RUN or RUN@STEP.
        revision: of a hub id or released name.

    Raises:
        UsageError: nothing there; a pickle.
    """
    text = str(source)
    path = Path(text).expanduser()
    if path.is_file() or path.is_dir():
        if revision is not None:
            raise UsageError(f"revision {revision}: {text} is on this machine, which has no revisions")
        return _from_file(text, path) if path.is_file() else _from_folder(text, path)
    if text in hub.RELEASED:
        return _from_folder(text, hub.download(f"{hub.OWNER}/{text}", revision or hub.RELEASED[text]))
    if path.suffix in (".safetensors", *PICKLES):
        raise UsageError(f"MODEL {text}: no such file")
    run, at, step = text.rpartition("@")
    if hub.is_hub_id(text) and not path.parent.exists():
        name = text.split("/")[1]
        pinned = hub.RELEASED.get(name) if text == f"{hub.OWNER}/{name}" else None
        return _from_folder(text, hub.download(text, revision or pinned))
    if at and step.isdigit() and Path(run).exists():
        return _from_folder(text, model_folder.find_model(text))
    raise UsageError(f"MODEL {text}: {missing(text)}")


def missing(text: str) -> str:
    """What is wrong with a MODEL that names nothing."""
    if text in MODELS:
        return f"it has no released weights; aimv2.create_model('{text}') gives it with random ones"
    known = [*hub.RELEASED, *MODELS]
    return (
        "no such file, folder, run or released name (a hub id has the form owner/name)"
        f"{nearest(text, known)}; `aimv2 models` lists the names"
    )


def _from_file(given: str, path: Path) -> Source:
    if path.suffix in PICKLES:
        raise UsageError(f"MODEL {given}: a pickle is never read; give the .safetensors file of the same model")
    if path.suffix != ".safetensors":
        raise UsageError(f"MODEL {given}: a .safetensors file is expected, got '{path.suffix or path.name}'")
    return Source(given, path.parent, (path,))


def _from_folder(given: str, folder: Path) -> Source:
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"{folder / INDEX} can't be read: {error!r}") from None
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise UsageError(f"{folder / INDEX} names '{name}', which is not in the folder")
        return Source(given, folder, tuple(folder / name for name in names))
    if (folder / model_folder.WEIGHTS).is_file():
        return Source(given, folder, (folder / model_folder.WEIGHTS,))
    if (folder / "checkpoints").is_dir() or (folder / "model").is_dir():
        inner = model_folder.find_model(folder)
        return Source(given, inner, (inner / model_folder.WEIGHTS,))
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return Source(given, folder, (files[0],))
    if files:
        some = ", ".join(file.name for file in files[:4])
        raise UsageError(f"MODEL {given}: several weight files and no {INDEX} ({some}); give one of them")
    if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
        raise UsageError(f"MODEL {given}: only a pickle ({pickles[0]}), which is never read; .safetensors is expected")
    raise UsageError(
        f"MODEL {given}: a folder with {model_folder.CONFIG} and {model_folder.WEIGHTS} is expected, or a run folder"
    )


class Weights:
    """The tensors of one or several safetensors files, by key; a context manager."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self.stack = ExitStack()
        self.handles: dict[str, Any] = {}

    def __enter__(self) -> Weights:
        for file in self.files:
            try:
                handle = self.stack.enter_context(safe_open(file, "pt"))
                self.handles |= dict.fromkeys(handle.keys(), handle)
            except (SafetensorError, OSError) as error:
                self.stack.close()
                raise UsageError(f"{file} can't be read as safetensors: {error}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @property
    def where(self) -> str:
        return str(self.files[0])

    def keys(self) -> list[str]:
        return list(self.handles)

    def shape(self, key: str) -> tuple[int, ...]:
        """Without reading the values.

        Raises:
            UsageError: no such key.
        """
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        return self.get(key).dtype

    def get(self, key: str) -> Tensor:
        return self.handles[key].get_tensor(key)

    def _slice(self, key: str) -> Any:
        if key not in self.handles:
            raise UsageError(f"{self.where}: key '{key}' is missing")
        return self.handles[key].get_slice(key)


def fill(model: nn.Module, weights: Weights, rules: Rules, skip: tuple[str, ...] = ()) -> None:
    """Copies a file's tensors into a model's parameters by a table of names, strictly.

    Args:
        model: with real parameters.
        weights: open files.
        rules: our key -> theirs, joined along the first dimension.
        skip: keys of the file with these prefixes are left unread; any other that no rule names is an error.

    Raises:
        UsageError: a missing, extra or misshaped key, by its name in the file.
    """
    targets, used = model.state_dict(), set()
    assert targets.keys() == rules.keys(), sorted(targets.keys() ^ rules.keys())
    with torch.no_grad():
        for ours, names in rules.items():
            target = targets[ours]
            parts = target.chunk(len(names)) if len(names) > 1 else (target,)
            for part, name in zip(parts, names):
                shape = weights.shape(name)
                if _squeezed(shape) != _squeezed(part.shape):
                    raise UsageError(
                        f"{weights.where}: key '{name}' has shape {list(shape)}, expected {list(part.shape)}"
                    )
                part.copy_(weights.get(name).reshape(part.shape))
                used.add(name)
    if extra := sorted(key for key in weights.keys() if key not in used and not key.startswith(skip)):  # noqa: SIM118
        raise UsageError(f"{weights.where}: key '{extra[0]}' is not part of the model")


def fill_whole(model: nn.Module, source: str | Path) -> None:
    """Copies the weights of a model folder of ours into a model of the same shape, encoder and decoder.

    Raises:
        UsageError: nothing there; a missing, extra or misshaped key.
    """
    with Weights(locate(source).files) as weights:
        fill(model, weights, {key: (key,) for key in model.state_dict()})


def _squeezed(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


# ---- configuration ----


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no file.

    Raises:
        UsageError: not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: a JSON object is expected")
    return value


def encoder_config(found: Found, weights: Weights, stored: dict[str, Any], seen: dict[str, Any]) -> EncoderConfig:
    """The encoder's shape, from the tensors; heads and depth from the configuration, where there is one.

    Args:
        found: the layout.
        weights: open files.
        stored: ``config.json`` of the encoder, or {}.
        seen: ``preprocessor_config.json``, or {}.
    """
    ours, prefix = found.layout == "ours", found.image
    if ours:
        embed, block = [f"patch_embed.{key}" for key in layouts.EMBED], [f"blocks.{{i}}.{key}" for key in layouts.BLOCK]
    else:
        embed, block = list(LAYOUTS[found.layout].embed), list(LAYOUTS[found.layout].trunk.block)
    width, _, patch, side = weights.shape(prefix + embed[0])
    if patch != side:
        raise UsageError(
            f"{weights.where}: key '{prefix + embed[0]}' holds patches of {patch} x {side}, squares expected"
        )
    depth = layouts.count_blocks(weights.keys(), prefix + block[0])
    depth = int(stored.get("num_hidden_layers") or stored.get("depth") or depth)
    if not depth:
        raise UsageError(f"{weights.where}: key '{prefix + block[0].format(i=0)}' is missing")
    gate = block[4].split()[0].format(i=0)
    hidden = weights.shape(prefix + gate)[0] // (2 if ours else 1)
    image_size = None
    if found.position:
        grid = math.isqrt(count := max(weights.shape(prefix + embed[3])[:-1]))
        if grid * grid != count:
            raise UsageError(
                f"{weights.where}: key '{prefix + embed[3]}' holds {count} positions, a square grid expected"
            )
        image_size = grid * patch
    told = stored.get("num_attention_heads") or stored.get("heads") or (stored.get("model_args") or {}).get("num_heads")
    heads = int(told or usual_heads(width, weights.where))
    eps = stored.get("rms_norm_eps", 1e-5)
    if abs(eps - 1e-5) > 1e-9:
        raise UsageError(f"{weights.where}: rms_norm_eps {eps} in {model_folder.CONFIG}; AIMV2 has 1e-5")
    config = EncoderConfig("", width, depth, heads, hidden, patch, image_size)
    if found.head:
        config = replace(config, pool_heads=heads)
    about = seen or stored.get("pretrained_cfg") or {}
    mean, std = about.get("image_mean") or about.get("mean"), about.get("image_std") or about.get("std")
    if mean and std:
        config = replace(config, mean=tuple(mean), std=tuple(std))
    return replace(config, name=usual_name(config))


def usual_heads(width: int, where: str) -> int:
    """Heads of a known width.

    Raises:
        UsageError: no size has this width; weights alone do not tell the number of heads.
    """
    known = {size.width: size.heads for size in SIZES.values()} | {TextConfig.width: TextConfig.heads}
    if width in known:
        return known[width]
    raise UsageError(
        f"{where}: weights do not tell the number of attention heads, and no size has width {width}; put the model's "
        f"{model_folder.CONFIG} beside them"
    )


def usual_name(config: EncoderConfig) -> str:
    """The name of the table's row with this shape, else one of the same form."""
    shape = (config.width, config.depth, config.heads, config.hidden, config.patch_size, config.image_size)
    for name, (row, _) in MODELS.items():
        if shape == (row.width, row.depth, row.heads, row.hidden, row.patch_size, row.image_size):
            return name
    return f"aimv2-width{config.width}-patch{config.patch_size}-{config.image_size or 'native'}"


def pair_config(found: Found, weights: Weights, stored: dict[str, Any], seen: dict[str, Any]) -> LiTConfig:
    """The shape of a LiT pair in the released or transformers layout."""
    image = encoder_config(found, weights, stored.get("vision_config") or {}, seen)
    names, text = LAYOUTS[found.layout], stored.get("text_config") or {}
    prefix = found.text or ""
    vocab, width = weights.shape(prefix + names.text[0])
    config = TextConfig(
        width=width,
        depth=int(text.get("num_hidden_layers") or layouts.count_blocks(weights.keys(), prefix + names.trunk.block[0])),
        heads=int(text.get("num_attention_heads") or usual_heads(width, weights.where)),
        hidden=weights.shape(prefix + names.trunk.block[4].split()[0].format(i=0))[0],
        vocab_size=vocab,
        max_text=weights.shape(prefix + names.text[1])[0],
        end=int(text.get("eos_token_id") or TextConfig.end),
    )
    return LiTConfig(
        image,
        config,
        weights.shape(names.ends[0])[0],
        float(stored.get("init_temperature") or LiTConfig.temperature),
        float(stored.get("max_logit_scale") or LiTConfig.max_scale),
    )


def decoder_config(weights: Weights) -> DecoderConfig:
    """The decoder's shape in a checkpoint of the released training code."""
    theirs = "models.text_decoder."
    names = {ours: theirs + name for ours, name in layouts.TRAINER_DECODER.items()}
    width = weights.shape(names["decoder.project.weight"])[0]
    trunk = LAYOUTS["trainer"].trunk
    return DecoderConfig(
        width=width,
        depth=layouts.count_blocks(weights.keys(), theirs + trunk.block[0]),
        heads=usual_heads(width, weights.where),
        hidden=weights.shape(theirs + trunk.block[4].split()[0].format(i=0))[0],
        vocab_size=weights.shape(names["decoder.token_embed.weight"])[0],
        max_text=weights.shape(names["decoder.text_position"])[0] - 1,
    )


# ---- the whole of it ----


def has_decoder(source: Source) -> bool:
    """Whether a model has a decoder beside its encoder."""
    with Weights(source.files) as weights:
        found = layouts.detect(weights.keys(), weights.where)
    return found.text is not None and (found.layout == "trainer" or found.text == "decoder.")


def load_model(
    source: str | Path | Source,
    decoder: bool = False,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A model from anywhere, ready to use (evaluation mode).

    Args:
        source: released name, hub id, folder, ``.safetensors`` file, RUN (its newest checkpoint) or RUN@STEP.
        decoder: give the whole AIMv2 instead of its encoder.
        revision: of a hub id; released names have pinned ones.
        device: where the weights go; the CPU by default.
        dtype: of the weights; as stored by default.

    Returns:
        VisionEncoder; LiT for a pair; AIMv2 where ``decoder`` is true.

    Raises:
        UsageError: nothing to load, an encoder alone where a decoder is wanted, a missing, extra or misshaped key.
    """
    at = source if isinstance(source, Source) else locate(source, revision)
    with Weights(at.files) as weights:
        found = layouts.detect(weights.keys(), weights.where)
        model, rules, skip = _plan(at, weights, found, decoder)
        dtype = dtype or weights.dtype(next(iter(rules.values()))[0])
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # the weights alone: mean and std stay fp32
        model.to_empty(device=device or "cpu")
        for module in model.modules():
            if isinstance(module, VisionEncoder):
                module.fill_constants()
        fill(model, weights, rules, skip)
    return model.eval()


def _plan(at: Source, weights: Weights, found: Found, decoder: bool) -> tuple[nn.Module, Rules, tuple[str, ...]]:
    """The model without memory, its table of names, and the prefixes of what may stay unread."""
    stored = read_json(at.folder / model_folder.CONFIG)
    seen = read_json(at.folder / "preprocessor_config.json")
    with torch.device("meta"):
        if found.layout == "ours":
            return _plan_ours(at, weights, found, decoder, stored, seen)
        if decoder and not (found.layout == "trainer" and found.text):
            raise UsageError(f"MODEL {at.given}: an encoder alone, without a decoder")
        if found.text is not None and found.layout != "trainer":
            pair = pair_config(found, weights, stored, seen)
            return LiT(pair), layouts.pair_rules(found.layout, pair.encoder, pair.text), ()
        shape = encoder_config(found, weights, stored.get("vision_config") or stored, seen)
        if decoder:
            parts = decoder_config(weights)
            return AIMv2(shape, parts), layouts.trainer_rules(shape, parts), ()
        rules = layouts.encoder_rules(found.layout, shape, "", found.image)
        return VisionEncoder(shape), rules, ("models.text_decoder.",) if found.layout == "trainer" else ()


def _plan_ours(
    at: Source, weights: Weights, found: Found, decoder: bool, stored: dict[str, Any], seen: dict[str, Any]
) -> tuple[nn.Module, Rules, tuple[str, ...]]:
    if "format" in stored:
        model = model_folder.build_empty(at.folder, decoder)
        if model is None:
            raise UsageError(f"MODEL {at.given}: an encoder alone, without a decoder")
        prefix = "encoder." if isinstance(model, VisionEncoder) else ""
        return model, {key: (prefix + key,) for key in model.state_dict()}, ("decoder.", "probe.") if prefix else ()
    if decoder or found.text:
        raise UsageError(f"MODEL {at.given}: more than an encoder, and no {model_folder.CONFIG} beside {weights.where}")
    encoder = VisionEncoder(encoder_config(found, weights, stored, seen))
    return encoder, {key: (found.image + key,) for key in encoder.state_dict()}, ()
