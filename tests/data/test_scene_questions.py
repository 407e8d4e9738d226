"""Scenes with free places: every question, phrase and relation against a brute-force reading of the objects in the sample's JSON."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from aimv2 import api
from aimv2.data import scene_questions
from aimv2.data.scene_objects import (
    ALL_LOOKS,
    COLOURS,
    RGB,
    SHAPES,
    SIZES,
    SceneObject,
    held_out_looks,
    make_layout,
)
from aimv2.data.scene_questions import KINDS, DescribedScene, ask, conversation
from aimv2.data.scenes import _choose_objects, _choose_sides, _paint_object, describe, scene_of
from aimv2.data.shards.format import captions_of, find_shards, read_samples
from aimv2.errors import UsageError

SIDE = 48
SCENES = 300
HELD = {"hold_out": 0.15, "hold_out_seed": 3}
MADE = {"size": SIDE, "objects": 8, "distractors": 0.5, "questions": 9, **HELD}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    told = api.data_shapes(str(folder / "seen"), count=SCENES, **MADE)
    api.data_shapes(str(folder / "unseen"), count=60, only_held_out=True, **MADE)
    return folder, told


def samples_of(folder):
    return [
        (parts, json.loads(parts["json"])) for tar in find_shards(folder, "train") for _, parts in read_samples(tar)
    ]


@pytest.fixture(scope="module")
def seen(written):
    return samples_of(written[0] / "seen")


@pytest.fixture(scope="module")
def unseen(written):
    return samples_of(written[0] / "unseen")


# ---- an evaluator of its own: it knows the objects' list and plain words only ----


def meant(name, objects):
    """All objects that "the small blue cross", "blue objects" or "the cross left of the ring" may mean."""
    relation = re.search(r" (left of|right of|above|below) ", name)
    if relation:
        anchors = meant(name[relation.end() :], objects)
        assert len(anchors) == 1, name
        strictly = [one for one in meant(name[: relation.start()], objects) if holds(one, relation[1], anchors[0])]
        loosely = [one for one in meant(name[: relation.start()], objects) if leans(one, relation[1], anchors[0])]
        assert strictly == loosely, name  # no other object is in doubt
        return strictly
    words = [re.sub("(?<=crosse)s$|(?<=[^s])s$", "", word) for word in name.removeprefix("the ").split()]
    words = [word.replace("crosse", "cross") for word in words]
    known = {**dict.fromkeys(SIZES, "size"), **dict.fromkeys(COLOURS, "colour"), **dict.fromkeys(SHAPES, "shape")}
    assert all(word == "object" or word in known for word in words), name
    return [one for one in objects if all(word == "object" or one[known[word]] == word for word in words)]


def middle(one):
    x, y, width, height = one["box"]
    return x + width / 2, y + height / 2


def leans(one, relation, other):
    """By the boxes' centres."""
    (x, y), (other_x, other_y) = middle(one), middle(other)
    return {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}[relation]


def holds(one, relation, other):
    """By the boxes, which must not overlap."""
    axis = 0 if relation in ("left of", "right of") else 1
    first, second = (one, other) if relation in ("left of", "above") else (other, one)
    return first["box"][axis] + first["box"][axis + 2] <= second["box"][axis]


def the(name, objects):
    found = meant(name, objects)
    assert len(found) == 1, (name, objects)
    return found[0]


def quarter(one):
    x, y = middle(one)
    assert min(abs(x - SIDE / 2), abs(y - SIDE / 2)) > 0.5
    return f"{'top' if y < SIDE / 2 else 'bottom'} {'left' if x < SIDE / 2 else 'right'}"


def right_answers(question, objects):
    """Every answer that is true of the scene."""
    if match := re.fullmatch(r"How many (.*) are there\?", question):
        return {str(len(meant(match[1], objects)))}
    if match := re.fullmatch(r"What (colour|shape) is (the .*)\?", question):
        return {one[match[1]] for one in meant(match[2], objects)}
    if match := re.fullmatch(r"Where is (the .*)\?", question):
        return {quarter(one) for one in meant(match[1], objects)}
    if match := re.fullmatch(r"Is there an? (.*)\?", question):
        return {"yes" if meant(match[1], objects) else "no"}
    if match := re.fullmatch(r"Is (the .*) (left of|right of|above|below) (the .*)\?", question):
        one, other = the(match[1], objects), the(match[3], objects)
        assert holds(one, match[2], other) or holds(one, OPPOSITE[match[2]], other)
        return {"yes" if leans(one, match[2], other) else "no"}
    if match := re.fullmatch(r"Which is larger, the (.*) or the (.*)\?", question):
        areas = {name: np.prod(the(name, objects)["box"][2:]) for name in match.groups()}
        return {name for name, area in areas.items() if area > 1.1 * min(areas.values())}
    match = re.fullmatch(r"Are there more (\w+) or more (\w+)( objects)?\?", question)
    counts = {name: len(meant(name + (match[3] or ""), objects)) for name in match.groups()[:2]}
    return {name for name, count in counts.items() if count == max(counts.values())}


