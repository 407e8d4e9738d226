"""A run starts from another model: encoder, decoder, tokeniser, shape, positions; what does not fit is one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import aimv2
from aimv2.config.schema import Config
from aimv2.data.text.tokenizer import load_tokenizer, train_tokenizer
from aimv2.errors import UsageError
from aimv2.interop.convert import convert
from aimv2.interop.model_folder import save_model
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import build
from aimv2.models.encoder import VisionEncoder
from aimv2.models.init import init_weights
from aimv2.models.lit import LiT, LiTConfig, TextConfig
from aimv2.models.positions import resize_positions
from aimv2.models.sizes import EncoderConfig
from aimv2.tasks.init_weights import fill_from
from runs import TINY, exact, resume, train
from world import TinyWorld

SHAPE = EncoderConfig("aimv2-tiny-patch8-32", 32, 2, 2, 64, 8, 32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
FREE: dict[str, Any] = {f"model__{key.removeprefix('model.')}": None for key in TINY if key.startswith("model.")}
FREE["model__name"] = "auto"


@pytest.fixture(scope="module")
def data(world: TinyWorld) -> Path:
    return world.scenes


@pytest.fixture(scope="module")
def origin(world: TinyWorld) -> Path:
    """A finished run."""
    return world.run


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder alone in the released layout, with a mean and a deviation of its own."""
    folder = tmp_path_factory.mktemp("released") / "m"
    convert(build(SHAPE, None, seed=7), folder, "released")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": SHAPE.mean, "image_std": SHAPE.std}))
    return folder


def whole(run: Path) -> AIMv2:
    model = aimv2.load_model(run, decoder=True)
    assert isinstance(model, AIMv2)
    return model


def start(data: Path, run: Path, init: Path | str, **more: Any) -> AIMv2:
    """The model of a run of one step whose rate is next to nothing: the weights that the run started from."""
    more = {"optim__lr": 1e-12, "optim__start_lr": 0.0, "optim__weight_decay": 0.0, "train__steps": 1, **more}
    train(data, run, init=str(init), **{"eval__captions": 0, **more})
    return whole(run)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


