"""What becomes of a picture with boxes on its way into a batch, and the losses of what a head makes of it."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2.batch import Batch, join_batches, split_batch
from aimv2.config.detect import DetectTaskOptions
from aimv2.data.images.decode import ImageError
from aimv2.data.shards.format import Parts
from aimv2.data.stream.region_masks import decode_rle, masks_of
from aimv2.data.stream.regions import Place, RegionMaker, RegionRow, rows_to_batch
from aimv2.data.text.phrases import (
    DELIMITERS,
    Prompts,
    check_tokenizer,
    mirrored,
    phrase_numbers,
    plain_phrase,
    small_tokenizer,
    words_of,
)
from aimv2.detect.model import Predictions
from aimv2.errors import UsageError
from aimv2.objectives.detect import DetectObjective, overlap

NAMES = ["red ring", "blue cross", "green square", "left shoe", "right shoe"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer({word for name in [*NAMES, "the top of"] for word in name.split()})


def sample(size: tuple[int, int] = (80, 40), phrases: tuple[str, ...] = (), name: str = "red ring") -> Parts:
    """A grey picture with a white box in its upper left part, 8 to 24 across and 4 to 20 down."""
    pixels = np.full((size[1], size[0], 3), 90, np.uint8)
    pixels[4:20, 8:24] = 255
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "png")
    box = [8, 4, 16, 16]
    about = {"objects": [{"box": box, "class": name}], "phrases": [{"phrase": one, "box": box} for one in phrases]}
    return {"png": stored.getvalue(), "json": json.dumps(about).encode()}


def maker(prompts: Prompts | None = None, flip: float = 0.0, **options: Any) -> RegionMaker:
    return RegionMaker(DetectTaskOptions(**options), 60, 64, (0, 0, 0), [NAMES], prompts, flip, 10**6)


def white(row: RegionRow) -> np.ndarray:
    """Where the white box is: left, top, right, bottom in pixels."""
    rows, columns = (row.pixels.min(0) > 170).nonzero()
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("seed", range(12))
def test_boxes_follow_their_pixels(seed: int) -> None:
    row = maker(flip=0.5, zoom=(0.6, 2.0), head="closed", keep_area=0.01)("k", sample(), np.random.default_rng(seed), 0)
    for box in row.boxes * 64:
        corners = np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])
        np.testing.assert_allclose(corners, white(row), atol=1.3)


def test_a_box_counts_as_long_as_enough_of_it_is_left() -> None:
    boxes = np.array([[0, 0, 10, 10], [8, 0, 18, 10.0]])
    place = Place((40, 20), 8, 0, 20, 20)
    cut, left = place.boxes(boxes, (40, 20))
    assert left.tolist() == pytest.approx([0.2, 1.0])
    assert cut.tolist() == [[0, 0, 2, 10], [0, 0, 10, 10]]
    rows = [
        maker(head="closed", zoom=(2, 2), keep_area=0.5)("k", sample(), np.random.default_rng(seed), 0)
        for seed in range(8)
    ]
    assert {len(row.boxes) for row in rows} == {0, 1}
    whole = Place.whole((80, 40), 60)
    np.testing.assert_allclose(whole.back(whole.boxes(boxes, (80, 40))[0], (80, 40)), boxes)


def test_words_are_mirrored_with_the_picture(tokenizer: Any) -> None:
    assert mirrored("the LEFTMOST cup, right-hand side; Left of the bright light") == (
        "the RIGHTMOST cup, left-hand side; Right of the bright light"
    )
    prompts, said = Prompts(tokenizer, 64), set()
    for seed in range(8):
        row = maker(prompts, 0.5, phrases=1.0)(
            "k", sample(phrases=("the left of the top",)), np.random.default_rng(seed), 0
        )
        turned = bool(white(row)[0] > 12)
        assert tokenizer.decode(row.tokens) == f"[CLS] the {'right' if turned else 'left'} of the top. [SEP]"
        said.add(turned)
        assert white(row)[2] <= 60  # never cut
    assert said == {False, True}
    closed = maker(flip=1.0, head="closed")("k", sample(name="left shoe"), np.random.default_rng(0), 0)
    assert [NAMES[label] for label in closed.labels] == ["right shoe"]


def test_the_words_of_a_picture(tokenizer: Any) -> None:
    """Its classes are among them, absent ones too, and a federated picture has only those that were checked."""
    prompts = Prompts(tokenizer, 64)
    for seed in range(6):
        row = maker(prompts, zoom=(1, 1))("k", sample(), np.random.default_rng(seed), 0)
        words = tokenizer.decode(row.tokens).removeprefix("[CLS] ").removesuffix(". [SEP]").split(". ")
        assert [words[label] for label in row.labels] == ["red ring"] and len({*words}) == len(words) <= len(NAMES)
        parts = sample()
        about = {**json.loads(parts["json"]), "negative": ["green square"]}
        row = maker(prompts, zoom=(1, 1))(
            "k", {**parts, "json": json.dumps(about).encode()}, np.random.default_rng(seed), 0
        )
        assert not {"blue", "shoe"} & {*tokenizer.decode(row.tokens).split()}
    with pytest.raises(ImageError, match="without `objects`"):
        maker(prompts)("k", {**sample(), "json": b"{}"}, np.random.default_rng(0), 0)


def test_a_picture_without_objects_has_words_or_an_empty_text(tokenizer: Any) -> None:
    """A text of no tokens gives gradients that are not finite."""
    prompts, parts = Prompts(tokenizer, 64), sample()
    empty = {**parts, "json": b'{"objects": []}'}
    for seed in range(40):
        row = maker(prompts, negatives=1)("k", empty, np.random.default_rng(seed), 0)
        assert row.labels == [] and len(row.tokens) > 3  # one absent class
    assert maker(prompts, negatives=0)("k", empty, np.random.default_rng(0), 0).tokens == [101, 102]


def test_words_of_other_scripts_are_known() -> None:
    """As BERT's tokenizer splits them: without accents, Chinese by character; their letters spell further words."""
    phrases = ["自行车", "красный йогурт", "crème brûlée", "it's a bat_(animal)", "20°"]
    prompts = Prompts(small_tokenizer(words_of(phrases)), 64)
    assert all(100 not in prompts.tokens(phrase) for phrase in [*phrases, "车行", "кот"])
    assert prompts.tokens("自行车") != prompts.tokens("车行自") and words_of(["Café. It's?"]) == [
        "'",
        "cafe",
        "it",
        "s",
    ]


