"""`aimv2 data check`: what is in a data set, and what is wrong with it, on one screen."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from operator import iadd
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aimv2.data.images.boxes import BOX_FAULTS, holds_regions, regions_of
from aimv2.data.images.catalogue import list_files
from aimv2.data.images.decode import ImageError, image_size
from aimv2.data.images.entries import read_label
from aimv2.data.passed import ODD_LABELS, PassedOver, passed_lines
from aimv2.data.shards.format import (
    MANIFEST,
    NUMBERED,
    Parts,
    captions_of,
    find_shards,
    image_of,
    json_of,
    read_samples,
    scan_shard,
    split_shards,
    text_of,
    why_no_image,
)
from aimv2.data.shards.tars import why_unreadable
from aimv2.data.text.conversations import ConversationError, bad_lines, holds_conversation, images_of, read_conversation
from aimv2.errors import UsageError, shown
from aimv2.progress import tracked
from aimv2.tables import percent

MAX_TOKENS = 77  # of the released models' captions
EXAMPLES = 5
LINES = 4  # of what is passed over
CLASSES = 6  # named on the screen: the most frequent and the rarest
FURTHER = "images after the first of a sample without a conversation"
OWN = {MANIFEST, "classes.txt", "rejected.jsonl"}
QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


@dataclass
class ShardReport:
    """What tars hold; a sample is named ``TAR/KEY``."""

    samples: int = 0
    labels: int = 0
    image_bytes: int = 0
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)  # of each sample
    digests: list[tuple[bytes, str]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    tiny: list[str] = field(default_factory=list)
    uncaptioned: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    talks: list[str] = field(default_factory=list)  # texts of each conversation
    answers: list[int] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)  # images of each conversation
    bad: PassedOver = field(default_factory=PassedOver)  # conversations, by the code of their fault
    passed: PassedOver = field(default_factory=PassedOver)
    classes: Counter[str] = field(default_factory=Counter)  # objects of each
    boxes: Counter[str] = field(default_factory=Counter)  # pictures, empty, crowds, phrases
    faults: PassedOver = field(default_factory=PassedOver)  # of boxes, by code

    def add(self, other: "ShardReport") -> None:
        self.passed.update(other.passed)
        self.bad.update(other.bad)
        self.faults.update(other.faults)
        for each in fields(self):  # in place: lists may be long
            if each.name not in ("passed", "bad", "faults"):
                setattr(self, each.name, iadd(getattr(self, each.name), getattr(other, each.name)))

    def add_image(self, name: str, image: bytes, min_side: int) -> bool:
        """Decodes an encoded image of a sample; whether it can be read."""
        self.digests.append((hashlib.sha1(image).digest(), name))
        self.image_bytes += len(image)
        try:
            width, height = image_size(image)
        except ImageError as error:
            self.unreadable.append(f"{name}: {error}")
            return False
        self.widths.append(width)
        self.heights.append(height)
        if min(width, height) < min_side:
            self.tiny.append(f"{name} ({width} x {height})")
        return True

    def add_regions(self, name: str, about: dict[str, Any]) -> None:
        """Counts boxes, classes and phrases of a sample, whose image was the last to be added."""
        found, faults = regions_of(about, (self.widths[-1], self.heights[-1]))
        for code in faults:
            self.faults.add(code, name)
        self.classes.update(found.classes)
        empty = isinstance(about.get("objects"), list) and not about["objects"] and not found.phrases
        self.boxes.update(pictures=1, empty=int(empty), crowds=int(found.crowd.sum()), phrases=len(found.phrases))


def check_data(
    source: str | Path,
    *,
    tokenizer: Callable[[str], int] | None = None,
    split: Literal["train", "val", "test", "all"] = "all",
    min_side: int = 16,
    workers: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Read all samples of a source and decode all its images.

    Args:
        source: Folder, glob, brace pattern or one tar of WebDataset samples.
        tokenizer: Caption -> number of tokens; without one, words are counted.
        split: Which tars of a folder.
        min_side: An image with a shorter side below this many pixels counts as tiny.
        workers: Threads that decode; None means one a core, at most 8.

    Returns:
        source, samples, shards, bytes, splits, images {width, height, aspect, bytes}, captions {per_image, length,
        unit, over_77, missing}, conversations {number, answers, images, length, text_only, bad}, boxes {pictures, empty,
        objects, crowds, phrases, classes, faults}, labels, duplicates, unreadable, tiny,
        cut (each with number and examples), passed_over.

    Raises:
        UsageError: no shards, or no sample in them.
    """
    groups = {name: tars for name, tars in _groups(source, split).items() if tars}
    tars = [(name, tar) for name, group in groups.items() for tar in group]
    splits = {name: {"samples": 0, "shards": len(group)} for name, group in groups.items()}
    threads = min(os.cpu_count() or 1, 8) if workers is None else max(1, workers)
    count_tokens = tokenizer or (lambda text: len(text.split()))
    total, lengths, per_image, talks = ShardReport(), list[int](), list[int](), list[int]()
    with ThreadPoolExecutor(threads) as pool:  # decoding and hashing release Python's lock
        done = pool.map(lambda named: check_shard(named[1], min_side), tars)
        for (name, _), report in zip(tars, tracked(done, "checking shards", len(tars), progress)):
            # not all tokenizers are safe in threads, so captions are counted here
            lengths += [count_tokens(text) for texts in report.captions for text in texts]
            per_image += map(len, report.captions)
            talks += map(count_tokens, report.talks)
            report.captions, report.talks = [], []  # those of a large data set would not fit
            splits[name]["samples"] += report.samples
            total.add(report)
    if not total.samples:
        why = "; ".join(["", *total.cut[:1], *passed_lines(total.passed.result())])
        raise UsageError(f"empty data set: no sample in {source}{why}")
    if (folder := Path(source).expanduser()).is_dir():
        own = OWN | {tar.name for group in _groups(source, "all").values() for tar in group}
        total.passed.add_files(name for name in list_files(folder, total.passed) if name not in own)
    return {
        "source": str(source),
        "samples": total.samples,
        "shards": len(tars),
        "bytes": sum(tar.stat().st_size for _, tar in tars if tar.exists()),
        "splits": splits,
        **_summary(total, lengths, per_image, "tokens" if tokenizer else "words"),
        "conversations": {
            "number": len(total.answers),
            "answers": _quantiles(np.array(total.answers)),
            "images": _quantiles(np.array(total.shown)),
            "length": _quantiles(np.array(talks)),
            "text_only": total.shown.count(0),
            "bad": total.bad.result(),
        },
        "boxes": {
            **{key: total.boxes[key] for key in ("pictures", "empty", "crowds", "phrases")},
            "objects": total.classes.total(),
            "classes": dict(total.classes.most_common()),
            "faults": total.faults.result(),
        },
        "min_side": min_side,
        "cut": _listed(total.cut),
        "passed_over": total.passed.result(),
    }


