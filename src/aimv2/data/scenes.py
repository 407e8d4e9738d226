"""Captioned scenes: coloured shapes, drawn here, with the caption and the questions that follow from the picture.

They need no download and a small model learns them in minutes, so the demo and the tests train on them. The
caption has one form, objects in reading order, so that a generated caption is right or wrong, word for word.
Backgrounds are plain or smooth, never noise: the pixel loss scales every patch to unit variance, and noise
scaled up is a target that nothing can predict.

Geometry: one or two objects, each inside its own quadrant of the picture, so two never touch; or, by a layout, up to eight on free places.
"""

import io
import json
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from aimv2.data.scene_objects import (
    ALL_LOOKS,
    COLOURS,
    LABELS,
    PLACES,
    RGB,
    SHAPES,
    SIZES,
    SceneLayout,
    SceneObject,
    choose_free,
)
from aimv2.data.scene_questions import DescribedScene, SceneQuestion, ask, conversation, phrases_of, relation_of
from aimv2.errors import UsageError
from aimv2.progress import progress_bar

RADIUS = {"small": (0.21, 0.25), "large": (0.38, 0.44)}  # as a part of the quadrant's side
SUPERSAMPLE = 4
HELD_OUT = 8  # one scene in this many is kept for validation
SMALLEST = 16
SPLITS = ("train", "val")


@dataclass(frozen=True)
class CaptionedScene:
    """``image`` uint8 [H, W, 3]; ``label`` 0..NUM_LABELS-1 is the first-named object's shape and colour.

    ``phrases`` and ``questions`` are those of scenes with a layout or with questions (see `aimv2.data.scene_questions`).
    """

    image: np.ndarray
    caption: str
    label: int
    label_name: str
    objects: tuple[SceneObject, ...]
    phrases: tuple[dict[str, Any], ...] = ()
    questions: tuple[SceneQuestion, ...] = ()


def draw_scene(rng: np.random.Generator, size: int = 32, largest: int | None = None) -> CaptionedScene:
    """A scene of one or two objects; it depends only on the state of ``rng``.

    Args:
        rng: is moved on.
        size: pixels a side.
        largest: where given, height and width are drawn between ``size`` and it, each by itself.
    """
    _check_size(size, largest)
    sides = _choose_sides(rng, size, largest)
    return _paint(rng, _choose_objects(rng, sides), sides)


def _check_size(size: int, largest: int | None) -> None:
    if size < SMALLEST:
        raise UsageError(f"size: got {size}, expected at least {SMALLEST} pixels")
    if largest is not None and largest < size:
        raise UsageError(f"largest: got {largest}, expected at least size, {size} pixels")


def _choose_sides(rng: np.random.Generator, size: int, largest: int | None) -> tuple[int, int]:
    if largest is None:
        return size, size
    height, width = rng.integers(size, largest + 1, 2)
    return int(height), int(width)


