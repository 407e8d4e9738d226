"""Any AIMV2 from anywhere: released name, hub id, folder, file, run. The layout is found from the keys.

Nothing here unpickles: weights are safetensors, the rest is JSON. A model is built without memory and every tensor is copied
from the mapped file straight into its place, so that weights are never held twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from aimv2.distributed import usable_device
from aimv2.errors import UsageError, nearest
from aimv2.interop import hub, layouts, model_folder
from aimv2.interop.hub import INDEX
from aimv2.interop.layouts import Found, Rules
from aimv2.interop.shapes import decoder_config, encoder_config, pair_config, read_image_processor, read_json, section
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT
from aimv2.models.sizes import MODELS

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
EXPORTS = {  # what other engines open
    "openvino_model.xml": "an OpenVINO export; aimv2.interop.openvino.OpenVINOEncoder opens it",
    "model.onnx": "an ONNX export; onnxruntime.InferenceSession opens its model.onnx",
}
# names of types in a safetensors file -> the narrowest type of torch's that holds them and that products are made in
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED |= {"F8_E4M3": torch.bfloat16, "F8_E5M2": torch.bfloat16}


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
            names = sorted({str(name) for name in json.loads((folder / INDEX).read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
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
    for name, what in EXPORTS.items():
        if (folder / name).is_file():
            raise UsageError(f"MODEL {given}: {what}; give the model that it was made from")
    if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
        raise UsageError(f"MODEL {given}: only a pickle ({pickles[0]}), which is never read; .safetensors is expected")
    raise UsageError(
        f"MODEL {given}: a folder with {model_folder.CONFIG} and {model_folder.WEIGHTS} is expected, or a run that has a checkpoint"
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
        """The narrowest floating type that holds a tensor's values, without reading them.

        Raises:
            UsageError: no such key, or no floating-point numbers.
        """
        stored = str(self._slice(key).get_dtype())
        if stored not in STORED:
            raise UsageError(f"{self.where}: key '{key}' holds {stored}, floating-point numbers expected")
        return STORED[stored]

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
    targets = model.state_dict()
    assert targets.keys() == rules.keys(), sorted(targets.keys() ^ rules.keys())
    for ours, names in rules.items():
        fill_tensor(targets[ours], weights, names)
    check_all_read(weights, rules, skip)


@torch.no_grad()
def fill_tensor(target: Tensor, weights: Weights, names: tuple[str, ...]) -> None:
    """Copies a file's tensors, joined along the first dimension, into one of ours.

    Raises:
        UsageError: a missing or misshaped key.
    """
    parts = target.chunk(len(names)) if len(names) > 1 else (target,)
    for part, name in zip(parts, names):
        shape = weights.shape(name)
        if _squeezed(shape) != _squeezed(part.shape):
            raise UsageError(f"{weights.where}: key '{name}' has shape {list(shape)}, expected {list(part.shape)}")
        part.copy_(weights.get(name).reshape(part.shape))


def check_all_read(weights: Weights, rules: Rules, skip: tuple[str, ...] = ()) -> None:
    """Raises UsageError for a key of the file that no rule names and no prefix of ``skip`` covers."""
    used = {name for names in rules.values() for name in names}
    if extra := sorted(key for key in weights.keys() if key not in used and not key.startswith(skip)):  # noqa: SIM118
        raise UsageError(f"{weights.where}: key '{extra[0]}' is not part of the model")


def _squeezed(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


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
    dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """A model from anywhere, ready to use (evaluation mode).

    Args:
        source: released name, hub id, folder, ``.safetensors`` file, RUN (its newest checkpoint) or RUN@STEP.
        decoder: give the whole AIMv2 instead of its encoder.
        revision: of a hub id; released names have pinned ones.
        device: where the weights go; the CPU by default.
        dtype: of the weights, or its name (``bfloat16``); by default as stored, and the widest where they differ.

    Returns:
        VisionEncoder; LiT for a pair; AIMv2 where ``decoder`` is true.

    Raises:
        UsageError: nothing to load, an encoder alone where a decoder is wanted, a missing, extra or misshaped key, a
            device that is not there, a type that holds no fractions.
    """
    place, kind = usable_device(device), float_type(dtype)
    at = source if isinstance(source, Source) else locate(source, revision)
    with Weights(at.files) as weights:
        found = layouts.detect(weights.keys(), weights.where)
        model, rules, skip = plan(at, weights, found, decoder)
        stored = widest(weights, rules)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(kind or stored)  # the weights alone: mean and std stay fp32
        model.to_empty(device=place)
        for module in model.modules():
            if isinstance(module, VisionEncoder):
                module.fill_constants()
        fill(model, weights, rules, skip)
    return model.eval()


def widest(weights: Weights, rules: Rules) -> torch.dtype:
    """A type that holds every value of all tensors that the rules name: bf16 beside fp16 asks for fp32.

    Raises:
        UsageError: a missing key, or one that holds no floating-point numbers.
    """
    kinds = {weights.dtype(name) for names in rules.values() for name in names}
    return reduce(torch.promote_types, kinds)


def float_type(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating type of torch's, given as such or by name.

    Raises:
        UsageError: no such type, or one that holds no fractions.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UsageError(f"dtype {dtype!r}: float32, bfloat16 or float16 (a torch.dtype, or its name) expected")
    return found


def plan(at: Source, weights: Weights, found: Found, decoder: bool) -> tuple[nn.Module, Rules, tuple[str, ...]]:
    """The model without memory, its table of names, and the prefixes of what may stay unread."""
    stored = read_json(at.folder / model_folder.CONFIG)
    seen = read_image_processor(at.folder)
    with torch.device("meta"):
        if found.layout == "ours":
            return _plan_ours(at, weights, found, decoder, stored, seen)
        pair_of_both = found.text is not None and found.layout != "trainer"
        if decoder and (pair_of_both or not found.text):
            raise no_decoder(at, pair_of_both)
        if pair_of_both:
            pair = pair_config(found, weights, stored, seen)
            return LiT(pair), layouts.pair_rules(found.layout, pair.encoder, pair.text), ()
        shape = encoder_config(found, weights, section(stored, "vision_config") or stored, seen)
        if decoder:
            parts = decoder_config(weights)
            return AIMv2(shape, parts), layouts.trainer_rules(shape, parts), ()
        rules = layouts.encoder_rules(found.layout, shape, "", found.image)
        return VisionEncoder(shape), rules, ("models.text_decoder.",) if found.layout == "trainer" else ()


def no_decoder(at: Source, pair: bool) -> UsageError:
    """What is said where a decoder is wanted and there is none."""
    what = "an image-text pair" if pair else "an encoder alone"
    return UsageError(f"MODEL {at.given}: {what}, without a decoder; leave decoder out")


def _plan_ours(
    at: Source, weights: Weights, found: Found, decoder: bool, stored: dict[str, Any], seen: dict[str, Any]
) -> tuple[nn.Module, Rules, tuple[str, ...]]:
    if "format" in stored:
        model = model_folder.build_empty(at.folder, decoder)
        if model is None:
            raise no_decoder(at, "lit" in stored)
        prefix = "encoder." if isinstance(model, VisionEncoder) else ""
        return model, {key: (prefix + key,) for key in model.state_dict()}, ("decoder.", "probe.") if prefix else ()
    if decoder and not found.text:
        raise no_decoder(at, pair=False)
    if found.text:
        raise UsageError(f"MODEL {at.given}: more than an encoder, and no {model_folder.CONFIG} beside {weights.where}")
    encoder = VisionEncoder(encoder_config(found, weights, stored, seen))
    return encoder, {key: (found.image + key,) for key in encoder.state_dict()}, ()
