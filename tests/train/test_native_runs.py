"""Native training over the one loop: strips of one area and packed rows, resumed, over two ranks, from a fixed model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import aimv2
from aimv2 import api
from aimv2.cli import main
from aimv2.data.stream.native import make_native_batch
from aimv2.data.stream.native import pack as pack_batches
from aimv2.data.stream.samples import TrainStream
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.models.encoder import VisionEncoder
from aimv2.train.view import make_view
from runs import TINY, exact, options, resume, torchrun, train
from world import TinyWorld

NATIVE = {
    "model__name": "aimv2-tiny-patch4-native",
    "model__min_patches": 4,
    "model__max_patches": 64,
    "data__areas": [4, 6],
    "train__patch_budget": 256,
    "train__steps": 5,
    "data__crop_scale": 0.5,
}


FIXED = {  # the same without what is for native models
    **{"model__name": "aimv2-tiny-patch4-32", "model__min_patches": None, "model__max_patches": None},
    **{"data__areas": [7, 12], "train__patch_budget": None},
}


@pytest.fixture(scope="module")
def data(world: TinyWorld) -> Path:
    return world.scenes


@pytest.mark.parametrize("way", ["strips", "packed"])
def test_resumed_native_run_has_the_losses_of_an_undisturbed_one(data: Path, tmp_path: Path, way: str) -> None:
    more = NATIVE if way == "strips" else {**NATIVE, "data__pack": 2}
    summary = train(data, tmp_path / "whole", data__workers=2, eval__every=4, **more)
    train(data, tmp_path / "parts", data__workers=2, eval__every=4, train__stop_at=3, **more)
    resume(tmp_path / "parts")
    assert len(exact(tmp_path / "whole")) == 7
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")
    assert summary["val_text_loss"] > 0 and summary["val_pixel_loss"] > 0
    model = aimv2.load_model(str(tmp_path / "whole"))
    assert isinstance(model, VisionEncoder) and model.config.image_size is None and model.config.max_patches == 64
    assert model(torch.zeros(1, 3, 16, 40, dtype=torch.uint8)).shape == (1, 40, 32)


def test_two_ranks_have_the_losses_of_one(data: Path, tmp_path: Path) -> None:
    more = {**NATIVE, "train__patch_budget": 512, "data__pack": 2, "train__accumulate": 2}
    more |= {"train__steps": 3, "eval__every": 3, "eval__captions": 0}
    train(data, tmp_path / "one", data__workers=2, **more)
    ended = torchrun(2, *options(data, tmp_path / "two", data__workers=1, **more))
    assert ended.returncode == 0, ended.stderr
    one, two = exact(tmp_path / "one"), exact(tmp_path / "two")
    assert len(one) == len(two) == 4
    for left, right in zip(one, two):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert right[key] == pytest.approx(value, rel=2e-4), key


def test_every_mini_batch_holds_its_budget(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", train__stop_at=1, **NATIVE)
    from aimv2.train.prepare import resumed_values

    config = resumed_values(tmp_path / "run", {})
    shape = aimv2.load_model(str(tmp_path / "run")).config
    view = make_view(config, shape, False, World(0, 1, torch.device("cpu")))
    stream = TrainStream(config.data, view, None, 8, 0)
    areas = []
    for _ in range(30):
        batches = next(stream)
        assert isinstance(batches, list) and len(batches) == 1
        (batch,) = batches
        assert batch.image_len is not None and batch.images.shape[2] == 4
        area = batch.images.shape[3] // 4
        assert len(batch) * area == 256 and int(batch.image_len.max()) <= area
        areas.append(area)
    stream.close()
    assert set(areas) == {16, 32, 64}


def test_the_number_of_pairs_is_nobodys_concern(data: Path, tmp_path: Path) -> None:
    """A batch size that the run never uses must fit neither data nor micro-batches; the card names the budget."""
    more = {**NATIVE, "train__patch_budget": 192, "train__accumulate": 3, "train__batch_size": 8192, "train__steps": 1}
    train(data, tmp_path / "run", **more)
    (card,) = (tmp_path / "run").glob("checkpoints/*/model/README.md")
    assert "192 patches a step" in card.read_text()
    dry = {f"{key.replace('__', '.')}": value for key, value in more.items()}
    tried = api.pretrain(None, str(tmp_path / "dry"), {**TINY, **dry, "data.train": str(data)}, dry_run=True)
    assert tried["patches_a_step"] == 192 and tried["batch_size"] is None


@pytest.mark.parametrize("pack", [0, 2])
def test_from_a_model_of_one_size_the_new_decoder_learns_first(data: Path, tmp_path: Path, pack: int) -> None:
    train(data, tmp_path / "fixed", model__name="aimv2-tiny-patch4-32", train__steps=1)
    more = {**NATIVE, "init": str(tmp_path / "fixed"), "optim__fresh_decoder": True, "optim__freeze_encoder": 2}
    train(data, tmp_path / "run", data__pack=pack, train__save_every=1, train__keep=0, **more)
    before = aimv2.load_model(str(tmp_path / "fixed")).state_dict()
    del before["patch_embed.position"]
    for step, same in ((2, True), (5, False)):
        after = aimv2.load_model(f"{tmp_path / 'run'}@{step}").state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before) is same
    model = aimv2.load_model(str(tmp_path / "run"), decoder=True)
    image = torch.zeros(3, 16, 20, dtype=torch.uint8)
    batch = make_native_batch([image, image], [[3], [4, 5]], [1, 2], 4, 20)
    batch = pack_batches([batch]) if pack else batch
    assert model.encoder.forward_batch(batch).requires_grad
    model.encoder.frozen = True
    assert not model.encoder.forward_batch(batch).requires_grad  # nothing is kept to go back by


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data__areas": [4, 7]}, "data.areas [4, 7] are 16 to 128 patches; aimv2-tiny-patch4-native sees 4 to 64"),
        ({"data__areas": [6, 4]}, "data.areas must be two whole numbers in order"),
        ({"train__patch_budget": None}, "train.patch_budget is not given"),
        ({"train__patch_budget": 200}, "train.patch_budget 200 over 1 ranks"),
        ({"train__patch_budget": 0}, "train.patch_budget must be at least 1, got 0"),
        ({"train__patch_budget": -64}, "train.patch_budget must be at least 1, got -64"),
        ({"objective__decoder_share": 0.5}, "objective.decoder_share 0.5: a native model's decoder sees all"),
        ({"model__name": "aimv2-tiny-patch4-32"}, "train.patch_budget is for native models"),
        (
            {**FIXED, "data__areas": [4, 6]},
            "data.areas is for native models; aimv2-tiny-patch4-32 sees 32 px: leave data.areas",
        ),
        ({**FIXED, "model__max_patches": 64}, "model.max_patches is for native models"),
    ],
)
def test_wrong_use_is_one_line(data: Path, tmp_path: Path, change: dict[str, object], line: str) -> None:
    with pytest.raises(UsageError, match=line.replace("[", r"\[").replace("]", r"\]").replace(".", r"\.")):
        train(data, tmp_path / "run", **{**NATIVE, **change})
    assert not (tmp_path / "run").exists()


def test_the_command_line_says_it_in_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(data, tmp_path / "run", **{**NATIVE, "data__areas": [4, 12]})) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "data.areas" in said
