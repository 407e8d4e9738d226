"""Boxes of a sample: read in the picture's pixels, and every fault counted under its code."""

import json

import numpy as np
import pytest

from aimv2.data.images.boxes import BOX_FAULTS, UNUSABLE, Regions, fault_of_box, regions_of, scale_between
from aimv2.data.scene_objects import make_layout
from aimv2.data.scenes import _sample, scene_of

SIZE = (100, 50)


def read(objects: list, picture: tuple[int, int] = SIZE, **more: object) -> tuple[Regions, list[str]]:
    return regions_of({"objects": objects, **more}, picture)


def test_boxes_become_xyxy_with_their_classes() -> None:
    regions, faults = read(
        [{"box": [10, 5, 20, 10], "class": "dog"}, {"box": [0, 0, 100, 50], "class": "cat", "crowd": True}],
        phrases=[
            {"phrase": "the dog", "box": [10, 5, 20, 10]},
            {"phrase": "both", "boxes": [[0, 0, 5, 5], [9, 9, 1, 1]]},
        ],
        negative=["horse"],
        not_exhaustive=["cat"],
    )
    assert faults == []
    assert regions.boxes.dtype == np.float32 and regions.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 100, 50]]
    assert regions.classes == ["dog", "cat"] and regions.crowd.tolist() == [False, True]
    assert [(text, boxes.tolist()) for text, boxes in regions.phrases] == [
        ("the dog", [[10, 5, 30, 15]]),
        ("both", [[0, 0, 5, 5], [9, 9, 10, 10]]),
    ]
    assert (regions.negative, regions.not_exhaustive) == (["horse"], ["cat"])


def test_an_empty_picture_is_no_fault_and_one_without_objects_is() -> None:
    regions, faults = read([])
    assert faults == [] and regions.boxes.shape == (0, 4)
    assert regions_of({"captions": {}}, SIZE)[1] == ["not-regions"]


@pytest.mark.parametrize(
    ("thing", "code", "kept"),
    [
        ({"box": [1, 1, 0, 5], "class": "a"}, "degenerate", 0),
        ({"box": [1, 1, -3, 5], "class": "a"}, "degenerate", 0),
        ({"box": [1, 1, 5], "class": "a"}, "not-a-box", 0),
        ({"box": [1, 1, float("nan"), 5], "class": "a"}, "not-a-box", 0),
        ({"box": ["1", 1, 5, 5], "class": "a"}, "not-a-box", 0),
        ("a", "not-a-box", 0),
        ({"box": [101, 1, 5, 5], "class": "a"}, "far-outside", 0),
        ({"box": [90, 1, 15, 5], "class": "a"}, "outside", 1),
        ({"box": [90, 1, 10.5, 5], "class": "a"}, "", 1),  # within rounding
        ({"box": [1, 1, 5, 5]}, "no-class", 0),
        ({"box": [1, 1, 5, 5], "class": " "}, "no-class", 0),
        ({"box": [1, 1, 5, 5], "shape": "ring"}, "no-class", 0),
    ],
)
def test_faults_of_a_box(thing: object, code: str, kept: int) -> None:
    regions, faults = read([thing])
    assert faults == [code] * bool(code) and len(regions.boxes) == len(regions.classes) == kept
    assert set(faults) <= set(BOX_FAULTS)
    if kept:
        assert regions.boxes[0, 2] <= SIZE[0]


@pytest.mark.parametrize(
    ("flag", "crowd", "code"),
    [(1, True, ""), ("1", True, ""), (True, True, ""), ("0", False, ""), (None, False, ""), (0.0, False, "")]
    + [(wrong, False, "unclear-crowd") for wrong in ("no", 2, -1, [1], {})],
)
def test_the_flag_of_a_crowd(flag: object, crowd: bool, code: str) -> None:
    regions, faults = read([{"box": [1, 1, 5, 5], "class": "a", "crowd": flag}])
    assert faults == [code] * bool(code) and regions.crowd.tolist() == [crowd]


