"""Low-rank updates: base weights stand still, the saved model is plain and computes the same, and a stop changes nothing."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import aimv2
from aimv2 import api
from aimv2.errors import UsageError
from aimv2.models.create import create_model
from aimv2.models.encoder import VisionEncoder
from aimv2.models.lora import add_lora, merge_lora
from aimv2.train.compiling import can_compile
from runs import exact, options, resume, torchrun, train
from world import TinyWorld

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def data(world: TinyWorld) -> Path:
    return world.scenes


@pytest.fixture(scope="module")
def more(world: TinyWorld) -> dict[str, Any]:
    """Options of a run that updates a model of six steps."""
    return {"init": str(world.run), "optim__lora": 3, "eval__captions": 0, "seed": 2, "train__save_every": 3}


@pytest.fixture(scope="module")
def tuned(data: Path, more: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tuned") / "run"
    train(data, run, **more)
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-0000006" / "model" / "model.safetensors")


def adapted(rank: int = 4) -> VisionEncoder:
    """A small encoder with updates that are not zero."""
    encoder = create_model("aimv2-tiny-patch8-32", seed=0, width=32, heads=2, hidden=48, depth=2)
    assert isinstance(encoder, VisionEncoder)
    add_lora(encoder, rank, seed=1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    return encoder


def test_merged_weights_compute_what_the_adapted_model_does() -> None:
    encoder = adapted()
    plain = create_model("aimv2-tiny-patch8-32", width=32, heads=2, hidden=48, depth=2)
    before = create_model("aimv2-tiny-patch8-32", seed=0, width=32, heads=2, hidden=48, depth=2)
    plain.load_state_dict(merge_lora(encoder.state_dict()))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(images), encoder(images), rtol=1e-5, atol=1e-5)
        assert (plain(images) - before(images)).abs().max() > 0.1


def test_a_bias_keeps_its_name_and_named_layers_are_updated() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_lora(model, 2, seed=1, targets=["2"])
    merged = merge_lora(model.state_dict())
    assert merged.keys() == before.keys()
    assert all(torch.equal(merged[name], value) for name, value in before.items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"2.lora_{side}.default.weight" for side in "AB"
    }


def test_every_product_of_the_blocks_is_updated_and_nothing_else_learns() -> None:
    learns = {name for name, p in adapted(rank=4).named_parameters() if p.requires_grad}
    products = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.gate_up", "mlp.down")]
    assert learns == {f"{name}.lora_{side}.default.weight" for name in products for side in "AB"}
    again = adapted(rank=4).state_dict()
    assert all(torch.equal(again[name], value) for name, value in adapted(4).state_dict().items() if "lora_A" in name)


def test_a_run_moves_the_encoder_by_a_low_rank(tuned: Path, more: dict[str, Any]) -> None:
    before, after = weights(Path(more["init"])), weights(tuned)
    assert before.keys() == after.keys(), "plain names, as any model"
    for key, value in before.items():
        change = after[key] - value
        if key.startswith("decoder."):
            assert change.any(), key
        elif key.endswith(("qkv.weight", "attn.proj.weight", "gate_up.weight", "down.weight")):
            assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) == 3, key
        else:
            assert not change.any(), key
    aimv2.load_model(tuned)
    assert "low-rank updates, rank 3" in (tuned / "checkpoints/step-0000006/model/README.md").read_text()


def test_it_starts_where_init_is(data: Path, more: dict[str, Any], tmp_path: Path) -> None:
    still = {"optim__lr": 1e-12, "optim__start_lr": 0.0, "optim__weight_decay": 0.0, "train__steps": 1}
    train(data, tmp_path / "run", **more | still)
    start, end = exact(tmp_path / "run")[-1], exact(Path(more["init"]))[-1]
    assert start["val_text_loss"] == pytest.approx(end["val_text_loss"], rel=1e-5)


def test_what_comes_next_has_the_merged_weights(
    data: Path, more: dict[str, Any], tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--init of such a run gives a plain model, with or without new updates; a cooldown makes new ones."""
    still = {"optim__lr": 1e-12, "optim__start_lr": 0.0, "optim__weight_decay": 0.0, "train__steps": 1}
    end = exact(tuned)[-1]
    for rank in (0, 2):
        run = tmp_path / f"rank{rank}"
        train(data, run, **more | still | {"init": str(tuned), "optim__lora": rank})
        assert exact(run)[-1]["val_text_loss"] == pytest.approx(end["val_text_loss"], rel=1e-5)
    api.pretrain(None, str(tmp_path / "cooled"), {"init": str(tuned), "optim.schedule": "cooldown"})
    assert "moments start anew (optim.lora makes new updates)" in capsys.readouterr().err


def test_resume_is_exact(data: Path, more: dict[str, Any], tuned: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "parts", **more, train__stop_at=3)
    resume(tmp_path / "parts")
    assert exact(tmp_path / "parts") == exact(tuned)
    assert all(torch.equal(value, weights(tuned)[key]) for key, value in weights(tmp_path / "parts").items())


def near(one: Path, other: Path) -> bool:
    pairs = list(zip(exact(one), exact(other), strict=True))
    return all(right[key] == pytest.approx(left[key], rel=1e-3) for left, right in pairs for key in left)


def test_compiled(data: Path, more: dict[str, Any], tuned: Path, tmp_path: Path) -> None:
    if (reason := can_compile(torch.device("cpu"))) is not None:
        pytest.skip(f"torch.compile does not work here: {reason}")
    train(data, tmp_path / "run", **more, train__compile="on")
    assert near(tuned, tmp_path / "run")


def test_two_ranks_with_everything_else_on(data: Path, more: dict[str, Any], tmp_path: Path) -> None:
    more = {
        **more,
        "optim__freeze_encoder": 2,
        "optim__layer_decay": 0.7,
        "train__ema": 0.5,
        "train__checkpointing": True,
    }
    train(data, tmp_path / "one", data__workers=2, **more)
    ended = torchrun(2, *options(data, tmp_path / "two", data__workers=1, **more))
    assert ended.returncode == 0, ended.stderr
    assert near(tmp_path / "one", tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)


def test_wrong_use(data: Path, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changed, said in (
        ({"init": None}, r"optim\.lora.*--init MODEL says which"),
        ({"optim__lora": -1}, r"optim\.lora must be 0 to 4096, got -1"),
        ({"objective__name": "probe"}, r"optim\.lora is for an encoder under a decoder, got objective\.name=probe"),
    ):
        with pytest.raises(UsageError, match=said):
            train(data, tmp_path / "run", **more | changed)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    with pytest.raises(UsageError, match=r"optim\.lora needs the package peft: pip install 'aimv2\[peft\]'"):
        train(data, tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()
