"""A model folder gives back every bit, names what does not fit, and never runs what it reads."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from aimv2 import load_model as load_by_name
from aimv2.errors import UsageError
from aimv2.interop.load import load_model
from aimv2.interop.model_folder import _read_config, checkpoints, find_model, save_model, write_model
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import MODELS


def tiny(decoder: bool = True, seed: int = 0, **more: object) -> nn.Module:
    options: dict = {"image_size": 16, "width": 16, "heads": 2, "hidden": 24, "depth": 2}
    options |= {"decoder_width": 24, "decoder_heads": 2, "decoder_hidden": 32, "decoder_depth": 1}
    return create_model("aimv2-tiny-patch4-32", decoder, seed, **options, decoder_vocab_size=9, **more)


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    one, two = left.state_dict(), right.state_dict()
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]), key


def test_whole_model_bit_for_bit(tmp_path: Path) -> None:
    model = tiny(decoder_separate=True, mean=(0.5, 0.4, 0.3))
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m", decoder=True)
    assert isinstance(loaded, AIMv2) and not loaded.training
    assert_equal(model, loaded)
    assert loaded.decoder.config == model.decoder.config and loaded.encoder.config == model.encoder.config
    encoder = load_model(tmp_path / "m")
    assert isinstance(encoder, VisionEncoder)
    assert_equal(model.encoder, encoder)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(model.encoder(images), encoder(images))


def test_encoder_alone(tmp_path: Path) -> None:
    model = tiny(decoder=False)
    save_model(model, tmp_path / "m")
    assert_equal(model, load_by_name(tmp_path / "m"))
    with pytest.raises(UsageError, match="without a decoder"):
        load_model(tmp_path / "m", decoder=True)


def test_files_are_json_and_safetensors(tmp_path: Path) -> None:
    model = tiny()
    write_model(tmp_path / "m", model.config_dict(), model.state_dict(), card="# a card\n")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["format"] == "aimv2" and config["encoder"]["width"] == 16 and config["decoder"]["depth"] == 1
    assert load_file(tmp_path / "m" / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_of_the_weights_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m", dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    for key, value in model.encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.to(dtype))
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(loaded.normalize(pixels), model.encoder.normalize(pixels))
    assert loaded(pixels).dtype == dtype


def test_without_a_dtype_weights_come_as_stored(tmp_path: Path) -> None:
    model = tiny().to(torch.bfloat16)
    save_model(model, tmp_path / "m")
    assert_equal(model, load_model(tmp_path / "m", decoder=True))
    assert_equal(model.encoder, load_model(tmp_path / "m"))


@pytest.mark.parametrize("name", MODELS)
def test_every_config_survives_json(tmp_path: Path, name: str) -> None:
    encoder, decoder = MODELS[name]
    with torch.device("meta"):
        model = AIMv2(encoder, decoder)
    write_model(tmp_path, model.config_dict(), {})
    assert _read_config(tmp_path) == (None, encoder, decoder)


def run_folder(folder: Path, steps: list[int]) -> Path:
    for step in steps:
        save_model(tiny(seed=step), folder / "checkpoints" / f"step-{step:07d}" / "model")
    return folder


def test_run_and_run_at_step(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", [5, 20, 100])
    unfinished = run / "checkpoints" / "step-0000200" / "model"
    unfinished.mkdir(parents=True)
    shutil.copytree(run / "checkpoints" / "step-0000005", run / "checkpoints" / ".aside-step-0000300")
    assert [step for step, _ in checkpoints(run)] == [5, 20, 100]
    assert_equal(load_model(run, decoder=True), tiny(seed=100))
    assert_equal(load_model(f"{run}@20", decoder=True), tiny(seed=20))
    assert find_model(run / "checkpoints" / "step-0000005") == run / "checkpoints" / "step-0000005" / "model"
    with pytest.raises(UsageError, match=r"no checkpoint of step 7 .*there: 5, 20, 100"):
        load_model(f"{run}@7")


def test_a_long_run_is_ordered_by_number(tmp_path: Path) -> None:
    for step in (9_999_999, 10_000_000):
        save_model(tiny(decoder=False), tmp_path / "checkpoints" / f"step-{step:07d}" / "model")
    assert find_model(tmp_path).parent.name == "step-10000000"


def test_an_at_sign_in_a_folder_name(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "mine@3")
    assert find_model(tmp_path / "mine@3") == tmp_path / "mine@3"


def one_line(error: UsageError) -> str:
    text = str(error)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [("missing", "'encoder.norm.weight' is missing"), ("misshaped", "'encoder.norm.weight' has shape [17], expected [16]"),
     ("extra", "'encoder.extra' is not part of the model")],
)  # fmt: skip
def test_a_key_that_does_not_fit_is_named(tmp_path: Path, change: str, words: str, decoder: bool) -> None:
    save_model(tiny(), tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    if change == "missing":
        del state["encoder.norm.weight"]
    elif change == "misshaped":
        state["encoder.norm.weight"] = torch.ones(17)
    else:
        state["encoder.extra"] = torch.ones(1)
    save_file(state, file)
    with pytest.raises(UsageError) as error:
        load_model(tmp_path, decoder=decoder)
    assert words in one_line(error.value)


def test_what_belongs_to_nothing_is_an_extra_key(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"stray": torch.ones(1)}, tmp_path / "model.safetensors")
    for decoder in (True, False):
        with pytest.raises(UsageError, match="'stray'"):
            load_model(tmp_path, decoder=decoder)


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "model.pt"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_planted_pickle_is_refused_and_never_run(tmp_path: Path, name: str, form: str) -> None:
    sprung, folder = tmp_path / "sprung", tmp_path / "m"
    save_model(tiny(), folder)
    if name in ("pytorch_model.bin", "model.pt"):
        (folder / "model.safetensors").unlink()
    planted = folder / name
    if form == "pickle":
        planted.write_bytes(pickle.dumps(Trap(sprung)))
        pickle.loads(planted.read_bytes())  # the trap works
    else:
        torch.save({"encoder.norm.weight": Trap(sprung)}, planted)
        shutil.copy(planted, tmp_path / "copy.pt")
        torch.load(tmp_path / "copy.pt", weights_only=False)
    sprung.rmdir()
    for source in (folder, planted):
        for decoder in (True, False):
            with pytest.raises(UsageError) as error:
                load_model(source, decoder=decoder)
            one_line(error.value)
    assert not sprung.exists()


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'aimv2-large-patch14-224'"):
        load_model("aimv2-larg-patch14-224")
    with pytest.raises(UsageError, match=r"MODEL .*nothing.*no such file, folder, run or released name"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"config.json and model.safetensors"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="no complete checkpoint"):
        load_model(tmp_path)
    with pytest.raises(UsageError, match="revision main"):
        load_by_name(str(tmp_path), revision="main")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "config.json"),
        ("[1]", "config.json"),
        ('{"format": "other"}', "'aimv2' expected, got 'other'"),
        ('{"format": "aimv2"}', "encoder"),
        ('{"format": "aimv2", "encoder": {"widht": 3}}', "widht"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    save_model(tiny(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError) as error:
        load_model(tmp_path)
    assert words in one_line(error.value)