def _choose_objects(rng: np.random.Generator, sides: tuple[int, int]) -> tuple[SceneObject, ...]:
    count = int(rng.integers(1, 3))
    places = sorted(rng.choice(len(PLACES), count, replace=False))
    down_side, along_side = (side / 2 for side in sides)  # of a quadrant
    cell = min(down_side, along_side)
    objects = []
    for place in places:
        shape, colour, scale = rng.integers((len(SHAPES), len(COLOURS), len(SIZES)))
        low, high = RADIUS[SIZES[scale]]
        part, along, down = rng.random(3)
        radius = cell * (low + (high - low) * part)
        # the centre moves over what the shape leaves free of the quadrant
        x = along_side * (place % 2) + radius + (along_side - 2 * radius) * along
        y = down_side * (place // 2) + radius + (down_side - 2 * radius) * down
        objects.append(SceneObject(SHAPES[shape], COLOURS[colour], SIZES[scale], PLACES[place], x, y, radius))
    return tuple(objects)


def describe(objects: tuple[SceneObject, ...]) -> str:
    """The caption of objects in reading order."""
    return " and ".join(f"a {o.size} {o.colour} {o.shape} at the {o.place}" for o in objects)


def _paint(rng: np.random.Generator, objects: tuple[SceneObject, ...], sides: tuple[int, int]) -> CaptionedScene:
    image = _background(rng, sides)
    for thing in objects:
        _paint_object(image, thing)
    name = f"{objects[0].colour} {objects[0].shape}"
    pixels = (image + 0.5).astype(np.uint8)
    return CaptionedScene(pixels, describe(objects), LABELS.index(name), name, objects)


def _background(rng: np.random.Generator, sides: tuple[int, int]) -> np.ndarray:
    """Light or dark grey, plain, with a slope or with soft waves; float32 [height, width, 3], 20..245."""
    dark, kind = rng.integers((2, 3))
    level, swing, angle, phase = rng.random(4)
    base = (35 if dark else 215) + 20 * level
    image = np.empty((*sides, 3), np.float32)
    if kind == 0:
        image[:] = base
        return image
    down, across = (np.arange(side, dtype=np.float32) / side - 0.5 for side in sides)
    turn = 2 * np.pi * angle
    along = np.float32(np.cos(turn)) * across[None, :] + np.float32(np.sin(turn)) * down[:, None]
    if kind == 2:
        along = 0.5 * np.sin(along * np.float32(8 * np.pi) + np.float32(2 * np.pi * phase))
    image[:] = (base + (8 + 12 * swing) * along)[:, :, None]
    return image


def _paint_object(image: np.ndarray, thing: SceneObject) -> None:
    """Blend the object into ``image`` in place, drawn at SUPERSAMPLE times the size for smooth edges."""
    left, top = int(thing.x - thing.radius), int(thing.y - thing.radius)
    side = min(int(2 * thing.radius) + 2, image.shape[0] - top, image.shape[1] - left)
    mask = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
    _draw_shape(
        ImageDraw.Draw(mask),
        thing.shape,
        (thing.x - left) * SUPERSAMPLE - 0.5,
        (thing.y - top) * SUPERSAMPLE - 0.5,
        thing.radius * SUPERSAMPLE - 0.5,
    )
    alpha = np.asarray(mask.reduce(SUPERSAMPLE), np.float32)[:, :, None] / 255
    window = image[top : top + side, left : left + side]
    window += alpha * (np.asarray(RGB[thing.colour], np.float32) - window)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    """White on black; every shape reaches ``r`` from its centre at most, along x and y."""
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), 255)
    elif shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), 255)
        hole = 0.52 * r
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), 0)
    elif shape == "square":
        half = 0.86 * r
        draw.rectangle((x - half, y - half, x + half, y + half), 255)
    elif shape == "cross":
        arm = 0.3 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), 255)
        draw.rectangle((x - arm, y - r, x + arm, y + r), 255)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + 0.8 * r, y), (x, y + r), (x - 0.8 * r, y)], 255)
    else:
        assert shape == "triangle", shape
        draw.polygon([(x, y - r), (x + r, y + 0.9 * r), (x - r, y + 0.9 * r)], 255)


def scene_of(
    split: str,
    index: int,
    size: int = 32,
    seed: int = 0,
    largest: int | None = None,
    layout: SceneLayout | None = None,
    questions: int = 0,
) -> CaptionedScene:
    """Scene ``index`` of a split, a function of these arguments only; ``size`` and ``largest`` as in :func:`draw_scene`.

    No validation scene occurs in training: scenes of several objects are dealt to a split by their caption, so that
    validation has combinations never trained on, and one-object scenes, which have few captions, by
    their pixels.

    Args:
        layout: up to eight objects on free places; None: one or two, each in a quadrant.
        questions: most questions; the picture and its caption do not depend on it.
    """
    key = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng(key)
    while True:
        sides = _choose_sides(rng, size, largest)
        objects = _choose_objects(rng, sides) if layout is None else choose_free(rng, sides, layout)
        if len(objects) > 1:
            if _split_of(describe(objects).encode()) == split:
                scene = _paint(rng, objects, sides)
                break
        else:
            scene = _paint(rng, objects, sides)
            if _split_of(scene.image.tobytes()) == split:
                break
    return _with_words(scene, key, layout, questions) if layout or questions else scene


