"""Images with a map of the same size: class ids or depth a pixel, as folders of images and PNG files.

Legend: H x W a map's own size, S side of what an encoder sees, N pairs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from aimv2.data.images.catalogue import walk, walk_files
from aimv2.data.images.class_names import subfolders
from aimv2.data.images.decode import FORMATS, decode_image
from aimv2.data.images.labelled import Labelled
from aimv2.data.images.names import NameFinder
from aimv2.data.prefetch import prefetch_map
from aimv2.data.stream.transforms import crop_resize
from aimv2.data.text.encoding import text_lines
from aimv2.errors import UsageError
from aimv2.io import read_file
from aimv2.progress import tracked
from aimv2.tables import percent

IMAGES = ("images", "rgb")
MASKS = ("masks", "annotations", "labels")
DEPTHS = ("depth", "depths")
TRAIN = ("train", "training")
VAL = ("val", "validation", "test")
MILLIMETRES = 1000.0
VAL_LIST = "val.txt"  # next to the images folder
FORMS = "ROOT/{{train,val}}/{{images,{0}}}, ROOT/{{images,{0}}}/{{train,val}} or ROOT/{{images,{0}}}"
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class MappedImage:
    """An image and its map; ``key`` is the image's path in its folder."""

    key: str
    image: Path
    map: Path


@dataclass(frozen=True)
class MapKind:
    """What the maps hold.

    Attributes:
        word: in messages.
        folders: names that the maps' folder may have.
        read: a file to values [H, W].
        floor: values above it count, all others mean "nothing known here".
    """

    word: str
    folders: tuple[str, ...]
    read: Callable[[Path], np.ndarray]
    floor: int


@dataclass(frozen=True)
class MapScan:
    """What a pass over the maps found.

    Attributes:
        largest: value, and the file that holds it.
        empty: maps without any value that counts.
        values: all class ids, of masks.
        maps: [N, S, S], memory-mapped; None where none was wanted.
    """

    largest: tuple[float, Path]
    empty: int
    maps: np.ndarray | None
    values: frozenset[int] = frozenset()


def masks(ignore: int = 255, reduce_zero: bool = False, values: tuple[int, ...] | None = None) -> MapKind:
    """Class ids, int16 [H, W], -1 where ignored: value ``ignore``, and 0 with ``reduce_zero``, which shifts ids by one.

    ``values``: the files' values of class 0, 1, ...; None: they are the ids.
    """
    return MapKind("mask", MASKS, partial(read_ids, ignore=ignore, reduce_zero=reduce_zero, classes=values), -1)


def depths(scale: float | None = None, invalid: tuple[int, ...] | None = None) -> MapKind:
    """Metres, float32 [H, W], 0 where there is no value; see :func:`read_depth`."""
    return MapKind("depth", DEPTHS, partial(read_depth, scale=scale, invalid=invalid), 0)


