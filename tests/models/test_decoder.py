"""The packed decoder equals a plain padded one, reads causally, and computes nothing that nobody scores."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aimv2.batch import Batch, make_batch
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model
from aimv2.models.decoder import Prediction
from aimv2.models.masks import causal_mask

PATCHES, VOCAB = 16, 11
CAPTIONS = [[5, 0, 3, 9, 1], [1], [], [7, 7, 2, 0, 0, 4, 8, 10, 6, 3, 5, 1]]  # the last fills its row to the end
PREFIX = [1, 9, 15, 4]
SHAPES = {
    "joint": {},
    "separate": {"decoder_separate": True},
    "image only": {"decoder_text": False},
    "caption only": {"decoder_pixels": False},
    "one block": {"decoder_depth": 1},
}


def tiny(**decoder: object) -> AIMv2:
    options: dict = {"image_size": 16, "width": 24, "heads": 2, "hidden": 40, "depth": 2}
    options |= {"decoder_width": 32, "decoder_heads": 2, "decoder_hidden": 48, "decoder_depth": 3}
    options |= {"decoder_vocab_size": VOCAB, "decoder_max_text": 12, **decoder}
    model = create_model("aimv2-tiny-patch4-32", decoder=True, seed=0, **options)
    assert isinstance(model, AIMv2)
    return model


def pairs() -> Batch:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return make_batch(images, CAPTIONS, PREFIX, PATCHES, text_width=12)


def plain(model: AIMv2, features: Tensor, text: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """All predictions of all positions, padded: pixels [B, I, P], logits [B, T, V]."""
    decoder = model.decoder

    def run(trunk: torch.nn.Module, x: Tensor) -> Tensor:
        for block in trunk.blocks:
            x = block(x, mask=causal_mask(x.shape[1])[None, None])
        return trunk.norm(x)

    image = decoder.project(features)
    pixels = logits = None
    if decoder.config.text:
        tokens = torch.cat([decoder.bos.expand(len(text), 1, -1), decoder.token_embed(text)[:, :-1]], 1)
        out = run(decoder.trunk, torch.cat([image, tokens + decoder.text_position[: text.shape[1]]], 1))
        logits = decoder.text_head.linear(out[:, PATCHES:])
        if decoder.config.pixels and not decoder.config.separate:
            pixels = decoder.pixel_head(out[:, :PATCHES])
    if decoder.config.pixels and pixels is None:
        pixels = decoder.pixel_head(run(decoder.pixel_trunk, image))
    return pixels, logits


def scored(batch: Batch) -> tuple[Tensor, Tensor]:
    """Bool [B, I] and [B, T]: the positions that the loss reads."""
    position = torch.arange(PATCHES)
    image = (position >= batch.prefix_len[:, None] - 1) & (position < PATCHES - 1)
    return image, torch.arange(batch.text.shape[1]) < batch.text_len[:, None]


def real_rows(prediction: Prediction, batch: Batch) -> list[Tensor]:
    rows = []
    if prediction.pixels is not None:
        rows.append(prediction.pixels[: batch.patch_count])
    if prediction.text is not None:
        rows.append(prediction.text[: batch.token_count])
    return rows


def gradients(model: AIMv2, rows: list[Tensor], features: Tensor) -> list[Tensor]:
    """Of a sum of squares, smooth and different for each value; zero where nothing arrives."""
    loss = sum((row * (1 + torch.arange(row.numel()).view(row.shape).cos())).square().sum() for row in rows)
    leaves = [features, *model.decoder.parameters()]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found)]


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_equals_padded(shape: str) -> None:
    model, batch = tiny(**SHAPES[shape]).double(), pairs()
    features = torch.randn(4, PATCHES, 24, dtype=torch.float64, requires_grad=True)
    got = real_rows(model.decoder(features, batch), batch)
    pixels, logits = plain(model, features, batch.text)
    image, text = scored(batch)
    wanted = [x[where] for x, where in ((pixels, image), (logits, text)) if x is not None]
    assert len(got) == len(wanted) == (1 if "only" in shape else 2)
    for left, right in zip(got, wanted):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)
    names = ["features", *(name for name, _ in model.decoder.named_parameters())]
    results = zip(names, gradients(model, got, features), gradients(model, wanted, features))
    for name, left, right in results:
        assert right.abs().max() > 0, name
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shape", SHAPES)
def test_only_scored_rows_reach_the_heads(shape: str) -> None:
    model, batch = tiny(**SHAPES[shape]), pairs()
    last: list[tuple[int, ...]] = []
    blocks = [*(model.decoder.trunk.blocks[-1:] if model.decoder.config.text else [])]
    for block in blocks:
        block.mlp.register_forward_hook(lambda module, inputs, out: last.append(tuple(out.shape)))
    prediction = model(batch)
    # 15 + 7 + 1 + 12 patches and 5 + 1 + 0 + 12 tokens, rounded up to their buckets
    assert (batch.patch_count.item(), batch.token_count.item()) == (35, 18)
    has = model.decoder.config
    assert (None if prediction.pixels is None else prediction.pixels.shape) == ((128, 48) if has.pixels else None)
    assert (None if prediction.text is None else prediction.text.shape) == ((32, VOCAB) if has.text else None)
    joint = has.pixels and has.text and not has.separate
    assert last == ([(128 + 32 if joint else 32, 32)] if has.text else [])


def test_a_head_that_is_off_does_not_exist() -> None:
    assert not any("pixel" in name for name, _ in tiny(decoder_pixels=False).named_parameters())
    names = [name for name, _ in tiny(decoder_text=False).decoder.named_parameters()]
    assert not any(word in name for name in names for word in ("text", "token", "bos"))
    assert {name.split(".")[0] for name in names} == {"project", "pixel_trunk", "pixel_head"}


@pytest.mark.parametrize("shape", ["joint", "separate"])
def test_a_later_token_changes_no_earlier_prediction(shape: str) -> None:
    model = tiny(**SHAPES[shape])
    features = torch.randn(1, PATCHES, 24)
    caption = [5, 0, 3, 9, 1]
    one = model.decoder(features, make_batch(torch.zeros(1, 3, 16, 16), [caption], [1], PATCHES))
    for place in range(5):
        changed = [*caption[:place], 8, *caption[place + 1 :]]
        other = model.decoder(features, make_batch(torch.zeros(1, 3, 16, 16), [changed], [1], PATCHES))
        assert one.pixels is not None and other.pixels is not None
        assert torch.equal(one.pixels, other.pixels)  # the image comes first: it never sees the caption
        moved = ((one.text - other.text).abs().amax(-1) > 1e-6)[:5].tolist()
        assert moved == [row > place for row in range(5)]  # row r predicts token r from the tokens before it


@pytest.mark.parametrize("shape", ["joint", "separate", "image only"])
def test_a_later_patch_changes_no_earlier_prediction(shape: str) -> None:
    model = tiny(**SHAPES[shape])
    batch = make_batch(torch.zeros(1, 3, 16, 16), [[5, 3, 1]], [1], PATCHES)
    features = torch.randn(1, PATCHES, 24)
    one = model.decoder(features, batch)
    for patch in range(PATCHES):
        other_features = features.clone()
        other_features[0, patch] += 1
        other = model.decoder(other_features, batch)
        moved = ((one.pixels - other.pixels).abs().amax(-1) > 1e-6)[: PATCHES - 1].tolist()
        assert moved == [position >= patch for position in range(PATCHES - 1)]
        if one.text is not None:
            assert ((one.text - other.text).abs().amax(-1) > 1e-6)[:3].all()  # captions see the whole image


@pytest.mark.parametrize("prefix", [1, 6, 15])
def test_no_prediction_sees_its_target(prefix: int) -> None:
    """Through encoder and decoder: the prediction of patch j depends on no pixel of patch j or later."""
    model = tiny()
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    batch = make_batch(images, [[5, 3, 1]], [prefix], PATCHES)
    pixels = model(batch).pixels
    for row, target in enumerate(range(prefix, PATCHES)):
        (grad,) = torch.autograd.grad(pixels[row].square().sum(), images, retain_graph=True)
        per_patch = grad.view(3, 4, 4, 4, 4).abs().amax((0, 2, 4)).flatten()
        assert per_patch[target:].max() == 0 and bool((per_patch[:target] > 0).all())


def test_padding_tokens_and_rows_influence_nothing() -> None:
    model, batch = tiny(), pairs()
    text = batch.text.clone()
    text[torch.arange(12) >= batch.text_len[:, None]] = 6
    more = replace(
        batch,
        text=text,
        token_rows=torch.cat([batch.token_rows, torch.full((64,), batch.text.numel())]),
        patch_rows=torch.cat([batch.patch_rows, torch.zeros(128, dtype=torch.int64)]),
    )
    results = []
    for one in (batch, more):
        features = torch.randn(4, PATCHES, 24, generator=torch.Generator().manual_seed(3)).requires_grad_()
        rows = real_rows(model.decoder(features, one), one)
        results.append([*rows, *gradients(model, rows, features)])
    for left, right in zip(*results):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5 * right.detach().abs().max().item())


@pytest.mark.parametrize(("limit", "width"), [(77, 96), (20, 32), (32, 32)])
def test_the_longest_caption_fits_its_bucket(limit: int, width: int) -> None:
    """T is rounded up past the last text position; the longest caption still reads all positions there are."""
    model = tiny(decoder_max_text=limit)
    caption = [token % VOCAB for token in range(limit)]
    batch = make_batch(torch.randn(2, 3, 16, 16), [caption, [1]], [1, 1], PATCHES)
    assert batch.text.shape == (2, width)
    prediction = model(batch)
    _, logits = plain(model, model.encoder(batch.images, batch.prefix_len), batch.text[:, :limit])
    got = prediction.text[:limit]
    torch.testing.assert_close(got, logits[0], rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    seen = model.decoder.text_position.grad.abs().amax(-1) > 0
    assert seen.tolist() == [True] * limit + [False]  # the one past it is read only by a caption that is cut


def test_bidirectional_lets_all_patches_see_each_other() -> None:
    model, batch = tiny(decoder_pixels=False), pairs()
    other = replace(batch, prefix_len=torch.tensor([15, 1, 1, 1]))
    assert torch.equal(model(batch, bidirectional=True).text, model(other, bidirectional=True).text)
    assert not torch.allclose(model(batch).text, model(other).text)
    features = model.encoder(batch.images)
    assert torch.equal(model(batch, bidirectional=True).text, model.decoder(features, batch).text)
