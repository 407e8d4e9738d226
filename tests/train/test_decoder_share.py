"""A decoder that sees a drawn part of the image positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aimv2.batch import make_batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.models.create import create_model
from aimv2.objectives.pretrain import PretrainObjective, normalized_patches
from runs import exact, metrics, resume, train
from world import TinyWorld


def pairs(kept: torch.Tensor | None):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return make_batch(images, [[3, 4, 1], [5, 1], [1]], [2, 9, 14], 16, kept=kept)


def model():
    return create_model("aimv2-tiny-patch8-32", decoder=True, seed=0, depth=2, decoder_vocab_size=20)


def test_all_positions_equal_none_drawn() -> None:
    whole, objective = model(), PretrainObjective(ObjectiveConfig())
    plain = objective(whole, pairs(None))
    every = objective(whole, pairs(torch.arange(16).expand(3, -1)))
    for name in ("text", "pixel"):
        torch.testing.assert_close(every[name], plain[name])


def test_a_part_is_decoded_and_scored_alone() -> None:
    """Against a decoder that is handed the kept features as if they were the whole image."""
    kept = torch.tensor([[0, 3, 5, 10, 15], [1, 8, 9, 12, 14], [2, 4, 13, 14, 15]])
    whole, objective = model(), PretrainObjective(ObjectiveConfig())
    batch = pairs(kept)
    terms = objective(whole, batch)
    features = whole.encoder(batch.images, batch.prefix_len)
    few = torch.stack([row[index] for row, index in zip(features, kept)])
    # prefix 2 scores 1..14, prefix 9 scores 8..14, prefix 14 scores 13 and 14: rows of the flat [3 * 5], patch predicted
    rows = [(1, (0, 4)), (2, (0, 6)), (3, (0, 11)), (6, (1, 9)), (7, (1, 10)), (8, (1, 13)), (9, (1, 15))]
    rows += [(12, (2, 14)), (13, (2, 15))]
    plain = replace(batch, kept=None, patch_rows=torch.tensor([row for row, _ in rows]))
    prediction = whole.decoder(few, plain)
    targets = normalized_patches(whole.encoder.normalize(batch.images), 8)
    wanted = torch.stack([targets[at] for _, at in rows])
    error = (prediction.pixels - wanted).square().mean(-1).sum()
    torch.testing.assert_close(terms["pixel"][0], error)
    assert int(terms["pixel"][1]) == len(rows)


@pytest.fixture(scope="module")
def data(world: TinyWorld) -> Path:
    return world.scenes


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_has_the_losses_of_an_undisturbed_one(data: Path, tmp_path: Path, workers: int) -> None:
    more = {"objective__decoder_share": 0.35, "data__workers": workers}
    train(data, tmp_path / "whole", **more)
    train(data, tmp_path / "parts", train__stop_at=2, **more)
    resume(tmp_path / "parts")
    assert exact(tmp_path / "parts") == exact(tmp_path / "whole")
    train(data, tmp_path / "all", data__workers=workers, train__steps=1, eval__captions=0)
    assert metrics(tmp_path / "all")[0]["pixel_loss"] != metrics(tmp_path / "whole")[0]["pixel_loss"]