def _with_words(
    scene: CaptionedScene, key: tuple[int, ...], layout: SceneLayout | None, questions: int
) -> CaptionedScene:
    """Phrases, questions and, on free places, a relation in the caption; from a generator of their own."""
    rng, drawn = np.random.default_rng((*key, 1)), DescribedScene(scene.objects, layout.looks if layout else ALL_LOOKS)
    relation = relation_of(rng, drawn) if layout else ""
    caption = f"{scene.caption}, {relation}" if relation else scene.caption
    phrases, found = tuple(phrases_of(rng, drawn)), tuple(ask(rng, drawn, questions))
    return replace(scene, caption=caption, phrases=phrases, questions=found)


def _split_of(content: bytes) -> str:
    return "val" if zlib.crc32(content) % HELD_OUT == 0 else "train"


def write_scenes(
    out: str | Path,
    count: int,
    *,
    val_count: int | None = None,
    size: int = 32,
    largest: int | None = None,
    seed: int = 0,
    shard_size: int = 5000,
    progress: bool = True,
    layout: SceneLayout | None = None,
    questions: int = 0,
) -> dict[str, Any]:
    """Write WebDataset shards ``OUT/train-NNNNNN.tar`` and ``OUT/val-NNNNNN.tar`` of captioned scenes.

    Args:
        out: a folder without shards in it; created if needed.
        count: training scenes.
        val_count: validation scenes, that training does not have; a tenth of ``count``, at most 1,000, if not given.
        size: side of the pictures in pixels.
        largest: where given, both sides of each picture are drawn between ``size`` and it.
        seed: another seed, other scenes.
        shard_size: scenes a shard.
        progress: show it on standard error.
        layout, questions: as in :func:`scene_of`; with either, the JSON of a sample also holds its objects, phrases and questions.

    Returns:
        What was written: ``out``, ``train``, ``val``, ``shards``, ``size``, ``largest`` (where given), ``seed``, the layout.
    """
    from aimv2.data.shards.format import write_manifest, write_shard

    if val_count is None:
        val_count = min(max(count // 10, 1), 1000)
    limits = {
        "count": (count, 1),
        "val_count": (val_count, 0),
        "seed": (seed, 0),
        "shard_size": (shard_size, 1),
        "questions": (questions, 0),
    }
    for option, (value, least) in limits.items():
        if value < least:
            raise UsageError(f"{option}: got {value}, expected at least {least}")
    _check_size(size, largest)
    about: dict[str, Any] = {"size": size, **({} if largest is None else {"largest": largest}), "seed": seed}
    about |= (layout.about() if layout else {}) | ({"questions": questions} if questions else {})
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.glob("*.tar"))):
        raise UsageError(f"OUT: {str(out)!r} is a file or holds shards already, expected a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)

    counts = {"train": count, "val": val_count}
    shards = [
        (split, number, range(start, min(start + shard_size, total)))
        for split, total in counts.items()
        for number, start in enumerate(range(0, total, shard_size))
    ]
    with progress_bar("drawing scenes", sum(counts.values()), shown=progress) as advance:
        for split, number, indices in shards:
            scenes = ((index, scene_of(split, index, size, seed, largest, layout, questions)) for index in indices)
            samples = (_sample(scene, f"{split}{index:08d}", bool(layout or questions)) for index, scene in scenes)
            write_shard(folder / f"{split}-{number:06d}.tar", samples)
            advance(len(indices))
    (folder / "classes.txt").write_text("\n".join(LABELS) + "\n", encoding="utf-8")
    write_manifest(folder, counts, source="scenes", **about, classes=LABELS)
    return {"out": str(folder), **counts, "shards": len(shards), **about}


def _sample(scene: CaptionedScene, key: str, words: bool) -> tuple[str, dict[str, bytes]]:
    png = io.BytesIO()
    Image.fromarray(scene.image).save(png, "png", compress_level=1)
    about: dict[str, Any] = {"captions": {"caption": [scene.caption]}}
    if words:
        named = ("shape", "colour", "size", "place", "box")
        about["objects"] = [{name: getattr(thing, name) for name in named} for thing in scene.objects]
        about["phrases"] = scene.phrases
    if scene.questions:
        about["questions"] = [asdict(one) for one in scene.questions]
        about["conversations"] = conversation(scene.questions)
    return key, {
        "png": png.getvalue(),
        "txt": scene.caption.encode(),
        "json": json.dumps(about).encode(),
        "cls": str(scene.label).encode(),
    }
