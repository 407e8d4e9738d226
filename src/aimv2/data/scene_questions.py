"""Questions about a scene, each with exactly one right answer, phrases that mean exactly one object, and a relation for the caption.

A name such as "small blue cross" states some of an object's attributes and fits no other. Two objects are left and right of, or above
and below each other only where their boxes do not overlap in that direction, so that no answer is in doubt. Yes and no, and the two
answers of a comparison, are equally frequent by construction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

import numpy as np

from aimv2.data.scene_objects import ALL_LOOKS, COLOURS, SHAPES, Look, SceneObject

ATTRIBUTES = ("size", "colour", "shape")  # in the order of a name
SUBSETS = tuple(subset for count in (1, 2, 3) for subset in combinations(ATTRIBUTES, count))
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
LARGER = 1.1  # least ratio of the longer sides of a large and a small object's boxes

Answered = tuple[str, str]  # question, answer


@dataclass(frozen=True)
class SceneQuestion:
    """``kind`` is a key of :data:`KINDS`; ``answer`` is a word or two, and the only right one."""

    kind: str
    question: str
    answer: str


class DescribedScene:
    """A scene as questions see it.

    Attributes:
        objects: Its objects.
        looks: Combinations of colour and shape that may be named, so that held-out ones stay unseen in questions too.
        called: By attributes, the name of each object that states these.
        names: Of each object, the names that fit no other object, by the attributes that they state.
        questions: those of :func:`ask` so far, by question.
    """

    def __init__(self, objects: Sequence[SceneObject], looks: Sequence[Look] = ALL_LOOKS) -> None:
        self.objects, self.looks = objects, looks
        self.questions: dict[str, SceneQuestion] = {}
        self.names: list[dict[tuple[str, ...], str]] = [{} for _ in objects]
        self.called = {subset: [name_of(thing, subset) for thing in objects] for subset in SUBSETS}
        for subset, names in self.called.items():
            for found, name in zip(self.names, names, strict=True):
                if names.count(name) == 1:
                    found[subset] = name


def related(one: SceneObject, other: SceneObject) -> list[str]:
    """In which relations ``one`` stands to ``other``: at most one of left of and right of, one of above and below."""
    (x, y, width, height), (other_x, other_y, other_width, other_height) = one.box, other.box
    found = {
        "left of": x + width <= other_x,
        "right of": other_x + other_width <= x,
        "above": y + height <= other_y,
        "below": other_y + other_height <= y,
    }
    return [relation for relation, holds in found.items() if holds]


def name_of(thing: SceneObject, attributes: Sequence[str]) -> str:
    """``("colour", "shape")`` -> "blue cross"; without its shape, it is an "object"."""
    words = [getattr(thing, attribute) for attribute in attributes]
    return " ".join(words if "shape" in attributes else [*words, "object"])


def relation_of(rng: np.random.Generator, scene: DescribedScene) -> str:
    """Such as "the red ring is above the small cross"; "" where no two objects allow it."""
    found = _related_pair(rng, scene)
    return "the {} is {} the {}".format(*found) if found else ""


def _related_pair(rng: np.random.Generator, scene: DescribedScene) -> tuple[str, str, str] | None:
    named = [at for at in rng.permutation(len(scene.objects)).tolist() if scene.names[at]]
    for one, other in permutations(named, 2):
        if relations := related(scene.objects[one], scene.objects[other]):
            name, other_name = (_any(rng, list(scene.names[at].values())) for at in (one, other))
            return name, _any(rng, relations), other_name
    return None


def phrases_of(rng: np.random.Generator, scene: DescribedScene) -> list[dict[str, Any]]:
    """Phrases that mean exactly one object, with its box: by its attributes and, where others share them, by a relation.

    In "the cross left of the ring" there is one ring, and all other crosses are right of it.
    """
    found = []
    for number, (thing, names) in enumerate(zip(scene.objects, scene.names, strict=True)):
        phrases = [f"the {_any(rng, list(names.values()))}"] if names else []
        phrases += _relational(rng, number, scene)
        found += [{"phrase": phrase, "box": list(thing.box)} for phrase in phrases]
    return found


def _relational(rng: np.random.Generator, number: int, scene: DescribedScene) -> list[str]:
    found = []
    for subset in (subset for subset in SUBSETS if subset not in scene.names[number]):
        names = scene.called[subset]
        fits = [thing for at, thing in enumerate(scene.objects) if names[at] == names[number] and at != number]
        for at, anchor in enumerate(scene.objects):
            if not scene.names[at] or names[at] == names[number]:
                continue
            for relation in related(scene.objects[number], anchor):
                if all(OPPOSITE[relation] in related(other, anchor) for other in fits):
                    found.append((names[number], relation, at))
    if not found:
        return []
    name, relation, at = _any(rng, found)
    return [f"the {name} {relation} the {_any(rng, list(scene.names[at].values()))}"]


def ask(rng: np.random.Generator, scene: DescribedScene, count: int) -> list[SceneQuestion]:
    """Up to ``count`` different questions about a scene, of as many kinds as it allows."""
    done = scene.questions
    kinds = list(KINDS)
    for number, kind in enumerate([kinds[at] for _ in range(3) for at in rng.permutation(len(kinds)).tolist()]):
        if len(done) == count or (number >= len(kinds) and not done):
            break
        if answered := KINDS[kind](rng, scene):
            done.setdefault(answered[0], SceneQuestion(kind, *answered))
    return list(done.values())


def conversation(questions: Sequence[SceneQuestion]) -> list[dict[str, str]]:
    """Questions and answers as turns of LLaVA's conversation JSON, the image in the first."""
    turns = []
    for number, one in enumerate(questions):
        turns.append({"from": "human", "value": ("" if number else "<image>\n") + one.question})
        turns.append({"from": "gpt", "value": one.answer})
    return turns


