"""The evaluation at the end of a run: in bounded memory, and with nobody waiting for it."""

from __future__ import annotations

import json
import os
import select
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
from aimv2.evals import after_training
from aimv2.evals.probe import train_probe
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


def test_the_probe_scores_what_it_scored_on_images_in_memory(probed: Config, data: Path, tmp_path: Path) -> None:
    model = create_model("aimv2-tiny-patch8-32", True, 5, decoder_vocab_size=20, **SHAPE)
    found = after_training.probe_against_random(probed, model, View(32, 16), tmp_path)
    train, test = (
        read_held_out(sorted(data.glob(f"{split}-*.tar")), View(32, 16, False), None, 0) for split in ("train", "val")
    )
    untrained = build(model.encoder.config, None, probed.seed)
    for name, encoder in (("probe_top1", model.encoder), ("probe_top1_random", untrained)):
        with torch.no_grad():
            views = [encoder.eval()(pixels).half() for pixels in (train.images, train.images.flip(-1), test.images)]
        expected = train_probe(
            views[:2], train.labels, views[2], test.labels, 2, probed.eval.probe_lr, seed=probed.seed
        )
        assert found[name] == expected, name


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
