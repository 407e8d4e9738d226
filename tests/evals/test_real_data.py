"""Every measuring verb on real data: CIFAR-10 and captioned photographs, a small untrained model, a few hundred images."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2 import api
from aimv2.data.captioned import open_captioned, read_captioned
from aimv2.data.images import decode_image
from aimv2.data.text import train_tokenizer
from aimv2.evals.weights import weights_hash
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
    assert stored["model"]["unchanged"] is True
    assert {"protocol", "data", "figures", "seconds", "version", "command"} <= stored.keys()
    return stored["figures"]


# ---- CIFAR-10 ----


def classified(result: dict[str, Any]) -> None:
    data = result["data"]
    assert (data["dataset"], data["classes"], data["split"]) == ("cifar10", 10, "test")
    assert data["test_images"] == 200


def test_knn(model: str, shared_data: Path, cache: str, tmp_path: Path) -> None:
    source = str(shared_data / "cifar10")
    result = api.knn(model, source, baselines="pixels", k="1,20", cache=cache, out=str(tmp_path), **FEW)
    figures = checked(result, tmp_path, "knn")
    assert result["data"]["train_images"] == 500