def test_a_run_of_ours_gives_encoder_decoder_shape_and_tokenizer(
    data: Path, origin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    model = start(data, run, origin, **FREE, data__vocab_size=280)
    kept = whole(origin).decoder.config.vocab_size
    said = f"data.vocab_size 280 is not used: the decoder of init keeps its own {kept} tokens"
    assert capsys.readouterr().err.count(said) == 1
    assert close(model.state_dict(), whole(origin).state_dict())
    (folder,) = (origin / "checkpoints").iterdir()
    assert load_tokenizer(run / "tokenizer").fingerprint() == load_tokenizer(folder / "model").fingerprint()
    assert model.config_dict() == whole(origin).config_dict()


def test_loss_goes_on_where_it_was(data: Path, origin: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", init=str(origin), optim__lr=1e-12, optim__start_lr=0.0, train__steps=1, seed=5)
    end, first = exact(origin)[-1], exact(tmp_path / "run")[-1]
    for key in ("val_text_loss", "val_pixel_loss"):
        assert first[key] == pytest.approx(end[key], rel=1e-4)


def encoder_folders(folder: Path) -> dict[str, Path]:
    """The encoder of SHAPE as people have it."""
    encoder = build(SHAPE, None, seed=7)
    assert isinstance(encoder, VisionEncoder)
    found = {}
    for layout in ("released", "transformers", "timm"):
        convert(encoder, folder / layout, layout)
        found[layout] = folder / layout
    save_model(encoder, folder / "ours")
    pair = LiT(LiTConfig(replace(SHAPE, pool_heads=2), TextConfig(16, 1, 2, 32, 50, 8, 49), 16))
    init_weights(pair, 1)
    pair.image.load_state_dict(encoder.state_dict(), strict=False)
    save_model(pair, folder / "pair")
    return {**found, "ours": folder / "ours", "pair": folder / "pair"}


@pytest.mark.parametrize("layout", ["released", "transformers", "timm", "ours", "pair"])
def test_an_encoder_alone_gets_a_new_decoder(data: Path, tmp_path: Path, layout: str) -> None:
    source = encoder_folders(tmp_path)[layout]
    model = start(data, tmp_path / "run", source)
    expected = build(SHAPE, None, seed=7).state_dict()
    assert close(model.encoder.state_dict(), expected)
    assert model.decoder.config.vocab_size > 256


def test_a_fresh_decoder_leaves_the_old_one_and_its_tokenizer(data: Path, origin: Path, tmp_path: Path) -> None:
    model = start(data, tmp_path / "run", origin, optim__fresh_decoder=True, data__vocab_size=270, seed=9)
    assert close(model.encoder.state_dict(), whole(origin).encoder.state_dict())
    assert model.decoder.config.vocab_size == 270
    assert not torch.allclose(model.decoder.project.weight, whole(origin).decoder.project.weight, atol=1e-3)


@pytest.mark.parametrize("size", [16, 48])
def test_positions_follow_the_image_size(data: Path, origin: Path, tmp_path: Path, size: int) -> None:
    model = start(data, tmp_path / "run", origin, model__image_size=size)
    before = whole(origin)
    expected = resize_positions(before.encoder.patch_embed.position, (size // 8, size // 8))
    assert torch.allclose(model.encoder.patch_embed.position, expected, atol=1e-6)
    assert model.encoder.config.image_size == size
    assert close(model.decoder.state_dict(), before.decoder.state_dict())
    # what it is worth: features of an image of one colour, seen at another size, stay near
    flat = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8), torch.full((1, 3, size, size), 90, dtype=torch.uint8)
    one, two = before.encoder(flat[0]).mean(1), model.encoder(flat[1]).mean(1)
    assert torch.cosine_similarity(one, two) > 0.9


def test_auto_takes_the_shape_of_init_and_an_image_size_beside_it(data: Path, released: Path, tmp_path: Path) -> None:
    decoder = {key: TINY[key.replace("__", ".")] for key in FREE if "decoder" in key}
    model = start(data, tmp_path / "run", released, **(FREE | decoder | {"model__image_size": 48}))
    shape = model.encoder.config
    assert (shape.width, shape.depth, shape.heads, shape.hidden, shape.patch_size) == (32, 2, 2, 64, 8)
    assert shape.image_size == 48 and model.decoder.config.width == 32
    stored = (tmp_path / "run" / "config.yaml").read_text()
    assert "name: auto" not in stored and "width: 32" in stored


def test_mean_and_deviation_are_the_models_own_and_outlive_a_resume(data: Path, released: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "whole", init=str(released))
    train(data, tmp_path / "parts", init=str(released), train__stop_at=3)
    moved = released.rename(released.with_name("gone"))
    try:
        resume(tmp_path / "parts")
    finally:
        moved.rename(released)
    shape = whole(tmp_path / "parts").encoder.config
    assert shape.mean == pytest.approx(SHAPE.mean) and shape.std == pytest.approx(SHAPE.std)
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")


def test_a_run_that_stopped_before_its_first_checkpoint_starts_from_init_again(data, origin, tmp_path) -> None:
    import shutil

    train(data, tmp_path / "whole", init=str(origin), seed=4)
    train(data, tmp_path / "parts", init=str(origin), seed=4, train__stop_at=2)
    shutil.rmtree(tmp_path / "parts" / "checkpoints")
    resume(tmp_path / "parts")
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")


def test_learned_positions_give_way_to_sine_cosine_ones(origin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, config = whole(origin), Config()
    native = build(replace(before.encoder.config, image_size=None), before.decoder.config, seed=3)
    assert isinstance(native, AIMv2)
    (folder,) = (origin / "checkpoints").iterdir()
    fill_from(native, str(origin), load_tokenizer(folder / "model"), config)
    expected = before.state_dict()
    del expected["encoder.patch_embed.position"]
    assert close(native.state_dict(), expected)
    assert capsys.readouterr().err.count("learned positions are left out") == 1


def test_wrong_use(data: Path, origin: Path, released: Path, tmp_path: Path) -> None:
    train_tokenizer(["a red circle", "a blue square"] * 3, 280).save(tmp_path / "bpe")
    train_tokenizer([f"word{i} of another text" for i in range(999)], 300).save(tmp_path / "other")
    native = replace(SHAPE, image_size=None, name="native")
    save_model(build(native, None, seed=0), tmp_path / "native")
    for init, more, said in (
        (released, {"model__width": 64}, r"has width 32, model\.width is 64"),
        (released, {"model__patch_size": 16}, r"has patch_size 8, model\.patch_size is 16"),
        (released, {"model__depth": 3}, r"has depth 2, model\.depth is 3"),
        (released, {"model__hidden": 48}, r"has hidden 64, model\.hidden is 48"),
        (tmp_path / "native", {}, r"native model.*model\.image_size 32"),
        (origin, {"model__decoder_depth": 1}, r"has depth 2, model\.decoder_depth is 1.*optim\.fresh_decoder"),
        (origin, {"data__tokenizer": str(tmp_path / "bpe")}, r"300 tokens.*one of 2\d\d.*data\.tokenizer=.*fresh"),
        (origin, {"data__tokenizer": str(tmp_path / "other")}, r"300 tokens, .*other is another one of 300"),
        (origin, {"data__max_tokens": 20}, r"77 caption positions, data\.max_tokens is 20"),
        (origin, {"objective__targets": "image"}, r"has the text head.*targets=image"),
        (origin, {"objective__targets": "text"}, r"has the pixel head.*opposite"),
        (None, {"optim__fresh_decoder": True}, r"optim\.fresh_decoder.*--init"),
        (origin, {"objective__name": "probe", "optim__freeze_encoder": 2}, r"optim\.freeze_encoder.*objective\.freeze"),
        (tmp_path / "none", {}, "no such file, folder, run or released name"),
        (f"{origin}@99", {}, r"no checkpoint of step 99.*there: 6"),
    ):
        with pytest.raises(UsageError, match=said):
            train(data, tmp_path / "run", init=init and str(init), **more)
    assert not (tmp_path / "run").exists()
