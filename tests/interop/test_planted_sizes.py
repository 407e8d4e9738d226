"""Sizes of a configuration that its weights do not have, and weights that are no numbers: one line before anything is built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from aimv2.errors import UsageError
from aimv2.features.foreign import open_transformers
from aimv2.interop.load import encoder_shape, load_model
from aimv2.interop.model_folder import save_model
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import EncoderConfig
from aimv2.tasks.init_weights import origin_of


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    save_model(VisionEncoder(EncoderConfig("tiny", 16, 2, 2, 32, 4, 8)), folder)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def changed(folder: Path, to: Path, key: str, value: Any) -> Path:
    def put(stored: dict[str, Any]) -> dict[str, Any]:
        return {k: put(v) if isinstance(v, dict) else value if k == key else v for k, v in stored.items()}

    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    about = json.loads((to / "config.json").read_text())
    assert key in json.dumps(about)
    (to / "config.json").write_text(json.dumps(put(about)))
    return to


@pytest.mark.parametrize("key", ["depth", "width", "hidden", "patch_size", "image_size"])
@pytest.mark.parametrize("value", [200_000, 10**9, 2**70])
def test_sizes_that_the_weights_lack_are_refused_before_building(
    tmp_path: Path, ours: Path, key: str, value: int
) -> None:
    folder = changed(ours, tmp_path, key, value)
    for read in (load_model, encoder_shape, origin_of):
        if value > 1_000_000 or key == "depth" or read is load_model:
            with pytest.raises(UsageError):
                read(str(folder))


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size"])
def test_sizes_of_a_model_of_transformers(tmp_path: Path, theirs: Path, key: str) -> None:
    with pytest.raises(UsageError) as error:
        open_transformers("X", changed(theirs, tmp_path, key, 10**9), "cpu")
    assert error.value.code == "mismatch"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(
    tmp_path: Path, ours: Path, theirs: Path, value: float
) -> None:
    for folder, read in ((ours, load_model), (theirs, lambda folder: open_transformers("X", Path(folder), "cpu"))):
        to = tmp_path / folder.name
        to.mkdir()
        changed(folder, to, "patch_size", 4)
        state = load_file(to / "model.safetensors")
        name = next(key for key in state if key.endswith(("mlp.down.weight", "mlp.fc1.weight")))
        state[name].view(-1)[3] = value
        save_file(state, to / "model.safetensors", {"format": "pt"})
        with pytest.raises(UsageError) as error:
            read(str(to))
        assert error.value.code == "non-finite"
        assert name.removeprefix("vision_model.") in str(error.value)


def test_large_finite_weights_are_taken(tmp_path: Path, ours: Path) -> None:
    folder = changed(ours, tmp_path, "patch_size", 4)
    state = load_file(folder / "model.safetensors")
    name = next(key for key in state if key.endswith("mlp.down.weight"))
    state[name].fill_(3e38)  # their sum is infinite
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert all(torch.isfinite(value).all() for value in load_model(str(folder)).state_dict().values())
