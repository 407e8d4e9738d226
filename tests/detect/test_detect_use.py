"""A trained detector in use: photos, scores, wrong use, and the recipe of Table 4 at full size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2 import api
from aimv2.config.load import parse, read_recipe
from aimv2.config.recipes import recipe_file
from aimv2.data.scene_objects import SceneLayout
from aimv2.data.scenes import write_scenes
from aimv2.data.stream.regions import RegionRow, rows_to_batch
from aimv2.data.text.phrases import Prompts, small_tokenizer
from aimv2.detect.build import build_detector, first_weights, head_config, square_side, write_detector
from aimv2.detect.find import Found, cover
from aimv2.detect.model import Detector, Predictions
from aimv2.errors import UsageError
from aimv2.models.sizes import EncoderConfig, model_config
from aimv2.objectives.detect import DetectObjective
from runs import assert_refused

SHAPE = EncoderConfig("eye", 64, 1, 2, 64, 8, 32)
NAMES = ["red ring", "blue cross"]


def detector(folder: Path, head: str) -> Path:
    """A tiny detector with random weights, as a model folder."""
    options = parse({"objective.name": "detect", **TINY, "objective.head": head}).objective
    tokenizer = small_tokenizer(["red", "ring", "blue", "cross", "the"]) if head == "grounding" else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_detector(options, head_config(options, SHAPE, NAMES, tokenizer))
    about = {"head": head, "image_size": 32, "square": 32, "threshold": 0.3, "classes": NAMES}
    write_detector(folder, model.net, model.saved(dict(model.state_dict())), tokenizer, about, "# a detector\n")
    return folder


TINY = {
    "objective.width": 32, "objective.encoder_layers": 1, "objective.decoder_layers": 2, "objective.queries": 8,
    "objective.pyramid": [1, 0.5],
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``grounding`` and ``closed``, detectors; ``scenes``; ``photo.png``."""
    root = tmp_path_factory.mktemp("use")
    detector(root / "grounding", "grounding")
    detector(root / "closed", "closed")
    write_scenes(str(root / "scenes"), 2, val_count=3, size=32, layout=SceneLayout(2, (8, 14)))
    Image.new("RGB", (60, 40), (90, 90, 200)).save(root / "photo.png")
    return root


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second query of every picture is a box in its middle, sure of the last phrase or class."""

    def forward(self: Detector, batch: Any) -> list[Predictions]:
        width = batch.text.shape[1] if self.head == "grounding" else len(NAMES)
        logits = torch.full((len(batch.images), 3, width), -6.0)
        logits[:, 1, (batch.text[0] > 0).sum() - 4 if self.head == "grounding" else -1 :] = 6.0
        boxes = torch.tensor([0.5, 0.25, 0.5, 0.25]).expand(len(batch.images), 3, 4)
        return [Predictions(logits, boxes)]

    monkeypatch.setattr(Detector, "forward", forward)


@pytest.mark.usefixtures("known")
def test_words_are_found_and_drawn(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = api.detect_photo(
        [str(root / "photo.png")], words="red ring, the ring", model=str(root / "grounding"), out=str(tmp_path)
    )
    (one,) = result["images"]
    (found,) = one["found"]
    assert found["words"] == "the ring" and found["score"] == pytest.approx(0.9975, abs=1e-3)
    assert found["box"] == pytest.approx([15, 7.5, 30, 15], abs=0.8)  # 32 px of the square are 60 of the picture
    drawn, plain = (np.asarray(Image.open(path).convert("RGB")) for path in (one["drawn"], root / "photo.png"))
    assert drawn.shape == plain.shape and (drawn[22, 20:40] != plain[22, 20:40]).any()
    assert not api.detect_photo([str(root / "photo.png")], "red ring", str(root / "grounding"), 0.999, str(tmp_path))[
        "images"
    ][0]["found"]
    result = api.detect_photo([str(root / "photo.png")], model=str(root / "closed"), out=str(tmp_path))
    assert [row["words"] for row in result["images"][0]["found"]] == ["blue cross"]


@pytest.mark.usefixtures("known")
def test_words_that_nothing_was_learned_of_are_said(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, unknown in (("red ring, the ring", None), ("red zebra, 斑马", "'zebra', '斑', '马'")):
        api.detect_photo([str(root / "photo.png")], words, str(root / "grounding"), out=str(tmp_path))
        said = capsys.readouterr().err
        assert ("has no word" in said) == (unknown is not None)
        assert unknown is None or unknown in said


@pytest.mark.usefixtures("known")
def test_photos_of_one_name_are_drawn_apart(root: Path, tmp_path: Path) -> None:
    photos = [tmp_path / folder / "photo.png" for folder in "ab"]
    for photo in photos:
        photo.parent.mkdir()
        Image.new("RGB", (60, 40)).save(photo)
    result = api.detect_photo([str(photo) for photo in photos], "red ring", str(root / "grounding"), out=str(tmp_path))
    assert [Path(one["drawn"]).name for one in result["images"]] == ["photo-found.png", "photo-found-2.png"]
    assert all(Path(one["drawn"]).is_file() for one in result["images"])


def test_a_text_without_words_has_finite_gradients() -> None:
    options = parse({"objective.name": "detect", **TINY}).objective
    tokenizer = small_tokenizer(["red", "ring"])
    model = build_detector(options, head_config(options, SHAPE, NAMES, tokenizer)).train()
    prompts, pixels = Prompts(tokenizer, 16), np.full((3, 32, 32), 9, np.uint8)
    box = np.array([[0.5, 0.5, 0.4, 0.4]], np.float32)
    rows = [
        RegionRow("one", pixels, box, [0], prompts.encode(["red ring"])),
        RegionRow("none", pixels, box[:0], [], prompts.encode([])),
    ]
    for given in (rows, rows[1:]):
        model.zero_grad()
        terms = DetectObjective("grounding", 0)(model, rows_to_batch(given))
        sum(total for total, _ in terms.values()).backward()
        assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)


def test_a_photo_stands_where_a_command_would(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from aimv2.cli import main

    words = [
        "detect",
        str(root / "photo.png"),
        "--words",
        "red ring",
        "--model",
        str(root / "grounding"),
        "--out",
        str(tmp_path),
    ]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["words"] == ["red ring"]
    assert main(words) == 0
    assert "photo.png" in capsys.readouterr().out
    assert_refused(capsys, ["detect", "trian"], "unknown command", "train")


def test_wrong_use(root: Path) -> None:
    photo = str(root / "photo.png")
    for given, option, code in (
        ({"words": "a dog"}, "--model", "missing"),
        ({"model": str(root / "scenes")}, "--model", "invalid"),
        ({"model": str(root / "closed"), "words": "a dog"}, "--words", "unknown"),
        ({"model": str(root / "grounding"), "words": " , "}, "--words", "missing"),
        ({"model": str(root / "grounding"), "threshold": 2.0}, "--threshold", "invalid"),
    ):
        with pytest.raises(UsageError) as error:
            api.detect_photo([photo], **given)
        assert (error.value.option, error.value.code) == (option, code), error.value
    for given, option, code in (
        ({"model": str(root / "grounding")}, "--data", "missing"),
        ({"model": str(root / "closed"), "data": str(root / "scenes")}, "--data", "mismatch"),
        ({"model": str(root / "closed"), "data": "instances.json"}, "--data", "mismatch"),
        ({"model": str(root / "closed"), "predictions": "found.json", "data": "x"}, "MODEL", "conflict"),
    ):
        with pytest.raises(UsageError) as error:
            api.detect_score(**given)
        assert (error.value.option, error.value.code) == (option, code), error.value


def test_a_detector_is_scored(root: Path, tmp_path: Path) -> None:
    """As the file of what it found is."""
    result = api.detect_score(
        data=str(root / "scenes"), model=str(root / "grounding"), out=str(tmp_path / "one"), batch_size=2
    )
    assert result["model"]["kind"] == "detector" and result["data"]["test_images"] == 3
    assert (
        0 <= result["figures"]["box"]["ap"] <= 1
        and result["figures"]["phrases"]["answered"] == result["data"]["phrases"] > 0
    )
    again = api.detect_score(str(tmp_path / "one" / "predictions.json"), str(root / "scenes"))
    assert again["figures"] == result["figures"]


def test_masks_become_boxes_and_outlines() -> None:
    from aimv2.data.stream.region_masks import decode_rle
    from aimv2.data.stream.regions import Place
    from aimv2.evals.detection.model_score import Shown, outline

    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, 2:4, 1:5] = True
    assert cover(masks).tolist() == [[1, 2, 5, 4], [0, 0, 0, 0]]
    found = Found(torch.zeros(2), torch.zeros(2), cover(masks) * 4, masks)
    shown = Shown(1, (64, 32), torch.zeros(3, 32, 32, dtype=torch.uint8), Place.whole((64, 32), 32))
    inside = decode_rle(outline(found, 0, shown)) > 0
    assert inside.shape == (32, 64)
    rows, columns = inside.nonzero()
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == pytest.approx([8, 16, 40, 32], abs=2)


def test_first_weights_are_those_of_detr() -> None:
    """transformers starts RT-DETR's batch norms around zero."""
    options = parse({"objective.name": "detect", **TINY, "objective.head": "closed"}).objective
    net = build_detector(options, head_config(options, SHAPE, NAMES, None)).net
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and all((norm.weight == 1).all() for norm in norms)
    linear = (
        net.model.decoder.layers[0].mlp.fc1
        if hasattr(net.model.decoder.layers[0], "mlp")
        else net.model.decoder.layers[0].fc1
    )
    bound = (6 / (linear.in_features + linear.out_features)) ** 0.5
    assert bound * 0.9 < float(linear.weight.abs().max()) <= bound
    first_weights(net)
    for last in (net.model.decoder.bbox_embed[0].layers[-1], net.model.enc_bbox_head.layers[-1]):
        assert not last.weight.any()


