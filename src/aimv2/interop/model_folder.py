"""Our own model folder: ``config.json``, ``model.safetensors``, tokeniser and card; encoder, decoder and heads in it.

Nothing here unpickles: a model given by a user is JSON and safetensors, or it is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aimv2.errors import UsageError, nearest
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import MODELS, DecoderConfig, EncoderConfig, check_config

FORMAT = "aimv2"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
STEP = re.compile(r"step-(\d{7,})$")


def write_model(folder: Path, config: dict[str, Any], state: dict[str, Tensor], card: str = "") -> None:
    """Writes config, weights and card into ``folder`` (made if missing).

    Args:
        folder: of the model.
        config: what ``config_dict()`` of the model gives.
        state: full CPU tensors by parameter name.
        card: README.md of the model; none where empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **config}, indent=1)
    (folder / CONFIG).write_text(text + "\n")
    save_file({key: value.contiguous() for key, value in state.items()}, folder / WEIGHTS, {"format": "pt"})
    if card:
        (folder / "README.md").write_text(card)


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Saves a VisionEncoder or an AIMv2 as a model folder."""
    config = model.config_dict() if isinstance(model, AIMv2) else {"encoder": model.config_dict()}  # type: ignore[operator]
    prefix = "" if isinstance(model, AIMv2) else "encoder."
    state = {prefix + key: value.detach().cpu() for key, value in model.state_dict().items()}
    write_model(Path(folder), config, state)


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run, oldest first: (step, folder)."""
    found = []
    for folder in (run / "checkpoints").glob("step-*"):
        if (match := STEP.search(folder.name)) and (folder / "model" / WEIGHTS).is_file():
            found.append((int(match[1]), folder))
    return sorted(found)


def find_model(source: str | Path) -> Path:
    """The model folder behind MODEL: a model folder, a run (its newest checkpoint) or RUN@STEP.

    Raises:
        UsageError: nothing there, or no such step; names what exists.
    """
    text = str(source)
    path = Path(text)
    if (path / CONFIG).is_file():
        return path
    if (path / "model" / CONFIG).is_file():
        return path / "model"
    run, at, step = text.rpartition("@")
    if at and not path.exists() and step.isdigit():
        for number, folder in checkpoints(Path(run)):
            if number == int(step):
                return folder / "model"
        steps = ", ".join(str(number) for number, _ in checkpoints(Path(run))) or "none"
        raise UsageError(f"MODEL {text}: no checkpoint of step {step} in {run} (there: {steps})")
    if (path / "checkpoints").is_dir():
        if found := checkpoints(path):
            return found[-1][1] / "model"
        raise UsageError(f"MODEL {text}: the run has no complete checkpoint yet")
    if not path.exists():
        hint = (
            f"; aimv2.create_model('{text}') gives it with random weights" if text in MODELS else nearest(text, MODELS)
        )
        raise UsageError(f"MODEL {text}: no such folder; a model folder, RUN or RUN@STEP is expected{hint}")
    raise UsageError(f"MODEL {text}: a folder with {CONFIG} and {WEIGHTS} is expected, or a run folder")


def _read_config(folder: Path) -> tuple[EncoderConfig, DecoderConfig | None]:
    try:
        stored = json.loads((folder / CONFIG).read_text())
        if stored.get("format") != FORMAT:
            raise UsageError(f"{folder / CONFIG}: format '{FORMAT}' expected, got {stored.get('format')!r}")
        encoder = _fill(EncoderConfig, stored["encoder"])
        decoder = _fill(DecoderConfig, stored["decoder"]) if "decoder" in stored else None
        check_config(encoder, decoder or DecoderConfig())
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UsageError(f"{folder / CONFIG} can't be read as a model config: {error!r}") from None
    return encoder, decoder


def _fill(kind: Any, values: dict[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    if unknown := set(values) - known:
        raise TypeError(f"unknown {sorted(unknown)}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} can't be read as safetensors: {error}") from None


def load_weights(model: nn.Module, file: Path, prefix: str = "", skip: str | None = None) -> None:
    """Copies a safetensors file straight into a model's parameters, strictly.

    Args:
        model: with real parameters.
        file: .safetensors.
        prefix: of the model's keys in the file.
        skip: keys with this prefix are left unread; any other that is not the model's is an error.

    Raises:
        UsageError: an unreadable file; a missing, extra or misshaped key, by name.
    """
    wanted = dict(model.state_dict())
    with _opened(file) as stored, torch.no_grad():
        names = {key for key in stored.keys() if not (skip and key.startswith(skip))}  # noqa: SIM118
        for key, target in wanted.items():
            if prefix + key not in names:
                raise UsageError(f"{file}: key '{prefix + key}' is missing")
            value = stored.get_tensor(prefix + key)
            if value.shape != target.shape:
                shapes = f"{list(value.shape)}, expected {list(target.shape)}"
                raise UsageError(f"{file}: key '{prefix + key}' has shape {shapes}")
            target.copy_(value)
        if extra := sorted(names - {prefix + key for key in wanted}):
            raise UsageError(f"{file}: key '{extra[0]}' is not part of the model")


def load_model(
    source: str | Path,
    decoder: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A saved model, ready to use (evaluation mode).

    Args:
        source: a model folder, RUN (its newest checkpoint) or RUN@STEP.
        decoder: give the whole AIMv2 instead of its encoder.
        device: where the weights go; the CPU by default.
        dtype: of the weights; as stored by default.

    Returns:
        VisionEncoder, or AIMv2 where ``decoder`` is true.

    Raises:
        UsageError: nothing to load, an encoder alone where a decoder is wanted, a missing, extra or misshaped key.
    """
    folder = find_model(source)
    encoder, shape = _read_config(folder)
    if decoder and shape is None:
        raise UsageError(f"MODEL {source}: an encoder alone, without a decoder")
    with torch.device("meta"):
        model: nn.Module = AIMv2(encoder, shape) if decoder and shape else VisionEncoder(encoder)
    if dtype is None:
        with _opened(folder / WEIGHTS) as stored:
            dtype = next((stored.get_tensor(key).dtype for key in stored.keys()), torch.float32)  # noqa: SIM118
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # the weights alone: mean and std stay fp32
    model.to_empty(device=device or "cpu")
    _fill_buffers(model)
    load_weights(model, folder / WEIGHTS, *(("",) if decoder else ("encoder.", "decoder.")))
    return model.eval()


def _fill_buffers(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, VisionEncoder):
            module.fill_constants()