def check_shard(tar: Path, min_side: int) -> ShardReport:
    """Read one tar; every image is decoded, at 1/8 scale where its format can."""
    report = ShardReport()
    try:
        scan = scan_shard(tar, keep_keys=False)
    except OSError as error:  # a dead link, for one
        report.cut.append(f"{tar.name}: {why_unreadable(tar, error)}")
        return report
    report.passed = scan.passed
    if scan.cut:
        report.cut.append(f"{tar.name}: {scan.cut}")
        if not len(scan.offsets):
            return report
    for key, parts in read_samples(tar):
        name = f"{tar.name}/{key}"
        report.samples += 1
        label, odd = read_label(text_of(parts, "cls"))
        report.labels += label is not None
        report.passed.add(ODD_LABELS, *([f"{name}: {odd}"] if odd is not None else []))
        report.captions.append([text for each in captions_of(parts).values() for text in each])
        if holds_conversation(json_of(parts)):
            if not report.captions[-1]:
                report.captions.pop()
            _add_conversation(report, name, parts, min_side)
            continue
        boxed = holds_regions(json_of(parts))
        if not report.captions[-1] and boxed:
            report.captions.pop()
        elif not report.captions[-1]:
            report.uncaptioned.append(name)
        image = image_of(parts)
        if image is None:
            report.unreadable.append(f"{name}: {why_no_image(parts)}")
        else:
            report.passed.add(FURTHER, *(f"{name}.{part}" for part in parts if image and NUMBERED.match(part)))
            intact = report.add_image(name, image[1], min_side)
            if boxed and intact:
                report.add_regions(name, json_of(parts))
    return report


def _add_conversation(report: ShardReport, name: str, parts: Parts, min_side: int) -> None:
    images = images_of(parts)
    intact = [report.add_image(name, image, min_side) for image in images]
    try:
        talk, _ = read_conversation(parts)
    except ConversationError as error:
        report.bad.add(error.code, f"{name}: {error}")
        return
    if not all(intact):
        report.bad.add("image-unreadable", name)
        return
    report.talks.append("\n".join(turn.text for turn in talk.turns))
    report.answers.append(talk.answers)
    report.shown.append(len(images))


