"""Captions that a model writes, scored against references: CIDEr, BLEU, and exact match.

CIDEr (Vedantam et al., CVPR 2015) and BLEU (Papineni et al., ACL 2002) are those of pycocoevalcap, as public tables have
them; the words that they count come from :mod:`aimv2.evals.ptb`.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn

from aimv2.data.images.captioned import open_captioned, read_captioned
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.images.entries import SourceEntry
from aimv2.data.stream.transforms import image_transform
from aimv2.errors import UsageError, need, visible
from aimv2.evals.caption import Writing, asker
from aimv2.evals.harness import Evaluation
from aimv2.evals.ptb import tokenise
from aimv2.evals.scores import wilson
from aimv2.evals.untrained import BASELINE, with_untrained_encoder
from aimv2.features.fingerprint import weights_hash
from aimv2.models.aimv2 import AIMv2
from aimv2.progress import tracked
from aimv2.tables import figure, percent

SHOWN = 10  # examples that a result keeps


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
    need("pycocoevalcap", "caption", "--score")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

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


class Writer(Protocol):
    """Writes captions of images that :attr:`see` made: ``write(images, done)``, ``done`` captions were written before."""

    batch_size: int

    def see(self, image: Image.Image, /) -> Any: ...

    def write(self, images: list[Any], done: int, /) -> list[str]: ...


class DecoderWriter:
    """The decoder of a model of ours."""

    def __init__(self, model: AIMv2, writing: Writing) -> None:
        self.model, self.writing, self.batch_size, self.see = model, writing, writing.batch_size, image_transform(model)

    def write(self, images: list[Any], done: int) -> list[str]:
        """Of uint8 images [3, H, W]; runs of one size share a forward pass."""
        alike = [list(group) for _, group in groupby(images, key=lambda image: image.shape)]  # native sizes differ
        written = list[str]()
        for group in alike:
            written += self.writing(self.model, torch.stack(group), done + len(written))
        return written


def write_all(
    writer: Writer, items: Sequence[SourceEntry], data: str
) -> tuple[list[str], list[str], list[tuple[str, ...]], dict[str, int]]:
    """Captions of all images that have references and can be read.

    Returns:
        names, captions, references, and how many images were left out for which reason.

    Raises:
        UsageError: options of writing out of range, a model that can't write.
    """
    names: list[str] = []
    written: list[str] = []
    references: list[tuple[str, ...]] = []
    left_out = {"without_captions": 0, "unreadable": 0}
    waiting: list[Any] = []

    def write() -> None:
        if waiting:
            written.extend(writer.write(waiting, len(written)))
            waiting.clear()

    for item in tracked(items, "captions", len(items)):
        try:
            encoded, texts = read_captioned(item)
            if not texts:
                left_out["without_captions"] += 1
                continue
            image = writer.see(decode_image(encoded))
        except ImageError:
            left_out["unreadable"] += 1
            continue
        if len(waiting) >= writer.batch_size:
            write()
        waiting.append(image)
        names.append(item.image)
        references.append(texts)
    write()
    if not names:
        why = "no captions in the data" if left_out["without_captions"] else "no image could be read"
        raise UsageError(f"--data {data}: {why}; images with reference captions expected")
    return names, written, references, left_out


def decoding_of(writing: Writing, most: int) -> dict[str, Any]:
    """What a protocol says of how captions are written; ``most``: tokens that the model can write."""
    sampled = bool(writing.temperature)
    return {
        "decoding": f"beam search, {writing.beams} beams" if writing.beams > 1 else "drawn" if sampled else "greedy",
        "max_tokens": writing.max_tokens or most,
        **({"temperature": writing.temperature, "top_p": writing.top_p} if sampled else {}),
        **({} if writing.repetition_penalty == 1 else {"repetition_penalty": writing.repetition_penalty}),
    }


def evaluate_captions(
    name: str, model: AIMv2, writing: Writing, data: str, limit: int = 0, baseline: bool = False, out: str | None = None
) -> dict[str, Any]:
    """The command ``caption --score``: reads, writes captions, scores them, writes the result.

    Args:
        name: of the model, as given.
        model: with its tokenizer.
        writing: how captions are written.
        data: images with reference captions.
        limit: number of images to sample; 0: all.
        baseline: score the same model with an untrained encoder too.
        out: folder of the result.

    Raises:
        UsageError: no captions in the data, a model without a tokenizer, options out of range.
    """
    if model.tokenizer is None:
        raise UsageError(
            f"MODEL {name}: no tokenizer with its weights; a model that captions is expected", code="missing"
        )
    config, protocol = model.encoder.config, decoding_of(writing, model.decoder.config.max_text)
    about = {"name": name, "kind": "ours", "image_size": config.image_size, "width": config.width}
    other = partial(with_untrained_encoder, model, writing.seed) if baseline else None
    others = None if other is None else lambda: DecoderWriter(other(), writing)
    return evaluate_writer(
        about, model, DecoderWriter(model, writing), protocol, data, limit, out, writing.seed, others
    )


def evaluate_asked(
    source: str, text: str, data: str, max_tokens: int = 64, batch_size: int = 64, limit: int = 0, out: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The command ``caption --score --ask``: answers of a vision-language model, scored as captions; see :func:`evaluate_captions`.

    Args:
        source: a folder of ``aimv2 vlm build``, or a RUN of ``aimv2 vlm train``.
        text: the question.
        data: images with reference captions.
        max_tokens: of an answer, its end included.
        batch_size: images per forward pass.
        limit: number of images to sample; 0: all.
        out: folder of the result.
        device: None: cuda where there is one.

    Raises:
        UsageError: as :func:`aimv2.evals.caption.ask_files`; no captions in the data.
    """
    writer = asker(source, text, max_tokens, batch_size, device)
    config, protocol = writer.model.encoder.config, decoding_of(Writing(max_tokens), max_tokens)
    about = {"name": source, "kind": "vlm", "image_size": config.image_size, "width": config.width}
    return evaluate_writer(about, writer.model, writer, protocol | {"prompt": text}, data, limit, out)