def test_values_of_another_type_are_none() -> None:
    thing = {"box": [1, 1, 5, 5], "class": "a", "segmentation": [["a", 1, 2, 3, 4, 5], [1, 1, 5, 1, 5, 5]]}
    regions, faults = read([thing], negative=5, not_exhaustive="a", phrases=3)
    assert faults == ["broken-mask"] and (regions.negative, regions.not_exhaustive, regions.phrases) == ([], [], [])
    assert regions.segmentations == [None]


@pytest.mark.parametrize(
    ("segmentation", "code"),
    [
        ([[1, 1, 5, 1, 5, 5]], ""),
        ([], ""),
        ([[1, 1, 5, 1]], "broken-mask"),
        ([[1, 1, 5, 1, 5, 5], [1, 1, 5, 1, 5, 5, 7]], "broken-mask"),
        ({"size": [50, 100], "counts": [2000, 1000, 2000]}, ""),
        ({"size": [50, 100], "counts": "`n1Xo0`n1"}, ""),
        ({"size": [50, 100], "counts": "`n1Xo0"}, "broken-mask"),
        ({"size": [50, 100], "counts": [2000, 1000]}, "broken-mask"),
        ({"size": [50, 100], "counts": [6000, -1000]}, "broken-mask"),
        ({"size": [100, 50], "counts": [2000, 1000, 2000]}, "broken-mask"),  # of the turned picture
        ({"size": [50, 100]}, "broken-mask"),
        ("text", "broken-mask"),
    ],
)
def test_a_broken_segmentation_is_counted_and_the_box_kept(segmentation: object, code: str) -> None:
    thing = {"box": [1, 1, 5, 5], "class": "a", "segmentation": segmentation}
    for picture in (SIZE, (50, 25)):  # RLE is of the annotated size, whatever that of the picture
        regions, faults = read([thing], picture, size=list(SIZE))
        assert faults == [code] * bool(code) and len(regions.boxes) == 1
        assert (regions.segmentations[0] is None) == (bool(code) or not segmentation)


def test_a_box_that_repeats_is_counted_and_kept() -> None:
    same = {"box": [1, 1, 5, 5], "class": "a"}
    regions, faults = read([same, same, same | {"class": "b"}])
    assert faults == ["duplicate"] and len(regions.boxes) == 3


@pytest.mark.parametrize(
    "phrase", [{"phrase": "", "box": [1, 1, 5, 5]}, {"phrase": "x"}, {"phrase": "x", "boxes": []}, "x"]
)
def test_a_phrase_without_text_or_box(phrase: object) -> None:
    assert read([], phrases=[phrase])[1] == ["no-phrase"]


def test_boxes_of_another_size_are_scaled_only_in_proportion() -> None:
    thing = {"box": [10, 5, 20, 10], "class": "a", "segmentation": [[10, 5, 30, 5, 30, 15]]}
    regions, faults = read([thing], (200, 100), size=[100, 50])
    assert faults == [] and regions.boxes.tolist() == [[20, 10, 60, 30]]
    assert regions.segmentations == [[[20, 10, 60, 10, 60, 30]]]
    regions, faults = read([thing], (50, 100), size=[100, 50])  # turned by 90 degrees
    assert faults == ["other-size"] and len(regions.boxes) == 0 and set(faults) <= UNUSABLE
    assert scale_between((640, 427), (320, 214)) and not scale_between((640, 0), (640, 480))
    assert read([thing], size=12345)[1] == ["other-size"]  # no size at all


def test_scenes_are_read_with_classes_of_colour_and_shape() -> None:
    scene = scene_of("train", 3, 64, layout=make_layout(64, 6))
    parts = _sample(scene, "key", words=True)[1]
    regions, faults = regions_of(json.loads(parts["json"]), (64, 64))
    assert faults == [] and len(regions.boxes) == len(scene.objects) and len(regions.phrases) == len(scene.phrases)
    assert regions.classes[0] == f"{scene.objects[0].colour} {scene.objects[0].shape}"


def test_fault_of_a_box_by_itself() -> None:
    assert fault_of_box([0, 0, 5, 5], SIZE) == "" and fault_of_box([60, 30, 90, 45], SIZE) == "outside"
