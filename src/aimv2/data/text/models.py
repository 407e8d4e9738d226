"""Models with their tokenizer, in and out: :func:`aimv2.load_model` and :func:`aimv2.save_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, overload

from aimv2.data.text.clip import find_clip_tokenizer
from aimv2.data.text.tokenizer import load_tokenizer
from aimv2.errors import UsageError, nearest
from aimv2.interop import convert as out_of
from aimv2.interop import load
from aimv2.interop.arrays import BACKENDS, to_arrays
from aimv2.interop.card import HOLDS_PAIRS, card
from aimv2.interop.model_folder import plain_model
from aimv2.models.aimv2 import AIMv2
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lit import LiT
from aimv2.places import from_home


@overload
def load_model(
    source: str | Path,
    decoder: Literal[False] = ...,
    revision: str | None = ...,
    device: Any = ...,
    dtype: Any = ...,
    backend: Literal["torch"] = ...,
) -> VisionEncoder: ...


@overload
def load_model(
    source: str | Path,
    decoder: Literal[True],
    revision: str | None = ...,
    device: Any = ...,
    dtype: Any = ...,
    backend: Literal["torch"] = ...,
) -> AIMv2: ...


@overload
def load_model(
    source: str | Path,
    decoder: bool = ...,
    revision: str | None = ...,
    device: Any = ...,
    dtype: Any = ...,
    backend: str = ...,
) -> Any: ...


def load_model(
    source: str | Path,
    decoder: bool = False,
    revision: str | None = None,
    device: Any = None,
    dtype: Any = None,
    backend: str = "torch",
) -> Any:
    """Load any AIMV2, ready to use.

    Args:
        source: a released name (``aimv2-large-patch14-224``), hub id, folder, ``.safetensors`` file, RUN (its newest
            checkpoint) or RUN@STEP; in the released, transformers, timm or our layout, found from the keys.
        decoder: the whole AIMv2, with its tokenizer, instead of the encoder.
        revision: of a hub id; released names have pinned ones.
        device: where the weights go, a torch.device or its name.
        dtype: torch.dtype of the weights, or its name; by default as stored, the widest if they differ.
        backend: torch, jax or mlx (optional extras; the encoder only, fp32: see
            :class:`aimv2.interop.arrays.ArrayEncoder`).

    Returns:
        VisionEncoder; LiT for an image-text pair (for a type checker the encoder); AIMv2 where ``decoder`` is true; in
        evaluation mode. ArrayEncoder for another backend.

    Raises:
        UsageError: nothing to load, or weights that do not fit.
    """
    if backend not in BACKENDS:
        raise UsageError(
            f"backend={backend!r}: one of {', '.join(BACKENDS)} is expected{nearest(backend, BACKENDS)}",
            option="backend",
            code="unknown",
        )
    if backend != "torch" and (decoder or device is not None or dtype is not None):
        raise UsageError(f"backend={backend!r} gives the encoder only, in fp32: leave out decoder, device and dtype")
    at = load.locate(from_home(source, "MODEL"), revision)
    if backend != "torch":
        return to_arrays(load.load_model(at), backend)
    model = load.load_model(at, decoder, device=device, dtype=dtype)
    if decoder and (at.folder / "tokenizer_config.json").exists():
        model.tokenizer = load_tokenizer(at.folder, option="MODEL")  # type: ignore[assignment]
    if isinstance(model, LiT):
        model.tokenizer = find_clip_tokenizer(at.folder, model.config.text)
    return model


def save_pretrained(
    model: Any,
    out: str | Path,
    to: str = "safetensors",
    licence: str | None = None,
    precision: str | None = None,
    pixels: Any = None,
) -> Path:
    """Write a model in memory to a folder, with its card.

    Args:
        model: VisionEncoder, LiT or AIMv2, also compiled, or wrapped for training; of sharded ones (FSDP2) every rank calls,
            each with an ``out`` of its own.
        out: a new or empty folder.
        to: released, transformers, timm, onnx, openvino, safetensors (ours, with the decoder) or backbone.
        licence: of the weights, for the card.
        precision: of openvino: fp32, bf16 or int8.
        pixels: for int8: a list of image batches [B, 3, H, W], uint8 or normalised, like those that the model will see.

    Returns:
        the folder.

    Raises:
        UsageError: an unknown format, another kind of model, something in ``out``, a model that the format can't hold.
    """
    out = from_home(out, "OUT")
    out_of.check_format(to)
    model = plain_model(model)
    if to != "openvino" and (precision is not None or pixels is not None):
        raise UsageError(f"precision and pixels are of to='openvino'; to={to!r} keeps the weights as they are")
    options = {"precision": precision or "fp32", "pixels": pixels} if to == "openvino" else {}
    given = getattr(model, "tokenizer", None)
    tokenizer: Any = getattr(given, "tokenizer", given)  # a pair wraps its tokenizer

    def add_tokenizer(folder: Path) -> None:
        if hasattr(tokenizer, "save") and (to == "safetensors" or (isinstance(model, LiT) and to in HOLDS_PAIRS)):
            tokenizer.save(folder)

    return out_of.convert(model, out, to, card(None, model, to, str(out), licence), add_tokenizer, **options)