def open_pairs(
    source: str, kind: MapKind, val_list: str | None = None, val_fraction: float = 0.0
) -> tuple[list[MappedImage], list[MappedImage], str]:
    """Training pairs, test pairs, and the name of the test split.

    Args:
        source: ROOT/{train,val}/{images,masks}/NAME, ROOT/{images,masks}/{train,val}/NAME (ADE20K's form), or
            ROOT/{images,masks}/NAME. NAME may hold folders; the map has the image's name and ends in .png.
        kind: of the maps.
        val_list: text file with an image's name a line (with or without its extension): the test split of data that have
            none; by default ROOT/val.txt, where there is one.
        val_fraction: of the images, drawn (the same ones each time), where there is neither.

    Raises:
        UsageError: another form, an image without its map, no test split, a split given twice.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise UsageError(f"--data {source}: no such folder", code="not-found")
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction {val_fraction}: 0 to 1 expected")
    train, val = _split(root, TRAIN, kind), _split(root, VAL, kind)
    forms = FORMS.format(kind.folders[0])
    if train is None and val is not None:
        raise UsageError(f"--data {source}: a test split but no training split ({' or '.join(TRAIN)}); {forms}")
    if val is not None and (val_list or val_fraction):
        option = "--val-list" if val_list else "--val-fraction"
        raise UsageError(
            f"{option}: {source} has a test split of its own, {val[2]}; leave the option out", code="conflict"
        )
    train = train or _split(root, (".",), kind)
    if train is None:
        raise UsageError(f"--data {source}: no images folder there; {forms} expected", code="not-found")
    pairs = _match(train[0], train[1], kind)
    if val is not None:
        return pairs, _match(val[0], val[1], kind), val[2]
    return _cut(pairs, root, val_list, val_fraction)


def _find(folder: Path | None, names: Sequence[str]) -> Path | None:
    """The first of ``names`` (in any case) that is a folder there; "." is the folder itself."""
    if folder is None or names == (".",):
        return folder
    there = NameFinder(subfolders(folder))
    found = (there.find(name, stems=False) for name in names)
    return next((folder / one[0] for one in found if len(one) == 1), None)


def _split(root: Path, names: Sequence[str], kind: MapKind) -> tuple[Path, Path, str] | None:
    """Folders of images and maps of a split and its name; None: the data don't have it.

    Raises:
        UsageError: images whose maps have no folder.
    """
    part = _find(root, names)
    if part and (images := _find(part, IMAGES)):  # ROOT/SPLIT/images
        maps, wanted = _find(part, kind.folders), f"({', '.join(kind.folders)}) in {part}, next to its images"
    elif images := _find(_find(root, IMAGES), names):  # ROOT/images/SPLIT
        maps = _find(_find(root, kind.folders), names)
        wanted = f"({', '.join(kind.folders)}) in {root} with {' or '.join(names)}, though {images} is there"
    else:
        return None
    if maps is None:
        raise UsageError(f"--data: no {kind.word} folder {wanted}", code="not-found")
    return images, maps, part.name if images.parent == part else images.name


def _match(images: Path, maps: Path, kind: MapKind) -> list[MappedImage]:
    """Every image with the map of its name.

    Raises:
        UsageError: no image; an image without its map; a map that is no PNG.
    """
    files = [name for name, error in walk_files(maps) if error is None]
    pngs, others = (NameFinder(n for n in files if n.lower().endswith(".png") == is_png) for is_png in (True, False))
    pairs, lost = [], []
    for name in walk(images):
        found = pngs.find(name) or others.find(name)
        if not found:
            lost.append(name)
        elif len(found) > 1:
            raise UsageError(
                f"--data: {images / name} has several {kind.word}s in {maps}: {', '.join(found[:3])}", code="conflict"
            )
        elif found[0] not in pngs.names:
            raise UsageError(f"--data: {maps / found[0]} is not a PNG; a {kind.word} is a PNG file")
        else:
            pairs.append(MappedImage(name, images / name, maps / found[0]))
    if twice := next((files for files in _by_map(pairs).values() if len(files) > 1), None):
        raise UsageError(
            f"--data: {' and '.join(twice[:2])} in {images} have one {kind.word}; rename one", code="conflict"
        )
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise UsageError(
            f"--data: {images / lost[0]} has no {kind.word}{more}; {maps / Path(lost[0]).with_suffix('.png')} expected",
            code="missing",
        )
    if not pairs:
        raise UsageError(f"--data: no image in {images}")
    return pairs


def _by_map(pairs: Iterable[MappedImage]) -> dict[Path, list[str]]:
    found: dict[Path, list[str]] = {}
    for pair in pairs:
        found.setdefault(pair.map, []).append(pair.key)
    return found


def _cut(
    pairs: list[MappedImage], root: Path, val_list: str | None, val_fraction: float
) -> tuple[list[MappedImage], list[MappedImage], str]:
    """Pairs without a test split, cut in two by a list or at random."""
    listed = Path(val_list).expanduser() if val_list else root / VAL_LIST
    if val_list and val_fraction:
        raise UsageError("--val-list and --val-fraction both cut the test split; give one of them", code="conflict")
    if val_list or (not val_fraction and listed.is_file()):
        test, name = _listed(pairs, listed), f"listed in {listed.name}"
    elif val_fraction:
        order = np.random.default_rng(0).permutation(len(pairs))
        test = {pairs[row].key for row in order[: max(1, round(val_fraction * len(pairs)))]}
        name = f"{val_fraction:g} of the images, drawn"
    else:
        raise UsageError(
            f"--data {root}: no test split there; --val-fraction 0.2 cuts one, --val-list names one", code="missing"
        )
    kept = [pair for pair in pairs if pair.key not in test]
    if not kept:
        raise UsageError(f"--data {root}: all {len(pairs)} images are in the test split, none is left for training")
    return kept, [pair for pair in pairs if pair.key in test], name


def _listed(pairs: list[MappedImage], file: Path) -> set[str]:
    """Keys that a list names."""
    try:
        words = list(text_lines(file))
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"--val-list {file}: can't be read: {getattr(error, 'strerror', None) or error}", code="unreadable"
        ) from None
    finder, listed = NameFinder(pair.key for pair in pairs), set[str]()
    for word in words:
        found = finder.find(word)
        if len(found) != 1:
            what = f"may be any of {', '.join(found[:3])}" if found else "is the name of no image there"
            raise UsageError(f"--val-list {file}: '{word}' {what}", code="conflict" if found else "missing")
        listed.add(found[0])
    if not words:
        raise UsageError(f"--val-list {file}: names no image")
    return listed


def read_ids(
    path: Path, ignore: int = 255, reduce_zero: bool = False, classes: tuple[int, ...] | None = None
) -> np.ndarray:
    """A mask of class ids: int16 [H, W], -1 where ignored; see :func:`masks`.

    Raises:
        UsageError: not a PNG of class ids (grey or palette), an id above 32767, or a value that is not listed.
    """
    values = _read_png(path, ("L", "P", "1", "I", "I;16"), "class ids (mode L or P) expected").astype(np.int32)
    if classes is not None:
        ids = np.select([values == value for value in classes], range(len(classes)), default=-1)
        if len(strange := np.setdiff1d(values[ids < 0], [ignore])):
            raise UsageError(f"--values: {path} holds {strange[0]} too, which is neither listed nor --ignore {ignore}")
        return ids.astype(np.int16)
    nothing = values == ignore
    if reduce_zero:
        nothing |= values == 0
        values = values - 1
    values[nothing] = -1
    if values.max(initial=-1) > np.iinfo(np.int16).max:
        raise UsageError(f"--data: {path} holds the value {values.max()}; class ids are 0 to 32767")
    return values.astype(np.int16)


def read_depth(path: Path, scale: float | None = None, invalid: tuple[int, ...] | None = None) -> np.ndarray:
    """A depth map: float32 [H, W] in metres, 0 where the file has no value.

    Args:
        path: of a PNG.
        scale: its units per metre; None: 1000, of 16-bit maps only.
        invalid: its values that mean "no depth"; None: 0, and the largest of its type must not be there.

    Raises:
        UsageError: not a grey PNG; 8 bits without a unit; the largest value where nothing says what it means.
    """
    values = _read_png(path, ("I;16", "I", "L"), "depth as 16-bit grey expected")
    largest = np.iinfo(np.uint8 if values.dtype == np.uint8 else np.uint16).max
    if scale is None and values.dtype == np.uint8:
        raise UsageError(
            f"--depth-scale: {path} has 8 bits, 0.255 m at most in millimetres; give --depth-scale, its units per metre",
            code="missing",
        )
    if invalid is None and (top := float((values == largest).mean())):
        raise UsageError(
            f"--invalid: {path} holds {largest}, the largest value of its type, in {percent(top)} of its pixels, often a mark for no "
            f"depth: give --invalid 0,{largest}, or --invalid 0 if it is a depth",
            code="missing",
        )
    values = np.where(np.isin(values, invalid), 0, values) if invalid else values
    return np.maximum(values, 0).astype(np.float32) / np.float32(MILLIMETRES if scale is None else scale)


def _read_png(path: Path, modes: Sequence[str], wanted: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(read_file(path)), formats=["PNG"]) as image:
            if image.mode not in modes:
                raise UsageError(f"--data: {path} is a PNG of mode {image.mode}; {wanted}")
            return np.array(image)
    except UsageError:
        raise
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        words = " ".join(str(error).split()).replace(str(path), "it") or type(error).__name__
        raise UsageError(f"--data: {path} is not a PNG that can be read ({words})") from None


def scan_maps(
    pairs: Sequence[MappedImage], kind: MapKind, size: int | None = None, file: Path | None = None
) -> MapScan:
    """Reads every map once: all are proven good before an encoder runs.

    Args:
        pairs: N of them.
        kind: of their maps.
        size, file: keep the maps at S x S, nearest value, in this file.

    Raises:
        UsageError: a map that can't be read, or of another size than its image.
    """
    kept: np.ndarray | None = None
    largest, where, empty, ids = float(kind.floor), pairs[0].map, 0, set[int]()
    rows = prefetch_map(partial(_read_checked, kind), pairs)
    for row, values in enumerate(tracked(rows, f"reading {kind.word}s", len(pairs))):
        top = float(values.max())
        empty += top <= kind.floor
        if values.dtype == np.int16:
            ids.update(np.flatnonzero(np.bincount(values[values >= 0], minlength=1)).tolist())
        if top > largest:
            largest, where = top, pairs[row].map
        if size is not None and file is not None:
            if kept is None:
                kept = np.lib.format.open_memmap(file, mode="w+", dtype=values.dtype, shape=(len(pairs), size, size))
            kept[row] = nearest_map(values, size)
    return MapScan((largest, where), empty, kept, frozenset(ids))


def _read_checked(kind: MapKind, pair: MappedImage) -> np.ndarray:
    values = kind.read(pair.map)
    try:
        with Image.open(io.BytesIO(read_file(pair.image)), formats=FORMATS) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8):
                width, height = height, width
    except Exception:  # an image that can't be opened is noted with the others when the encoder sees them
        return values
    if values.shape != (height, width):
        raise UsageError(
            f"--data: {pair.map} is {values.shape[1]} x {values.shape[0]} px, its image {pair.key} is {width} x {height}"
        )
    return values


def nearest_map(values: np.ndarray, size: int) -> np.ndarray:
    """[H, W] -> [S, S]: the value at the centre of each new pixel."""
    rows, columns = (((np.arange(size) + 0.5) * side / size).astype(np.int64) for side in values.shape)
    return values[rows[:, None], columns]


def whole_images(source: str, split: str, pairs: Sequence[MappedImage], size: int) -> Labelled:
    """The images, each all of it squeezed to S x S, in the form that features are computed from; labels mean nothing."""

    def image(row: int) -> Image.Image:
        picture = decode_image(pairs[row].image)
        return crop_resize(picture, (0, 0, *picture.size), (size, size))

    keys = [pair.key for pair in pairs]
    return Labelled(Path(source).name, source, split, (), keys, np.zeros(len(pairs), np.int64), image)