def evaluate_writer(
    ours: dict[str, Any], model: nn.Module, writer: Writer, decoding: dict[str, Any], data: str, limit: int = 0,
    out: str | None = None, seed: int = 0, untrained: Callable[[], Writer] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Captions of whatever writes them, scored; see :func:`evaluate_captions`.

    Args:
        ours: what the result says of the model.
        model: whose weights are to stay as they are.
        writer: of the captions.
        decoding: what the protocol says of the writing.
        data, limit, out, seed: see there.
        untrained: makes the writer of the baseline; None: no baseline.
    """
    with Evaluation("caption", out) as evaluation:
        before = weights_hash(model)
        items, split = open_captioned(data)
        evaluation.open_folder()
        rows: Sequence[int] = range(len(items))
        if 0 < limit < len(items):  # the same ones each time
            rows = np.sort(np.random.default_rng(0).choice(len(items), limit, replace=False)).tolist()
        drawn = [items[row] for row in rows]
        names, written, references, left_out = write_all(writer, drawn, data)
        figures = score(written, references)
        tokenizer, by_image = figures.pop("tokenizer"), figures.pop("cider_by_image")
        if untrained is not None:
            _, others, _, _ = write_all(untrained(), drawn, data)
            scored = score(others, references)
            figures["baselines"] = {BASELINE: {key: scored[key] for key in figures}}
        figures |= left_out
        figures["captions"] = [
            {"image": names[n], "written": written[n], "references": references[n], "cider": by_image[n]}
            for n in range(min(SHOWN, len(names)))
        ]
        protocol = {
            "name": "captions",
            **decoding,
            "tokenizer": tokenizer,
            "scorers": f"pycocoevalcap {version('pycocoevalcap')}",
            "cider": "word frequencies over the references of these images",
        }
        about = {
            "name": Path(data).name, "dataset": None, "source": data, "split": split, "test_images": len(names),
            "images_there": len(items), "references": sum(map(len, references)),
        }  # fmt: skip
        if weights_hash(model) != before:
            raise RuntimeError(f"{ours['name']}: the weights changed during the evaluation")
        return evaluation.result(protocol, ours | {"weights_sha256": before, "unchanged": True}, about, figures, seed)


def render_scores(result: dict[str, Any]) -> str:
    """Scores as lines for people, 80 columns."""
    figures, data = result["figures"], result["data"]
    low, high = figures["exact_match_interval"]
    lines = [
        f"{result['model']['name']}: {data['test_images']:,} images, {data['references']:,} references",
        f"CIDEr        {figure('cider', figures['cider'])}",
        *(f"BLEU-{n}       {figure('bleu', figures[f'bleu{n}'])}" for n in range(1, 5)),
        f"exact match  {percent(figures['exact_match'])} ({percent(low)} to {percent(high)})",
        f"words by {result['protocol']['tokenizer']}; {result['protocol']['decoding']}",
    ]
    left = {key: figures[key] for key in ("without_captions", "unreadable") if figures[key]}
    for other, found in figures.get("baselines", {}).items():
        lines.append(
            f"baseline: {other}  CIDEr {figure('cider', found['cider'])}, BLEU-4 {figure('bleu', found['bleu4'])}"
        )
    lines += [f"left out, {key.replace('_', ' ')}: {count:,}" for key, count in left.items()]
    lines += [f"{row['written']}  |  {row['references'][0]}" for row in figures["captions"][:3]]
    shown = map(visible, lines)  # a control takes more room where it is shown
    return "\n".join(line if len(line) <= 80 else line[:77] + "..." for line in shown)