def test_each_question_has_exactly_one_right_answer(seen, unseen):
    kinds = Counter()
    for _, about in [*seen, *unseen]:
        for asked in about["questions"]:
            assert right_answers(asked["question"], about["objects"]) == {asked["answer"]}, (asked, about["objects"])
            kinds[asked["kind"]] += 1
        assert len({asked["question"] for asked in about["questions"]}) == len(about["questions"]) <= MADE["questions"]
    assert set(kinds) == set(KINDS) and min(kinds.values()) > SCENES / 2, kinds


def test_a_phrase_means_one_object_and_a_caption_is_true(seen, unseen):
    relational = 0
    for parts, about in [*seen, *unseen]:
        for one in about["phrases"]:
            assert the(one["phrase"], about["objects"])["box"] == one["box"]
            relational += any(relation in one["phrase"] for relation in OPPOSITE)
        listed, _, relation = parts["txt"].decode().partition(", ")
        things = [f"a {o['size']} {o['colour']} {o['shape']} at the {quarter(o)}" for o in about["objects"]]
        assert listed == " and ".join(things)
        if relation:
            one, word, other = re.fullmatch(r"(the .*) is (left of|right of|above|below) (the .*)", relation).groups()
            assert holds(the(one, about["objects"]), word, the(other, about["objects"]))
        full = Counter((one["size"], one["colour"], one["shape"]) for one in about["objects"])
        assert bool(relation) == (list(full.values()).count(1) > 1)
    assert relational > SCENES / 2


def test_answers_are_balanced(seen):
    answers = {kind: Counter() for kind in KINDS}
    first = Counter()
    for asked in (asked for _, about in seen for asked in about["questions"]):
        answers[asked["kind"]][asked["answer"]] += 1
        if asked["kind"] in ("larger", "more"):
            words = re.split(r", the | more ", asked["question"])[1]
            first[asked["kind"], words.startswith(asked["answer"])] += 1
    for kind in ("exists", "relation"):
        assert 0.42 < answers[kind]["yes"] / answers[kind].total() < 0.58, answers[kind]
    for kind in ("larger", "more"):
        assert 0.42 < first[kind, True] / (first[kind, True] + first[kind, False]) < 0.58, first
    most = {"count": 0.4, "colour": 0.25, "shape": 0.3, "where": 0.35}
    for kind, limit in most.items():
        assert answers[kind].most_common(1)[0][1] < limit * answers[kind].total(), answers[kind]


@pytest.mark.parametrize("objects", [1, 2])
def test_yes_is_as_frequent_as_no_where_few_objects_are_asked_about_often(objects, monkeypatch):
    """A repeated question is left out, and "yes" repeats sooner: one object has one question with that answer."""
    monkeypatch.setattr(scene_questions, "KINDS", {"exists": KINDS["exists"]})
    rng, answers = np.random.default_rng(0), Counter()
    while answers.total() < 2000:
        things = _choose_objects(rng, _choose_sides(rng, SIDE, None))
        if len(things) == objects:
            answers.update(one.answer for one in ask(rng, DescribedScene(things), 24))
    assert 0.46 < answers["yes"] / answers.total() < 0.54, answers


def test_objects_lie_apart_and_share_looks(seen):
    sizes, shared, pairs = Counter(), Counter(), 0
    for _, about in seen:
        boxes = [one["box"] for one in about["objects"]]
        sizes.update([len(boxes)])
        for number, (x, y, width, height) in enumerate(boxes):
            assert min(x, y) >= 0 and max(x + width, y + height) <= SIDE + 0.02
            for other_x, other_y, other_width, other_height in boxes[:number]:
                apart = max(
                    x - other_x - other_width, other_x - x - width, y - other_y - other_height, other_y - y - height
                )
                assert apart >= 0.98
        for one, other in zip(about["objects"], about["objects"][1:], strict=False):
            pairs += 1
            shared["colour"] += one["colour"] == other["colour"]
            shared["shape"] += one["shape"] == other["shape"]
    assert set(sizes) == set(range(1, 9)) and min(sizes.values()) > SCENES / 16
    assert shared["colour"] > 1.3 * pairs / 8 and shared["shape"] > 1.3 * pairs / 6  # more than by chance


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_are_tight_and_objects_of_three_pixels_are_drawn(shape):
    for radius in (1.5, 4.3, 9.0):
        thing = SceneObject(shape, "red", "small", "top left", 13.4, 12.7, radius)
        image = np.zeros((32, 32, 3), np.float32)
        _paint_object(image, thing)
        rows, columns = np.nonzero(image[:, :, 0] > 0.25 * RGB["red"][0])
        x, y, width, height = thing.box
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.abs(np.subtract(found, (x, y, x + width, y + height))).max() < 1.3, (found, thing.box)


