"""Every verb of the command line as one function. Heavy imports happen inside."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from aimv2.errors import UsageError, nearest


def pretrain(
    config: str | None = None,
    run: str | None = None,
    options: dict[str, Any] | None = None,
    dry_run: bool = False,
    print_config: bool = False,
) -> dict[str, Any]:
    """Pre-train an AIMV2: recipe, run folder and dotted options in, a trained run out.

    Args:
        config: a YAML recipe. Without one and without data: the demo on captioned scenes.
        run: the run folder.
        options: values by dotted key, over the recipe's (``{"train.steps": 100, "resume": True}``).
        dry_run: build everything, run one step, return what a run would take, write nothing.
        print_config: return the effective configuration and where each value came from, and do nothing else.

    Returns:
        the run's summary (also in ``summary.json``), or the report of ``dry_run`` or ``print_config``.

    Raises:
        UsageError: a mistake of input, in one line.
        Interrupted: a signal came; the run has been saved.
    """
    from aimv2.launch import launch

    given = dict(options or {})
    if run is not None:
        given["run"] = run
    return launch(config, given, dry_run, print_config)


def data_import(
    source: str,
    out: str,
    captions: str | None = None,
    image_column: str | None = None,
    caption_column: list[str] | None = None,
    template: str = "a photo of a {}.",
    split: str | None = None,
    val_fraction: float = 0.0,
    val_list: str | None = None,
    max_side: int | None = None,
    shard_size: int = 1000,
    workers: int | None = None,
) -> dict[str, Any]:
    """Turn images and captions, in whatever form people have them, into WebDataset shards.

    Args:
        source: folder with a captions file, images with sidecars, COCO JSON, class folders, Parquet/Arrow, tars, or a
            datasets hub id
        out: folder of the shards; interrupted and started again it ends with the same shards
        captions: the captions file, where a folder has several
        image_column: of a table
        caption_column: of a table, one or several; each is a caption field
        template: caption of a class folder; {} is the class
        split: of a hub id
        val_fraction: share of the keys that becomes validation data
        val_list: a file with the keys or file names of the validation data, one a line
        max_side: shrink images whose longer side is larger, pixels
        shard_size: samples a shard
        workers: processes; null: as many as there are cores, at most 8
    """
    from aimv2.data.importing import import_data

    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: at least 1 expected")
    more: dict[str, Any] = {} if workers is None else {"workers": workers}
    return import_data(
        source,
        out,
        captions=captions,
        image_column=image_column,
        caption_column=caption_column,
        template=template,
        split=split,
        val_fraction=val_fraction,
        val_list=val_list,
        max_side=max_side,
        shard_size=shard_size,
        **more,
    )


def data_check(source: str, tokenizer: str | None = None, min_side: int = 16) -> dict[str, Any]:
    """Look over shards before training: counts, sizes, caption lengths, duplicates, unreadable and tiny images.

    Args:
        source: folder, glob, brace pattern or one tar
        tokenizer: counts caption lengths in its tokens; null: in those of a BPE trained on the captions, as a run trains it
        min_side: images with a shorter side count as tiny, pixels
    """
    from aimv2.data.check import check_data
    from aimv2.data.text import load_tokenizer, read_captions, train_tokenizer

    if tokenizer is not None:
        counter = load_tokenizer(tokenizer, option="--tokenizer")
    else:
        if not any(mark in source for mark in "*?[{") and not Path(source).expanduser().exists():
            raise UsageError(f"DIR: {source!r} does not exist; a folder, glob, brace pattern or one tar is expected")
        captions = list(islice(read_captions(source), 50_000))
        if not captions:
            return check_data(source, min_side=min_side)
        counter = train_tokenizer(captions)
    return check_data(source, tokenizer=lambda text: len(counter.encode(text, 1_000_000)), min_side=min_side)


def data_shapes(out: str, count: int = 20000, size: int = 32, seed: int = 0) -> dict[str, Any]:
    """Write the built-in captioned scenes as shards: shapes with colour, size and place, and unseen validation scenes.

    Args:
        out: folder of the shards
        count: training scenes
        size: pixels a side
        seed: of the scenes
    """
    from aimv2.data.scenes import write_scenes

    return write_scenes(out, count, size=size, seed=seed)


def tokenizer_train(captions: str, out: str, vocab_size: int = 4096) -> dict[str, Any]:
    """Train a byte-level BPE on captions.

    Args:
        captions: a text file with a caption a line, CSV, TSV, JSONL, or a folder or pattern of shards
        out: folder of the tokeniser
        vocab_size: tokens, end of text included
    """
    from aimv2.data.text import read_captions, train_tokenizer

    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"OUT {out}: something is there already; give a new folder, or an empty one")
    tokenizer = train_tokenizer(read_captions(captions), vocab_size)
    try:
        tokenizer.save(Path(out))
    except OSError as error:
        raise UsageError(f"OUT {out} can't be written: {error.strerror}") from None
    return {"out": out, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint()}


def caption(
    model: str,
    images: list[str],
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    beams: int = 1,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Write captions of images: greedy, drawn, or by beam search.

    Args:
        model: a model folder, RUN or RUN@STEP
        images: files or folders of images
        max_tokens: end of text included; null: as many as the model can write
        temperature: 0 takes the likeliest token each time
        top_p: draw from the smallest set of tokens with this mass, 0 to 1
        beams: more than 1: beam search
        seed: of the draw
        batch_size: images at once
    """
    from aimv2.evals.caption import caption_files

    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: at least 1 expected")
    loaded = load_model(model, decoder=True)
    return caption_files(loaded, images, max_tokens, temperature, top_p, beams, seed, batch_size)


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
    from aimv2.interop.card import card
    from aimv2.models.aimv2 import AIMv2

    if to not in out_of.FORMATS:
        raise UsageError(f"--to {to}: one of {', '.join(out_of.FORMATS)} is expected{nearest(to, out_of.FORMATS)}")
    for option, value in (("--precision", precision), ("--images", images)):
        if value is not None and to != "openvino":
            raise UsageError(f"{option} is of --to openvino; --to {to} keeps the weights as they are")
    out_of.prepare_out(out)
    at = load.locate(source, revision)
    model = load.load_model(at, decoder=to == "safetensors" and load.has_decoder(at))
    encoder: Any = model.encoder if isinstance(model, AIMv2) else getattr(model, "image", model)
    options: dict[str, Any] = {}
    if to == "openvino":
        options["precision"] = precision or "fp32"
        if images is not None:
            options["pixels"] = _read_pixels(encoder, images, samples)
    readme = card(at, encoder.config, to, str(out), licence)
    folder = out_of.convert(model, out, to, readme, **options)
    _copy_tokenizer(at.folder, folder, to)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {"out": str(folder), "to": to, "model": encoder.config.name, "files": files}


