"""Load an AIMV2 by released name, hub id, folder, file or run; the weight layout is detected from the keys.

Nothing here unpickles: weights are safetensors, the rest is JSON. A model is built on the meta device and every tensor is copied
from the memory-mapped file into its parameter, so that weights are never held twice.
"""

from __future__ import annotations

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
from aimv2.interop.checks import check_finite, check_sizes
from aimv2.interop.hub import INDEX
from aimv2.interop.layouts import Detected, Rules
from aimv2.interop.shapes import (
    VISION,
    decoder_config,
    encoder_config,
    named_section,
    pair_config,
    read_image_processor,
    read_json,
)
from aimv2.io import POINTER, is_pointer, regular, say
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT
from aimv2.models.sizes import MODELS, EncoderConfig

BUILT = ("deepseek_vl", "llava", "llava_next")  # model types of `aimv2 vlm build`
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
EXPORTS = {  # files for other runtimes
    "openvino_model.xml": "an OpenVINO export; aimv2.interop.openvino.OpenVINOEncoder opens it",
    "model.onnx": "an ONNX export; onnxruntime.InferenceSession opens its model.onnx",
}
# safetensors dtype -> the narrowest torch dtype that holds it and supports matmuls
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED |= {"F8_E4M3": torch.bfloat16, "F8_E5M2": torch.bfloat16}


@dataclass(frozen=True)
class ModelSource:
    """Files of a model.

    Attributes:
        given: the user's argument.
        folder: folder of config, preprocessor and tokeniser, any of which may be absent.
        files: the weights.
    """

    given: str
    folder: Path
    files: tuple[Path, ...]


def locate(source: str | Path, revision: str | None = None) -> ModelSource:
    """Resolve MODEL to files.

    Args:
        source: released name, hub id, folder, ``.safetensors`` file, RUN or RUN@STEP.
        revision: branch, tag or commit of a hub id or released name.

    Raises:
        UsageError: nothing there; a pickle.
    """
    text = str(source)
    path = Path(text).expanduser()
    try:
        path.exists()
    except OSError as error:  # a name that is too long, a folder that is closed
        shown = text if len(text) <= 200 else f"{text[:60]}..."
        raise UsageError(f"MODEL {shown}: {error.strerror}", code="not-found") from None
    if path.is_file() or path.is_dir():
        if revision is not None:
            raise UsageError(
                f"revision {revision}: {text} is a local path, which has no revisions",
                option="revision",
                code="conflict",
            )
        return _from_file(text, path) if path.is_file() else _from_folder(text, path)
    if text in hub.RELEASED:
        return _from_folder(text, hub.download(f"{hub.OWNER}/{text}", revision or hub.RELEASED[text]))
    check_there(text)
    if hub.is_hub_id(text) and not path.parent.exists():
        name = text.split("/")[1]
        pinned = hub.RELEASED.get(name) if text == f"{hub.OWNER}/{name}" else None
        return _from_folder(text, hub.download(text, revision or pinned))
    return _from_folder(text, model_folder.find_model(text))


def check_there(text: str) -> None:
    """Raises UsageError for a MODEL that is nowhere; what the hub may hold is not looked up."""
    path = Path(text).expanduser()
    if path.exists() or text in hub.RELEASED or text.startswith("timm:"):
        return
    if path.suffix in (".safetensors", *PICKLES):
        raise UsageError(f"MODEL {text}: no such file", code="not-found")
    if not (hub.is_hub_id(text) and not path.parent.exists()) and model_folder.split_step(text) is None:
        raise UsageError(f"MODEL {text}: {missing(text)}", code="not-found")


def missing(text: str) -> str:
    """Error message for a MODEL that does not exist."""
    if text in MODELS:
        return f"it has no released weights; aimv2.create_model('{text}') gives it with random ones"
    known = [*hub.RELEASED, *MODELS, *beside(Path(text).expanduser())]
    return (
        "no such file, folder, run or released name (a hub id has the form owner/name)"
        f"{nearest(text, known)}; `aimv2 models` lists the names"
    )


def beside(path: Path) -> list[str]:
    """Folders in the parent of a path that is not there, as they would be given."""
    try:
        return sorted(str(path.with_name(one.name)) for one in path.parent.iterdir() if one.is_dir())
    except (OSError, ValueError):
        return []


def _from_file(given: str, path: Path) -> ModelSource:
    if path.suffix in PICKLES:
        raise UsageError(
            f"MODEL {given}: a pickle is never read; give the .safetensors file of the same model", code="unsupported"
        )
    if path.suffix != ".safetensors":
        raise UsageError(
            f"MODEL {given}: a .safetensors file is expected, got '{path.suffix or path.name}'", code="unsupported"
        )
    if is_pointer(path):
        raise UsageError(f"MODEL {given}: {POINTER}", code="unreadable")
    return ModelSource(given, path.parent, _with_its_shards(given, path))