def test_the_recipe_of_table_4_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number says where it is from; one forward and backward pass without memory for its tensors."""
    path = recipe_file("detect-grounding", "--config")
    config, text = parse(read_recipe(path)), path.read_text()
    for line in text.splitlines():
        own = line.startswith("#") or line.endswith(":") or line.strip() == "name: detect" or "# ours" in line
        assert own or "section 5.5" in line or "Table D2" in line, line
    options = config.objective
    assert options.window == 16 and "AP 60.2" in text and "31.6" in text and "92.6" in text
    options.text = None  # a BERT of the same form, without its weights
    encoder, _ = model_config("aimv2-large-patch14-224")
    side = square_side(options, encoder)
    assert side == 1064 and side % (14 * 4) == 0
    whole = head_config(options, encoder, [], small_tokenizer(["a"]))
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # which reads values
    with torch.device("meta"):
        model = build_detector(options, whole).to("meta").eval()
        layers = model.grounded(torch.zeros(1, 3, side, side), torch.zeros(1, 32, dtype=torch.int64))
        assert layers[-1].boxes is not None and layers[-1].boxes.shape == (1, 900, 4) and len(layers) == 7
        torch.stack([layer.boxes.sum() for layer in layers if layer.boxes is not None]).sum().backward()
    assert model.encoder.blocks[0].attn.qkv.weight.grad.shape == (3 * 1024, 1024)
    assert model.backbone.config.window == 16 and model.backbone.global_blocks == [5, 11, 17, 23]


def test_the_recipe_of_section_d2_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe_file("detect-masks", "--config")
    config, text = parse(read_recipe(path)), path.read_text()
    for line in text.splitlines():
        own = line.startswith("#") or line.endswith(":") or line.strip() == "name: detect" or "# ours" in line
        assert own or "section D.2" in line, line
    options, train = config.objective, config.train
    assert (options.image_size, options.window, config.optim.schedule, train.batch_size) == (1024, 16, "cosine", 64)
    assert config.optim.layer_decay < 1 and 0 <= train.steps * 64 - 100 * 118_287 < 64
    encoder, _ = model_config("aimv2-large-patch14-224")
    side = square_side(options, encoder)
    whole = head_config(options, encoder, [str(number) for number in range(80)], None)
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    with torch.device("meta"):
        model = build_detector(options, whole).to("meta").eval()
        found = model.net(torch.zeros(1, 3, side, side), output_auxiliary_logits=True)
        found.masks_queries_logits.sum().backward()
    assert (
        found.masks_queries_logits.shape == (1, 100, 4 * side // 14, 4 * side // 14)
        and len(found.auxiliary_logits) == 9
    )
    assert model.encoder.blocks[0].attn.qkv.weight.grad.shape == (3 * 1024, 1024)
