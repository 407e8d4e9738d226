"""Patches and words that a model predicts: the objective's own loss, no leak in a rollout, probabilities that are the model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aimv2.batch import make_batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.data.text.tokenizer import train_tokenizer
from aimv2.errors import UsageError
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model
from aimv2.models.likelihood import score
from aimv2.models.positions import pixel_patches, unpatchify
from aimv2.objectives.pretrain import PretrainObjective, normalized_patches
from aimv2.report.predictions import END, caption_loss, caption_words, next_patches, rollout, visible

SHAPE = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}
PATCH, PATCHES = 8, 16


def model_of(**more: object) -> AIMv2:
    torch.manual_seed(0)
    parts = {f"decoder_{key}": value for key, value in {**SHAPE, "vocab_size": 300, **more}.items()}
    model = create_model("aimv2-tiny-patch8-32", decoder=True, **SHAPE, **parts).eval()  # type: ignore[arg-type]
    assert isinstance(model, AIMv2)
    with torch.no_grad():  # sharper than at birth, so that predictions and probabilities differ from place to place
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    model.tokenizer = train_tokenizer(["a small red circle at the top", "a large blue square"] * 5, 300)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["joint", "separate"])
def model(request: pytest.FixtureRequest) -> AIMv2:
    return model_of(separate=request.param)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def place_of(picture: np.ndarray, patch: int) -> np.ndarray:
    row, column = divmod(patch, 32 // PATCH)
    return picture[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]


# ---- patches ----


@pytest.mark.parametrize(("share", "prefix"), [(0.0, 1), (0.25, 4), (1.0, 15)])
def test_next_patches_have_the_loss_of_the_objective(
    model: AIMv2, image: torch.Tensor, share: float, prefix: int
) -> None:
    painted = next_patches(model, image, share)
    objective = PretrainObjective(ObjectiveConfig(targets="image"))
    with torch.no_grad():
        total, count = objective(model, make_batch(image[None], [[]], [prefix], PATCHES))["pixel"]
    assert painted.prefix == prefix
    assert painted.loss == pytest.approx(float(total) / int(count), rel=1e-5)
    assert np.array_equal(painted.truth, image.permute(1, 2, 0).numpy())
    for patch in range(PATCHES):
        same = np.array_equal(place_of(painted.image, patch), place_of(painted.truth, patch))
        assert same == (patch < prefix)
    assert "std" in painted.note


def test_a_perfect_prediction_is_the_picture(image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    wanted = normalized_patches(model.encoder.normalize(image[None]), PATCH)[0]
    monkeypatch.setattr(model.decoder.pixel_head, "forward", lambda rows: wanted[4 : 4 + len(rows)])
    painted = next_patches(model, image, 0.25)
    assert painted.loss == pytest.approx(0, abs=1e-12)
    assert np.array_equal(painted.image, painted.truth)


def plain_rollout(model: AIMv2, image: torch.Tensor, prefix: int) -> np.ndarray:
    """Everything again for each patch, by the training forward pass on the canvas as it stands."""
    canvas = image.clone()
    for patch in range(prefix, PATCHES):
        row, column = divmod(patch, 4)
        canvas[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 0
    for patch in range(prefix, PATCHES):
        batch = make_batch(canvas[None], [[]], [prefix], PATCHES)
        with torch.no_grad():
            said = model(batch).pixels[patch - prefix]
        row, column = divmod(patch, 4)
        block = (slice(None), slice(row * PATCH, (row + 1) * PATCH), slice(column * PATCH, (column + 1) * PATCH))
        true = model.encoder.normalize(image[None])[0][block].permute(1, 2, 0).reshape(-1)
        pixels = (said * (true.var() + 1e-6).sqrt() + true.mean()).view(PATCH, PATCH, 3).permute(2, 0, 1)
        pixels = pixels * model.encoder.std[0] + model.encoder.mean[0]
        canvas[block] = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    return canvas.permute(1, 2, 0).numpy()


def test_a_rollout_is_the_plain_loop(model: AIMv2, image: torch.Tensor) -> None:
    painted = rollout(model, image, 0.25)
    plain = plain_rollout(model, image, 4)
    assert painted.prefix == 4 and not np.array_equal(painted.image, painted.truth)
    assert np.abs(painted.image.astype(int) - plain).max() <= 1
    assert next_patches(model, image, 0.25).loss != pytest.approx(painted.loss, rel=1e-4)


def test_a_rollout_knows_of_what_it_paints_only_mean_and_deviation(model: AIMv2, image: torch.Tensor) -> None:
    before = rollout(model, image, 0.25)
    patches = pixel_patches(image[None], PATCH)
    order = torch.randperm(PATCH * PATCH, generator=torch.Generator().manual_seed(3))
    pixels = patches.unflatten(2, (-1, 3))
    pixels[:, 4:] = pixels[:, 4:, order]  # other patches of the same mean and deviation
    shuffled = unpatchify(patches, PATCH, 4, 4)[0]
    after = rollout(model, shuffled, 0.25)
    assert not np.array_equal(before.truth, after.truth)
    assert np.abs(before.image.astype(int) - after.image).max() <= 1
    patches[:, 2] = 255 - patches[:, 2]  # the prefix does matter
    other = rollout(model, unpatchify(patches, PATCH, 4, 4)[0], 0.25)
    assert np.abs(place_of(before.image, 15).astype(int) - place_of(other.image, 15)).max() > 1


def test_a_rollout_goes_on_from_what_it_painted(model: AIMv2, image: torch.Tensor) -> None:
    """Its first patch is the next-patch prediction; a later one is not, as it follows painted patches."""
    painted, taught = rollout(model, image, 0.25), next_patches(model, image, 0.25)
    assert np.abs(place_of(painted.image, 4).astype(int) - place_of(taught.image, 4)).max() <= 1
    assert not np.array_equal(place_of(painted.image, 15), place_of(taught.image, 15))


def test_models_and_shares_that_can_not_be(image: torch.Tensor) -> None:
    blind = model_of(pixels=False)
    for verb in (next_patches, rollout):
        with pytest.raises(UsageError, match="predicts no patches"):
            verb(blind, image, 0.5)
        with pytest.raises(UsageError, match=r"share 1\.5"):
            verb(model_of(), image, 1.5)
    mute = model_of(text=False)
    assert rollout(mute, image, 0.5).prefix == 8
    with pytest.raises(UsageError, match="no text head"):
        caption_words(mute, image)
    speechless = model_of()
    speechless.tokenizer = None
    with pytest.raises(UsageError, match="no tokenizer"):
        caption_loss(speechless, image, "a circle")


# ---- words ----


def test_words_are_the_greedy_caption(model: AIMv2, image: torch.Tensor) -> None:
    words = caption_words(model, image, 12)
    assert 1 <= len(words) <= 12
    written = "".join(word.text for word in words if word.text != END)
    assert written == model.caption(image[None], max_tokens=12)[0]
    for word in words:
        assert word.alternatives[0] == (word.text, pytest.approx(word.probability, rel=1e-4))
        assert [share for _, share in word.alternatives] == sorted((s for _, s in word.alternatives), reverse=True)
        assert 0 < word.probability <= 1
        assert word.attention.shape == (4, 4) and word.attention.dtype == np.float32
        assert 0 < word.attention.sum() < 1  # the rest went to words


def test_where_the_decoder_looked(image: torch.Tensor) -> None:
    """A decoder whose keys are all alike looks everywhere alike: 1 / (image + words so far)."""
    model = model_of()
    with torch.no_grad():
        for block in model.decoder.trunk.blocks:
            block.attn.qkv.weight[32:64] = 0  # type: ignore[union-attr]
    for at, word in enumerate(caption_words(model, image, 3)):
        np.testing.assert_allclose(word.attention, 1 / (PATCHES + at + 1), rtol=1e-5)


def test_losses_of_a_caption_are_its_likelihood(model: AIMv2, image: torch.Tensor) -> None:
    tokens = caption_loss(model, image, "A small  red circle")
    assert "".join(token.text for token in tokens) == f"a small red circle{END}"
    wanted = -float(score(model, image[None], ["a small red circle"]))
    assert sum(token.loss for token in tokens) == pytest.approx(wanted, rel=1e-4)


def test_losses_under_a_prefix_are_those_of_training(model: AIMv2, image: torch.Tensor) -> None:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("a large blue square", 77)  # type: ignore[attr-defined]
    objective = PretrainObjective(ObjectiveConfig(targets="text"))
    with torch.no_grad():
        total, _ = objective(model, make_batch(image[None], [ids], [5], PATCHES))["text"]
    found = sum(token.loss for token in caption_loss(model, image, "a large blue square", prefix=5))
    assert found == pytest.approx(float(total), rel=1e-4)
    assert found != pytest.approx(sum(t.loss for t in caption_loss(model, image, "a large blue square")), rel=1e-6)


def test_white_space_is_seen() -> None:
    assert [visible(text) for text in (" a", "b", " ", "  ", "")] == [" a", "b", "␣", "␣␣", ""]