def _with_its_shards(given: str, path: Path) -> tuple[Path, ...]:
    """A weights file, with the others where its name says that it is one of several.

    Raises:
        UsageError: one of them is not there.
    """
    part = hub.SHARD.search(path.stem)
    if part is None:
        return (path,)
    stem, count = path.stem[: part.start()], int(part[1])
    files = tuple(path.with_name(f"{stem}-{i:05}-of-{count:05}.safetensors") for i in range(1, count + 1))
    if lost := [file.name for file in files if not file.is_file()]:
        raise UsageError(
            f"MODEL {given}: {path.name} is one of {count} weight files; {lost[0]} is not there", code="not-found"
        )
    return files


def _from_folder(given: str, folder: Path) -> ModelSource:
    for name in hub.WANTED:
        for file in folder.glob(name):
            if is_pointer(file):
                raise UsageError(f"MODEL {given}: {file.name} is {POINTER}", code="unreadable")
    if (folder / INDEX).is_file():
        names = hub.indexed_files(folder)
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise UsageError(f"{folder / INDEX} names '{name}', which is not in the folder", code="not-found")
        return ModelSource(given, folder, tuple(folder / name for name in names))
    if (folder / model_folder.WEIGHTS).is_file():
        return ModelSource(given, folder, (folder / model_folder.WEIGHTS,))
    if (folder / "checkpoints").is_dir() or (folder / "model").is_dir():
        inner = model_folder.find_model(folder)
        return ModelSource(given, inner, (inner / model_folder.WEIGHTS,))
    files = sorted(folder.glob("*.safetensors"))
    if files and {*(one := _with_its_shards(given, files[0]))} == {*files}:
        return ModelSource(given, folder, one)
    if files:
        some = ", ".join(file.name for file in files[:4])
        raise UsageError(
            f"MODEL {given}: several weight files and no {INDEX} ({some}); give one of them", code="conflict"
        )
    for name, what in EXPORTS.items():
        if (folder / name).is_file():
            raise UsageError(f"MODEL {given}: {what}; give the model that was exported", code="unsupported")
    if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
        raise UsageError(
            f"MODEL {given}: only a pickle ({pickles[0]}), which is never read; .safetensors is expected",
            code="unsupported",
        )
    raise UsageError(
        f"MODEL {given}: a folder with {model_folder.CONFIG} and {model_folder.WEIGHTS} is expected, or a run that has a "
        "checkpoint",
        code="not-found",
    )


class Weights:
    """Tensors of one or several safetensors files, by key without the prefixes of wrappers; a context manager.

    Attributes:
        left: keys of the file outside of the prefix that the model lies under.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self.stack = ExitStack()
        self.handles: dict[str, tuple[Any, str]] = {}  # file, and the key there
        self.left: list[str] = []

    def __enter__(self) -> Weights:
        handles: dict[str, Any] = {}
        for file in self.files:
            try:
                handle = self.stack.enter_context(safe_open(regular(file), "pt"))
                handles |= dict.fromkeys(handle.keys(), handle)
            except (SafetensorError, OSError) as error:
                self.stack.close()
                raise UsageError(f"{file} can't be read as safetensors: {error}", code="unreadable") from None
        try:
            names, self.left = layouts.plain_names(handles, self.where)
        except UsageError:
            self.stack.close()
            raise
        self.handles = {name: (handles[key], key) for name, key in names.items()}
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @property
    def where(self) -> str:
        return str(self.files[0])

    def keys(self) -> list[str]:
        return list(self.handles)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading its values.

        Raises:
            UsageError: no such key.
        """
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """The narrowest floating dtype that holds a tensor's values, without reading them.

        Raises:
            UsageError: no such key, or another type.
        """
        stored = str(self._slice(key).get_dtype())
        if stored not in STORED:
            raise UsageError(
                f"{self.where}: key '{key}' holds {stored}, floating-point numbers expected", code="mismatch"
            )
        return STORED[stored]

    def get(self, key: str) -> Tensor:
        handle, stored = self.handles[key]
        return handle.get_tensor(stored)

    def _slice(self, key: str) -> Any:
        if key not in self.handles:
            raise UsageError(f"{self.where}: key '{key}' is missing", code="mismatch")
        handle, stored = self.handles[key]
        return handle.get_slice(stored)


