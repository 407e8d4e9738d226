"""Weights in and out: load_model, models, convert, push, save_pretrained. Heavy imports happen inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aimv2.errors import UsageError, nearest


def load_model(
    source: str | Path,
    decoder: bool = False,
    revision: str | None = None,
    device: Any = None,
    dtype: Any = None,
    backend: str = "torch",
) -> Any:
    """Any AIMV2, ready to use.

    Args:
        source: a released name (``aimv2-large-patch14-224``), hub id, folder, ``.safetensors`` file, RUN (its newest
            checkpoint) or RUN@STEP; in the released, transformers, timm or our layout, found from the keys.
        decoder: the whole AIMv2, with its tokeniser, instead of the encoder.
        revision: of a hub id; released names have pinned ones.
        device: where the weights go, a torch.device or its name.
        dtype: torch.dtype of the weights, or its name; by default as stored, and the widest where they differ.
        backend: torch, jax or mlx (optional extras; the encoder alone, fp32: see
            :class:`aimv2.interop.arrays.ArrayEncoder`).

    Returns:
        VisionEncoder; LiT for an image-text pair; AIMv2 where ``decoder`` is true; in evaluation mode. ArrayEncoder for
        another backend.

    Raises:
        UsageError: nothing to load, or weights that do not fit.
    """
    from aimv2.data.text.clip import find_clip_tokenizer
    from aimv2.data.text.tokenizer import load_tokenizer
    from aimv2.interop import load
    from aimv2.interop.arrays import BACKENDS, to_arrays
    from aimv2.models.lit import LiT

    if backend not in BACKENDS:
        raise UsageError(f"backend={backend!r}: one of {', '.join(BACKENDS)} is expected{nearest(backend, BACKENDS)}")
    if backend != "torch" and (decoder or device is not None or dtype is not None):
        raise UsageError(f"backend={backend!r} gives the encoder alone, in fp32: leave out decoder, device and dtype")
    at = load.locate(source, revision)
    if backend != "torch":
        return to_arrays(load.load_model(at), backend)
    model = load.load_model(at, decoder, device=device, dtype=dtype)
    if decoder and (at.folder / "tokenizer_config.json").exists():
        model.tokenizer = load_tokenizer(at.folder, option="MODEL")  # type: ignore[assignment]
    if isinstance(model, LiT):
        model.tokenizer = find_clip_tokenizer(at.folder, model.config.text)
    return model


def models() -> dict[str, Any]:
    """Every model by name: parameters, arithmetic of an image, input size, licence and revision of what is released."""
    from aimv2.interop import hub
    from aimv2.models.sizes import MODELS, encoder_flops, encoder_parameters

    rows = []
    for name in sorted({**MODELS, **dict.fromkeys(hub.RELEASED)}, key=lambda name: (name not in hub.RELEASED,)):
        shape = hub.shape_of(name) if name in hub.RELEASED else MODELS[name][0]
        pair = name.endswith("-lit")
        rows.append(
            {
                "name": name,
                "parameters": hub.PAIR_PARAMETERS if pair else encoder_parameters(shape),
                "gflop_an_image": round(encoder_flops(shape) / 1e9, 2),
                "input": f"{shape.image_size} px" if shape.image_size else "any size",
                "patch": shape.patch_size,
                "licence": hub.LICENCE if name in hub.RELEASED else None,
                "revision": hub.RELEASED.get(name),
            }
        )
    return {"models": rows}


def convert(
    source: str,
    out: str,
    to: str = "transformers",
    revision: str | None = None,
    precision: str | None = None,
    images: str | None = None,
    samples: int = 300,
    licence: str | None = None,
) -> dict[str, Any]:
    """Write a model in the layout of the tool that will open it.

    Args:
        source: MODEL: released name, hub id, folder, .safetensors file, RUN or RUN@STEP
        out: a new or empty folder
        to: released, transformers, timm, onnx, openvino or safetensors (ours, with the decoder)
        revision: of a hub id
        precision: of openvino: fp32, bf16 or int8
        images: a folder of images of the kind that will be seen, for int8
        samples: images read from it
        licence: of the weights, for the model card
    """
    from aimv2.interop import convert as out_of
    from aimv2.interop import load
    from aimv2.interop.card import card, encoder_in, left_out

    out_of.check_format(to)
    for option, value in (("--precision", precision), ("--images", images)):
        if value is not None and to != "openvino":
            raise UsageError(f"{option} is of --to openvino; --to {to} keeps the weights as they are")
    out_of.check_out(out)
    at = load.locate(source, revision)
    whole = load.has_decoder(at)
    model = load.load_model(at, decoder=whole and to == "safetensors")
    encoder = encoder_in(model)
    options: dict[str, Any] = {}
    if to == "openvino":
        options["precision"] = precision or "fp32"
        if images is not None:
            options["pixels"] = _read_pixels(encoder, images, samples)
    readme = card(at, model, to, str(out), licence)
    folder = out_of.convert(model, out, to, readme, lambda folder: _copy_tokenizer(at.folder, folder, to), **options)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    missing = left_out(model, to) + (["decoder"] if whole and to != "safetensors" else [])
    return {"out": str(folder), "to": to, "model": encoder.config.name, "left_out": missing, "files": files}


def _copy_tokenizer(source: Path, out: Path, to: str) -> None:
    """The tokeniser travels with the models that read or write text."""
    import shutil

    if to in ("safetensors", "released", "transformers"):
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"):
            if (source / name).is_file():
                shutil.copy(source / name, out / name)


def _read_pixels(encoder: Any, images: str, samples: int) -> list[Any]:
    """Up to ``samples`` images of a folder as the encoder sees them, in batches of one size."""
    from aimv2.data.images.decode import ImageError, decode_image
    from aimv2.data.stream.transforms import image_transform
    from aimv2.evals.caption import image_files

    transform, found = image_transform(encoder), list[Any]()
    for path in image_files([images]):
        if len(found) == samples:
            break
        try:
            found.append(transform(decode_image(path))[None])
        except ImageError:
            continue
    return found


def push(
    model: str,
    repository: str,
    to: str = "transformers",
    private: bool = False,
    licence: str | None = None,
    message: str = "Upload an AIMV2 encoder",
) -> dict[str, Any]:
    """Upload a model to the hub, with its card.

    Args:
        model: a folder, .safetensors file, RUN or RUN@STEP
        repository: owner/name on the hub; made where it does not exist
        to: the layout: transformers, released, timm, onnx or safetensors (ours, with the decoder)
        private: for a new repository
        licence: of the weights, for the model card
        message: of the commit
    """
    import tempfile

    from aimv2.interop import hub

    if not hub.is_hub_id(repository):
        raise UsageError(f"REPOSITORY {repository}: owner/name is expected")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "model"
        result = convert(model, str(out), to, licence=licence)
        readme = out / "README.md"
        readme.write_text(readme.read_text().replace(str(out), repository))
        url = hub.upload(out, repository, private, message)
    return {"url": url, "to": to, "files": result["files"]}


def save_pretrained(
    model: Any,
    out: str | Path,
    to: str = "safetensors",
    licence: str | None = None,
    precision: str | None = None,
    pixels: Any = None,
) -> Path:
    """Write a model that is in memory, with its card.

    Args:
        model: VisionEncoder, LiT or AIMv2.
        out: a new or empty folder.
        to: see :func:`convert`.
        licence: of the weights, for the card.
        precision: of openvino: fp32, bf16 or int8.
        pixels: for int8: a list of image batches [B, 3, H, W], uint8 or normalised, of the kind that will be seen.

    Returns:
        the folder.

    Raises:
        UsageError: an unknown format, another kind of model, something in ``out``, a model that the format can't hold.
    """
    from aimv2.interop import convert as out_of
    from aimv2.interop.card import HOLDS_PAIRS, card
    from aimv2.models.aimv2 import AIMv2
    from aimv2.models.encoder import VisionEncoder
    from aimv2.models.lit import LiT

    out_of.check_format(to)
    if not isinstance(model, VisionEncoder | LiT | AIMv2):
        raise UsageError(f"model: a VisionEncoder, a LiT or an AIMv2 is expected, got {type(model).__name__}")
    if to != "openvino" and (precision is not None or pixels is not None):
        raise UsageError(f"precision and pixels are of to='openvino'; to={to!r} keeps the weights as they are")
    options = {"precision": precision or "fp32", "pixels": pixels} if to == "openvino" else {}
    given = getattr(model, "tokenizer", None)
    tokenizer: Any = getattr(given, "tokenizer", given)  # of the one that a pair has around it

    def beside(folder: Path) -> None:
        if hasattr(tokenizer, "save") and (to == "safetensors" or (isinstance(model, LiT) and to in HOLDS_PAIRS)):
            tokenizer.save(folder)

    return out_of.convert(model, out, to, card(None, model, to, str(out), licence), beside, **options)
