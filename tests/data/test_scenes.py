"""The built-in scenes: the caption is true of the picture, and validation is unseen."""

import hashlib
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from aimv2.data.scene_objects import COLOURS, LABELS, NUM_LABELS, PLACES, RGB, SHAPES, SIZES
from aimv2.data.scenes import describe, draw_scene, scene_of, write_scenes
from aimv2.data.shards.format import find_shards, read_samples
from aimv2.data.text.tokenizer import train_tokenizer
from aimv2.errors import UsageError

SCENES = [scene_of("train", index) for index in range(600)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return folder, write_scenes(folder, 120, val_count=30, shard_size=50, seed=3)


def test_a_scene_is_a_function_of_seed_split_and_index():
    one, two = scene_of("train", 7, seed=5), scene_of("train", 7, seed=5)
    assert np.array_equal(one.image, two.image) and one.objects == two.objects
    others = [scene_of("train", 8, seed=5), scene_of("train", 7, seed=6), scene_of("val", 7, seed=5)]
    assert all(one.objects != other.objects for other in others)
    drawn = [draw_scene(np.random.default_rng(1), 48) for _ in range(2)]
    assert drawn[0].image.shape == (48, 48, 3) and drawn[0].image.dtype == np.uint8
    assert np.array_equal(drawn[0].image, drawn[1].image)


def test_pictures_and_captions_stay_as_they_are():
    """Runs and results of earlier versions are on these scenes, bit by bit."""
    found = hashlib.sha256()
    for split in ("train", "val"):
        for size, largest in ((32, None), (16, 48)):
            for scene in (scene_of(split, index, size, 3, largest) for index in range(20)):
                found.update(scene.image.tobytes() + scene.caption.encode())
    assert found.hexdigest() == "cf20c8911e33742f262bb2fb1fca2328ecdf6150a211151b2d191df9ecf06d58"


@pytest.mark.parametrize("size", [16, 32, 33, 224])
def test_colour_and_place_are_what_the_caption_says(size):
    for index in range(60):
        scene = scene_of("train", index, size)
        assert scene.caption == describe(scene.objects)
        for thing in scene.objects:
            column, row = PLACES.index(thing.place) % 2, PLACES.index(thing.place) // 2
            assert thing.x - thing.radius >= column * size / 2 - 1e-6
            assert thing.x + thing.radius <= (column + 1) * size / 2 + 1e-6
            assert thing.y - thing.radius >= row * size / 2 - 1e-6
            assert thing.y + thing.radius <= (row + 1) * size / 2 + 1e-6
            # A ring is empty at its centre: look at the middle of its band there.
            x = thing.x + (0.76 * thing.radius if thing.shape == "ring" else 0)
            pixel = scene.image[int(thing.y), min(int(x), size - 1)].astype(int)
            if size >= 32:
                assert nearest_colour(pixel) == thing.colour, (scene.caption, pixel)


def test_sides_are_drawn_between_size_and_largest():
    scenes = [scene_of("train", index, 16, largest=48) for index in range(200)]
    shapes = {scene.image.shape[:2] for scene in scenes}
    assert len(shapes) > 100 and all(16 <= side <= 48 for shape in shapes for side in shape)
    assert {side for shape in shapes for side in shape} >= {16, 48}
    for scene in scenes:
        height, width = scene.image.shape[:2]
        for thing in scene.objects:
            column, row = PLACES.index(thing.place) % 2, PLACES.index(thing.place) // 2
            assert column * width / 2 <= thing.x - thing.radius < thing.x + thing.radius <= (column + 1) * width / 2
            assert row * height / 2 <= thing.y - thing.radius < thing.y + thing.radius <= (row + 1) * height / 2
            if thing.shape != "ring" and thing.radius > 3:
                assert nearest_colour(scene.image[int(thing.y), int(thing.x)].astype(int)) == thing.colour
    with pytest.raises(UsageError, match="largest: got 20, expected at least size, 24"):
        draw_scene(np.random.default_rng(0), 24, 20)


def nearest_colour(pixel):
    return min(COLOURS, key=lambda colour: sum((pixel - np.array(RGB[colour])) ** 2))


def test_shapes_and_sizes_differ_in_area():
    areas = {}
    for scene in (scene_of("train", index, 64) for index in range(500)):
        if len(scene.objects) == 1:
            thing = scene.objects[0]
            inked = np.abs(scene.image.astype(int) - RGB[thing.colour]).sum(-1) < 60
            areas.setdefault((thing.size, thing.shape), []).append(inked.sum() / thing.radius**2)
            assert (thing.radius > 9) == (thing.size == "large")
    mean = {key: np.mean(values) for key, values in areas.items()}
    for size in SIZES:
        assert mean[size, "circle"] > mean[size, "ring"] and mean[size, "square"] > mean[size, "diamond"]


def test_caption_form():
    for scene in SCENES:
        parts = scene.caption.split(" and ")
        assert 1 <= len(parts) == len(scene.objects) <= 2
        places = []
        for part in parts:
            article, size, colour, shape, at, the, *place = part.split(" ")
            assert (article, at, the) == ("a", "at", "the")
            assert size in SIZES and colour in COLOURS and shape in SHAPES
            places.append(PLACES.index(" ".join(place)))
        assert places == sorted(set(places))
        first = scene.objects[0]
        assert scene.label_name == f"{first.colour} {first.shape}" == LABELS[scene.label]
    tokenizer = train_tokenizer(scene.caption for scene in SCENES)
    longest = max(SCENES, key=lambda scene: len(scene.caption.split())).caption
    assert len(tokenizer.encode(longest)) == len(longest.split()) + 1 <= 24


def test_scenes_are_balanced():
    assert len(LABELS) == len(set(LABELS)) == NUM_LABELS == len(SHAPES) * len(COLOURS)
    things = [thing for scene in SCENES for thing in scene.objects]
    for name, known in {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": PLACES}.items():
        seen = Counter(getattr(thing, name) for thing in things)
        assert set(seen) == set(known)
        assert min(seen.values()) > 0.7 * len(things) / len(known)
    assert 0.4 < sum(len(scene.objects) == 2 for scene in SCENES) / len(SCENES) < 0.6
    assert len({scene.label for scene in SCENES}) == NUM_LABELS


def test_validation_is_unseen():
    """Also across seeds: the split is decided by content."""
    train = [scene_of("train", index, seed=seed) for seed in (0, 1) for index in range(2000)]
    val = [scene_of("val", index) for index in range(200)]
    pairs = {scene.caption for scene in train if len(scene.objects) == 2}
    assert not pairs & {scene.caption for scene in val}
    assert not {scene.image.tobytes() for scene in train} & {scene.image.tobytes() for scene in val}
    assert {len(scene.objects) for scene in val} == {1, 2}


def test_written_shards(written):
    folder, told = written
    assert told == {"out": str(folder), "train": 120, "val": 30, "shards": 4, "size": 32, "seed": 3}
    assert [path.name for path in find_shards(folder, "train")] == [f"train-{n:06d}.tar" for n in range(3)]
    manifest = json.loads((folder / "aimv2.json").read_text())
    assert manifest["counts"] == {"train": 120, "val": 30} and manifest["source"] == "scenes"
    assert (folder / "classes.txt").read_text().splitlines() == list(LABELS)
    for split, count in manifest["counts"].items():
        samples = [sample for tar in find_shards(folder, split) for sample in read_samples(tar)]
        assert len({key for key, _ in samples}) == len(samples) == count
        for index, (_, parts) in enumerate(samples):
            scene = scene_of(split, index, seed=3)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(parts["png"]))), scene.image)
            assert parts["txt"].decode() == scene.caption and int(parts["cls"]) == scene.label
            assert json.loads(parts["json"]) == {"captions": {"caption": [scene.caption]}}


def test_sample_does_not_depend_on_count_or_shards(written, tmp_path):
    write_scenes(tmp_path, 20, shard_size=7, seed=3)
    few = [sample for tar in find_shards(tmp_path, "train") for sample in read_samples(tar)]
    many = [sample for tar in find_shards(written[0], "train") for sample in read_samples(tar)]
    assert few == many[:20]
    assert json.loads((tmp_path / "aimv2.json").read_text())["counts"] == {"train": 20, "val": 2}


def test_without_validation(tmp_path):
    assert write_scenes(tmp_path / "new", 3, val_count=0)["shards"] == 1
    assert not list((tmp_path / "new").glob("val-*"))


@pytest.mark.parametrize(
    "options",
    [{"count": 0}, {"size": 15}, {"val_count": -1}, {"shard_size": 0}, {"seed": -1}],
    ids=lambda options: next(iter(options)),
)
def test_options_out_of_range(tmp_path, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        write_scenes(tmp_path, **{"count": 5, **options})
    assert not list(tmp_path.iterdir())


def test_refuses_a_folder_with_shards(written):
    with pytest.raises(UsageError, match="shards already"):
        write_scenes(written[0], 5)
