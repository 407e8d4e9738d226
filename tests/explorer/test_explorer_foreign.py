"""A vision model of transformers beside one of ours: its features are its own, and what it can't do is a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explored import plain_pictures

from aimv2.errors import UsageError
from aimv2.explorer.album import RequestError
from aimv2.explorer.answers import Answers
from aimv2.explorer.foreign import CANNOT
from aimv2.explorer.prepare import prepare
from aimv2.explorer.study import open_shown
from aimv2.interop.model_folder import save_model
from aimv2.models.create import create_model
from runs import write_processor

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ours``, ``dino`` (with a class token), a ``swin`` whose stages differ, ``pictures``."""
    from transformers import Dinov2Config, Dinov2Model, SwinConfig, SwinModel

    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    save_model(create_model("aimv2-tiny-patch8-32", seed=0, width=32, heads=2, hidden=48, depth=2), folder / "ours")
    Dinov2Model(Dinov2Config(**SHAPE, image_size=42, mlp_ratio=2)).save_pretrained(folder / "dino")
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=2)
    SwinModel(swin).save_pretrained(folder / "swin")
    for name in ("dino", "swin"):
        write_processor(folder / name)
    plain_pictures(folder / "pictures")
    return folder


def opened(place: Path, model: str, other: str | None = None) -> Answers:
    return prepare(
        str(place / model), str(place / "pictures"), str(place / other) if other is not None else None, 0, 1, "cpu"
    )


def test_its_features_are_those_of_transformers(place: Path) -> None:
    from transformers import AutoModel

    study = opened(place, "ours", "dino").study
    shown = study.model(1)
    assert (shown.depth, shown.encoder.config.patch_size, study.grid(1, 0)) == (3, 14, (3, 3))
    maps = [study.features(1, 0, layer) for layer in range(3)]
    theirs = AutoModel.from_pretrained(place / "dino").eval()
    frozen = shown.encoder.frozen  # type: ignore[union-attr]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        out = theirs(pixel_values=((study.pixels(1, 0).float() / 255 - mean) / std)[None], output_hidden_states=True)
        block = theirs.layernorm(out.hidden_states[1])
    assert frozen.kind == "transformers"
    np.testing.assert_allclose(maps[2].reshape(9, 32), out.last_hidden_state[0, 1:], atol=1e-5)
    np.testing.assert_allclose(maps[0].reshape(9, 32), block[0, 1:], atol=1e-5)
    likest = study.similar(1, 0, 2, 1, 1)
    assert likest["own"][1, 1] == pytest.approx(1) and likest["compared"] == 6


def test_what_it_can_not_do_is_a_sentence(place: Path) -> None:
    answers = opened(place, "ours", "dino")
    about = answers.about({})["models"][1]
    assert about["kind"] == "encoder" and set(about["cannot"]) == {"attention", "caption", "paint", "search"}
    assert about["parameters"] > 0 and about["architecture"] == "Dinov2Model"
    asked = {"model": "1", "image": "0", "layer": "0", "row": "0", "column": "0"}
    with pytest.raises(RequestError, match="not its attention"):
        answers.attention(asked)
    assert answers.attention(asked | {"model": "0"})["heads"]
    for question, what in ((answers.caption, "caption"), (answers.find, "search")):
        with pytest.raises(RequestError) as refused:
            question(asked | {"text": "a red sheet"})
        assert str(refused.value) == CANNOT[what]


def test_blocks_of_other_grids_are_left_out(place: Path) -> None:
    study = opened(place, "swin").study
    assert (study.model(0).depth, study.grid(0, 0)) == (1, (2, 2))
    assert study.pca(0, 0, 0).shape == (2, 2, 3)


def test_features_on_no_grid_are_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aimv2.features.frozen import Frozen

    call = Frozen.__call__
    monkeypatch.setattr(Frozen, "__call__", lambda self, *given: [x[:, :-1] for x in call(self, *given)])
    with pytest.raises(UsageError, match="8 features of 42 x 42 px do not form a square grid"):
        open_shown(str(place / "dino"), "cpu")
