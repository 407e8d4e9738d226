"""The objective against a slow loss written from the paper, and its independence of how pairs are grouped."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2.batch import Batch, make_batch, split_batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model
from aimv2.models.sizes import IMAGENET_MEAN, IMAGENET_STD
from aimv2.objectives.pretrain import PretrainObjective, normalized_patches, pixel_targets, text_targets

PATCH, PATCHES, VOCAB = 4, 9, 11


def tiny(**decoder: object) -> AIMv2:
    options: dict = {"image_size": 12, "width": 16, "heads": 2, "hidden": 24, "depth": 1}
    options |= {"decoder_width": 16, "decoder_heads": 2, "decoder_hidden": 24, "decoder_depth": 2}
    options |= {"decoder_vocab_size": VOCAB, "decoder_max_text": 30, **decoder}
    model = create_model("aimv2-tiny-patch4-32", decoder=True, seed=0, **options)
    assert isinstance(model, AIMv2)
    with torch.no_grad():
        model.decoder.text_head.linear.weight.mul_(8)
    return model


def pixels(count: int) -> torch.Tensor:
    drawn = torch.randint(0, 256, (count, 3, 12, 12), generator=torch.Generator().manual_seed(7))
    return drawn.to(torch.uint8)


def predictions(model: AIMv2, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """All positions, padded: pixels [B, I, P], logits [B, T, V]."""
    decoder = model.decoder
    with torch.no_grad():
        features = decoder.project(model.encoder(batch.images, batch.prefix_len))
        x = torch.cat([features, decoder.caption_inputs(batch.text, batch.text.shape[1])], 1)
        out = decoder.trunk.step(x, None)
        image, text = decoder.pixel_head(out[:, :PATCHES]), decoder.text_head(out[:, PATCHES:])
    return image.double().numpy(), text.double().numpy()


def slow_loss(model: AIMv2, batch: Batch) -> dict[str, tuple[float, int]]:
    """AIMV2, Figure 1, one number at a time."""
    image, logits = predictions(model, batch)
    found = {"text": (0.0, 0), "pixel": (0.0, 0)}
    for b in range(len(batch)):
        picture = batch.images[b].numpy().astype(np.float64) / 255
        picture = (picture - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(IMAGENET_STD, (3, 1, 1))
        for target in range(int(batch.prefix_len[b]), PATCHES):  # 0-based: M .. I-1 lie outside the prefix
            row, column = divmod(target, 3)
            cut = picture[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            values = cut.transpose(1, 2, 0).reshape(-1)
            values = (values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-6)
            error = np.mean((image[b, target - 1] - values) ** 2)
            found["pixel"] = (found["pixel"][0] + error, found["pixel"][1] + 1)
        for place in range(int(batch.text_len[b])):
            row_logits = logits[b, place]
            log_sum = np.log(np.exp(row_logits - row_logits.max()).sum()) + row_logits.max()
            entropy = log_sum - row_logits[int(batch.text[b, place])]
            found["text"] = (found["text"][0] + entropy, found["text"][1] + 1)
    return found


def numbers(terms: dict) -> dict[str, tuple[float, int]]:
    return {name: (value.item(), count.item()) for name, (value, count) in terms.items()}


def test_loss_by_hand() -> None:
    model = tiny()
    batch = make_batch(pixels(4), [[5, 0, 3, 1], [1], [], [2, 2, 0, 9, 10, 1]], [1, 4, 8, 3], PATCHES)
    objective = PretrainObjective(ObjectiveConfig())
    terms = objective(model, batch)
    assert {value.dtype for value, _ in terms.values()} == {torch.float32}
    got, wanted = numbers(terms), slow_loss(model, batch)
    assert got["text"][1] == wanted["text"][1] == 11 and got["pixel"][1] == wanted["pixel"][1] == 8 + 5 + 1 + 6
    for term in wanted:
        assert got[term][0] == pytest.approx(wanted[term][0], rel=1e-5)
    assert {name: count.item() for name, count in objective.counts(batch).items()} == {"text": 11, "pixel": 20}


def test_targets_are_normalised_per_patch() -> None:
    images = torch.randn(2, 3, 12, 12) * 5 + 3
    images[1, :, :PATCH, :PATCH] = 2.0  # a flat patch
    targets = normalized_patches(images, PATCH)
    assert targets.shape == (2, PATCHES, 48) and targets.dtype == torch.float32
    assert targets.mean(-1).abs().max() < 1e-5 and (targets[1, 0] == 0).all()
    torch.testing.assert_close(targets[0].var(-1), torch.ones(PATCHES), rtol=1e-4, atol=1e-4)
    faint = images / 1000  # so faint that 1e-6 under the root counts
    values = faint[0, :, :PATCH, :PATCH].permute(1, 2, 0).flatten()
    wanted = (values - values.mean()) / (values.var() + 1e-6).sqrt()
    torch.testing.assert_close(normalized_patches(faint, PATCH)[0, 0], wanted)
    assert normalized_patches(images.bfloat16(), PATCH).dtype == torch.float32


def test_position_i_predicts_patch_i_plus_1() -> None:
    model = tiny()
    batch = make_batch(pixels(2), [[1], [1]], [8, 7], PATCHES)
    every = normalized_patches(model.encoder.normalize(batch.images), PATCH)
    wanted = torch.stack([every[0, 8], every[1, 7], every[1, 8]])
    assert torch.equal(pixel_targets(model.encoder, batch)[:3], wanted)


def test_end_of_text_is_a_target_whatever_its_id() -> None:
    """Padding is 0 here; a caption of zeros that ends in zero still counts whole, and so does any other id."""
    batch = make_batch(pixels(2), [[0, 0, 0], [4, 1]], [1, 1], PATCHES)
    assert text_targets(batch)[:5].tolist() == [0, 0, 0, 4, 1]
    assert (text_targets(batch)[5:] == -100).all() and batch.token_count.item() == 5
    got, wanted = numbers(PretrainObjective(ObjectiveConfig())(tiny(), batch)), slow_loss(tiny(), batch)
    assert got["text"][1] == 5 and got["text"][0] == pytest.approx(wanted["text"][0], rel=1e-5)


@pytest.mark.parametrize("pad", [0, 1, 7])
def test_the_id_of_padding_does_not_matter(pad: int) -> None:
    batch = make_batch(pixels(2), [[5, pad, 1], [pad]], [1, 8], PATCHES)
    text = batch.text.clone()
    text[torch.arange(text.shape[1]) >= batch.text_len[:, None]] = pad
    objective = PretrainObjective(ObjectiveConfig())
    assert numbers(objective(tiny(), batch)) == numbers(objective(tiny(), replace(batch, text=text)))


def test_alpha_weighs_the_pixels() -> None:
    assert PretrainObjective(ObjectiveConfig()).weights == {"text": 1.0, "pixel": 0.4}
    assert PretrainObjective(ObjectiveConfig(alpha=0.2)).weights == {"text": 1.0, "pixel": 0.2}
    assert PretrainObjective(ObjectiveConfig(targets="image")).weights == {"text": 0.0, "pixel": 1.0}
    assert PretrainObjective(ObjectiveConfig(targets="text")).weights == {"text": 1.0, "pixel": 0.0}


def test_autocast_keeps_losses_and_targets_in_fp32() -> None:
    model, batch = tiny(), make_batch(pixels(2), [[5, 1], [1]], [1, 4], PATCHES)
    objective = PretrainObjective(ObjectiveConfig())
    exact = numbers(objective(model, batch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = objective(model, batch)
        targets = pixel_targets(model.encoder, batch)
    assert {value.dtype for value, _ in terms.values()} == {torch.float32}
    assert torch.equal(targets, pixel_targets(model.encoder, batch))
    for term, (value, _) in numbers(terms).items():
        assert value == pytest.approx(exact[term][0], rel=0.03)


# How pairs are grouped, padded and ordered changes nothing.

MODEL = tiny()
OBJECTIVE = PretrainObjective(ObjectiveConfig())


@st.composite
def drawn(draw: st.DrawFn) -> Batch:
    count = draw(st.sampled_from([2, 4]))
    captions = draw(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=20), min_size=count, max_size=count))
    prefix = draw(st.lists(st.integers(1, PATCHES - 1), min_size=count, max_size=count))
    return make_batch(pixels(count), captions, prefix, PATCHES)


def regrouped(batch: Batch, order: list[int], width: int | None = None) -> Batch:
    captions = [batch.text[i, : batch.text_len[i]].tolist() for i in order]
    return make_batch(batch.images[order], captions, batch.prefix_len[order], PATCHES, text_width=width)


def sums(*batches: Batch) -> dict[str, tuple[float, int]]:
    total: dict[str, tuple[float, int]] = {}
    with torch.no_grad():
        for batch in batches:
            for name, (value, count) in numbers(OBJECTIVE(MODEL, batch)).items():
                before = total.get(name, (0.0, 0))
                total[name] = (before[0] + value, before[1] + count)
    return total


def assert_same(left: dict[str, tuple[float, int]], right: dict[str, tuple[float, int]]) -> None:
    assert left.keys() == right.keys()
    for term in left:
        assert left[term][1] == right[term][1]
        assert left[term][0] == pytest.approx(right[term][0], rel=1e-5, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(drawn(), st.sampled_from([32, 48]), st.integers(0, 70), st.integers(0, 200))
def test_padding_changes_nothing(batch: Batch, width: int, more_rows: int, more_patches: int) -> None:
    wide = regrouped(batch, list(range(len(batch))), width)
    wide.token_rows = torch.cat([wide.token_rows, torch.full((more_rows,), wide.text.numel())])
    wide.patch_rows = torch.cat([wide.patch_rows, torch.zeros(more_patches, dtype=torch.int64)])
    assert_same(sums(wide), sums(batch))


@settings(max_examples=25, deadline=None)
@given(drawn(), st.booleans())
def test_micro_batches_change_nothing(batch: Batch, halves: bool) -> None:
    assert_same(sums(*split_batch(batch, 2 if halves else len(batch), PATCHES)), sums(batch))


@settings(max_examples=25, deadline=None)
@given(drawn(), st.randoms(use_true_random=False))
def test_the_order_of_pairs_changes_nothing(batch: Batch, random: object) -> None:
    order = list(range(len(batch)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert_same(sums(regrouped(batch, order)), sums(batch))
