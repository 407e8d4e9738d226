"""Our model folder: ``config.json``, ``model.safetensors``, tokeniser and card, with encoder, decoder and heads.

Nothing here unpickles: a user's model is JSON and safetensors, or it is rejected.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aimv2.errors import UsageError, nearest
from aimv2.io import parse_json, read_file
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.layers import WRAPPER, unwrapped
from aimv2.models.lit import LiT, LiTConfig, TextConfig
from aimv2.models.sizes import MODELS, DecoderConfig, EncoderConfig, check_config

FORMAT = "aimv2"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
STEP = re.compile(r"step-(\d{7,})$")
MOST = 2.0  # means and stds of pixels in 0..1 lie below, those of 0..255 above
BEST = "best"  # RUN@best, and the name of the file in RUN/checkpoints that says which it is


def write_model(folder: Path, config: dict[str, Any], state: dict[str, Tensor], card: str = "") -> None:
    """Write config, weights and card into ``folder`` (created if missing).

    Args:
        folder: output folder.
        config: the model's ``config_dict()``.
        state: full CPU tensors by parameter name.
        card: contents of README.md; none is written if empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **config}, indent=1)
    (folder / CONFIG).write_text(text + "\n")
    save_file({key: value.contiguous() for key, value in state.items()}, folder / WEIGHTS, {"format": "pt"})
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def plain_model(model: Any) -> nn.Module:
    """The VisionEncoder, AIMv2 or LiT within any wrapper, with whole weights under its own names.

    Compiled, checkpointed or sharded blocks (FSDP2: a call of every rank) and models in training give a copy on the CPU.

    Raises:
        UsageError: another kind of model, or layers that it does not have, such as adapters.
    """
    model = unwrapped(model)
    kind: Any = next((kind for kind in (VisionEncoder, LiT, AIMv2) if isinstance(model, kind)), None)
    if kind is None:
        raise UsageError(f"model: a VisionEncoder, a LiT or an AIMv2 is expected, got {type(model).__name__}")
    configs = (model.encoder.config, model.decoder.config) if kind is AIMv2 else (model.config,)
    with torch.device("meta"):
        plain = kind(*configs)
    given, targets = model.state_dict(), plain.state_dict()
    state = {WRAPPER.sub("", key): value for key, value in given.items()}
    state = model.saved(state) if hasattr(model, "saved") else state
    if differ := sorted(state.keys() ^ targets.keys()):
        raise UsageError(
            f"model: '{differ[0]}' is {'missing' if differ[0] in targets else 'no part of an AIMV2'}; merge adapters into the "
            "weights, gather shards, or take the model itself",
            code="mismatch",
        )
    if any(value.is_meta for value in state.values()):
        raise UsageError(
            "model: its weights are on the meta device, which holds none; load or initialize it first", code="missing"
        )
    shapes = {key: value.shape for key, value in targets.items()}
    if shapes == {key: value.shape for key, value in given.items() if not hasattr(value, "full_tensor")}:
        return model
    whole = {key: getattr(value, "full_tensor", lambda same=value: same)().cpu() for key, value in state.items()}
    plain.to_empty(device="cpu")
    plain.load_state_dict({key: value.reshape(shapes[key]) for key, value in whole.items()}, assign=True)
    for module in plain.modules():
        if isinstance(module, VisionEncoder):
            module.fill_constants()
    if hasattr(model, "tokenizer"):
        plain.tokenizer = model.tokenizer
    return plain.train(model.training)


