"""``data teach``: shards with a teacher's features stored with each image, made once and read by every later run.

While OUT is not finished it is a feature store, a part for each shard.

Legend: K views, I patches, E width of the teacher.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.images.readers import contents_of_files
from aimv2.data.prefetch import batched, prefetch_map
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
from aimv2.data.shards.tars import without_dead_links
from aimv2.data.stream.draws import sample_rng
from aimv2.data.stream.samples import image_bytes
from aimv2.data.stream.teacher_views import EXTENSION, write_views
from aimv2.data.stream.transforms import crop_resize, random_crop_box, to_pixels
from aimv2.errors import UsageError
from aimv2.features.fingerprint import fingerprint
from aimv2.features.store import FeatureStore, check_fingerprint, read_object
from aimv2.io import say
from aimv2.progress import progress_bar, tracked

PLAN, NOTE = ".teach.json", ".teach-{:06d}.json"  # in OUT while it is not finished
ViewFeatures = Callable[[Tensor], Tensor]  # uint8 [B, 3, S, S] -> patch features [B, I, E]


@dataclass(frozen=True)
class Lesson:
    """The teacher, and the views of each image that it encodes.

    Attributes:
        name, sha256, image_size, grid, width: see :class:`aimv2.features.teacher.Teacher`.
        views: K.
        crop_scale, crop_ratio, flip: see :class:`aimv2.config.schema.DataConfig`.
        seed: of crops and flips.
        model: the teacher's fingerprint; see :func:`aimv2.features.fingerprint.model_fingerprint`.
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
    model: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {key: value for key, value in asdict(self).items() if key != "model"} | {
            "crop_ratio": list(self.crop_ratio)
        }

    def fingerprint(self, shards: list[Path]) -> dict[str, Any]:
        """Of the features of these shards."""
        view = {key: value for key, value in self.as_json().items() if key not in ("name", "sha256")}
        images = {
            "source": [str(shard.resolve()) for shard in shards],
            "contents_sha256": contents_of_files(shards),
        }
        return fingerprint({"weights_sha256": self.sha256, **self.model}, view, (), "none", images)


@dataclass
class ViewedSample:
    """A sample and its views.

    Attributes:
        key, parts: of the sample.
        boxes: [K, 4], fractions of width and height.
        flips: [K].
        images: uint8 [K, 3, S, S]; None where the image can't be read.
    """

    key: str
    parts: dict[str, bytes]
    boxes: np.ndarray
    flips: np.ndarray
    images: np.ndarray | None


def teach(source: str, out: str, lesson: Lesson, run: ViewFeatures, batch_size: int) -> dict[str, Any]:
    """Writes ``OUT/train-NNNNNN.tar``, one for each training tar of the source, and copies its other splits.

    Args:
        source: folder, glob, brace pattern or one tar.
        out: a new folder, or one that the same call began.
        lesson: teacher and views.
        run: the teacher.
        batch_size: views at once.

    Returns:
        counts and sizes.

    Raises:
        UsageError: nothing to read, an OUT that holds something else, a full disk.
    """
    shards, folder = find_shards(source, "train", option="DATA"), Path(out).expanduser()
    without_dead_links(shards, "DATA")
    if not shards:
        raise UsageError(
            f"DATA {source}: validation shards only (val-*, test-*); train-* are expected", code="not-found"
        )
    if folder.resolve() in {shard.resolve().parent for shard in shards}:
        raise UsageError(f"OUT {out} is the folder of DATA itself; give another one", code="conflict")
    wanted = lesson.fingerprint(shards)
    if (folder / MANIFEST).is_file():
        finished = read_object(folder / MANIFEST, "OUT").get("taught")
        if finished is None:
            raise UsageError(f"OUT {out}: holds other shards; give a new folder", code="exists")
        check_fingerprint(finished, wanted, f"OUT {out}")
        return finished["summary"]
    store = FeatureStore(folder, wanted, "OUT", about=PLAN, note=NOTE)
    a_view = lesson.grid**2 * (lesson.width + 2)
    line = (
        f"{lesson.views} views of {lesson.grid} x {lesson.grid} patches, {lesson.width} values each: about "
        f"{lesson.views * a_view / 1e3:,.1f} kB a sample"
    )
    say(line)
    for part in range(len(shards)):  # a tar that was removed since is made again
        note = store.note(part)
        if note is not None and note["samples"] and not (folder / f"train-{part:06d}.tar").is_file():
            store.note_file(part).unlink()
    missing = store.missing(len(shards))
    counted = (scan_shard(shards[part]) for part in tracked(missing, "counting samples", len(missing)))
    total = sum(len(scan.keys) for scan in counted)
    with progress_bar("samples", total) as advance:
        for part in missing:
            counts = {"samples": 0, "unreadable": 0, "teacher_bytes": 0, "image_bytes": 0}
            samples = with_features(shards[part], lesson, run, batch_size, counts, advance)
            write_shard(folder / f"train-{part:06d}.tar", samples)
            store.commit(part, counts)
    return finish(store, out, lesson, store.gather(len(shards)), copy_splits(source, folder))


