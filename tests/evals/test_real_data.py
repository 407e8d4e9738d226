"""Every measuring verb on real data: CIFAR-10 and captioned photographs, a small untrained model, a few hundred images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2 import api
from aimv2.data.text.tokenizer import train_tokenizer
from aimv2.interop.model_folder import save_model
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FEW = {"train_limit": 500, "test_limit": 200}


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny untrained AIMv2 with a decoder and the photographs' own vocabulary."""
    lines = (shared_data / "flickr8k-1k" / "captions.txt").read_text("utf-8").splitlines()[1:]
    tokenizer = train_tokenizer([line.partition(",")[2] for line in lines[:1000]], 400)
    options: dict[str, Any] = {"width": 32, "heads": 2, "hidden": 48, "depth": 2, "decoder_width": 32}
    options |= {"decoder_heads": 2, "decoder_hidden": 48, "decoder_depth": 1, "decoder_vocab_size": 400}
    made = create_model("aimv2-tiny-patch8-32", decoder=True, seed=0, **options)
    assert isinstance(made, AIMv2)
    with torch.no_grad():  # so that texts differ
        made.decoder.text_head.linear.weight.mul_(8)
    folder = tmp_path_factory.mktemp("real") / "model"
    save_model(made, folder)
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Features that probe, knn and linear share."""
    return str(tmp_path_factory.mktemp("real") / "cache")


def checked(result: dict[str, Any], out: Path, verb: str) -> dict[str, Any]:
    """The result's file is the result and says what it must; its figures."""
    stored = json.loads((out / "result.json").read_text("utf-8"))
    assert stored == json.loads(json.dumps(result)) and stored["verb"] == verb
    assert stored["format"] == "aimv2 result 1" and len(stored["model"]["weights_sha256"]) == 64
    assert stored["model"].get("unchanged") is True or verb == "caption", "caption reads a model that may be trained"
    assert {"protocol", "data", "figures", "seconds", "version", "command"} <= stored.keys()
    return stored["figures"]


# ---- CIFAR-10 ----


def counted(result: dict[str, Any], train: int | None, test: int) -> None:
    data = result["data"]
    assert (data["name"], data["classes"], data["split"]) == ("cifar10", 10, "test")
    assert (data.get("train_images"), data["test_images"]) == (train, test)


def test_knn(model: str, shared_data: Path, cache: str, tmp_path: Path) -> None:
    """Raw pixels stand above chance: the labels are those of the images."""
    source = str(shared_data / "cifar10")
    result = api.knn(model, source, k="1,20", baselines="pixels", cache=cache, out=str(tmp_path / "out"), **FEW)
    figures = checked(result, tmp_path / "out", "knn")
    counted(result, 500, 200)
    assert list(figures["per_class"]) == CLASSES and [row["k"] for row in figures["table"]] == [1, 20]
    low, _ = figures["baselines"]["pixels"]["top1_interval"]
    assert low > 0.1, "chance of ten classes"
    assert figures["top1"] == pytest.approx(np.mean(list(figures["per_class"].values()))), "20 test images a class"


def test_linear(model: str, shared_data: Path, cache: str, tmp_path: Path) -> None:
    result = api.linear(model, str(shared_data / "cifar10"), cache=cache, out=str(tmp_path / "out"), **FEW)
    figures = checked(result, tmp_path / "out", "linear")
    counted(result, 500, 200)
    assert list(figures["per_class"]) == CLASSES and figures["selected_on"] == "100 training images held out"
    assert figures["top1_interval"][0] > 0.1, "even untrained features tell colours apart"


def test_probe(model: str, shared_data: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"epochs": 6, "batch_size": 50, "rates": "1e-3,1e-2", "decays": "0.05"}
    source = str(shared_data / "cifar10")
    result = api.probe(model, source, train_limit=300, test_limit=200, out=str(tmp_path / "out"), **how)
    figures = checked(result, tmp_path / "out", "probe")
    counted(result, 300, 200)
    assert figures["selected_on"] == "300 training images, held out in 5 turns" and len(figures["table"]) == 2
    confusion = np.array(figures["confusion"])
    assert confusion.shape == (10, 10) and confusion.sum(1).tolist() == [20] * 10
    assert figures["top1"] == pytest.approx(confusion.trace() / 200) and list(figures["per_class"]) == CLASSES
    assert figures["top1_interval"][0] > 0.1, figures