def test_a_sample_is_a_function_of_seed_split_and_index(written, tmp_path):
    """Whatever the number of scenes and shards; and questions change neither picture nor caption."""
    layout = make_layout(SIDE, 8, None, 0.5, *HELD.values())
    assert written[1]["objects"] == 8 and written[1]["questions"] == 9
    stored = samples_of(written[0] / "seen")
    for index in (0, 7):
        one, other = (scene_of("train", index, SIDE, layout=layout, questions=count) for count in (0, 9))
        assert np.array_equal(one.image, other.image) and (one.caption, one.phrases) == (other.caption, other.phrases)
        parts, about = stored[index]
        assert parts["txt"].decode() == other.caption and captions_of(parts) == {"caption": [other.caption]}
        assert about["conversations"] == conversation(other.questions) and not one.questions
    turns = stored[0][1]["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    assert [turn["value"].startswith("<image>\n") for turn in turns] == [True] + [False] * (len(turns) - 1)
    val = {scene_of("val", index, SIDE, layout=layout).caption for index in range(40)}
    assert not val & {parts["txt"].decode() for parts, _ in stored}


def test_the_fixed_places_can_ask_too(tmp_path):
    api.data_shapes(str(tmp_path / "out"), count=20, size=SIDE, questions=4)
    for index, (parts, about) in enumerate(samples_of(tmp_path / "out")):
        scene = scene_of("train", index, SIDE)
        assert parts["txt"].decode() == scene.caption == describe(scene.objects)
        for asked in about["questions"]:
            assert right_answers(asked["question"], about["objects"]) == {asked["answer"]}


def test_held_out_combinations_occur_nowhere_but_where_only_they_do(written, seen, unseen):
    held = {(colour, shape) for colour, shape in held_out_looks(*HELD.values())}
    for name, only in {"seen": False, "unseen": True}.items():
        manifest = json.loads((written[0] / name / "aimv2.json").read_text())
        assert set(manifest["held_out"]) == {" ".join(look) for look in held}
        assert (manifest["only_held_out"], manifest["hold_out"], manifest["hold_out_seed"]) == (only, 0.15, 3)
        looks = {(one["colour"], one["shape"]) for _, about in (unseen if only else seen) for one in about["objects"]}
        assert looks == held if only else looks == set(ALL_LOOKS) - held
        for parts, about in unseen if only else seen:
            texts = [parts["txt"].decode(), *(one["phrase"] for one in about["phrases"])]
            texts += [asked[key] for asked in about["questions"] for key in ("question", "answer")]
            named = set(re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", " . ".join(texts)))
            assert named <= held if only else not named & held


@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.2, 0.25])
def test_every_colour_and_shape_stays_in_most_of_its_combinations(fraction):
    draws = [held_out_looks(fraction, seed) for seed in range(10)]
    assert len(set(draws)) == 10 and {len(draw) for draw in draws} == {round(48 * fraction)}
    for draw in draws:
        colours, shapes = Counter(colour for colour, _ in draw), Counter(shape for _, shape in draw)
        assert max(colours.values()) <= 2 and max(shapes.values()) <= 2
    assert held_out_looks(0.0, 0) == ()


@pytest.mark.parametrize(
    ("options", "option", "code"),
    [
        ({"objects": 9}, "--objects", "invalid"),
        ({"objects": 8, "object_size": "4,16", "size": 32}, "--objects", "limit"),
        ({"objects": 8, "size": 20}, "--objects", "limit"),
        ({"objects": 2, "object_size": "2,9"}, "--object-size", "invalid"),
        ({"objects": 2, "object_size": "5,9"}, "--object-size", "invalid"),
        ({"objects": 2, "object_size": "5"}, "--object-size", "invalid"),
        ({"objects": 2, "hold_out": 0.5}, "--hold-out", "invalid"),
        ({"objects": 2, "only_held_out": True}, "--only-held-out", "missing"),
        ({"objects": 2, "hold_out_seed": 3}, "--hold-out-seed", "missing"),
        ({"hold_out": 0.15}, "--hold-out", "missing"),
        ({"distractors": 0.5}, "--distractors", "missing"),
        ({"object_size": "3,9"}, "--object-size", "missing"),
        ({"questions": -1}, "--questions", "invalid"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(tmp_path, options, option, code):
    with pytest.raises(UsageError) as error:
        api.data_shapes(str(tmp_path / "out"), count=3, **options)
    assert (error.value.option, error.value.code) == (option, code), error.value
    assert not (tmp_path / "out").exists()
    if options == {"objects": 8, "size": 20}:  # no --object-size is small enough
        assert "lower --objects, or raise --size" in str(error.value)