def fill(model: nn.Module, weights: Weights, rules: Rules, skip: tuple[str, ...] = ()) -> None:
    """Copy a file's tensors into a model's parameters, strictly.

    Args:
        model: model with allocated parameters.
        weights: open files.
        rules: our key -> theirs, concatenated along the first dimension.
        skip: prefixes of keys to ignore; any other key without a rule is an error.

    Raises:
        UsageError: a missing or extra key or a wrong shape, by its name in the file.
    """
    targets = model.state_dict()
    assert targets.keys() == rules.keys(), sorted(targets.keys() ^ rules.keys())
    for ours, names in rules.items():
        fill_tensor(targets[ours], weights, names)
    check_all_read(weights, rules, skip)


@torch.no_grad()
def fill_tensor(target: Tensor, weights: Weights, names: tuple[str, ...]) -> None:
    """Copy a file's tensors, concatenated along the first dimension, into one of ours.

    Raises:
        UsageError: a missing key or a wrong shape.
    """
    parts = target.chunk(len(names)) if len(names) > 1 else (target,)
    check_shapes(target, weights, names)
    for part, name in zip(parts, names):
        part.copy_(weights.get(name).reshape(part.shape))
        check_finite(part, f"{weights.where}: key '{name}'")


def check_shapes(target: Tensor, weights: Weights, names: tuple[str, ...]) -> None:
    """What :func:`fill_tensor` demands of shapes, without reading values; ``target`` may be on the meta device."""
    for part, name in zip(target.chunk(len(names)) if len(names) > 1 else (target,), names):
        shape = weights.shape(name)
        if _squeezed(shape) != _squeezed(part.shape):
            raise UsageError(
                f"{weights.where}: key '{name}' has shape {list(shape)}, expected {list(part.shape)}", code="mismatch"
            )


def check_all_read(weights: Weights, rules: Rules, skip: tuple[str, ...] = ()) -> None:
    """Raise UsageError for a key of the file without a rule, unless it has a prefix of ``skip``; a classifier's keys, and those
    outside of the model's prefix, are left out, with a line on standard error."""
    used = {name for names in rules.values() for name in names}
    extra = sorted(key for key in weights.keys() if key not in used and not key.startswith(skip))  # noqa: SIM118
    for key in extra:
        if not layouts.HEAD.fullmatch(key):
            raise UsageError(f"{weights.where}: key '{key}' is not part of the model", code="mismatch")
    say_left_out(weights.where, [*weights.left, *extra])


def say_left_out(where: str, left: list[str]) -> None:
    """One line on standard error on keys that are not read, if there are any."""
    if left:
        some = ", ".join(left[:4]) + ", ..." * (len(left) > 4)
        say(f"{where}: left out {len(left)} keys that are no part of the model ({some})")