def _groups(source: str | Path, split: str) -> dict[str, list[Path]]:
    """Tars by split; a pattern or one tar is simply ``all``."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return {"all": find_shards(source, "train", option="SOURCE")}
    groups = split_shards(folder, option="SOURCE")
    if split == "all":
        return groups
    if not groups.get(split):
        found = ", ".join(name for name, tars in groups.items() if tars)
        raise UsageError(f"--split {split}: {folder} has only {found}")
    return {split: groups[split]}


def _summary(report: ShardReport, lengths: list[int], per_image: list[int], unit: str) -> dict[str, Any]:
    widths, heights = np.array(report.widths), np.array(report.heights)
    same = defaultdict[bytes, list[str]](list)
    for digest, name in report.digests:
        same[digest].append(name)
    duplicates = [names for names in same.values() if len(names) > 1]
    over = sum(length > MAX_TOKENS for length in lengths)
    return {
        "images": {
            "width": _quantiles(widths),
            "height": _quantiles(heights),
            "aspect": _quantiles(widths / heights if len(widths) else widths),
            "bytes": report.image_bytes,
        },
        "captions": {
            "total": len(lengths),
            "per_image": _quantiles(np.array(per_image)),
            "length": _quantiles(np.array(lengths)),
            "unit": unit,
            f"over_{MAX_TOKENS}": over / len(lengths) if lengths else 0.0,
            "missing": _listed(report.uncaptioned),
        },
        "labels": report.labels,
        "duplicates": {
            "number": sum(len(names) - 1 for names in duplicates),
            "examples": [names[:EXAMPLES] for names in duplicates[:EXAMPLES]],
        },
        "unreadable": _listed(report.unreadable),
        "tiny": _listed(report.tiny),
    }


def _listed(names: list[str]) -> dict[str, Any]:
    return {"number": len(names), "examples": names[:EXAMPLES]}


def _quantiles(values: np.ndarray) -> dict[str, float]:
    """min, p5, median, p95, max; {} of nothing."""
    if not len(values):
        return {}
    return {name: round(float(np.quantile(values, at)), 3) for name, at in QUANTILES.items()}


# ---- one screen ----


def render_check(result: dict[str, Any]) -> RenderableType:
    """The result of `check_data` for a terminal of 80 columns."""
    splits = ", ".join(f"{name} {each['samples']:,}" for name, each in result["splits"].items())
    head = Text(f"{result['source']}: {result['samples']:,} samples", style="bold", overflow="ellipsis", no_wrap=True)
    facts = f"{splits}; {result['shards']:,} shards, {_size(result['bytes'])}; {result['labels']:,} with a label"

    images, captions = result["images"], result["captions"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in QUANTILES:
        table.add_column(name, justify="right")
    rows = {
        "width, pixels": images["width"],
        "height, pixels": images["height"],
        "width / height": images["aspect"],
        "captions an image": captions["per_image"],
        f"caption, {captions['unit']}": captions["length"],
    }
    talks = result["conversations"]
    if talks["number"]:
        rows |= {f"{key} of a conversation": talks[key] for key in ("answers", "images")}
        rows |= {f"conversation, {captions['unit']}": talks["length"]}
        facts += f"; {talks['number']:,} conversations, {talks['text_only']:,} of them without an image"
        # without what only pairs, or only images, have
        rows = {name: values for name, values in rows.items() if values}
    for name, values in rows.items():
        table.add_row(name, *(f"{values[q]:,.6g}" if values else "-" for q in QUANTILES))

    lines: list[RenderableType] = [head, Text(facts), Text(), table]
    over, boxes = captions[f"over_{MAX_TOKENS}"], result["boxes"]
    if captions["length"] or not (talks["number"] or boxes["pictures"]):
        lines.append(Text(f"captions over {MAX_TOKENS} {captions['unit']}: {percent(over)}"))
    lines += _box_lines(boxes) if boxes["pictures"] else []
    return Group(*lines, Text(), *_findings(result))


def _box_lines(boxes: dict[str, Any]) -> list[RenderableType]:
    """What there is of boxes, in two lines."""
    head = f"boxes: {boxes['objects']:,} objects of {len(boxes['classes']):,} classes in {boxes['pictures']:,} images"
    rest = f"{boxes['empty']:,} of them empty; {boxes['crowds']:,} crowds, {boxes['phrases']:,} phrases"
    lines = [Text(f"{head}, {rest}")]
    counted = list(boxes["classes"].items())
    shown_ones = counted if len(counted) <= CLASSES else [*counted[: CLASSES - 1], counted[-1]]
    named = [f"{name} {number:,}" for name, number in shown_ones]
    if len(counted) > CLASSES:
        named.insert(-1, "...")
    return [*lines, Text(f"objects by class: {', '.join(named)}")] if named else [*lines]


def _findings(result: dict[str, Any]) -> list[RenderableType]:
    """One line for each kind of fault, with its first examples."""
    kinds = {
        "unreadable images": result["unreadable"],
        f"tiny images (below {result['min_side']} pixels)": result["tiny"],
        "exact duplicates": result["duplicates"],
        "without a caption": result["captions"]["missing"],
        "broken tars": result["cut"],
    }
    lines: list[RenderableType] = []
    for name, found in kinds.items():
        number = found["number"]
        lines.append(Text(f"{number:>9,}  {name}", style="yellow" if number else "green"))
        for example in found["examples"][:2]:
            words = " = ".join(example) if isinstance(example, list) else example
            lines.append(Text(f"{'':11}{shown(words)}", style="dim", overflow="ellipsis", no_wrap=True))
    faults = {BOX_FAULTS[code]: about for code, about in result["boxes"]["faults"].items()}
    bad = [*bad_lines(result["conversations"]["bad"]), *passed_lines(faults, "boxes")]
    lines += [Text(line, style="yellow", overflow="ellipsis", no_wrap=True) for line in bad]
    passed = passed_lines(result["passed_over"])
    lines += [Text(line, style="yellow", overflow="ellipsis", no_wrap=True) for line in passed[:LINES]]
    return (
        [*lines, Text(f"passed over: {len(passed) - LINES} more kinds; see --json")] if len(passed) > LINES else lines
    )


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
