"""Training, and what it reads: pretrain, data, tokenizer. Heavy imports happen inside."""

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
        the run's summary (also in ``summary.json``; on other ranks than the first only ``run`` and ``step``), or the report of
        ``dry_run`` or ``print_config``.

    Raises:
        UsageError: a mistake of input, in one line.
        Interrupted: a signal came; the run has been saved.
    """
    from aimv2.train.launch import launch

    given = dict(options or {})
    if run is not None:
        given["run"] = run
    return launch(config, given, dry_run, print_config)


def data_import(
    source: str,
    out: str,
    captions: str | None = None,
    image_column: str | None = None,
    caption_column: list[str] | str | None = None,
    template: str = "a photo of a {}.",
    split: str | None = None,
    val_fraction: float = 0.0,
    val_list: str | None = None,
    max_side: int | None = None,
    shard_size: int = 1000,
    workers: int | None = None,
    class_folders: bool = False,
) -> dict[str, Any]:
    """Turn images and captions, in whatever form people have them, into WebDataset shards.

    Args:
        source: folder with a captions file, images with sidecars, COCO JSON, class folders, Parquet/Arrow, tars, or a
            datasets hub id
        out: folder of the shards; interrupted and started again it ends with the same shards
        captions: the captions file, where a folder has several
        image_column: of a table
        caption_column: of a table; one, or several as [a, b]; each is a caption field
        template: caption of a class folder; {} is the class
        split: of a hub id
        val_fraction: share of the keys that becomes validation data
        val_list: a file with the keys or file names of the validation data, one a line
        max_side: shrink images whose longer side is larger, pixels
        shard_size: samples a shard
        workers: processes; null: as many as there are cores, at most 8
        class_folders: the names of the sub-folders are the captions (see template), whatever other files lie there; by default
            only where there are two or more and no file that may hold captions
    """
    from aimv2.data.shards.importing import import_data

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
        class_folders=class_folders,
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
    from aimv2.data.shards.check import check_data
    from aimv2.data.text.tokenizer import load_tokenizer, read_captions, train_tokenizer

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


def data_shapes(
    out: str, count: int = 20000, size: int = 32, largest: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Write the built-in captioned scenes as shards: shapes with colour, size and place, and unseen validation scenes.

    Args:
        out: folder of the shards
        count: training scenes
        size: pixels a side
        largest: height and width of each picture are drawn between SIZE and this many pixels; null: all are SIZE x SIZE
        seed: of the scenes
    """
    from aimv2.data.scenes import write_scenes

    return write_scenes(out, count, size=size, largest=largest, seed=seed)


def tokenizer_train(captions: str, out: str, vocab_size: int = 4096) -> dict[str, Any]:
    """Train a byte-level BPE on captions.

    Args:
        captions: a text file with a caption a line, CSV, TSV, JSONL, or a folder or pattern of shards
        out: folder of the tokeniser
        vocab_size: tokens, end of text included
    """
    from aimv2.data.text.tokenizer import read_captions, train_tokenizer

    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"OUT {out}: something is there already; give a new folder, or an empty one")
    tokenizer = train_tokenizer(read_captions(captions), vocab_size)
    try:
        tokenizer.save(Path(out))
    except OSError as error:
        raise UsageError(f"OUT {out} can't be written: {error.strerror}") from None
    return {"out": out, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint()}