def test_phrases_are_found_by_the_ids_of_delimiters(tokenizer: Any) -> None:
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in DELIMITERS} == DELIMITERS
    check_tokenizer(tokenizer, "small")
    assert plain_phrase("St. Bernard?") == "st bernard"
    prompts = Prompts(tokenizer, 12)
    ids = prompts.encode(["red ring", "what?", "a zebra"])
    numbers = phrase_numbers(torch.tensor([[*ids, 0, 0]]))[0].tolist()
    assert sorted({*numbers}) == [-1, 0, 1, 2]
    assert prompts.parts(["red ring", "blue cross", "green square", "red cross"]) == [
        ["red ring", "blue cross", "green square"],
        ["red cross"],
    ]
    from transformers import BertTokenizer

    other = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, ".": 4, "?": 5})
    with pytest.raises(UsageError) as error:
        check_tokenizer(other, "mine")
    assert (error.value.code, error.value.option) == ("mismatch", "objective.text")


def test_masks_follow_their_place() -> None:
    from pycocotools.mask import encode

    inside = np.zeros((40, 80), np.uint8)
    inside[4:20, 8:24] = 1
    stored = encode(np.asfortranarray(inside))
    given = {"size": [40, 80], "counts": stored["counts"].decode()}
    assert (decode_rle(given) // 255 == inside).all()
    polygon = [[8.0, 4, 24, 4, 24, 20, 8, 20]]
    place = Place((80, 40), 4, 0, 64, 40, flip=True)
    boxes, _ = place.boxes(np.array([[8, 4, 24, 20.0]] * 3), (80, 40))
    masks = masks_of([given, polygon, None], boxes, (80, 40), place, 64, 4)
    wanted = np.zeros((16, 16), np.uint8)
    wanted[1:5, 11:15] = 1
    assert masks.shape == (3, 16, 16)
    assert all((mask == wanted).all() for mask in masks)


def batch_of(tokenizer: Any) -> Batch:
    """Three pictures with different texts and numbers of boxes, none in the second."""
    prompts, rng = Prompts(tokenizer, 64), np.random.default_rng(0)
    rows = []
    for phrases, count in (
        (["red ring", "blue cross"], 3),
        (["green square"], 0),
        (["blue cross", "left shoe", "red ring"], 2),
    ):
        boxes = np.concatenate([rng.uniform(0.3, 0.7, (count, 2)), rng.uniform(0.1, 0.4, (count, 2))], 1).astype(
            np.float32
        )
        labels = rng.integers(0, len(phrases), count).tolist()
        rows.append(RegionRow(str(count), np.zeros((3, 8, 8), np.uint8), boxes, labels, prompts.encode(phrases)))
    return rows_to_batch(rows)


def same(one: Batch, other: Batch) -> bool:
    names = ("boxes", "labels", "counts")
    return all(torch.equal(getattr(one.targets, name), getattr(other.targets, name)) for name in names)


def test_a_loss_does_not_depend_on_the_batch(tokenizer: Any) -> None:
    """That of a batch is the sum of its pictures', each with its own text; the right answer has the least."""
    batch = batch_of(tokenizer)
    parts = split_batch(batch, 3, 0)
    assert same(join_batches(parts, 0), batch)
    torch.manual_seed(0)
    logits, boxes = torch.randn(3, 6, batch.text.shape[1]), torch.rand(3, 6, 4) * 0.4 + 0.2
    objective = DetectObjective("grounding", 0)
    whole = objective.terms([Predictions(logits, boxes)], batch)
    each = [objective.terms([Predictions(logits[at : at + 1], boxes[at : at + 1])], parts[at]) for at in range(3)]
    for name, (total, count) in whole.items():
        assert float(total) == pytest.approx(sum(float(one[name][0]) for one in each), rel=1e-5)
        assert int(count) == 5 == int(objective.counts(batch)[name])
    numbers = phrase_numbers(batch.text)
    right, at = torch.full_like(logits, -9.0), 0
    for picture, count in enumerate(batch.targets.counts.tolist()):
        for query in range(count):
            right[picture, query] = torch.where(numbers[picture] == batch.targets.labels[at], 9.0, -9.0)
            boxes[picture, query] = batch.targets.boxes[at]
            at += 1
    best = objective.terms([Predictions(right, boxes)], batch)
    assert all(float(total) < 0.01 for total, _ in best.values())


def test_overlap_of_boxes() -> None:
    one, other = torch.tensor([0.0, 0, 2, 2]), torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [4, 0, 6, 2]])
    iou, giou = overlap(one, other)
    assert iou.tolist() == pytest.approx([1 / 7, 1, 0])
    assert giou.tolist() == pytest.approx([1 / 7 - 2 / 9, 1, -1 / 3])
