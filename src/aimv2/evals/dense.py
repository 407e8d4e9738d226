"""Probes of a frozen encoder for segmentation (mIoU) and depth (RMSE): from folders to a result.

Legend: I patches, S side of what the encoder sees, N images of a split.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from aimv2.data.datasets.dense import DenseSet, Pairs, dense_pairs, dense_set
from aimv2.data.images.maps import MILLIMETRES, MapKind, MappedImage, depths, masks, open_pairs, scan_maps, whole_images
from aimv2.data.images.readers import contents_of_files
from aimv2.errors import UsageError
from aimv2.evals.dense_heads import DenseSettings, DenseTask, Depth, Segmentation, sums_of, train_heads
from aimv2.evals.harness import Evaluation, baseline_figures, open_baselines
from aimv2.evals.options import DenseOptions
from aimv2.evals.result import about_model
from aimv2.features.extraction import Cached, cached_features
from aimv2.features.frozen import LAST, Frozen
from aimv2.models.dpt_head import SCALES
from aimv2.models.sizes import EncoderConfig

log = logging.getLogger(__name__)

NEAR, FAR = 0.3, 200.0  # metres: a data set all below or all above has another unit
BLURRED, MOST = 16, 0.9  # more mask values than this, two of them with most pixels: edges between two classes
APART, OFTEN = 0.5, 0.01  # a largest depth with this fraction of pixels, and no other near it: a mark for no depth
HEADS = {
    "linear": "batch norm without affine, 1x1 linear, bilinear upsampling",
    "dpt": "batch norm without affine, DPT's reassembly and fusion of four scales, bilinear upsampling from 4 times the patch grid",
}
RATES = {"linear": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "dpt": (1e-4, 1e-3)}
HELD_OUT = 0.1  # of the training images: where the learning rate is chosen


@dataclass(frozen=True)
class DenseWork:
    """Both splits, read and proven good.

    Attributes:
        train, test: pairs.
        split: name of the test split.
        maps: of the training images, [N, S, S].
        kind: of the test maps.
        task: of the heads.
        empty: training and test images whose maps say nothing.
    """

    train: list[MappedImage]
    test: list[MappedImage]
    split: str
    maps: np.ndarray
    kind: MapKind
    task: DenseTask
    empty: tuple[int, int]


def check_view(frozen: Frozen, image_size: int | None) -> None:
    """
    Raises:
        UsageError: a size that the encoder can't see, or that its patches don't fill.
    """
    size = frozen.side
    if image_size is not None and image_size != size:
        raise UsageError(f"--image-size {image_size}: {frozen.name} ({frozen.kind}) sees {size} px only")
    config = getattr(frozen.module, "config", None)
    if not isinstance(config, EncoderConfig):
        return
    if size % config.patch_size:
        raise UsageError(f"--image-size {size}: a multiple of {frozen.name}'s patch of {config.patch_size} px expected")
    try:
        config.check_pixels((1, 3, size, size))
    except ValueError as error:
        raise UsageError(f"--image-size {size}: {error}") from None


def pairs_of(options: DenseOptions, data: str, kind: MapKind, one: DenseSet | None) -> Pairs:
    """Training pairs, test pairs, and the name of the test split; a registered set's own, and a line where its numbers differ.

    Raises:
        UsageError: see :func:`aimv2.data.images.maps.open_pairs` and :func:`aimv2.data.datasets.dense.dense_pairs`.
    """
    if one is None:
        return open_pairs(data, kind, options.val_list, options.val_fraction)
    train, test, split = dense_pairs(one, data)
    for name, found, wanted in (("training", train, one.train), ("test", test, one.test)):
        if len(found) != wanted:
            log.warning("%s: %s %s images, %s has %s", data, f"{len(found):,}", name, one.name, f"{wanted:,}")
    return train, test, split


def dataset_of(command: str, options: DenseOptions, others: dict[str, bool]) -> DenseSet | None:
    """The registered set that ``--dataset`` names.

    Args:
        command: segment or depth.
        options: of the command.
        others: options that say what a registered set knows -> whether they were given.

    Raises:
        UsageError: an unknown name, or one of the others is given too.
    """
    if options.dataset is None:
        return None
    others = others | {"--val-list": options.val_list is not None, "--val-fraction": options.val_fraction > 0}
    if given := next((option for option, used in others.items() if used), None):
        raise UsageError(f"{given}: --dataset {options.dataset} knows it; leave {given} out", code="conflict")
    return dense_set(options.dataset, command)


def segmentation_work(
    options: DenseOptions, data: str, kinds: tuple[MapKind, MapKind], size: int, classes: int | None, scratch: Path,
    one: DenseSet | None = None,
) -> DenseWork:  # fmt: skip
    """
    Raises:
        UsageError: see :func:`aimv2.data.images.maps.open_pairs` and :func:`aimv2.data.images.maps.scan_maps`; fewer than two classes, a
            mask value beyond the last class, a split where everything is ignored.
    """
    train, test, split = pairs_of(options, data, kinds[0], one)
    scans = scan_maps(train, kinds[0], size, scratch / "train-maps.npy"), scan_maps(test, kinds[1])
    top, where = max((scan.largest for scan in scans), key=lambda found: found[0])
    if classes is not None and top >= classes:
        raise UsageError(f"--classes {classes}: {where} holds class {top:.0f}, the last one is {classes - 1}")
    found = sorted(set().union(*(scan.values for scan in scans)))
    count = int(top) + 1 if classes is None else classes
    if classes is None and count > 2 * len(found) and found:
        shown = ", ".join(map(str, found[:4])) + ", ..." * (len(found) > 4)
        values = ",".join(map(str, found)) if len(found) <= 16 else "LIST"
        raise UsageError(
            f"--data {data}: the masks hold the values {shown} only, which would be {count} classes: give --values "
            f"{values} if each is a class, or --classes {count} if they are ids",
            option="--values",
        )
    if count < 2:
        raise UsageError(
            f"--data {data}: {count} class{'' if count == 1 else 'es'} in the masks, at least two expected; see "
            "--ignore and --reduce-zero for values that count as nothing (255 does by default; --values 0,255 makes it a class)"
        )
    for name, scan, pairs in zip(("training", "test"), scans, (train, test)):
        if scan.empty == len(pairs):
            raise UsageError(f"--data {data}: all pixels of the {name} masks are ignored; see --ignore")
    maps = scans[0].maps
    assert maps is not None
    pixels = np.zeros(int(top) + 1, np.int64)
    for ids in maps:
        pixels += np.bincount(ids[ids >= 0], minlength=len(pixels))
    if classes is None and len(found) > BLURRED and (two := np.sort(pixels)[-2:].sum() / max(pixels.sum(), 1)) > MOST:
        log.warning(
            "%s: two of %d mask values hold %.1f%% of the pixels; blurred edges? --classes says how many there are",
            data,
            len(found),
            100 * two,
        )
    return DenseWork(train, test, split, maps, kinds[1], Segmentation(count), (scans[0].empty, scans[1].empty))


def depth_work(
    options: DenseOptions,
    data: str,
    kinds: tuple[MapKind, MapKind],
    size: int,
    scratch: Path,
    one: DenseSet | None = None,
) -> DenseWork:
    """
    Raises:
        UsageError: see :func:`aimv2.data.images.maps.open_pairs` and :func:`aimv2.data.images.maps.scan_maps`; a split without any depth.
    """
    train, test, split = pairs_of(options, data, kinds[0], one)
    scans = scan_maps(train, kinds[0], size, scratch / "train-maps.npy"), scan_maps(test, kinds[1])
    maps = scans[0].maps
    assert maps is not None
    task = depth_task(maps)
    if task is not None:
        log.info("%s: training depths of %.3g to %.3g m", data, task.low, task.high)
        if task.high < NEAR or task.low > FAR:
            log.warning("%s: training depths of %.3g to %.3g m; is --depth-scale right?", data, task.low, task.high)
        if (part := mark_fraction(maps, task.high)) > OFTEN:
            log.warning(
                "%s: %.1f%% of the training depths are %.5g m, far beyond all others; if that marks no depth, give --invalid",
                data,
                100 * part,
                task.high,
            )
    for name, scan, pairs in zip(("training", "test"), scans, (train, test)):
        if task is None or scan.empty == len(pairs):
            raise UsageError(f"--data {data}: no depth in the {name} maps: every pixel is 0, which means no value")
    assert task is not None
    return DenseWork(train, test, split, maps, kinds[1], task, (scans[0].empty, scans[1].empty))


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


def mark_fraction(maps: np.ndarray, high: float) -> float:
    """The fraction of the known pixels of [N, S, S] that hold the largest depth, where no other is near it; else 0."""
    known, tops, second = 0, 0, 0.0
    for one in maps:
        top = one >= np.float32(high)
        known, tops = known + int((one > 0).sum()), tops + int(top.sum())
        second = max(second, float(one[~top].max(initial=0)))
    return tops / known if 0 < second < APART * high else 0.0


@dataclass(frozen=True)
class DenseFeatures:
    """Features of a split, [N, I, D] per layer, of the N images that could be read.

    Attributes:
        cached: the features.
        place: rows of the cache to rows of the pairs.
    """

    cached: Cached
    place: np.ndarray


def dense_features(
    frozen: Frozen,
    pairs: Sequence[MappedImage],
    name: str,
    options: DenseOptions,
    layers: Sequence[str],
    folder: Path | None,
) -> DenseFeatures:
    """
    Raises:
        UsageError: no image could be read, a cache of something else, patches that are no square map.
    """
    data = whole_images(options.data or "", f"{name}-whole", pairs, frozen.side)
    contents = contents_of_files(pair.image for pair in pairs)
    cached = cached_features(frozen, data, layers, "none", folder, options.trunk_batch, contents=contents)
    patches = cached.features[0].shape[1]
    if math.isqrt(patches) ** 2 != patches:
        raise UsageError(f"MODEL {frozen.name}: {patches} patches are no square map", code="unsupported")
    place = {pair.key: row for row, pair in enumerate(pairs)}
    return DenseFeatures(cached, np.array([place[key] for key in cached.keys], dtype=np.int64))


def encoder_figures(
    frozen: Frozen, work: DenseWork, options: DenseOptions, settings: DenseSettings, folder: Path | None
) -> dict[str, Any]:
    """Trains with every seed, chooses a learning rate on held-out training images, evaluates on the test split."""
    task = work.task
    train, test = (
        dense_features(frozen, pairs, name, options, settings.layers, folder)
        for name, pairs in (("train", work.train), ("test", work.test))
    )
    order = np.random.default_rng(0).permutation(len(train.place))
    held = max(1, round(HELD_OUT * len(order))) if len(settings.rates) > 1 else 0
    if held >= len(order):
        raise UsageError(f"--data {options.data}: one training image; two are needed to choose among --rates")

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
                raise UsageError(
                    f"--data {options.data}: the {held} held-out training maps say nothing; more are needed"
                )
            table.append([task.figures(part)[task.headline] for part in sums])
            best = int(np.argmax(task.sign * np.array(table[-1])))
        rows = np.arange(len(test.place))
        (tested,) = sums_of(task, heads, [best], test.cached.features, test_map, rows, frozen.device)
        if not np.any(tested):
            raise UsageError(f"--data {options.data}: the maps of the test images that could be read say nothing")
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


def evaluate_segmentation(
    options: DenseOptions, classes: int | None, ignore: int, reduce_zero: bool, values: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """The command ``segment``; see :class:`aimv2.commands.segment.SegmentOptions`."""
    if values is not None and (reduce_zero or classes not in (None, len(values))):
        other = "--reduce-zero" if reduce_zero else f"--classes {classes}"
        raise UsageError(f"--values: {len(values)} classes are listed; leave {other} out", code="conflict")
    own = {"--classes": classes is not None, "--values": values is not None, "--ignore": ignore != 255}
    one = dataset_of("segment", options, own | {"--reduce-zero": reduce_zero})
    if one is None:
        kinds, classes = (masks(ignore, reduce_zero, values),) * 2, classes if values is None else len(values)
    else:
        kinds, classes, reduce_zero = one.kinds(), one.classes, one.reduce_zero

    def make_work(data: str, side: int, scratch: Path) -> DenseWork:
        return segmentation_work(options, data, kinds, side, classes, scratch, one)

    def protocol(side: int) -> dict[str, Any]:
        return {
            "loss": f"cross-entropy of each pixel at {side} x {side}, the mask resized to the nearest",
            "mean": "over the classes that are there or predicted; the confusion summed over the test split",
            "ignore": ignore,
            "reduce_zero": reduce_zero,
            **({} if values is None else {"values": list(values)}),
        }

    return evaluate_dense("segment", options, "masks", make_work, protocol)


def evaluate_depth(
    options: DenseOptions, depth_scale: float | None, invalid: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """The command ``depth``; see :class:`aimv2.commands.depth.DepthOptions`."""
    one = dataset_of("depth", options, {"--depth-scale": depth_scale is not None, "--invalid": invalid is not None})
    kinds = (depths(depth_scale, invalid),) * 2 if one is None else one.kinds()
    depth_scale = depth_scale if one is None else one.scale
    own = {} if one is None else {"deepest": one.deepest, "test_crop": one.crop}

    def make_work(data: str, side: int, scratch: Path) -> DenseWork:
        return depth_work(options, data, kinds, side, scratch, one)

    def protocol(side: int) -> dict[str, Any]:
        return {
            "target": "metres, by least squares on standardised depth; predictions kept within the training depths",
            "loss": f"squared error of each pixel with a depth at {side} x {side}, the map resized to the nearest",
            "mean": "over all pixels with a depth of the test split",
            "depth_scale": MILLIMETRES if depth_scale is None else depth_scale,
            "invalid": [0] if invalid is None else list(invalid),
            **own,
        }

    return evaluate_dense("depth", options, "depth maps", make_work, protocol)


def evaluate_dense(
    command: str,
    options: DenseOptions,
    maps: str,
    make_work: Callable[[str, int, Path], DenseWork],
    protocol: Callable[[int], dict[str, Any]],
) -> dict[str, Any]:
    """Reads, trains, chooses, tests, writes.

    Args:
        command: segment or depth.
        options: of the command.
        maps: what the data hold besides images.
        make_work: (data, side of the encoder's images, scratch folder) -> both splits.
        protocol: side -> what the result says besides the settings.

    Raises:
        UsageError: options, data or an encoder that do not fit.
    """
    with Evaluation(command, options.out) as evaluation:
        frozen, settings = open_dense(command, options, maps)
        side, others = frozen.side, open_baselines(options.baselines, frozen, settings.seeds[0])
        evaluation.open_folder()
        work = make_work(options.data or "", side, evaluation.scratch)
        home = evaluation.out / "features" if evaluation.out else None
        figures = encoder_figures(frozen, work, options, settings, home)

        def baseline(name: str, other: Frozen) -> dict[str, Any]:
            mine = settings if name == "random" else replace(settings, layers=(LAST,))  # pixels have no layers
            return encoder_figures(other, work, options, mine, home / name if home else None)

        figures |= baseline_figures(others, baseline)
        data: dict[str, Any] = {
            "name": options.dataset or Path(options.data or "").name, "source": options.data, "split": work.split,
            "train_images": len(work.train), "test_images": len(work.test),
            "train_maps_without_values": work.empty[0], "test_maps_without_values": work.empty[1],
        }  # fmt: skip
        if command == "segment":
            data["classes"] = work.task.outputs
        if isinstance(work.task, Depth):
            data["train_depths_metres"] = [work.task.low, work.task.high]
        about = {
            "name": f"{'linear' if settings.head == 'linear' else 'DPT'} {command} probe",
            "view": f"the whole image resized to {side} x {side}",
            "metric_at": "each map's own size",
            **protocol(side),
            **asdict(settings),
            "head": HEADS[settings.head],
        }
        return evaluation.result(about, about_model(frozen), data, figures, list(settings.seeds))


def open_dense(command: str, options: DenseOptions, maps: str) -> tuple[Frozen, DenseSettings]:
    """The encoder and the settings of its heads.

    Raises:
        UsageError: no data, an encoder that can't be opened or can't see that size.
    """
    if options.data is None:
        raise UsageError(f"--data is missing: a folder of images and {maps}", code="missing")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{command}: its batch norm sees one process; start it without torchrun", code="unsupported")
    if isinstance(options.image_size, str):
        raise UsageError(f"--image-size {options.image_size}: maps are of one size here; pixels a side expected")
    frozen = options.open()
    check_view(frozen, options.image_size)
    layers = frozen.layer_names(options.layers)
    if options.head == "dpt" and layers == [LAST] and frozen.depth:
        quarters = (-(-frozen.depth * quarter // SCALES) - 1 for quarter in range(1, SCALES))
        layers = [*frozen.layer_names(",".join(map(str, quarters))), LAST]
    layers = list(dict.fromkeys(layers))
    if options.head == "dpt" and len(layers) > SCALES:
        raise UsageError(
            f"--layers {options.layers}: {len(layers)} layers; --head dpt takes {SCALES} at most", code="limit"
        )
    settings = DenseSettings(
        head=options.head,
        layers=tuple(layers),
        rates=tuple(dict.fromkeys(options.rates or RATES[options.head])),
        weight_decay=options.weight_decay,
        epochs=options.epochs,
        batch_size=options.batch_size,
        seeds=options.seeds,
    )
    return frozen, settings
