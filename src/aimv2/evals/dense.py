"""Linear probes of a frozen encoder for segmentation (mIoU) and depth (RMSE): from folders to a result.

Legend: I patches, S side of what the encoder sees, N images of a split.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aimv2.data.images.maps import MapKind, MappedImage, open_pairs, scan_maps, whole_images
from aimv2.errors import UsageError
from aimv2.evals.dense_heads import DenseSettings, Depth, Segmentation, Task, sums_of, train_heads
from aimv2.evals.result import about_model, check_out, make_result, write_result
from aimv2.features.contents import contents_of_files
from aimv2.features.extraction import Cached, cached_features
from aimv2.features.frozen import LAST, Frozen, random_twin, raw_pixels
from aimv2.models.sizes import EncoderConfig

HELD_OUT = 0.1  # of the training images: where the rate is chosen
BASELINES = ("random", "pixels")


@dataclass(frozen=True)
class Asked:
    """What a user asked for beside the encoder; see :func:`aimv2.api.segment` and :func:`aimv2.api.depth`."""

    data: str
    val_list: str | None
    val_fraction: float
    settings: DenseSettings
    baselines: tuple[str, ...]
    trunk_batch: int
    out: str | None


@dataclass(frozen=True)
class Work:
    """Both splits, read and proven good.

    Attributes:
        train, test: pairs.
        split: name of the test split.
        maps: of the training images, [N, S, S].
        kind: of the maps.
        task: of the heads.
        empty: training and test images whose maps say nothing.
    """

    train: list[MappedImage]
    test: list[MappedImage]
    split: str
    maps: np.ndarray
    kind: MapKind
    task: Task
    empty: tuple[int, int]


def check_view(frozen: Frozen, image_size: int | None) -> None:
    """
    Raises:
        UsageError: a size that the encoder can't see, or that its patches don't fill.
    """
    size = frozen.side
    if image_size is not None and image_size != size:
        raise UsageError(f"--image-size {image_size}: {frozen.name} ({frozen.kind}) sees {size} px alone")
    config = getattr(frozen.module, "config", None)
    if not isinstance(config, EncoderConfig):
        return
    if size % config.patch_size:
        raise UsageError(f"--image-size {size}: a multiple of {frozen.name}'s patch of {config.patch_size} px expected")
    try:
        config.check_pixels((1, 3, size, size))
    except ValueError as error:
        raise UsageError(f"--image-size {size}: {error}") from None


def segmentation_work(asked: Asked, kind: MapKind, size: int, classes: int | None, scratch: Path) -> Work:
    """
    Raises:
        UsageError: see :func:`aimv2.data.images.maps.open_pairs` and :func:`aimv2.data.images.maps.scan_maps`; fewer than two classes, a
            mask value beyond the last class, a split where everything is ignored.
    """
    train, test, split = open_pairs(asked.data, kind, asked.val_list, asked.val_fraction)
    scans = scan_maps(train, kind, size, scratch / "train-maps.npy"), scan_maps(test, kind)
    top, where = max((scan.largest for scan in scans), key=lambda found: found[0])
    if classes is not None and top >= classes:
        raise UsageError(f"--classes {classes}: {where} holds class {top:.0f}, the last one is {classes - 1}")
    count = int(top) + 1 if classes is None else classes
    if count < 2:
        raise UsageError(
            f"--data {asked.data}: {count} class{'' if count == 1 else 'es'} in the masks, at least two expected; see "
            "--ignore and --reduce-zero for values that count as nothing (255 does by default)"
        )
    for name, scan, pairs in zip(("training", "test"), scans, (train, test)):
        if scan.empty == len(pairs):
            raise UsageError(f"--data {asked.data}: all pixels of the {name} masks are ignored; see --ignore")
    maps = scans[0].maps
    assert maps is not None
    return Work(train, test, split, maps, kind, Segmentation(count), (scans[0].empty, scans[1].empty))


def depth_work(asked: Asked, kind: MapKind, size: int, scratch: Path) -> Work:
    """
    Raises:
        UsageError: see :func:`aimv2.data.images.maps.open_pairs` and :func:`aimv2.data.images.maps.scan_maps`; a split without any depth.
    """
    train, test, split = open_pairs(asked.data, kind, asked.val_list, asked.val_fraction)
    scans = scan_maps(train, kind, size, scratch / "train-maps.npy"), scan_maps(test, kind)
    maps = scans[0].maps
    assert maps is not None
    task = depth_task(maps)
    for name, scan, pairs in zip(("training", "test"), scans, (train, test)):
        if task is None or scan.empty == len(pairs):
            raise UsageError(
                f"--data {asked.data}: no depth in the {name} maps: every pixel is 0, which means no value"
            )
    assert task is not None
    return Work(train, test, split, maps, kind, task, (scans[0].empty, scans[1].empty))


def depth_task(maps: np.ndarray) -> Depth | None:
    """Mean, spread and range of all depths in [N, S, S]; None where there are none."""
    count, total, square, low, high = 0, 0.0, 0.0, math.inf, 0.0
    for one in maps:
        known = one[one > 0].astype(np.float64)
        if len(known):
            count, total, square = count + len(known), total + known.sum(), square + (known**2).sum()
            low, high = min(low, known.min()), max(high, known.max())
    if not count:
        return None
    mean = total / count
    spread = math.sqrt(max(square / count - mean**2, 0.0))
    return Depth(float(mean), spread if spread > 1e-6 * mean else float(mean), float(low), float(high))


@dataclass(frozen=True)
class Seen:
    """A split as an encoder sees it: features [N, I, D] a layer, and what N images could be read.

    Attributes:
        cached: the features.
        place: rows of the cache to rows of the pairs.
    """

    cached: Cached
    place: np.ndarray


def see(frozen: Frozen, pairs: Sequence[MappedImage], name: str, asked: Asked, folder: Path | None) -> Seen:
    """
    Raises:
        UsageError: no image could be read, a cache of something else, patches that are no square map.
    """
    data = whole_images(asked.data, f"{name}-whole", pairs, frozen.side)
    contents = contents_of_files(pair.image for pair in pairs)
    cached = cached_features(frozen, data, asked.settings.layers, "none", folder, asked.trunk_batch, contents=contents)
    patches = cached.features[0].shape[1]
    if math.isqrt(patches) ** 2 != patches:
        raise UsageError(f"MODEL {frozen.name}: {patches} patches are no square map")
    place = {pair.key: row for row, pair in enumerate(pairs)}
    return Seen(cached, np.array([place[key] for key in cached.keys], dtype=np.int64))


def encoder_figures(frozen: Frozen, work: Work, asked: Asked, folder: Path | None) -> dict[str, Any]:
    """Trains with every seed, chooses a rate on held-out training images, measures on the test split."""
    settings, task = asked.settings, work.task
    train, test = (
        see(frozen, pairs, name, asked, folder) for name, pairs in (("train", work.train), ("test", work.test))
    )
    order = np.random.default_rng(0).permutation(len(train.place))
    held = max(1, round(HELD_OUT * len(order))) if len(settings.rates) > 1 else 0
    if held >= len(order):
        raise UsageError(f"--data {asked.data}: one training image; two are needed to choose among --rates")

    def train_maps(rows: Any) -> np.ndarray:
        return np.asarray(work.maps[train.place[rows]])

    def test_map(row: int) -> np.ndarray:
        return work.kind.read(work.test[test.place[row]].map)

    every, found, table = range(len(settings.rates)), [], []
    for seed in settings.seeds:
        heads = train_heads(
            task, train.cached.features, train_maps, np.sort(order[held:]), settings, seed, frozen.device
        )
        best = 0
        if held:
            sums = sums_of(task, heads, every, train.cached.features, train_maps, np.sort(order[:held]), frozen.device)
            if not np.any(sums):
                raise UsageError(f"--data {asked.data}: the {held} held-out training maps say nothing; more are needed")
            table.append([task.figures(part)[task.headline] for part in sums])
            best = int(np.argmax(task.sign * np.array(table[-1])))
        rows = np.arange(len(test.place))
        (tested,) = sums_of(task, heads, [best], test.cached.features, test_map, rows, frozen.device)
        if not np.any(tested):
            raise UsageError(f"--data {asked.data}: the maps of the test images that could be read say nothing")
        found.append({**task.figures(tested), "chosen": settings.rates[best]})
    figures = over_seeds(found, task.headline)
    if held:
        means = np.mean(table, 0).tolist()
        figures["table"] = [{"rate": r, f"held_out_{task.headline}": m} for r, m in zip(settings.rates, means)]
    figures["selected_on"] = f"{held} training images, held out" if held else "nothing to choose: one rate"
    figures["unreadable"] = {"train": train.cached.rejected, "test": test.cached.rejected}
    return figures


def over_seeds(found: Sequence[dict[str, Any]], headline: str) -> dict[str, Any]:
    """Means of the figures over seeds; ``..._by_seed`` of the headline, and the rate that each seed chose."""
    figures: dict[str, Any] = {}
    for key in found[0]:
        if key == "per_class_iou":
            columns = zip(*(one[key] for one in found))
            known = [[iou for iou in column if iou is not None] for column in columns]
            figures[key] = [float(np.mean(column)) if column else None for column in known]
        elif key != "chosen":
            figures[key] = float(np.mean([one[key] for one in found]))
    figures[f"{headline}_by_seed"] = [one[headline] for one in found]
    figures["chosen"] = [one["chosen"] for one in found]
    return figures


def measure(
    verb: str, frozen: Frozen, asked: Asked, make_work: Callable[[Path], Work], protocol: dict[str, Any]
) -> dict[str, Any]:
    """The verbs ``segment`` and ``depth``: reads, trains, chooses, tests, writes.

    Args:
        verb: of the command line.
        frozen: the encoder.
        asked: see there.
        make_work: reads the data; gets a scratch folder that lives as long as it is needed.
        protocol: what the result says beside the settings.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        out = check_out(asked.out, verb)
        work = make_work(Path(scratch))
        home = out / "features" if out else None
        figures = encoder_figures(frozen, work, asked, home)
        baselines = {}
        for name in asked.baselines:
            if name == "random":
                other, mine = random_twin(frozen, asked.settings.seeds[0]), asked
            else:  # pixels have no layers
                other, mine = raw_pixels(frozen), replace(asked, settings=replace(asked.settings, layers=(LAST,)))
            baselines[name] = encoder_figures(other, work, mine, home / name if home else None)
        if baselines:
            figures["baselines"] = baselines
        data = {
            "name": Path(asked.data).name, "source": asked.data, "split": work.split,
            "train_images": len(work.train), "test_images": len(work.test),
            "train_maps_without_values": work.empty[0], "test_maps_without_values": work.empty[1],
        }  # fmt: skip
        if verb == "segment":
            data["classes"] = work.task.outputs
    about = {"name": f"linear {verb} probe", **protocol, **asdict(asked.settings)}
    seconds = time.perf_counter() - started
    seeds = list(asked.settings.seeds)
    return write_result(out, make_result(verb, about, about_model(frozen), data, figures, seconds, seeds))