def _squeezed(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


# ---- models ----


def model_type(folder: Path) -> str | None:
    """Kind of a model of ``transformers`` other than an AIMV2, by its ``config.json``; None: none."""
    kind = read_json(folder / model_folder.CONFIG).get("model_type")
    return None if kind is None or str(kind).startswith("aimv2") else str(kind)


def detect(at: ModelSource, weights: Weights) -> Detected:
    """:func:`aimv2.interop.layouts.detect`, which says what a model of another kind is."""
    kind = model_type(at.folder)
    if kind in BUILT:
        raise UsageError(
            f"MODEL {at.given}: a vision-language model ('{kind}'), which `aimv2 vlm train` and `caption --ask QUESTION` take; its "
            "encoder is expected, as it was before `aimv2 vlm build`",
            code="mismatch",
        )
    try:
        return layouts.detect(weights.keys(), weights.where)
    except UsageError as error:
        if kind is None:
            raise
        raise UsageError(
            f"MODEL {at.given}: a model of transformers, model_type '{kind}' in its {model_folder.CONFIG}; an AIMV2 is expected "
            "(`aimv2 embed` and what measures frozen features take others)",
            code=error.code,
        ) from None


def has_decoder(source: ModelSource) -> bool:
    """Whether the weights include a decoder."""
    with Weights(source.files) as weights:
        found = detect(source, weights)
    return found.text is not None and (found.layout == "trainer" or found.text == "decoder.")


def load_model(
    source: str | Path | ModelSource,
    decoder: bool = False,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """Load a model in evaluation mode.

    Args:
        source: released name, hub id, folder, ``.safetensors`` file, RUN (its newest checkpoint) or RUN@STEP.
        decoder: return the whole AIMv2 instead of its encoder.
        revision: branch, tag or commit of a hub id; released names are pinned.
        device: device of the weights; the CPU by default.
        dtype: dtype of the weights, or its name (``bfloat16``); by default as stored, and the widest where they differ.

    Returns:
        VisionEncoder; LiT for a pair; AIMv2 if ``decoder`` is true.

    Raises:
        UsageError: nothing to load, no decoder where one is requested, a missing or extra key, a wrong shape, an unavailable
            device, a dtype that is not floating-point.
    """
    place, kind = usable_device(device), float_type(dtype)
    at = source if isinstance(source, ModelSource) else locate(source, revision)
    with Weights(at.files) as weights:
        found = detect(at, weights)
        model, rules, skip = plan(at, weights, found, decoder)
        for ours, target in model.state_dict().items():
            check_shapes(target, weights, rules[ours])
        stored = widest(weights, rules)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(kind or stored)  # parameters only: mean and std stay fp32
        model.to_empty(device=place)
        for module in model.modules():
            if isinstance(module, VisionEncoder):
                module.fill_constants()
        fill(model, weights, rules, skip)
    return model.eval()


def encoder_shape(source: str | Path) -> EncoderConfig:
    """Shape of the encoder of MODEL, as :func:`load_model` takes it, without reading its weights."""
    at = locate(source)
    with Weights(at.files) as weights:
        model: Any = plan(at, weights, detect(at, weights), decoder=False)[0]
    return getattr(model, "encoder", model).config


def widest(weights: Weights, rules: Rules) -> torch.dtype:
    """The dtype that holds every value of all tensors of the rules (bf16 with fp16 gives fp32).

    Raises:
        UsageError: a missing key, or one that is not floating-point.
    """
    kinds = {weights.dtype(name) for names in rules.values() for name in names}
    return reduce(torch.promote_types, kinds)


def float_type(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point torch dtype, given as such or by name.

    Raises:
        UsageError: no such dtype, or one that is not floating-point.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UsageError(
            f"dtype {dtype!r}: float32, bfloat16 or float16 (a torch.dtype, or its name) expected", option="dtype"
        )
    return found


def plan(at: ModelSource, weights: Weights, found: Detected, decoder: bool) -> tuple[nn.Module, Rules, tuple[str, ...]]:
    """The model on the meta device, its table of names, and the prefixes of keys to ignore."""
    check_sizes(f"MODEL {at.given}", at.folder, at.files)
    stored = read_json(at.folder / model_folder.CONFIG)
    processor = read_image_processor(at.folder)
    with torch.device("meta"):
        if found.layout == "ours":
            return _plan_ours(at, weights, found, decoder, stored, processor)
        is_pair = found.text is not None and found.layout != "trainer"
        if decoder and (is_pair or not found.text):
            raise no_decoder(at, is_pair)
        if is_pair:
            pair = pair_config(found, weights, stored, processor)
            return LiT(pair), layouts.pair_rules(found.layout, pair.encoder, pair.text), ()
        shape = encoder_config(found, weights, named_section(stored, VISION) or stored, processor)
        if decoder:
            parts = decoder_config(weights, stored)
            return AIMv2(shape, parts), layouts.trainer_rules(shape, parts), ()
        rules = layouts.encoder_rules(found.layout, shape, "", found.image)
        return VisionEncoder(shape), rules, ("models.text_decoder.",) if found.layout == "trainer" else ()


def no_decoder(at: ModelSource, pair: bool) -> UsageError:
    """Error for a request for the decoder of a model without one."""
    what = "an image-text pair" if pair else "only an encoder"
    return UsageError(f"MODEL {at.given}: {what}, without a decoder; leave decoder out", code="unsupported")


def _plan_ours(
    at: ModelSource, weights: Weights, found: Detected, decoder: bool, stored: dict[str, Any], processor: dict[str, Any]
) -> tuple[nn.Module, Rules, tuple[str, ...]]:
    if "format" in stored:
        model = model_folder.build_empty(at.folder, decoder)
        if model is None:
            raise no_decoder(at, "lit" in stored)
        prefix = "encoder." if isinstance(model, VisionEncoder) else ""
        return (
            model,
            {key: (prefix + key,) for key in model.state_dict()},
            ("decoder.", "probe.", "pyramid.") if prefix else (),
        )
    if decoder and not found.text:
        raise no_decoder(at, pair=False)
    if found.text:
        raise UsageError(
            f"MODEL {at.given}: more than an encoder, and no {model_folder.CONFIG} next to {weights.where}",
            code="missing",
        )
    encoder = VisionEncoder(encoder_config(found, weights, stored, processor))
    return encoder, {key: (found.image + key,) for key in encoder.state_dict()}, ()
