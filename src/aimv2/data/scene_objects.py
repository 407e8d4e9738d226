"""What a scene holds: shapes, colours, sizes and places; free places for up to eight objects; combinations that are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from aimv2.errors import UsageError

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # reading order
RGB = {
    "red": (215, 30, 40),
    "orange": (250, 135, 20),
    "yellow": (250, 225, 50),
    "green": (30, 150, 60),
    "cyan": (50, 205, 215),
    "blue": (35, 70, 225),
    "purple": (125, 40, 170),
    "pink": (250, 140, 195),
}
COLOURS = tuple(RGB)
LABELS = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
NUM_LABELS = len(LABELS)

MOST_OBJECTS = 8
LEAST_SIDE = 3  # of an object, pixels
BANDS = {"small": (0.0, 0.3), "large": (0.6, 1.0)}  # of the range of sides: never in doubt
GAP = 1.0  # least distance of two objects, pixels
MIDDLE = 0.04  # no centre is nearer to a middle line of the picture than this part of its shorter side: places are never in doubt
TRIES = 24  # places tried for an object before all are placed anew
# how far a shape reaches from its centre to the left, top, right and bottom, in parts of its radius
REACH = {
    **dict.fromkeys(("circle", "cross", "ring"), (1.0, 1.0, 1.0, 1.0)),
    "square": (0.86, 0.86, 0.86, 0.86),
    "diamond": (0.8, 1.0, 0.8, 1.0),
    "triangle": (1.0, 1.0, 1.0, 0.9),
}

Look = tuple[str, str]  # colour, shape
ALL_LOOKS: tuple[Look, ...] = tuple((colour, shape) for shape in SHAPES for colour in COLOURS)  # in the order of LABELS


@dataclass(frozen=True)
class SceneObject:
    """One shape. ``x``, ``y`` (centre) and ``radius`` in pixels of the picture."""

    shape: str
    colour: str
    size: str
    place: str
    x: float
    y: float
    radius: float

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """Tight box as in COCO: x and y of its top left corner, width and height, in pixels from the picture's top left."""
        left, top, right, bottom = (part * self.radius for part in REACH[self.shape])
        x, y, width, height = self.x - left, self.y - top, left + right, top + bottom
        return round(x, 2), round(y, 2), round(width, 2), round(height, 2)


@dataclass(frozen=True)
class SceneLayout:
    """How scenes with free places are composed.

    Attributes:
        objects: Most objects in a picture; the number is uniform from 1.
        sides: Smallest and largest side of an object, pixels.
        distractors: Fraction of the objects after the first that take their colour or shape from an earlier one.
        looks: Combinations of colour and shape that occur.
        held_out: Combinations that are held out.
        hold_out: What they were drawn from: the fraction and the seed.
    """

    objects: int
    sides: tuple[float, float]
    distractors: float = 0.0
    looks: tuple[Look, ...] = ALL_LOOKS
    held_out: tuple[Look, ...] = ()
    hold_out: tuple[float, int] = (0.0, 0)

    def about(self) -> dict[str, Any]:
        """The layout as a manifest states it."""
        about: dict[str, Any] = {
            "objects": self.objects,
            "object_size": list(self.sides),
            "distractors": self.distractors,
        }
        if not self.held_out:
            return about
        fraction, seed = self.hold_out
        only = self.looks == self.held_out
        names = [f"{colour} {shape}" for colour, shape in self.held_out]
        return {**about, "hold_out": fraction, "hold_out_seed": seed, "only_held_out": only, "held_out": names}


def make_layout(
    size: int,
    objects: int | None,
    object_size: Sequence[float] | None = None,
    distractors: float = 0.0,
    hold_out: float = 0.0,
    hold_out_seed: int = 0,
    only_held_out: bool = False,
) -> SceneLayout | None:
    """The layout of the options of ``aimv2 data shapes``; None where ``objects`` is.

    Args:
        size: shorter side of the smallest picture, pixels.
        object_size: smallest and largest side of an object, pixels; None: what leaves room for ``objects`` of them.

    Raises:
        UsageError: objects that do not fit into the picture, or options without the one that they need.
    """
    if objects is None:
        needing = {"object-size": object_size, "distractors": distractors, "hold-out": hold_out}
        for option, value in {**needing, "hold-out-seed": hold_out_seed, "only-held-out": only_held_out}.items():
            if value:
                raise UsageError(
                    f"--{option} needs --objects: without it, scenes have their fixed places", code="missing"
                )
        return None
    if not hold_out and (only_held_out or hold_out_seed):
        option = "--only-held-out" if only_held_out else "--hold-out-seed"
        raise UsageError(f"{option} needs --hold-out, the fraction of combinations", code="missing")
    if not 1 <= objects <= MOST_OBJECTS:
        raise UsageError(f"--objects {objects}: 1 to {MOST_OBJECTS} expected")
    sides = _sides_of_objects(size, objects, object_size)
    held_out = held_out_looks(hold_out, hold_out_seed)
    common = tuple(look for look in ALL_LOOKS if look not in held_out)
    return SceneLayout(
        objects, sides, distractors, held_out if only_held_out else common, held_out, (hold_out, hold_out_seed)
    )


