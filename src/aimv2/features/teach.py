"""``data teach``: shards with the features of a teacher beside each image, made once and read in every run after.

Legend: K views, I patches, E width of the teacher.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.prefetch import ahead, batched
from aimv2.data.shards.format import (
    MANIFEST,
    find_shards,
    image_of,
    read_samples,
    scan_shard,
    split_shards,
    write_manifest,
    write_shard,
)
from aimv2.data.stream.samples import image_bytes, sample_rng
from aimv2.data.stream.teacher_views import EXTENSION, write_views
from aimv2.data.stream.transforms import crop_resize, random_crop_box, to_pixels
from aimv2.errors import UsageError

PLAN = ".teach.json"  # in OUT while it is not finished
Look = Callable[[Tensor], Tensor]  # uint8 [B, 3, S, S] -> patch features [B, I, E]


@dataclass(frozen=True)
class Lesson:
    """Which views of each image are shown to the teacher.

    Attributes:
        name, sha256, image_size, grid, width: of the teacher; see :class:`aimv2.objectives.distill.Teacher`.
        views: K.
        crop_scale, crop_ratio, flip: see :class:`aimv2.config.schema.DataConfig`.
        seed: of crops and flips.
    """

    name: str
    sha256: str
    image_size: int
    grid: int
    width: int
    views: int
    crop_scale: float
    crop_ratio: tuple[float, float]
    flip: float
    seed: int

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "crop_ratio": list(self.crop_ratio)}


@dataclass
class Seen:
    """A sample and what the teacher is shown of it.

    Attributes:
        key, parts: of the sample.
        boxes: [K, 4], shares of width and height.
        flips: [K].
        images: uint8 [K, 3, S, S]; None where the image can't be read.
    """

    key: str
    parts: dict[str, bytes]
    boxes: np.ndarray
    flips: np.ndarray
    images: np.ndarray | None


def teach(source: str, out: str, lesson: Lesson, look: Look, batch_size: int) -> dict[str, Any]:
    """Writes ``OUT/train-NNNNNN.tar``, one for each training tar of the source, and copies its other splits.

    Args:
        source: folder, glob, brace pattern or one tar.
        out: a new folder, or one that the same call began.
        lesson: teacher and views.
        look: the teacher.
        batch_size: views at once.

    Returns:
        counts and sizes.

    Raises:
        UsageError: nothing to read, an OUT that holds something else, a full disk.
    """
    shards, folder = find_shards(source, "train", option="DATA"), Path(out).expanduser()
    if not shards:
        raise UsageError(f"DATA {source}: validation shards only (val-*, test-*); train-* are expected")
    if folder.resolve() in {shard.resolve().parent for shard in shards}:
        raise UsageError(f"OUT {out} is the folder of DATA itself; give another one")
    plan = open_plan(folder, out, {"teacher": lesson.as_json(), "source": [str(shard.resolve()) for shard in shards]})
    if "summary" in plan:
        return plan["summary"]
    done: dict[str, dict[str, int]] = plan["done"]
    a_view = lesson.grid**2 * (lesson.width + 2)
    say(f"{lesson.views} views of {lesson.grid} x {lesson.grid} patches, {lesson.width} values each: about "
        f"{lesson.views * a_view / 1e3:,.1f} kB a sample")  # fmt: skip
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Teaching shards", total=len(shards), completed=len(done))
        for number, shard in enumerate(shards):
            name = f"train-{number:06d}.tar"
            if name in done and (folder / name).is_file():
                continue
            counts = {"samples": 0, "unreadable": 0, "teacher_bytes": 0, "image_bytes": 0}
            write_shard(folder / name, taught(shard, lesson, look, batch_size, counts))
            done[name] = counts
            write_aside(folder / PLAN, plan)
            progress.advance(task)
    copied = copy_splits(source, folder)
    return finish(folder, out, lesson, done, copied, plan)


def taught(
    shard: Path, lesson: Lesson, look: Look, batch_size: int, counts: dict[str, int]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard with their KEY.teacher; one that can't be read goes on without. Adds to ``counts``."""
    together = max(batch_size // lesson.views, 1)
    seen = ahead(lambda sample: show(*sample, lesson), read_samples(shard))
    for group in batched(seen, together):
        pictures = [one.images for one in group if one.images is not None]
        features = iter(())
        if pictures:
            found = [look(part).float().cpu() for part in torch.from_numpy(np.concatenate(pictures)).split(batch_size)]
            features = iter(torch.cat(found).split(lesson.views))
        for one in group:
            counts["samples"] += 1
            image = image_of(one.parts)
            counts["image_bytes"] += len(image[1]) if image else 0
            parts = {name: part for name, part in one.parts.items() if name != EXTENSION}
            if one.images is None:
                counts["unreadable"] += 1
            else:
                parts[EXTENSION] = write_views(one.boxes, one.flips, next(features).numpy())
                counts["teacher_bytes"] += len(parts[EXTENSION])
            yield one.key, parts


def show(key: str, parts: dict[str, bytes], lesson: Lesson) -> Seen:
    """Draws the views of a sample as training draws them: functions of (seed, key, number of the view)."""
    size = lesson.image_size
    boxes, flips = np.zeros((lesson.views, 4), np.float32), np.zeros(lesson.views, np.uint8)
    try:
        draft = math.ceil(1.2 * size / math.sqrt(lesson.crop_scale))
        image = decode_image(image_bytes(parts), draft_size=draft)
    except ImageError:
        return Seen(key, parts, boxes, flips, None)
    images = np.zeros((lesson.views, 3, size, size), np.uint8)
    for view in range(lesson.views):
        rng = sample_rng(lesson.seed, key, 0, view)
        box = random_crop_box(rng, *image.size, lesson.crop_scale, lesson.crop_ratio)
        crop = crop_resize(image, box, (size, size))
        if rng.random() < lesson.flip:
            flips[view] = 1
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes[view] = np.array(box) / np.array(image.size * 2)
        images[view] = to_pixels(crop)
    return Seen(key, parts, boxes, flips, images)


# ---- the folder ----


def open_plan(folder: Path, out: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """What is done in OUT already: ``{"teacher", "source", "done"}``, or with ``summary`` where all of it is.

    Raises:
        UsageError: the folder holds something else, or can't be written.
    """
    for name in (MANIFEST, PLAN):
        try:
            held = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
        stored = held.get("taught", held) if name == MANIFEST else held
        if {key: stored.get(key) for key in wanted} == wanted:
            return stored
        raise UsageError(
            f"OUT {out} holds {'' if name == MANIFEST else 'a part of '}other shards (another teacher, other views or other "
            "DATA); give another folder, or the same options to go on"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"OUT {out}: something is there already; give a new folder, or an empty one")
    plan = {**wanted, "done": {}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / PLAN, plan)
    except OSError as error:
        raise UsageError(f"OUT {out} can't be written: {error.strerror}") from None
    return plan


def write_aside(path: Path, value: dict[str, Any]) -> None:
    """JSON that is whole or as it was."""
    aside = path.with_name(f"{path.name}.aside")
    aside.write_text(json.dumps(value))
    os.replace(aside, path)


def copy_splits(source: str, folder: Path) -> dict[str, int]:
    """Copies the val-* and test-* tars of a source folder; {split: samples}."""
    if not Path(source).expanduser().is_dir():
        return {}
    counts = {}
    for split, tars in split_shards(Path(source).expanduser(), option="DATA").items():
        if split == "train" or not tars:
            continue
        for tar in tars:
            shutil.copyfile(tar, folder / tar.name)
        counts[split] = sum(len(scan_shard(tar).keys) for tar in tars)
    return counts


def finish(
    folder: Path,
    out: str,
    lesson: Lesson,
    done: dict[str, dict[str, int]],
    copied: dict[str, int],
    plan: dict[str, Any],
) -> dict[str, Any]:
    """Writes the manifest, removes the plan; sizes and counts."""
    total = {key: sum(counts[key] for counts in done.values()) for key in next(iter(done.values()))}
    samples = max(total["samples"], 1)
    summary = {
        "out": out,
        "shards": len(done),
        "samples": total["samples"],
        "unreadable": total["unreadable"],
        "views": lesson.views,
        "teacher": lesson.name,
        "teacher_sha256": lesson.sha256,
        "teacher_bytes_a_sample": total["teacher_bytes"] / samples,
        "image_bytes_a_sample": total["image_bytes"] / samples,
        "teacher_gb": total["teacher_bytes"] / 1e9,
        "image_gb": total["image_bytes"] / 1e9,
    }
    write_manifest(
        folder, {"train": total["samples"], **copied}, teacher=lesson.as_json(), taught={**plan, "summary": summary}
    )
    (folder / PLAN).unlink(missing_ok=True)
    return summary


def say(line: str) -> None:
    """A line for the user, on standard error."""
    print(line, file=sys.stderr, flush=True)