def with_features(
    shard: Path,
    lesson: Lesson,
    run: ViewFeatures,
    batch_size: int,
    counts: dict[str, int],
    advance: Callable[[int], None],
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard with their KEY.teacher; one that can't be read has none. Adds to ``counts``, and says how many more
    are read."""
    together = max(batch_size // lesson.views, 1)
    views = prefetch_map(lambda sample: draw_views(*sample, lesson), read_samples(shard))
    for group in batched(views, together):
        pictures = [one.images for one in group if one.images is not None]
        features = iter(())
        if pictures:
            found = [run(part).float().cpu() for part in torch.from_numpy(np.concatenate(pictures)).split(batch_size)]
            features = iter(torch.cat(found).split(lesson.views))
        advance(len(group))
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


def draw_views(key: str, parts: dict[str, bytes], lesson: Lesson) -> ViewedSample:
    """Draws the views of a sample as training draws them: functions of (seed, key, number of the view)."""
    size = lesson.image_size
    boxes, flips = np.zeros((lesson.views, 4), np.float32), np.zeros(lesson.views, np.uint8)
    try:
        draft = math.ceil(1.2 * size / math.sqrt(lesson.crop_scale))
        image = decode_image(image_bytes(parts), draft_size=draft)
    except ImageError:
        return ViewedSample(key, parts, boxes, flips, None)
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
    return ViewedSample(key, parts, boxes, flips, images)


def copy_splits(source: str, folder: Path) -> dict[str, int]:
    """Copies the val-* and test-* tars of a source folder; {split: samples}."""
    if not Path(source).expanduser().is_dir():
        return {}
    counts = {}
    for split, tars in split_shards(Path(source).expanduser(), option="DATA").items():
        if split == "train" or not tars:
            continue
        for tar in without_dead_links(tars, "DATA"):
            shutil.copyfile(tar, folder / tar.name)
        counts[split] = sum(len(scan_shard(tar).keys) for tar in tars)
    return counts


def finish(
    store: FeatureStore, out: str, lesson: Lesson, notes: list[dict[str, Any]], copied: dict[str, int]
) -> dict[str, Any]:
    """Writes the manifest and removes the store's own files.

    Returns:
        sizes and counts.
    """
    total = {key: sum(counts[key] for counts in notes) for key in notes[0]}
    samples = max(total["samples"], 1)
    summary = {
        "out": out,
        "shards": len(notes),
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
    done = {f"train-{part:06d}.tar": counts for part, counts in enumerate(notes)}
    write_manifest(
        store.folder,
        {"train": total["samples"], **copied},
        teacher=lesson.as_json(),
        taught={**store.about, "teacher": lesson.as_json(), "done": done, "summary": summary},
    )
    store.discard(len(notes))
    return summary