def _any(rng: np.random.Generator, among: Sequence[Any]) -> Any:
    return among[int(rng.integers(len(among)))]


def _named(rng: np.random.Generator, scene: DescribedScene, without: str = "") -> tuple[str, SceneObject] | None:
    """A random object and a name of its own that does not state the attribute ``without``."""
    found = [
        (name, thing)
        for thing, names in zip(scene.objects, scene.names, strict=True)
        for subset, name in names.items()
        if without not in subset
    ]
    return _any(rng, found) if found else None


def _count(rng: np.random.Generator, scene: DescribedScene) -> Answered:
    """All objects, or those of a colour, a shape or both; each number that is possible is equally likely."""
    if rng.integers(4) == 0:
        return "How many objects are there?", str(len(scene.objects))
    attributes = ("colour",), ("shape",), ("colour", "shape")
    subset = _any(rng, attributes)
    groups = {
        ("colour",): [f"{colour} object" for colour in COLOURS],
        ("shape",): list(SHAPES),
        ("colour", "shape"): [f"{colour} {shape}" for colour, shape in scene.looks],
    }[subset]
    counts = Counter(scene.called[subset])
    wanted = _any(rng, sorted({counts[group] for group in groups}))
    return f"How many {plural(_any(rng, [g for g in groups if counts[g] == wanted]))} are there?", str(wanted)


def plural(name: str) -> str:
    """ "red cross" -> "red crosses"."""
    return name + ("es" if name.endswith("s") else "s")


def _colour(rng: np.random.Generator, scene: DescribedScene) -> Answered | None:
    found = _named(rng, scene, without="colour")
    return (f"What colour is the {found[0]}?", found[1].colour) if found else None


def _shape(rng: np.random.Generator, scene: DescribedScene) -> Answered | None:
    found = _named(rng, scene, without="shape")
    return (f"What shape is the {found[0]}?", found[1].shape) if found else None


def _where(rng: np.random.Generator, scene: DescribedScene) -> Answered | None:
    found = _named(rng, scene)
    return (f"Where is the {found[0]}?", found[1].place) if found else None


def _exists(rng: np.random.Generator, scene: DescribedScene) -> Answered | None:
    """Half of the combinations that are absent are made of a colour and a shape that are present, where there are such."""
    present = sorted({(thing.colour, thing.shape) for thing in scene.objects})
    colours, shapes = ({look[which] for look in present} for which in (0, 1))
    absent = [look for look in scene.looks if look not in present]
    if not absent:
        return None
    mixed = [look for look in absent if look[0] in colours and look[1] in shapes]
    yes, near = rng.integers(2, size=2).tolist()
    looks = _any(rng, mixed if near and mixed else absent), _any(rng, present)
    no_or_yes = [f"Is there {'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}?" for colour, shape in looks]
    if any(
        question in scene.questions for question in no_or_yes
    ):  # whatever the coin says: repeated are mostly those with "yes"
        return None
    return no_or_yes[yes], "yes" if yes else "no"


def _relation(rng: np.random.Generator, scene: DescribedScene) -> Answered | None:
    found = _related_pair(rng, scene)
    if not found:
        return None
    yes = bool(rng.integers(2))
    one, relation, other = found
    return f"Is the {one} {relation if yes else OPPOSITE[relation]} the {other}?", "yes" if yes else "no"


def _larger(rng: np.random.Generator, scene: DescribedScene) -> Answered | None:
    """Of a large and a small object whose names do not state the size."""
    names = [[name for subset, name in found.items() if "size" not in subset] for found in scene.names]
    sides = [max(thing.box[2:]) for thing in scene.objects]
    pairs = [
        (one, other)
        for one, other in permutations(range(len(sides)), 2)
        if scene.objects[one].size != scene.objects[other].size
        and sides[one] >= LARGER * sides[other]
        and names[one]
        and names[other]
    ]
    if not pairs:
        return None
    larger, smaller = (_any(rng, names[at]) for at in _any(rng, pairs))
    first, second = (larger, smaller) if rng.integers(2) else (smaller, larger)
    return f"Which is larger, the {first} or the {second}?", larger


def _more(rng: np.random.Generator, scene: DescribedScene) -> Answered | None:
    """Of two colours or two shapes that are both present; never of two equally frequent ones."""
    counts = [Counter(getattr(thing, attribute) for thing in scene.objects) for attribute in ("colour", "shape")]
    pairs = [pair for found in counts for pair in permutations(sorted(found), 2) if found[pair[0]] > found[pair[1]]]
    if not pairs:
        return None
    more, fewer = _any(rng, pairs)
    first, second = (more, fewer) if rng.integers(2) else (fewer, more)
    if more in COLOURS:
        return f"Are there more {first} or more {second} objects?", more
    return f"Are there more {plural(first)} or more {plural(second)}?", plural(more)


KINDS: dict[str, Callable[[np.random.Generator, DescribedScene], Answered | None]] = {
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "where": _where,
    "exists": _exists,
    "relation": _relation,
    "larger": _larger,
    "more": _more,
}
