"""Captions that a model writes, scored against references: CIDEr, BLEU, and exact match.

CIDEr (Vedantam et al., CVPR 2015) and BLEU (Papineni et al., ACL 2002) are those of pycocoevalcap, as public tables have
them; the words that they count come from :mod:`aimv2.evals.ptb`.

Legend: N images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aimv2.data.images import ImageError, decode_image
from aimv2.data.shards import captions_of, find_shards, image_of, read_sample, scan_shard
from aimv2.data.sources import Columns, FileReader, Item, Reject, Source, open_folder
from aimv2.data.transforms import image_transform
from aimv2.errors import UsageError
from aimv2.evals.ptb import tokenise
from aimv2.evals.result import check_out, make_result, write_result
from aimv2.evals.scores import wilson
from aimv2.evals.weights import weights_hash
from aimv2.models.aimv2 import AIMv2

SHOWN = 10  # examples that a result keeps


@dataclass(frozen=True)
class Asked:
    """What a user asked for; see :func:`aimv2.api.caption`. ``limit`` 0: all images."""

    data: str
    max_tokens: int | None
    temperature: float
    top_p: float
    beams: int
    seed: int
    batch_size: int
    limit: int
    out: str | None


@dataclass(frozen=True)
class Captioned:
    """Images with reference captions.

    Attributes:
        name: of the folder or file.
        split: val, test, or all where the data have no splits.
        items: what each image is read from: a captions file's item, or (shard, key, start, end).
        rows: those of the items that are used, in order.
    """

    name: str
    split: str
    items: Sequence[Any]
    rows: Sequence[int]

    def __iter__(self) -> Iterator[tuple[str, bytes, list[str]]]:
        """(name, encoded image, references) of each row; an image without a caption has no references."""
        for row in self.rows:
            item = self.items[row]
            yield _of_item(item) if isinstance(item, Item) else _of_shard(*item)


def open_captioned(source: str, limit: int = 0) -> Captioned:
    """Images with their captions: shards, a captions file, or a folder with one (or with sidecars).

    Args:
        source: shards (of a folder ``val-*``, else ``test-*``; a tar or pattern is taken as it is), a captions file beside
            its images, or a folder of images with ``captions.txt`` or another captions file, or .txt/.json sidecars.
        limit: draw this many of the images, the same ones each time; 0: all.

    Raises:
        UsageError: nothing there, or no captions.
    """
    path = Path(source).expanduser()
    items: list[Any]
    pattern = path.suffix == ".tar" or (any(mark in source for mark in "*?[{") and not path.exists())
    if pattern or (path.is_dir() and any(path.glob("*.tar"))):
        shards = find_shards(source, "val", option="--data")
        if not shards:
            raise UsageError(f"--data {source}: no val-*.tar or test-*.tar there; name other tars by a pattern")
        items = [(shard, *place) for shard in shards for place in _places(shard)]
        split = "all" if pattern else shards[0].name.split("-")[0]
    elif path.exists():
        items = [item for item in _plan(path, source).items if isinstance(item, Item)]
        split = "all"
    else:
        raise UsageError(f"--data {source}: no such file or folder; images with captions expected")
    if not items:
        raise UsageError(f"--data {source}: no image with a caption there")
    rows = np.arange(len(items))
    if 0 < limit < len(items):
        rows = np.sort(np.random.default_rng(0).choice(len(items), limit, replace=False))
    return Captioned(path.name, split, items, rows.tolist())


def _plan(path: Path, source: str) -> Source:
    """Images with captions of a folder or a captions file."""
    try:
        if path.is_file():
            return open_folder(path.parent, path.name, Columns(), "{}")
        found = open_folder(path, "captions.txt" if (path / "captions.txt").is_file() else None, Columns(), "{}")
    except UsageError as error:
        why = str(error).partition("; ")[0].removeprefix("SRC: ")
        raise UsageError(f"--data {source}: {why}; shards, a captions file, or a folder with one expected") from None
    if found.classes:
        raise UsageError(f"--data {source}: class folders, without captions; captions of each image are expected")
    return found


def _places(shard: Path) -> Iterator[tuple[str, int, int]]:
    scan = scan_shard(shard)
    return zip(scan.keys, scan.offsets, scan.offsets[1:])


def _of_shard(shard: Path, key: str, start: int, end: int) -> tuple[str, bytes, list[str]]:
    parts = read_sample(shard, start, end)
    image = image_of(parts)
    return key, image[1] if image else b"", [text for texts in captions_of(parts).values() for text in texts]


def _of_item(item: Item) -> tuple[str, bytes, list[str]]:
    (loaded,) = FileReader().load([item])
    if isinstance(loaded, Reject):
        return item.image, b"", [text for texts in item.captions.values() for text in texts]
    return item.image, loaded.data, [text for texts in loaded.captions.values() for text in texts]


def score(written: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Scores of N captions, each against its own references.

    Args:
        written: N captions.
        references: N lists of captions, none empty.

    Returns:
        ``cider`` (0..10; tables print it times 100) with n-gram frequencies over the references of these images,
        ``bleu1`` to ``bleu4`` (0..1, corpus, closest reference length), ``exact_match`` (0..1: the same words as one of
        the references) with ``exact_match_interval`` (95%, Wilson), ``cider_by_image``, and ``tokenizer``, its name.

    Raises:
        UsageError: pycocoevalcap is not installed, or fewer than two images: CIDEr weighs words by how few images have
            them.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        raise UsageError("--score needs pycocoevalcap: pip install 'aimv2[caption]'") from None
    if len(written) < 2:
        raise UsageError("--score: one image with a caption; CIDEr needs two or more (--data, --limit)")
    words, tokenizer = tokenise([*written, *(text for texts in references for text in texts)])
    joined = [" ".join(tokens) for tokens in words]
    ours, theirs, at = {}, {}, len(written)
    for number, texts in enumerate(references):
        ours[number], theirs[number] = [joined[number]], joined[at : at + len(texts)]
        at += len(texts)
    if not any(any(texts) for texts in theirs.values()):
        raise UsageError("--score: no word in any of the references (--data)")
    bleu, _ = Bleu(4).compute_score(theirs, ours, verbose=0)
    cider, by_image = Cider().compute_score(theirs, ours)
    right = sum(ours[number][0] in theirs[number] for number in ours)
    return {
        "cider": float(cider),
        **{f"bleu{n}": float(value) for n, value in enumerate(bleu, 1)},
        "exact_match": right / len(written),
        "exact_match_interval": list(wilson(right, len(written))),
        "cider_by_image": [float(value) for value in by_image],
        "tokenizer": tokenizer,
    }


def write_all(
    model: AIMv2, data: Captioned, asked: Asked
) -> tuple[list[str], list[str], list[list[str]], dict[str, int]]:
    """Captions of all images that have references and can be read.

    Returns:
        names, captions, references, and how many images were left out for which reason.

    Raises:
        UsageError: options of writing out of range, a model without a text head.
    """
    see = image_transform(model)
    names: list[str] = []
    written: list[str] = []
    references: list[list[str]] = []
    left_out = {"without_captions": 0, "unreadable": 0}
    waiting: list[torch.Tensor] = []

    def write() -> None:
        if waiting:
            options = asked.max_tokens, asked.temperature, asked.top_p, asked.beams, asked.seed + len(written)
            try:
                written.extend(model.caption(torch.stack(waiting), *options))
            except ValueError as error:
                raise UsageError(str(error)) from None
            waiting.clear()

    for name, encoded, texts in data:
        if not texts:
            left_out["without_captions"] += 1
            continue
        try:
            image = see(decode_image(encoded))
        except ImageError:
            left_out["unreadable"] += 1
            continue
        if len(waiting) >= asked.batch_size or (waiting and waiting[0].shape != image.shape):  # native sizes differ
            write()
        waiting.append(image)
        names.append(name)
        references.append(texts)
    write()
    if not names:
        why = "no captions in the data" if left_out["without_captions"] else "no image could be read"
        raise UsageError(f"--data {asked.data}: {why}; images with reference captions expected")
    return names, written, references, left_out


def measure(name: str, model: AIMv2, asked: Asked) -> dict[str, Any]:
    """The verb ``caption --score``: reads, writes captions, scores them, writes the result.

    Raises:
        UsageError: no captions in the data, a model without a tokeniser, options out of range.
    """
    started = time.perf_counter()
    if model.tokenizer is None:
        raise UsageError(f"MODEL {name}: no tokenizer beside its weights; a model that captions is expected")
    data = open_captioned(asked.data, asked.limit)
    out = check_out(asked.out, "caption")
    names, written, references, left_out = write_all(model, data, asked)
    figures = score(written, references)
    tokenizer, by_image = figures.pop("tokenizer"), figures.pop("cider_by_image")
    figures |= left_out
    figures["captions"] = [
        {"image": names[n], "written": written[n], "references": references[n], "cider": by_image[n]}
        for n in range(min(SHOWN, len(names)))
    ]
    decoding = f"beam search, {asked.beams} beams" if asked.beams > 1 else "drawn" if asked.temperature else "greedy"
    protocol = {
        "name": "captions",
        "decoding": decoding,
        "max_tokens": asked.max_tokens or model.decoder.config.max_text,
        **({"temperature": asked.temperature, "top_p": asked.top_p} if asked.temperature else {}),
        "tokenizer": tokenizer,
        "scorers": f"pycocoevalcap {version('pycocoevalcap')}",
        "cider": "word frequencies over the references of these images",
    }
    about = {
        "name": data.name, "dataset": None, "source": asked.data, "split": data.split, "test_images": len(names),
        "images_there": len(data.items), "references": sum(map(len, references)),
    }  # fmt: skip
    config = model.encoder.config
    ours = {
        "name": name, "kind": "ours", "weights_sha256": weights_hash(model), "image_size": config.image_size,
        "width": config.width,
    }  # fmt: skip
    seconds = time.perf_counter() - started
    return write_result(out, make_result("caption", protocol, ours, about, figures, seconds, asked.seed))


def render_scores(result: dict[str, Any]) -> str:
    """Scores as lines for people, 80 columns."""
    figures, data = result["figures"], result["data"]
    low, high = figures["exact_match_interval"]
    lines = [
        f"{result['model']['name']}: {data['test_images']:,} images, {data['references']:,} references",
        f"CIDEr        {100 * figures['cider']:.1f}",
        *(f"BLEU-{n}       {100 * figures[f'bleu{n}']:.1f}" for n in range(1, 5)),
        f"exact match  {100 * figures['exact_match']:.1f} ({100 * low:.1f} to {100 * high:.1f})",
        f"words by {result['protocol']['tokenizer']}; {result['protocol']['decoding']}",
    ]
    left = {key: figures[key] for key in ("without_captions", "unreadable") if figures[key]}
    lines += [f"left out, {key.replace('_', ' ')}: {count:,}" for key, count in left.items()]
    lines += [f"{row['written']}  |  {row['references'][0]}" for row in figures["captions"][:3]]
    return "\n".join(line if len(line) <= 80 else line[:77] + "..." for line in lines)