def save_model(model: nn.Module, folder: str | Path, card: str = "") -> None:
    """Save a VisionEncoder, an AIMv2 or a LiT pair as a model folder."""
    assert isinstance(model, VisionEncoder | AIMv2 | LiT), type(model)
    encoder_only = isinstance(model, VisionEncoder)
    config = {"encoder": model.config_dict()} if encoder_only else model.config_dict()
    prefix = "encoder." if encoder_only else ""
    state = {prefix + key: value.detach().cpu() for key, value in model.state_dict().items()}
    write_model(Path(folder), config, state, card)


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run, oldest first: (step, folder)."""
    found = []
    for folder in (run / "checkpoints").glob("step-*"):
        if (match := STEP.search(folder.name)) and (folder / "model" / WEIGHTS).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def read_best(run: Path) -> dict[str, Any]:
    """``figure``, ``value`` and ``step`` of the run's best checkpoint (``eval.best``); {} without one."""
    try:
        about = parse_json(read_file(run / "checkpoints" / f"{BEST}.json"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) and about.keys() >= {"figure", "value", "step"} else {}


def split_step(source: str) -> tuple[Path, str] | None:
    """``RUN@STEP`` or ``RUN@best`` as the run and what stands after it, right or not; None where it is neither."""
    run, at, step = source.rpartition("@")
    path = Path(run).expanduser()
    named = step.isdigit() or step == BEST or (path / "checkpoints").is_dir()
    there = at and named and path.exists() and not Path(source).expanduser().exists()
    return (path, step) if there else None


def checkpoint_at(run: Path, step: str) -> Path | None:
    """The folder of a run's checkpoint, of a step or ``best``; None where it is not there."""
    wanted = read_best(run).get("step") if step == BEST else int(step) if step.isdigit() else None
    return next((folder for number, folder in checkpoints(run) if number == wanted), None)


def find_model(source: str | Path) -> Path:
    """Resolve MODEL to a model folder: a model folder, a run (its newest checkpoint), RUN@STEP or RUN@best.

    Raises:
        UsageError: nothing there, or no such step; names what exists.
    """
    text = str(source)
    path = Path(text)
    if (path / CONFIG).is_file():
        return path
    if (path / "model" / CONFIG).is_file():
        return path / "model"
    if (parts := split_step(text)) is not None:
        run, step = parts
        if (found_at := checkpoint_at(run, step)) is not None:
            return found_at / "model"
        steps = ", ".join(str(number) for number, _ in checkpoints(run)) or "none"
        why = "; eval.best FIGURE keeps one" if step == BEST else ""
        raise UsageError(
            f"MODEL {text}: no {'best checkpoint' if step == BEST else f'checkpoint of step {step}'} in {run} (there: {steps}){why}",
            code="not-found",
        )
    if (path / "checkpoints").is_dir():
        if found := checkpoints(path):
            return found[-1][1] / "model"
        raise UsageError(f"MODEL {text}: the run has no complete checkpoint yet", code="not-found")
    if not path.exists():
        hint = (
            f"; aimv2.create_model('{text}') gives it with random weights" if text in MODELS else nearest(text, MODELS)
        )
        raise UsageError(
            f"MODEL {text}: no such folder; a model folder, RUN or RUN@STEP is expected{hint}", code="not-found"
        )
    raise UsageError(f"MODEL {text}: a folder with {CONFIG} and {WEIGHTS} is expected, or a run that has a checkpoint")


def _read_config(folder: Path) -> tuple[LiTConfig | None, EncoderConfig, DecoderConfig | None]:
    try:
        stored = parse_json(read_file(folder / CONFIG))
        if stored.get("format") != FORMAT:
            raise UsageError(f"{folder / CONFIG}: format '{FORMAT}' expected, got {stored.get('format')!r}")
        pair = None
        if "lit" in stored:
            parts = stored["lit"]
            whole = {"encoder": _fill(EncoderConfig, parts["encoder"]), "text": _fill(TextConfig, parts["text"])}
            pair = _fill(LiTConfig, {**parts, **whole})
        encoder = pair.encoder if pair else _fill(EncoderConfig, stored["encoder"])
        decoder = _fill(DecoderConfig, stored["decoder"]) if "decoder" in stored else None
        check_config(encoder, decoder or DecoderConfig())
        for what, width, heads in (
            ("pool_heads", encoder.width, encoder.pool_heads or 1),
            ("heads of the text tower", pair.text.width if pair else 1, pair.text.heads if pair else 1),
        ):
            if width < 1 or heads < 1 or width % heads:
                raise TypeError(f"{what} {heads}: they do not divide the width {width}")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UsageError(f"{folder / CONFIG} can't be read as a model config: {error!r}", code="unreadable") from None
    return pair, encoder, decoder


def _fill(kind: Any, values: dict[str, Any]) -> Any:
    known = {f.name: str(f.type) for f in fields(kind)}
    if unknown := set(values) - set(known):
        raise TypeError(f"unknown {sorted(unknown)}")
    for key, value in values.items():
        if known[key].startswith("tuple"):
            values = {**values, key: three(value, key)}
        elif known[key] == "int" and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{key} {value!r}, a whole number expected")
    return kind(**values)


def three(values: Any, key: str, most: float = MOST) -> tuple[float, float, float]:
    """A mean or std per channel: three finite numbers up to ``most``, a std above 0.

    Raises:
        TypeError: anything else.
    """
    good = isinstance(values, list | tuple) and len(values) == 3
    if good and all(isinstance(v, int | float) and math.isfinite(v) and (v > 0 or key != "std") for v in values):
        if max(values) > most:
            raise TypeError(
                f"{key} {values!r}, three numbers expected, of pixels in 0 to 1 (they seem to be of 0 to 255)"
            )
        one, two, last = values
        return one, two, last
    raise TypeError(f"{key} {values!r}, three numbers expected")


def build_empty(folder: Path, decoder: bool) -> nn.Module | None:
    """Build the model of one of our folders; call it under the meta device.

    Args:
        folder: folder with our ``config.json``.
        decoder: return the whole AIMv2.

    Returns:
        VisionEncoder, LiT, or AIMv2 if ``decoder`` is true; None if that model has no decoder.

    Raises:
        UsageError: a config that can't be read or contradicts itself.
    """
    pair, encoder, shape = _read_config(folder)
    if decoder:
        return AIMv2(encoder, shape) if shape else None
    return LiT(pair) if pair else VisionEncoder(encoder)
