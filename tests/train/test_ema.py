"""The moving average is the formula's; it is what is saved and validated, and it outlives a stop and a split over ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.models.create import create_model
from aimv2.train.ema import Ema
from runs import exact, options, resume, torchrun, train
from world import TinyWorld

DECAY = 0.8
KEPT = {"train__save_every": 1, "train__keep": 0, "eval__captions": 0}


@pytest.fixture(scope="module")
def data(world: TinyWorld) -> Path:
    return world.scenes


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without an average, every step kept."""
    run = tmp_path_factory.mktemp("plain") / "run"
    train(data, run, **KEPT, eval__every=2)
    return run


@pytest.fixture(scope="module")
def averaged(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one."""
    run = tmp_path_factory.mktemp("averaged") / "run"
    train(data, run, **KEPT, eval__every=2, train__ema=DECAY)
    return run


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:07d}" / "model" / "model.safetensors")


def test_saved_weights_are_the_average_of_those_that_were_trained(plain: Path, averaged: Path) -> None:
    average = weights(averaged, 1)  # 0.8 * the first weights + 0.2 * those of step 1
    for step in range(2, 7):
        trained = weights(plain, step)
        average = {key: DECAY * average[key] + (1 - DECAY) * trained[key] for key in average}
        found = weights(averaged, step)
        for key, value in average.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found["encoder.norm.weight"], weights(plain, 6)["encoder.norm.weight"])


def lines(run: Path, key: str) -> list[dict[str, Any]]:
    return [line for line in exact(run) if key in line]


def test_training_is_untouched_and_validation_is_not(plain: Path, averaged: Path, data: Path, tmp_path: Path) -> None:
    assert lines(plain, "loss") == lines(averaged, "loss")
    one, two = lines(plain, "val_text_loss"), lines(averaged, "val_text_loss")
    assert len(one) == len(two) == 3 and all(a["val_text_loss"] != b["val_text_loss"] for a, b in zip(one, two))
    # what was validated is what was saved: a run that starts from the saved model and does not move has the same figures
    more = {"init": str(averaged), "optim__lr": 1e-12, "optim__start_lr": 0.0, "optim__weight_decay": 0.0}
    train(data, tmp_path / "run", **more, train__steps=1)
    again = lines(tmp_path / "run", "val_text_loss")[-1]
    assert again["val_text_loss"] == pytest.approx(two[-1]["val_text_loss"], rel=1e-5)
    assert again["val_pixel_loss"] == pytest.approx(two[-1]["val_pixel_loss"], rel=1e-5)


def test_the_card_says_so(plain: Path, averaged: Path) -> None:
    cards = [(run / "checkpoints/step-0000006/model/README.md").read_text() for run in (plain, averaged)]
    assert "moving average" not in cards[0] and "moving average of the trained ones, decay 0.8\n" in cards[1]


def test_resume_is_exact(data: Path, averaged: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "parts", **KEPT, eval__every=2, train__ema=DECAY, train__stop_at=3)
    resume(tmp_path / "parts")
    assert exact(tmp_path / "parts") == exact(averaged)
    one, two = weights(tmp_path / "parts", 6), weights(averaged, 6)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_two_ranks(data: Path, tmp_path: Path) -> None:
    more = {"train__ema": DECAY, "eval__every": 2, "eval__captions": 0, "train__checkpointing": True}
    train(data, tmp_path / "one", data__workers=2, **more)
    for name, stop in (("two", 6), ("parts", 3)):
        ended = torchrun(2, *options(data, tmp_path / name, data__workers=1, **more, train__stop_at=stop))
        assert ended.returncode == 0, ended.stderr
    ended = torchrun(2, "pretrain", "--run", str(tmp_path / "parts"), "--resume")
    assert ended.returncode == 0, ended.stderr
    one, two, parts = (weights(tmp_path / name, 6) for name in ("one", "two", "parts"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)
        assert torch.equal(parts[key], two[key])
    assert exact(tmp_path / "parts") == exact(tmp_path / "two")
    for left, right in zip(exact(tmp_path / "one"), exact(tmp_path / "two"), strict=True):
        assert all(right[key] == pytest.approx(left[key], rel=2e-4) for key in left)


def test_the_weights_come_back_after_use() -> None:
    model = create_model("aimv2-tiny-patch8-32", seed=0, width=16, heads=2, hidden=24, depth=1)
    ema = Ema(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError), ema.applied():
        assert all(torch.equal(p, before[name] - 1) for name, p in model.named_parameters() if "norm" in name)
        raise RuntimeError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    ema.update()
    full = ema.full(World(0, 1, torch.device("cpu")))
    torch.testing.assert_close(full, {name: value - 0.5 for name, value in before.items()})


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_wrong_use(data: Path, tmp_path: Path, decay: float) -> None:
    with pytest.raises(UsageError, match=r"train\.ema must be 0 to 0\.999999, got"):
        train(data, tmp_path / "run", train__ema=decay)