def _sides_of_objects(size: int, objects: int, given: Sequence[float] | None) -> tuple[float, float]:
    """Smallest and largest side of an object: ``objects`` of the largest fit on a grid, none is over half the picture."""
    in_a_row = max(2, int(np.ceil(np.sqrt(objects))))
    most = size / in_a_row - GAP
    if given is None:
        given = (max(LEAST_SIDE, int(most / 3)), max(2 * LEAST_SIDE, int(most)))
    if len(given) != 2 or given[0] < LEAST_SIDE or given[1] < 2 * given[0]:
        shown = ",".join(f"{side:g}" for side in given)
        raise UsageError(
            f"--object-size {shown}: the smallest and the largest side of an object expected, in pixels: from {LEAST_SIDE} on, the"
            " second at least twice the first"
        )
    if given[1] > most:
        raise UsageError(
            f"--objects {objects}: so many of up to {given[1]:g} px do not fit into {size} px; at most {int(most)} px fit: lower"
            f" {'--object-size or ' * (most >= 2 * LEAST_SIDE)}--objects, or raise --size to {int(np.ceil((given[1] + GAP) * in_a_row))}",
            code="limit",
        )
    return float(given[0]), float(given[1])


def held_out_looks(fraction: float, seed: int) -> tuple[Look, ...]:
    """Combinations of colour and shape to hold out, spread so that every colour and every shape stays in most of its own.

    Args:
        fraction: of all combinations, 0 to 0.25; at least one where above 0.
        seed: another seed, other combinations.
    """
    if not 0 <= fraction <= 0.25:
        raise UsageError(f"--hold-out {fraction:g}: 0 to 0.25 expected, so that every colour and shape still occurs")
    count = max(1, round(fraction * NUM_LABELS)) if fraction else 0
    most = {**dict.fromkeys(COLOURS, -(-count // len(COLOURS))), **dict.fromkeys(SHAPES, -(-count // len(SHAPES)))}
    rng = np.random.default_rng((seed, count))
    while True:
        used, found = Counter[str](), set[Look]()
        for number in rng.permutation(NUM_LABELS).tolist():
            look = ALL_LOOKS[number]
            if len(found) < count and all(used[word] < most[word] for word in look):
                used.update(look)
                found.add(look)
        if len(found) == count:
            return tuple(look for look in ALL_LOOKS if look in found)


def choose_free(rng: np.random.Generator, sides: tuple[int, int], layout: SceneLayout) -> tuple[SceneObject, ...]:
    """Objects on free places of a picture of ``sides`` (height, width), in reading order of places; none touches another."""
    looks = _choose_looks(rng, int(rng.integers(1, layout.objects + 1)), layout)
    low, high = layout.sides
    while True:  # sizes and places anew where they do not fit
        sizes = [SIZES[number] for number in rng.integers(len(SIZES), size=len(looks)).tolist()]
        parts = rng.random(len(looks)).tolist()
        bands = [BANDS[size] for size in sizes]
        radii = [
            (low + (high - low) * (start + (end - start) * part)) / 2
            for (start, end), part in zip(bands, parts, strict=True)
        ]
        if centres := _choose_centres(rng, sides, radii):
            break
    objects = []
    for (colour, shape), size, radius, (x, y) in zip(looks, sizes, radii, centres, strict=True):
        place = PLACES[2 * (y > sides[0] / 2) + (x > sides[1] / 2)]
        objects.append(SceneObject(shape, colour, size, place, x, y, radius))
    return tuple(sorted(objects, key=lambda thing: (PLACES.index(thing.place), thing.y, thing.x)))


def _choose_looks(rng: np.random.Generator, count: int, layout: SceneLayout) -> list[Look]:
    """Colour and shape of each object; a distractor shares one of them with an earlier object, both only if it must."""
    looks: list[Look] = []
    for _ in range(count):
        among: Sequence[Look] = layout.looks
        if looks and rng.random() < layout.distractors:
            earlier, which = looks[int(rng.integers(len(looks)))], int(rng.integers(2))
            same = [look for look in among if look[which] == earlier[which]]
            among = [look for look in same if look != earlier] or same
        looks.append(among[int(rng.integers(len(among)))])
    return looks


def _choose_centres(
    rng: np.random.Generator, sides: tuple[int, int], radii: list[float]
) -> list[tuple[float, float]] | None:
    """Centres (x, y) of objects of these radii, the largest placed first; None where one finds no room."""
    height, width = sides
    aside = max(GAP, MIDDLE * min(sides))
    placed: dict[int, tuple[float, float]] = {}
    for number in sorted(range(len(radii)), key=lambda number: -radii[number]):
        radius = radii[number]
        for across, down in rng.random((TRIES, 2)).tolist():
            x, y = radius + (width - 2 * radius) * across, radius + (height - 2 * radius) * down
            off_middle = abs(x - width / 2) >= aside and abs(y - height / 2) >= aside
            if off_middle and all(
                max(abs(x - other_x), abs(y - other_y)) >= radius + radii[other] + GAP
                for other, (other_x, other_y) in placed.items()
            ):
                placed[number] = (x, y)
                break
        else:
            return None
    return [placed[number] for number in range(len(radii))]