def test_fewshot(model: str, shared_data: Path, tmp_path: Path) -> None:
    source = str(shared_data / "cifar10")
    result = api.fewshot(model, source, shots="1,5", seeds=2, test_limit=200, out=str(tmp_path / "out"))
    figures = checked(result, tmp_path / "out", "fewshot")
    counted(result, 100, 200)  # five of ten classes in two draws
    assert [row["shots"] for row in figures["table"]] == [1, 5] and len(figures["top1_by_seed"]) == 2
    assert figures["top1"] > 0.13


def test_zeroshot(model: str, shared_data: Path, tmp_path: Path) -> None:
    source = str(shared_data / "cifar10")
    result = api.zeroshot(model, source, templates="a photo of a {}", limit=50, out=str(tmp_path / "out"))
    figures = checked(result, tmp_path / "out", "zeroshot")
    counted(result, None, 50)
    assert [row["class"] for row in figures["per_class"]] == CLASSES and figures["chance"] == 0.1
    assert result["protocol"]["name"] == "zero-shot, likelihood" and 0 <= figures["top1"] <= figures["top5"] <= 1


# ---- photographs with captions ----


def test_caption(model: str, shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    source, out = str(shared_data / "flickr8k-1k"), tmp_path / "out"
    result = api.caption(model, [], data=source, score=True, limit=16, max_tokens=8, baselines="random", out=str(out))
    figures = checked(result, out, "caption")
    assert (result["data"]["test_images"], result["data"]["references"]) == (16, 80) and figures["captions"]
    assert {"cider", "bleu4", "exact_match"} <= figures["baselines"]["random"].keys()
    assert figures["exact_match"] == 0 and 0 <= figures["bleu4"] <= figures["bleu1"] < 1


def test_retrieve(model: str, shared_data: Path, tmp_path: Path) -> None:
    source, out = str(shared_data / "flickr8k-1k"), tmp_path / "out"
    result = api.retrieve(model, source, candidates=16, k="1,5", normalize="sum", out=str(out))
    ways = checked(result, out, "retrieve")
    assert (ways["text_to_image"]["queries"], ways["text_to_image"]["among"]) == (80, 16), "five captions each"
    assert (ways["image_to_text"]["queries"], ways["image_to_text"]["among"]) == (16, 80)
    assert ways["text_to_image"]["R@1_chance"] == pytest.approx(1 / 16)
    assert result["data"]["images"] == 1000 and ways["text_to_image"]["R@1"] <= ways["text_to_image"]["R@5"]


# ---- maps made of the photographs ----


def with_maps(source: Path, root: Path, kind: str) -> list[np.ndarray]:
    """32 and 12 photographs with a map of their brightness: over its mean or not (masks), or 1 to 5 m (depth).

    Returns:
        The test maps.
    """
    held = []
    for number, file in enumerate(sorted((source / "images").iterdir())[:44]):
        split = "train" if number < 32 else "val"
        for part in ("images", kind):
            (root / part / split).mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            light = np.asarray(image.convert("L").resize((64, 64)), np.float32) / 255
            image.convert("RGB").resize((64, 64)).save(root / "images" / split / f"{file.stem}.png")
        made = (light > 0.5).astype(np.uint8) if kind == "masks" else (1000 + 4000 * light).astype(np.uint16)
        Image.fromarray(made).save(root / kind / split / f"{file.stem}.png")
        held += [made] if split == "val" else []
    return held


def test_segment(model: str, shared_data: Path, tmp_path: Path) -> None:
    """Above the mean IoU of answering the commoner class everywhere."""
    held = np.stack(with_maps(shared_data / "flickr8k-1k", tmp_path / "data", "masks"))
    out = tmp_path / "out"
    result = api.segment(model, str(tmp_path / "data"), rates="1e-2,1e-1", epochs=10, batch_size=8, out=str(out))
    figures = checked(result, out, "segment")
    assert (result["data"]["train_images"], result["data"]["test_images"]) == (32, 12)
    share = held.mean()
    assert 0.2 < share < 0.8, "both classes are there"
    assert figures["miou"] > max(share, 1 - share) / 2 + 0.1, figures


def test_depth(model: str, shared_data: Path, tmp_path: Path) -> None:
    """Below the error of answering the mean everywhere."""
    held = np.stack(with_maps(shared_data / "flickr8k-1k", tmp_path / "data", "depth")) / 1000
    out = tmp_path / "out"
    result = api.depth(model, str(tmp_path / "data"), rates="1e-2,1e-1", epochs=10, batch_size=8, out=str(out))
    figures = checked(result, out, "depth")
    assert result["data"]["test_images"] == 12
    assert figures["rmse"] < 0.9 * held.std(), (figures, held.std())
