"""The decoder alone learns at first; then both, the encoder by layers: same on two ranks, compiled, and after a stop."""

from pathlib import Path
from typing import Any

import pytest
import torch

from aimv2.config.schema import OptimConfig
from aimv2.models.create import create_model
from aimv2.train.compiling import can_compile
from aimv2.train.optim import make_optimizer, release_encoder
from runs import exact, options, resume, torchrun, train
from world import TinyWorld

HELD = {"optim__freeze_encoder": 3, "train__save_every": 1, "train__keep": 0, "eval__captions": 0}


@pytest.fixture(scope="module")
def data(world: TinyWorld) -> Path:
    return world.scenes


@pytest.fixture(scope="module")
def held(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps; in the first three the decoder alone learns."""
    run = tmp_path_factory.mktemp("held") / "run"
    train(data, run, **HELD)
    return run


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "checkpoints" / f"step-{step:07d}" / "model" / "model.safetensors")


def moved(run: Path, start: int, end: int) -> dict[str, bool]:
    one, two = weights(run, start), weights(run, end)
    return {key: not torch.equal(one[key], two[key]) for key in one}


def test_the_encoder_stands_still_and_then_learns(held: Path) -> None:
    before, after = moved(held, 1, 3), moved(held, 3, 4)
    assert {key for key, changed in before.items() if changed} == {key for key in before if key.startswith("decoder.")}
    assert all(after.values())


def test_the_first_free_step_is_adams_first(held: Path) -> None:
    """By the rate of the step, in the direction of the gradient: no average over steps that had none."""
    from aimv2.train.schedule import learning_rate

    rate = learning_rate(3, 6, OptimConfig(lr=2e-3, warmup=2))
    key = "encoder.patch_embed.norm.weight"  # not decayed
    step = (weights(held, 4)[key] - weights(held, 3)[key]).abs()
    torch.testing.assert_close(step, torch.full_like(step, rate), rtol=0.05, atol=0)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_resume_is_exact_across_the_end_of_it(data: Path, held: Path, tmp_path: Path, stop: int) -> None:
    train(data, tmp_path / "parts", **HELD, train__stop_at=stop)
    resume(tmp_path / "parts")
    assert exact(tmp_path / "parts") == exact(held)
    assert all(torch.equal(value, weights(held, 6)[key]) for key, value in weights(tmp_path / "parts", 6).items())


def test_moments_that_came_along_end_with_the_freeze() -> None:
    """A cooldown takes moments from a run; those of a frozen encoder would be read as of its first step."""
    options: dict[str, Any] = {"width": 16, "heads": 2, "hidden": 24, "depth": 1, "decoder_width": 16}
    options |= {"decoder_heads": 2, "decoder_hidden": 24, "decoder_depth": 1, "decoder_vocab_size": 9}
    model = create_model("aimv2-tiny-patch8-32", decoder=True, seed=0, **options)
    optimizer = make_optimizer(model, OptimConfig(freeze_encoder=2))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    release_encoder(optimizer)
    for name, parameter in model.named_parameters():
        found = {key: bool(value.any()) for key, value in optimizer.state[parameter].items()}
        assert found == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), name.startswith("decoder.")), name


def near(one: Path, other: Path) -> bool:
    pairs = list(zip(exact(one), exact(other), strict=True))
    return all(right[key] == pytest.approx(left[key], rel=1e-3) for left, right in pairs for key in left)


def test_compiled(data: Path, held: Path, tmp_path: Path) -> None:
    if (reason := can_compile(torch.device("cpu"))) is not None:
        pytest.skip(f"torch.compile does not work here: {reason}")
    train(data, tmp_path / "run", **HELD, train__compile="on")
    assert near(held, tmp_path / "run")
    assert not any(changed for key, changed in moved(tmp_path / "run", 1, 3).items() if key.startswith("encoder."))


def test_two_ranks(data: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {**HELD, "optim__layer_decay": 0.5, "train__ema": 0.5}
    train(data, tmp_path / "one", data__workers=2, **more)
    for name, stop in (("two", 6), ("parts", 2)):
        ended = torchrun(2, *options(data, tmp_path / name, data__workers=1, **more, train__stop_at=stop))
        assert ended.returncode == 0, ended.stderr
    ended = torchrun(2, "pretrain", "--run", str(tmp_path / "parts"), "--resume")
    assert ended.returncode == 0, ended.stderr
    assert near(tmp_path / "one", tmp_path / "two")
    assert exact(tmp_path / "parts") == exact(tmp_path / "two")
    assert not any(changed for key, changed in moved(tmp_path / "two", 1, 3).items() if key.startswith("encoder."))


@pytest.mark.parametrize("freeze", [0, 5])
def test_groups_by_layer_partition_the_whole_model(freeze: int) -> None:
    options: dict[str, Any] = {"width": 16, "heads": 2, "hidden": 24, "depth": 2, "decoder_width": 16}
    options |= {"decoder_heads": 2, "decoder_hidden": 24, "decoder_depth": 1, "decoder_vocab_size": 9}
    model = create_model("aimv2-tiny-patch8-32", decoder=True, seed=0, **options)
    optimizer = make_optimizer(model, OptimConfig(layer_decay=0.5, freeze_encoder=freeze, weight_decay=1e-4))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert set(groups) == {id(p) for p in named.values()}
    scale = {name: groups[id(p)]["scale"] for name, p in named.items()}
    assert scale["encoder.patch_embed.proj.weight"] == 0.5**3
    assert scale["encoder.blocks.0.attn.qkv.weight"] == 0.25 and scale["encoder.blocks.1.norm2.weight"] == 0.5
    assert {value for name, value in scale.items() if name.startswith(("decoder.", "encoder.norm"))} == {1.0}
    for name, p in named.items():
        decayed = name.endswith(("weight",)) and "norm" not in name
        assert (groups[id(p)]["weight_decay"] > 0) == decayed, name
        assert groups[id(p)].get("encoder", False) == (bool(freeze) and name.startswith("encoder."))
