"""Every verb of the command line as one function. Heavy imports happen inside."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from aimv2.errors import UsageError


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

    loaded = load_model(model, decoder=True)
    return caption_files(loaded, images, max_tokens, temperature, top_p, beams, seed, batch_size)


def load_model(
    source: str | Path,
    decoder: bool = False,
    revision: str | None = None,
    device: Any = None,
    dtype: Any = None,
) -> Any:
    """Any AIMV2, ready to use.

    Args:
        source: a released name (``aimv2-large-patch14-224``), hub id, folder, ``.safetensors`` file, RUN (its newest
            checkpoint) or RUN@STEP; in the released, transformers, timm or our layout, found from the keys.
        decoder: the whole AIMv2, with its tokeniser, instead of the encoder.
        revision: of a hub id; released names have pinned ones.
        device: where the weights go, a torch.device or its name.
        dtype: torch.dtype of the weights; as stored by default.

    Returns:
        VisionEncoder; LiT for an image-text pair; AIMv2 where ``decoder`` is true; in evaluation mode.

    Raises:
        UsageError: nothing to load, or weights that do not fit.
    """
    from aimv2.data.clip_text import find_clip_tokenizer
    from aimv2.data.text import load_tokenizer
    from aimv2.interop import load
    from aimv2.models.lit import LiT

    at = load.locate(source, revision)
    model = load.load_model(at, decoder, device=device, dtype=dtype)
    if decoder and (at.folder / "tokenizer_config.json").exists():
        model.tokenizer = load_tokenizer(at.folder, option="MODEL")  # type: ignore[assignment]
    if isinstance(model, LiT):
        model.tokenizer = find_clip_tokenizer(at.folder, model.config.text)
    return model