def _copy_tokenizer(source: Path, out: Path, to: str) -> None:
    """The tokeniser travels with the models that read or write text."""
    import shutil

    if to in ("safetensors", "released", "transformers"):
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"):
            if (source / name).is_file():
                shutil.copy(source / name, out / name)


def _read_pixels(encoder: Any, images: str, samples: int) -> list[Any]:
    """Up to ``samples`` images of a folder as the encoder sees them, in batches of one size."""
    from aimv2.data.images import ImageError, decode_image
    from aimv2.data.transforms import image_transform
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


def embed(
    model: str,
    images: str,
    out: str,
    pool: str = "mean",
    layers: str = "last",
    format: str = "npy",
    shard_size: int = 1000,
    batch_size: int = 16,
    device: str | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Features of many images, in files of equal parts; under torchrun several processes share the work.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP
        images: a folder of images, a text file with a path a line, shards, or one image
        out: folder of the features: features-PPPPP.npy with keys-PPPPP.txt, or features-PPPPP.parquet; rejected.jsonl
            names what could not be read; interrupted and started again it goes on
        pool: mean of the patches, attention (models with a pooling head), or none: every patch
        layers: last; or blocks, counted from 0 or from the end, with commas: 5,11,-1
        format: npy (float arrays and lists of keys) or parquet (a column key and a column a layer)
        shard_size: images a file
        batch_size: images at once
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the products: fp32 (stored as float32) or bf16 (stored as float16)
    """
    from aimv2.evals.embed import Wanted, embed_images

    try:
        chosen = () if layers == "last" else tuple(int(layer) for layer in str(layers).split(","))
    except ValueError:
        raise UsageError(f"--layers {layers}: last, or block numbers with commas, expected") from None
    loaded = load_model(model, device=device or _usual_device())
    wanted = Wanted(pool, chosen, format, shard_size, batch_size, precision)
    return embed_images(model, loaded, images, out, wanted)


def _usual_device() -> str:
    """The GPU of this process where there is one, else cpu."""
    import os

    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


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


def save_pretrained(model: Any, out: str | Path, to: str = "safetensors", licence: str | None = None) -> Path:
    """Write a model that is in memory, with its card.

    Args:
        model: VisionEncoder, LiT or AIMv2.
        out: a new or empty folder.
        to: see :func:`convert`.
        licence: of the weights, for the card.

    Returns:
        the folder.
    """
    from aimv2.interop import convert as out_of
    from aimv2.interop.card import card
    from aimv2.interop.load import Source

    encoder = getattr(model, "encoder", model)
    source = Source("a model in memory", Path(out) / "none", ())
    folder = out_of.convert(model, out, to, card(source, encoder.config, to, str(out), licence))
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None and to == "safetensors":
        getattr(tokenizer, "tokenizer", tokenizer).save(folder)
    return folder


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
        dtype: torch.dtype of the weights; as stored by default.
        backend: torch, jax or mlx (optional extras; the encoder alone, fp32: see
            :class:`aimv2.interop.arrays.ArrayEncoder`).

    Returns:
        VisionEncoder; LiT for an image-text pair; AIMv2 where ``decoder`` is true; in evaluation mode. ArrayEncoder for
        another backend.

    Raises:
        UsageError: nothing to load, or weights that do not fit.
    """
    from aimv2.data.clip_text import find_clip_tokenizer
    from aimv2.data.text import load_tokenizer
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
