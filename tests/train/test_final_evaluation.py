"""The evaluation at the end of a run: in bounded memory, and with nobody waiting for it."""

from __future__ import annotations

import json
import os
import select
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import spawn

from aimv2 import api
from aimv2.config.schema import Config
from aimv2.data.stream.samples import View
from aimv2.data.stream.transforms import to_pixels
from aimv2.errors import UsageError
from aimv2.evals import after_training
from aimv2.models.create import build, create_model
from aimv2.tasks import held_out
from aimv2.tasks.held_out import read_held_out
from aimv2.tasks.pretrain import Pretrain
from runs import TINY, need_ranks, scenes

SHAPE = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def probed(data: Path) -> Config:
    config = Config()
    config.data.train, config.data.flip = str(data), 0.5
    config.eval.probe_epochs = 2
    return config


def test_labelled_images_are_never_all_in_memory(
    probed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, most, decoded = 0, 0, 0

    def count(image: Any) -> np.ndarray:
        nonlocal held, most, decoded
        pixels = to_pixels(image)
        held, decoded = held + pixels.size, decoded + 1
        most = max(most, held)

        def let_go(size: int = pixels.size) -> None:
            nonlocal held
            held -= size

        weakref.finalize(pixels, let_go)
        return pixels

    monkeypatch.setattr(held_out, "to_pixels", count)
    monkeypatch.setattr(after_training, "SIZE", 16)
    model = create_model("aimv2-tiny-patch8-32", True, 5, decoder_vocab_size=20, **SHAPE)
    found = after_training.probe_against_random(probed, model, View(32, 16), tmp_path)
    assert found["probe_test_images"] == 24
    assert decoded == 120 + 24 + 2  # each once, and one of each split to see that there are labels
    assert most <= 2 * 16 * 3 * 32 * 32  # a batch, and the one that is being decoded
    assert not list(tmp_path.iterdir())


def test_the_probe_gets_the_features_of_all_labelled_images(
    probed: Config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit those of all images in memory at once."""
    given: list[Any] = []

    def keep(views: Any, labels: Any, test: Any, test_labels: Any, *_: Any, **__: Any) -> float:
        given.append(([view.clone() for view in views], labels, test.clone(), test_labels))
        return 0.5

    monkeypatch.setattr(after_training, "train_probe", keep)
    model = create_model("aimv2-tiny-patch8-32", True, 5, decoder_vocab_size=20, **SHAPE)
    found = after_training.probe_against_random(probed, model, View(32, 16), tmp_path)
    assert found == {"probe_test_images": 24, "probe_top1": 0.5, "probe_top1_random": 0.5}
    train, test = (
        read_held_out(sorted(data.glob(f"{split}-*.tar")), View(32, 16, False), None, 0) for split in ("train", "val")
    )
    for encoder, (views, labels, test_view, test_labels) in zip(
        (model.encoder, build(model.encoder.config, None, probed.seed)), given, strict=True
    ):
        with torch.no_grad():
            expected = [encoder.eval()(pixels).half() for pixels in (train.images, train.images.flip(-1), test.images)]
        assert all(torch.equal(one, two) for one, two in zip([*views, test_view], expected, strict=True))
        assert torch.equal(labels, train.labels) and torch.equal(test_labels, test.labels)


def rank_main(rank: int, data: Path, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29900 + os.getppid() % 90)}
    # rank 1 holds the writing end until its process is gone
    end = os.open(folder / "alive", os.O_RDONLY | os.O_NONBLOCK if rank == 0 else os.O_WRONLY)

    def evaluate(self: Pretrain, *_: Any) -> dict[str, Any]:
        ready, _, _ = select.select([end], [], [], 300)  # a hang is a failure, not a pass
        return {"others_gone": bool(ready) and os.read(end, 1) == b"", "group": torch.distributed.is_initialized()}

    Pretrain.final_evaluation = evaluate  # type: ignore[method-assign]
    result = api.pretrain(None, str(folder / "run"), {**TINY, "data.train": str(data), "train.steps": 2})
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))


def test_other_ranks_are_gone_while_the_first_one_evaluates(data: Path, tmp_path: Path) -> None:
    need_ranks(2)
    os.mkfifo(tmp_path / "alive")
    spawn(rank_main, (data, tmp_path), nprocs=2)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["others_gone"] and not first["group"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == first
    assert second == {"run": str(tmp_path / "run"), "step": 2}


def test_no_room_for_the_features_is_said_before_anything_is_decoded(
    probed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".probe-left").mkdir()  # by an evaluation that was killed
    monkeypatch.setattr(after_training, "store_features", None)
    usage, free = shutil.disk_usage(tmp_path), 0
    monkeypatch.setattr(after_training.shutil, "disk_usage", lambda path: usage._replace(free=free))
    model = create_model("aimv2-tiny-patch8-32", True, 5, decoder_vocab_size=20, **SHAPE)
    need = 2 * 16 * model.encoder.config.width * 2 * (2 * 120 + 24)  # float16, two encoders, mirrored training images
    free = need - 1
    with pytest.raises(UsageError, match=r"eval\.probe_samples 0: .* are free in") as error:
        after_training.probe_against_random(probed, model, View(32, 16), tmp_path)
    assert error.value.code == "limit" and not list(tmp_path.iterdir())
    free = need
    with pytest.raises(TypeError):  # past the check
        after_training.probe_against_random(probed, model, View(32, 16), tmp_path)
